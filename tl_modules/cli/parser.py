"""The parser of `tl`: its commands, types that jsonargparse does not know, errors in one sentence."""

from __future__ import annotations

import contextlib
from numbers import Number
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import get_loader, set_dumper, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser

import datamodules
import tl_modules
from tl_modules.batch.compat import options
from tl_modules.cli.messages import explain
from tl_modules.cli.process import stop
from tl_modules.runs.directory import to_yaml
from tl_modules.runs.renamed import current_options


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        value = yaml.safe_load(str(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value} is not a number")
    return value


# torchvision's transforms are annotated with numbers.Number, which the parser would take for a class to build
register_type(Number, serializer=_number, deserializer=_number)

# averaging callbacks have it as their default
register_type(torch.device)

# the parser must read back what it writes
set_dumper("yaml", to_yaml)

# a value must not name something that runs commands, e.g. os.system
set_parsing_settings(import_path_denylist=[])

# classes that a config can name without their module
KNOWN = [name for package in (tl_modules, datamodules) for name in package.__all__]
COMMANDS = {
    "fit": "Transfer a pretrained backbone to your data.",
    "validate": "Measure a run on the validation split.",
    "test": "Measure a run on the test split.",
    "predict": "Label data with a run and write a CSV.",
    "embed": "Write a backbone's features of your data to a file.",
    "soup": "Average the weights of runs into one; WiSE-FT.",
    "calibrate": "Calibrate a run's probabilities with a temperature.",
    "benchmark": "Measure latency, memory and size of a run on this machine.",
    "compress": "Prune and quantize a run into a new run.",
    "lr-find": "Find a learning rate before training.",
    "show-batch": "Draw the first training batch, augmented.",
    "rank": "Rank backbones for your data before any training.",
    "compare": "Run and compare a grid of ways, tasks and seeds.",
}
# commands that are methods of our Trainer, and the arguments that the CLI sets itself
OWN = {"embed", "soup", "calibrate", "benchmark", "compress", "lr-find", "show-batch"}
# commands that use a run before it is trained: they take no checkpoint and create no version
BEFORE = {"lr-find", "show-batch"}
# commands that run their own validation, and leave a run's metrics and curves unchanged
QUIET = {"soup", "calibrate"}


class Parser(LightningArgumentParser):
    """Reports in one sentence what is wrong with the command line or a config, and exits with code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parses a config, a file's or a text, in which options may have their earlier names."""
        with contextlib.suppress(yaml.YAMLError):  # reported by the parser
            config = get_loader("yaml")(content)
            if isinstance(config, dict) and current_options(config):
                content = to_yaml(config)
        return super().parse_string(content, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the cause, with the closest valid name, instead of the whole help."""
        if not self.exit_on_error:  # a nested parser: the outer one adds its key
            super().error(message, ex)
        stop(explain(message, options(self), list(COMMANDS), KNOWN))
