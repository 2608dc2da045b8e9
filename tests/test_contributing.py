"""The examples in CONTRIBUTING.md run as they stand there, so that none grows stale."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = [(language, code) for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)]
PYTHON = [code for language, code in BLOCKS if language == "python"]
FIT = [line for _, code in BLOCKS for line in code.splitlines() if line.startswith("tl fit")]
QUICK = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"


def test_the_first_method(ok, module_file):
    """`mine.py` is what the first block says, and each `tl fit` line trains with it."""
    module_file("mine", PYTHON[0])
    assert FIT
    for line in FIT:
        ok(f"{line.removeprefix('tl ').replace('configs/', f'{ROOT}/configs/')} {QUICK}")


def test_every_python_example_is_run():
    """A further example wants a further test."""
    assert len(PYTHON) == 1


def test_files_that_are_named_exist():
    named = {path for path in re.findall(r"`((?:tl_modules|datamodules|tests|benchmarks|configs)/[\w/.]+)`", TEXT)}
    assert named
    assert not {path for path in named if not (ROOT / path).exists()}
