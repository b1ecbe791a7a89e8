"""The training loop: data, step, metrics, held-out loss, checkpoints. There is only one; objectives and evaluations plug in."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax

from mg3d_jax import __version__, devices, sharding
from mg3d_jax import config as config_lib
from mg3d_jax.config import Config, checks
from mg3d_jax.data.order import RecordOrder
from mg3d_jax.data.pipeline import PreparedData, cut_shares, record_names, train_batches
from mg3d_jax.environment import environment_facts
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.online import OnlineEvaluation
from mg3d_jax.evaluation.reconstructions import Reconstructions
from mg3d_jax.files import write_json
from mg3d_jax.interop.warm_start import load_pretrained
from mg3d_jax.progress import Progress
from mg3d_jax.training import clock as clock_lib
from mg3d_jax.training import distributed, run_folder, tables
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.checkpoints import Checkpoints, check_writable
from mg3d_jax.training.clock import Clock
from mg3d_jax.training.cost import StepCost
from mg3d_jax.training.held_out import HeldOut
from mg3d_jax.training.profiler import Profiler
from mg3d_jax.training.schedule import total_steps
from mg3d_jax.training.stopping import DONE, PREEMPTED, SkippedUpdates, StopRequest
from mg3d_jax.training.watchdog import Watchdog
from mg3d_jax.training.writers import drop_evaluations, open_writers


class Trainer:
    """One run: everything is built and checked in `__init__`, `run` trains to the end.

    Args:
        config: validated here.
        workdir: where checkpoints, metrics, tokenizer and summary go; an earlier run there is resumed.
        profile_steps: traces so many steps (`Profiler`).
    """

    def __init__(self, config: Config, workdir: Path, *, profile_steps: int = 0):
        checks.validate(config)
        check_writable(workdir)
        self.config, self.workdir, self.writes = config, workdir, jax.process_index() == 0
        self.mesh = sharding.make_mesh(config.mesh)
        size = tuple(config.model.volume_size)
        self.data = PreparedData(config.data.train, max_patients=config.data.max_patients, volume_size=size)
        self.tokenizer = run_folder.run_tokenizer(config, workdir)
        self.steps = total_steps(config.training, config.data.batch_size, len(self.data))
        self.setup = state_lib.build(config, self.tokenizer.vocab_size, self.mesh, self.steps, records=len(self.data))
        sharding.check_replication(self.setup.abstract["params"], config.mesh.max_replicated)
        self._plug_in_evaluations(PreparedData(config.data.valid, volume_size=size) if config.data.valid else None)
        self.checkpoints = Checkpoints(
            workdir,
            every=config.training.checkpoint_every,
            keep=config.training.keep_checkpoints,
            best_metric=config.training.best_metric,
            best_mode=config.training.best_mode,
        )
        self.state, self.first, self.clock = self._start()
        self.cost = StepCost(self.setup)
        self.flops = self.cost.training.total * config.data.batch_size
        self.peak_flops = devices.known_peak(jax.devices()[0].device_kind, config.model.dtype)
        self.profiler = Profiler(workdir, profile_steps)
        self.skipped = SkippedUpdates(workdir, config.training.max_skipped, self._records_of, resume_step=self.first)
        # Held-out loss and evaluation, "valid/loss", "evaluation/auroc_macro", ...: the latest, and those of this step.
        self.latest: dict[str, float] = {}
        self.measured: dict[str, float] = {}
        self.identity = {"config_hash": config_lib.config_hash(config), "code_version": __version__}
        self.facts = self.identity | {  # the part of a checkpoint's JSON that is the same at every step
            "config": config_lib.to_json(config),
            "vocab_size": self.tokenizer.vocab_size,
            "records": self.data.lengths,  # of each folder: they make the order of the samples
            "spacing": self.data.spacing,  # mm, None if it differs between volumes; exports say it to their users
            "source": " + ".join(sorted({reader.manifest["source"] for reader in self.data.readers})),
        }

    def _plug_in_evaluations(self, valid: PreparedData | None) -> None:
        """What looks at the held-out data: its loss, pictures of reconstructions, zero-shot AUROC and recall."""
        special, config = self.tokenizer.special, self.config
        self.held_out = HeldOut(self.setup, self.tokenizer, valid, log_folder=self.workdir) if valid else None
        draws = valid and config.objectives["volume_reconstruction"].weight > 0
        self.pictures = Reconstructions(self.setup, special, spacing=valid.spacing) if draws else None
        evaluates = valid and config.training.evaluate_every
        self.evaluation = (
            OnlineEvaluation(self.setup, self.tokenizer, valid, log_folder=self.workdir) if evaluates else None
        )

    def _start(self) -> tuple[state_lib.State, int, Clock]:
        """State, step and clock of the newest readable checkpoint, or of a new run."""
        found = self.checkpoints.newest(self.setup)
        if found is None:
            fresh = load_pretrained(self.setup, state_lib.initialize(self.setup), self.tokenizer)
            return fresh, 0, Clock()
        state, meta, step = found
        if (lengths := meta.get("records", self.data.lengths)) != self.data.lengths:
            raise UserError(
                f"this run was started on folders of {lengths} records, those of data.train have {self.data.lengths}: their "
                "order would be another one. Use the same data, or another --workdir."
            )
        print(f"{self.workdir}: resuming after step {step} of {self.steps}", file=sys.stderr)
        return state, step, Clock(meta["trained_seconds"])

    def run(self) -> int:
        """Trains to the end. Returns `DONE`, or `PREEMPTED` after SIGTERM, when everything is saved."""
        if self.first >= self.steps:
            return self._finish_again()
        if self.writes:
            (self.workdir / run_folder.SUMMARY_FILE).unlink(missing_ok=True)  # of an end whose checkpoint is gone
            write_json(self.workdir / run_folder.CONFIG_FILE, config_lib.to_dict(self.config), allow_nan=True)
            write_json(self.workdir / run_folder.ENVIRONMENT_FILE, environment_facts())
        self.writers = open_writers(self.workdir, self.config, resume_step=self.first)
        batches = train_batches(
            self.data,
            self.tokenizer,
            self.config.data,
            self.mesh,
            seed=self.config.seed,
            start=self.first,
            stop=self.steps,
            accumulation=self.config.optimizer.accumulation,
            log_folder=self.workdir,
        )
        stop = StopRequest(self.checkpoints, self.first)
        with ExitStack() as stack:  # all of them are called, whatever one of them raises
            for close in (
                stop.restore_handler,
                self.writers.close,
                self.checkpoints.close,
                self.profiler.close,
                batches.close,
            ):
                stack.callback(close)
            finished = self._train(batches, stop)
        # Process 0 finishes a checkpoint last, and launchers may stop the others once one has left.
        distributed.barrier("saved")
        if not finished:
            return PREEMPTED
        if self.writes:
            self._write_summary()
        return DONE

    def _finish_again(self) -> int:
        """The run has all its steps: only what a kill after the last checkpoint may have left out is made up for."""
        print(f"{self.workdir}: already done, {self.first} of {self.steps} steps", file=sys.stderr)
        self.checkpoints.close()
        if not (self.workdir / run_folder.SUMMARY_FILE).exists():
            if self.writes:
                drop_evaluations(self.workdir, self.steps)
            self.writers = open_writers(self.workdir, self.config, resume_step=self.steps)
            try:
                self._look(self.steps)  # all processes take part
            finally:
                self.writers.close()
            if self.writes:
                self._write_summary()
        return DONE

    def _train(self, batches: Iterator[dict], stop: StopRequest) -> bool:
        """Steps until the end (True) or until asked to stop (False)."""
        compiled, in_flight, note = None, deque(), ""
        limit, tokens = max_in_flight(), self.cost.volume_tokens + self.cost.report_tokens
        with (
            Progress("train", self.steps, unit="steps", initial=self.first) as progress,
            Watchdog(self.workdir, self.config.training.watchdog_minutes) as watchdog,
        ):
            for step in range(self.first + 1, self.steps + 1):
                with self.clock.waiting():
                    batch = next(batches)
                if compiled is None:
                    compiled = self._compile(batch)
                with self.clock.paused():
                    self.profiler.step(step)
                self.state, metrics = compiled(self.state, batch)
                self.clock.count(self.config.data.batch_size, self.config.data.batch_size * tokens)
                in_flight.append((step, {name: metrics[name] for name in ("finite", "loss")}))
                self._await(in_flight, 0 if self._halts(step) else limit)
                if self._due(step, self.config.training.log_every):
                    note = self._log(step, metrics)
                if step == self.steps and not self.config.training.best_metric:
                    self._save(step, force=True)  # whatever becomes of the evaluation, the weights are there
                looked = self._look(step)
                self._save(step, force=looked or step == self.steps)
                progress.advance(note=note)
                watchdog.beat(step)
                if step < self.steps and stop.asked(step):
                    self._await(in_flight, 0)
                    self._save(step, force=True)
                    print(
                        f"asked to stop: saved step {step} of {self.steps}; the same command goes on", file=sys.stderr
                    )
                    return False
        return True

    def _due(self, step: int, every: int) -> bool:
        return step == self.steps or (every > 0 and step % every == 0)

    def _halts(self, step: int) -> bool:
        """Is something measured or saved after this step? The host waits there anyway; rates and skips are exact then."""
        training = self.config.training
        intervals = training.log_every, training.validate_every, training.evaluate_every, training.checkpoint_every
        return any(self._due(step, every) for every in intervals)

    def _compile(self, batch: dict) -> jax.stages.Compiled:
        with self.clock.paused():
            compiled = step_lib.train_step(self.setup, self.tokenizer.special).compile(self.setup.abstract, batch)
            if self.writes:
                shares = cut_shares(self.data, self.tokenizer, self.config.objectives["alignment"].sentence_tokens)
                data = {
                    "records": f"{len(self.data):,} of {self.data.patients:,} patients",
                    "text that is cut": tables.cut_text(self.config, *shares),
                }
                tables.start_table(self.setup, compiled, data=data, flops=self.flops)
            distributed.barrier("compiled")
        return compiled

    def _await(self, in_flight: deque[tuple[int, dict]], most: int) -> None:
        """Waits until at most so many steps are in flight, and takes note of updates that were skipped."""
        while len(in_flight) > most:
            step, metrics = in_flight.popleft()
            finite, loss = jax.device_get((metrics["finite"], metrics["loss"]))
            self.skipped.check(step, finite=bool(finite), loss=float(loss))

    def _records_of(self, step: int) -> list[str]:
        """Names of the records in the batch of a step."""
        size = self.config.data.batch_size
        order = RecordOrder(self.data.lengths, self.config.data.weights, seed=self.config.seed)
        return record_names(self.data, [order[position] for position in range((step - 1) * size, step * size)])

    def _log(self, step: int, metrics: dict) -> str:
        """Writes the metrics of this step; returns the note beside the progress bar."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        rates = self.clock.rates(self.cost.training.products, self.peak_flops, self.mesh.size)
        values |= rates | clock_lib.device_memory()
        values |= {"samples_seen": step * self.config.data.batch_size, "skipped_updates": self.skipped.total}
        self.writers.scalars(step, "train", values)
        skipped = f", {self.skipped.total} skipped" if self.skipped.total else ""
        return f"loss {values['loss']:.4f}, {values['samples_per_second']:.1f} samples/s{skipped}"

    def _look(self, step: int) -> bool:
        """Held-out loss, pictures and evaluation where they are due. True if the metric of the best checkpoint is new."""
        training, params = self.config.training, state_lib.evaluated_parameters(self.state)
        new: dict[str, float] = {}
        with self.clock.paused():
            if self.held_out and self._due(step, training.validate_every):
                new |= self._write(step, "valid", self.held_out.loss(params))
                if self.pictures:
                    for name, pixels in self.pictures(params, self.held_out.first_batch()).items():
                        self.writers.image(step, "valid", name, pixels)
            if self.evaluation and self._due(step, training.evaluate_every):
                new |= self._write(step, "evaluation", self.evaluation.metrics(params))
        self.latest |= new
        self.measured = new
        measured = any(name.startswith(training.best_metric.partition("/")[0] + "/") for name in new)
        if training.best_metric and measured and training.best_metric not in new:
            raise UserError(f"training.best_metric = {training.best_metric!r} is none of {', '.join(new)}")
        return training.best_metric in new

    def _write(self, step: int, split: str, values: dict[str, float]) -> dict[str, float]:
        self.writers.scalars(step, split, values)
        return {f"{split}/{name}": value for name, value in values.items()}

    def _save(self, step: int, *, force: bool) -> None:
        """Saves when due. The data position is the step itself."""
        meta = {
            "step": step,
            "samples_seen": step * self.config.data.batch_size,
            "trained_seconds": self.clock.trained,
        } | self.facts
        self.checkpoints.save(self.state, meta, step, force=force, metrics=self.measured)

    def _write_summary(self) -> None:
        """`summary.json`: what sweeps and reports read when the run is done."""
        summary = {
            "state": "done",
            "step": self.steps,
            "samples_seen": self.steps * self.config.data.batch_size,
            "unique_patients": self.data.patients,
            "unique_records": len(self.data),
            "final": self.latest,
            "parameters": tables.tower_parameters(self.setup.abstract["params"]),
            "flops_per_step": self.flops,
            "trained_seconds": self.clock.trained,
        } | self.identity
        write_json(self.workdir / run_folder.SUMMARY_FILE, summary, allow_nan=True)


def max_in_flight() -> int:
    """Steps dispatched but not awaited. CPU devices deadlock in collectives when steps pile up; accelerators overlap."""
    return 0 if jax.default_backend() == "cpu" else 2
