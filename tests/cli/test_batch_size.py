"""Out of memory: what to try, and finding it."""

import json
import subprocess
import sys

import pytest
import yaml

from tl_modules import UserError
from tl_modules.cli.batch_size import largest_that_fits

RUN = "fit --trainer.max_epochs 1 --model.backbone.width 4 --name x"


@pytest.mark.parametrize(
    ("start", "limit", "expected"), [(32, 100, 64), (32, 32, 32), (32, 31, 16), (32, 1, 1), (32, 9999, 500)]
)
def test_the_largest_that_fits(start, limit, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert largest_that_fits(fits, start, 500) == expected
    assert len(tried) == len(set(tried))


def test_nothing_fits():
    with pytest.raises(UserError, match="not even a batch of one"):
        largest_that_fits(lambda size: False, 32, 500)


LIMITED = """
import resource, sys, torch
torch.set_num_threads(1)
from tl_modules.cli.main import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000, resource.RLIM_INFINITY))
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_too_little_memory_is_said_and_a_size_is_found(tmp_path):
    def call(line):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, *line.split()], capture_output=True, text=True, cwd=tmp_path, timeout=300
        )
        return done.returncode, done.stdout, done.stderr

    big = RUN.replace("width 4", "width 64") + " --data.source true --data.target false"
    code, _, said = call(f"{big} --data.batch_size 448")
    assert code == 2
    assert "out of memory with a batch size of 448; try --data.batch_size 224, or pass --find_batch_size" in said
    assert "Traceback" not in said
    code, printed, said = call(f"{big} --data.batch_size 448 --find_batch_size")
    assert code == 0, said
    size = int(printed.split("batch size ")[1].split()[0])
    assert size < 448
    config = yaml.safe_load((tmp_path / "runs/x/version_1/config.yaml").read_text())
    assert config["data"]["init_args"]["batch_size"] == size


def test_the_run_is_that_of_the_size_that_was_found(ok, tmp_path):
    printed = ok(f"{RUN} --find_batch_size --data.shots_per_class 4")
    assert "batch size 40" in printed  # all there are
    ok(f"{RUN} --data.batch_size 40 --data.shots_per_class 4")
    metrics = [json.loads((tmp_path / f"runs/x/version_{n}/metrics.json").read_text()) for n in (0, 1)]
    assert metrics[0] == metrics[1]
