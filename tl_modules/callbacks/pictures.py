"""What TensorBoard shows beside curves: inputs, mistakes, the confusion matrix, features, hyper-parameters."""

from __future__ import annotations

import heapq
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from tl_modules.base import DomainView, TransferModule
from tl_modules.callbacks.best import Best

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

    def state_dict(self) -> dict[str, Any]:
        """The best validation's metrics; its pictures are drawn if a resumed run finds a better one."""
        return {"best": self.best.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self.best.metrics = dict(state["best"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draws the first batch, as the network gets it."""
        writer = _writer(trainer)
        if writer is None or trainer.global_step > 0 or batch_idx > 0 or not isinstance(pl_module, TransferModule):
            return
        for domain, (x, y) in batch.items():
            if _is_image(x):
                titles = ["hidden"] * len(x) if y is None else [_name(pl_module, value) for value in y[:SHOWN]]
                writer.add_figure(f"inputs/{domain}", _grid(list(x[:SHOWN].cpu()), titles), 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts over."""
        self.now = _Kept()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's worst and its features."""
        if _tensorboard(trainer) is not None and isinstance(outputs, dict) and not trainer.sanity_checking:
            assert isinstance(pl_module, TransferModule)
            for view in outputs.values():
                self.now.add(pl_module, view)

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
        kept.draw(writer, pl_module, "val", trainer.global_step)
        metrics = {f"hp/{name}": value for name, value in self.best.metrics.items() if name != "epoch"}
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
            kept.draw(writer, pl_module, "test", trainer.global_step)
            writer.flush()


class _Kept:
    """What one pass over a split leaves for drawing."""

    def __init__(self) -> None:
        self.worst: list[tuple[float, int, Tensor, str]] = []
        self.confused: dict[tuple[int, int], Tensor] = {}
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.points: list[tuple[Tensor, Tensor, str]] = []
        self.seen = 0

    def add(self, module: TransferModule, view: DomainView) -> None:
        assert view.y is not None
        prediction = module.predict(view.output).cpu()
        images = view.x.cpu()
        room = max(0, POINTS - self.seen)
        thumbnails = _thumbnails(images[:room]) if _is_image(images) else images[:room]
        labels = view.y.cpu()
        classes = module.class_names is not None and prediction.ndim == 2
        guess = prediction.argmax(1) if classes else prediction
        each = [module.loss(view.output[i : i + 1], view.y[i : i + 1]) for i in range(len(labels))]
        for i, loss in enumerate(torch.stack(each).tolist()):
            title = f"{_name(module, labels[i])} \u2192 {_name(module, guess[i])}  {loss:.2f}"
            self.seen += 1
            heapq.heappush(self.worst, (loss, self.seen, images[i], title))
            if len(self.worst) > SHOWN:
                heapq.heappop(self.worst)
            if classes:
                pair = (int(labels[i]), int(guess[i]))
                self.pairs[pair] += 1
                if pair[0] != pair[1]:
                    self.confused.setdefault(pair, images[i])
            if i < room:
                self.points.append((view.features[i].float().cpu(), thumbnails[i], _name(module, labels[i])))

    def merge(self, other: _Kept) -> None:
        """Takes in what another process kept of its part of the split."""
        self.worst = heapq.nlargest(SHOWN, [*self.worst, *other.worst], key=lambda item: item[0])
        self.confused = other.confused | self.confused
        self.pairs += other.pairs
        self.points = [*self.points, *other.points][:POINTS]

    def draw(self, writer: Any, module: TransferModule, split: str, step: int) -> None:
        if not self.points:
            return
        picture = _is_image(self.worst[0][2][None])
        if picture:
            worst = sorted(self.worst, key=lambda item: -item[0])
            titles = [item[3] for item in worst]
            writer.add_figure(f"{split}/worst: true, predicted, loss", _grid([item[2] for item in worst], titles), step)
        if module.class_names is not None and self.pairs:
            writer.add_figure(f"{split}/confusion", _confusion(self.pairs, module.class_names), step)
            top = [(p, n) for p, n in self.pairs.most_common() if p[0] != p[1]][:SHOWN]
            names = module.class_names
            rows = "".join(f"| {names[a]} | {names[b]} | {n} |\n" for (a, b), n in top)
            writer.add_text(f"{split}/most confused", f"| true | predicted | times |\n|---|---|---|\n{rows}", step)
            if picture and top:
                images = [self.confused[p] for p, _ in top]
                titles = [f"{names[a]} \u2192 {names[b]}  {n} x" for (a, b), n in top]
                writer.add_figure(f"{split}/most confused: true, predicted, times", _grid(images, titles), step)
        features = torch.stack([point[0] for point in self.points])
        thumbnails = torch.stack([point[1] for point in self.points]) if picture else None
        folder = Path(writer.log_dir) / "00000" / f"{split}_features"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier `tl test`
        writer.add_embedding(features, [point[2] for point in self.points], thumbnails, 0, folder.name)


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
        return kept
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, kept)
    for other in parts[1:]:
        parts[0].merge(other)
    return cast(_Kept, parts[0])


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def _name(module: TransferModule, value: Tensor) -> str:
    if module.class_names is not None:
        return module.class_names[int(value)]
    return ", ".join(f"{v:.3g}" for v in value.reshape(-1).tolist())


def _thumbnails(images: Tensor) -> Tensor:
    """(B, C, H, W) images -> (B, 3, 32, 32) floats in [0, 1]."""
    x = images.float() / (255 if images.dtype == torch.uint8 else 1)
    small = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    return small.expand(-1, 3, -1, -1).clamp(0, 1)


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
