"""Real runs with real faults: kills at random moments, a full and a read-only disk, processes told to stop or stopped dead."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from soak import MOMENTS, Soak, arrays, command, lines, losses, wait_until, write_config
from support import TESTS, environment, free_port
from zygote import Forked, Zygote, mg3d, of_session, state_of

from mg3d_jax.data.bad_records import read_bad_records
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.shard_reader import open_shard
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.writers import read_metrics

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(1800),  # some start a trainer twenty times: long on a machine that has other things to do
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux: fork, /proc, mounts"),
]


@pytest.fixture(scope="module")
def zygote():
    """One of its own: the tests here look at what its processes hold in memory."""
    started = Zygote()
    yield started
    started.close()


@pytest.fixture(scope="module")
def config_file(tiny_data, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("faults"), tiny_data["train"])


def test_kills_of_all_kinds_change_nothing(zygote, config_file, tmp_path):
    """A short form of `python tests/soak.py --kills 100`. Each attempt goes on after the last checkpoint that was complete."""
    soak = Soak(zygote, config_file, tmp_path)
    # On a fast machine a run may have ended before the last of them: first those that need a run that trains.
    plan = [("worker", signal.SIGKILL, "after a step"), ("trainer", signal.SIGHUP, "after a step")]
    plan += [("one of two", signal.SIGKILL, "after a step")]
    plan += [("trainer", signal.SIGKILL, moment) for moment in MOMENTS[:3]]
    assert soak.episode("run", plan), soak.said
    text = soak.log.read_text()
    assert "data worker" in text and "was killed (signal 9" in text, text
    resumed = [int(step) for step in re.findall(r"resuming after step (\d+) of", text)]
    assert resumed and resumed == sorted(resumed), resumed


def memory_and_files(process):
    """MiB of its own memory and open files of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024, len(os.listdir(f"/proc/{process}/fd"))


def watched(zygote, arguments, log, run):
    """Memory and files of a run whenever it has written a line and is not about to save, by number of the line."""
    process, samples, before = zygote.start(arguments, log), {}, lines(run)
    while state_of(process) != "Z":
        with suppress(OSError, TypeError):  # it has just ended: the log says why
            found = memory_and_files(process)
            if not list((run / "checkpoints").glob("*tmp*")):  # a save holds files and copies of the state for a while
                samples[lines(run) - before] = found
        time.sleep(0.01)
    assert zygote.wait() == 0, log.read_text()
    return [samples[number] for number in sorted(samples)]


def test_a_thousand_steps_and_forty_saves_do_not_grow(zygote, config_file, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {"training__log_every": 10, "data__batch_size": 2, "data__max_tokens": 16}
    settings |= {"objectives__alignment__report_sentences": 1, "objectives__alignment__sentence_tokens": 8}
    # First steps alone.
    steps = {"training__steps": 1000, "training__checkpoint_every": 1000}
    found = watched(zygote, command(config_file, run, "heavy", **settings, **steps), log, run)
    assert len(found) > 50, found  # a busy machine may leave out some
    early, late = found[len(found) // 4 : len(found) // 2], found[-len(found) // 4 :]
    memory, files = ([np.median([each[kind] for each in part]) for part in (early, late)] for kind in (0, 1))
    assert memory[1] - memory[0] < 1.0, found  # MiB in 500 steps: 2 KiB each
    assert files[1] <= files[0], found
    # Then saves: the pools below the checkpoint library come to hold some copies of the state, but not one for each save.
    run = tmp_path / "saves"
    settings |= {"training__log_every": 5, "training__steps": 250, "training__checkpoint_every": 5}
    found = watched(zygote, command(config_file, run, "heavy", **settings), log, run)
    copy = sum(map(len, arrays(run)[1].values())) / 2**20
    early, late = found[5:10], found[-6:-1]
    grown = np.median([memory for memory, _ in late]) - np.median([memory for memory, _ in early])
    assert grown < 10 * copy, (grown, copy, found)
    assert max(files for _, files in late) <= max(files for _, files in found[:10]) + 5, found


def test_updates_that_are_not_finite_are_skipped_named_and_end_the_run(zygote, config_file, tmp_path):
    """A learning rate at the end of float32 makes parameters that no second step survives. What was before stays."""
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {"training__steps": 10, "training__checkpoint_every": 1, "training__max_skipped": 3}
    assert zygote.run(command(config_file, run, optimizer__learning_rate=1e38, **settings), log) == 2
    text = log.read_text()
    assert "3 updates in a row were not finite" in text and "Traceback" not in text
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in skipped] == [2, 3, 4] and all(len(line["records"]) == 8 for line in skipped)
    step, values = arrays(run)
    parameters = [np.frombuffer(v, np.float32) for name, v in values.items() if name[0] == "params"]
    assert step == 1 and parameters and all(np.isfinite(v).all() for v in parameters)


def test_a_flipped_byte_in_a_shard_costs_one_record(zygote, config_file, tiny_data, tmp_path):
    train, run, log = tmp_path / "train", tmp_path / "run", tmp_path / "log"
    shutil.copytree(tiny_data["train"], train)
    entry = json.loads((train / "manifest.json").read_text())["shards"][0]
    start, size = open_shard(train / entry["file"], entry["records"]).places[5]
    content = bytearray((train / entry["file"]).read_bytes())
    content[start + size // 2] ^= 1
    (train / entry["file"]).write_bytes(content)
    assert zygote.run(command(config_file, run, training__steps=8, data__train=train), log) == 0, log.read_text()
    assert sorted(losses(run)) == list(range(1, 9)) and all(map(np.isfinite, losses(run).values()))
    assert [record for _, record in read_bad_records(run / "bad_records.jsonl")] == [5]
    assert "checksum" in log.read_text()


IN_A_SMALL_DISK = """
set -u
mount -t tmpfs -o size={small} none "$RUN" || exit 99
train() {{ "$PYTHON" -m mg3d_jax train "$@" >>"$LOG" 2>&1; echo "exit code $?" >>"$LOG"; }}
mount -o remount,ro "$RUN"; train "$@"
mount -o remount,rw,size={small} "$RUN"; train "$@"
ls "$RUN/checkpoints" >>"$LOG"
mount -o remount,size=400M "$RUN"; train "$@"
cp -r "$RUN" "$SAVED"
"""


def test_a_read_only_and_a_full_disk_are_said_and_the_run_goes_on_when_mended(zygote, config_file, tmp_path):
    run, saved, log = tmp_path / "run", tmp_path / "saved", tmp_path / "log"
    run.mkdir()
    if subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(run)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk of his own")
    settings = {"training__steps": 10, "training__checkpoint_every": 2, "training__keep_checkpoints": 3}
    assert zygote.run(command(config_file, tmp_path / "whole", "heavy", **settings), log) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "10").rglob("*"))
    log.write_text("")
    env = environment(1, **TESTS, RUN=str(run), LOG=str(log), PYTHON=sys.executable)
    words = ["unshare", "-Urm", "bash", "-c", IN_A_SMALL_DISK.format(small=int(2.7 * size)), "bash"]
    done = subprocess.run(
        [*words, *command(config_file, run, "heavy", **settings)[1:]], env=env | {"SAVED": str(saved)}, timeout=500
    )
    refused, full, mended = log.read_text().split("exit code ")[:3]
    assert done.returncode == 0 and "Traceback" not in log.read_text(), log.read_text()
    assert f"run directory {run} cannot be written to: Read-only file system" in refused and full.startswith("2\n")
    assert f"cannot be written to {run / 'checkpoints'}: No space left on device" in full and mended.startswith("2\n")
    assert "then the same command goes on after step 4" in full
    assert mended.split()[1:3] == ["2", "4"] and "resuming after step 4 of 10" in mended
    assert losses(saved) == losses(tmp_path / "whole") and arrays(saved) == arrays(tmp_path / "whole")


def alone(devices, *words):
    """`mg3d ...` as one process."""
    done = mg3d(*words, devices=devices)
    assert done.returncode == 0, done.stderr
    return done.stderr


def together(devices, logs, *words, last=""):
    """`mg3d ...` as two processes with so many devices each; the last one runs the program `last`, if given."""
    place = ["--num-processes", "2", "--coordinator", f"localhost:{free_port()}", "--process-id"]
    started = [Forked(of_session(), [*words, *place, "0"], logs[0], devices)]
    if not last:
        return [*started, Forked(of_session(), [*words, *place, "1"], logs[1], devices)]
    with logs[1].open("a") as stream:
        line = [sys.executable, "-c", last, *words, *place, "1"]
        return [*started, subprocess.Popen(line, env=environment(devices, **TESTS), stdout=stream, stderr=stream)]


def test_two_processes_of_four_devices_train_as_one_of_eight(config_file, tmp_path):
    whole, run, logs = tmp_path / "whole", tmp_path / "run", [tmp_path / f"log{n}" for n in range(2)]
    processes = together(4, logs, *command(config_file, run, training__steps=5))
    try:
        assert [process.wait(300) for process in processes] == [0, 0], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()
    alone(8, *command(config_file, whole, training__steps=5))
    np.testing.assert_allclose(list(losses(run).values()), list(losses(whole).values()), rtol=1e-5)
    assert Checkpoints(run).steps() == Checkpoints(whole).steps() == [4, 5]


STARTS_LATE = """
import sys, time
from mg3d_jax.commands.main import main
from mg3d_jax.training import stopping

prompt = stopping.StopRequest.__init__

def late(self, *arguments):
    print("late", file=sys.stderr, flush=True)
    time.sleep(6)
    prompt(self, *arguments)

stopping.StopRequest.__init__ = late
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_to_one_of_two_saves_both_and_one_process_goes_on_bit_for_bit(config_file, tmp_path):
    """With two devices sums over devices have one order only, so what two processes and one compute is the same.

    Before that the process is frozen for a while, which both report.
    """
    steps = 40  # of 0.1 s or more: JAX notices a signal within a second
    whole, run, logs = tmp_path / "whole", tmp_path / "run", [tmp_path / f"log{n}" for n in range(2)]
    settings = {"training__steps": steps, "training__checkpoint_every": 100, "training__watchdog_minutes": 3 / 60}
    processes = together(1, logs, *command(config_file, run, "slow", **settings))
    try:
        wait_until(lambda: lines(run) >= 3 or any(process.poll() is not None for process in processes))
        before = [log.read_text() for log in logs]  # slow steps may have been reported already
        processes[1].send_signal(signal.SIGSTOP)
        hang = "the step after step"
        wait_until(lambda: logs[0].read_text().count(hang) > before[0].count(hang), 60)
        processes[1].send_signal(signal.SIGCONT)
        late = "has ended after all"
        wait_until(lambda: all(logs[n].read_text().count(late) > before[n].count(late) for n in range(2)), 60)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [75, 75], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()
    (step,), (other,) = (re.findall(r"asked to stop: saved step (\d+)", log.read_text()) for log in logs)
    assert step == other and Checkpoints(run).steps() == [int(step)] and int(step) < steps
    assert "MainThread" in (run / "stacks" / "process-0.txt").read_text()
    # Again two processes, told to stop while one is ready and the other one starts: they stop after their first step.
    first = int(step)
    processes = together(1, logs, *command(config_file, run, "slow", **settings), last=STARTS_LATE)
    try:
        wait_until(lambda: "late\n" in logs[1].read_text(), 120)
        time.sleep(2)  # until process 0 is ready; a signal before that is heeded too
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [75, 75], [log.read_text() for log in logs]
    finally:
        for process in processes:
            process.kill()
    step = max(Checkpoints(run).steps())
    assert step == first + 1 and f"asked to stop: saved step {step} of {steps}" in logs[0].read_text()
    assert f"resuming after step {step} of {steps}" in alone(2, *command(config_file, run, "slow", **settings))
    alone(2, *command(config_file, whole, **settings))
    assert losses(run) == losses(whole)
    assert arrays(run) == arrays(whole)


def test_sigterm_to_one_of_two_in_the_middle_of_an_evaluation_ends_both_there(zygote, config_file, tiny_data, tmp_path):
    """The step that was being measured is saved, and measured again by whoever goes on."""
    run, whole, logs = tmp_path / "run", tmp_path / "whole", [tmp_path / f"log{n}" for n in range(3)]
    settings = {"training__steps": 2, "training__validate_every": 1, "training__checkpoint_every": 100}
    settings |= {"data__valid": tiny_data["train"], "data__batch_size": 2}
    words = command(config_file, run, "slow evaluation", **settings)
    place = ["--num-processes", "2", "--coordinator", f"localhost:{free_port()}", "--process-id"]
    started = [zygote.start([*words, *place, str(n)], logs[n], 1, beside=n > 0) for n in range(2)]
    wait_until(lambda: logs[1].exists() and "measures" in logs[1].read_text())
    os.kill(started[1], signal.SIGTERM)
    assert [zygote.wait_for(process, 120) for process in started] == [75, 75], [log.read_text() for log in logs[:2]]
    assert Checkpoints(run).steps() == [1] and Checkpoints(run).meta()["unmeasured"]
    counts = [log.read_text().count("measures") for log in logs[:2]]
    assert counts[0] == counts[1] < len(PreparedData((tiny_data["train"],))) // 2, counts
    for folder in (run, whole):
        assert zygote.run(command(config_file, folder, **settings), logs[2], 2) == 0, logs[2].read_text()
    assert read_metrics(run, "valid") and read_metrics(run, "valid") == read_metrics(whole, "valid")
    assert arrays(run) == arrays(whole)
