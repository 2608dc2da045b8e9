"""`pytest -m exact`: an interrupted and resumed run is the undisturbed one, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest
from harness import BATCHES, POINTS, STRATEGIES, check

exact = [pytest.mark.slow, pytest.mark.exact]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_resumed_run_is_the_undisturbed_one(folder):
    assert check("GradualUnfreezing", folder, points=[BATCHES + 3], more="--data.num_workers 2") == {}


def test_a_resumed_run_on_the_cache_is_the_undisturbed_one(folder):
    assert check("GradualUnfreezing:fraction", folder, points=[BATCHES + 3], more="--cache.views 2") == {}


def test_a_resumed_run_whose_steps_take_two_passes_is_the_undisturbed_one(folder):
    assert (
        check("LastStages", folder, points=[BATCHES + 3], more="--model.optimizer SAM --model.optimizer.rho 0.1") == {}
    )


# in the main process, in two workers, and from cached views where stages are closed
cases = pytest.mark.parametrize(
    ("strategy", "workers"),
    [pytest.param(name, n, marks=exact) for name in STRATEGIES for n in ("0", "2", "0 --cache.views 2")],
)


@cases
def test_one_process(strategy, workers, folder):
    assert check(strategy, folder, more=f"--data.num_workers {workers}") == {}


@cases
def test_two_processes(strategy, workers, folder):
    """With gloo; the second one gets the signal."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "exact"}
    common |= {"MASTER_PORT": str(20000 + os.getpid() % 300 * 100), "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(harness.__file__), strategy, f"--data.num_workers {workers}"],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=1200)[0] for rank in ranks]
    errors = [line for text in said for line in text.splitlines() if "Error: " in line]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert json.loads(Path("report.json").read_text()) == {}


@pytest.mark.parametrize("without", [
    pytest.param(("datamodules.loaders.Loader.load_state_dict", lambda self, state: None), id="the sampler's place"),
    pytest.param(("tl_modules.runs.resume.restore_random_state", lambda state: None), id="random numbers"),
    pytest.param(("tl_modules.methods.terms.LossMeans.load_state_dict", lambda self, state, device: None), id="running means"),
    pytest.param(("datamodules.loaders.seeded", None), id="seeded augmentation"),
])  # fmt: skip
def test_the_comparison_notices_what_is_left_out(without, folder, monkeypatch):
    import contextlib

    name, instead = without
    monkeypatch.setattr(name, instead or (lambda seed: contextlib.nullcontext()))
    found = check("GradualUnfreezing", folder, points=[POINTS[0]], more="--trainer.max_epochs 1")
    assert found, name
    if "LossMeans" not in name:  # which move no weight
        assert any("state_dict" in path for path in found[POINTS[0]])
