"""Grids of runs: the contents of the file, and which trials run when."""

import csv
import json
import os
from pathlib import Path

import pytest
import yaml

from tl_modules import UserError
from tl_modules.cli.compare import _chosen
from tl_modules.cli.compare.plan import make_trials, read_plan
from tl_modules.cli.compare.runner import Runner
from tl_modules.cli.main import main

ROOT = Path(__file__).parents[2]
QUICK = "--model.backbone.width 4 --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.logger false"
FILES = sorted((ROOT / "configs" / "recipes").glob("*_compare.yaml"))


def write(path, **content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def results(folder, file="results.csv"):
    return list(csv.DictReader((folder / file).open()))


def state(folder):
    return json.loads((folder / "result.json").read_text())


# The file


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.name)
def test_every_file_of_ours_resolves(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan(file)
    assert make_trials(plan, Path("x"), plan.seeds)
    assert file.read_text().startswith("# ")


def test_a_config_is_found_beside_the_file_that_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("all", "task", "way"):
        (tmp_path / "sub" / f"{name}.yaml").write_text("name: x\n")
    file = tmp_path / "sub" / "f.yaml"
    file.write_text(
        "config: all.yaml\ntasks: {t: {config: task.yaml, options: --y 1}}\nways: {a: {config: [way.yaml, all.yaml]}}"
    )
    ((_, cell),) = make_trials(read_plan(file), Path("x"), [0]).items()
    found = [word if word == "--config" else Path(word).name for word in cell.make[1:11]]
    assert found == ["--config", "all.yaml", "--config", "task.yaml", "--y", "1",
                     "--config", "way.yaml", "--config", "all.yaml"]  # fmt: skip
    assert set(cell.words["configs"]) == {str(tmp_path / "sub" / f"{name}.yaml") for name in ("all", "task", "way")}


WAYS = "ways: {a: --x 1, b: --x 2}\n"
BAD = {
    "": "is not a mapping of name, config",
    "ways: {a: }\nseed: [0]": "there is no key seed (did you mean seeds?)",
    "name: x": "ways is not a mapping of names to options",
    "ways: {}": "name at least one way",
    "ways: [a, b]": "ways is not a mapping",
    "ways: {a: 3}": "ways: a: 3 must be a text or a list of options",
    "ways: {a: '--x \"'}": "cannot be split into options (No closing quotation)",
    "ways: {a: '--x {bb}', b: }": "ways: a: {bb} is not a way (did you mean b?)",
    "ways: {a: {option: x}}": "ways: a: there is no key option (did you mean options?)",
    "ways: {a: {of: c}}": "ways: a: of: there is no way c",
    "ways: {a: {of: b, options: --x}, b: }": "put its options under test instead of options",
    "ways: {a b: , a-b: }": "a b and a-b would share the folder a-b",
    "ways: {'->': }": "has no letter or digit",
    WAYS + "tasks: [1]": "tasks is not a mapping",
    WAYS + "seeds: 3": "seeds: 3 is not a list of whole numbers",
    WAYS + "seeds: [a]": "is not a list of whole numbers",
    WAYS + "baseline: c": "baseline: c is not a reported way",
    WAYS + "config: nowhere.yaml": "config: there is no file nowhere.yaml",
    WAYS + "tasks: {t: {config: nowhere.yaml}}": "f.yaml: tasks: t: config: there is no file nowhere.yaml",
    "ways: {a: {of: b, config: f.yaml}, b: }": "put its options under test instead of options",
    WAYS + "lower_is_better: perhaps": "lower_is_better: perhaps is not true or false",
    "ways: {a: {compress: --run x, soup: x, options: --x}}": "ways: a: compress makes its run from others; leave options, soup out",
    WAYS + "benchmark: 3": "benchmark: 3 must be a text or a list of options",
    "ways: [": "is not YAML",
    "ways: {a: '{b}', b: '{a}'}": "a needs b needs a; a way cannot depend on itself",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_gives_one_sentence(text, tl, tmp_path):
    (tmp_path / "f.yaml").write_text(text)
    result = tl("compare f.yaml")
    assert result.code == 2
    assert result.err.startswith("tl: error: ")
    assert len(result.err.splitlines()) == 1
    assert BAD[text] in result.err


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("compare nowhere.yaml", "nowhere.yaml cannot be read (No such file or directory)"),
        ("compare", "FILE.yaml; see `tl compare --help`"),
        ("compare f.yaml --processes 0", "--processes: 0 must be at least 1"),
        ("compare f.yaml --seeds x", "is not a list of whole numbers"),
        ("compare f.yaml --only aa", "--only: there is no way aa (did you mean a?)"),
    ],
)
def test_bad_words(line, sentence, tl, tmp_path):
    (tmp_path / "f.yaml").write_text(WAYS)
    result = tl(line)
    assert result.code == 2
    assert sentence in result.err


def test_help_lists_the_command(ok):
    assert "compare" in ok("--help")
    assert "--only" in ok("compare --help")


def test_the_words_of_a_cell(tmp_path):
    (tmp_path / "shared.yaml").write_text("model: {}")
    file = write(
        tmp_path / "f.yaml",
        config="shared.yaml",
        options="--x '1 2' --home ${HOME}",
        tasks={"A -> B": "--data.source a", "c": {"options": ["--data.source", "c d"], "test": "--t 1"}},
        ways={"source only": None, "SHOT": {"options": "--w {source only} --y {lr: 1}", "test": "--u"}},
    )
    plan = read_plan(file)
    cells = make_trials(plan, Path("out"), [0, 3])
    cell = cells["c", "SHOT", 3]
    shared = ["--config", str(tmp_path / "shared.yaml"), "--x", "1 2", "--home", "${HOME}", "--data.source", "c d"]
    seeds = ["--seed_everything", "3", "--data.seed", "3"]
    assert cell.make == ["fit", *shared, "--w", "{source-only}", "--y", "{lr:", "1}", *seeds]
    assert cell.test == ["--t", "1", "--u"]
    assert cell.needs == {"source-only": ("c", "source only", 3)}
    assert cells["A -> B", "SHOT", 0].folder == Path("out/runs/a-b/shot/seed-0")
    assert list(cells)[:2] == [("A -> B", "source only", 0), ("A -> B", "SHOT", 0)]

    words = {key: cell.words for key, cell in cells.items()}
    (tmp_path / "shared.yaml").write_text("model: {a: 1}")
    changed = make_trials(plan, Path("out"), [0, 3])
    assert all(changed[key].words != words[key] for key in cells)


def test_an_unknown_metric_says_what_there_is(tmp_path):
    with pytest.raises(UserError, match="metric: 3 is not a key"):
        read_plan(write(tmp_path / "f.yaml", ways={"a": None}, metric=3))


# The runs


def test_a_grid_from_the_first_run_to_changed_words(tl, tmp_path):
    def grid(lr):
        return write(
            tmp_path / "g.yaml",
            options=QUICK,
            ways={
                "source": {"options": "--data.source true --data.target false", "report": False},
                "tuned": "--model.backbone.weights {source} --model.optimizer AdamW --model.optimizer.lr " + lr,
                "again": {"of": "tuned", "test": "--data.batch_size 16"},
                "broken": {"options": "--model.finetuning FulFineTuning"},
                "after": "--model.backbone.weights {broken}",
            },
            baseline="tuned",
        )

    grid("0.01")
    first = tl("compare g.yaml --processes 2")
    folder = tmp_path / "runs" / "g"
    assert first.code == 1
    rows = {row["way"]: row for row in results(folder)}
    assert [row["status"] for row in rows.values()] == ["done", "done", "done", "failed", "failed"]
    assert "there is no class FulFineTuning (did you mean FullFineTuning?)" in rows["broken"]["error"]
    assert rows["after"]["error"] == "it needs broken, seed 0, which failed"
    assert "broken, seed 0: failed: model.finetuning: there is no class FulFineTuning" in first.out
    assert rows["source"]["test/accuracy"] == ""
    assert rows["again"]["test/accuracy"] == rows["tuned"]["test/accuracy"] != ""
    assert float(rows["tuned"]["seconds"]) > 0 < float(rows["tuned"]["cpu_seconds"])
    config = yaml.safe_load((folder / "runs/tuned/seed-0/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"]["init_args"]["weights"].endswith("runs/source/seed-0/version_0")
    assert {row["way"]: row["missing"] for row in results(folder, "table.csv")} == {
        "tuned": "0", "again": "0", "broken": "1", "after": "1"}  # fmt: skip
    assert (folder / "plot.png").stat().st_size > 5000
    assert (folder / "table.md").read_text().count("\n| ") == 5

    before = {way: state(folder / f"runs/{way}/seed-0") for way in ("source", "tuned", "again")}
    file = folder / "runs/tuned/seed-0/result.json"
    file.write_text(json.dumps(before["tuned"] | {"status": "interrupted"}))  # between fit's end and the test
    grid("0.01")
    second = tl("compare g.yaml --processes 2 --only again")
    assert second.code == 0
    assert "2 of 3 trials are already done" in second.out
    assert "nothing left to train" in (file.parent / "log.txt").read_text()
    assert state(file.parent)["metrics"] == before["tuned"]["metrics"]
    assert state(file.parent)["seconds"] > before["tuned"]["seconds"]
    assert [p.name for p in file.parents[1].iterdir()] == ["seed-0"]

    grid("0.02")
    third = tl("compare g.yaml --processes 2 --only again")
    assert third.code == 0
    assert "rerunning, because their options or configs have changed: again, tuned" in third.out
    assert "1 of 3 trials are already done" in third.out
    assert {p.name for p in file.parents[1].iterdir()} == {"seed-0", "seed-0.old-1"}
    assert {row["way"] for row in results(folder, "table.csv")} == {"tuned", "again", "broken", "after"}


def test_compressed_and_measured(ok, tmp_path):
    pytest.importorskip("torchao")
    write(
        tmp_path / "g.yaml",
        options=QUICK,
        benchmark="--batch_sizes [2,1] --seconds 0.01",
        ways={
            "whole": "",
            "small": {"compress": "--run {whole} --quantize int8"},
            "hidden": {"compress": "--run {small} --quantize int8", "report": False},
            "again": "--model.backbone.weights {hidden}",
        },
    )
    ok("compare g.yaml --processes 2")
    whole, small, again = results(tmp_path / "runs/g", "table.csv")
    assert whole["parameters"] == small["parameters"] == again["parameters"]
    assert float(whole["macs"]) == float(small["macs"]) > 0 < float(small["p50_ms"])
    assert float(small["megabytes"]) < 0.5 * float(whole["megabytes"])
    assert (tmp_path / "runs/g/pareto.png").stat().st_size > 5000
    assert "| p50_ms |" in (tmp_path / "runs/g/table.md").read_text()
    assert "2 of 2 trials are already done" in ok("compare g.yaml --only small")


def test_a_crash_takes_nothing_along_and_a_metric_must_be_there(tl, tmp_path):
    (tmp_path / "crash.py").write_text(
        "import os\nfrom lightning.pytorch import Callback\n"
        "class Crash(Callback):\n    def on_train_start(self, *args):\n        os.kill(os.getpid(), 9)\n"
    )
    write(
        tmp_path / "g.yaml",
        options=QUICK,
        tasks={"t": None},
        ways={"a": None, "b": "--trainer.callbacks+=crash.Crash", "c": {"metric": "test/acuracy"}},
    )
    result = tl("compare g.yaml --processes 2 --folder out --seeds 4")
    assert result.code == 1
    rows = {row["way"]: row for row in results(tmp_path / "out")}
    assert rows["a"]["status"] == "done"
    assert rows["b"]["error"] == "killed by SIGKILL"
    assert "has no test/acuracy (did you mean test/accuracy?)" in rows["c"]["error"]
    assert {row["seed"] for row in rows.values()} == {"4"}


def test_a_signal_stops_the_children_and_leaves_the_rest(tmp_path, monkeypatch):
    """The child would train for hours; it saves, and nothing else is begun."""
    import signal
    import threading
    import time

    monkeypatch.chdir(tmp_path)
    ways = {"a": QUICK.replace("epochs 1", "epochs 9999"), "b": "--model.backbone.weights {a}"}
    plan = read_plan(write(tmp_path / "g.yaml", ways=ways))
    cells = make_trials(plan, tmp_path, plan.seeds)
    last = tmp_path / "runs/a/seed-0/version_0/checkpoints/last.ckpt"

    def stop():
        while not last.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        Runner(cells, cells, 2, main).run()
    assert stopped.value.code == 143
    assert state(tmp_path / "runs/a/seed-0")["status"] == "interrupted"
    assert state(tmp_path / "runs/a/seed-0")["cpu_seconds"] > 0
    assert "stopped; to resume" in (tmp_path / "runs/a/seed-0/log.txt").read_text()
    assert not (tmp_path / "runs/b").exists()


def test_a_soup_of_ways(ok, tmp_path):
    ways = {"one": "", "two": "--data.augment none", "soup": {"soup": "{one} {two} --how uniform"}}
    write(tmp_path / "g.yaml", options=QUICK, ways=ways)
    ok("compare g.yaml --processes 2")
    folder = tmp_path / "runs/g/runs/soup/seed-0/version_0"
    assert sorted(json.loads((folder / "metrics.json").read_text())["soup"].values()) == [0.5, 0.5]
    assert [row["way"] for row in results(tmp_path / "runs/g", "table.csv")] == ["one", "two", "soup"]


def test_a_ways_name_may_have_a_comma():
    ways = ["one", "one, frozen", "two"]
    assert _chosen("one, frozen,two", ways) == ["one, frozen", "two"]
    assert _chosen("two, one", ways) == ["two", "one"]
    with pytest.raises(UserError, match="--only: there is no way three; there are one, one, frozen, two"):
        _chosen("one,three", ways)
