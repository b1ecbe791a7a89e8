"""The watchdog: a step that hangs is reported once, with the stacks of all threads, whatever it hangs in."""

import re
import subprocess
import sys
import threading
import time

from support import environment

from mg3d_jax.training.watchdog import Watchdog

SECONDS = 1 / 60  # the watchdog counts in minutes


def hangs_here(path, text):
    while not path.exists() or text not in path.read_text():
        time.sleep(0.05)


def test_a_hang_is_reported_once_with_all_stacks_and_its_end_is_said(tmp_path, capfd):
    release = threading.Event()
    other = threading.Thread(target=lambda: release.wait(30), name="a-reader-that-waits")
    other.start()
    with Watchdog(tmp_path, 0.2 * SECONDS) as watchdog:
        watchdog.beat(6)
        time.sleep(0.05)  # in time
        watchdog.beat(7)
        hangs_here(tmp_path / "stacks" / "process-0.txt", "the step after step 7")
        watchdog.beat(8)
    release.set()
    error = capfd.readouterr().err
    written = (tmp_path / "stacks" / "process-0.txt").read_text()
    for text in (error, written):
        assert text.count("the step after step 7 has not ended for") == 1
        assert "process 0 of 1" in text and "hangs_here" in text and "time.sleep(0.05)" in text
        assert "thread MainThread:" in text and "thread a-reader-that-waits:" in text
    assert "step 8 has ended after all" in error


def test_zero_minutes_watch_nothing_and_the_first_step_may_take_longer(tmp_path, capfd):
    with Watchdog(tmp_path, 0) as watchdog:
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        watchdog.beat(1)
    with Watchdog(tmp_path, 0.2 * SECONDS):
        began = time.monotonic()
        hangs_here(tmp_path / "stacks" / "process-0.txt", "the first step of this process")  # compiling
        assert time.monotonic() - began >= 4 * 0.2
    assert "the first step of this process has not ended" in capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_step_is_late_even_if_it_ends_before_the_watchdog_wakes(tmp_path, capfd):
    """As when the whole process was frozen."""
    watchdog = Watchdog(tmp_path, 0.05 * SECONDS)  # no thread of its own
    watchdog.beat(1)
    time.sleep(0.06)
    watchdog.beat(2)
    watchdog.beat(3)
    error = capfd.readouterr().err
    assert "step 2 has ended after all" in error and "step 3" not in error


def test_a_disk_that_hangs_does_not_stop_the_trainer(tmp_path, monkeypatch):
    hanging, release = threading.Event(), threading.Event()
    released = []
    monkeypatch.setattr(Watchdog, "_write", lambda self, text: hanging.set() or released.append(release.wait(60)))
    with Watchdog(tmp_path, 0.05 * SECONDS) as watchdog:
        watchdog.beat(1)
        assert hanging.wait(60)
        watchdog.beat(2)  # comes back
        release.set()
    assert released[0]  # and not only when the disk had given up


HOLDS_THE_LOCK = """
import ctypes, sys, time
from pathlib import Path
from mg3d_jax.training.watchdog import Watchdog

def in_native_code():
    ctypes.PyDLL(None).usleep(2_000_000)  # PyDLL keeps Python's lock

with Watchdog(Path(sys.argv[1]), 0.3 / 60) as watchdog:
    for step in range(20):
        watchdog.beat(step)
        time.sleep(0.05)
    in_native_code()
"""


def test_code_that_keeps_pythons_lock_is_found_too(tmp_path):
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Timeout \(.*\)!\nThread(?s:.*)in in_native_code", done.stderr), done.stderr
