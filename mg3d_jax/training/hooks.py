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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from mg3d_jax.data.pipeline import MoreText, PreparedData
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.devices import known_peak
from mg3d_jax.errors import UserError
from mg3d_jax.progress import Progress
from mg3d_jax.training import run_folder
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.clock import Clock, device_memory
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.held_out import HeldOut
from mg3d_jax.training.ownership import check_place, place
from mg3d_jax.training.state import Setup, State, evaluated_parameters
from mg3d_jax.training.writers import Writers

logger = logging.getLogger(__name__)
UNMEASURED = "unmeasured"  # in the JSON of a checkpoint: see `AfterStep`


@dataclass(frozen=True)
class TrainingRun:
    """What a hook is told of its run before the first step. `first`: the step that it resumes after, 0 for a new one;
    `more_text`: what the objectives add to the batches (`report_texts`)."""

    workdir: Path
    setup: Setup
    tokenizer: ReportTokenizer
    train: PreparedData
    valid: PreparedData | None
    more_text: MoreText
    first: int
    clock: Clock
    cost: StepCost
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
        unmeasured: a measurement is under way, or was when the run was asked to stop: a resumed run measures again.
    """

    step: int
    last: int
    state: State
    metrics: Mapping[str, jax.Array]
    writers: Writers
    measured: dict[str, float] = field(default_factory=dict)
    waits: bool = True
    unmeasured: bool = False

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


@dataclass(eq=False)
class Log(Hook):
    """Writes the metrics of the step, rates and memory under "train". `note`: what stands beside the progress bar.

    `skipped` is the hook that counts skipped updates (`stopping.SkippedUpdates`).
    """

    skipped: Any
    every: int = 1
    note: str = field(default="", init=False)
    measures = False

    def start(self, run: TrainingRun) -> None:
        self._run = run
        self._peak_flops = known_peak(jax.devices()[0].device_kind, run.setup.config.model.dtype)

    def __call__(self, after: AfterStep) -> None:
        setup, total = self._run.setup, self.skipped.total
        values = {name: float(value) for name, value in jax.device_get(after.metrics).items()}
        values |= self._run.clock.rates(self._run.cost.training.products, self._peak_flops, setup.mesh.size)
        values |= device_memory()
        values |= {"samples_seen": after.step * setup.config.data.batch_size, "skipped_updates": total}
        after.writers.scalars(after.step, "train", values)
        skipped = f", {total} skipped" if total else ""
        self.note = f"loss {values['loss']:.4f}, {values['samples_per_second']:.1f} samples/s{skipped}"


@dataclass(eq=False)
class ProgressBar(Hook):
    """Shows how far the run is, with the newest note of `log`."""

    log: Log
    _progress: Progress | None = field(default=None, init=False)
    measures = waits = False

    def start(self, run: TrainingRun) -> None:
        self._progress = Progress("train", run.setup.steps, unit="steps", initial=run.first)
        self._progress.__enter__()

    def __call__(self, after: AfterStep) -> None:
        if self._progress is not None:
            self._progress.advance(note=self.log.note)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__()


@dataclass(eq=False)
class HeldOutLoss(Hook):
    """The loss on the held-out data, as "valid/loss" and the objectives' own metrics."""

    every: int = 1

    def start(self, run: TrainingRun) -> None:
        self._held_out = HeldOut(run.setup, run.tokenizer, run.held_out, run.more_text, log_folder=run.workdir)

    def __call__(self, after: AfterStep) -> dict[str, float]:
        return {f"valid/{name}": value for name, value in self._held_out.loss(after.params).items()}


@dataclass(eq=False)
class BestMetric(Hook):
    """Sees to it that `training.best_metric` is among what is measured. `UserError` where its split has another name."""

    metric: str
    waits = False

    def due(self, after: AfterStep) -> bool:
        split = self.metric.partition("/")[0] + "/"
        return any(name.startswith(split) for name in after.measured)

    def __call__(self, after: AfterStep) -> None:
        if self.metric not in after.measured:
            raise UserError(f"training.best_metric = {self.metric!r} is none of {', '.join(after.measured)}")


@dataclass(eq=False)
class Save(Hook):
    """Checkpoints: at their interval, when a candidate for the best one was measured, at the end, and when asked to stop.

    None is saved, and so none goes for it, while updates are being skipped.

    `best_metric`: of `checkpoints`; empty for none. `steps`: further ones to save. `skipping`: is the last update that was
    looked at one that was skipped?
    """

    checkpoints: Checkpoints
    best_metric: str = ""
    every: int = 1
    skipping: Callable[[], bool] = bool  # never
    steps: Sequence[int] = ()
    _step: int = field(default=0, init=False)  # the last one that was to be saved
    measures = False

    def due(self, after: AfterStep) -> bool:
        wanted = super().due(after) or self.best_metric in after.measured or after.step in self.steps
        return wanted and (after.step == after.last or not self.skipping())

    def start(self, run: TrainingRun) -> None:
        self._run, self._place = run, place(run.workdir)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        run = self._run
        return run_folder.facts(run.setup.config, run.tokenizer.vocab_size, run.train, run.cost.training)

    def __call__(self, after: AfterStep) -> None:
        """Starts a save, unless the step is saved already. The data position is the step itself."""
        self._step = after.step
        self._check_place()
        meta = {
            "step": after.step,
            "samples_seen": after.step * self._run.setup.config.data.batch_size,
            "trained_seconds": self._run.clock.trained,
            **self._facts,
            **({UNMEASURED: True} if after.unmeasured else {}),
        }
        self.checkpoints.save(after.state, meta, after.step, metrics=after.measured)

    def stop(self, after: AfterStep) -> None:
        self(after)
        logger.info("asked to stop: saved step %d of %d; the same command goes on", after.step, after.last)

    def close(self) -> None:
        try:
            self.checkpoints.close()
        except Exception:
            if self._step:  # a save that was under way fails with the folder
                self._check_place()
            raise

    def _check_place(self) -> None:
        check_place(self._run.workdir, self._place, self._step)


@dataclass(eq=False)
class SaveAtTheEnd(Hook):
    """Saves the last step before it is evaluated: whatever becomes of the evaluation, the weights are there."""

    save: Save
    every, measures = 0, False

    def __call__(self, after: AfterStep) -> None:
        self.save(after)
