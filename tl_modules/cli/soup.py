"""`tl soup`: averages the weights of runs with one architecture into a new run; nothing is trained.

    tl soup RUN RUN RUN --out NAME              a greedy soup (Wortsman et al., ICML 2022)
    tl soup RUN --start PROBE --out NAME        WiSE-FT: half way back to the start (Wortsman et al., CVPR 2022)

runs -> their best.ckpt -> validation: which ones to use -> weighted mean -> BatchNorm's statistics ->
runs/NAME/version_N
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from tl_modules.batch import samples
from tl_modules.batch.compat import BatchNorm
from tl_modules.checkpoints.files import find_run, load_checkpoint, write_metrics
from tl_modules.errors import UserError
from tl_modules.evaluation.monitor import floats, monitor_of
from tl_modules.evaluation.test_time import taking_statistics
from tl_modules.module import TransferModule
from tl_modules.runs.directory import load_state_into, new_run, write_config

How = Literal["greedy", "uniform"]
StateDict = dict[str, Tensor]
Shares = dict[Path, float]
# the averaged parts; a method's critic or teacher stays that of the first run
NETWORK = ("backbone.", "bottleneck.", "head.")


class Soup:
    """Averages runs and measures the averages on the validation split.

    Args:
        trainer: Runs the validation.
        module: The first run's module; gets the weights of each average.
        data: The datamodule; its validation split chooses, and its training inputs give BatchNorm's statistics.
        runs: The directories of all runs.
    """

    def __init__(
        self, trainer: Trainer, module: TransferModule, data: LightningDataModule, runs: Sequence[Path]
    ) -> None:
        self.trainer, self.module, self.data = trainer, module, data
        self.metric, self.mode = monitor_of(module)
        self.states: dict[Path, StateDict] = {}
        self.rest: StateDict = {}
        for run in runs:
            self._read(run, runs[0])

    def _read(self, run: Path, first: Path) -> None:
        if differing := _differing(_architecture(run), _architecture(first)):
            raise UserError(f"soup: {run} and {first} differ in {differing}; use runs of one architecture")
        content = load_checkpoint(run / "checkpoints" / "best.ckpt")
        if content.get("transfer") != self.module.task_description():
            raise UserError(f"soup: {run} and {first} have different classes or values; use runs of one task")
        network = {k: v for k, v in content["state_dict"].items() if k.startswith(NETWORK)}
        if run == first:
            self.rest = {k: v for k, v in content["state_dict"].items() if not k.startswith(NETWORK)}
        try:
            load_state_into(self.module, content | {"state_dict": self.rest | network})
        except UserError as error:
            raise UserError(f"soup: {run} and {first} have different architectures ({error})") from error
        # including what its checkpoint left out
        self.states[run] = {
            k: v.detach().cpu().clone() for k, v in self.module.state_dict().items() if k.startswith(NETWORK)
        }

    def measure(self, shares: Shares) -> float:
        """Sets this average's weights in the module, and validates it.

        Raises:
            UserError: The validation split has no labels.
        """
        mixture = mixed([self.states[run] for run in shares], list(shares.values()))
        self.module.load_state_dict(mixture, strict=False)
        self.module.temperature = 1.0  # a temperature of one run does not suit the average
        self._take_statistics([self.states[run] for run in shares])
        self.trainer.validate(self.module, datamodule=self.data, verbose=False)
        found = floats(self.trainer, "val/")
        if self.metric not in found:
            raise UserError(f"soup: {self.metric} needs labels, but the validation split has none")
        return found[self.metric]

    def _take_statistics(self, states: Sequence[StateDict]) -> None:
        """Recomputes the running statistics of BatchNorm layers that were trained, as in stochastic weight averaging.

        A layer with the same statistics in all runs has kept the pretrained ones, and keeps them here too.
        """
        named = [(n, m) for n, m in self.module.named_modules() if isinstance(m, BatchNorm) and n.startswith(NETWORK)]
        keys = [(f"{name}.running_mean", layer) for name, layer in named if layer.running_mean is not None]
        layers = [layer for key, layer in keys if any(not torch.equal(s[key], states[0][key]) for s in states)]
        if not layers:
            return
        self.data.prepare_data()
        self.data.setup("fit")
        self.data.collate = self.module.collate  # type: ignore[attr-defined]
        device, plugin = self.trainer.strategy.root_device, self.trainer.precision_plugin
        self.module.to(device).eval()
        with torch.no_grad(), plugin.forward_context(), taking_statistics(layers):
            for batch, *_ in self.data.train_dataloader():
                moved = {name: part._replace(x=samples.move(part.x, device), y=None) for name, part in batch.items()}
                self.module.forward_domains(moved)

    def greedy(self, runs: Sequence[Path]) -> Shares:
        """Starts with the best run, and adds each next one if the mean is then no worse on the validation split."""
        sign = 1 if self.mode == "max" else -1
        scores = {run: self.measure({run: 1.0}) for run in runs}
        for run, score in scores.items():
            print(f"{run}: {self.metric} {score:.4g}")
        kept: list[Path] = []
        best = -float("inf")
        for run in sorted(runs, key=lambda run: -sign * scores[run]):
            score = sign * (self.measure(equal([*kept, run])) if kept else scores[run])
            if score >= best:
                kept, best = [*kept, run], score
        return equal(kept)


def equal(runs: Sequence[Path]) -> Shares:
    """Returns equal shares."""
    return {run: 1 / len(runs) for run in runs}


def mixed(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> StateDict:
    """Computes the weighted mean of states; in float64, so that equal values stay equal to the bit.

    Args:
        states: States with the same names and shapes. Tensors that are not floating point come from the first one.
        shares: Their weights, which sum to 1.
    """
    found = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            total = sum(share * state[name].double() for state, share in zip(states, shares, strict=True))
            found[name] = torch.as_tensor(total).to(first.dtype)
        else:
            found[name] = first
    return found


def soup(
    trainer: Trainer,
    module: TransferModule,
    data: LightningDataModule,
    runs: Sequence[str],
    root: Path,
    out: str,
    how: How = "greedy",
    start: str | None = None,
    alpha: float = 0.5,
) -> Path:
    """Writes the average as a new run.

    Args:
        trainer: Runs the validation.
        module: The first run's module.
        data: The first run's datamodule, as configured by the command line.
        runs: The directories of the runs.
        root: The new run is root/runs/OUT/version_N.
        out: Its name.
        how: Which runs are averaged.
        start: A run that the others started from; None: no interpolation towards a start.
        alpha: The share of the runs, `alpha runs + (1 - alpha) start`.

    Returns:
        The new run's directory.

    Raises:
        UserError: There is nothing to average, or the runs differ in architecture or task.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha: {alpha} must be in [0, 1]")
    paths = list(dict.fromkeys(find_run(run) for run in runs))
    origin = None if start is None else find_run(start)
    if len(paths) + (origin is not None and origin not in paths) < 2:
        raise UserError("soup: pass two runs or more, or one and --start RUN, the run that it started from")
    if trainer.world_size > 1:
        raise UserError("soup: runs only in one process; pass --trainer.devices 1")
    pot = Soup(trainer, module, data, [*paths, *([origin] if origin else [])])
    shares = pot.greedy(paths) if how == "greedy" and len(paths) > 1 else equal(paths)
    if origin is not None:
        shares = {run: alpha * share for run, share in shares.items()}
        shares[origin] = shares.get(origin, 0.0) + 1 - alpha
        shares = {run: share for run, share in shares.items() if share > 0}
    score = pot.measure(shares)
    folder = new_run(root, out)
    write_config(folder, yaml.safe_load((paths[0] / "config.yaml").read_text()) | {"name": out})
    trainer.save_checkpoint(folder / "checkpoints" / "best.ckpt", weights_only=True)
    write_metrics(folder, floats(trainer, "val/") | {"soup": {str(run): share for run, share in shares.items()}})
    print(f"{' + '.join(f'{share:.3g} {run}' for run, share in shares.items())}: {pot.metric} {score:.4g}\n{folder}")
    return folder


def _architecture(run: Path) -> dict[str, Any]:
    """Returns a run's config of the network as plain data, without its initial weights."""
    model: Any = (yaml.safe_load((run / "config.yaml").read_text()) or {}).get("model") or {}
    given = model.get("init_args") or {}
    parts = {name: given.get(name) for name in ("backbone", "bottleneck", "head")}
    if isinstance(parts["backbone"], dict):
        arguments = {k: v for k, v in (parts["backbone"].get("init_args") or {}).items() if k != "weights"}
        parts["backbone"] = parts["backbone"] | {"init_args": arguments}
    return {"task": model.get("class_path"), **parts}


def _differing(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    return " and ".join(name for name in one if one[name] != two[name])
