"""Times a run: throughput, model-FLOPs utilisation, waiting for data, memory, and the seconds trained over all restarts."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

GIB = 2.0**30


class Clock:
    """`trained` seconds so far (restored from a checkpoint) and rates since the last `rates()`."""

    def __init__(self, trained: float = 0.0):
        self._before, self._start = trained, time.monotonic()
        self._mark = self._start
        self._forget()

    def _forget(self) -> None:
        self._samples, self._tokens, self._waited, self._paused = 0, 0, 0.0, 0.0

    @property
    def trained(self) -> float:
        return self._before + time.monotonic() - self._start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (compiling, held-out loss, evaluation) is part of `trained`, but lowers no rate."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin

    def count(self, samples: int, tokens: int) -> None:
        """Another step of so many samples and tokens, of all devices together.

        Tokens are what a sample shows the towers once: the patches of its volume and the positions of the text that the
        alignment reads, padding included, because it is computed too (`cost.StepCost.volume_tokens` and
        `.report_tokens`). Further passes of the same sample (masked ones) do not count again.
        """
        self._samples += samples
        self._tokens += tokens

    def rates(self, flops_per_sample: float, peak_flops: float | None, devices: int) -> dict[str, float]:
        """`samples_per_second`, `tokens_per_second`, `data_wait_share` and `mfu` since the last call.

        Args:
            flops_per_sample: matrix products of the forward and backward pass of one sample, nothing recomputed
                (`cost.StepCost.training.products`).
            peak_flops: of one device, FLOP/s (`devices.known_peak`); None where it is not known: no `mfu` then.
            devices: of the whole run.
        """
        now = time.monotonic()
        elapsed = max(now - self._mark - self._paused, 1e-9)
        rates = {
            "samples_per_second": self._samples / elapsed,
            "tokens_per_second": self._tokens / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        if peak_flops is not None:
            rates["mfu"] = rates["samples_per_second"] * flops_per_sample / (peak_flops * devices)
        self._mark = now
        self._forget()
        return rates


def device_memory() -> dict[str, float]:
    """`device_memory_gib` and `device_memory_peak_gib`, of the fullest device of this process.

    Where devices do not say (CPU): `host_memory_gib`, the resident memory of this process, host and fake devices alike.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return {
            "device_memory_gib": max(s["bytes_in_use"] for s in stats) / GIB,
            "device_memory_peak_gib": max(s["peak_bytes_in_use"] for s in stats) / GIB,
        }
    return {"host_memory_gib": _resident_bytes() / GIB}


def _resident_bytes() -> int:
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    unit = 1 if sys.platform == "darwin" else 1024  # no such file there: the largest so far
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
