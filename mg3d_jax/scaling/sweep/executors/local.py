"""Trains runs on this machine, several at once where there are devices for them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from mg3d_jax import locks
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.sweep.executors.base import Executor, Job, Start, open_log

DEVICES = "CUDA_VISIBLE_DEVICES"


class Process(Job):
    """A process of this machine. It is told to save when this one dies, however that dies (Linux, with util-linux)."""

    def __init__(self, process: subprocess.Popen[bytes], *, group: bool = False):
        self.process, self._group = process, group
        self.label = f"process {process.pid}"

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self, *, now: bool = False) -> None:
        number = signal.SIGKILL if now else signal.SIGTERM
        if self.process.poll() is None and not self._group:
            self.process.send_signal(number)
        elif self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Local(Executor):
    """One process per run. Several at once share the GPUs of `CUDA_VISIBLE_DEVICES` evenly."""

    name = "local"
    elsewhere: ClassVar[bool] = False
    look_seconds = 5.0
    python = sys.executable

    def prepare(self, workdir: Path) -> None:
        listed = [name for name in os.environ.get(DEVICES, "").split(",") if name]
        if self.at_once > 1 and len(listed) % self.at_once:
            raise UserError(
                f"{DEVICES}={','.join(listed)}: {self.at_once} runs at once cannot share {len(listed)} GPUs evenly; change "
                f"--at-once or {DEVICES}"
            )
        share = len(listed) // self.at_once
        self._devices = [",".join(listed[slot * share :][:share]) for slot in range(self.at_once)] if share else []

    def start(self, start: Start) -> Job:
        assert start.lock is not None
        environment = os.environ | {locks.DESCRIPTOR_VARIABLE: str(start.lock.descriptor)} | self.share(start.slot)
        with open_log(start, " ".join(start.command)) as output:
            return Process(
                subprocess.Popen(
                    [*told_when_we_die(), *start.command],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches us only; we pass it on as a request to save
                    pass_fds=(start.lock.descriptor,),
                    env=environment,
                )
            )

    def share(self, slot: int) -> dict[str, str]:
        """Environment of the run in that place."""
        return {DEVICES: self._devices[slot]} if self._devices else {}


def told_when_we_die() -> list[str]:
    """Beginning of a command line whose process gets SIGTERM when this one dies, however it dies; empty where it cannot."""
    return ["setpriv", "--pdeathsig", "TERM"] if sys.platform == "linux" and shutil.which("setpriv") else []
