"""Lightning's Trainer with the further commands of `tl`; each typed method is a command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.data import DataLoader

from tl_modules.batch.compat import QuickHooks
from tl_modules.batch.output import by_domain
from tl_modules.checkpoints.compressed import Kind
from tl_modules.checkpoints.files import load_checkpoint, weight_bytes, write_whole
from tl_modules.cli.calibrate import calibrate
from tl_modules.cli.compress import compress_run
from tl_modules.cli.embed import Format, embed
from tl_modules.cli.lr_find import report, sweep_rates
from tl_modules.cli.soup import How, soup
from tl_modules.deployment.pruning import Importance
from tl_modules.errors import UserError
from tl_modules.evaluation.cost import machine, macs, peak_memory, repeated, speed
from tl_modules.evaluation.drawing import DRAWN, batch_figure, save_figure
from tl_modules.finetuning.lr_finder import LearningRateSweep
from tl_modules.module import TransferModule
from tl_modules.runs.directory import load_state_into


class TransferTrainer(QuickHooks, Trainer):
    """The Trainer of `tl`.

    Attributes:
        root: Where new runs made from others go: root/runs/NAME/version_N.
        made: The new run.
    """

    root = Path()
    made: Path | None = None
    callbacks: list[Callback]
    profiler: Any

    def embed(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        out: str | None = None,
        format: Format = "safetensors",
    ) -> None:
        """Writes the backbone's features of all splits and domains for use elsewhere.

        Args:
            model: Its backbone computes the features.
            datamodule: The data.
            ckpt_path: A checkpoint; None uses the backbone with its pretrained weights.
            out: The folder; None is `embeddings` in the run's directory. It gets features.safetensors (a tensor
                `features`) or features.npy, (N, out_features) in float32, and index.csv: row, domain, split, id (a
                path, if there is one) and label.
            format: The file format of the features.

        Raises:
            UserError: The folder cannot be written.
        """
        module = _ours(model)
        if ckpt_path is not None:
            load_state_into(module, load_checkpoint(ckpt_path))
        folder = _writable(Path(out) if out else Path(self.default_root_dir) / "embeddings")
        embed(self, module, datamodule, folder, format)

    def soup(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        runs: list[str],
        out: str,
        how: How = "greedy",
        start: str | None = None,
        alpha: float = 0.5,
        ckpt_path: str | None = None,
    ) -> None:
        """Averages the weights of runs with one architecture into a new run; nothing is trained.

        `tl soup RUN RUN RUN --out NAME` is a model soup, `tl soup RUN --start PROBE --out NAME` WiSE-FT: half way back
        from a fine-tuned model to the one that it started from, which performs better on data that differ from the
        training data. The start is also a run, because weights without a head cannot classify: a `FeatureExtraction`
        run on the same weights, ideally the one whose head and backbone the run has taken over.

        Args:
            model: The first run's model.
            datamodule: The first run's data; its validation split chooses.
            runs: The directories of the runs; `tl soup RUN RUN` needs no option.
            out: The new run goes to runs/OUT/version_N.
            how: greedy: from the best run on, each next one is added if the mean with it is no worse on the validation
                split. uniform: the mean of all.
            start: The run that the others started from (WiSE-FT).
            alpha: The share of the runs in `alpha runs + (1 - alpha) start`.
            ckpt_path: The first run's best.ckpt.
        """
        self.made = soup(self, _ours(model), datamodule, runs, self.root, out, how, start, alpha)

    def calibrate(self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None = None) -> None:
        """Fits a temperature on the validation split, so that a run's probabilities match how often it is right.

        It is stored in the checkpoint; `tl test` and `tl predict` divide the logits by it, and predict the same
        classes.

        Args:
            model: The run's model.
            datamodule: The data; its labelled validation split is used.
            ckpt_path: The checkpoint; it is rewritten with the temperature.
        """
        assert ckpt_path is not None
        calibrate(self, _ours(model), datamodule, Path(ckpt_path))

    def benchmark(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        batch_sizes: list[int] = [1, 8, 32],  # noqa: B006 - shown in the help
        seconds: float = 2.0,
        compile: bool = False,
    ) -> None:
        """Measures the cost of prediction on this machine, and writes benchmark.json into the run's directory.

        Args:
            model: The model to measure, in the run's precision.
            datamodule: The data; its first test batch is the input.
            ckpt_path: A checkpoint.
            batch_sizes: The batch sizes to measure.
            seconds: Duration of the measurement per batch size.
            compile: Also measures torch.compile.

        Raises:
            UserError: A batch size is not positive, or there is no compiler.
        """
        if not batch_sizes or min(batch_sizes) < 1:
            raise UserError(f"batch_sizes: {batch_sizes} must be at least 1 each")
        module = _ours(model)
        if ckpt_path is not None:
            load_state_into(module, load_checkpoint(ckpt_path))
        device = self.strategy.root_device
        module = module.to(device).eval()
        x = self.precision_plugin.convert_input(_test_inputs(module, datamodule).to(device))
        context = self.precision_plugin.forward_context
        found: dict[str, Any] = {
            "machine": machine(device),
            "precision": self.precision,
            "parameters": sum(p.numel() for p in module.parameters()),
            "macs": macs(module, x),
            "file": Path(ckpt_path).stat().st_size if ckpt_path else None,
            "weights": weight_bytes(ckpt_path) if ckpt_path else None,
            "eager": {},
        }
        for size in batch_sizes:
            found["eager"][size] = speed(module, x, size, seconds, context)
            with torch.inference_mode(), context():
                found["eager"][size]["memory"] = peak_memory(partial(module, repeated(x, size)), device)
        if compile:
            compile_backbone(module)
            found["compiled"] = {size: speed(module, x, size, seconds, context) for size in batch_sizes}
        print(_report(found))
        if self.is_global_zero:
            write_whole(Path(self.default_root_dir) / "benchmark.json", json.dumps(found, indent=2) + "\n")

    def compress(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        out: str,
        ckpt_path: str | None = None,
        prune: float | None = None,
        importance: Importance = "magnitude",
        quantize: Kind | None = None,
    ) -> None:
        """Makes a run smaller: channels are pruned, weights become int8; the result is a run like any other.

        Adapters (`LoRA`) are merged into the weights first; this alone is possible too.

        `tl test`, `predict` and `benchmark` take it, and `tl fit --model.backbone.weights` starts from it, e.g. to
        fine-tune what pruning has left: `tl fit -c runs/OUT/version_0/config.yaml --model.backbone.weights runs/OUT`.

        Args:
            model: The model to compress.
            datamodule: The data; its first test batch traces the network; "taylor" uses gradients of labelled training
                samples.
            out: The new run is runs/OUT/version_N.
            ckpt_path: A checkpoint.
            prune: The share of a sample's multiply-accumulates to remove.
            importance: How channels are ranked: by the size of their weights, within each layer ("magnitude") or over
                all layers ("lamp"), or by the estimated change of the loss ("taylor").
            quantize: Stores weights as int8; with "int8_dynamic" linear layers also compute in int8.

        Raises:
            UserError: Nothing is requested, or the network cannot be compressed this way.
        """
        module = _ours(model).eval()
        load_state_into(module, load_checkpoint(str(ckpt_path)))
        if self.is_global_zero:
            x = _test_inputs(module, datamodule)
            self.made = compress_run(module, datamodule, x, self.root, out, prune, importance, quantize)

    def lr_find(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        steps: int = 100,
        rule: Literal["valley", "minimum", "steepest"] = "minimum",
        out: str | None = None,
    ) -> None:
        """Raises the learning rate from step to step until the loss diverges, and suggests one (Smith, WACV 2017).

        The rates of head and stages keep their ratios, all stages that the run will train are unfrozen, and methods
        have their final weights. It runs on one device, on a copy: model, random states, cache and runs do not change.

        Args:
            model: The model at the start of the run.
            datamodule: The data with the training batches.
            min_lr: The first learning rate, that of the head.
            max_lr: The last learning rate.
            steps: Number of learning rates to try.
            rule: Which suggestion is used: half way down the longest fall of the loss (valley), a tenth of the rate
                with the lowest loss (minimum), or the rate at its steepest fall (steepest). All three are printed.
            out: The folder of lr_find.png and, if the loss falls, lr_find.yaml, a config with the rate; None is
                runs/NAME.

        Raises:
            UserError: The range is empty, or the folder cannot be written.
        """
        module, sweep = _ours(model), LearningRateSweep(min_lr, max_lr, steps)
        if not module.automatic_optimization:
            raise UserError(
                f"lr-find: {type(module).__name__} trains two networks against each other: neither loss shows which "
                "rate is good; keep your current rate"
            )
        folder = _writable(Path(out or self.default_root_dir))
        solved = sweep_rates(module, datamodule, self, sweep)
        print(report(module, sweep, solved, folder, rule))

    def show_batch(
        self, model: LightningModule, datamodule: LightningDataModule, count: int = 16, out: str | None = None
    ) -> None:
        """Draws the first training batch of each domain as the network gets it: augmented, but not yet normalised.

        Args:
            model: Its task draws the samples; it may be untrained.
            datamodule: The data.
            count: Maximum number of samples of each domain.
            out: The PNG; None is runs/NAME/batch.png.

        Raises:
            UserError: `count` is below 1 or too large for a figure, the data is not ours, or the file cannot be
                written.
        """
        if count < 1:
            raise UserError(f"count: {count} must be at least 1")
        module, file = _ours(model), Path(out or Path(self.default_root_dir) / "batch.png")
        _writable(file.parent)
        datamodule.prepare_data()
        datamodule.setup("fit")
        loaders = by_domain(getattr(datamodule.train_dataloader(), "iterables", None), DataLoader)
        if not all(hasattr(loader, "first") for loader in loaders.values()):
            raise UserError(f"data: {type(datamodule).__name__} is not a TransferDataModule, as show-batch needs")
        if count * len(loaders) > DRAWN:
            raise UserError(
                f"count: {count} of each of {len(loaders)} domains are more than a figure's {DRAWN} samples"
            )
        shown = {name: loader.first(count) for name, loader in loaders.items()}
        save_figure(batch_figure(module, shown), file)
        print(f"first training batch of {' and '.join(shown)}: {file}")


# commands have hyphens, methods underscores
for _name in ("lr_find", "show_batch"):
    setattr(TransferTrainer, _name.replace("_", "-"), getattr(TransferTrainer, _name))


def _test_inputs(module: TransferModule, data: LightningDataModule) -> Any:
    """Returns the prepared inputs of the first test batch."""
    data.setup("test")
    cast(Any, data).collate = module.collate
    (batch,) = next(iter(data.test_dataloader())).values()
    return batch.x


class TensorBoard(TensorBoardLogger):
    """Lightning's logger without hparams.yaml, which would repeat part of config.yaml."""

    def save(self) -> None:
        """Flushes the events."""
        Logger.save(self)


def compile_backbone(module: LightningModule) -> None:
    """Runs the backbone through torch.compile; its weights keep their names.

    Raises:
        UserError: There is no C++ compiler for a CPU.
    """
    if module.device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise UserError("compile: torch.compile needs a C++ compiler (g++) on a CPU; install one, or leave it out")
    _ours(module).backbone.compile()


def _ours(model: LightningModule) -> TransferModule:
    if not isinstance(model, TransferModule):
        raise UserError(f"model: {type(model).__name__} has no backbone and head; this command needs a TransferModule")
    return model


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {folder} cannot be written ({error.strerror})") from error
    return folder


def _report(found: dict[str, Any]) -> str:
    file = f", file {found['file'] / 1e6:.1f} MB, weights {found['weights'] / 1e6:.1f} MB" if found["file"] else ""
    lines = [
        f"{found['machine']}, {found['precision']}: {found['parameters']:,} parameters, "
        f"{found['macs'] / 1e6:,.1f} million MACs per sample{file}",
        f"{'batch':>8}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}{'samples/s':>12}{'peak MB':>10}",
    ]
    for way in ("eager", "compiled"):
        lines += ["with torch.compile"] if way == "compiled" and way in found else []
        for size, row in found.get(way, {}).items():
            memory = f"{row['memory'] / 1e6:>10.1f}" if "memory" in row else ""
            lines.append(
                f"{size:>8}{row['p50']:>10.2f}{row['p95']:>10.2f}{row['p99']:>10.2f}{row['throughput']:>12.1f}{memory}"
            )
    return "\n".join(lines)
