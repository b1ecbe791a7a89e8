"""Processes that start at once: one imports everything and is forked for each start, before JAX has touched a device.

To import the package takes three seconds, which a real process of a test's own would spend first.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from support import TESTS, environment

ZYGOTE = """
import json, os, signal, sys, warnings
import mg3d_jax.commands.evaluate, mg3d_jax.commands.train, mg3d_jax.trainer
from mg3d_jax.commands.main import main

warnings.filterwarnings("ignore", message=".*os.fork")  # no device has been touched yet
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        continue
    arguments, log, flags, stdout = request
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, stdout or log), (2, log)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started us may have had them ignored, as nohup and "&" do
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ["XLA_FLAGS"] = flags
        code = 1
        try:
            sys.exit(main(arguments))
        except SystemExit as end:
            code = end.code
        finally:
            import atexit
            atexit._run_exitfuncs()  # of jax.distributed, and what stands in for it after a failure
            sys.stderr.flush()
            os._exit(code)
    print(process, flush=True)
"""


class Zygote:
    """Starts runs. `start` -> process id; `wait` -> exit code, negative for a signal."""

    def __init__(self) -> None:
        env = environment(1, **TESTS, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
        env["MALLOC_ARENA_MAX"] = "2"  # else malloc's own pools for the threads that come and go hide what grows
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", ZYGOTE], env=env, text=True, **pipes)
        self.running: list[int] = []

    def _ask(self, request: object) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(
        self, arguments: list[str], log: Path, devices: int = 1, *, beside: bool = False, stdout: Path | None = None
    ) -> int:
        """`beside`: another one may be running. `stdout`: where else than in `log` it goes."""
        while self.running and not beside:  # left by a test that failed
            self.kill(self.running[-1])
        self.running.append(self._ask([arguments, str(log), environment(devices)["XLA_FLAGS"], str(stdout or "")]))
        return self.running[-1]

    def wait(self, process: int | None = None) -> int:
        """Of the last one that was started, or of `process`."""
        process = self.running[-1] if process is None else process
        self.running.remove(process)
        return self._ask(process)

    def wait_for(self, process: int, seconds: float) -> int:
        """As `wait`, but after so many seconds it is killed, and the code is that of a SIGKILL."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and state_of(process) != "Z":
            time.sleep(0.02)
        return self.kill(process) if state_of(process) != "Z" else self.wait(process)

    def kill(self, process: int) -> int:
        send(process, signal.SIGKILL)
        return self.wait(process)

    def run(self, arguments: list[str], log: Path, devices: int = 1) -> int:
        self.start(arguments, log, devices)
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def state_of(process: int) -> str:
    """As `/proc` says it: "R" for running, "Z" for one that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


class Forked:
    """A process of a `Zygote` with what `subprocess.Popen` has."""

    def __init__(self, zygote: Zygote, arguments: list[str], log: Path, devices: int = 1):
        self.zygote, self.code = zygote, None
        self.pid = zygote.start(arguments, log, devices, beside=True)

    def poll(self) -> int | None:
        if self.code is None and state_of(self.pid) == "Z":
            self.code = self.zygote.wait(self.pid)
        return self.code

    def wait(self, seconds: float) -> int:
        if self.code is None:
            self.code = self.zygote.wait_for(self.pid, seconds)
        return self.code

    def send_signal(self, number: int) -> None:
        send(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.code = self.zygote.kill(self.pid)


@functools.cache
def of_session() -> Zygote:
    """One for all tests of this process. It ends when its standard input does, with this process."""
    return Zygote()


def mg3d(*args: str, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`mg3d ARGS` in a process of its own that has `TESTS` on its path."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = of_session().start(list(args), stderr, devices, beside=True, stdout=stdout)
        code = of_session().wait_for(process, timeout)
        return subprocess.CompletedProcess(args, code, stdout.read_text(), stderr.read_text())
