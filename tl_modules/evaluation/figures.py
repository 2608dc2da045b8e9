"""What TensorBoard shows beside curves: inputs, mistakes, the confusion matrix, features, hyper-parameters."""

from __future__ import annotations

import heapq
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.output import DomainView
from tl_modules.evaluation.gather import evaluated
from tl_modules.evaluation.monitor import Best
from tl_modules.module import TransferModule

__all__ = ["Pictures"]

SHOWN = 16  # images in a grid
POINTS = 500  # samples in the embedding projector


class Pictures(Callback):
    """Draws at the start of `fit` its inputs, and after it and after `test` what the model makes of them.

    The mistakes, the confusion matrix and the features are those of the best checkpoint's epoch (in `fit`, of the last
    validation that was best so far; in `test`, of the test split).

    Args:
        config: What TensorBoard's HPARAMS tab shows; it is flattened.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config = flat(dict(config or {}))
        self.best = Best()
        self.kept: _Kept | None = None
        self.now = _Kept()
        self.loader: Any = None

    def state_dict(self) -> dict[str, Any]:
        """The best validation's metrics; its pictures are drawn if a resumed run finds a better one."""
        return {"best": self.best.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self.best.metrics = dict(state["best"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws the first batch, as the network has got it."""
        if trainer.current_epoch > 0 or batch_idx > 0 or not isinstance(pl_module, TransferModule):
            return
        writer = _writer(trainer)
        if writer is None:
            return
        for domain, (x, y) in batch.items():
            x = x.read(SHOWN) if isinstance(x, CachedActivations) else x
            if _is_image(x):
                titles = ["hidden"] * len(x) if y is None else [_name(pl_module, value) for value in y[:SHOWN]]
                writer.add_figure(f"inputs/{domain}", _grid(list(x[:SHOWN].cpu()), titles), 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts over."""
        # in adaptation some have no labels
        self.loader = next((e for e in evaluated(trainer) if not getattr(e, "role", "val").startswith("target")), None)
        self.now = _Kept(self.loader)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's worst and its features."""
        if _tensorboard(trainer) is not None and isinstance(outputs, dict) and not trainer.sanity_checking:
            assert isinstance(pl_module, TransferModule)
            for view in outputs.values():
                if view.y is not None:
                    self.now.add(view)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps this validation if it is the best so far."""
        if self.best.improved(trainer, pl_module):
            self.kept = self.now

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the best validation, and the hyper-parameters with its metrics."""
        from torch.utils.tensorboard.summary import hparams  # costs a second of start-up

        kept = _gathered(self.kept, trainer)
        writer = _writer(trainer)
        if writer is None or not isinstance(pl_module, TransferModule) or kept is None:
            return
        if self.loader is not None:
            kept.draw(writer, pl_module, self.loader.dataset, "val", trainer.global_step)
        metrics = {f"hp/{name}": value for name, value in self.best.metrics.items() if name.startswith("val/")}
        summaries = hparams(self.config, metrics)  # type: ignore[no-untyped-call]
        for summary in summaries:
            writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value, trainer.global_step)
        writer.flush()

    on_test_start = on_validation_start

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's worst and its features."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the test split."""
        kept = _gathered(self.now, trainer)
        writer = _writer(trainer)
        if writer is not None and kept is not None and isinstance(pl_module, TransferModule):
            kept.draw(writer, pl_module, self.loader.dataset, "test", trainer.global_step)
            writer.flush()


class _Kept:
    """What one pass over a split leaves for drawing.

    Args:
        loader: What the pass reads; its images are read again when they are drawn.
    """

    def __init__(self, loader: Any = None) -> None:
        dataset = getattr(loader, "dataset", ())
        self.rows: list[int] = list(getattr(getattr(loader, "sampler", None), "rows", range(len(dataset))))
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.features: list[Tensor] = []

    def add(self, view: DomainView) -> None:
        assert view.y is not None
        self.outputs.append(view.output)
        self.labels.append(view.y)
        if len(self.features) * len(view.y) < POINTS:
            self.features.append(view.features.float())

    def on_cpu(self) -> _Kept:
        """The same, ready to be sent; its rows are those that a limited pass has seen."""
        for part in (self.outputs, self.labels, self.features):
            part[:] = [torch.cat(part).cpu()] if part else []
        self.rows = self.rows[: len(self.labels[0])] if self.labels else []
        return self

    def draw(self, writer: Any, module: TransferModule, dataset: Any, split: str, step: int) -> None:
        if not self.rows:
            return
        outputs, labels, features = self.outputs[0], self.labels[0], self.features[0][:POINTS]
        with torch.inference_mode():
            losses = module.loss(outputs.to(module.device), labels.to(module.device)).tolist()
            prediction = module.predict(outputs)
        names = module.class_names
        classes = names is not None and prediction.ndim == 2
        guess = prediction.argmax(1) if classes else prediction
        picture = _is_image(dataset[self.rows[0]][0][None])

        def grid(title: str, places: list[int], titles: list[str]) -> None:
            if picture and places:
                writer.add_figure(title, _grid([dataset[self.rows[i]][0] for i in places], titles), step)

        worst = heapq.nlargest(SHOWN, range(len(losses)), key=losses.__getitem__)
        titles = [f"{_name(module, labels[i])} \u2192 {_name(module, guess[i])}  {losses[i]:.2f}" for i in worst]
        grid(f"{split}/worst: true, predicted, loss", worst, titles)
        if classes and names is not None:
            pairs = Counter(zip(labels.tolist(), guess.tolist(), strict=True))
            writer.add_figure(f"{split}/confusion", _confusion(pairs, names), step)
            top = [(p, n) for p, n in pairs.most_common() if p[0] != p[1]][:SHOWN]
            rows = "".join(f"| {names[a]} | {names[b]} | {n} |\n" for (a, b), n in top)
            writer.add_text(f"{split}/most confused", f"| true | predicted | times |\n|---|---|---|\n{rows}", step)
            first = {
                pair: i for i, pair in reversed(list(enumerate(zip(labels.tolist(), guess.tolist(), strict=True))))
            }
            titles = [f"{names[a]} \u2192 {names[b]}  {n} x" for (a, b), n in top]
            grid(f"{split}/most confused: true, predicted, times", [first[p] for p, _ in top], titles)
        thumbnails = None
        if picture:
            with ThreadPoolExecutor() as pool:
                images = pool.map(lambda row: _thumbnail(dataset[row][0]), self.rows[: len(features)])
            thumbnails = torch.stack(list(images))
        folder = Path(writer.log_dir) / "00000" / f"{split}_features"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier `tl test`
        shown = [_name(module, y) for y in labels[: len(features)]]
        writer.add_embedding(features, shown, thumbnails, 0, folder.name)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model": {"init_args": {"k": 1}}} -> {"model.k": 1}, for TensorBoard."""
    if not isinstance(config, dict):
        return {prefix: config if isinstance(config, int | float | str | bool) else str(config)}
    if "class_path" in config:
        short = {prefix: config["class_path"].rpartition(".")[2]}
        return short | flat({k: v for k, v in (config.get("init_args") or {}).items() if v is not None}, prefix)
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _tensorboard(trainer: Trainer) -> TensorBoardLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def _writer(trainer: Trainer) -> Any:
    """TensorBoard's writer on the first process, or None."""
    logger = _tensorboard(trainer)
    return logger.experiment if logger is not None and trainer.is_global_zero else None


def _gathered(kept: _Kept | None, trainer: Trainer) -> _Kept | None:
    """What all processes kept, on each."""
    if kept is None or trainer.world_size == 1:
        return kept and kept.on_cpu()
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, kept.on_cpu())
    whole = _Kept()
    # features are of the first samples of each process, so the samples that have one come first
    for rest in (False, True):
        for part in parts:
            count = len(part.features[0]) if part.features else 0
            chosen = slice(count, None) if rest else slice(count)
            whole.rows += part.rows[chosen]
            whole.outputs += [each[chosen] for each in part.outputs]
            whole.labels += [each[chosen] for each in part.labels]
            whole.features += [] if rest else part.features
    return whole


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def _name(module: TransferModule, value: Tensor) -> str:
    if module.class_names is not None:
        return module.class_names[int(value)]
    return ", ".join(f"{v:.3g}" for v in value.reshape(-1).tolist())


def _thumbnail(image: Tensor) -> Tensor:
    """(C, H, W) image -> (3, 32, 32) floats in [0, 1]."""
    x = image[None].float() / (255 if image.dtype == torch.uint8 else 1)
    small = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    return small[0].expand(3, -1, -1).clamp(0, 1)


def draw_domains(trainer: Trainer, module: LightningModule, evidence: Mapping[str, Any]) -> None:
    """t-SNE maps of source and target features side by side, coloured by the label, and for the target by the guess.

    Args:
        trainer: Its TensorBoard gets them as `domains/features`.
        module: Says what an output stands for.
        evidence: By title; the features of both domains (see `validators.Evidence`), or None.
    """
    writer = _writer(trainer)
    found = {title: e for title, e in evidence.items() if e is not None and e.source_features is not None}
    if writer is None or not found or not isinstance(module, TransferModule) or not module.classes:
        return
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(5 * len(found), 5.2), dpi=80, layout="constrained")
    for place, (title, each) in enumerate(found.items()):
        features = torch.cat([each.source_features, each.target_features]).flatten(1)
        perplexity = min(30.0, (len(features) - 1) / 3)
        points = TSNE(random_state=0, init="pca", perplexity=perplexity).fit_transform(features.numpy())
        axes = figure.add_subplot(1, len(found), place + 1)
        count = len(each.source_features)
        guess = each.target_output.argmax(1)
        for rows, colours, marker, name in (
            (points[:count], each.source_y, "o", "source, by label"),
            (points[count:], guess, "x", "target, by what the model says"),
        ):
            scale: Any = {"cmap": "tab10", "vmin": 0, "vmax": max(9, module.num_outputs - 1)}
            look: Any = {"s": 14, "marker": marker, "linewidths": 0.8, "alpha": 0.7, "label": name}
            axes.scatter(rows[:, 0], rows[:, 1], c=colours, **scale, **look)
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        if place == 0:
            figure.legend(loc="outside lower center", ncols=2)
    writer.add_figure("domains/features", figure, trainer.global_step)
    writer.flush()


def _grid(images: list[Tensor], titles: list[str]) -> Any:
    """Up to 16 images in rows of 4 with a title each."""
    from matplotlib.figure import Figure

    rows = -(-len(images) // 4)
    figure = Figure(figsize=(9, 2.4 * rows), dpi=80)  # a constrained layout would take a second
    for place, (image, title) in enumerate(zip(images, titles, strict=False)):
        axes = figure.add_subplot(rows, 4, place + 1)
        axes.imshow(image.squeeze(0) if image.shape[0] == 1 else image.permute(1, 2, 0), cmap="gray")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - 0.3 / (2.4 * rows), 0.1, 0.2)
    return figure


def _confusion(pairs: Mapping[tuple[int, int], int], names: list[str]) -> Any:
    """True classes down, predicted across; a row sums to 1, the numbers are counts."""
    from matplotlib.figure import Figure

    counts = torch.zeros(len(names), len(names))
    for pair, times in pairs.items():
        counts[pair] = times
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = max(5.0, 0.55 * len(names) + 1.5)
    figure = Figure(figsize=(side, side), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    if len(names) <= 30:
        for row in range(len(names)):
            for column in range(len(names)):
                if counts[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    text = str(int(counts[row, column]))
                    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return figure
