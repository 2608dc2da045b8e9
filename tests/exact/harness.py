"""What the exact tests interrupt: a run with everything that has a state, and the ways to compare two runs.

As a program it is one rank of several: `RANK=0 WORLD_SIZE=2 ... python harness.py FullFineTuning "--data.num_workers 0"`
"""

import hashlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import nn

from tl_modules import Method
from tl_modules.cli.main import main

EPOCHS, BATCHES = 3, 7
# the last batch of two epochs, and points within the first and the last one (after an odd batch, with accumulation)
POINTS = (2, BATCHES - 1, BATCHES + 3, 2 * BATCHES - 1, 2 * BATCHES + 4)
STRATEGIES = {
    "FullFineTuning": "",
    "FeatureExtraction": "",
    "LastStages": "--model.finetuning.k 2",
    "GradualUnfreezing": "--model.finetuning.every 1 --model.finetuning.lr_decay 0.5",
    "GradualUnfreezing:steps": "--model.finetuning.every 3 --model.finetuning.unit steps",
    "GradualUnfreezing:fraction": "--model.finetuning.every 0.3 --model.finetuning.unit fraction",
    "FreezeThenUnfreeze": "--model.finetuning.after 1",
    "LoRA": "--model.finetuning.opening GradualUnfreezing --model.finetuning.dropout 0.2",
}
RUN = (
    "fit --data Digits --data.source true --data.target_labels true --data.shots_per_class 5 --data.batch_size {batch} "
    "--data.augment+=torchvision.transforms.v2.RandomAffine --data.augment.degrees 20 "
    "--data.augment+=torchvision.transforms.v2.RandomInvert "
    "--model Classification --model.backbone ConvNet --model.backbone.width 4 "
    "--model.head MLPHead --model.head.dropout 0.3 --model.head.hidden 16 "
    "--model.methods+=L2SP --model.methods+=harness.Stateful "
    "--model.lr_scheduler torch.optim.lr_scheduler.CosineAnnealingLR --model.lr_scheduler.T_max 3 "
    "--trainer.max_epochs 3 --trainer.accumulate_grad_batches 2 --trainer.logger false --trainer.num_sanity_val_steps 1 "
    "--trainer.enable_progress_bar false --trainer.callbacks+=harness.Interrupt --trainer.callbacks.at {at} "
    "--trust harness"
)


class Interrupt(Callback):
    """Sends a signal to this process (of the given rank) when a batch begins, counted over the whole run."""

    def __init__(self, at: int = -1, rank: int = 0, number: int = int(signal.SIGTERM)) -> None:
        self.at, self.rank, self.number = at, rank, number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch * BATCHES + batch_idx == self.at and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)

    def on_train_end(self, trainer, pl_module):
        file = Path(trainer.default_root_dir) / f"digest-{trainer.global_rank}"
        file.write_text(digest(dict(pl_module.named_parameters())))


class Stateful(Method):
    """A critic that learns, a memory and a teacher in buffers, a ramp over the steps, and noise."""

    def attach(self, module):
        width = module.backbone.out_features
        self.critic = nn.Linear(width, 2)
        self.register_buffer("teacher", torch.randn(module.num_outputs, width) / width)
        self.register_buffer("memory", torch.zeros(width))

    def forward(self, module, source, target):
        ramp = module.global_step / 20
        views = (source, target)
        domains = [
            nn.functional.cross_entropy(self.critic(v.pooled), torch.full((len(v.x),), i)) for i, v in enumerate(views)
        ]
        if self.training:
            with torch.no_grad():
                self.memory.lerp_(target.pooled.mean(0), 0.1)
                self.teacher.add_(0.01 * self.memory)
        noisy = target.pooled + 0.1 * torch.randn_like(target.pooled)
        near = (noisy @ self.teacher.T - target.output).square().mean()
        return sum(domains) + ramp * (near + (target.pooled.mean(0) - self.memory).square().mean())


def digest(state):
    """SHA-256 of all tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def line(strategy, name, at, world=1, more=""):
    """The command line of a run that is interrupted at a batch."""
    kind = strategy.partition(":")[0]
    two = "--trainer.accelerator cpu --trainer.strategy ddp_find_unused_parameters_true --trainer.callbacks.rank 1"
    return (
        f"{RUN.format(batch=64 // world, at=at)} {f'{two} --trainer.devices {world}' if world > 1 else ''} --name {name} "
        f"--model.finetuning {kind} {STRATEGIES[strategy]} {more}"
    )


def call(words):
    """Runs `tl`; gives its exit code."""
    try:
        main(words.split() if isinstance(words, str) else words)
    except SystemExit as stop:
        return stop.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def forked(words):
    """Starts `tl` in a forked process, which spares the imports and leaves this one without threads; gives its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            said = os.open("said.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            torch.set_num_threads(1)
            code = call(words)
        finally:
            os._exit(code)
    return child


def differences(one, two):
    """Where two nested structures differ, by path; tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(two, torch.Tensor) and torch.equal(one, two) else [""]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f" keys {sorted(map(str, one.keys() ^ two.keys()))}"]
        return [f"/{k}{path}" for k in one for path in differences(one[k], two[k])]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [" length"]
        return [f"/{i}{path}" for i, pair in enumerate(zip(one, two, strict=True)) for path in differences(*pair)]
    return [] if one == two else [f": {one} and {two}"]


def compare(one, two):
    """What differs between two runs: weights, buffers, optimizer, schedules, counters, random numbers, metrics."""
    found = []
    for file in ("last", "best"):
        states = [torch.load(run / "checkpoints" / f"{file}.ckpt", weights_only=True) for run in (one, two)]
        for key in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "ranks"):
            found += [f"{file}/{key}{path}" for path in differences(states[0][key], states[1][key])]
    for file in ("metrics.csv", "metrics.json"):
        found += [file] * ((one / file).read_text() != (two / file).read_text())
    return found


def check(strategy, folder, world=1, points=POINTS, more=""):
    """Runs once undisturbed, then interrupted at each point and resumed; gives what differs, by point."""
    first = int(os.environ.get("RANK", 0)) == 0
    ports = iter(range(int(os.environ.get("MASTER_PORT", 0)), 65000))

    def run(words):
        if world == 1:
            return call(words)
        os.environ["MASTER_PORT"] = str(next(ports))
        return os.waitstatus_to_exitcode(os.waitpid(forked(words), 0)[1])

    name = strategy.replace(":", "_")
    code = run(line(strategy, name, -1, world, more))
    assert code == 0, code
    runs, found = folder / "runs", {}
    digests = {p.read_text() for p in (runs / name / "version_0").glob("digest-*")}
    if first and len(digests) != 1:
        found["ranks"] = sorted(digests)
    for point in points:
        code = run(line(strategy, f"{name}-{point}", point, world, more))
        assert code == 143, code
        code = run(f"fit --run runs/{name}-{point} --resume --trust harness")
        assert code == 0, code
        if first and (differs := compare(runs / name / "version_0", runs / f"{name}-{point}" / "version_0")):
            found[point] = differs
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = check(sys.argv[1], Path(), int(os.environ["WORLD_SIZE"]), more=sys.argv[2])
    if os.environ["RANK"] == "0":
        Path("report.json").write_text(json.dumps(found, indent=1))
