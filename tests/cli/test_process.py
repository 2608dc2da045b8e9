"""What the process says of the machine."""

from types import SimpleNamespace

import pytest
import torch

from tl_modules.cli import process


@pytest.mark.parametrize(
    ("load", "threads", "device", "warns"),
    [(3.0, 2, "cpu", True), (1.5, 2, "cpu", False), (3.0, 1, "cpu", False), (3.0, 2, "cuda", False)],
)
def test_a_busy_machine_is_worth_a_word(load, threads, device, warns, monkeypatch, caplog):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    process.warn_of_load(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device))))
    assert ("OMP_NUM_THREADS=1" in caplog.text) == warns
    assert ("keep about 2.0 of this machine's 2 cores busy" in caplog.text) == warns
