"""Chooses the epoch to keep if the target's labels are hidden, and reports what other criteria would have chosen.

each validation   source's labelled samples, target's samples without labels -> a score per criterion
                  the predicted labels of the target's validation and test samples are recorded
best.ckpt         the epoch with the best score by the criterion, `--selection.criterion`
tl test           only now the labels are read: per criterion its choice, and the gap to the oracle
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.checkpoints.files import replacing, write_metrics
from tl_modules.errors import UserError
from tl_modules.evaluation.criteria import CRITERIA, CriterionInputs, a_distance
from tl_modules.evaluation.figures import draw_domains
from tl_modules.evaluation.gather import Gathering, eval_dataloaders
from tl_modules.module import TransferModule

__all__ = ["ModelSelection"]

Criterion = Literal["source", "entropy", "infomax", "snd", "bnm", "class_cluster", "dev", "few", "oracle", "last"]
log = logging.getLogger(__name__)
FEW = 500  # samples of each domain for the map of the features, at most


class ModelSelection(Callback):
    """Scores every validation by all criteria that need no target labels, and keeps what the report needs.

    If the target's labels are visible, the task's metric on them chooses, and this callback does nothing.

    Args:
        criterion: What chooses the model: "source" (the task's metric on the source's validation samples); without
            labels of the target "entropy", "infomax", "snd", "bnm", "class_cluster" or "dev"; "few" labels of the
            target (`--data.selection_labels N`); "oracle", all of them (`--data.selection_labels all`); or "last", the
            last epoch. None is "source", and without a source "infomax", or "last" if there are no classes. For an
            unseen target, not even its inputs are used.
        run: The run's directory, for the report; None writes no report.
    """

    def __init__(self, criterion: Criterion | None = None, run: Path | None = None) -> None:
        self.criterion: str | None = criterion
        self.run = run
        self.rows: list[dict[str, Any]] = []
        self.before: CriterionInputs | None = None
        self.after: CriterionInputs | None = None
        self.seen: dict[str, Gathering] = {}

    # Choosing the criterion

    def choose(self, module: LightningModule, data: Any) -> None:
        """Sets the criterion as the module's monitor.

        Raises:
            UserError: The criterion needs something that the data lacks or hides.
        """
        if not isinstance(module, TransferModule) or not hasattr(data, "labels_hidden"):
            return
        if not data.labels_hidden():
            if self.criterion is not None:
                raise UserError(
                    f"criterion: {self.criterion} has no effect: the target's labels are visible, and the task's "
                    "metric chooses"
                )
            return
        source = data.has_source()
        if not module.needs_labels:
            module.monitor = module.monitor if source else ("val/loss", "min")
            return
        metric = type(module).monitor[0].removeprefix("val/")
        if metric not in module.metrics():
            if self.criterion is not None:
                raise UserError(f"criterion: {type(module).__name__}.monitor, {metric}, is not one of its metrics")
            return
        criterion = self.criterion or ("source" if source else "infomax" if module.is_classification else "last")
        if criterion in ("source", "dev") and not source:
            raise UserError(f"criterion: {criterion} needs a source, but there is none; use infomax, snd, ..., or last")
        if criterion in CRITERIA and not module.is_classification:
            raise UserError(f"criterion: {criterion} works on class probabilities; use source, few, oracle or last")
        if criterion in CRITERIA and data.target_unseen:
            raise UserError(
                f"criterion: {criterion} uses the target, which target_unseen excludes from training and from model "
                "selection; use source or last"
            )
        if criterion in ("few", "oracle"):
            opened = data.selection_labels
            if opened is None or (criterion == "oracle" and opened != "all"):
                raise UserError(
                    f"criterion: {criterion} uses labels of the target that the data hides; show them with "
                    f"--data.selection_labels {'all' if criterion == 'oracle' else 'N'}"
                )
        if data.selection_labels is not None and data.tests_on_validation():
            opened_twice = "the target has no test split, so selection_labels shows labels of the test samples"
            if criterion in ("few", "oracle"):
                raise UserError(
                    f"criterion: {opened_twice}, which {criterion} would choose by; give the target a test split"
                )
            log.warning("%s: 'few' and 'oracle' in the report use them", opened_twice)
        self.criterion = criterion
        if criterion != "source":
            mode = type(module).monitor[1] if criterion in ("few", "oracle") else "max"
            module.monitor = (f"val/target_{criterion}", mode)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the criterion, if the command line has not."""
        if stage == "fit":
            self.choose(pl_module, getattr(trainer, "datamodule", None))

    # Collecting outputs

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts a new pass."""
        self.loaders = eval_dataloaders(trainer)
        self.seen = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collects outputs and features."""
        if not self._watches(trainer, pl_module) or not isinstance(outputs, dict):
            return
        assert isinstance(pl_module, TransferModule)
        loader = self.loaders[dataloader_idx]
        for out in outputs.values():
            output = out.output if pl_module.is_classification else None
            found = (output, out.pooled, out.y, pl_module.to_labels(out.prediction))
            self.seen.setdefault(loader.purpose, Gathering(loader)).add(samples.map_leaves(_float, found))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores the epoch and records the predicted labels of the target."""
        if not self._watches(trainer, pl_module) or "target val" not in {loader.purpose for loader in self.loaders}:
            return
        assert isinstance(pl_module, TransferModule)
        seen = {role: each.gathered(trainer)[1] for role, each in self.seen.items()}
        source = seen.get("val", (None, None, None, None))
        inputs = CriterionInputs(*seen["target val"][:2], *source[:3])
        if trainer.sanity_checking:
            if trainer.global_step == 0:
                self.before = _few(inputs)
            return
        decided = {split: seen[f"target {split}"][3] for split in ("val", "test") if f"target {split}" in seen}
        scores = self._scores(trainer, pl_module, inputs, source[3], decided["val"])
        metric = type(pl_module).monitor[0].removeprefix("val/")
        shown = {f"val/source_{metric}" if name == "source" else f"val/target_{name}": s for name, s in scores.items()}
        if inputs.source_features is not None and not _unseen(trainer):
            shown["val/a_distance"] = a_distance(inputs.source_features, inputs.target_features)
        pl_module.log_dict(shown, batch_size=1)
        # boxes and the like are not kept for the report
        kept = {s: _small(pl_module, labels) for s, labels in decided.items() if isinstance(labels, Tensor | list)}
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, "scores": scores, **kept})
        if _best(self.rows, str(self.criterion), pl_module) == len(self.rows) - 1:
            self.after = _few(inputs)

    def _watches(self, trainer: Trainer, module: LightningModule) -> bool:
        return trainer.state.fn == "fit" and isinstance(module, TransferModule) and self.criterion is not None

    def _scores(
        self, trainer: Trainer, module: TransferModule, inputs: CriterionInputs, source: Any, target: Any
    ) -> dict[str, float]:
        """Returns scores of all available criteria; higher is better, except for a task metric with mode 'min'."""
        scores: dict[str, float] = {"last": float(len(self.rows))}
        if inputs.source_y is not None:
            scores["source"] = module.primary_metric(source, inputs.source_y)
        if module.is_classification and not _unseen(trainer):
            for name, criterion in CRITERIA.items():
                if name != "dev" or inputs.source_y is not None:
                    scores[name] = criterion(inputs)
        data: Any = getattr(trainer, "datamodule", None)
        rows, labels = data.open_labels() if data is not None else ([], np.zeros(0))
        rows = [row for row in rows if row < samples.count(target)]  # a limited validation has fewer
        if rows:
            name = "oracle" if data.selection_labels == "all" else "few"
            predicted = samples.take(target, torch.tensor(rows))
            scores[name] = module.primary_metric(predicted, module.label(list(labels[: len(rows)])))
        return scores

    # State and files

    @property
    def state_key(self) -> str:
        """The earlier name of this class, under which checkpoints store its state."""
        return "Selection"

    def state_dict(self) -> dict[str, Any]:
        """Returns the records so far, so that a resumed run has all of them."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the records."""
        self.rows = list(state["rows"])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes selection.pt and draws the map of the features."""
        if not self.rows or not trainer.is_global_zero:
            return
        if self.run is not None:
            torch.save({"by": self.criterion, "rows": self.rows}, self.run / "selection.pt")
        draw_domains(trainer, pl_module, {"before": self.before, "after": self.after})

    # Reporting

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the target's labels and reports what each criterion chose."""
        data = getattr(trainer, "datamodule", None)
        if self.run is None or not trainer.is_global_zero or not isinstance(pl_module, TransferModule):
            return
        file = self.run / "selection.pt"
        if not file.is_file():
            return
        kept = torch.load(file, weights_only=True)
        splits = [split for split in ("val", "test") if split in kept["rows"][0]]
        known = {split: data.labels(split) for split in splits} if data is not None else {}
        if any(own is None for own in known.values()):
            return
        labels = {split: pl_module.label(list(own)) for split, own in known.items()}
        if not labels or any(samples.count(labels[s]) != len(row[s]) for s in splits for row in kept["rows"]):
            return  # from other data, or a limited validation
        found = report(pl_module, kept["rows"], labels)
        _write(self.run, found, kept["by"], type(pl_module).monitor[0].removeprefix("val/"))


def report(module: TransferModule, rows: list[dict[str, Any]], labels: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reports what each criterion chose, scored by the target's labels.

    Args:
        module: The module, whose task's metric scores.
        rows: The records of each validation.
        labels: Labels of the target's splits "val" and, if it is a different one, "test".

    Returns:
        A row per criterion: chosen by, epoch, score on the split val, on the split test, behind the oracle. The oracle
        is the epoch with the best score on the target's validation labels; "best epoch" uses the test labels.
    """
    scored = {s: [module.primary_metric(row[s], y) for row in rows] for s, y in labels.items()}
    last = "test" if "test" in scored else "val"
    lower = type(module).monitor[1] == "min"
    pick = np.argmin if lower else np.argmax
    chosen = {name: _best(rows, name, module) for name in rows[0]["scores"] if name != "oracle"}
    chosen |= {"oracle": int(pick(scored["val"])), "best epoch": int(pick(scored[last]))}
    oracle = scored[last][chosen["oracle"]]
    return [
        {
            "chosen by": name,
            "epoch": rows[best]["epoch"],
            **{split: values[best] for split, values in scored.items()},
            "behind the oracle": scored[last][best] - oracle if lower else oracle - scored[last][best],
        }
        for name, best in chosen.items()
    ]


def _write(run: Path, found: list[dict[str, Any]], criterion: str, metric: str) -> None:
    with replacing(run / "selection.csv") as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    last = "test" if "test" in found[0] else "val"
    table = Table(title=f"{metric} on the target, by what chose the epoch", title_justify="left")
    for column in found[0]:
        table.add_column(column, justify="left" if column == "chosen by" else "right")
    metrics = {}
    for row in found:
        name = row["chosen by"]
        metrics[f"test/{'oracle' if name == 'oracle' else f'by_{name}'.replace(' ', '_')}/{metric}"] = row[last]
        if name == criterion:
            metrics["test/oracle_gap"] = row["behind the oracle"]
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()]
        table.add_row(*cells, style="bold" if name == criterion else "")
    table.caption = (
        f"{criterion} chose this run's model; the oracle saw the target's validation labels, and 'best epoch' its test "
        "labels"
    )
    Console().print(table)
    write_metrics(run, metrics)


def _float(value: Any) -> Any:
    """Converts to float32, detached."""
    return value.detach().float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _unseen(trainer: Trainer) -> bool:
    """Returns whether the target must not influence model selection, not even by its inputs."""
    return bool(getattr(getattr(trainer, "datamodule", None), "target_unseen", False))


def _small(module: TransferModule, labels: Any) -> Any:
    """Converts predicted labels to a small type, since they are kept for every epoch."""
    return labels.to(torch.int16) if module.is_classification and module.num_outputs < 2**15 else labels


def _best(rows: list[dict[str, Any]], criterion: str, module: TransferModule) -> int:
    """Returns the first of the validations with the best score."""
    scores = np.array([row["scores"].get(criterion, np.nan) for row in rows])
    lower = type(module).monitor[1] == "min" and criterion in ("source", "few", "oracle")
    worst = np.inf if lower else -np.inf
    scores = np.where(np.isfinite(scores), scores, worst)
    return int(scores.argmin() if lower else scores.argmax())


def _few(inputs: CriterionInputs) -> CriterionInputs:
    few: dict[str, Any] = {name: samples.take(value, slice(FEW)) for name, value in vars(inputs).items()}
    return CriterionInputs(**few)
