"""One trainer at a time in a run's folder, the folder that it started in, and processes that run the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, environment, free_port, tiny_builder, tiny_config, with_plain_towers

from mg3d_jax import arithmetic, locks
from mg3d_jax import config as config_lib
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.progress import Progress
from mg3d_jax.training import distributed
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.hooks import AfterStep, Hook
from mg3d_jax.training.loop import Trainer
from mg3d_jax.training.ownership import LOCK_FILE, Ownership
from mg3d_jax.training.stopping import PREEMPTED, SIGNALS, StopRequest

HOLD = """
import sys, time
from pathlib import Path
from mg3d_jax import locks
lock = locks.HeldLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


class At(Hook):
    """Does something after a step."""

    def __init__(self, step: int, do: Any):
        self.step, self.do = step, do

    def __call__(self, after: AfterStep) -> None:
        if after.step == self.step:
            self.do()


def trainer(data: dict[str, str], workdir: Path, *hooks: Hook, **options: Any) -> Trainer:
    config = with_plain_towers(tiny_builder(data["train"], **options))
    return Trainer(config_lib.typed(config), workdir, hooks=hooks)


def test_a_folder_that_another_process_trains_in_is_refused_until_that_one_ends(
    tiny_data: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(
            UserError, match=rf"being trained already, by process {other.pid} on {socket.gethostname()}"
        ):
            trainer(tiny_data, tmp_path)
        assert not (tmp_path / "tokenizer").exists()  # nothing was written
        other.kill()
    assert trainer(tiny_data, tmp_path, training__steps=1).run() == 0
    assert locks.holder(tmp_path / LOCK_FILE) is None  # given back: another process may go on
    assert trainer(tiny_data, tmp_path, training__steps=1).run() == 0  # and this one


def test_who_shared_the_folder_takes_it_again_when_the_other_has_given_it_back(tmp_path: Path) -> None:
    first, second = Ownership(tmp_path), Ownership(tmp_path)
    first.take()
    second.take()
    first.give_back()
    assert locks.holder(tmp_path / LOCK_FILE) is None
    second.take()
    owner = locks.holder(tmp_path / LOCK_FILE)
    assert owner is not None and owner["pid"] == os.getpid()
    second.give_back()


@pytest.mark.parametrize("change", ["moved", "deleted", "replaced"])
def test_a_folder_that_goes_away_in_mid_run_ends_it(tiny_data: dict[str, str], tmp_path: Path, change: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"

    def do() -> None:
        while not (run / "checkpoints" / "2").exists():  # being written
            time.sleep(0.01)
        shutil.rmtree(run) if change == "deleted" else run.rename(elsewhere)
        if change == "replaced":
            shutil.copytree(elsewhere, run)

    with pytest.raises(UserError, match=r"moved or deleted it. Step 4 is not saved"):
        trainer(tiny_data, run, At(3, do)).run()
    assert not (run / "checkpoints" / "4").exists()
    if change == "moved":
        elsewhere.rename(run)
        assert trainer(tiny_data, run).resume_step == 2


@pytest.fixture
def heeded() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal: whoever started the tests may ignore them (`nohup`, a job in the background)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_that_asks_saves_the_step(
    tiny_data: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    run = trainer(tiny_data, tmp_path, At(3, lambda: os.kill(os.getpid(), number)))
    assert run.run() == PREEMPTED and Checkpoints(tmp_path).latest() == 3
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("heeded")
def test_signals_that_are_ignored_stay_so_and_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.restore_handler()
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_no_signals_are_asked_for(tmp_path: Path) -> None:
    found: list[Any] = []

    def make() -> None:
        found.append(StopRequest()._old)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert found == [{}]


def test_progress_into_a_pipe_that_nobody_reads_asks_to_stop() -> None:
    """In a process of its own: its stderr is closed at the other end."""
    code = """
import signal, sys
from mg3d_jax.progress import Progress
heard = []
signal.signal(signal.SIGHUP, lambda *_: heard.append(1))
sys.stdin.read()
with Progress("train", 2, interactive=False) as progress:
    progress.advance(2)
    print("more", file=sys.stderr, flush=True)
sys.exit(40 + len(heard))
"""
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, env=environment()) as process:
        assert process.stderr is not None and process.stdin is not None
        process.stderr.close()
        process.stdin.close()
        assert process.wait(60) == 41
    assert isinstance(Progress("x", 1), Progress)


def _said(monkeypatch: pytest.MonkeyPatch, others: list[Any]) -> None:
    """As if there were other processes, which say `others`."""
    monkeypatch.setattr(distributed, "gather_texts", lambda name, text: [text, *map(json.dumps, others)])


def test_what_one_process_cannot_do_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.together("start", lambda: 3) == 3
    _said(monkeypatch, [["b", "data.train: no such folder"]])
    with pytest.raises(UserError, match=r"process 1 of 2 on b cannot go on: data\.train: no such folder"):
        distributed.together("start", lambda: 3)

    def fail() -> None:
        raise UserError("mine")

    with pytest.raises(UserError, match=r"^mine$"):
        distributed.together("start", fail)


def test_processes_that_run_something_else_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    same = {"optimizer.learning_rate": "0.001", "the tokenizer": "ab"}
    _said(monkeypatch, [["b", same], ["c", same | {"optimizer.learning_rate": "0.1", "the tokenizer": "cd"}]])
    with pytest.raises(
        UserError, match=r"process 2 on c has optimizer\.learning_rate = 0\.1, process 0 on .* \(and 1 more\)"
    ):
        distributed.check_agreement("same", same)
    _said(monkeypatch, [["b", same]])
    distributed.check_agreement("same", same)


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from support import tiny_builder, with_plain_towers

def get_config(arg=""):
    return with_plain_towers(tiny_builder({train!r}))
"""


@pytest.mark.processes
def test_two_real_processes_with_other_settings_end_with_one_line(tiny_data: dict[str, str], tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(tests=str(ROOT / "tests"), train=tiny_data["train"]))
    command = [sys.executable, "-m", "mg3d_jax", "train", "--config", str(config), "--workdir", str(tmp_path / "run")]
    command += ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2"]
    processes = [
        subprocess.Popen(
            [*command, "--process-id", str(number), f"--config.optimizer.learning_rate={rate}"],
            env=environment(), stderr=subprocess.PIPE, text=True,
        )
        for number, rate in enumerate((0.001, 0.5))
    ]  # fmt: skip
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 2 and "Traceback" not in said
        assert "process 1 on" in said and "has optimizer.learning_rate = 0.5, process 0 on" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer__learning_rate", -1e-3),
        ("optimizer__learning_rate", float("nan")),
        ("optimizer__b1", 1.0),
        ("optimizer__b2", -0.1),
        ("optimizer__weight_decay", -1.0),
        ("optimizer__clip_norm", -1.0),
        ("optimizer__learning_rate_multipliers", ((".*", -2.0),)),
        ("schedule__final_fraction", 1.5),
        ("model__volume_encoder__dropout", 1.0),
        ("model__report_encoder__dropout", -0.5),
        ("data__augment__noise", -3.0),
        ("data__augment__shift", -1),
        ("data__batch_size", 1),
    ],
)
def test_numbers_that_mean_nothing_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key.replace("__", r"\.")):
        checks.validate(tiny_config(**{key: value}))


def test_settings_that_change_the_arithmetic_are_left_out_or_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import jax

    monkeypatch.setattr(arithmetic.logger.parent, "propagate", True)
    environ = {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_PRNG_IMPL": "threefry2x32", "HOME": "x"}
    arithmetic.ignore(environ)
    assert environ == {"HOME": "x"} and "JAX_ENABLE_X64=1" in caplog.text and "PRNG" not in caplog.text
    arithmetic.check()
    with jax.enable_x64(True), pytest.raises(UserError, match="unset JAX_ENABLE_X64"):
        arithmetic.check()
