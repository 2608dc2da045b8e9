"""Endings: signals, SLURM, exceptions, losses that are not finite."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tl_modules import Classification, ConvNet, LastStages, UserError
from tl_modules.checkpoints.files import load_checkpoint
from tl_modules.runs import GracefulShutdown

RUN = "fit --trainer.max_epochs 3 --model.backbone.width 4 --data.shots_per_class 6 --data.batch_size 16 --name x"
PLUGINS = """
import os
import pathlib
import torch
from lightning.pytorch import Callback
from torch.utils.data import Dataset
from datamodules import Digits
from tl_modules import Method


class Kill(Callback):
    def __init__(self, number: int = 15, at: int = 5, times: int = 1):
        self.number, self.at, self.times = number, at, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class InValidation(Kill):
    def on_train_batch_start(self, *args):
        pass

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *args):
        if trainer.current_epoch == 1 and batch_idx == 0:
            os.kill(os.getpid(), self.number)


class Breaks(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            pl_module.head[1].bias.data[3] = float("inf")


class Poison(Method):
    def __init__(self, at: int = 6, value: float = float("nan"), weight: float = 1.0):
        super().__init__(weight)
        self.at, self.value = at, value

    def forward(self, module, source, target):
        return target.output.sum() * 0 + (self.value if module.global_step == self.at else 0.0)


class Fragile(Dataset):
    def __init__(self, inner):
        self.inner, self.targets, self.read = inner, inner.targets, 0

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, row):
        self.read += 1
        if self.read == 80 and pathlib.Path("broken").exists():
            raise RuntimeError("the disk is on fire")
        return self.inner[row]


class FragileDigits(Digits):
    def domains(self, split):
        found = super().domains(split)
        return {"target": Fragile(found["target"])} if split == "train" else found
"""


@pytest.fixture(autouse=True)
def plugins(module_file):
    module_file("plugins", PLUGINS)


@pytest.fixture
def last(tmp_path):
    return tmp_path / "runs" / "x" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(number, code, tl, ok, last):
    handler = signal.getsignal(number)
    result = tl(f"{RUN} --trainer.callbacks+=plugins.Kill --trainer.callbacks.number {int(number)}")
    assert result.code == code
    assert load_checkpoint(last)["global_step"] == 6
    assert signal.getsignal(number) == handler
    ok("fit --run runs/x --resume --trust plugins")
    assert load_checkpoint(last)["epoch"] == 2


def test_a_second_signal_stops_at_once(tl, last):
    result = tl(f"{RUN} --trainer.callbacks+=plugins.Kill --trainer.callbacks.number 2 --trainer.callbacks.times 2")
    assert result.code == 130
    assert load_checkpoint(last)["global_step"] == 4  # of the epoch before


def test_a_signal_in_validation_ends_the_epoch_first(tl, last):
    result = tl(f"{RUN} --trainer.callbacks+=plugins.InValidation")
    assert result.code == 143
    assert (load_checkpoint(last)["epoch"], load_checkpoint(last)["global_step"]) == (1, 8)


def test_slurm_puts_the_job_back_into_its_queue(tl, ok, last, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/said\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    line = f"{RUN} --trainer.callbacks+=plugins.Kill --trainer.callbacks.number {int(signal.SIGUSR1)} --resume"
    assert tl(line).code == 128 + signal.SIGUSR1
    assert (tmp_path / "said").read_text() == "requeue 42\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    ok(line)  # the same command line, run again by SLURM
    assert load_checkpoint(last)["epoch"] == 2
    assert [p.name for p in last.parents[2].iterdir()] == ["version_0"]


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("at", [1, 6])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_file(value, at, tl, last):
    result = tl(f"{RUN} --model.methods+=plugins.Poison --model.methods.at {at} --model.methods.value .{value}")
    assert result.code == 2
    epoch, step = divmod(at, 4)
    assert f"epoch {epoch}, step {step} of it: train/poison is not finite" in result.err
    assert "lower the learning rate" in result.err
    if epoch:
        assert f"{last.relative_to(last.parents[4])} is the last good checkpoint" in result.err
        assert load_checkpoint(last)["epoch"] == 0
    else:
        assert not last.exists()


def test_within_a_long_epoch_it_stops_after_some_steps(tl):
    more = "--data.shots_per_class null --data.batch_size 4 --model.methods+=plugins.Poison --trainer.enable_checkpointing true"
    result = tl(f"{RUN} {more}")
    assert "epoch 0, step 6 of it: train/poison is not finite" in result.err


def test_weights_that_are_not_finite_are_not_saved(tl, last):
    result = tl(f"{RUN} --trainer.callbacks+=plugins.Breaks")
    assert result.code == 2
    assert "step 4: the weights of head.1.bias are not finite" in result.err
    assert not last.exists()


def test_an_exception_between_steps_saves_and_is_shown(tl, ok, last, tmp_path):
    (tmp_path / "broken").touch()
    line = RUN.replace("fit", "fit --data plugins.FragileDigits")
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        ok(line)
    assert load_checkpoint(last)["global_step"] == 5
    (tmp_path / "broken").unlink()
    ok("fit --run runs/x --resume --trust plugins")
    ok(line.replace("--name x", "--name whole"))
    whole = tmp_path / "runs" / "whole" / "version_0"
    states = [load_checkpoint(p)["state_dict"] for p in (last, whole / "checkpoints" / "last.ckpt")]
    assert all((states[0][k] == states[1][k]).all() for k in states[0])
    assert (whole / "metrics.csv").read_text() == (last.parents[1] / "metrics.csv").read_text()


def test_save_every_so_many_steps(ok, last, tmp_path, monkeypatch):
    from tl_modules.runs import interruptions

    saved = []
    monkeypatch.setattr(
        interruptions.Trainer, "save_checkpoint", lambda trainer, path, *a: saved.append(trainer.global_step)
    )
    ok(f"{RUN} --save_every_n_steps 2 --trainer.max_epochs 1")
    assert saved[:1] == [2]


def test_resume_finds_its_run(tl, ok, last):
    assert "pass --run DIR, or --name NAME" in tl("fit --resume").err
    assert "pass --resume too" in tl("fit --run runs/x").err
    ok(f"{RUN} --resume")  # starts it
    assert load_checkpoint(last)["epoch"] == 2
    assert "nothing left to train" in ok(f"{RUN} --resume")
    assert "nothing left to train" in ok("fit --run runs/x --ckpt_path last")
    ok("fit --run runs/x --resume --trainer.max_epochs 4")
    assert load_checkpoint(last)["epoch"] == 3
    shutil.rmtree(last.parent)
    ok("fit --run runs/x --resume --trainer.max_epochs 1")  # killed before its first save
    assert load_checkpoint(last)["epoch"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("who", ["group", "main process"])
def test_a_signal_from_outside_with_workers_and_processes(who, tmp_path, last):
    """`timeout`, Ctrl-C and schedulers signal the whole group, workers included; `kill` only the first process."""
    import subprocess
    import sys
    import time

    two = "--trainer.accelerator cpu --trainer.devices 2 --trainer.strategy ddp" if who == "main process" else ""
    line = f"{RUN} --trainer.max_epochs 500 --data.num_workers 2 --save_every_n_steps 1 {two}"
    port = str(29000 + os.getpid() % 900)
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(
            [sys.executable, "-m", "tl_modules", *line.split()], cwd=tmp_path, stdout=said, stderr=said,
            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": port},
        )  # fmt: skip
    while "epoch 2/" not in (tmp_path / "said").read_text():
        assert run.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.1)
    (os.killpg if who == "group" else os.kill)(run.pid, signal.SIGTERM)
    assert run.wait(60) == 143, (tmp_path / "said").read_text()
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert load_checkpoint(last)["epoch"] >= 1
    for _ in range(100):  # nobody is left, but for what waits to be collected
        left = subprocess.run(
            ["ps", "-o", "stat=", "-s", str(run.pid)], capture_output=True, text=True, check=False
        ).stdout
        if not left.replace("Z", "").strip(" \nNl+s"):
            return
        time.sleep(0.1)
    raise AssertionError(left)


def test_a_save_checks_what_trains_and_frozen_weights_once(monkeypatch):
    module, seen = Classification(ConvNet(4), 3, finetuning=LastStages(1)), []
    module.trainable = range(2, 3)
    shutdown, trainer = GracefulShutdown(Path("last.ckpt")), SimpleNamespace(global_step=1, world_size=1)

    def save():
        seen.clear()
        shutdown.on_save_checkpoint(trainer, module, {"state_dict": module.state_dict()})
        return len(seen)

    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: seen.append(t.shape) or torch.isfinite(t))
    floats = sum(t.is_floating_point() for t in module.state_dict().values())
    frozen = sum(
        t.is_floating_point() for named in module.finetuning.frozen_tensors(module).values() for t in named.values()
    )
    assert (save(), save()) == (floats, floats - frozen)
    assert 0 < frozen < floats
    with torch.no_grad():
        first = next(module.backbone.parameters())
        first.add_(1)  # by a callback, with the audit off
        assert save() == floats - frozen + 1
        first.mul_(torch.nan)
    for _ in range(2):
        with pytest.raises(UserError, match=r"the weights of backbone\.\S+ are not finite"):
            save()


def test_a_save_sees_what_no_count_of_writes_does():
    module = Classification(ConvNet(4), 3)
    module.trainable = range(3)
    shutdown, trainer = GracefulShutdown(Path("last.ckpt")), SimpleNamespace(global_step=1, world_size=1)
    shutdown.on_save_checkpoint(trainer, module, {"state_dict": module.state_dict()})
    optimizer = torch.optim.AdamW(module.parameters(), lr=float("inf"), fused=True)  # it does not count its writes
    module.train()(torch.rand(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="are not finite"):
        shutdown.on_save_checkpoint(trainer, module, {"state_dict": module.state_dict()})
