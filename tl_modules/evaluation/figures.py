"""TensorBoard content besides curves: inputs, mistakes, the confusion matrix, features, hyper-parameters."""

from __future__ import annotations

import heapq
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader

from tl_modules.batch import samples
from tl_modules.batch.cached import CachedActivations
from tl_modules.batch.output import DomainOutput, by_domain
from tl_modules.batch.ranks import every_rank
from tl_modules.evaluation.drawing import confusion, grid, raw, short
from tl_modules.evaluation.gather import Gathering, eval_dataloaders
from tl_modules.evaluation.monitor import BestMetrics
from tl_modules.module import TransferModule

__all__ = ["TensorBoardFigures"]

SHOWN = 16  # images in a grid
PLAYED = 4  # recordings with an audio player
SECONDS = 30  # at most, of a recording with a player
READ = 1000  # letters of a text in a grid
SHOWN_LETTERS = 100  # letters of a text in the projector
POINTS = 500  # samples in the embedding projector


class TensorBoardFigures(Callback):
    """Draws the inputs at the start of `fit`, and the model's predictions after `fit` and `test`.

    Mistakes, confusion matrix and features are from the best checkpoint's epoch (in `fit`, the best validation so far;
    in `test`, the test split).

    Args:
        config: The config for TensorBoard's HPARAMS tab; it is flattened.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config = flat(dict(config or {}))
        self.best = BestMetrics()
        self.kept: _Kept | None = None
        self.now = _Kept()

    @property
    def state_key(self) -> str:
        """The earlier name of this class, under which checkpoints store its state."""
        return "Pictures"

    def state_dict(self) -> dict[str, Any]:
        """Returns the best validation's metrics; its figures are drawn only if a resumed run finds a better one."""
        return {"best": self.best.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the best validation's metrics."""
        self.best.metrics = dict(state["best"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws the first batch, as the network gets it."""
        if trainer.current_epoch > 0 or batch_idx > 0 or not isinstance(pl_module, TransferModule):
            return
        writer = _writer(trainer)
        if writer is None:
            return
        loaders = by_domain(trainer.train_dataloader, DataLoader)
        for domain, part in batch.items():
            x, y, index = (*part, None)[:3]
            x = x.read(SHOWN) if isinstance(x, CachedActivations) else x
            rate: Any = getattr(pl_module.backbone, "rate", None)
            plays = rate is not None and isinstance(x, samples.Padded)
            reads = _has_text(pl_module) and hasattr(getattr(loaders[domain], "dataset", None), "rows")
            if not plays and not reads and not (isinstance(x, Tensor) and _is_image(x[0])):
                continue
            few = samples.move(samples.take(y, slice(SHOWN)), "cpu")
            names = (
                ["hidden"] * SHOWN if y is None else [pl_module.name_of(samples.first(s)) for s in samples.unbind(few)]
            )
            if reads:
                texts = [_text(loaders[domain].dataset.dataset[row][0]) for row in index[:SHOWN].tolist()]
                writer.add_text(f"inputs/{domain}", _table(("label", "text"), zip(names, texts, strict=False)), 0)
            elif plays:
                for position, (wave, name) in enumerate(zip(x.tensors()[:PLAYED], names, strict=False)):
                    heard = wave[None, : SECONDS * rate].cpu()
                    writer.add_audio(f"inputs/{domain}/{position}: {name}", heard, 0, rate)
            else:
                drawn = [raw(image, name, {}) for image, name in zip(x[:SHOWN].cpu(), names, strict=False)]
                writer.add_figure(f"inputs/{domain}", grid(drawn), 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts a new pass."""
        # in adaptation some loaders have no labels
        loaders = (e for e in eval_dataloaders(trainer) if not getattr(e, "purpose", "val").startswith("target"))
        self.now = _Kept(next(loaders, None))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's worst samples and its features."""
        if _tensorboard(trainer) is not None and isinstance(outputs, dict) and not trainer.sanity_checking:
            assert isinstance(pl_module, TransferModule)
            for out in outputs.values():
                if out.y is not None:
                    self.now.add(out)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps this validation if it is the best so far."""
        if self.best.update(trainer, pl_module):
            self.kept = self.now

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the best validation, and the hyper-parameters with its metrics."""
        from torch.utils.tensorboard.summary import hparams  # importing it takes a second

        if self.kept is None or not isinstance(pl_module, TransferModule):
            return
        self.kept.draw(trainer, pl_module, "val")
        writer = _writer(trainer)
        if writer is None:
            return
        metrics = {f"hp/{name}": value for name, value in self.best.metrics.items() if name.startswith("val/")}
        summaries = hparams(self.config, metrics)  # type: ignore[no-untyped-call]
        for summary in summaries:
            writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value, trainer.global_step)
        writer.flush()

    on_test_start = on_validation_start

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch's worst samples and its features."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the test split."""
        if isinstance(pl_module, TransferModule):
            self.now.draw(trainer, pl_module, "test")


class _Kept:
    """Collects what is drawn of one pass over a split.

    Args:
        loader: The loader of the pass; raw samples are read again when they are drawn.
    """

    def __init__(self, loader: Any = None) -> None:
        self.dataset = getattr(loader, "dataset", ())
        self.decisions, self.points = Gathering(loader), Gathering(loader)
        self.worst: list[tuple[float, int, Any]] = []  # loss, number, prediction

    def add(self, output: DomainOutput) -> None:
        module, losses = output.module, output.loss.detach()
        decided = (module.to_labels(output.prediction), output.y) if module.is_classification else ()
        self.decisions.add((losses, *decided))
        if len(self.points.rows) < POINTS:
            self.points.add((output.pooled.float(), output.y))
        numbers = self.decisions.rows[-len(losses) :]
        top = losses.topk(min(SHOWN, len(losses)))
        for loss, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            one = samples.move(samples.take(output.prediction, slice(i, i + 1)), "cpu")
            self.worst.append((loss, numbers[i], one))
        self.worst = heapq.nlargest(SHOWN, self.worst, key=_loss)

    def draw(self, trainer: Trainer, module: TransferModule, split: str) -> None:
        """Writes the figures of what all processes have kept, on the first process."""
        (rows, seen), (points, embedded) = (each.gathered(trainer) for each in (self.decisions, self.points))
        worst = heapq.nlargest(SHOWN, (each for part in every_rank(trainer, self.worst) for each in part), key=_loss)
        writer, step, dataset = _writer(trainer), trainer.global_step, self.dataset
        if writer is None or not rows:
            return

        def of_prediction(each: tuple[float, int, Any]) -> Callable[[Any], str]:
            loss, row, prediction = each
            x, y = dataset[row][:2]
            return lambda axes: f"{short(module.draw(axes, x, y, prediction), 30)}  {loss:.2f}"

        writer.add_figure(f"{split}/worst: true, predicted, loss", grid([of_prediction(each) for each in worst]), step)
        rate = (module.schema.get("x") or {}).get("audio", {}).get("rate")
        lines, reads = [], _has_text(module)
        for position, (loss, row, prediction) in enumerate(worst if reads else worst[: PLAYED if rate else 0]):
            x, y = dataset[row][:2]
            true = module.name_of(samples.first(samples.collate([y])))
            guess = module.name_of(samples.first(module.to_labels(prediction)))
            lines.append((true, guess, f"{loss:.2f}", _text(x)))
            if rate:
                title = f"{split}/worst/{position}: {true} \u2192 {guess}  {loss:.2f}"
                writer.add_audio(title, x[None, : SECONDS * rate], step, rate)
        if reads:
            writer.add_text(f"{split}/worst", _table(("true", "predicted", "loss", "text"), lines), step)
        names = module.class_names
        if module.is_classification and names is not None:
            decided = [(label, guess) for guess, label in zip(*(column.tolist() for column in seen[1:]), strict=True)]
            pairs = Counter(decided)
            writer.add_figure(f"{split}/confusion", confusion(pairs, names), step)
            top = [(p, n) for p, n in pairs.most_common() if p[0] != p[1]][:SHOWN]
            counts = _table(("true", "predicted", "times"), [(names[a], names[b], n) for (a, b), n in top])
            writer.add_text(f"{split}/most confused", counts, step)
            drawn = [
                raw(
                    dataset[rows[decided.index((a, b))]][0],
                    f"{short(names[a], 15)} \u2192 {short(names[b], 15)}  {n} x",
                    module.schema.get("x") or {},
                )
                for (a, b), n in top
            ]
            if drawn:
                writer.add_figure(f"{split}/most confused: true, predicted, times", grid(drawn), step)
        points, (features, labels) = points[:POINTS], samples.take(embedded, slice(POINTS))
        thumbnails = None
        if _is_image(dataset[rows[0]][0]):
            with ThreadPoolExecutor() as pool:
                images = pool.map(lambda row: _thumbnail(dataset[row][0]), points)
            thumbnails = torch.stack(list(images))
        folder = Path(writer.log_dir) / "00000" / f"{split}_features"
        shutil.rmtree(folder, ignore_errors=True)  # from an earlier `tl test`
        shown: list[Any] = [module.name_of(samples.first(y)) for y in samples.unbind(labels)]
        header = None
        if isinstance(dataset[rows[0]][0], str):
            header = ["label", "text"]
            texts = [" ".join(dataset[row][0].split())[:SHOWN_LETTERS] for row in points]
            shown = [[name, text] for name, text in zip(shown, texts, strict=True)]
        writer.add_embedding(rotated(features), shown, thumbnails, 0, folder.name, header)
        writer.flush()


def _loss(each: tuple[float, int, Any]) -> float:
    return each[0] if math.isfinite(each[0]) else math.inf


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens {"model": {"init_args": {"k": 1}}} to {"model.k": 1}, for TensorBoard."""
    if not isinstance(config, dict):
        return {prefix: config if isinstance(config, int | float | str | bool) else str(config)[:READ]}
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
    """Returns TensorBoard's writer on the first process, or None."""
    logger = _tensorboard(trainer)
    return logger.experiment if logger is not None and trainer.is_global_zero else None


def _has_text(module: TransferModule) -> bool:
    """Returns whether inputs are texts, or include one."""
    x = module.schema.get("x") or {}
    return "text" in x or any(isinstance(part, Mapping) and "text" in part for part in x.values())


def _text(x: Any) -> str:
    """Returns the text of a raw sample, or of its inputs."""
    parts = x.values() if isinstance(x, Mapping) else [x]
    return next((part for part in parts if isinstance(part, str)), "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats a Markdown table, TensorBoard's format for text; long cells are shortened."""
    cells = ((" ".join(str(cell).split())[:READ].replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *cells])


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] in (1, 3)


def _thumbnail(image: Tensor) -> Tensor:
    """Resizes an image (C, H, W) to (3, 32, 32) floats in [0, 1]."""
    x = image[None].float() / (255 if image.dtype == torch.uint8 else 1)
    small = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    return small[0].expand(3, -1, -1).clamp(0, 1)


def rotated(features: Tensor) -> Tensor:
    """Rotates (N, D) to (N, min(N, D)), which keeps distances and angles, since the projector's file is text."""
    return features if features.shape[1] <= len(features) else torch.linalg.qr(features.T, mode="r").R.T


def draw_domains(trainer: Trainer, module: LightningModule, evidence: Mapping[str, Any]) -> None:
    """Draws t-SNE maps of source and target features side by side, coloured by label, the target also by prediction.

    Args:
        trainer: The trainer, whose TensorBoard gets them as `domains/features`.
        module: The module, which decodes outputs.
        evidence: The features of both domains by title (see `criteria.CriterionInputs`), or None.
    """
    writer = _writer(trainer)
    found = {title: e for title, e in evidence.items() if e is not None and e.source_features is not None}
    if writer is None or not found or not isinstance(module, TransferModule) or not module.is_classification:
        return
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE

    figure = Figure(figsize=(5 * len(found), 5.2), dpi=80, layout="constrained")
    for position, (title, each) in enumerate(found.items()):
        features = torch.cat([each.source_features, each.target_features]).flatten(1)
        perplexity = min(30.0, (len(features) - 1) / 3)
        points = TSNE(random_state=0, init="pca", perplexity=perplexity).fit_transform(rotated(features).numpy())
        axes = figure.add_subplot(1, len(found), position + 1)
        count = len(each.source_features)
        guess = each.target_output.argmax(1)
        for rows, colours, marker, name in (
            (points[:count], each.source_y, "o", "source, by label"),
            (points[count:], guess, "x", "target, by predicted class"),
        ):
            scale: Any = {"cmap": "tab10", "vmin": 0, "vmax": max(9, module.num_outputs - 1)}
            look: Any = {"s": 14, "marker": marker, "linewidths": 0.8, "alpha": 0.7, "label": name}
            axes.scatter(rows[:, 0], rows[:, 1], c=colours, **scale, **look)
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        if position == 0:
            figure.legend(loc="outside lower center", ncols=2)
    writer.add_figure("domains/features", figure, trainer.global_step)
    writer.flush()
