"""Names the records of batches whose loss jumps: what is behind a spike is most often in the data."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax

from mg3d_jax.training.writers import keep_lines

logger = logging.getLogger(__name__)
SPIKES_FILE = "spikes.jsonl"
WINDOW, WARM_UP = 64, 24  # losses that a new one is compared with; so many are needed
DEVIATIONS, SHARE = 8.0, 0.1  # above the median: robust standard deviations, and a share of it that counts at least
MOST = 200  # lines of the file


@dataclass(eq=False)
class LossSpikes:
    """A loss is a spike when it is above the median of the last `WINDOW` by `DEVIATIONS` of their robust standard deviations
    (1.4826 times the median absolute deviation) and by `SHARE` of the median.

    Each is written to `spikes.jsonl` with the records of its batch, up to `MOST`; the first of a row of them is logged. A
    resumed run begins a new window.
    """

    total: int = field(default=0, init=False)
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)
    _last: int = field(default=-1, init=False)

    def resume(self, workdir: Path, first: int, records: Callable[[int], list[str]]) -> None:
        """Counts what `workdir` tells of the steps up to `first`. `records`: names of those in the batch of a step."""
        self._path, self._records = workdir / SPIKES_FILE, records
        self.total = len(keep_lines(self._path, lambda entry: entry.get("step", math.inf) <= first))

    def see(self, step: int, loss: float) -> bool:
        """Takes note of a finite loss: is it a spike?"""
        found = len(self._losses) >= WARM_UP and loss > self._limit()
        self._losses.append(loss)
        if found:
            self.total += 1
            if jax.process_index() == 0 and self.total <= MOST:
                self._note(step, loss)
            self._last = step
        return found

    def _limit(self) -> float:
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median + max(DEVIATIONS * deviation, SHARE * abs(median))

    def _note(self, step: int, loss: float) -> None:
        records, median = self._records(step), statistics.median(self._losses)
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, "loss": loss, "median": median, "records": records}) + "\n")
        if step != self._last + 1:
            logger.warning(
                "step %d: loss %.4g is a spike, the median of the last %d is %.4g; its %d records are in %s: %s%s",
                step, loss, len(self._losses), median, len(records), self._path, "; ".join(records[:2]),
                "; ..." if len(records) > 2 else "",
            )  # fmt: skip
