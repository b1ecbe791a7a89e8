"""Where metrics go: one JSON line per record in `metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars to every sink. Only process 0 of a run makes one.

    Args:
        workdir: the run.
        resume_step: lines of later steps, written by an interrupted run after its last checkpoint, are dropped: the run
            will write them again.
    """

    def __init__(self, workdir: Path, *, resume_step: int = 0):
        from tensorboardX import SummaryWriter  # slow import

        path = workdir / METRICS_FILE
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(line + "\n" for line in kept))
            os.replace(temporary, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """`split` is "train" or "valid"; a line is `{"step": ..., "split": ..., NAME: value, ...}`."""
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "split": split} | numbers) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")


def read_metrics(workdir: Path, split: str | None = None) -> list[dict]:
    """The lines of `metrics.jsonl`, of one split or of all."""
    lines = map(json.loads, (workdir / METRICS_FILE).read_text().splitlines())
    return [line for line in lines if split is None or line["split"] == split]
