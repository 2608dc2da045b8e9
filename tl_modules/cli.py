"""The `tl` command: LightningCLI with run directories, short errors, and both wings imported.

argv -> config (later wins) -> data, model (num_outputs and class_names linked) -> run directory -> Trainer
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import datamodules
import tl_modules
from tl_modules.arguments import given, nested_nulls, values, with_defaults
from tl_modules.callbacks import Bar, Pictures, PlainProgress, PredictionTable, RunDirectory, StageTable
from tl_modules.callbacks.best import monitor_of
from tl_modules.errors import UserError
from tl_modules.explain import explain, named, sentence
from tl_modules.runs import SECTIONS, find_run, new_run, read_config, without_weights


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        value = yaml.safe_load(str(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value} is no number")
    return value


# torchvision's transforms ask for numbers.Number, which the parser would take for a class to build
register_type(Number, serializer=_number, deserializer=_number)

# what a config can name without its module
KNOWN = [name for package in (tl_modules, datamodules) for name in package.__all__]
COMMANDS = {
    "fit": "Transfer a pretrained backbone to your data.",
    "validate": "Measure a run on the validation split.",
    "test": "Measure a run on the test split.",
    "predict": "Label data with a run and write a CSV.",
}
TRAINER_DEFAULTS = {"max_epochs": 10, "enable_model_summary": False, "log_every_n_steps": 1}


class Parser(LightningArgumentParser):
    """Says in one sentence what is wrong with the command line or a config, and stops with code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the cause, with the closest valid name, in place of the whole parser."""
        if not self.exit_on_error:  # a nested parser: the outer one adds its key
            super().error(message, ex)
        stop(explain(message, list(self._option_string_actions), list(COMMANDS), KNOWN))


class TransferCLI(LightningCLI):
    """Wires model, data and Trainer, and gives every run a directory.

    Args:
        args: The arguments after `tl`.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.run: Path | None = None
        self.command = next((word for word in args if word in COMMANDS), None)
        words = nested_nulls(args)
        if self.command and not {"-h", "--help"} & set(words):
            if words[0] != self.command:
                raise UserError(f"write the command first: `tl {self.command} ...`")
            words = with_defaults(self._expand_run(words))
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
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
        """The command that is asked for; building the arguments of the others would only cost time."""
        known = LightningCLI.subcommands()
        known["predict"].add("return_predictions")
        return {self.command: known[self.command]} if self.command else known

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        commands = parser.add_subcommands()
        self._subcommand_parsers = {}
        for name in self.subcommands():
            if self.command is None:  # `tl --help` lists the commands only
                self._subcommand_parsers[name] = self.init_parser(description=COMMANDS[name])
            else:
                self._subcommand_parsers[name] = self._prepare_subcommand_parser(
                    Trainer, name, description=COMMANDS[name]
                )
            commands.add_subcommand(name, self._subcommand_parsers[name], help=COMMANDS[name])

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses `args`; Lightning's own would warn that the process has arguments too."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what `tl` has beside Lightning's own arguments, and the links from data to model."""
        parser.add_argument("--name", type=str | None, default=None, help="The run goes to runs/NAME/version_N.")
        parser.add_argument("--run", type=str | None, default=None, help="A run's directory: its config and best.ckpt.")
        if self.command == "predict":
            parser.add_argument("--out", type=str | None, default=None, help="The CSV; in the run's directory if null.")
        if self.run is None:  # a run's config already has what the links give
            for attribute in ("num_outputs", "class_names"):
                parser.link_arguments(f"data.{attribute}", f"model.init_args.{attribute}", apply_on="instantiate")

    def _expand_run(self, args: list[str]) -> list[str]:
        """`--run DIR` becomes DIR's config, below all that the command line says, and its best checkpoint."""
        runs, checkpoints = values(args, "--run"), values(args, "--ckpt_path")
        if self.command == "fit":
            if runs:
                raise UserError(
                    "run: `tl fit` starts a run of its own; to go on from a checkpoint pass --ckpt_path FILE"
                )
            return args
        if not runs and checkpoints and not values(args, "--config", "-c"):
            folder = Path(checkpoints[-1]).parent.parent
            runs = [str(folder)] if (folder / "config.yaml").is_file() else []
        if not runs and not checkpoints and not given(args, "--print_config"):
            raise UserError(f"run: `tl {self.command}` needs a trained model; pass --run DIR or --ckpt_path FILE")
        if not runs:
            return args
        self.run = find_run(runs[-1])
        if not checkpoints:
            best = self.run / "checkpoints" / "best.ckpt"
            if not best.is_file():
                raise UserError(f"run: {self.run} has no checkpoints/best.ckpt")
            args = [*args, "--ckpt_path", str(best)]
        return [args[0], "--config", yaml.safe_dump(read_config(self.run)), *args[1:]]

    def _parse_ckpt_path(self) -> None:
        """Leaves the config alone: Lightning would let the checkpoint's hyper-parameters win over the command line."""

    # Objects

    def before_instantiate_classes(self) -> None:
        """Makes paths absolute, so that config.yaml works from anywhere; a checkpoint replaces pretrained weights."""
        config = self.config[str(self.subcommand)]
        absolute_paths(config.get("data"))
        absolute_paths(config.get("model"))
        self.saved = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True))
        if config.get("ckpt_path") is not None:
            if not Path(config.ckpt_path).is_file() and config.ckpt_path not in ("last", "hpc"):
                raise UserError(f"ckpt_path: there is no file {config.ckpt_path}")
            without_weights(config.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Gives the Trainer its run directory, loggers and callbacks."""
        config = self.config[str(self.subcommand)]
        trainer = config.trainer
        name = config.name or type(self.datamodule).__name__.lower()
        if not first_process():  # the first process chooses; the others are told by the strategy
            path = Path(trainer.default_root_dir or ".") / "runs" / name
        else:
            path = self.run or new_run(trainer.default_root_dir or ".", name)
        self.directory = path
        self.trainer_defaults = self.trainer_defaults | {"callbacks": self._callbacks(path)}
        if trainer.logger in (None, True):
            kwargs["logger"] = _TensorBoard(path.parent.parent, path.parent.name, path.name, default_hp_metric=False)
        kwargs.setdefault("default_root_dir", str(path))
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, path: Path) -> list[Callback]:
        config = self.config[str(self.subcommand)]
        callbacks: list[Callback] = [RunDirectory(path, None if self.run else self._resolved())]
        if config.trainer.logger is not False:
            callbacks.append(Pictures({key: self.saved.get(key) for key in SECTIONS if key != "trainer"}))
        if config.trainer.enable_progress_bar is not False:
            callbacks.append(Bar() if sys.stdout.isatty() else PlainProgress())
        if self.subcommand == "predict":
            callbacks.append(PredictionTable(Path(config.out) if config.out else path / "predictions.csv"))
        if self.subcommand == "fit":
            callbacks.append(StageTable())
            if config.trainer.logger is not False:
                callbacks.append(LearningRateMonitor("epoch"))
            if config.trainer.enable_checkpointing is not False:
                monitor: str | None
                monitor, mode = monitor_of(self.model)
                if config.trainer.limit_val_batches == 0:  # without validation the last epoch is the best one
                    monitor, mode = None, "max"
                folder = path / "checkpoints"
                for file, by, sense in (("best", monitor, mode), ("last", None, "min")):
                    callbacks.append(
                        ModelCheckpoint(
                            folder,
                            file,
                            monitor=by,
                            mode=sense,
                            save_on_train_epoch_end=by is None,
                            enable_version_counter=False,
                        )
                    )
        return callbacks

    def _resolved(self) -> dict[str, Any]:
        """The config with what the data decided, so that the model can be built without the data."""
        resolved: dict[str, Any] = {key: self.saved.get(key) for key in SECTIONS}
        resolved["name"] = self.directory.parent.name
        arguments = resolved["model"].setdefault("init_args", {})
        for attribute in ("num_outputs", "class_names"):
            if attribute not in arguments and hasattr(self.model, attribute):
                arguments[attribute] = getattr(self.model, attribute)
        if "classes" in resolved["data"].get("init_args", {}):
            resolved["data"]["init_args"]["classes"] = getattr(self.datamodule, "class_names", None)
        return resolved

    # Commands

    def predict(self, **kwargs: Any) -> None:
        """Predicts without keeping what the table already has."""
        self.trainer.predict(return_predictions=False, **kwargs)

    def after_fit(self) -> None:
        """Says where everything is."""
        self._say(f"tl test --run {self.directory}\ntensorboard --logdir {self.directory.parent}")

    def after_test(self) -> None:
        """Says where the numbers are."""
        self._say(f"metrics: {self.directory / 'metrics.json'}")

    after_validate = after_test

    @rank_zero_only
    def _say(self, text: str) -> None:
        print(text)


class _TensorBoard(TensorBoardLogger):
    """Lightning's, without the hparams.yaml that would stand beside config.yaml and say less."""

    def save(self) -> None:
        """Flushes the events."""
        Logger.save(self)


def first_process() -> bool:
    """Whether this is the only process or the first of several."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def absolute_paths(config: Any) -> None:
    """Makes every argument that is annotated as a Path, is relative and exists, absolute, in place and nested."""
    if isinstance(config, list):
        for item in config:
            absolute_paths(item)
    if not isinstance(config, Namespace) or not isinstance(config.get("init_args"), Namespace):
        return
    hints: dict[str, Any] = {}
    for parent in reversed(named(config.class_path).__mro__):
        if "__init__" in vars(parent):
            with contextlib.suppress(NameError, TypeError):  # a name that is imported for type checkers only
                hints |= get_type_hints(parent.__init__)
    for key, value in vars(config.init_args).items():
        if isinstance(value, str | Path) and Path in (hints.get(key), *get_args(hints.get(key))):
            full = Path(os.path.expandvars(value)).expanduser()
            config.init_args[key] = os.path.abspath(full) if full.exists() else str(value)
        else:
            absolute_paths(value)


# Errors


def stop(text: str) -> NoReturn:
    """Prints a text on standard error and exits with code 2."""
    if first_process():
        print(f"tl: error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def main(args: Sequence[str] | None = None) -> None:
    """Runs `tl`: exits with 0, with 2 after a mistake of the user's, with 1 after one of ours.

    Args:
        args: The arguments after `tl`; None takes them from the process.
    """
    sys.path.insert(0, "")  # a user's own file in the working directory can be named in a config
    quiet()
    try:
        TransferCLI(sys.argv[1:] if args is None else args)
    except Exception as error:
        ours: BaseException | None = error
        # the parser wraps what a constructor raises in exceptions of its own
        while ours is not None and not isinstance(ours, UserError | datamodules.DataError | MisconfigurationException):
            ours = ours.__cause__ or ours.__context__
        if ours is None:
            raise
        stop(sentence(ours))
    finally:  # a group that is left to the end of the interpreter can abort there, and take the exit code along
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def quiet() -> None:
    """Keeps what a user cannot act on from the terminal: advertisements, hints about workers, chatty libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in ("tl_modules", "datamodules"):
        logging.getLogger(package).setLevel(logging.INFO if first_process() else logging.ERROR)
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    # a command on a run has other callbacks than `fit` had, and a copied run another folder: both are meant
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec")
    warnings.filterwarnings("ignore", message="(Be aware that when using `ckpt_path`|The dirpath has changed)")
