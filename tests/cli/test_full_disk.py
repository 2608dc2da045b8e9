"""A full disk is one sentence with the path, exit code 2, and no half file."""

import errno
import io
from pathlib import Path

import pytest
import torch

from tl_modules import UserError
from tl_modules.checkpoints.files import replacing, write_whole
from tl_modules.cli.messages import cause
from tl_modules.errors import chain
from tl_modules.evaluation.drawing import grid, raw, save_figure

FULL = Path("/dev/full")  # each write to it finds no room
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


class Full(io.FileIO):
    """A file that has no room left."""

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full(monkeypatch):
    """Lets a file of that name have no room."""
    opened = Path.open

    def call(name):
        def fails(self, mode="r", *args, **options):
            if name in self.name and "w" in mode:
                stream = io.BufferedWriter(Full(self, "w"))
                return stream if "b" in mode else io.TextIOWrapper(stream, write_through=True)
            return opened(self, mode, *args, **options)

        monkeypatch.setattr(Path, "open", fails)

    return call


def test_what_is_replaced_is_whole_or_as_before(full, tmp_path):
    (tmp_path / "a.csv").write_text("before")
    full("a.csv")
    with pytest.raises(UserError, match=r"a\.csv cannot be written \(No space left on device\)"):
        write_whole(tmp_path / "a.csv", "after")
    assert (tmp_path / "a.csv").read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_other_exceptions_leave_no_half_file(tmp_path):
    def fails():
        with replacing(tmp_path / "a.csv") as part:
            part.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not list(tmp_path.iterdir())


def test_what_is_no_regular_file_is_written_itself():
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        write_whole(FULL, "text")
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        save_figure(grid([raw(torch.zeros(3, 8, 8), "a", {})]), FULL)
    assert FULL.is_char_device()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("p.csv", "predict --run {run} --out p.csv"),
        ("features.npy", "embed --run {run} --format npy --out e"),
        ("index.csv", "embed --run {run} --out e"),
        ("metrics.json", "test --run {run}"),
    ],
)
def test_commands(name, line, tl, trained, full, tmp_path):
    import shutil

    run = shutil.copytree(trained, tmp_path / "run")
    before = {file.name for file in run.rglob("*")}
    full(name)
    result = tl(line, run=run)
    assert result.code == 2
    assert f"{name} cannot be written (No space left on device)" in result.err
    assert "Traceback" not in result.err
    assert not [file for file in tmp_path.rglob("*.part")]
    assert not (tmp_path / name).exists()
    assert {file.name for file in run.rglob("*")} == before


def test_a_full_disk_for_embed_s_tensors(tl, trained, monkeypatch, tmp_path):
    from safetensors import SafetensorError, torch

    def fails(tensors, file):
        Path(file).write_text("half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(torch, "save_file", fails)
    result = tl(f"embed --run {trained} --out e")
    assert result.code == 2
    assert "e/features.safetensors cannot be written (I/O error: No space left on device" in result.err
    assert not list((tmp_path / "e").iterdir())


def test_what_others_write_is_said_too(tl, monkeypatch):
    from lightning.pytorch import Trainer

    def fails(*args, **options):
        raise RuntimeError("its own words") from OSError(errno.ENOSPC, "No space left on device", "events.out")

    monkeypatch.setattr(Trainer, "fit", fails)
    result = tl("fit --model.backbone.width 4")
    assert result.code == 2
    assert "events.out cannot be written (No space left on device); make room" in result.err


def test_an_exception_that_is_behind_itself_ends():
    first, second = OSError(errno.ENOSPC, "No space left on device"), ValueError()
    first.__context__, second.__context__ = second, first
    assert list(chain(first)) == [first, second]
    assert str(cause(second)) == "a file cannot be written (No space left on device); make room on the disk"


@pytest.mark.tensorboard
def test_a_full_disk_for_tensorboard(tl, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", no_room)
    result = tl("fit --name x --model.backbone.width 4 --data.shots_per_class 2 --trainer.max_epochs 1")
    assert result.code == 2
    assert "runs/x/version_0 cannot be written (No space left on device); make room on the disk" in result.err
    assert "Traceback" not in result.err


def test_without_room_for_an_entry_the_stages_run(ok, monkeypatch, caplog, tmp_path):
    def no_room(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    caplog.set_level("INFO", "tl_modules")
    monkeypatch.setattr("os.posix_fallocate", no_room)
    ok("fit --model.backbone.width 4 --model.finetuning LastStages --data.augment none --trainer.max_epochs 3 "
       "--cache.folder c")  # fmt: skip
    assert "run in every epoch: the disk is full, so the entry cannot be written" in caplog.text
    assert not list((tmp_path / "c").iterdir())
