"""Latency, throughput, multiply-accumulates and memory of a network."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tl_modules.batch import samples
from tl_modules.batch.compat import TorchDispatchMode, storage_key, tree_leaves

__all__ = ["machine", "macs", "peak_memory", "speed"]

Context = Callable[[], AbstractContextManager[Any]]


def machine(device: torch.device) -> str:
    """Returns the name of the GPU, or of the CPU with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    bf16 = ", avx512_bf16" if "avx512_bf16" in info else ""
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads{bf16}"


def macs(module: nn.Module, x: Any) -> int:
    """Counts the multiply-accumulates of matrix products, convolutions and attention per sample of a batch."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(samples.take(x, slice(0, 1)))
    return int(counter.get_total_flops()) // 2


def speed(
    module: nn.Module, x: Any, batch_size: int, seconds: float = 2.0, context: Context = nullcontext
) -> dict[str, float]:
    """Times forward passes in inference mode.

    Args:
        module: The module in eval mode, on its device.
        x: Prepared inputs on that device; they are repeated to fill the batch.
        batch_size: Samples per pass.
        seconds: Minimum duration; at least 8 passes, the first three of which are not counted.
        context: Returns the precision's context.

    Returns:
        `p50`, `p95`, `p99` in milliseconds per pass, `throughput` in samples per second.
    """
    batch = repeated(x, batch_size)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    with torch.inference_mode(), context():
        while len(times) < 8 or time.perf_counter() < stop:
            start = time.perf_counter()
            module(batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
    p50, p95, p99 = (float(p) for p in np.percentile(times[3:], [50, 95, 99]))
    return {"p50": p50, "p95": p95, "p99": p99, "throughput": 1000 * batch_size / float(np.mean(times[3:]))}


def repeated(x: Any, batch_size: int) -> Any:
    """Repeats a batch's samples to another batch size."""
    return samples.take(x, torch.arange(batch_size) % samples.count(x))


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Returns the peak bytes of tensors created by `work`: counted on a CPU, from the allocator on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with _Live() as live:
        work()
    return int(live.peak)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are created while it is active and still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage_key(tensor)
                if key not in given and key not in self.known:
                    self.known[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, 0)
