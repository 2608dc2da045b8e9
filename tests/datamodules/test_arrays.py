"""Large arrays are in a file that nobody has to remove, and a table read through them is the same table."""

import numpy as np
import torch

from datamodules import TabularData, arrays
from datamodules.arrays import empty_array


def test_a_large_array_is_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(arrays, "LARGE", 79)
    large, small = empty_array((10, 2), np.float32), empty_array((9, 2), np.float32)
    assert isinstance(large, np.memmap)
    assert not isinstance(small, np.memmap)
    assert not list(tmp_path.iterdir())
    large[:] = 3
    assert torch.from_numpy(large).sum() == 60


def test_a_large_table_is_the_same_table(tmp_path, monkeypatch):
    rows = "".join(f"{n / 7},{n % 5 or ''},{'abc'[n % 3]},{'yes' if n % 4 else 'no'}\n" for n in range(100))
    (tmp_path / "table.csv").write_text("x,gaps,job,label\n" + rows)

    def read():
        data = TabularData(tmp_path / "table.csv", val_fraction=0.2, test_fraction=0.2)
        return data.domains("train")["target"].dataset

    small = read()
    monkeypatch.setattr(arrays, "LARGE", 0)
    monkeypatch.setattr("datamodules.columns.BLOCK", 7)
    large = read()
    assert large.fingerprint() == small.fingerprint()
    assert torch.equal(large.numeric, small.numeric)
    assert torch.equal(large.categorical, small.categorical)
