"""Compares Lightning's BackboneFinetuning with ours: measures what is silently lost.

    python benchmarks/freezing.py          prints a Markdown table with the versions it was made with

Each row runs both on the embedded digits, with BatchNorm, from the same seed. Two processes use gloo.
"""

import logging
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from datamodules import Digits
from tl_modules import Classification, ConvNet, FreezeThenUnfreeze, FullFineTuning
from tl_modules.runs import ExactResume

warnings.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Plain(Classification):
    """A module as in Lightning's tutorial: the optimizer gets what is trainable at the start, nothing else is done."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, finetuning=FullFineTuning(), **kwargs)

    def train(self, mode=True):
        return torch.nn.Module.train(self, mode)

    def on_load_checkpoint(self, checkpoint):
        """Leaves the optimizer to Lightning."""

    def open_stages(self):
        """Leaves the freezing to the callback."""

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 1e-3)


class Later(Callback):
    """Records what is trainable and in train mode at each step, and the backbone's state after each epoch."""

    def __init__(self):
        self.open, self.norms, self.states = [], [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.open.append(all(p.requires_grad for p in module.backbone.parameters()))
        norms = [m for m in module.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        self.norms.append(any(m.training for m in norms))

    def on_train_start(self, trainer, module):
        self.states.append({name: tensor.clone() for name, tensor in module.backbone.state_dict().items()})

    def on_train_epoch_end(self, trainer, module):
        self.on_train_start(trainer, module)


def build(ours):
    """Builds the module and its callbacks: frozen for two epochs, then trainable."""
    seed_everything(0, verbose=False)
    if ours:
        return Classification(ConvNet(8), 10, finetuning=FreezeThenUnfreeze(2), lr_scheduler=None), [ExactResume()]
    return Plain(ConvNet(8), 10), [BackboneFinetuning(2, train_bn=False, verbose=False)]


def fit(ours, epochs, ckpt=None, folder=None, strategy="auto", devices=1):
    module, callbacks = build(ours)
    later = Later()
    callbacks += [
        later,
        *(
            [ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)]
            if folder
            else []
        ),
    ]
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=bool(folder), accelerator="cpu",
        strategy=strategy, devices=devices, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, Digits(batch_size=64), ckpt_path=ckpt)
    return trainer, module, later


def resume(ours):
    """Compares epoch 4 after a resume at the end of epoch 3 with an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        _, whole, _ = fit(ours, 5)
        fit(ours, 4, folder=folder)
        try:
            _, again, later = fit(ours, 5, ckpt=f"{folder}/last.ckpt")
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    same = all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    return f"{'open' if all(later.open) else 'frozen again'}, weights {'equal' if same else 'differ'}"


def batchnorm(ours):
    """Counts which tensors of a frozen backbone change in the first epoch, and which statistics normalise."""
    _, _, later = fit(ours, 1)
    before, after = later.states
    moved = sum(not torch.equal(before[name], after[name]) for name in before)
    mode = "the batch's" if any(later.norms) else "its own"
    return f"{moved} of {len(before)} tensors moved; normalised by {mode} statistics"


def dropped(ours):
    """Counts which new tensors of a second block are missing in an optimizer that holds those of the first."""
    module = Classification(ConvNet(8), 10, finetuning=FreezeThenUnfreeze(2))
    first, second = (
        list(module.backbone.model[0][at : at + 2].parameters()) for at in (0, 3)
    )  # convolution, BatchNorm
    if ours:
        held = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
        missing = sum(id(p) not in held for p in second)
    else:
        missing = len(second) - len(BaseFinetuning.filter_on_optimizer(torch.optim.Adam(first), second))
    return f"{missing} of {len(second)} tensors missing"


def ranks(ours):
    """Measures how far the weights of two processes drift apart."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671"]
        done = subprocess.run([*command, __file__, str(int(ours)), folder], capture_output=True, text=True, check=False)
        if done.returncode:
            return next((line[:90] for line in done.stderr.splitlines() if "Error: " in line), "failed")
        states = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    return f"largest difference {max(float((states[0][k] - states[1][k]).abs().max()) for k in states[0]):.2g}"


def one_rank(ours, folder):
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    trainer, module, _ = fit(ours, 4, strategy=strategy, devices=2)
    torch.save(dict(module.named_parameters()), Path(folder) / f"{trainer.global_rank}.pt")
    trainer.strategy.barrier()
    torch.distributed.destroy_process_group()


def main():
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    print(
        f"{versions}\n\n| closed for 2 epochs, then open | BackboneFinetuning | FreezeThenUnfreeze(2) |\n|---|---|---|"
    )
    rows = {
        "after a resume from epoch 3, the backbone is": resume,
        "the closed backbone in epoch 0": batchnorm,
        "optimizer, a second convolution and BatchNorm opened after a first": dropped,
        "two processes after opening": ranks,
    }
    for name, measure in rows.items():
        print(f"| {name} | {measure(False)} | {measure(True)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        one_rank(bool(int(sys.argv[1])), sys.argv[2])
    else:
        main()
