"""What happens beside the training steps: a hook is called after the steps that it asks for, and may measure something.

A hook of your own is an object in a list:

    class WeightNorm(Hook):
        every = 100

        def __call__(self, after: AfterStep) -> dict[str, float]:
            return {"weights/norm": float(optax.tree.norm(after.params))}

    Trainer(config, workdir, hooks=[WeightNorm()]).run()

The loop writes what it returns to every metric writer, under the split before the first "/". `training.wiring` has the list
of those that every run gets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.devices import known_peak
from mg3d_jax.errors import UserError
from mg3d_jax.progress import Progress
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.clock import Clock, device_memory
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.held_out import HeldOut
from mg3d_jax.training.state import Setup, State, evaluated_parameters
from mg3d_jax.training.writers import Writers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """What a hook is told of its run before the first step. `first`: the step that it resumes after, 0 for a new one."""

    workdir: Path
    setup: Setup
    tokenizer: ReportTokenizer
    train: PreparedData
    valid: PreparedData | None
    first: int
    writers: Writers

    @property
    def held_out(self) -> PreparedData:
        """`valid`, for a hook that needs it. `UserError` where the run has none."""
        if self.valid is None:
            raise UserError("what is measured on held-out data needs some: set data.valid to a prepared folder")
        return self.valid


@dataclass
class AfterStep:
    """What a hook sees after a step.

    Attributes:
        step: that has been taken, from 1 on. `last`: of the run.
        state: on the devices. The next step overwrites its memory: keep copies, not references.
        metrics: of the compiled step, on the devices.
        writers: sinks of metrics and images.
        measured: what the hooks before this one have measured after this step, "valid/loss", ...
        waits: a hook of this step needs everything up to here to be finished: the host waits before they are called.
    """

    step: int
    last: int
    state: State
    metrics: Mapping[str, jax.Array]
    writers: Writers
    measured: dict[str, float] = field(default_factory=dict)
    waits: bool = True

    @property
    def params(self) -> Any:
        """What evaluations read: the averaged parameters where the run keeps an average."""
        return evaluated_parameters(self.state)

    def record(self, values: Mapping[str, float] | None) -> None:
        """Takes what a hook returned, `{"SPLIT/NAME": value}`, and writes it to the sinks."""
        splits: dict[str, dict[str, float]] = {}
        for full, value in (values or {}).items():
            split, slash, name = full.partition("/")
            if not slash:
                raise ValueError(f"a hook measured {full!r}: name it SPLIT/NAME, e.g. 'valid/{full}'")
            splits.setdefault(split, {})[name] = value
        for split, found in splits.items():
            self.writers.scalars(self.step, split, found)
        self.measured |= values or {}


class Hook:
    """Called after the steps that are due; several processes call their hooks in the same order.

    Attributes:
        every: interval in steps. The last step of the run is always due; with 0 only that one.
        measures: it reads the state, and its time lowers no rate. It is called again where a kill came between the last
            checkpoint and the end of the run.
        waits: the host waits for all steps up to this one before the hooks of the step are called. Without it steps may
            still be on their way, and reading the state would wait for them.
    """

    every: int = 1
    measures: bool = True
    waits: bool = True

    def due(self, after: AfterStep) -> bool:
        """Is it called after this step? Asked again when its turn comes: hooks before it may have measured something."""
        return after.step == after.last or (self.every > 0 and after.step % self.every == 0)

    def start(self, run: TrainingRun) -> None:
        """Before the first step: what is expensive to build is built here."""

    def __call__(self, after: AfterStep) -> dict[str, float] | None:
        """After a step that is due. Returns what it measured as `{"SPLIT/NAME": value}`, or None."""

    def stop(self, after: AfterStep) -> None:
        """The run was asked to stop after this step, whose hooks have been called."""

    def close(self) -> None:
        """The run ends, however it ends; also where `start` was never reached."""


class Log(Hook):
    """Writes the metrics of the step, rates and memory under "train". `note`: what stands beside the progress bar."""

    measures = False

    def __init__(self, every: int, batch_size: int, clock: Clock, cost: StepCost, skipped: Any):
        self.every, self.note = every, ""
        self._batch_size, self._clock, self._cost, self._skipped = batch_size, clock, cost, skipped

    def start(self, run: TrainingRun) -> None:
        self._devices = run.setup.mesh.size
        self._peak_flops = known_peak(jax.devices()[0].device_kind, run.setup.config.model.dtype)

    def __call__(self, after: AfterStep) -> None:
        values = {name: float(value) for name, value in jax.device_get(after.metrics).items()}
        values |= self._clock.rates(self._cost.training.products, self._peak_flops, self._devices)
        total = self._skipped.total
        values |= device_memory() | {"samples_seen": after.step * self._batch_size, "skipped_updates": total}
        after.writers.scalars(after.step, "train", values)
        skipped = f", {total} skipped" if total else ""
        self.note = f"loss {values['loss']:.4f}, {values['samples_per_second']:.1f} samples/s{skipped}"


class ProgressBar(Hook):
    """Shows how far the run is, with the newest note of `log`."""

    measures = waits = False

    def __init__(self, log: Log):
        self._log = log
        self._progress: Progress | None = None

    def start(self, run: TrainingRun) -> None:
        self._progress = Progress("train", run.setup.steps, unit="steps", initial=run.first)
        self._progress.__enter__()

    def __call__(self, after: AfterStep) -> None:
        if self._progress is not None:
            self._progress.advance(note=self._log.note)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__()


class HeldOutLoss(Hook):
    """The loss on the held-out data, as "valid/loss" and the objectives' own metrics."""

    def __init__(self, every: int):
        self.every = every

    def start(self, run: TrainingRun) -> None:
        self._held_out = HeldOut(run.setup, run.tokenizer, run.held_out, log_folder=run.workdir)

    def __call__(self, after: AfterStep) -> dict[str, float]:
        return {f"valid/{name}": value for name, value in self._held_out.loss(after.params).items()}


class BestMetric(Hook):
    """Sees to it that `training.best_metric` is among what is measured. `UserError` where its split has another name."""

    waits = False

    def __init__(self, metric: str):
        self._metric = metric

    def due(self, after: AfterStep) -> bool:
        split = self._metric.partition("/")[0] + "/"
        return any(name.startswith(split) for name in after.measured)

    def __call__(self, after: AfterStep) -> None:
        if self._metric not in after.measured:
            raise UserError(f"training.best_metric = {self._metric!r} is none of {', '.join(after.measured)}")


class Save(Hook):
    """Checkpoints: at their interval, when a candidate for the best one was measured, at the end, and when asked to stop.

    Args:
        facts: gives the part of a checkpoint's JSON that is the same at every step.
        best_metric: of `checkpoints`; empty for none.
    """

    measures = False

    def __init__(
        self, every: int, checkpoints: Checkpoints, clock: Clock, batch_size: int,
        facts: Callable[[], Mapping[str, Any]], best_metric: str,
    ):  # fmt: skip
        self.every, self._checkpoints, self._clock, self._batch_size = every, checkpoints, clock, batch_size
        self._facts, self._best_metric = facts, best_metric

    def due(self, after: AfterStep) -> bool:
        return super().due(after) or self._best_metric in after.measured

    def __call__(self, after: AfterStep) -> None:
        """Starts a save, unless the step is saved already. The data position is the step itself."""
        meta = {
            "step": after.step,
            "samples_seen": after.step * self._batch_size,
            "trained_seconds": self._clock.trained,
            **self._facts(),
        }
        self._checkpoints.save(after.state, meta, after.step, metrics=after.measured)

    def stop(self, after: AfterStep) -> None:
        self(after)
        logger.info("asked to stop: saved step %d of %d; the same command goes on", after.step, after.last)

    def close(self) -> None:
        self._checkpoints.close()


class SaveAtTheEnd(Hook):
    """Saves the last step before it is evaluated: whatever becomes of the evaluation, the weights are there."""

    every, measures = 0, False

    def __init__(self, save: Save):
        self._save = save

    def __call__(self, after: AfterStep) -> None:
        self._save(after)
