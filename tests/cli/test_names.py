"""Whatever text names a class, a column or a file survives the way through config.yaml, CSV, TensorBoard and back."""

import csv
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import image
from jsonargparse import ArgumentParser

from datamodules import DataError, ImageFolders
from datamodules.paths import expand_path
from tl_modules.backbones.weights import read_weights
from tl_modules.cli.main import main
from tl_modules.errors import UserError
from tl_modules.evaluation.drawing import confusion, grid, raw, save_figure
from tl_modules.runs.directory import to_yaml

NAMES = [
    *("1e3", "1e-3", "0x10", "0o7", "1_000", "1", "+1", "on", "no", "null", "true", "None", "NaN", "~"),
    *("2020-01-01", "12:30:45", "a: b", "[x]", "{}", "# c", '"q"', "it's", "x,y", "a\nb", "a\tb", " lead", "trail "),
    *("-", "=", "<<", "!x", "&a", "*a", "%d", "@", "`", "$HOME", "a$b$", "\u00e9\u65e5\u672c", "{a}"),
]
FIT = "fit --trainer.max_epochs 1 --trainer.logger false --model Classification --model.backbone {backbone} --name a --data "
NOT_UTF8 = os.fsdecode(b"\xe9")
linux = pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")


@pytest.mark.parametrize("text", [*NAMES, ".5", ".inf", "-1.", "1E3", "0", ""])
def test_a_text_stays_a_text_whoever_reads_it(text):
    written = to_yaml({"names": [text]})
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--names", type=list[str])
    parser.add_argument("--config", action="config")
    assert yaml.safe_load(written) == {"names": [text]}
    assert parser.parse_string(written).names == [text]
    assert yaml.safe_load(parser.dump(parser.parse_string(written)))["names"] == [text]


@linux
def test_class_names_through_fit_test_and_predict(ok, tmp_path):
    for number, name in enumerate(NAMES):
        for i in range(3):
            image(tmp_path / "t" / name / f"{i}.png", (number * 5 % 255, 9, 9), size=(8, 8), seed=i)
    ok(FIT.format(backbone="ConvNet --model.backbone.width 4")
       + "ImageFolders --data.image_size 8 --data.num_workers 0 --data.target t")  # fmt: skip
    run = tmp_path / "runs/a/version_0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["init_args"]["classes"] == sorted(NAMES)
    assert config["model"]["init_args"]["schema"]["y"]["classes"] == sorted(NAMES)
    ok("test --run runs/a")
    ok("predict --run runs/a")
    ok("embed --run runs/a")
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["id", "label", *(f"p_{name}" for name in sorted(NAMES))]
    assert {Path(row[0]).parent.name for row in rows} == set(NAMES)
    with (run / "embeddings/index.csv").open(newline="", encoding="utf-8") as file:
        assert all(Path(row["id"]).parent.name == row["label"] for row in csv.DictReader(file))


def test_columns_and_categories_through_fit_test_and_predict(ok, tmp_path):
    columns = [name for name in NAMES if name == name.strip()]
    categories = ["1e3", "0x10", "on", "no", "~", "2020-01-01", "a: b", "[x]", "12:30:45", "1_000", "\u00e9"]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "category", "y"])
        for row in range(44):
            cells = [(row * 7 + place) % 5 / 4 for place in range(len(columns))]
            writer.writerow([*cells, categories[row % 11], ["1e3", "on", "# c", "a: b"][row % 4]])
    ok(FIT.format(backbone="TabularMLP") + "TabularData --data.target t.csv --data.kind classes")
    config = yaml.safe_load((tmp_path / "runs/a/version_0/config.yaml").read_text())["data"]["init_args"]
    assert [column["name"] for column in config["columns"]["numeric"]] == columns
    assert set(config["columns"]["categorical"]["category"]) == set(categories)
    assert config["classes"] == ["# c", "1e3", "a: b", "on"]
    ok("test --run runs/a")
    ok("predict --run runs/a")
    header = (tmp_path / "runs/a/version_0/predictions.csv").read_text().splitlines()[0]
    assert header == "id,label,p_# c,p_1e3,p_a: b,p_on"


@linux
def test_files_that_are_no_utf8_are_written_as_they_are_named(ok, tl, tmp_path, caplog):
    for name in ("a", "b"):
        for i in range(10):
            image(tmp_path / "t" / name / f"{i}.png", (9, 9, 9), size=(8, 8), seed=i)
            (tmp_path / "t" / name / f"{i}.png").rename(tmp_path / "t" / name / f"{NOT_UTF8}{i}.png")
    ok(FIT.format(backbone="ConvNet --model.backbone.width 4")
       + "ImageFolders --data.image_size 8 --data.num_workers 0 --data.target t")  # fmt: skip
    assert "6 files are in several splits" in caplog.text
    caplog.text.encode()  # what is said can be written
    ok("predict --run runs/a")
    ok("embed --run runs/a")
    run = tmp_path / "runs/a/version_0"
    lines = (run / "predictions.csv").read_bytes().splitlines()
    assert len(lines) == 21
    assert os.fsencode(tmp_path / "t/a") + b"/\xe90.png" in lines[1]
    ok("fit --trainer.max_epochs 1 --trainer.logger false --model Classification --model.backbone TabularMLP "
       f"--data TabularData --data.target {run}/embeddings")  # fmt: skip


@linux
def test_what_a_config_cannot_hold_is_refused(tmp_path, capsys):
    for name in ("a", NOT_UTF8):
        image(tmp_path / "t" / name / "0.png", (9, 9, 9))
    with pytest.raises(DataError, match=r"target: the name of the class \\udce9 is not UTF-8; rename its folder"):
        ImageFolders(tmp_path / "t")
    with pytest.raises(SystemExit):
        main(["fit", "--data", "ImageFolders", "--data.target", f"{tmp_path}/{NOT_UTF8}"])
    assert "\\udce9 is not UTF-8, so that config.yaml cannot hold it; rename it" in capsys.readouterr().err


def test_a_dollar_in_a_path_that_exists_is_that_path(ok, tmp_path, monkeypatch):
    monkeypatch.setenv("COST", "elsewhere")
    for name in ("a", "b"):
        for i in range(10):
            image(tmp_path / "$COST" / "$5" / name / f"{i}.png", (9, 9, 9), size=(8, 8), seed=i)
    ok(FIT.format(backbone="ConvNet --model.backbone.width 4")
       + "ImageFolders --data.image_size 8 --data.num_workers 0 --data.target $COST/$5")  # fmt: skip
    ok("test --run runs/a")
    (tmp_path / "elsewhere").mkdir()
    assert expand_path("$COST", "target") == Path("$COST")
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("COST", str(tmp_path / "there"))
    assert expand_path("$COST/.", "target") == Path("$COST/.")
    (tmp_path / "elsewhere.ckpt").touch()
    monkeypatch.setenv("W", "elsewhere")
    with pytest.raises(UserError, match="elsewhere"):  # filled in where nothing is written just so
        read_weights("$W.ckpt")


def test_figures_show_names_as_they_are(tmp_path):
    names = ["a$b$", "\\q$", "$x^$"]  # as formulas, two of them would be refused
    save_figure(confusion({(0, 1): 2, (2, 2): 1}, names), tmp_path / "a.png")
    save_figure(grid([raw(torch.zeros(1, 8, 8), name, {}) for name in names]), tmp_path / "b.png")
    save_figure(grid([raw("costs $x^$ and $\\q$", "a text", {})]), tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "abc")
