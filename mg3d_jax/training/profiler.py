"""`mg3d train --profile N`: a trace of N steps of a real run, once compilation and the first steps are over."""

from __future__ import annotations

import sys
from pathlib import Path

import jax

from mg3d_jax.errors import UserError

FOLDER = "profile"
FIRST_STEPS = 3  # of this process, not traced: caches are cold


class Profiler:
    """Traces `steps` steps of every process into `workdir/profile` (one folder each where there are several).

    Args:
        steps: 0 traces nothing.
    """

    def __init__(self, workdir: Path, steps: int):
        if steps < 0:
            raise UserError(f"--profile {steps}: give the number of steps to trace, e.g. --profile 5")
        self.folder, self.steps = workdir / FOLDER, steps
        if jax.process_count() > 1:  # the trace's file names are those of the hosts, and processes may share one
            self.folder /= f"process_{jax.process_index()}"
        self._seen = 0
        self._mark: jax.profiler.StepTraceAnnotation | None = None  # while tracing

    def step(self, step: int) -> None:
        """Call at the start of every step."""
        if not self.steps:
            return
        self._seen += 1
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            if self._seen > FIRST_STEPS + self.steps:
                self._stop()
                return
        elif self._seen == FIRST_STEPS + 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a trace holds a million events, and Python's would be nearly all of them
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
        else:
            return
        self._mark = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._mark.__enter__()

    def close(self) -> None:
        """Call when the run ends, however it ends: writes the trace if it is still running."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            self._stop()
        elif self.steps and self._seen <= FIRST_STEPS:
            print(
                f"--profile: only {self._seen} step(s) were left, the first {FIRST_STEPS} are not traced",
                file=sys.stderr,
            )

    def _stop(self) -> None:
        # Steps are dispatched ahead: the last ones must be over before the trace ends.
        for device in jax.local_devices():
            (jax.device_put(0.0, device) + 1.0).block_until_ready()
        jax.profiler.stop_trace()
        print(
            f"trace of up to {self.steps} steps: {self.folder}. Open it with `pip install xprof` and "
            f"`xprof --logdir {self.folder}` (or TensorBoard with that plugin), or load the perfetto_trace.json.gz in it "
            "at https://ui.perfetto.dev",
            file=sys.stderr,
        )
