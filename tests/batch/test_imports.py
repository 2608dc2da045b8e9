"""Modules that importing the package loads, each in its own process."""

import subprocess
import sys

import pytest


def imports_transformers(package):
    words = f"import sys, {package}; print('transformers' in sys.modules)"
    return subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "True\n"


def test_transformers_waits_until_it_is_used():
    assert not imports_transformers("tl_modules, datamodules, tl_modules.cli.main")


def test_torchmetrics_still_imports_it():
    """Once this fails, `_import_torchmetrics` of tl_modules/batch can go."""
    pytest.importorskip("transformers")
    assert imports_transformers("torchmetrics")
