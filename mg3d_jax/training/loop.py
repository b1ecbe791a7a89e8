"""The training loop, behind `mg3d train`: fetch a batch, run the compiled step (`training.step`), call the hooks.

Whatever is logged, measured or saved beside the steps is a hook (`training.hooks`); `training.wiring` lists the standard
ones in the order of their calls.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import jax

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import Config, checks
from mg3d_jax.data import feed
from mg3d_jax.data.pipeline import PreparedData, train_batches
from mg3d_jax.flops import Flops
from mg3d_jax.objectives.base import check_data, enabled, reads_masks
from mg3d_jax.training import distributed, memory, run_folder, tables, wiring
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.checkpoints import Checkpoints, check_writable
from mg3d_jax.training.clock import Clock
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.hooks import UNMEASURED, AfterStep, Hook, TrainingRun
from mg3d_jax.training.ownership import Ownership
from mg3d_jax.training.report_texts import report_texts
from mg3d_jax.training.schedule import total_steps
from mg3d_jax.training.stopping import DONE, PREEMPTED, StopRequest
from mg3d_jax.training.writers import Writers, drop_evaluations, open_writers

logger = logging.getLogger(__name__)


class Trainer:
    """One run: `__init__` checks the configuration, opens the data and restores or makes the state; `run` trains.

    Args:
        config: checked here; a `UserError` lists what is impossible.
        workdir: where checkpoints, metrics, tokenizer and summary go; an earlier run there is resumed.
        hooks: called in addition to the standard ones (`training.wiring`): evaluations, pictures, your own.
        initialize: makes what a new run begins with; the default knows nothing of the weights that `init_from` and
            `model.*_encoder.pretrained` name.
        profile_steps: how many steps the profiler traces; 0: none.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        *,
        hooks: Sequence[Hook] = (),
        initialize: state_lib.Initializer = state_lib.random_start,
        profile_steps: int = 0,
    ):
        checks.validate(config)
        self.config = config
        self.workdir = workdir
        self.ownership = Ownership(workdir)
        mesh = sharding.make_mesh(config.mesh)
        self.data, self.valid = distributed.together("start", self._open)
        self.tokenizer = run_folder.read_tokenizer(config.data, workdir)
        run_folder.check_processes_agree(config, self.data, self.valid, self.tokenizer)
        self.steps = total_steps(config.training, config.data.batch_size, len(self.data))
        self.setup = state_lib.build(config, self.tokenizer.vocab_size, mesh, self.steps, records=len(self.data))
        sharding.check_replication(self.setup.abstract["params"], config.mesh.max_replicated)
        self.checkpoints = Checkpoints(
            workdir,
            keep=config.training.keep_checkpoints,
            always=config.training.keep_steps,
            best_metric=config.training.best_metric,
            best_mode=config.training.best_mode,
        )
        start = self.checkpoints.newest(self.setup) or initialize(self.setup, self.tokenizer)
        self.state, meta, self.resume_step = start
        run_folder.check_same_records(meta, self.data)
        if self.resume_step:
            logger.info("%s: resuming after step %d of %d", workdir, self.resume_step, self.steps)
        self._unmeasured = bool(meta.get(UNMEASURED))
        self._needs: memory.StepMemory | None = None  # until it is compiled
        self.more_text = report_texts(
            self.setup, self.state["params"], self.tokenizer, [one for one in (self.data, self.valid) if one], workdir
        )
        self.cost = StepCost(self.setup, counted=Flops(**meta["flops"]) if "flops" in meta else None)
        self.clock = Clock(meta.get("trained_seconds", 0.0))
        self.hooks = wiring.standard_hooks(
            config.training,
            workdir,
            self.checkpoints,
            given=hooks,
            profile_steps=profile_steps,
            validates=self.valid is not None,
        )

    def _open(self) -> tuple[PreparedData, PreparedData | None]:
        """Takes the folder, opens the data, writes the tokenizer: what can be wrong on one host and right on the others."""
        check_writable(self.workdir)
        self.ownership.take()
        data, size = self.config.data, self.config.grid
        on = enabled(self.config.objectives, self.config.tasks)
        masks = reads_masks(on)
        train = PreparedData(data.train, **data.subset(), volume_size=size, masks=masks)
        valid = PreparedData(data.valid, volume_size=size, masks=masks) if data.valid else None
        for one in filter(None, (train, valid)):
            check_data(on, one)
        run_folder.make_tokenizer(data, self.workdir)
        return train, valid

    def run(self) -> int:
        """Trains to the end. Returns the exit code: `DONE`, or `PREEMPTED` ("run me again") where a signal ended it before.

        The state is saved in both cases.
        """
        self.ownership.take()
        try:
            return self._run()
        finally:
            self.ownership.give_back()

    def _run(self) -> int:
        if self.resume_step >= self.steps:
            logger.info("%s: already done, %d of %d steps", self.workdir, self.resume_step, self.steps)
            final = self._measure_again() if run_folder.lacks_summary(self.workdir) else None
            self.checkpoints.close()
        else:
            run_folder.write_start(self.workdir, self.config)
            final = self._train()
            # Process 0 is the last to finish a checkpoint; some launchers stop it as soon as another process has exited.
            distributed.barrier("saved")
            if final is None:
                return PREEMPTED
        if final is not None:
            self._write_summary(final)
        return DONE

    def _train(self) -> dict[str, float] | None:
        """Takes the steps that are left.

        Returns:
            What the hooks measured after the last step, `{"SPLIT/NAME": value}`; None where the run was asked to stop
            before.
        """
        if self._unmeasured:
            drop_evaluations(self.workdir, self.resume_step)
        compiled, batch_size = None, self.config.data.batch_size
        tokens_per_patient = self.cost.volume_tokens + self.cost.report_tokens
        with ExitStack() as stack:  # every clean-up runs, last first, whatever one of them raises
            stop = StopRequest()
            stack.callback(stop.restore_handler)
            writers = self._open_writers(stack, resume_step=self.resume_step)
            batches = self._open_batches(stack, self.resume_step)
            self._start_hooks(stack, self.hooks, writers)
            after = AfterStep(self.resume_step, self.steps, self.state, {}, writers)
            stack.enter_context(feed.heeding(stop.now, stop.asked))
            try:
                if self._unmeasured:
                    self._call_measuring(after)
                for step in range(self.resume_step + 1, self.steps + 1):
                    with self.clock.waiting():
                        batch, batches = self._next(batches, step, stop, stack)
                    compiled = compiled or self._compile(batch)  # the first batch gives the shapes
                    with memory.explained(self.setup, self._needs):
                        self.state, metrics = compiled(self.state, batch)
                    self.clock.count(batch_size, batch_size * tokens_per_patient)
                    after = AfterStep(step, self.steps, self.state, metrics, writers)
                    self._call_hooks(after)
                    if step < self.steps and stop.asked():
                        raise feed.StopAskedError
            except (feed.StopAskedError, feed.NoDataError) as why:
                if isinstance(why, feed.NoDataError):
                    if not stop.alone:  # the others are in the next step, and cannot save
                        raise
                    logger.error("%s", why)
                for hook in self.hooks if after.metrics else ():  # else nothing has changed since the start
                    hook.stop(after)
                return None
        return after.measured

    def _next(
        self, batches: Iterator[Any], step: int, stop: StopRequest, stack: ExitStack
    ) -> tuple[dict[str, Any], Iterator[Any]]:
        """The batch of `step` and the iterator that gives the next one: another one, without workers, where one of them is
        lost. The run then stops after this step, since what has killed a worker would come again."""
        try:
            return next(batches), batches
        except feed.LostWorkerError as error:
            logger.error("process %d: %s. The run saves and stops: start it again", jax.process_index(), error)
            stop.request()
            batches = self._open_batches(stack, step - 1, workers=0)
            with feed.unheeded():
                return next(batches), batches

    def _call_hooks(self, after: AfterStep) -> None:
        """Calls the hooks that are due, in the order of their list.

        Each is asked twice whether it is due: before all of them, to know whether the host must wait for this step; and at
        its turn, since what a hook before it measured may make it due (`hooks.Save`: a value of `training.best_metric`).
        """
        after.waits = any(hook.waits and hook.due(after) for hook in self.hooks)
        for hook in self.hooks:
            if hook.due(after):
                # Held-out losses and evaluations do not lower the logged samples per second; saving does.
                after.unmeasured = hook.measures  # until it has
                with self.clock.paused() if hook.measures else nullcontext(), self._whole_measurements():
                    after.record(hook(after))
                after.unmeasured = False

    def _whole_measurements(self) -> AbstractContextManager[None]:
        """With `training.best_metric` a checkpoint has the measurements of its step: requests to stop wait for them."""
        return feed.unheeded() if self.config.training.best_metric else nullcontext()

    def _measure_again(self) -> dict[str, float]:
        """Measures the last step again, without training: for a run that was killed between its last checkpoint and its
        summary. What the killed run wrote of that step may be incomplete and is dropped first.
        """
        drop_evaluations(self.workdir, self.steps)
        with ExitStack() as stack:
            writers = self._open_writers(stack, resume_step=self.steps)
            self._start_hooks(stack, [hook for hook in self.hooks if hook.measures], writers)
            after = AfterStep(step=self.steps, last=self.steps, state=self.state, metrics={}, writers=writers)
            self._call_measuring(after)
        return after.measured

    def _call_measuring(self, after: AfterStep) -> None:
        """The measurements that are due after this step, of which a kill or a request to stop left a part."""
        for hook in self.hooks:
            if hook.measures and hook.due(after):
                after.record(hook(after))

    def _open_writers(self, stack: ExitStack, *, resume_step: int) -> Writers:
        writers = open_writers(
            self.workdir, self.config.training.writers, resume_step=resume_step, name=self.config.name,
            config=config_lib.to_dict(self.config),
        )  # fmt: skip
        stack.callback(writers.close)
        return writers

    def _open_batches(self, stack: ExitStack, start: int, **changes: Any) -> Iterator[dict[str, Any]]:
        """Of the steps after `start`; `changes` of `config.data`."""
        options = dataclasses.replace(self.config.data, **changes)
        batches = train_batches(
            self.data, self.tokenizer, options, self.setup.mesh, seed=self.config.seed, start=start,
            stop=self.steps, accumulation=self.config.optimizer.accumulation, log_folder=self.workdir,
            more_text=self.more_text,
        )  # fmt: skip
        stack.callback(batches.close)  # type: ignore[attr-defined]
        return batches

    def _start_hooks(self, stack: ExitStack, hooks: Sequence[Hook], writers: Writers) -> None:
        run = TrainingRun(
            self.workdir, self.setup, self.tokenizer, train=self.data, valid=self.valid, more_text=self.more_text,
            first=self.resume_step, clock=self.clock, cost=self.cost, writers=writers,
        )  # fmt: skip
        for hook in hooks:
            stack.callback(hook.close)
            hook.start(run)

    def _compile(self, batch: dict[str, Any]) -> jax.stages.Compiled:
        """Compiles the step ahead of time; process 0 prints the table of the run: sizes, data, FLOPs, memory."""
        with self.clock.paused(), memory.explained(self.setup):
            compiled = step_lib.train_step(self.setup, self.tokenizer.special).compile(
                self.setup.abstract, batch, look=self.cost.count_in
            )
            self._needs = memory.step_memory(compiled)
            flops = self._flops_per_step  # in all processes: where the step does not say, counting takes seconds
            if jax.process_index() == 0:
                rows = tables.data_rows(self.data, self.tokenizer, self.config.objectives["alignment"])
                tables.start_table(self.setup, compiled, data=rows, flops=flops)
            memory.check_fits(self.setup, self._needs, memory.device_limit())
            # Some processes compile much longer than others; the first collective would not wait for them that long.
            distributed.barrier("compiled")
        return compiled

    @property
    def _flops_per_step(self) -> float:
        return self.cost.training.total * self.config.data.batch_size

    def _write_summary(self, final: dict[str, float]) -> None:
        run_folder.write_summary(
            self.workdir, self.config, self.data, steps=self.steps, final=final, trained_seconds=self.clock.trained,
            parameters=tables.tower_parameters(self.setup.abstract["params"]),
            flops_per_step=self._flops_per_step,
        )  # fmt: skip
