"""The table of a grid of runs, and the choice without labels, by hand."""

import csv
import math
from itertools import product

import numpy as np
import pytest

from tl_modules.cli.compare import Scores, report
from tl_modules.cli.compare.scores import CRITERION_METRICS, p_value
from tl_modules.evaluation.criteria import CRITERIA


def results(folder, file="results.csv"):
    return list(csv.DictReader((folder / file).open()))


# The table


def rows_of(values, **more):
    """Rows of made-up values: way -> task -> values by seed, None if it failed."""
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
    assert "chosen by criteria without target labels" in printed
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
    assert [f"val/target_{name}" for name in CRITERIA] == list(CRITERION_METRICS)
    labels = {"target_oracle": 0.9, "target_few": 0.9, "target_last": 3.0, "accuracy": 0.9, "a_distance": 1.0}
    assert chosen_from({way: {"": [(0.5, labels)]} for way in "ab"})[1].choice_table() == []
    rows, scores = chosen_from({way: {"": [(0.5, {"target_bnm": 0.5})]} for way in "abc"})
    rows[2]["metrics"] |= {"chosen_by": "val/target_oracle, highest", "val/target_bnm": 0.9}
    rows[1]["metrics"] |= {"chosen_by": "val/target_bnm, highest", "val/target_bnm": 0.7}
    (row,) = scores.choice_table()
    assert row["b chosen"] == 1
    assert "c chosen" not in row


def test_the_front_is_what_nobody_beats_at_the_same_cost():
    numbers = {
        "cheap": (0.7, 1.0),
        "good": (0.9, 3.0),
        "dear": (0.9, 4.0),
        "bad": (0.6, 2.0),
        "unmeasured": (1.0, None),
    }
    rows = [
        {"task": "", "way": way, "seed": 0, "status": "done", "cpu_seconds": 1.0, "metrics": {"m": value} | ({} if cost is None else {"cost/p50_ms": cost})}
        for way, (value, cost) in numbers.items()
    ]  # fmt: skip
    scores = Scores(rows, dict.fromkeys(numbers, "m"))
    assert scores.front("p50_ms") == ["cheap", "good"]
    assert scores.front("macs") == []
    assert Scores(rows, dict.fromkeys(numbers, "m"), lower=True).front("p50_ms") == ["cheap", "bad"]
