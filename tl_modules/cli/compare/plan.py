"""Reads FILE.yaml of `tl compare`, and makes the trials of its grid.

ways x tasks x seeds -> trials, each with its arguments, its folder and the trials that its arguments refer to
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from tl_modules.cli.arguments import read_yaml, values
from tl_modules.errors import UserError, closest

TOP_KEYS = ("name", "config", "options", "seeds", "tasks", "ways", "baseline", "metric", "lower_is_better", "benchmark")
MAKERS = ("compress", "soup")  # commands that make a run from other runs
WAY_KEYS = ("config", "options", *MAKERS, "test", "of", "report", "metric")
TASK_KEYS = ("config", "options", "test")
METRICS = ("test/accuracy", "test/rmse")  # default metrics of the comparison: the first that the runs have
# does not match ${HOME}, which is for the shell, or {lr: 1}, which is a mapping
REFERENCE = re.compile(r"(?<!\$)\{([^{}]+)\}")

Key = tuple[str, str, int]  # task, way, seed


@dataclass
class Variant:
    """A way or task of a comparison.

    Attributes:
        fit: Arguments for `tl fit`; references to other ways are written {slug}.
        test: Arguments for `tl test`.
        of: The way whose runs it tests; it then trains no runs itself.
        report: Whether it is tested and appears in the tables.
        metric: Its own key in metrics.json.
        make: The command that makes its run instead of `tl fit`, one of `MAKERS`, and its arguments.
    """

    fit: list[str]
    test: list[str]
    of: str | None = None
    report: bool = True
    metric: str | None = None
    make: list[str] | None = None


@dataclass
class Plan:
    """The contents of FILE.yaml."""

    name: str
    options: list[str]
    seeds: list[int]
    tasks: dict[str, Variant]
    ways: dict[str, Variant]
    baseline: str | None = None
    metric: str | None = None
    lower_is_better: bool | None = None
    benchmark: list[str] | None = None


def read_plan(file: Path) -> Plan:
    """Reads FILE.yaml.

    Raises:
        UserError: A part is missing, unknown or of the wrong type.
    """
    content = _mapping(read_yaml(file, "compare"), TOP_KEYS, str(file))
    names = [str(name) for name in _mapping(content.get("ways"), None, f"{file}: ways")]
    if not names:
        raise UserError(f"{file}: ways: name at least one way and its options")
    _slugs(names, f"{file}: ways")

    def entries(section: str, keys: Sequence[str]) -> dict[str, Variant]:
        return {
            str(name): _way(entry, keys, names, file, f"{section}: {name}")
            for name, entry in (content.get(section) or {}).items()
        }

    _mapping(content.get("tasks") or {}, None, f"{file}: tasks")
    plan = Plan(
        name=_of_type(content.get("name", file.stem), str, f"{file}: name", "a text"),
        options=_configs(content, file) + _words(content.get("options"), names, f"{file}: options"),
        seeds=read_seeds(content.get("seeds", [0]), f"{file}: seeds"),
        tasks=entries("tasks", TASK_KEYS) or {"": Variant([], [])},
        ways=entries("ways", WAY_KEYS),
        baseline=_of_type(content.get("baseline"), str | None, f"{file}: baseline", "the name of a way"),
        metric=_of_type(content.get("metric"), str | None, f"{file}: metric", "a key of metrics.json"),
        lower_is_better=_of_type(
            content.get("lower_is_better"), bool | None, f"{file}: lower_is_better", "true or false"
        ),
        benchmark=_words(content["benchmark"], names, f"{file}: benchmark") if "benchmark" in content else None,
    )
    _slugs([task for task in plan.tasks if task], f"{file}: tasks")
    reported = [name for name, way in plan.ways.items() if way.report]
    if plan.baseline is not None and plan.baseline not in reported:
        raise UserError(f"{file}: baseline: {plan.baseline} is not a reported way{closest(plan.baseline, names)}")
    return plan


def _way(entry: Any, keys: Sequence[str], names: list[str], file: Path, section: str) -> Variant:
    """Reads a way or task: its arguments, or a mapping of `keys`."""
    where = f"{file}: {section}"
    if not isinstance(entry, dict):
        return Variant(_words(entry, names, where), [])
    _mapping(entry, keys, where)
    of = _of_type(entry.get("of"), str | None, f"{where}: of", "the name of a way")
    if of is not None and of not in names:
        raise UserError(f"{where}: of: there is no way {of}{closest(of, names)}")
    if of is not None and (entry.get("options") or entry.get("config")):
        raise UserError(f"{where}: it only tests the runs of {of}; put its options under test instead of options")
    makers = [command for command in MAKERS if entry.get(command)]
    if makers and (makers[1:] or of or entry.get("options") or entry.get("config")):
        others = ", ".join(key for key in ("of", "options", "config", *makers[1:]) if entry.get(key))
        raise UserError(f"{where}: {makers[0]} makes its run from others; leave {others} out")
    return Variant(
        _configs(entry, file, f"{section}: ") + _words(entry.get("options"), names, f"{where}: options"),
        _words(entry.get("test"), names, f"{where}: test"),
        of,
        _of_type(entry.get("report", True), bool, f"{where}: report", "true or false"),
        _of_type(entry.get("metric"), str | None, f"{where}: metric", "a key of metrics.json"),
        [makers[0], *_words(entry[makers[0]], names, f"{where}: {makers[0]}")] if makers else None,
    )


def _words(text: Any, names: list[str], where: str) -> list[str]:
    """Splits a text or list into arguments, with {way} as {slug}, which has no spaces."""

    def short(found: re.Match[str]) -> str:
        name = found[1].strip()
        if name in names:
            return f"{{{slug(name)}}}"
        if ":" in name:
            return found[0]
        raise UserError(f"{where}: {{{name}}} is not a way{closest(name, names)}; there are {', '.join(names)}")

    if text is not None and not isinstance(text, str | list):
        raise UserError(f"{where}: {text} must be a text or a list of options")
    try:
        if isinstance(text, list):
            return [REFERENCE.sub(short, str(word)) for word in text]
        return shlex.split(REFERENCE.sub(short, text or ""))
    except ValueError as error:
        raise UserError(f"{where}: {text!r} cannot be split into options ({error})") from error


def _mapping(content: Any, keys: Sequence[str] | None, where: str) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a mapping" + (f" of {', '.join(keys)}" if keys else " of names to options"))
    for key in content:
        if keys and key not in keys:
            raise UserError(f"{where}: there is no key {key}{closest(str(key), keys)}; there are {', '.join(keys)}")
    return content


def _of_type(value: Any, kind: Any, where: str, wanted: str) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{where}: {value} is not {wanted}")
    return value


def read_seeds(seeds: Any, where: str) -> list[int]:
    """Reads a list of seeds, without duplicates."""
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{where}: {seeds} is not a list of whole numbers, e.g. [0, 1, 2]")
    return list(dict.fromkeys(seeds))


def _configs(entry: Mapping[str, Any], file: Path, section: str = "") -> list[str]:
    """Returns the arguments for an entry's `config`: paths relative to the file or to the working directory."""
    configs = entry.get("config") or []
    words = []
    for config in [configs] if isinstance(configs, str) else configs:
        found = [path for path in (file.parent / str(config), Path(str(config))) if path.is_file()]
        if not found:
            raise UserError(
                f"{file}: {section}config: there is no file {config}, neither beside it nor in the working directory"
            )
        words += ["--config", str(found[0])]
    return words


def slug(name: str) -> str:
    """Turns a name into a folder name."""
    return re.sub(r"[^\w.+]+", "-", name.lower()).strip("-")


def _slugs(names: Iterable[str], where: str) -> None:
    """Rejects names whose runs would share a folder."""
    seen: dict[str, str] = {}
    for name in names:
        if not slug(name).strip("."):
            raise UserError(f"{where}: {name!r} has no letter or digit to name a folder by")
        if slug(name) in seen:
            raise UserError(f"{where}: {seen[slug(name)]} and {name} would share the folder {slug(name)}; rename one")
        seen[slug(name)] = name


@dataclass
class Trial:
    """A way on a task with a seed.

    Attributes:
        root: The comparison's folder.
        folder: Its own folder: its run's versions, log.txt and result.json.
        make: The command that makes its run, and its arguments; None if it only tests.
        test: The arguments of `tl test`, None if it is not tested.
        benchmark: The arguments of `tl benchmark`, None if it is not measured.
        needs: The trials it depends on, by the slug of their way.
        metric: The metric that its results must contain.
    """

    key: Key
    root: Path
    folder: Path
    make: list[str] | None
    test: list[str] | None
    benchmark: list[str] | None
    needs: dict[str, Key]
    of: str | None
    metric: str | None
    words: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name in messages."""
        task, way, seed = self.key
        return ", ".join(filter(None, (task, way, f"seed {seed}")))

    def result(self) -> dict[str, Any]:
        """Its saved result: words, status, seconds, cpu_seconds, error, metrics; empty before its first start."""
        try:
            found = json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def current(self) -> dict[str, Any]:
        """Its saved result, unless that came from other arguments."""
        found = self.result()
        return found if found.get("words") == self.words else {}


def make_trials(plan: Plan, folder: Path, seeds: Sequence[int]) -> dict[Key, Trial]:
    """Makes the trials of a plan, those with the first seed first.

    Raises:
        UserError: Ways depend on each other in a circle.
    """
    by_slug = {slug(name): name for name in plan.ways}
    trials: dict[Key, Trial] = {}
    for seed in seeds:
        for task_name, task in plan.tasks.items():
            for name, way in plan.ways.items():
                seeded = ["--seed_everything", str(seed), "--data.seed", str(seed)]
                fit = ["fit", *plan.options, *task.fit, *way.fit, *seeded]
                make = way.make or (None if way.of else fit)
                test = [*task.test, *way.test] if way.report else None
                benchmark = plan.benchmark if way.report else None
                words = [*(make or []), *(test or []), *(benchmark or [])]
                used = {found for word in words for found in REFERENCE.findall(word)}
                used = (used & set(by_slug)) | ({slug(way.of)} if way.of else set())
                own_folder = folder / "runs" / slug(task_name) / slug(name) / f"seed-{seed}"
                needs = {short: (task_name, by_slug[short], seed) for short in sorted(used)}
                key = (task_name, name, seed)
                metric = (way.metric or plan.metric) if way.report else None
                trials[key] = Trial(
                    key, folder, own_folder, make, test, benchmark, needs, way.of and slug(way.of), metric
                )
    try:
        order = list(TopologicalSorter({key: trial.needs.values() for key, trial in trials.items()}).static_order())
    except CycleError as error:
        circle = " needs ".join(way for _, way, _ in reversed(error.args[1]))
        raise UserError(f"ways: {circle}; a way cannot depend on itself") from error
    for key in order:
        trials[key].words = _identity(trials[key], trials)
    return trials


def _identity(trial: Trial, trials: Mapping[Key, Trial]) -> dict[str, Any]:
    """Returns everything a trial's result depends on: its arguments, their configs, and the same of trials it needs."""
    words = [*(trial.make or []), *(trial.test or [])]
    configs = [Path(config) for config in values(words, "-c", "--config")]
    command, *made = trial.make or ["fit"]
    asked = {command: made if trial.make else None} | ({"benchmark": trial.benchmark} if trial.benchmark else {})
    return asked | {
        "test": trial.test,
        "configs": {str(path): _digest(path.read_bytes()) for path in configs if path.is_file()},
        "needs": {s: _digest(json.dumps(trials[key].words).encode()) for s, key in trial.needs.items()},
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def default_metric(metrics: Iterable[str]) -> str | None:
    """Returns the default metric of the comparison."""
    return next((key for key in METRICS if key in metrics), None)
