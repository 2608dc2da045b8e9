"""What a run shows: plain lines, and everything in TensorBoard."""

import io
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tl_modules.evaluation.drawing import confusion, grid, raw
from tl_modules.evaluation.figures import rotated

tensorboard = pytest.mark.tensorboard
RUN = "fit --trainer.max_epochs 3 --model.backbone.width 4 --data.shots_per_class 4"


def events(run):
    """Tags by kind."""
    accumulator = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator.Tags()


def test_plain_lines_where_there_is_no_terminal(ok):
    lines = [line for line in ok(RUN).splitlines() if line.startswith("epoch ") and "train/loss" in line]
    assert [line.split()[1] for line in lines] == ["0/2", "1/2", "2/2"]
    assert all("val/accuracy" in line and line.endswith(" s") for line in lines)


def test_rich_bar_in_a_terminal(ok, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    printed = ok(RUN)
    assert not [line for line in printed.splitlines() if line.startswith("epoch ") and "train/loss" in line]


@tensorboard
def test_tensorboard(ok, tmp_path):
    ok(
        f"{RUN} --model.methods+=L2SP --data.source true --name x --data.shots_per_class null --trainer.limit_train_batches 3"
    )
    run = tmp_path / "runs" / "x" / "version_0"
    tags = events(run)
    assert {
        "train/loss",
        "train/task/source",
        "train/l2sp",
        "val/accuracy",
        "val/calibration_error",
        "lr-AdamW/head",
        "lr-AdamW/stage_0",
    } <= set(tags["scalars"])
    assert {"inputs/source", "inputs/target", "val/confusion"} <= set(tags["images"])
    assert any(tag.startswith("val/worst") for tag in tags["images"])
    assert any(tag.startswith("val/most confused") for tag in tags["images"])
    assert any("most confused" in tag for tag in tags["tensors"])
    assert (run / "00000" / "val_features" / "sprite.png").is_file()
    assert len((run / "00000" / "val_features" / "metadata.tsv").read_text().splitlines()) > 50
    hparams = EventAccumulator(str(run))
    hparams.Reload()
    assert "hp/val/accuracy" in tags["scalars"]
    assert "_hparams_/session_start_info" in hparams.summary_metadata
    ok(f"test --run {run}")
    assert {"test/confusion"} <= set(events(run)["images"])
    assert (run / "00000" / "test_features" / "tensors.tsv").is_file()


@tensorboard
@pytest.mark.parametrize(
    "off", ["--trainer.logger false", "--trainer.fast_dev_run true", "--trainer.enable_checkpointing false"]
)
def test_parts_can_be_switched_off(ok, off):
    ok(f"{RUN} {off}")


@tensorboard
def test_regression_is_drawn_too(ok, tmp_path):
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=images.mean((1, 2)) / 255)
    ok("fit --model Regression --model.backbone ConvNet --model.backbone.width 4 --data ImageArrays "
       "--data.target a.npz --trainer.max_epochs 1 --name r")  # fmt: skip
    images = events(tmp_path / "runs" / "r" / "version_0")["images"]
    assert "inputs/target" in images
    assert any(tag.startswith("val/worst") for tag in images)


@tensorboard
def test_texts_are_shown_as_texts(ok, tmp_path):
    lines = [f"{'a good' if n % 2 else 'a|bad'} film {n},{'pos' if n % 2 else 'neg'}\n" for n in range(40)]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(lines))
    (tmp_path / "v.txt").write_text("good 1 0\nbad 0 1\nfilm 1 1\n")
    ok("fit --model Classification --model.backbone WordVectors --model.backbone.name v.txt --data TextFiles "
       "--data.target t.csv --trainer.max_epochs 1 --name t")  # fmt: skip
    accumulator = EventAccumulator(str(tmp_path / "runs" / "t" / "version_0"))
    accumulator.Reload()
    for tag, columns in (("inputs/target", "| label | text |"), ("val/worst", "| true | predicted | loss | text |")):
        (event,) = accumulator.Tensors(f"{tag}/text_summary")
        first, _, *rows = event.tensor_proto.string_val[0].decode().splitlines()
        assert first == columns
        assert 8 <= len(rows) <= 16
        for row in rows:
            cells = row.removeprefix("| ").removesuffix(" |").split(" | ")
            assert cells[-1].startswith("a good film" if cells[0] == "pos" else "a\\|bad film")


def drawn(figure):
    """Draws it; gives its pixels and the seconds that took."""
    start = time.perf_counter()
    figure.savefig(io.BytesIO(), format="png")
    return max(figure.get_size_inches()) * figure.dpi, time.perf_counter() - start


@pytest.mark.parametrize("classes", [30, 400, 1000])
def test_of_many_classes_the_most_confused_are_drawn(classes):
    pairs = {(k, k): 5 for k in range(classes)} | {(k, k - 1): 3 for k in range(3, classes, classes // 10)}
    figure = confusion(pairs, [f"class {k} {'of many letters ' * 50}" for k in range(classes)])
    pixels, seconds = drawn(figure)
    assert pixels <= 1500
    assert seconds < 20
    (axes,) = figure.axes
    names = [label.get_text().split()[1] for label in axes.get_yticklabels()]
    assert names == sorted(names, key=int)
    assert len(names) == 30
    assert {str(k) for k in range(3, classes, classes // 10)} <= set(names)
    assert axes.get_title() == ("" if classes == 30 else f"the 30 of {classes:,} classes that are confused most")
    assert sum(text.get_text() == "3" for text in axes.texts) == len(range(3, classes, classes // 10))


def test_a_confusion_matrix_of_few_classes_is_whole():
    (axes,) = confusion({(0, 0): 3, (0, 1): 1, (1, 1): 2}, ["cat", "dog"]).axes
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0.0, 1.0]]
    assert axes.get_title() == ""


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 4000, 6000, dtype=torch.uint8),
        torch.zeros(3, 65_000, 1),
        torch.zeros(10_000_000),
        "word " * 10**6,
    ],
    ids=["photo", "strip", "recording", "text"],
)
def test_large_samples_are_drawn_small(x):
    figure = grid([raw(x, "a title of many letters " * 100, {})] * 4)
    pixels, seconds = drawn(figure)
    assert pixels <= 1000
    assert seconds < 20
    for axes in figure.axes:
        assert len(axes.get_title()) <= 40
        assert all(max(image.get_array().shape) <= 512 for image in axes.images)
        assert all(len(line.get_xdata()) <= 10_000 for line in axes.lines)


def test_a_name_with_dollars_is_no_formula():
    name = "$\\bad{$"
    assert drawn(grid([raw(torch.zeros(3, 8, 8), name, {}), raw(name, name, {})]))
    assert drawn(confusion({(0, 1): 1}, [name, "b"]))


@tensorboard
def test_rows_of_categories_alone_are_drawn(ok, tmp_path):
    (tmp_path / "t.csv").write_text(
        "colour,shape,y\n" + "".join(f"{'rb'[i % 2]},{'sc'[i % 3 % 2]},{'np'[i % 5 % 2]}\n" for i in range(40))
    )
    ok(
        "fit --model Classification --model.backbone TabularMLP --data TabularData --data.target t.csv --trainer.max_epochs 1 --name r"
    )
    assert "val/most confused: true, predicted, times" in events(tmp_path / "runs/r/version_0")["images"]


def test_the_projector_gets_few_numbers_of_wide_features():
    wide = torch.randn(50, 2000, dtype=torch.double)
    few = rotated(wide)
    assert few.shape == (50, 50)
    assert torch.allclose(few @ few.T, wide @ wide.T)
    assert rotated(few) is few
