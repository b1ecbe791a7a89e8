"""The training loop: data, step, metrics, held-out loss, checkpoints. There is only one; objectives and evaluations plug in."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from mg3d_jax import __version__, config_check, sharding
from mg3d_jax import config as config_lib
from mg3d_jax.data.pipeline import PreparedData, evaluation_batches, train_batches
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.progress import Progress
from mg3d_jax.scaling import flops
from mg3d_jax.training import distributed, tables
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.checkpoints import Checkpoints, check_same_run
from mg3d_jax.training.clock import Clock
from mg3d_jax.training.schedule import total_steps
from mg3d_jax.training.warm_start import load_pretrained
from mg3d_jax.training.writers import MetricWriter

DONE, PREEMPTED = 0, 75  # 75 is EX_TEMPFAIL: launchers understand it as "run me again"
SUMMARY_FILE, CONFIG_FILE, TOKENIZER_FOLDER = "summary.json", "config.json", "tokenizer"
TOKENIZER_RECORDS = 2000


class Trainer:
    """One run: everything is built and checked in `__init__`, `run` trains to the end.

    Args:
        config: validated here.
        workdir: where checkpoints, metrics, tokenizer and summary go; an earlier run there is resumed.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        config_check.validate(config)
        self.config, self.workdir, self.writes = config, workdir, jax.process_index() == 0
        workdir.mkdir(parents=True, exist_ok=True)
        self.mesh = sharding.make_mesh(config.mesh)
        self.data = PreparedData(
            config.data.train, max_patients=config.data.max_patients, volume_size=config.model.volume_size
        )
        self.tokenizer = run_tokenizer(config, workdir)
        self.steps = total_steps(config.training, config.data.batch_size, len(self.data))
        self.setup = state_lib.build(config, self.tokenizer.vocab_size, self.mesh, self.steps)
        self.held_out = HeldOut(self.setup, self.tokenizer) if config.data.valid else None
        self.checkpoints = Checkpoints(
            workdir, every=config.training.checkpoint_every, keep=config.training.keep_checkpoints
        )
        self.state, self.first, self.clock = self._start()
        # Counted from the config: XLA's own figure takes the body of a scan over layers once, whatever its length.
        self.flops = flops.count(config, self.tokenizer.vocab_size).training_flops * config.data.batch_size
        self.last_valid: dict[str, float] = {}
        self.identity = {"config_hash": config_lib.config_hash(config), "code_version": __version__}
        self.facts = self.identity | {  # the part of a checkpoint's JSON that is the same at every step
            "config": config_lib.to_json(config),
            "vocab_size": self.tokenizer.vocab_size,
            "spacing": self.data.spacing,  # mm, None if it differs between volumes; exports say it to their users
            "source": self.data.readers[0].manifest["source"],
        }

    def _start(self) -> tuple[state_lib.State, int, Clock]:
        """State, step and clock of the newest checkpoint, or of a new run."""
        step = self.checkpoints.latest()
        if step is None:
            fresh = load_pretrained(self.setup, state_lib.initialize(self.setup), self.tokenizer)
            return fresh, 0, Clock()
        check_same_run(self.checkpoints.meta(step), self.config)
        state, meta = self.checkpoints.restore(self.setup, step)
        print(f"{self.workdir}: resuming after step {step} of {self.steps}", file=sys.stderr)
        return state, step, Clock(meta["trained_seconds"])

    def run(self) -> int:
        """Trains to the end. Returns `DONE`, or `PREEMPTED` after SIGTERM, when everything is saved."""
        if self.first >= self.steps:
            return self._finish_again()
        if self.writes:
            (self.workdir / CONFIG_FILE).write_text(config_lib.to_json(self.config))
        self.writer = MetricWriter(self.workdir, resume_step=self.first) if self.writes else None
        batches = train_batches(self.data, self.tokenizer, self.config, self.mesh, start=self.first, stop=self.steps)
        stop = StopRequest(self.checkpoints)
        try:
            finished = self._train(batches, stop)
        finally:
            batches.close()
            self.checkpoints.close()
            if self.writer:
                self.writer.close()
            stop.restore_handler()
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
        if not (self.workdir / SUMMARY_FILE).exists():
            self.writer = MetricWriter(self.workdir, resume_step=self.first - 1) if self.writes else None
            if self.held_out:
                self._validate(self.steps)  # all processes take part
            if self.writer:
                self.writer.close()
                self._write_summary()
        return DONE

    def _train(self, batches: Iterator[dict], stop: StopRequest) -> bool:
        """Steps until the end (True) or until asked to stop (False)."""
        compiled, in_flight, note = None, deque(), ""
        limit = max_in_flight()
        with Progress("train", self.steps, unit="steps", initial=self.first) as progress:
            for step in range(self.first + 1, self.steps + 1):
                with self.clock.waiting():
                    batch = next(batches)
                if compiled is None:
                    compiled = self._compile(batch)
                self.state, metrics = compiled(self.state, batch)
                self.clock.count(self.config.data.batch_size)
                in_flight.append(metrics["loss"])
                if len(in_flight) > limit:
                    jax.block_until_ready(in_flight.popleft())
                if self._due(step, self.config.training.log_every):
                    note = self._log(step, metrics)
                if self.held_out and self._due(step, self.config.training.validate_every):
                    self._validate(step)
                self.checkpoints.save(self.state, self._meta(step), step, force=step == self.steps)
                progress.advance(note=note)
                if step < self.steps and stop.asked(step):
                    self.checkpoints.save(self.state, self._meta(step), step, force=True)
                    print(
                        f"asked to stop: saved step {step} of {self.steps}; the same command goes on", file=sys.stderr
                    )
                    return False
        return True

    def _due(self, step: int, every: int) -> bool:
        return step == self.steps or (every > 0 and step % every == 0)

    def _compile(self, batch: dict) -> jax.stages.Compiled:
        compiled = step_lib.train_step(self.setup, self.tokenizer.special).compile(self.setup.abstract, batch)
        if self.writes:
            records = f"{len(self.data):,} of {self.data.patients:,} patients"
            tables.start_table(self.setup, compiled, data={"records": records}, flops=self.flops)
        distributed.barrier("compiled")
        return compiled

    def _log(self, step: int, metrics: dict) -> str:
        """Writes the metrics of this step; returns the note beside the progress bar."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss is {values['loss']} at step {step}: lower optimizer.learning_rate, or look for a bad volume; "
                f"checkpoints up to the last finite one are in {self.workdir}"
            )
        values |= self.clock.rates() | {"samples_seen": step * self.config.data.batch_size}
        if self.writer:
            self.writer.write(step, "train", values)
        return f"loss {values['loss']:.4f}, {values['samples_per_second']:.1f} samples/s"

    def _validate(self, step: int) -> None:
        self.last_valid = self.held_out.loss(self.state["params"])
        if self.writer:
            self.writer.write(step, "valid", self.last_valid)

    def _meta(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays. The data position is the step itself."""
        return {
            "step": step,
            "samples_seen": step * self.config.data.batch_size,
            "trained_seconds": self.clock.trained,
        } | self.facts

    def _write_summary(self) -> None:
        """`summary.json`: what sweeps and reports read when the run is done. Written whole or not at all."""
        summary = {
            "state": "done",
            "step": self.steps,
            "samples_seen": self.steps * self.config.data.batch_size,
            "unique_patients": self.data.patients,
            "unique_records": len(self.data),
            "final": {f"valid/{name}": value for name, value in self.last_valid.items()},
            "parameters": tables.tower_parameters(self.setup.abstract["params"]),
            "flops_per_step": self.flops,
            "trained_seconds": self.clock.trained,
        } | self.identity
        temporary = self.workdir / f"{SUMMARY_FILE}.partial"
        temporary.write_text(json.dumps(summary, indent=1))
        os.replace(temporary, self.workdir / SUMMARY_FILE)


class HeldOut:
    """The loss on `data.valid`: every record once, the same views of the reports every time, no augmentation."""

    def __init__(self, setup: state_lib.Setup, tokenizer: ReportTokenizer):
        config = setup.config
        self.setup, self.tokenizer = setup, tokenizer
        self.data = PreparedData(config.data.valid, volume_size=config.model.volume_size)
        self.step = step_lib.evaluation_step(setup, tokenizer.special)

    def loss(self, params: Any) -> dict[str, float]:
        """Mean of every metric over the batches, weighted by their number of records."""
        size, key = self.setup.config.data.batch_size, jax.random.key(0)
        rows, weights = [], []
        for number, batch in enumerate(evaluation_batches(self.data, self.tokenizer, self.setup.mesh, size)):
            rows.append(jax.device_get(self.step(params, batch, jax.random.fold_in(key, number))))
            weights.append(min(size, len(self.data) - number * size))
        return {name: float(np.average([row[name] for row in rows], weights=weights)) for name in rows[0]}


class StopRequest:
    """SIGTERM -> finish the step, save, exit with `PREEMPTED`.

    With several processes JAX's preemption service makes them agree on the step, whichever of them got the signal.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints, self._requested, self._old = checkpoints, False, None
        if jax.process_count() == 1:
            self._old = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def asked(self, step: int) -> bool:
        return self._requested or (jax.process_count() > 1 and self._checkpoints.reached_preemption(step))

    def restore_handler(self) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)


def max_in_flight() -> int:
    """Steps dispatched but not awaited. CPU devices deadlock in collectives when steps pile up; accelerators overlap."""
    return 0 if jax.default_backend() == "cpu" else 2


def run_tokenizer(config: ConfigDict, workdir: Path) -> ReportTokenizer:
    """The tokenizer that the run keeps, made on its first start.

    A trained one reads the first 2,000 records of the whole training set, not of the `max_patients` subset: the runs of a
    sweep over data size share their vocabulary.
    """
    folder = workdir / TOKENIZER_FOLDER
    if jax.process_index() == 0 and not (folder / "tokenizer.json").exists():
        # Made elsewhere and renamed: a kill in the middle leaves no half a tokenizer.
        partial = workdir / f"{TOKENIZER_FOLDER}.partial"
        save_tokenizer(_make_tokenizer(config), partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    distributed.barrier("tokenizer")  # the others read what process 0 wrote
    return ReportTokenizer(load_tokenizer(str(folder)), config.data.max_tokens, config.data.max_sentences)


def _make_tokenizer(config: ConfigDict) -> Tokenizer:
    if config.data.tokenizer != "train":
        return load_tokenizer(config.data.tokenizer)
    records = itertools.islice(PreparedData(config.data.train).records(), TOKENIZER_RECORDS)
    return train_wordpiece({s for record in records for s in record.sentences}, config.data.vocab_size)
