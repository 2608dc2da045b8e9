"""LightningCLI with run directories: turns a command line into data, model, Trainer and callbacks.

argv -> config (later wins) -> data, model (from the data's schema) -> run directory -> Trainer
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from datamodules import TransferDataModule
from tl_modules.batch.compat import OneCommand, RunCheckpoint
from tl_modules.cache import FeatureCache
from tl_modules.checkpoints.files import AtomicCheckpointIO, find_run, latest_checkpoint, remove_partial_files, versions
from tl_modules.cli.arguments import given, help_last, merge, named_runs, nested_nulls, own_config, values, without
from tl_modules.cli.batch_size import find_batch_size, out_of_memory
from tl_modules.cli.default_model import with_defaults
from tl_modules.cli.messages import no_room
from tl_modules.cli.parser import BEFORE, COMMANDS, OWN, QUIET, Parser
from tl_modules.cli.paths import absolute_paths
from tl_modules.cli.precision import best_precision
from tl_modules.cli.process import first_process, importable, warn_of_load
from tl_modules.cli.trainer import TensorBoard, TransferTrainer, compile_backbone
from tl_modules.errors import UserError
from tl_modules.evaluation import DeepEnsemble, ModelSelection, PredictionWriter, TensorBoardFigures
from tl_modules.evaluation.monitor import monitor_of
from tl_modules.finetuning.audit import FreezeAudit
from tl_modules.finetuning.optimizer import default_epochs
from tl_modules.methods.teacher import Distillation
from tl_modules.runs import EpochProgressBar, ExactResume, GracefulShutdown, LineProgress, RunFiles
from tl_modules.runs.directory import (
    SECTIONS,
    decided,
    load_run,
    new_run,
    read_config,
    to_yaml,
    without_weights,
    write_config,
)
from tl_modules.runs.renamed import current_args
from tl_modules.runs.trust import check_config, check_links, imports_only, leaves, to_trust

TRAINER_DEFAULTS = {"enable_model_summary": False, "log_every_n_steps": 50}
ENSEMBLES = {"test", "predict"}  # commands that take several runs
UNSERIALIZABLE = "Unable to serialize instance"  # what jsonargparse writes in place of an object

log = logging.getLogger(__name__)


class TransferCLI(OneCommand, LightningCLI):
    """Connects model, data and Trainer, and gives every run a directory.

    Args:
        args: The arguments after `tl`.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.helps = COMMANDS
        self.run: Path | None = None
        self.others: list[Path] = []
        self.configured = False
        self.trusted: list[str] = []
        self.command = next((word for word in args if word in COMMANDS), None)
        words = nested_nulls(help_last(current_args(args)))
        runs = self.command is not None and not {"-h", "--help"} & set(words)
        if runs:
            if words[0] != self.command:
                raise UserError(f"write the command first: `tl {self.command} ...`")
            words = named_runs(words) if self.command == "soup" else words
            words = self._expand_run(words)
        importable(not self.configured or bool(self.trusted))
        if runs and not self.configured:  # a run's config is complete
            words = with_defaults(words)
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            trainer_class=TransferTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"prog": "tl", "description": "Transfer learning: one config, one command."},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=words,
        )

    # Arguments

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Returns only the requested command, since building the arguments of the others takes time."""
        known = LightningCLI.subcommands()
        known["predict"].add("return_predictions")
        known |= {name: {"model", "datamodule"} for name in OWN} | {"rank": set(), "compare": set()}
        return {self.command: known[self.command]} if self.command else known

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses `args`; Lightning's own method would warn that the process has arguments too."""
        with imports_only(self.trusted) if self.configured else contextlib.nullcontext():
            self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of `tl` beside Lightning's, and the links from data to model."""
        parser.add_argument("--name", type=str | None, default=None, help="The run goes to runs/NAME/version_N.")
        what = "A run's directory: its config and best.ckpt. Several, in test and predict: an ensemble."
        parser.add_argument("--run", type=str | None, default=None, help=what)
        parser.add_argument(
            "--trust", type=str | None, default=None, help="Your own modules that the run's config may name: a,b."
        )
        parser.add_class_arguments(FeatureCache, "cache")
        parser.add_class_arguments(ModelSelection, "selection", skip={"run"})
        if self.command == "fit":
            parser.add_argument("--resume", action="store_true", help="Resume --run DIR, or the newest run of --name.")
            parser.add_argument(
                "--save_every_n_steps", type=int | None, default=None, help="Save last.ckpt also after every N steps."
            )
            parser.add_argument("--audit", type=bool, default=True, help="Check that exactly the intended parts train.")
            parser.add_argument("--compile", action="store_true", help="Run the backbone through torch.compile.")
            parser.add_argument("--find_batch_size", action="store_true", help="Take the largest batch size that fits.")
        if self.command == "predict":
            parser.add_argument("--out", type=str | None, default=None, help="The CSV; in the run's directory if null.")
            top = "Write only the K most probable classes of each sample, instead of a column for each class."
            parser.add_argument("--top_k", type=int | None, default=None, help=top)
        if not self.configured:  # a run's config already contains the linked values
            parser.link_arguments("data.schema", "model.init_args.schema", apply_on="instantiate")

    def _expand_run(self, args: list[str]) -> list[str]:
        """Puts the config of --run first, so that the command line overrides it, and adds its checkpoint."""
        # modules that the command line itself names are the user's own
        named = [name for text in values(args, "--trust") for name in text.split(",")]
        self.trusted = named + to_trust(own_config(args))
        self.root = (values(args, "--trainer.default_root_dir") or ["."])[-1]
        Distillation.read_run = staticmethod(partial(load_run, trust=self.trusted))  # for teachers too
        resume = given(args, "--resume") or values(args, "--ckpt_path")[-1:] == ["last"]
        self.run = self._run_to_resume(args, resume) if self.command == "fit" else self._trained_run(args)
        if self.run is None:
            return without(args, "--ckpt_path") if resume else args
        check_links(self.run)
        # a command line with --name is complete, like a job that is run again
        self.configured = bool(values(args, "--run")) or not resume
        config = ["--config", to_yaml(read_config(self.run, self.trusted))] if self.configured else []
        if self.command not in BEFORE and (resume or not given(args, "--ckpt_path")):
            file = latest_checkpoint(self.run / "checkpoints") if resume else self.run / "checkpoints" / "best.ckpt"
            args = without(args, "--ckpt_path")
            if file is None:
                log.warning("%s has no checkpoint yet: starting from scratch", self.run)
            elif not file.is_file():
                raise UserError(f"run: {self.run} has no checkpoints/best.ckpt")
            else:
                args = [*args, "--ckpt_path", str(file)]
        return [args[0], *config, *args[1:]]

    def _run_to_resume(self, args: list[str], resume: bool) -> Path | None:
        """Returns the run that `tl fit` resumes; None starts a new one."""
        runs, names = values(args, "--run"), values(args, "--name")
        if not resume:
            if runs:
                raise UserError(f"run: `tl fit` starts a new run; to resume {runs[-1]}, pass --resume too")
            return None
        if runs:
            return find_run(runs[-1])
        if not names:
            raise UserError("resume: pass --run DIR, or --name NAME for the newest run of that name (or its first one)")
        folder = Path(self.root) / "runs" / names[-1]
        return find_run(folder) if any((p / "config.yaml").is_file() for p in versions(folder).values()) else None

    def _trained_run(self, args: list[str]) -> Path | None:
        """Returns the run that a command uses; None if only a checkpoint is given."""
        runs, checkpoints = values(args, "--run"), values(args, "--ckpt_path")
        if not runs and checkpoints and not given(args, "--config") and not given(args, "-c"):
            folder = Path(checkpoints[-1]).parent.parent
            return find_run(folder) if (folder / "config.yaml").is_file() else None
        if (
            not runs
            and not checkpoints
            and self.command not in {"embed", *BEFORE}
            and not given(args, "--print_config")
        ):
            raise UserError(f"run: `tl {self.command}` needs a trained model; pass --run DIR or --ckpt_path FILE")
        if len(runs) > 1 and self.command not in ENSEMBLES:
            raise UserError(f"run: `tl {self.command}` takes one run; `tl test` and `tl predict` take several")
        self.others = [find_run(run) for run in runs[1:]]
        return find_run(runs[0]) if runs else None

    # Objects

    def before_instantiate_classes(self) -> None:
        """Makes paths absolute, so that config.yaml works from anywhere; a checkpoint replaces pretrained weights."""
        config = self.config[str(self.subcommand)]
        absolute_paths(config.get("data"))
        absolute_paths(config.get("model"))
        self.saved = yaml.safe_load(self.command_parser().dump(config, skip_none=False, skip_validation=True))
        for key, text, owner in leaves(self.saved):
            if isinstance(text, str) and text.startswith(UNSERIALIZABLE):
                value = text.removeprefix(UNSERIALIZABLE).strip()
                raise UserError(f"{owner}: its {key}, {value}, cannot be written to config.yaml; pass it as plain data")
        if self.configured and self.run is not None:  # includes what texts and further files contain
            said = {key: self.saved.get(key) for key in SECTIONS}
            check_config(said, self.trusted, f"run: {self.run / 'config.yaml'}")
        if config.get("ckpt_path") is not None:
            if not Path(config.ckpt_path).is_file():
                raise UserError(f"ckpt_path: there is no file {config.ckpt_path}")
            without_weights(config.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the Trainer with its run directory, loggers and callbacks."""
        config = self.config[str(self.subcommand)]
        trainer = config.trainer
        if hasattr(self.datamodule, "resolve"):
            merge(self.saved["data"], {"init_args": self.datamodule.resolve(getattr(self.model, "data_defaults", {}))})
        name = config.name or type(self.datamodule).__name__.lower()
        # the first process chooses the directory, and the strategy broadcasts it
        if self.command in BEFORE or not first_process():
            path = Path(trainer.default_root_dir or ".") / "runs" / name
        else:
            path = self.run or new_run(trainer.default_root_dir or ".", name)
        self.directory = path
        if self.command in ("fit", "test", "validate") and path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"run: {path} cannot be written; work on a copy of it")
        if trainer.precision is None:
            precision = best_precision(self.model, trainer.accelerator)
            kwargs["precision"] = trainer.precision = self.saved["trainer"]["precision"] = precision
        if self.subcommand == "fit" and trainer.max_epochs is None and trainer.max_steps == -1 and not trainer.max_time:
            known = isinstance(self.datamodule, TransferDataModule)
            loaders = self.datamodule.train_dataloader().flattened if known else []
            epochs = default_epochs([len(loader.dataset) for loader in loaders])
            kwargs["max_epochs"] = trainer.max_epochs = self.saved["trainer"]["max_epochs"] = epochs
        self.trainer_defaults = self.trainer_defaults | {"callbacks": self._callbacks(path)}
        if trainer.barebones:
            raise UserError("barebones: a run consists of what it leaves out; `tl benchmark` measures speed")
        if self.command in (*QUIET, "predict"):
            kwargs["logger"] = False
        elif trainer.logger in (None, True):
            kwargs["logger"] = TensorBoard(path.parent.parent, path.parent.name, path.name, default_hp_metric=False)
        plugins = self.config_init[str(self.subcommand)].trainer.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        kwargs.setdefault("default_root_dir", str(path))
        built = cast(TransferTrainer, super().instantiate_trainer(**kwargs))
        built.root = Path(self.root)  # for new runs; set by the user, not by a run's config
        return built

    def _callbacks(self, path: Path) -> list[Callback]:
        config = self.config[str(self.subcommand)]
        own = to_trust(self.saved)
        self.trust = f" --trust {','.join(own)}" if own else ""
        if self.command in BEFORE:
            self.trust = ""
            return [FeatureCache(**config.cache)]
        if self.command in QUIET:
            return []
        selection = ModelSelection(**config.selection, run=path)
        if self.subcommand == "fit":
            selection.choose(self.model, self.datamodule)
        self.files = RunFiles(path, self._resolved() if self.subcommand == "fit" else {})
        callbacks: list[Callback] = [self.files, selection]
        if config.trainer.logger is not False:
            callbacks.append(TensorBoardFigures({key: self.saved.get(key) for key in SECTIONS if key != "trainer"}))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(EpochProgressBar() if sys.stdout.isatty() else LineProgress())
        if self.others:
            callbacks.append(DeepEnsemble([load_run(other, trust=self.trusted) for other in self.others]))
        if self.subcommand == "predict":
            file = Path(config.out) if config.out else path / "predictions.csv"
            callbacks.append(PredictionWriter(file, config.top_k))
        if self.subcommand == "fit":
            callbacks += [FreezeAudit(config.audit), ExactResume()]
            if config.trainer.logger is not False:
                callbacks.append(LearningRateMonitor("epoch"))
            if config.trainer.enable_checkpointing is not False:
                callbacks += self._checkpoints(path / "checkpoints")
        # last, so that its processes start after the signal handlers are set
        return [*callbacks, FeatureCache(**config.cache)]

    def _checkpoints(self, folder: Path) -> list[Callback]:
        """Builds callbacks for best.ckpt, by the monitored metric, and last.ckpt, after each epoch and interruption."""
        config = self.config[str(self.subcommand)]
        monitor: str | None
        monitor, mode = monitor_of(self.model)
        if config.trainer.limit_val_batches == 0:  # without validation the last epoch is the best one
            monitor, mode = None, "max"
        each = {"best": (monitor, mode), "last": (None, "min")}
        if first_process():
            remove_partial_files(folder)
        return [
            GracefulShutdown(
                folder / "last.ckpt", config.save_every_n_steps, f"tl fit --run {folder.parent} --resume{self.trust}"
            ),
            *(
                RunCheckpoint(
                    folder,
                    file,
                    monitor=by,
                    mode=sense,
                    save_on_train_epoch_end=by is None,
                    enable_version_counter=False,
                )
                for file, (by, sense) in each.items()
            ),
        ]

    def _resolved(self) -> dict[str, Any]:
        """Returns the config with the values that the data decided, so that the model can be built without the data."""
        resolved: dict[str, Any] = {key: self.saved.get(key) for key in SECTIONS}
        resolved["name"] = self.directory.parent.name
        arguments = resolved["model"].setdefault("init_args", {})
        if "schema" not in arguments and hasattr(self.model, "schema"):
            arguments["schema"] = dict(self.model.schema)
        decided(arguments.get("backbone"), getattr(self.model, "backbone", None))
        strategy = (arguments.get("finetuning") or {}).get("init_args", {})
        if "backbone_lr" in strategy and hasattr(self.model, "backbone_lr"):
            strategy["backbone_lr"] = self.model.backbone_lr
        for argument, attribute in (("classes", "class_names"), ("categories", "categories"), ("columns", "columns")):
            if argument in resolved["data"].get("init_args", {}):
                resolved["data"]["init_args"][argument] = getattr(self.datamodule, attribute, None)
        return resolved

    # Commands

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Turns errors of full memory or a full disk into advice."""
        try:
            yield
        except OSError as error:  # from a logger, without the file's name
            raise no_room(error, self.directory) or error from error.__cause__
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            size = getattr(self.datamodule, "batch_size", 1)
            smaller = f"try --data.batch_size {max(1, size // 2)}, or pass --find_batch_size to tl fit"
            raise UserError(f"out of memory with a batch size of {size}; {smaller}") from error

    def before_fit(self) -> None:
        """Finds the batch size, if requested, and writes it to the run's config; compiles the backbone."""
        warn_of_load(self.trainer)
        config = self.config[str(self.subcommand)]
        if config.find_batch_size:
            size = find_batch_size(self.model, self.datamodule, self.trainer, config.trainer.precision or "32-true")
            self.datamodule.batch_size = size
            self.files.config["data"]["init_args"]["batch_size"] = size
            self._say(f"batch size {size}")
        if config.compile:
            compile_backbone(self.model)

    def predict(self, **kwargs: Any) -> None:
        """Predicts without keeping outputs that the CSV already has."""
        self.trainer.predict(return_predictions=False, **kwargs)

    def after_fit(self) -> None:
        """Prints where everything is."""
        if getattr(self.trainer, "fast_dev_run", False):
            return self._say(f"fast_dev_run: all steps ran; {self.directory} has no checkpoint to test")
        if not self.files.trained and self.trainer.fit_loop.done:  # spawned processes have trained elsewhere
            ended = "max_steps" if 0 <= self.trainer.max_steps <= self.trainer.global_step else "max_epochs"
            self._say(f"nothing left to train: {self.directory} has reached its end; pass --trainer.{ended} N for more")
        if best := str(self.files.best):
            self._say(f"kept {best}")
        then = f"tl test --run {self.directory}{self.trust}"
        if not (self.directory / "checkpoints" / "best.ckpt").is_file():
            then = f"{self.directory} has no best.ckpt to test: no epoch was validated, or checkpoints are off"
        self._say(f"{then}\ntensorboard --logdir {self.directory.parent}")

    def after_test(self) -> None:
        """Prints where the metrics are."""
        self._say(f"metrics: {self.directory / 'metrics.json'}")

    after_validate = after_test

    def after_compress(self) -> None:
        """Writes the new run's config, a copy of the old one's; its checkpoint is complete by then."""
        run = cast(TransferTrainer, self.trainer).made
        if run is None:  # another process wrote it
            return
        config = self._resolved() | {"name": run.parent.name}
        if "checkpoint_weights" in config["model"]["init_args"]:
            config["model"]["init_args"]["checkpoint_weights"] = "all"
        write_config(run, config)
        if self.model.backbone.pruned:
            self._say(f"tl fit -c {run / 'config.yaml'} --model.backbone.weights {run}{self.trust}")
        self._say(f"tl test --run {run}{self.trust}")

    @rank_zero_only
    def _say(self, text: str) -> None:
        print(text)
