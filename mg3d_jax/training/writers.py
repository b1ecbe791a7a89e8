"""Where a run writes what it sees: `metrics.jsonl` with PNG images, TensorBoard, Weights & Biases. One interface for all.

`training.writers` names the sinks. `metrics.jsonl` is what `mg3d report` and sweeps read; the others are for looking on.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_lines, whole_lines, write_lines

METRICS_FILE, IMAGES_FOLDER, WANDB_ID_FILE = "metrics.jsonl", "images", "wandb_id"


class Writer(Protocol):
    """One sink. `split` says what was measured: "train", "valid" (the held-out loss) or "evaluation"."""

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, split: str, name: str, pixels: np.ndarray) -> None:
        """`pixels` is uint8 [H, W] (grey) or [H, W, 3]."""

    def close(self) -> None: ...


class Writers:
    """Hands everything to every sink. A process that has none (all but process 0) may call it all the same."""

    def __init__(self, sinks: Sequence[Writer]):
        self.sinks = tuple(sinks)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        for sink in self.sinks:
            sink.scalars(step, split, numbers)

    def image(self, step: int, split: str, name: str, pixels: np.ndarray) -> None:
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
            raise ValueError(f"image {name!r} is {pixels.dtype}{list(pixels.shape)}, not uint8 [H, W] or [H, W, 3]")
        for sink in self.sinks:
            sink.image(step, split, name, pixels)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


@dataclass(frozen=True)
class Described:
    """The run, for sinks that show it among others. `config`: as nested dicts."""

    name: str
    config: Mapping[str, Any]


def open_writers(
    workdir: Path, names: Sequence[str], *, resume_step: int, name: str = "", config: Mapping[str, Any] | None = None
) -> Writers:
    """The sinks of `training.writers` on process 0, none on the others.

    Args:
        workdir: the run.
        name, config: of the run, for sinks that show it among others.
        resume_step: what an interrupted run wrote after this step, its last checkpoint, is dropped: the run will write
            it again. 0 for a new run.

    Raises `UserError` for "wandb" where it is not installed or not logged in.
    """
    if jax.process_index() != 0:
        return Writers(())
    described = Described(name, config or {})
    return Writers([SINKS[sink](workdir, described, resume_step) for sink in dict.fromkeys(names)])


class JsonlWriter:
    """A line per record in `metrics.jsonl`, `{"step": ..., "split": ..., NAME: value, ...}`; PNG files in `images/`."""

    def __init__(self, workdir: Path, run: Described, resume_step: int):
        self._images = workdir / IMAGES_FOLDER
        path = workdir / METRICS_FILE
        keep_lines(path, lambda line: line.get("step", math.inf) <= resume_step)
        for image in self._images.glob("*.png"):
            step = image.stem.rpartition("-")[2]
            if step.isdecimal() and int(step) > resume_step:
                image.unlink()
        self._file = path.open("a")

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "split": split} | dict(values)) + "\n")
        self._file.flush()

    def image(self, step: int, split: str, name: str, pixels: np.ndarray) -> None:
        """`images/NAME-STEP.png`."""
        from PIL import Image

        self._images.mkdir(exist_ok=True)
        temporary = self._images / f"{name}-{step}.partial"
        Image.fromarray(pixels).save(temporary, format="png")
        os.replace(temporary, self._images / f"{name}-{step}.png")

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """Event files in `tensorboard/`; TensorBoard hides what a resumed run writes again."""

    def __init__(self, workdir: Path, run: Described, resume_step: int):
        from tensorboardX import SummaryWriter  # slow import

        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def image(self, step: int, split: str, name: str, pixels: np.ndarray) -> None:
        self._board.add_image(f"{split}/{name}", pixels, step, dataformats="HWC"[: pixels.ndim])

    def close(self) -> None:
        self._board.close()


class WandbWriter:
    """Weights & Biases. The project is the config's `name` or `WANDB_PROJECT`; `WANDB_MODE=offline` writes to disk only.

    The run's id is kept in the file `wandb_id`, so that a resumed run goes on there (offline: two parts of one run, for
    `wandb sync`). "step" is logged as a value of its own: W&B throws away what comes with a lower step than it has seen,
    which is what a run resumed from its last checkpoint does.
    """

    def __init__(self, workdir: Path, run: Described, resume_step: int):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f'training.writers names "wandb", which cannot be imported ({error}): pip install wandb, or take it out, e.g. '
                "--config.training.writers=\"('jsonl', 'tensorboard')\""
            ) from error
        self._wandb = wandb
        file = workdir / WANDB_ID_FILE
        if not file.exists():
            file.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", run.name),
                name=workdir.name,
                id=file.read_text().strip(),
                resume="allow",
                dir=str(workdir),
                config=dict(run.config),
            )
        except wandb.Error as error:
            raise UserError(f"Weights & Biases: {error}. Run `wandb login`, or set WANDB_MODE=offline") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {f"{split}/{name}": value for name, value in values.items()})

    def image(self, step: int, split: str, name: str, pixels: np.ndarray) -> None:
        self._run.log({"step": step, f"{split}/{name}": self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, Described, int], Writer]] = {
    "jsonl": JsonlWriter,
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
}


def drop_evaluations(workdir: Path, step: int) -> None:
    """Takes what was evaluated at `step` out of `metrics.jsonl`: it is evaluated again, and may lack a part."""
    keep_lines(workdir / METRICS_FILE, lambda line: line.get("step") != step or line.get("split") == "train")


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Takes the lines out of a file of JSON lines that `keep` does not want; returns those that stay. Process 0 writes."""
    kept = [line for line in whole_lines(path) if keep(line)]
    if path.exists() and jax.process_index() == 0:
        write_lines(path, kept)
    return kept


def read_metrics(workdir: Path, split: str | None = None) -> list[dict]:
    """The lines of `metrics.jsonl`, of one split or of all. A last line that a kill cut short is not one.

    Raises `UserError` where the run has no such file, or another line of it is damaged.
    """
    path = workdir / METRICS_FILE
    if not path.exists():
        raise UserError(f'{path} does not exist: is this a run, and does its training.writers contain "jsonl"?')
    lines, damaged = read_lines(path)
    if damaged:
        raise UserError(
            f"{path}: {damaged} of {damaged + len(lines)} lines are not JSON objects: restore it, or delete them"
        )
    return [line for line in lines if split is None or line.get("split") == split]
