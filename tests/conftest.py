import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tl_modules.cli.main import main

torch.set_num_threads(1)


@pytest.fixture
def tl(tmp_path, monkeypatch, capsys, request):
    """Runs a command line in an empty folder, in this process; returns its exit code and output.

    TensorBoard's pictures take most of the time of a small run, so that only tests marked `tensorboard` draw them.
    """
    monkeypatch.chdir(tmp_path)
    draws = request.node.get_closest_marker("tensorboard") is not None

    def call(line, **values):
        capsys.readouterr()
        code, before = 0, dict(os.environ)
        words = line.format(**values).split()
        if words[:1] == ["fit"] and not draws and not {"--run", "--trainer.logger"} & set(words):
            words[1:1] = ["--trainer.logger", "false"]
        try:
            main(words)
        except SystemExit as stop:
            code = stop.code or 0
        finally:  # a run with several processes leaves its ranks behind
            os.environ.clear()
            os.environ.update(before)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    """Writes a module that a config may name, and forgets it afterwards."""
    written = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def ok(tl):
    """The same for what must work; gives the printed output."""

    def call(line, **values):
        result = tl(line, **values)
        assert result.code == 0, result.err
        return result.out

    return call


def image(path, colour, size=(40, 32), mode="RGB", seed=0, **options):
    """A noisy image of one colour."""
    noise = np.random.default_rng(seed).integers(0, 40, (*size[::-1], 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **options)


COLOURS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}


def make_tree(root, splits=(("train", 8), ("val", 4)), classes=tuple(COLOURS), suffix="png"):
    """An ImageFolder tree whose classes are colours."""
    for number, (split, count) in enumerate(splits):
        for name in classes:
            for i in range(count):
                image(root / split / name / f"{i}.{suffix}", COLOURS.get(name, (90, 90, 90)), seed=100 * number + i)
    return root


@pytest.fixture
def two_ranks(tmp_path):
    """Runs a file as two processes; gives what each of them has written into rank-N.json."""

    def call(file, name, timeout):
        port = 10000 + os.getpid() % 50 * 400
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": name}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        here = Path(__file__).parent  # behind the root, whose packages have rooms of the same name here
        common["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", file],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=tmp_path,
            )
            for rank in range(2)
        ]
        assert [rank.wait(timeout=timeout) for rank in ranks] == [0, 0]
        return [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run, once for all tests, which copy it."""
    here, folder = Path.cwd(), tmp_path_factory.mktemp("trained")
    os.chdir(folder)
    try:
        main(["fit", "--name", "a", "--trainer.max_epochs", "1", "--trainer.logger", "false", "--model.backbone.width", "4", "--data.shots_per_class", "2"])  # fmt: skip
    finally:
        os.chdir(here)
    return folder / "runs" / "a" / "version_0"


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree")


@pytest.fixture
def data_dir():
    """The folder of real data, for slow tests."""
    path = Path(os.environ.get("TL_DATA_DIR", "missing"))
    if not path.is_dir():
        pytest.skip("TL_DATA_DIR is not set")
    return path.resolve()


@pytest.fixture(autouse=True, scope="session")
def _cache_folder(tmp_path_factory):
    """Cached features of tests are nobody else's."""
    os.environ["TL_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def said(caplog):
    """Returns what the cache has logged since the last call."""
    caplog.set_level(logging.INFO, "tl_modules")

    def call():
        texts = [r.getMessage() for r in caplog.records if r.getMessage().startswith("cache: ")]
        caplog.clear()
        return texts

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked `product(n)` one in n cases is fast, along the diagonals: each value of each axis has its own."""
    axes = {}
    for item in items:
        if mark := item.get_closest_marker("product"):
            place = 0
            for name, value in item.callspec.params.items():
                seen = axes.setdefault((item.function, name), [])
                if value not in seen:
                    seen.append(value)
                place += seen.index(value)
            if place % mark.args[0]:
                item.add_marker("slow")


@pytest.fixture
def write(tmp_path):
    """Writes a table, a.csv."""

    def call(text, name="a.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return call


def rows(data, domain="target"):
    """All samples of a datamodule by id."""
    sets = [data.domains(split)[domain] for split in ("train", "val", "test")]
    return {d.ids[i]: d[i] for d in sets for i in range(len(d))}


def table(rows, **columns):
    """CSV of columns, each a function of the row."""
    lines = [",".join(columns), *(",".join(str(make(i)) for make in columns.values()) for i in range(rows))]
    return "\n".join(lines)
