"""Lightning's Trainer with what `tl` does beside fitting and testing; each typed method is a command."""

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
        root: Where a run that is made of others goes: root/runs/NAME/version_N.
        made: That run.
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
            model: Its backbone gives the features.
            datamodule: Whose samples.
            ckpt_path: A checkpoint; None takes the backbone as its pretrained weights made it.
            out: The folder; None is `embeddings` in the run's directory. It gets features.safetensors (a tensor
                `features`) or features.npy, (N, out_features) in single precision, and index.csv: row, domain, split,
                id (a path, where there is one) and label.
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
        """Averages the weights of runs of one architecture into a run of its own; nothing is trained.

        `tl soup RUN RUN RUN --out NAME` is a model soup, `tl soup RUN --start PROBE --out NAME` WiSE-FT: half way
        back from a fine-tuned model to the one that it began with, which is better on data that are not like those of
        the training. The start is a run too, since weights without a head decide nothing: a `FeatureExtraction` from
        the same weights, best the one whose head and backbone the run has taken over.

        Args:
            model: Of the first run.
            datamodule: Of the first run; its validation split chooses.
            runs: The directories of the runs; `tl soup RUN RUN` needs no option name.
            out: The new run goes to runs/OUT/version_N.
            how: greedy: from the best run on, each next one stays if the mean with it is no worse on the validation
                split. uniform: the mean of all.
            start: The run that the others started from (WiSE-FT).
            alpha: The share of the runs in `alpha runs + (1 - alpha) start`.
            ckpt_path: The first run's best.ckpt.
        """
        self.made = soup(self, _ours(model), datamodule, runs, self.root, out, how, start, alpha)

    def calibrate(self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | None = None) -> None:
        """Fits a temperature on the validation split, so that a run's probabilities are as often right as they say.

        It goes into the checkpoint; `tl test` and `tl predict` divide the logits by it, and decide as before.

        Args:
            model: Of the run.
            datamodule: Its labelled validation split is read.
            ckpt_path: The checkpoint; it is rewritten with the temperature.
        """
        assert ckpt_path is not None
        calibrate(self, _ours(model), datamodule, Path(ckpt_path))

    def benchmark(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        batch_sizes: list[int] = [1, 8, 32],  # noqa: B006 - what the help shows
        seconds: float = 2.0,
        compile: bool = False,
    ) -> None:
        """Measures what predicting costs on this machine, and writes benchmark.json into the run's directory.

        Args:
            model: What is measured, in the run's precision.
            datamodule: Its first test batch is the input.
            ckpt_path: A checkpoint.
            batch_sizes: The numbers of samples in a batch.
            seconds: How long each batch size is timed.
            compile: Also measures torch.compile.

        Raises:
            UserError: A batch size is not positive, or there is nothing to compile with.
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

        Adapters (`LoRA`) are merged into the weights before, which may be all that is asked for.

        `tl test`, `predict` and `benchmark` take it, and `tl fit --model.backbone.weights` starts from it, e.g. to
        fine-tune what pruning has left: `tl fit -c runs/OUT/version_0/config.yaml --model.backbone.weights runs/OUT`.

        Args:
            model: What is compressed.
            datamodule: Its first test batch is what the network is followed with; "taylor" takes gradients of labelled
                training samples.
            out: The new run is runs/OUT/version_N.
            ckpt_path: A checkpoint.
            prune: The share of a sample's multiply-accumulates to remove.
            importance: How channels are ranked: by the size of their weights, within each layer ("magnitude") or over
                all layers ("lamp"), or by the estimated change of the loss ("taylor").
            quantize: Stores weights as int8; with "int8_dynamic" linear layers also compute in int8.

        Raises:
            UserError: Nothing is asked for, or the network cannot be compressed so.
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

        The rates of head and stages keep their ratios, all that the run will train is open, and methods have the
        weights that they end with. It runs on one device, on a copy: model, random numbers, cache and runs stay as they
        are.

        Args:
            model: As the run begins with it.
            datamodule: Its training batches.
            min_lr: The first learning rate, that of the head.
            max_lr: The last one.
            steps: How many learning rates are tried.
            rule: Which suggestion is taken: half way down the longest fall of the loss (valley), a tenth of the rate
                with the lowest loss (minimum), or the rate at its steepest fall. All three are printed.
            out: The folder of lr_find.png and, where the loss falls, lr_find.yaml, a config with the rate; None is
                runs/NAME.

        Raises:
            UserError: There is no range, or the folder cannot be written.
        """
        module, sweep = _ours(model), LearningRateSweep(min_lr, max_lr, steps)
        if not module.automatic_optimization:
            raise UserError(
                f"lr-find: {type(module).__name__} trains two networks against each other, and neither loss says which "
                "rate is good; keep the one that you have"
            )
        folder = _writable(Path(out or self.default_root_dir))
        solved = sweep_rates(module, datamodule, self, sweep)
        print(report(module, sweep, solved, folder, rule))

    def show_batch(
        self, model: LightningModule, datamodule: LightningDataModule, count: int = 16, out: str | None = None
    ) -> None:
        """Draws the first training batch of each domain as the network will get it: augmented, not yet normalised.

        Args:
            model: Its task draws the samples; it need not be trained.
            datamodule: Whose samples.
            count: The largest number of samples of each domain.
            out: The PNG; None is runs/NAME/batch.png.

        Raises:
            UserError: `count` is below 1 or too large for a picture, the data are not ours, the file cannot be written.
        """
        if count < 1:
            raise UserError(f"count: {count} must be at least 1")
        module, file = _ours(model), Path(out or Path(self.default_root_dir) / "batch.png")
        _writable(file.parent)
        datamodule.prepare_data()
        datamodule.setup("fit")
        loaders = by_domain(getattr(datamodule.train_dataloader(), "iterables", None), DataLoader)
        if not all(hasattr(loader, "first") for loader in loaders.values()):
            raise UserError(f"data: {type(datamodule).__name__} is no TransferDataModule, whose samples can be drawn")
        if count * len(loaders) > DRAWN:
            raise UserError(
                f"count: {count} of each of {len(loaders)} domains are more than a picture's {DRAWN} samples"
            )
        shown = {name: loader.first(count) for name, loader in loaders.items()}
        save_figure(batch_figure(module, shown), file)
        print(f"first training batch of {' and '.join(shown)}: {file}")


# the names of commands have hyphens
for _name in ("lr_find", "show_batch"):
    setattr(TransferTrainer, _name.replace("_", "-"), getattr(TransferTrainer, _name))


def _test_inputs(module: TransferModule, data: LightningDataModule) -> Any:
    """The prepared inputs of the first test batch."""
    data.setup("test")
    cast(Any, data).collate = module.collate
    (batch,) = next(iter(data.test_dataloader())).values()
    return batch.x


class TensorBoard(TensorBoardLogger):
    """Lightning's, without the hparams.yaml that would stand beside config.yaml and say less."""

    def save(self) -> None:
        """Flushes the events."""
        Logger.save(self)


def compile_backbone(module: LightningModule) -> None:
    """Lets torch.compile run the backbone; its weights keep their names.

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
        f"{found['macs'] / 1e6:,.1f} million MACs a sample{file}",
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
