"""`tl rank`: ranks backbones and weights by how well they promise to transfer, before any training.

words -> candidates.py: backbones -> cost here -> cached features of the labelled training samples -> scores -> rank.csv
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from datamodules import TransferDataModule
from tl_modules.backbones.base import Backbone
from tl_modules.batch.output import DomainOutput
from tl_modules.cache import FeatureCache
from tl_modules.checkpoints.files import write_whole
from tl_modules.cli.arguments import nested_nulls
from tl_modules.cli.candidates import build, candidates, source_classifier
from tl_modules.cli.messages import cause, one_line
from tl_modules.cli.parser import Parser
from tl_modules.cli.precision import best_precision
from tl_modules.cli.process import importable
from tl_modules.errors import UserError
from tl_modules.evaluation.cost import machine, macs, speed
from tl_modules.evaluation.transferability import h_score, knn, leep, linear_probe, logme, nce
from tl_modules.finetuning.freezing import FeatureExtraction
from tl_modules.tasks import Classification, Regression

By = Literal["linear_probe", "logme", "h_score", "knn", "leep", "nce"]
OF_FEATURES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "linear_probe": linear_probe,
    "logme": logme,
    "h_score": h_score,
    "knn": knn,
}
OF_SOURCE: dict[str, Callable[[Tensor, Tensor], float]] = {"leep": leep, "nce": nce}
SCORES = (*OF_FEATURES, *OF_SOURCE)
COLUMNS = ("rank", "backbone", "status", *SCORES, "parameters", "macs", "ms", "error")
BATCH = 8  # samples in a timed pass
SECONDS = 0.5
MANY = 10_000  # samples; more would hardly change a score


def rank(args: Sequence[str]) -> None:
    """Runs `tl rank`.

    Args:
        args: The arguments after it.

    Raises:
        UserError: The arguments or a file have a mistake, or labels are neither classes nor values.
        DataError: The data cannot be read, or its labels are hidden.
        SystemExit: With 1 if a candidate has failed.
    """
    importable(True)
    parser = _arguments()
    config = parser.parse_args(nested_nulls(args))
    if config.budget_ms is not None and config.budget_ms <= 0:
        raise UserError(f"budget_ms: {config.budget_ms:g} must be above 0")
    entries = candidates(config.backbones)
    objects = parser.instantiate_classes(config)
    data, trust = objects.data, config.trust.split(",") if config.trust else []
    if not isinstance(data, TransferDataModule):
        raise UserError(f"data: {type(data).__name__} is not a TransferDataModule, which `tl rank` needs for labels")
    _task(data.schema)
    count = len(data.labelled_dataloader().dataset)
    rows = []
    for number, (name, entry) in enumerate(entries.items(), 1):
        try:
            seed_everything(data.seed, verbose=False)  # what is random is the same in every call
            found = measured(*build(entry, trust), data, config.budget_ms or math.inf, objects.cache)
        except Exception as error:  # other candidates continue after any error
            found = {"status": "failed", "error": one_line(cause(error) or error) or type(error).__name__}
        rows.append({"backbone": name} | found)
        print(f"[{number}/{len(entries)}] {name}: {_progress(found, config.by)}", flush=True)
    rows = ordered(rows, config.by)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(Path(config.out), text.getvalue())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"\nby {config.by}, of {count:,} training samples; {machine(device)}\n{_table(rows)}\n{config.out}")
    if any(row["status"] == "failed" for row in rows):
        raise SystemExit(1)


def _arguments() -> Parser:
    parser = Parser(
        prog="tl rank",
        description="Ranks backbones and their weights by how well they promise to transfer to the data's labelled "
        "training samples, with their cost on this machine. Nothing is trained; features are computed once and cached.",
    )
    parser.add_argument(
        "backbones",
        nargs="+",
        help="resnet18 (torchvision's or timm's, pretrained), resnet18=FILE (a hub name, a file, a run, null), a run's "
        "directory, a class; or FILE.yaml with names, each with one of these, or class_path and init_args.",
    )
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    parser.add_argument("--by", type=By, default="logme", help="The score that orders.")
    parser.add_argument(
        "--budget_ms",
        type=float | None,
        default=None,
        help=f"Skips backbones that take longer per sample, in batches of {BATCH}.",
    )
    parser.add_argument("--out", type=str, default="rank.csv", help="The CSV.")
    parser.add_argument(
        "--trust", type=str | None, default=None, help="Your own modules that a run's config may name: a,b."
    )
    parser.add_class_arguments(FeatureCache, "cache")
    return parser


def measured(
    backbone: Backbone,
    head: nn.Module | None,
    data: TransferDataModule,
    budget_ms: float = math.inf,
    cache: FeatureCache | None = None,
) -> dict[str, Any]:
    """Measures a backbone's cost on this machine, and scores its features on the data's labelled training samples.

    Args:
        backbone: The backbone.
        head: Pooled features (B, D) -> logits of the classes that it was trained on; None takes the classifier of its
            weights.
        data: The data to transfer to.
        budget_ms: Milliseconds per sample above which nothing is scored.
        cache: Stores the features, for other calls and for `tl fit`.

    Returns:
        `status` ("ranked" or "over budget"), `parameters`, `macs` and `ms` per sample, and the available scores.

    Raises:
        UserError: The data's labels are neither classes nor values, or the features are not finite.
    """
    task = _task(data.schema)
    module = task(backbone, data.schema, finetuning=FeatureExtraction())
    collected = _Collect()
    trainer = Trainer(
        devices=1,
        precision=best_precision(module),  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[collected, cache or FeatureCache()],
    )
    data.collate = module.collate
    loader = data.labelled_dataloader()
    row: dict[str, Any] = {"status": "ranked", "parameters": sum(p.numel() for p in backbone.parameters())} | _cost(
        trainer, module.backbone, next(iter(loader.read(range(min(BATCH, len(loader.dataset))), BATCH))).x
    )
    if row["ms"] > budget_ms:
        return row | {"status": "over budget"}
    trainer.validate(module, dataloaders=loader, verbose=False)
    features, labels = torch.cat(collected.features).float(), torch.cat(collected.labels)
    if not features.isfinite().all():
        raise UserError("its features are not finite")
    if len(features) > MANY:
        kept = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MANY]
        features, labels = features[kept], labels[kept]
    classes = task is Classification
    scores = {n: score(features, labels) for n, score in OF_FEATURES.items() if classes or n != "h_score"}
    classifier = head or source_classifier(backbone)
    if classes and classifier is not None:
        with torch.no_grad():
            source = classifier.float().cpu()(features).softmax(1)
        scores |= {name: score(source, labels) for name, score in OF_SOURCE.items()}
    return row | scores


def _task(schema: Mapping[str, Any]) -> type[Classification] | type[Regression]:
    if "classes" in schema["y"]:
        return Classification
    if "values" in schema["y"]:
        return Regression
    raise UserError(f"data: its labels are {', '.join(schema['y'])}; `tl rank` takes classes or values")


def _cost(trainer: Trainer, backbone: Backbone, x: Any) -> dict[str, Any]:
    device, plugin = trainer.strategy.root_device, trainer.precision_plugin
    backbone = backbone.to(device).eval()
    x = plugin.convert_input(trainer.strategy.batch_to_device(x, device))
    p50 = speed(backbone, x, BATCH, SECONDS, plugin.forward_context)["p50"]
    return {"macs": macs(backbone, x), "ms": p50 / BATCH}


class _Collect(Callback):
    """Collects pooled features and labels."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, number: int = 0
    ) -> None:
        output: DomainOutput
        (output,) = outputs.values()
        self.features.append(output.pooled.detach().cpu())
        self.labels.append(output.y.cpu())


def ordered(rows: Sequence[dict[str, Any]], by: str) -> list[dict[str, Any]]:
    """Sorts the best first and numbers the rows that have the score; the others, too slow or failed, come last."""

    def score_of(row: Mapping[str, Any]) -> float:
        score = row.get(by, math.nan)
        return -math.inf if math.isnan(score) else score

    best = sorted(rows, key=score_of, reverse=True)
    return [({"rank": number} if score_of(row) > -math.inf else {}) | row for number, row in enumerate(best, 1)]


def _progress(row: Mapping[str, Any], by: str) -> str:
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    cost = f"{row['ms']:.2f} ms per sample"
    return f"{cost}, over budget" if row["status"] != "ranked" else f"{by} {row.get(by, math.nan):.3f}, {cost}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    scores = [name for name in SCORES if any(name in row for row in rows)]
    width = max(len("backbone"), *(len(row["backbone"]) for row in rows))
    lines = [
        f"{'':>4}  {'backbone':<{width}}"
        + "".join(f"{name:>14}" for name in scores)
        + f"{'M params':>10}{'M MACs':>10}"
        f"{'ms':>8}"
    ]
    for row in rows:
        line = f"{row.get('rank', ''):>4}  {row['backbone']:<{width}}"
        line += "".join(f"{row[name]:>14.3f}" if name in row else f"{'':>14}" for name in scores)
        if "ms" in row:
            line += f"{row['parameters'] / 1e6:>10.2f}{row['macs'] / 1e6:>10.1f}{row['ms']:>8.2f}"
        lines.append(line if row["status"] == "ranked" else f"{line}  {row['status']}")
    return "\n".join(lines)
