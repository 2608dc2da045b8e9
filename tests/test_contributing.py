"""The examples in CONTRIBUTING.md run as they stand there, so that none grows stale."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = [(language, code) for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)]
PYTHON = [code for language, code in BLOCKS if language == "python"]
FIT = [line for _, code in BLOCKS for line in code.splitlines() if line.startswith("tl fit")]
QUICK = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"


def test_every_example_trains(ok, module_file):
    """Each Python block is the file that the `tl fit` line below it names."""
    names = [re.search(r"\b(\w+)\.[A-Z]", line).group(1) for line in FIT]
    assert names == ["mine", "counts"]
    assert len(PYTHON) == len(names)
    for name, code, line in zip(names, PYTHON, FIT, strict=True):
        module_file(name, code)
        ok(f"{line.removeprefix('tl ').replace('configs/', f'{ROOT}/configs/')} {QUICK}")


def test_files_that_are_named_exist():
    named = {path for path in re.findall(r"`((?:tl_modules|datamodules|tests|benchmarks|configs)/[\w/.]+)`", TEXT)}
    assert named
    assert not {path for path in named if not (ROOT / path).exists()}
