"""Grids of runs: what the file may say, which cells run when, and the table by hand."""

import csv
import json
import math
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from tl_modules import UserError
from tl_modules.cli.compare import Scores, report
from tl_modules.cli.compare.plan import make_cells, read_plan
from tl_modules.cli.compare.runner import Runner
from tl_modules.cli.compare.scores import CRITERIA, p_value
from tl_modules.cli.main import main
from tl_modules.evaluation.criteria import VALIDATORS

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
    assert make_cells(plan, Path("x"), plan.seeds)
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
    ((_, cell),) = make_cells(read_plan(file), Path("x"), [0]).items()
    found = [word if word == "--config" else Path(word).name for word in cell.fit[:10]]
    assert found == ["--config", "all.yaml", "--config", "task.yaml", "--y", "1",
                     "--config", "way.yaml", "--config", "all.yaml"]  # fmt: skip
    assert set(cell.words["configs"]) == {str(tmp_path / "sub" / f"{name}.yaml") for name in ("all", "task", "way")}


WAYS = "ways: {a: --x 1, b: --x 2}\n"
BAD = {
    "": "is no mapping of name, config",
    "ways: {a: }\nseed: [0]": "there is no key seed (did you mean seeds?)",
    "name: x": "ways is no mapping of names to words",
    "ways: {}": "name at least one way",
    "ways: [a, b]": "ways is no mapping",
    "ways: {a: 3}": "ways: a: 3 is neither a text nor a list of words",
    "ways: {a: '--x \"'}": "cannot be split into words (No closing quotation)",
    "ways: {a: '--x {bb}', b: }": "ways: a: {bb} names no way (did you mean b?)",
    "ways: {a: {option: x}}": "ways: a: there is no key option (did you mean options?)",
    "ways: {a: {of: c}}": "ways: a: of: there is no way c",
    "ways: {a: {of: b, options: --x}, b: }": "put its words into test instead of options",
    "ways: {a b: , a-b: }": "a b and a-b would share the folder a-b",
    "ways: {'->': }": "has no letter or digit",
    WAYS + "tasks: [1]": "tasks is no mapping",
    WAYS + "seeds: 3": "seeds: 3 is no list of whole numbers",
    WAYS + "seeds: [a]": "is no list of whole numbers",
    WAYS + "baseline: c": "baseline: c is no way that is reported",
    WAYS + "config: nowhere.yaml": "config: there is no file nowhere.yaml",
    WAYS + "tasks: {t: {config: nowhere.yaml}}": "f.yaml: tasks: t: config: there is no file nowhere.yaml",
    "ways: {a: {of: b, config: f.yaml}, b: }": "put its words into test instead of options",
    WAYS + "lower_is_better: perhaps": "lower_is_better: perhaps is not true or false",
    "ways: [": "is no YAML",
    "ways: {a: '{b}', b: '{a}'}": "a needs b needs a; a way cannot wait for itself",
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
        ("compare", "FILE.yaml; `tl compare --help`"),
        ("compare f.yaml --processes 0", "--processes: 0 must be at least 1"),
        ("compare f.yaml --seeds x", "is no list of whole numbers"),
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
    cells = make_cells(plan, Path("out"), [0, 3])
    cell = cells["c", "SHOT", 3]
    shared = ["--config", str(tmp_path / "shared.yaml"), "--x", "1 2", "--home", "${HOME}", "--data.source", "c d"]
    seeds = ["--seed_everything", "3", "--data.seed", "3"]
    assert cell.fit == [*shared, "--w", "{source-only}", "--y", "{lr:", "1}", *seeds]
    assert cell.test == ["--t", "1", "--u"]
    assert cell.needs == {"source-only": ("c", "source only", 3)}
    assert cells["A -> B", "SHOT", 0].folder == Path("out/runs/a-b/shot/seed-0")
    assert list(cells)[:2] == [("A -> B", "source only", 0), ("A -> B", "SHOT", 0)]

    words = {key: cell.words for key, cell in cells.items()}
    (tmp_path / "shared.yaml").write_text("model: {a: 1}")
    changed = make_cells(plan, Path("out"), [0, 3])
    assert all(changed[key].words != words[key] for key in cells)


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
                "broken": {"options": "--model.finetuning Ful"},
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
    assert "there is no class Ful (did you mean Full?)" in rows["broken"]["error"]
    assert rows["after"]["error"] == "it needs broken, seed 0, which failed"
    assert "broken, seed 0: failed: model.finetuning: there is no class Ful" in first.out
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
    assert "2 of 3 cells are done already" in second.out
    assert "nothing left to train" in (file.parent / "log.txt").read_text()
    assert state(file.parent)["metrics"] == before["tuned"]["metrics"]
    assert state(file.parent)["seconds"] > before["tuned"]["seconds"]
    assert [p.name for p in file.parents[1].iterdir()] == ["seed-0"]

    grid("0.02")
    third = tl("compare g.yaml --processes 2 --only again")
    assert third.code == 0
    assert "run anew, since their words or configs have changed: again, tuned" in third.out
    assert "1 of 3 cells are done already" in third.out
    assert {p.name for p in file.parents[1].iterdir()} == {"seed-0", "seed-0.old-1"}
    assert {row["way"] for row in results(folder, "table.csv")} == {"tuned", "again", "broken", "after"}


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
    cells = make_cells(plan, tmp_path, plan.seeds)
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
    assert "stopped; to go on" in (tmp_path / "runs/a/seed-0/log.txt").read_text()
    assert not (tmp_path / "runs/b").exists()


# The table


def rows_of(values, **more):
    """Rows of made-up values: way -> task -> values by seed, None where it failed."""
    return [
        {"task": task, "way": way, "seed": seed, "status": "failed" if value is None else "done", "error": None,
         "metrics": {} if value is None else {"test/accuracy": value, **more}, "seconds": 60.0, "cpu_seconds": 90.0}
        for way, tasks in values.items() for task, by_seed in tasks.items() for seed, value in enumerate(by_seed)
    ]  # fmt: skip


MADE_UP = {
    "base": {"x": [0.5, 0.6, 0.7], "y": [0.2, 0.2, 0.2]},
    "better": {"x": [0.7, 0.8, 0.9], "y": [0.3, 0.4, 0.5]},
    "worse": {"x": [0.4, 0.5, 0.6], "y": [0.1, 0.1, 0.1]},
    "mixed": {"x": [0.5, 0.7, 0.4], "y": [0.2, 0.1, None]},
}
METRIC = dict.fromkeys(MADE_UP, "test/accuracy")


def test_the_table_by_hand():
    table = {row["way"]: row for row in Scores(rows_of(MADE_UP), METRIC, "base").table()}
    base, better, mixed = table["base"], table["better"], table["mixed"]
    assert (base["x mean"], base["x std"]) == pytest.approx((0.6, 0.1))
    assert (base["y mean"], base["y std"]) == pytest.approx((0.2, 0.0))
    assert base["mean"] == pytest.approx(0.4)
    # over seeds 0.5, 0.6, 0.7: std 0.1, t(2) = 4.302653
    assert (better["low"], better["high"]) == pytest.approx((0.6 - 4.302653 * 0.1 / 3**0.5, 0.6 + 0.248414), abs=1e-6)
    # seed 2 has no y: x 0.5, 0.7, 0.4; whole seeds (0.5 + 0.2) / 2 and (0.7 + 0.1) / 2
    assert mixed["mean"] == pytest.approx(0.375)
    assert mixed["missing"] == 1
    # base ties with mixed at x0 and y0 (2.5 each), worse with mixed at y1 (3.5); mixed is not ranked at y2
    assert better["rank"] == 1.0
    assert table["worse"]["rank"] == pytest.approx((4 + 4 + 3 + 4 + 3.5 + 3) / 6)
    assert base["rank"] == pytest.approx((2.5 + 3 + 2 + 2.5 + 2 + 2) / 6)
    assert mixed["rank"] == pytest.approx((2.5 + 2 + 4 + 2.5 + 3.5) / 5)
    assert base["cpu_minutes"] == 1.5
    assert base["difference"] is None
    # means of the tasks by seed 0.5, 0.6, 0.7 against 0.35, 0.4, 0.45: differences 0.15, 0.2, 0.25
    assert (better["difference"], better["difference seeds"]) == (pytest.approx(0.2), 3)
    assert better["difference low"] == pytest.approx(0.2 - 4.302653 * 0.05 / 3**0.5, abs=1e-6)
    assert "oracle" not in base


def test_differences_are_paired_by_seed():
    rows = rows_of(MADE_UP)
    scores = Scores(rows, METRIC, "base")
    # in the mean only of seeds that have both tasks
    assert scores.differences("mixed") == pytest.approx([0.0, 0.0])
    assert scores.differences("mixed", "x") == pytest.approx([0.0, 0.1, -0.3])
    assert scores.differences("mixed", "y") == pytest.approx([0.0, -0.1])
    backwards = Scores(rows[::-1], METRIC, "base")
    assert backwards.differences("mixed", "x") == pytest.approx([-0.3, 0.1, 0.0])
    assert Scores(rows, METRIC).differences("mixed") == scores.differences("base") == []


def test_one_failed_cell_leaves_the_ranks():
    values = {
        "a": {"": [0.3, 0.2, 0.1]},
        "b": {"": [None, 0.1, 0.2]},
        "c": {"": [0.1, None, None]},
        "d": {"": [None] * 3},
    }
    # seed 0: a, c; seed 1: a, b; seed 2: b, a
    assert Scores(rows_of(values), dict.fromkeys(values, "test/accuracy")).ranks() == pytest.approx(
        {"a": 4 / 3, "b": 1.5, "c": 2.0}
    )


def by_p(values, lower=False):
    """Flags where ways differ from the baseline in three seeds by -1 on average, so that p is the given one."""
    # Student's t of two degrees of freedom: p = 1 - t / sqrt(t^2 + 2), and t = sqrt(3) / std
    ts = {way: (1 - p) * math.sqrt(2 / (1 - (1 - p) ** 2)) for way, p in values.items()}
    numbers = {way: {"": [-1 - 3**0.5 / t, -1, -1 + 3**0.5 / t]} for way, t in ts.items()}
    scores = Scores(
        rows_of({"base": {"": [0, 0, 0]}} | numbers), dict.fromkeys(["base", *values], "test/accuracy"), "base", lower
    )
    assert {way: p_value(scores.differences(way)) for way in values} == pytest.approx(values)
    return [way for way, text in scores.transfer().items() if text]


def test_negative_transfer_after_holm():
    # three tests: 0.05 / 3, then 0.05 / 2, then 0.05, until one is above
    assert by_p({"a": 0.049, "b": 0.016, "c": 0.024}) == ["a", "b", "c"]
    assert by_p({"a": 0.017, "b": 0.018, "c": 0.019}) == []
    assert by_p({"a": 0.026, "b": 0.016, "c": 0.04}) == ["b"]
    assert by_p({"a": 0.049, "b": 0.016, "c": 0.024}, lower=True) == []  # better


def test_negative_transfer_is_in_the_mean_or_on_a_task():
    base = {"x": [0.50, 0.60, 0.70], "y": [0.20, 0.21, 0.22]}
    much = [-0.1, -0.1004, -0.1008]
    values = {
        "base": base,
        "both": {task: np.add(base[task], much) for task in base},
        "one": {"x": np.add(base["x"], much), "y": np.add(base["y"], [0.2, 0.1, 0.4])},  # better in the mean
        "noisy": {"x": [0.40, 0.61, 0.50], "y": [0.20, 0.10, 0.22]},
    }  # fmt: skip
    scores = Scores(rows_of(values), dict.fromkeys(values, "test/accuracy"), "base")
    assert scores.transfer() == {"base": "", "both": "worse than base", "one": "worse than base on x", "noisy": ""}


@pytest.mark.parametrize("differences", [[0.0, 0.0, 0.0], [-0.1, -0.1, -0.1], [-0.1, -0.1], [-0.1, -0.1 - 1e-8, -0.1]])
def test_without_spread_there_is_no_flag(differences):
    assert p_value(differences) == 1
    values = {"base": {"": [0.5, 0.6, 0.7][: len(differences)]}}
    values["way"] = {"": np.add(values["base"][""], differences)}
    scores = Scores(rows_of(values), dict.fromkeys(values, "test/accuracy"), "base")
    assert scores.transfer()["way"] == ""
    assert scores.table()[1]["difference"] == pytest.approx(np.mean(differences))


def drawn(generator, tasks, seeds, samples=None, loss=0.0):
    """A table of five ways that are the baseline's equals but for the last one's loss.

    Effects of task, seed and both are shared by all ways; each way has luck with a seed, on all tasks and on each; of so
    many test samples, an accuracy takes few values.
    """
    shared = 0.7 + generator.normal(0, 0.1, (tasks, 1)) + generator.normal(0, 0.03, (1, seeds))
    shared = shared + generator.normal(0, 0.02, (tasks, seeds))
    ways = shared + generator.normal(0, 0.01, (5, 1, seeds)) + generator.normal(0, 0.02, (5, tasks, seeds))
    ways[-1] -= loss
    if samples:
        ways = generator.binomial(samples, ways.clip(0, 1)) / samples
    values = {f"way {i}": {f"task {t}": row for t, row in enumerate(way)} for i, way in enumerate(ways.tolist())}
    return Scores(rows_of(values), dict.fromkeys(values, "test/accuracy"), "way 0").transfer()


def test_few_tables_without_a_loss_flag_one():
    generator = np.random.default_rng(0)
    for samples in (None, 50):
        grids = [grid for grid in product((1, 3, 6), (3, 5)) for _ in range(40)]
        flagged = [any(drawn(generator, *grid, samples).values()) for grid in grids]
        share = np.mean(flagged)
        assert share <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(grids)), samples  # 0.078: the simulation's two sigma


@pytest.mark.parametrize("tasks", [1, 3, 6])
def test_a_large_loss_is_flagged(tasks):
    generator = np.random.default_rng(0)
    found = [drawn(generator, tasks, 5, loss=0.3) for _ in range(10)]
    assert all(flags["way 4"] == "worse than way 0" for flags in found)


def test_one_seed_has_no_intervals():
    one = {way: {"": tasks["x"][:1]} for way, tasks in MADE_UP.items()}
    scores = Scores(rows_of(one), METRIC, "base")
    row = scores.table()[2]
    assert (row["mean"], row["std"], row["low"], row["difference low"]) == (0.4, None, None, None)
    assert row["negative transfer"] == ""
    assert scores.texts()[2] == {
        "way": "worse", "mean (std)": "0.400", "95 % interval": "", "rank": "4.00", "CPU min": "1.50",
        "against base": "-0.100", "negative transfer": ""}  # fmt: skip


def test_the_oracle_and_the_report(tmp_path, capsys):
    rows = rows_of(MADE_UP, **{"test/oracle/accuracy": 0.9, "test/oracle_gap": 0.05})
    scores = Scores(rows, METRIC, "base")
    assert (scores.table()[0]["oracle"], scores.table()[0]["gap"]) == pytest.approx((0.9, 0.05))
    report(rows, scores, tmp_path, "made up")
    printed = capsys.readouterr().out
    assert "0.600 (0.100)" in printed
    caption = "against base: difference paired by seed (at most 3 seeds, mean of 2 tasks)"
    assert caption in printed
    assert caption in (tmp_path / "table.md").read_text()
    assert "chosen" not in printed
    assert not (tmp_path / "choice.csv").exists()
    assert results(tmp_path)[0]["test/accuracy"] == "0.5"
    assert float(results(tmp_path, "table.csv")[0]["x mean"]) == pytest.approx(0.6)
    assert (tmp_path / "table.md").read_text().startswith("| way | x | y | mean | 95 % interval | rank |")


def test_no_value_at_all_is_a_table_too(tmp_path):
    rows = rows_of({"a": {"": [None, None]}})
    report(rows, Scores(rows, {"a": "test/accuracy"}), tmp_path, "nothing")
    assert results(tmp_path, "table.csv")[0]["mean"] == ""


def test_an_unknown_metric_says_what_there_is(tmp_path):
    with pytest.raises(UserError, match="metric: 3 is not a key"):
        read_plan(write(tmp_path / "f.yaml", ways={"a": None}, metric=3))


# The choice without labels


def chosen_from(cells, lower=False, metric="accuracy"):
    """Scores of cells: way -> task -> by seed, (test metric, scores by criterion)."""
    rows = [
        row | {"metrics": {f"test/{metric}": value} | {f"val/{name}": score for name, score in scores.items()}}
        for way, tasks in cells.items() for task, by_seed in tasks.items()
        for row, (value, scores) in zip(rows_of({way: {task: [0.0] * len(by_seed)}}), by_seed, strict=True)
    ]  # fmt: skip
    return rows, Scores(rows, dict.fromkeys(cells, f"test/{metric}"), None, lower)


CELLS = {
    "a": {"x": [(0.5, {"target_infomax": 1.0, "source_accuracy": 0.9}), (0.6, {"target_infomax": 2.0})],
          "y": [(0.1, {"target_infomax": 0.5}), (0.2, {"target_infomax": None})]},
    "b": {"x": [(0.7, {"target_infomax": 0.9, "source_accuracy": 0.8}), (0.9, {"target_infomax": 2.1})],
          "y": [(0.3, {"target_infomax": 0.4}), (0.4, {"target_infomax": -3.0})]},
    "tested": {"x": [(0.99, {}), (0.99, {})], "y": [(0.99, {}), (0.99, {})]},
}  # fmt: skip


def test_the_choice_by_hand(tmp_path, capsys):
    rows, scores = chosen_from(CELLS)
    infomax, source = scores.choice_table()
    # infomax takes a (0.5, best 0.7), b (0.9), a (0.1, best 0.3), b (0.4, since a's score is null)
    assert infomax == {
        "criterion": "infomax", "mean": pytest.approx(0.475), "std": pytest.approx(0.35 / 2**0.5),
        "oracle": pytest.approx(0.575), "regret": pytest.approx(0.1), "choices": 4, "a chosen": 2, "b chosen": 2,
    }  # fmt: skip
    assert source == {
        "criterion": "source_accuracy", "mean": 0.5, "std": None, "oracle": 0.7, "regret": pytest.approx(0.2),
        "choices": 1, "a chosen": 1, "b chosen": 0,
    }  # fmt: skip
    assert [row["chosen by infomax"] for row in scores.table()] == ["2 of 4", "2 of 4", None]
    report(rows, scores, tmp_path, "made up")
    printed = capsys.readouterr().out
    assert "chosen by what needs no label of the target" in printed
    assert "a 2 of 4, b 2 of 4" in printed
    assert results(tmp_path, "choice.csv")[1]["b chosen"] == "0"
    assert (
        (tmp_path / "table.md")
        .read_text()
        .startswith("| way | x | y | mean | 95 % interval | rank | CPU min | chosen by")
    )
    report(rows[:4], Scores(rows[:4], {"a": "test/accuracy"}), tmp_path, "one candidate")
    assert not (tmp_path / "choice.csv").exists()
    assert "chosen" not in capsys.readouterr().out


def test_where_lower_is_better():
    cells = {"a": {"": [(0.5, {"source_rmse": 0.1})]}, "b": {"": [(0.4, {"source_rmse": 0.2})]}}
    for metric in ("rmse", "mae"):
        (row,) = chosen_from(cells, lower=True, metric=metric)[1].choice_table()
        assert (row["mean"], row["oracle"], row["regret"]) == (0.5, 0.4, pytest.approx(0.1))


@pytest.mark.parametrize("score", [None, math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_never_wins(score):
    cells = {"a": {"": [(0.9, {"target_snd": score})]}, "b": {"": [(0.4, {"target_snd": -9.0})]}}
    (row,) = chosen_from(cells)[1].choice_table()
    assert (row["b chosen"], row["regret"]) == (1, pytest.approx(0.5))
    cells["b"][""][0][1]["target_snd"] = None
    assert chosen_from(cells)[1].choice_table() == []


def test_only_what_hid_the_labels_is_a_candidate():
    assert [f"val/target_{name}" for name in VALIDATORS] == list(CRITERIA)
    labels = {"target_oracle": 0.9, "target_few": 0.9, "target_last": 3.0, "accuracy": 0.9, "a_distance": 1.0}
    assert chosen_from({way: {"": [(0.5, labels)]} for way in "ab"})[1].choice_table() == []
    rows, scores = chosen_from({way: {"": [(0.5, {"target_bnm": 0.5})]} for way in "abc"})
    rows[2]["metrics"] |= {"chosen_by": "val/target_oracle, highest", "val/target_bnm": 0.9}
    rows[1]["metrics"] |= {"chosen_by": "val/target_bnm, highest", "val/target_bnm": 0.7}
    (row,) = scores.choice_table()
    assert row["b chosen"] == 1
    assert "c chosen" not in row
