"""kill -9 at random moments, among them while a checkpoint is written: nothing is lost but the steps since the last."""

import os
import random
import signal
import time

import pytest
from harness import call, compare, forked, line

from tl_modules.checkpoints.files import find_corruption

KILLS = 20


@pytest.mark.slow
@pytest.mark.exact
def test_killed_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "/dev/shm" if os.path.isdir("/dev/shm") else str(tmp_path))  # another file system
    more = "--trainer.max_epochs 60 --model.backbone.width 16"
    assert call(line("GradualUnfreezing", "whole", -1, more=more)) == 0
    chance, half_written, killed = random.Random(0), 0, 0
    words = line("GradualUnfreezing", "killed", -1, more=f"{more} --save_every_n_steps 1") + " --resume"
    for _ in range(200):
        child = forked(words)
        folder = tmp_path / "runs" / "killed" / "version_0" / "checkpoints"
        started, wait = time.time(), chance.uniform(0.4, 1.6)
        part = folder / ".last.ckpt.part"
        ended = False
        while not ended and time.time() - started < (wait if killed % 2 else 5):
            if not killed % 2 and time.time() - started > wait and part.exists():  # every other time, while it saves
                break
            ended = os.waitpid(child, os.WNOHANG) != (0, 0)
            time.sleep(0.0001)
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        half_written += part.exists()
        faults = {path.name: find_corruption(path) for path in folder.glob("*.ckpt")}
        assert not any(faults.values()), faults
        if killed == KILLS:
            assert call(words) == 0
            break
    assert killed == KILLS
    assert half_written
    assert not list(folder.glob(".*.part"))
    assert compare(tmp_path / "runs" / "whole" / "version_0", folder.parent) == []
