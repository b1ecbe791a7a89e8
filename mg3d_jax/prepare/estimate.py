"""How long and how large will it be? Measured on a few of the volumes themselves, before hours are spent."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.listing import Example
from mg3d_jax.prepare.shards import Recipe, prepare_example
from mg3d_jax.progress import format_seconds

_SAMPLE = 3
_FEW = 50  # fewer volumes than this are not worth an estimate


@dataclass(frozen=True)
class Estimate:
    """Expected cost of the volumes that are still to do."""

    volumes: int
    seconds: float
    disk_bytes: float

    def __str__(self) -> str:
        return f"{self.volumes} volumes to do: about {format_seconds(self.seconds)}, {self.disk_bytes / 1e9:.2g} GB on disk"


def estimate(examples: list[Example], recipe: Recipe, workers: int) -> Estimate | None:
    """Prepares a few of `examples`, spread over the list, and extrapolates. `None` for a handful of volumes."""
    if len(examples) < _FEW:
        return None
    sample = [examples[(2 * i + 1) * len(examples) // (2 * _SAMPLE)] for i in range(_SAMPLE)]
    start = time.perf_counter()
    outcomes = [prepare_example(example, recipe) for example in sample]
    seconds = (time.perf_counter() - start) / _SAMPLE
    sizes = [len(outcome.data) for outcome in outcomes if outcome.data is not None]
    size = sum(sizes) / len(sizes) if sizes else 0.0
    return Estimate(len(examples), seconds * len(examples) / max(workers, 1), size * len(examples))


def check_disk(expected: Estimate, out: Path) -> None:
    """Raises `UserError` where the records would not fit."""
    free = shutil.disk_usage(out).free
    if expected.disk_bytes > free:
        raise UserError(
            f"{out} has {free / 1e9:.3g} GB free, the records need about {expected.disk_bytes / 1e9:.3g} GB: use another "
            "disk, a smaller --size, or --window LOW HIGH"
        )
