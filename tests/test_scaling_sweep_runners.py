"""Runners of a sweep and where they train: owners, kills at any moment, several at once, executors."""

import errno
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support import TESTS, environment
from test_scaling_sweep import FAKE, collected, declared, outcome, project, starts  # noqa: F401  (project is a fixture)

from mg3d_jax import locks
from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.registry import EXECUTORS
from mg3d_jax.scaling.sweep import board, collect, states
from mg3d_jax.scaling.sweep import declaration as sweep
from mg3d_jax.scaling.sweep import runner as runs
from mg3d_jax.scaling.sweep.executors.base import Start
from mg3d_jax.scaling.sweep.executors.command import Command, fill
from mg3d_jax.scaling.sweep.executors.local import Local, told_when_we_die
from mg3d_jax.training.ownership import Ownership

SERVER = """
import json, os, signal, sys
from pathlib import Path
from mg3d_jax.files import read_json
from mg3d_jax.scaling.sweep import declaration, runner, states
from mg3d_jax.scaling.sweep.executors.local import Local

runner.POLL_SECONDS, Local.look_seconds = 0.02, 0.05
runner.collect.write_record = lambda workdir, run: read_json(states.run_folder(workdir, run) / "summary.json")
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        continue
    workdir, commands = request
    process = os.fork()
    if process == 0:
        trainer = lambda run, folder: [*commands[run.id], "--workdir", str(folder)]
        code = 99
        try:
            code = runner.run_all(declaration.read_declaration(Path(workdir)), Path(workdir), trainer, retries=3)
        finally:
            os._exit(code)
    print(process, flush=True)
"""


class Runners:
    """Starts runners as processes of their own, by forking one that has imported everything."""

    def __init__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=environment(**TESTS), **pipes)

    def _ask(self, request: object) -> int:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, one: sweep.Sweep, workdir: Path, **options) -> int:
        sweep.write_declaration(workdir, one)
        return self._ask([str(workdir), {run.id: command(run, **options) for run in one.runs}])

    def wait(self, process: int) -> int:
        return self._ask(process)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def runners():
    found = Runners()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)
    for executor in EXECUTORS.values():
        monkeypatch.setattr(executor, "look_seconds", 0.05)


@pytest.fixture
def without_records(monkeypatch):
    """Of which other tests are: to count the cost of a model takes longer than all that is tried here."""
    monkeypatch.setattr(collect, "write_record", lambda workdir, run: ended(run))


def ended(run: sweep.Run) -> dict:
    return {"state": "done", "step": 6, "final": {"valid/alignment": 1.0}, "config_hash": run.config_hash}


def command(run: sweep.Run, whole: bool = False, **trouble) -> list[str]:
    """The fake trainer; an option may be a dict {run id: value}. `whole`: with all that a record is made of."""
    own = {k: v.get(run.id, 0) if isinstance(v, dict) else v for k, v in trouble.items()}
    own = {"steps": 6, "seconds": 0.0, "valid": {"alignment": 1.0}, "summary": ended(run)} | own
    own = outcome(run, **trouble) if whole else own
    return [sys.executable, "-S", str(FAKE), "--outcome", json.dumps(own)]


def run_all(one: sweep.Sweep, workdir: Path, executor=None, *, retries: int = 0, **options) -> int:
    sweep.write_declaration(workdir, one)

    def trainer(run: sweep.Run, folder: Path) -> list[str]:
        return [*command(run, **options), "--workdir", str(folder)]

    return runs.run_all(one, workdir, trainer, executor, retries=retries)


def wait_for(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def steps_of(one: sweep.Sweep, workdir: Path) -> int:
    return sum(states.last_step(states.run_folder(workdir, run)) for run in one.runs)


def clashes(workdir: Path) -> list[Path]:
    return sorted(workdir.glob("runs/*/clash"))


@pytest.mark.processes
@pytest.mark.skipif(not told_when_we_die(), reason="the trainer follows a killed sweep on Linux only")
def test_runners_and_trainers_killed_at_random_give_the_same_table(project, runners):  # noqa: F811
    """Two runners; three times one of them, or a trainer, is killed after a random step. The other one ends with all done."""
    one, whole, killed = declared(project), project / "whole", project / "killed"
    assert run_all(one, whole, whole=True) == 0
    draw = random.Random(0)
    options = {"whole": True, "seconds": 0.05}
    keeper, others = runners.start(one, killed, **options), [runners.start(one, killed, **options)]
    for after, victim in zip(sorted(draw.sample(range(2, 20), 3)), ("runner", "trainer", "runner"), strict=True):
        wait_for(lambda after=after: steps_of(one, killed) >= after)
        if victim == "runner":
            os.kill(others[-1], signal.SIGKILL)
            assert runners.wait(others[-1]) == -signal.SIGKILL
            others.append(runners.start(one, killed, **options))
        else:
            owners = [states.holder(states.run_folder(killed, run)) for run in one.runs]
            trainers = {owner.pid for owner in owners if owner} - {keeper, *others}
            for trainer in sorted(trainers)[:1]:
                os.kill(trainer, signal.SIGKILL)
    assert runners.wait(keeper) == 0 and runners.wait(others[-1]) == 0
    assert not clashes(killed) and not list((killed / states.RUNNERS_FOLDER).glob(f"*{keeper}*"))
    assert collect.rows(killed, one, one.loss) == collect.rows(whole, one, one.loss)


@pytest.mark.processes
@pytest.mark.skipif(not told_when_we_die(), reason="the trainer follows a killed sweep on Linux only")
def test_the_run_of_a_killed_runner_is_taken_over_by_the_other_one(project, runners):  # noqa: F811
    one, workdir = declared(project), project / "work"
    long, go = one.runs[0], project / "go"  # its trainer waits for that
    beside = {"beside": {long.id: str(go)}}
    dead = runners.start(one, workdir, **beside)
    wait_for(lambda: starts(workdir, long) == [0])
    other = runners.start(one, workdir, **beside)
    wait_for(lambda: all(states.status(workdir, run).state == states.DONE for run in one.runs[1:]))
    assert states.status(workdir, long).state == states.RUNNING
    os.kill(dead, signal.SIGKILL)
    assert runners.wait(dead) == -signal.SIGKILL
    go.mkdir()
    (go / "starts").touch()
    assert runners.wait(other) == 0
    assert starts(workdir, long) == [0, 1] and not clashes(workdir)
    assert [starts(workdir, run) for run in one.runs[1:]] == [[0]] * 3


@pytest.mark.processes
def test_sigterm_saves_and_the_same_command_goes_on(project, runners, without_records):  # noqa: F811
    one, workdir = declared(project), project / "work"
    process = runners.start(one, workdir, seconds=0.5)
    wait_for(lambda: states.last_step(states.run_folder(workdir, one.runs[0])) >= 2)
    os.kill(process, signal.SIGTERM)
    assert runners.wait(process) == 75
    status = states.status(workdir, one.runs[0])
    assert (status.state, status.action) == ("interrupted", "resume")
    assert not list((workdir / states.RUNNERS_FOLDER).iterdir())
    assert run_all(one, workdir) == 0
    assert starts(workdir, one.runs[0])[1] >= 2


def test_failures_are_tried_again_up_to_a_limit(project, without_records, caplog):  # noqa: F811
    one, workdir = declared(project), project / "work"
    broken, once = one.runs[0], one.runs[2]
    assert run_all(one, workdir, retries=2, broken={broken.id: 1}, fail={once.id: 1}) == 1
    assert starts(workdir, broken) == [0, 0, 0] and starts(workdir, once) == [0, 3]
    assert states.status(workdir, broken).state == states.FAILED
    assert run_all(one, workdir, retries=0, broken={broken.id: 1}) == 1  # failures before do not count
    assert starts(workdir, broken) == [0] * 4
    assert run_all(one, workdir, stuck={broken.id: 1}) == 1
    assert "asked 5 times to be run again" in states.status(workdir, broken).detail
    assert states.read_state(states.run_folder(workdir, broken))["failures"] == 5
    assert run_all(one, workdir) == 0


def test_several_at_once_share_the_gpus(project, without_records, monkeypatch):  # noqa: F811
    one, workdir = declared(project), project / "work"
    first, second = one.runs[:2]  # each of them waits for the other one to start
    beside = {a.id: str(states.run_folder(workdir, b)) for a, b in ((first, second), (second, first))}
    assert run_all(one, workdir, Local({}, at_once=2), beside=beside) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    shares = Local({}, at_once=2)
    shares.prepare(workdir)
    assert [shares.share(slot) for slot in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": both} for both in ("0,1", "2,3")]
    with pytest.raises(UserError, match="3 runs at once cannot share 4 GPUs evenly"):
        Local({}, at_once=3).prepare(workdir)
    with pytest.raises(UserError, match="--at-once 0"):
        Local({}, at_once=0)


HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from mg3d_jax import locks

lock = locks.HeldLock.acquire(Path(sys.argv[1]))
trainer = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], pass_fds=(lock.descriptor,))
print(trainer.pid, flush=True)
time.sleep(60)
"""


def test_a_living_owner_is_respected_and_a_dead_one_taken_over(tmp_path):
    """By a sweep in another process: its trainer keeps the run also when it is itself dead. What clocks say is of no matter."""
    folder = tmp_path / "run"
    with states.acquire(folder):
        assert states.acquire(folder) is None and states.holder(folder).pid == os.getpid()
    assert states.holder(folder) is None
    hold = [sys.executable, "-c", HOLD, str(folder / "run.lock")]
    with subprocess.Popen(hold, stdout=subprocess.PIPE, text=True, env=environment()) as other:
        trainer = int(other.stdout.readline())
        for off in (-100.0, 100.0, -1e8, 1e8):
            os.utime(folder / "run.lock", (time.time() + off,) * 2)
            assert states.acquire(folder) is None
        assert states.holder(folder) == states.Owner(socket.gethostname(), other.pid)
        other.send_signal(signal.SIGSTOP)  # Ctrl-Z
        assert states.acquire(folder) is None
        other.kill()
        other.wait()
    assert states.acquire(folder) is None
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: states.holder(folder) is None)
    with states.acquire(folder):
        assert not list(folder.glob(".*"))


def test_a_trainer_takes_the_lock_that_it_was_handed(tmp_path, monkeypatch):
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    with states.acquire(folder) as lock:
        with pytest.raises(UserError, match="is being trained already"):
            Ownership(folder).take()
        monkeypatch.setenv(locks.DESCRIPTOR_VARIABLE, str(lock.descriptor))
        mine, theirs = Ownership(folder), Ownership(other)
        mine.take()
        theirs.take()  # of another folder than the one that it was handed
        assert states.holder(folder).pid == states.holder(other).pid == os.getpid()
        mine.give_back()
        theirs.give_back()
        assert states.holder(folder) is not None and states.holder(other) is None
    for gone in (str(1 << 20), "none"):
        monkeypatch.setenv(locks.DESCRIPTOR_VARIABLE, gone)
        mine = Ownership(folder)
        mine.take()
        mine.give_back()


def test_a_glance_at_a_lock_does_not_keep_others_from_it(tmp_path):
    with states.acquire(tmp_path):
        pass
    with (tmp_path / "run.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.2, file.close)
        timer.start()
        with states.acquire(tmp_path):
            timer.join()


def test_a_disk_without_locks_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"run\.lock cannot be locked.*Put --workdir on a disk"):
        states.acquire(tmp_path)


def test_folders_of_earlier_versions_open(project, without_records):  # noqa: F811
    """A lease of theirs is respected as long as it is held, a state of theirs is read."""
    one, workdir = declared(project), project / "work"
    folder = states.run_folder(workdir, one.runs[0])
    folder.mkdir(parents=True)
    with locks.HeldLock.acquire(folder / "sweep_lease.json") as lease:
        lease.note(trainer=7)
        assert states.status(workdir, one.runs[0]).state == states.RUNNING and states.acquire(folder) is None
    old = {
        "run": one.runs[0].id,
        "state": "failed",
        "attempt": 1,
        "exit_code": 3,
        "message": "exit code 3",
        "updated": "",
    }
    (folder / "sweep_state.json").write_text(json.dumps(old))
    assert states.status(workdir, one.runs[0]) == states.Status(states.FAILED, 0, "exit code 3")
    assert run_all(one, workdir) == 0
    assert states.read_state(folder)["attempt"] == 2


def test_runs_that_others_have_queued_are_left_to_them(project, without_records):  # noqa: F811
    """As long as their sweep lives, or the scheduler has the job, whatever the clock says."""
    one, workdir = declared(project), project / "work"
    run, folder = one.runs[0], states.run_folder(workdir, one.runs[0])
    folder.mkdir(parents=True)
    job = {"executor": "command", "runner": "", "label": "ssh", "facts": {}}

    def state() -> str:
        states.write_state(folder, run, states.RUNNING, message="killed", job=job)
        written = json.loads((folder / "sweep_state.json").read_text()) | {"updated": "1999-01-01T00:00:00Z"}
        (folder / "sweep_state.json").write_text(json.dumps(written))
        return states.status(workdir, run).state

    with states.Runner(workdir) as other:
        job["runner"] = other.name
        assert not states.left_behind(workdir, folder)
        assert state() == states.QUEUED
        assert f"ssh, by process {os.getpid()}" in states.status(workdir, run).detail
        with states.acquire(folder):
            assert state() == states.RUNNING
    assert state() == states.INTERRUPTED
    job["facts"] = {"alive": "true", "lock": ""}
    assert state() == states.QUEUED
    assert states.left_behind(workdir, folder)
    job["facts"] = {"alive": "false", "lock": ""}
    assert state() == states.INTERRUPTED
    job["facts"] = {"alive": f"! test -e {project}/go", "lock": ""}  # takes the one place that there is
    assert state() == states.QUEUED
    thread = threading.Timer(
        0.5, lambda: ((workdir / "before").write_text(repr(starts(workdir, one.runs[1]))), go.touch())
    )
    go = project / "go"
    thread.start()
    assert run_all(one, workdir, Command({"command": "{words}"})) == 0
    thread.join()
    assert (workdir / "before").read_text() == "[]" and starts(workdir, run) == [0]


def test_a_command_trains_a_run_anywhere(project, without_records):  # noqa: F811
    """Blocking: its exit code is the trainer's. Detached: what the folder and `alive` say."""
    one, workdir = declared(project), project / "work"
    blocking = Command({"command": "env A={run} {words}"}, at_once=2)
    assert run_all(one, workdir, blocking, broken={one.runs[0].id: 1}) == 1
    failed = states.status(workdir, one.runs[0])
    assert (failed.state, failed.detail) == ("failed", "exit code 3: ValueError: the loss is nan")
    detached = Command({"command": "setsid bash -c {command} > /dev/null 2>&1 &", "detached": "true"})
    assert run_all(one, workdir, detached) == 0
    assert starts(workdir, one.runs[0]) == [0, 0] and not clashes(workdir)
    assert "is being trained" not in (states.run_folder(workdir, one.runs[0]) / "train.log").read_text()
    gone = Command({"command": ": {command}", "detached": "true", "alive": "false"})
    assert run_all(one, project / "gone", gone) == 1
    assert "asked 5 times" in states.status(project / "gone", one.runs[0]).detail
    refused = Command({"command": "false {command}", "detached": "true"})
    assert run_all(one, project / "refused", refused) == 1
    assert states.status(project / "refused", one.runs[0]).detail == "exit code 1: no output"


def test_templates_are_lines_of_shell(project):  # noqa: F811
    run = declared(project).runs[0]
    start = Start(run, Path("a b"), ["python", "-c", "x y"])
    line = fill("${run} {run} {folder} --command={command} -- {words} {config} {other}", start)
    assert line == (
        f"${{run}} {run.id} 'a b' --command='python -c '\"'\"'x y'\"'\"'' -- python -c 'x y' {run.base} {{other}}"
    )
    assert fill("{overrides}", start).split()[0] == run.overrides[0]
    for options, message in (
        ({"command": "train"}, r"with \{command\}"),
        ({"command": "{command}", "detached": "perhaps"}, "true or false"),
        ({"command": "{command}", "alive": "true"}, "detached=true"),
        ({"command": "{command}", "host": "a"}, "--option host: the executor 'command' has"),
    ):
        with pytest.raises(UserError, match=message):
            Command(options)


SBATCH = """#!/bin/bash
cp "${!#}" "$SLURM_STAND_IN/7.sh"
bash "$SLURM_STAND_IN/scontrol" requeue 7
echo "Submitted batch job 7"
"""
SCONTROL = """#!/bin/bash
export SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_LOCALID=0
echo start >> "$SLURM_STAND_IN/starts"
setsid bash "$SLURM_STAND_IN/7.sh" < /dev/null > /dev/null 2>&1 &
"""
SRUN = """#!/bin/bash
while [ "${1##*/}" != "${SLURM_PYTHON##*/}" ]; do shift; done
echo $$ > "$SLURM_STAND_IN/task"
exec "$@"
"""
SACCT = """#!/bin/bash
echo 'JobID|State|NodeList'
echo '7|RUNNING|here'
"""


@pytest.mark.processes
def test_a_job_of_slurm_goes_back_into_the_queue(project, without_records, monkeypatch):  # noqa: F811
    """With a stand-in for SLURM: at its signal the trainer saves, the job starts again and ends the run."""
    pytest.importorskip("submitit")
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN), ("sacct", SACCT)):
        (project / name).write_text(text)
        (project / name).chmod(0o755)
    for name, value in environment(**TESTS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{project}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(project))
    monkeypatch.setenv("SLURM_PYTHON", sys.executable)
    one, workdir = declared(project), project / "work"
    one = sweep.Sweep(one.name, one.loss, one.model_size, one.data_size, one.runs[:1])
    folder = states.run_folder(workdir, one.runs[0])

    def interrupt() -> None:
        wait_for(lambda: states.last_step(folder) >= 2)
        assert EXECUTORS["slurm"].alive(states.read_state(folder)["job"]["facts"], folder)
        os.kill(int((project / "task").read_text()), signal.SIGUSR2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    slurm = EXECUTORS["slurm"]({"timeout_min": "30", "partition": "gpu", "nodes": "1"})
    assert run_all(one, workdir, slurm, seconds=0.1) == 0
    thread.join()
    assert (project / "starts").read_text().split() == ["start"] * 2
    first, second = starts(workdir, one.runs[0])
    assert first == 0 and second >= 2 and states.read_state(folder)["attempt"] == 1
    script = (project / "7.sh").read_text()
    assert "--partition=gpu" in script and "--signal=USR2@300" in script and "--time=30" in script
    with pytest.raises(UserError, match="slurm_colour"):
        EXECUTORS["slurm"]({"colour": "red"}).prepare(workdir)


def test_status_shows_who_is_at_it_and_watch_ends_with_the_last_run(project, without_records, capsys, monkeypatch):  # noqa: F811
    one, workdir = declared(project), project / "work"
    sweep.write_declaration(workdir, one)
    folder = states.run_folder(workdir, one.runs[0])
    with states.acquire(folder):
        states.write_state(folder, one.runs[0], states.FAILED, message="exit code 3: no memory")
        states.write_state(folder, one.runs[0], states.RUNNING)
        lines = [
            {"step": 4, "split": "train", "samples_per_second": 4.0},
            {"step": 4, "split": "valid", "alignment": 2.5},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step')
        found = board.look(workdir, one)[0]
        assert (found.step, found.total, found.eta, found.loss) == (4, 10, 12.0, 2.5)  # 40 records, twice, by 8
        assert (
            found.who == f"process {os.getpid()} on {socket.gethostname()}"
            and found.failure == "exit code 3: no memory"
        )
        assert main(["sweep", "status", "--workdir", str(workdir)]) == 0
        text = capsys.readouterr().out
        assert "4/10" in text and "0:12" in text and "1 running, 3 not started" in text
        cells = board.table(one, board.look(workdir, one)).columns[2]._cells
        assert cells == ["4/10", "0/10", "0/20", "0/20"]

    def finish(seconds: float) -> None:
        assert run_all(one, workdir) == 0

    monkeypatch.setattr("mg3d_jax.commands.sweep.time.sleep", finish)
    assert main(["sweep", "status", "--workdir", str(workdir), "--watch", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 interrupted, 3 not started", "4 done"]


def test_wrong_executors_are_clear_errors(project, capsys):  # noqa: F811
    where = ["sweep", "run", "--config", str(project / "sweep.py"), "--workdir", str(project / "work")]
    for words, message in (
        (["--executor", "slrum"], "Did you mean 'slurm'?"),
        (["--option", "nodes"], "write KEY=VALUE"),
        (["--option", "nodes=2"], "the executor 'local' has none"),
        (["--retries", "-1"], "it must be 0 or more"),
    ):
        assert main([*where, *words]) == 2
        assert message in capsys.readouterr().err
