"""`mg3d train --profile N`: a trace of N steps of a real run, once compilation and the first steps are over."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import jax

from mg3d_jax.errors import UserError
from mg3d_jax.training.hooks import AfterStep, Hook

logger = logging.getLogger(__name__)
FOLDER = "profile"
FIRST_STEPS = 3  # of this process, not traced: caches are cold


@dataclass(eq=False)
class Profiler(Hook):
    """Traces `steps` steps of every process into `workdir/profile` (one folder each where there are several).

    Attributes:
        workdir: the run.
        steps: 0 traces nothing.
    """

    workdir: Path
    steps: int
    _seen: int = field(default=0, init=False)  # steps of this process
    _mark: jax.profiler.StepTraceAnnotation | None = field(default=None, init=False)  # while tracing
    measures = waits = False

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UserError(f"--profile {self.steps}: give the number of steps to trace, e.g. --profile 5")

    @property
    def folder(self) -> Path:
        """Where this process writes."""
        folder = self.workdir / FOLDER
        # The trace's file names are those of the hosts, and processes may share one.
        return folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else folder

    def __call__(self, after: AfterStep) -> None:
        """Marks the step that comes next, if it is one to trace."""
        self._seen += 1
        in_window = FIRST_STEPS <= self._seen <= FIRST_STEPS + self.steps
        if not self.steps or not in_window or after.step == after.last:
            return
        self._end_step()
        if self._seen == FIRST_STEPS + self.steps:
            self._stop()
            return
        if self._seen == FIRST_STEPS:
            self._start()
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=after.step + 1)
        self._mark.__enter__()

    def close(self) -> None:
        """Writes the trace if it is still running."""
        if self._mark is not None:
            self._end_step()
            self._stop()
        elif self.steps and 0 < self._seen <= FIRST_STEPS:
            logger.info("--profile: only %d step(s) were left, the first %d are not traced", self._seen, FIRST_STEPS)

    def _end_step(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a trace holds a million events, and Python's would be nearly all of them
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)

    def _stop(self) -> None:
        # Steps are dispatched ahead: the last ones must be over before the trace ends.
        for device in jax.local_devices():
            (jax.device_put(0.0, device) + 1.0).block_until_ready()
        jax.profiler.stop_trace()
        logger.info(
            f"trace of up to {self.steps} steps: {self.folder}. Open it with `pip install xprof` and "
            f"`xprof --logdir {self.folder}` (or TensorBoard with that plugin), or load the perfetto_trace.json.gz in it "
            "at https://ui.perfetto.dev"
        )
