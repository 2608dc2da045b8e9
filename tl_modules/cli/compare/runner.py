"""Runs trials: a process for each command, several at a time, and a result.json for each trial.

    ready trial -> fit --resume, compress or soup -> test -> benchmark, if asked -> result.json -> trials that waited

The processes are forked from a server that has already imported everything, which takes most of the time of a small
run; a crash of one process does not affect the others.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from tl_modules.checkpoints.files import find_run, write_whole
from tl_modules.cli.compare.plan import REFERENCE, Key, Trial, default_metric
from tl_modules.errors import UserError, closest
from tl_modules.runs.trust import to_trust

Main = Callable[[list[str]], Any]


def _work(main: Main, words: list[str], log_file: Path, folder: str, threads: int, usage: Connection) -> None:
    """Runs `tl WORDS` in this process, with its output in a file."""
    os.setsid()  # a Ctrl-C reaches only the parent, which signals its children once
    signal.signal(signal.SIGTERM, _leave)  # except in training, which saves first
    os.chdir(folder)
    file = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    sys.argv = [str(Path(sys.executable).with_name("tl")), *words]  # Lightning starts further ranks with it
    print("$", shlex.join(["tl", *words]))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    try:
        main(words)
    finally:
        spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        usage.send(sum(one.ru_utime + one.ru_stime for one in spent))


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@dataclass
class Running:
    """A trial whose commands are running."""

    trial: Trial
    commands: Generator[list[str], int, dict[str, float]]
    began: float
    cpu_seconds: float
    process: Any = None  # its type depends on the multiprocessing context
    usage: Connection | None = None

    def spent(self) -> dict[str, float]:
        """Returns the seconds spent, including interrupted attempts."""
        return {"seconds": time.perf_counter() - self.began, "cpu_seconds": self.cpu_seconds}


class Runner:
    """Runs trials, several at a time, each after the trials it depends on.

    Args:
        trials: All trials.
        selected: The trials to run; those they depend on run too.
        processes: Number of concurrent commands.
        main: The `tl` command.
    """

    def __init__(self, trials: Mapping[Key, Trial], selected: Iterable[Key], processes: int, main: Main) -> None:
        self.trials, self.main = trials, main
        self.graph: dict[Key, list[Key]] = {}
        for key in selected:
            self._add(key)
        self.processes = processes
        self.threads = max(1, (os.cpu_count() or 1) // processes)
        # macOS frameworks do not survive a fork
        self.context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self.context.set_forkserver_preload(["tl_modules.cli.main"])
        self.running: list[Running] = []
        self.over: list[Key] = []
        self.signal = 0
        self.console = Console(highlight=False, markup=False, soft_wrap=True)

    def _add(self, key: Key) -> None:
        self.graph[key] = list(self.trials[key].needs.values())
        for need in self.graph[key]:
            self._add(need)

    def run(self) -> None:
        """Runs all trials that are not done yet.

        Raises:
            SystemExit: Stopped by a signal, with 130 or 143.
        """
        self._announce()
        sorter = TopologicalSorter(self.graph)
        sorter.prepare()
        ready: list[Key] = []
        told = 0
        with self._signals():
            while sorter.is_active() and (self.running or not self.signal):
                ready += sorter.get_ready()
                while ready and len(self.running) < self.processes and not self.signal:
                    self._start(self.trials[ready.pop(0)])
                for one in self._ended():
                    self._continue(one)
                sorter.done(*self.over[told:])
                told = len(self.over)
        if self.signal:
            self._say(f"stopped with {len(self.over)} of {len(self.graph)} trials ended; rerun the command to continue")
            raise SystemExit(128 + self.signal)

    def _announce(self) -> None:
        trials = [self.trials[key] for key in self.graph]
        done = sum(trial.current().get("status") == "done" for trial in trials)
        changed = dict.fromkeys(trial.key[1] for trial in trials if trial.result() and not trial.current())
        if done:
            self._say(f"{done} of {len(trials)} trials are already done; remove a trial's folder to run it again")
        if changed:
            self._say(f"rerunning, because their options or configs have changed: {', '.join(changed)}")

    def _start(self, trial: Trial) -> None:
        """Starts a trial, unless it is done or cannot be run."""
        earlier = trial.current()
        if earlier.get("status") == "done":
            self.over.append(trial.key)
            return
        if trial.folder.is_dir() and not earlier:  # from other arguments; kept, since it may have taken long
            olds = (trial.folder.with_name(f"{trial.folder.name}.old-{n}") for n in range(1, 10**6))
            trial.folder.rename(next(old for old in olds if not old.exists()))
        trial.folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter() - earlier.get("seconds", 0.0)
        one = Running(trial, self._commands(trial), began, earlier.get("cpu_seconds", 0.0))
        self._write(one, "interrupted")  # until it ends
        self._continue(one)

    def _continue(self, one: Running) -> None:
        """Starts a trial's next command, or records how the trial has ended."""
        code = None
        if one.usage is not None:
            code = one.process.exitcode
            with contextlib.suppress(EOFError):  # a killed process has sent nothing
                one.cpu_seconds += one.usage.recv()
            self.running.remove(one)
        try:
            if self.signal:
                return self._write(one, "interrupted")
            words = next(one.commands) if code is None else one.commands.send(code)
        except StopIteration as end:
            return self._end(one, "done", metrics=end.value)
        except UserError as error:
            return self._end(one, "failed", error=" ".join(str(error).split()))
        one.usage, child = self.context.Pipe(duplex=False)
        log_file = one.trial.folder.absolute() / "log.txt"
        one.process = self.context.Process(
            target=_work, args=(self.main, words, log_file, os.getcwd(), self.threads, child)
        )
        one.process.start()
        child.close()
        self.running.append(one)
        if self.signal:  # a signal came in between
            one.process.terminate()

    def _commands(self, trial: Trial) -> Generator[list[str], int, dict[str, float]]:
        """Yields the commands of a trial; each gets its exit code in return.

        Returns:
            The run's metrics.

        Raises:
            UserError: A command failed, or a run is incomplete.
        """
        for key in trial.needs.values():
            if self.trials[key].current().get("status") != "done":
                raise UserError(f"it needs {self.trials[key].name}, which failed")
        runs = {short: find_run(self.trials[key].folder) for short, key in trial.needs.items()}

        def filled(words: list[str]) -> list[str]:
            return [REFERENCE.sub(lambda found: str(runs.get(found[1], found[0])), word) for word in words]

        if trial.make is not None:
            destination = ["--trainer.default_root_dir", str(trial.root)]
            name = trial.folder.relative_to(trial.root / "runs").as_posix()
            # an interrupted fit with the same arguments is resumed; without one, --resume starts it
            destination += ["--name", name, "--resume"] if trial.make[0] == "fit" else ["--out", name]
            _check((yield [*filled(trial.make), *destination]), trial)
            run = find_run(trial.folder)
        else:  # a copy, because several tests of one run would write to one metrics.json
            assert trial.of is not None
            run = trial.folder / "version_0"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(
                runs[trial.of], run, ignore=shutil.ignore_patterns("last.ckpt", "*.json", "*.csv", "events*", "*.pt")
            )
        own = to_trust(yaml.safe_load((run / "config.yaml").read_text()))
        trust = ["--trust", ",".join(own)] if own else []
        for command, words in (("test", trial.test), ("benchmark", trial.benchmark)):
            if words is not None:
                _check((yield [command, "--run", str(run), *trust, *filled(words)]), trial)
        file = run / "metrics.json"
        metrics: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
        if trial.benchmark is not None:
            metrics |= costs(json.loads((run / "benchmark.json").read_text()))
        if trial.test is not None and not any(key.startswith("test/") for key in metrics):
            raise UserError("the test wrote no metrics")
        if trial.metric is not None and trial.metric not in metrics:
            raise UserError(f"metric: {file} has no {trial.metric}{closest(trial.metric, metrics)}")
        return metrics

    def _ended(self) -> list[Running]:
        """Waits for commands to end, and returns them."""
        if not self.running:  # `wait` would block for ever
            return []
        ended = wait([one.process.sentinel for one in self.running])
        found = [one for one in self.running if one.process.sentinel in ended]
        for one in found:
            one.process.join()
        return found

    def _write(self, one: Running, status: str, **more: Any) -> None:
        result = {"words": one.trial.words, "status": status} | one.spent() | more
        write_whole(one.trial.folder / "result.json", json.dumps(result, indent=2) + "\n")

    def _end(self, one: Running, status: str, **more: Any) -> None:
        """Records how a trial has ended, and prints a line."""
        trial = one.trial
        self._write(one, status, **more)
        self.over.append(trial.key)
        text = f"[{len(self.over)}/{len(self.graph)}] {trial.name}: "
        if status == "failed":
            return self._say(f"{text}failed: {more['error']} ({trial.folder / 'log.txt'})", "red")
        metrics = more["metrics"]
        metric = trial.metric or default_metric(metrics)
        value = metrics.get(metric) if metric and trial.test is not None else None  # null: it was not finite
        score = "" if value is None else f"{metric} {value:.4f}, "
        self._say(f"{text}{score}{one.spent()['seconds']:.0f} s")

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Forwards each signal once to the children, which then save."""

        def received(number: int, frame: Any) -> None:
            if not self.signal:
                os.write(2, b"stopping: running trials are saving; signal again to stop at once\n")
            self.signal = number
            for one in self.running:
                one.process.terminate()

        mine = threading.current_thread() is threading.main_thread()
        before: dict[int, Any] = (
            {number: signal.signal(number, received) for number in (signal.SIGINT, signal.SIGTERM)} if mine else {}
        )
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def costs(found: Mapping[str, Any]) -> dict[str, float]:
    """Returns the contents of benchmark.json by the table's columns; the latency is that of the smallest batch."""
    first = min(found["eager"], key=int)
    return {
        "cost/parameters": found["parameters"],
        "cost/macs": found["macs"],
        "cost/p50_ms": found["eager"][first]["p50"],
        "cost/megabytes": found["weights"] / 1e6,
    }


def _check(code: int, trial: Trial) -> None:
    """Raises the error that a command's exit code means."""
    if code < 0:
        raise UserError(f"killed by {signal.Signals(-code).name}")
    if code > 0:
        text = (trial.folder / "log.txt").read_text(errors="replace").rpartition("\n$ tl ")[2]
        lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
        errors = [line.removeprefix("tl: error: ") for line in lines if line.startswith("tl: error: ")]
        raise UserError((errors or lines or [f"exit code {code}"])[-1])
