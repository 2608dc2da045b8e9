"""kill -9 at random moments, among them while a checkpoint is written: nothing is lost but the steps since the last."""

import os
import random
import signal
import time

import pytest
import torch
from harness import call, compare, line

from tl_modules.checkpoints import damage

KILLS = 20


def forked(words):
    """Starts `tl` in a forked process, which spares the imports."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(call(words))
    return child


@pytest.mark.slow
@pytest.mark.exact
def test_killed_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path))  # another file system
    more = "--trainer.max_epochs 12 --save_every 1"
    assert call(line("GradualUnfreezing", "whole", -1, more="--trainer.max_epochs 12")) == 0
    chance, half_written, killed = random.Random(0), 0, 0
    words = line("GradualUnfreezing", "killed", -1, more=more) + " --resume"
    for _ in range(200):
        child = forked(words)
        folder = tmp_path / "runs" / "killed" / "version_0" / "checkpoints"
        wait = time.time() + chance.uniform(0.5, 2.5)
        while time.time() < wait and os.waitpid(child, os.WNOHANG) == (0, 0):
            if killed % 2 and list(folder.glob(".*.part")):  # every other time, while it saves
                break
            time.sleep(0.0005)
        else:
            if time.time() < wait:  # it came to its end
                break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        half_written += bool(list(folder.glob(".*.part")))
        faults = {path.name: damage(path) for path in folder.glob("*.ckpt")}
        assert not any(faults.values()), faults
        if killed == KILLS:
            more = more.replace("--save_every 1", "")
            assert call(words) == 0
            break
    assert killed == KILLS
    assert half_written
    assert not list(folder.glob(".*.part"))
    assert compare(tmp_path / "runs" / "whole" / "version_0", folder.parent) == []
