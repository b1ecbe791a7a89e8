"""Waiting for batches: lost workers, hanging disks and requests to stop are noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny_builder, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax.data import feed
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.hooks import AfterStep, Hook
from mg3d_jax.training.loop import Trainer
from mg3d_jax.training.stopping import DONE, PREEMPTED
from mg3d_jax.training.writers import read_metrics


def _blocked(gate: threading.Event) -> Any:
    yield 0
    gate.wait()
    yield 1


def test_elements_come_in_order_and_errors_come_through() -> None:
    def source() -> Any:
        yield from range(3)
        raise ValueError("x")

    batches = feed.watched(source(), 0)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="x"):
        next(batches)
    assert list(feed.watched((n for n in range(5)), 0)) == list(range(5)) and not feed.hangs()


def test_what_does_not_come_ends_the_wait_and_so_does_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.01)
    gate = threading.Event()
    batches = feed.watched(_blocked(gate), 0.05)
    assert next(batches) == 0
    with pytest.raises(feed.NoDataError, match=r"no batch came .*data\.stall_minutes"):
        next(batches)
    assert feed.hangs()
    waiting = feed.watched(_blocked(gate), 0)
    assert next(waiting) == 0
    with feed.heeding(lambda: True), pytest.raises(feed.StopAskedError):
        next(waiting)
    with feed.heeding(lambda: True), feed.unheeded():
        feed.look_up()
    gate.set()
    _until(lambda: not feed.hangs())


def _until(condition: Any) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_workers_that_are_stopped_or_dead_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worker:
        def __init__(self, pid: int, code: int | None):
            self.pid, self.exitcode = pid, code

    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child = sleeper.pid
    found: list[Worker] = [Worker(child, None)]
    monkeypatch.setattr(feed.multiprocessing, "active_children", lambda: found)
    monkeypatch.setattr(feed, "STOPPED_SECONDS", 0.0)
    sleeper.send_signal(signal.SIGSTOP)
    try:
        _until(lambda: feed._is_stopped(child))
        with pytest.raises(feed.LostWorkerError, match=rf"data worker {child} is stopped"):
            feed._Workers().look()
    finally:
        sleeper.kill()
        sleeper.wait()
    found[:] = [Worker(1234567, -9)]
    with pytest.raises(feed.LostWorkerError, match=r"1234567 was killed \(signal 9"):
        feed._Workers().look()
    found[:] = [Worker(1234567, 0)]
    feed._Workers().look()


class Measures(Hook):
    """A slow evaluation that looks up, as those that read batches do. `times`: what each step measured."""

    every = 2

    def __init__(self, interrupted_at: int):
        self.interrupted_at, self.times = interrupted_at, list[int]()

    def __call__(self, after: AfterStep) -> dict[str, float]:
        if after.step == self.interrupted_at:
            os.kill(os.getpid(), signal.SIGTERM)
        feed.look_up()
        self.times.append(after.step)
        return {"evaluation/it": float(after.step)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(feed, "LOOK_SECONDS", 0.05)
    yield


def _trainer(data: dict[str, str], workdir: Path, *hooks: Hook, **options: Any) -> Trainer:
    config = with_plain_towers(tiny_builder(data["train"], data["valid"], training__validate_every=2, **options))
    return Trainer(config_lib.typed(config), workdir, hooks=hooks)


def test_a_request_during_an_evaluation_is_heeded_and_it_is_measured_again(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    first, second = Measures(4), Measures(0)
    assert _trainer(tiny_data, tmp_path, first).run() == PREEMPTED
    assert first.times == [2] and Checkpoints(tmp_path).latest() == 4
    assert _trainer(tiny_data, tmp_path, second).run() == DONE and second.times == [4, 6]
    for split in ("evaluation", "valid"):
        assert [line["step"] for line in read_metrics(tmp_path, split)] == [2, 4, 6]


def test_a_disk_that_hangs_ends_a_run_with_what_it_had(
    tiny_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, reads, read = threading.Event(), [0], PreparedData.read_unless_bad

    def slow(self: PreparedData, *arguments: Any) -> Any:
        reads[0] += 1
        if reads[0] > 40:  # of five batches
            gate.wait()
        return read(self, *arguments)

    monkeypatch.setattr(PreparedData, "read_unless_bad", slow)
    try:
        trainer = _trainer(tiny_data, tmp_path, data__read_threads=1, data__stall_minutes=0.5 / 60, training__steps=9)
        assert trainer.run() == PREEMPTED
    finally:
        gate.set()
    steps = [line["step"] for line in read_metrics(tmp_path, "train")]
    assert steps and Checkpoints(tmp_path).latest() == steps[-1]
    _until(lambda: not feed.hangs())
