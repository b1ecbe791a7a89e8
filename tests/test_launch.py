"""The launchers: what they would run, what they run again; real runs of two processes, killed and resumed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, environment, tiny_builder, with_plain_towers

from mg3d_jax import config as config_lib
from mg3d_jax.errors import UserError
from mg3d_jax.trainer import Trainer
from mg3d_jax.training import distributed
from mg3d_jax.training.writers import read_metrics

LAUNCH = ROOT / "launch"
STEPS, EVERY = 30, 6  # of training, and from checkpoint to checkpoint


def run(script, *words, cwd=None, timeout=300, **variables):
    """Runs a launcher to its end."""
    env = environment(2, PYTHON=sys.executable, RESTART_DELAY="0", **variables)
    command = ["bash", str(LAUNCH / script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=cwd)


def test_the_launchers_are_clean():
    shellcheck = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    scripts = sorted(str(path) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_dry_run_prints_the_commands():
    common = {"CONFIG": "configs/quickstart.py", "WORKDIR": "a run", "OVERRIDES": "--config.seed=1\n--config.name=x"}
    train = r"train --config configs/quickstart.py --workdir a\ run --config.seed=1 --config.name=x"
    words = ("--dry-run", "--", "--config.data.windows=((-1000, 1000),)")
    done = run("local.sh", *words, NUM_PROCESSES="4", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7", **common)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 4), done.stderr
    for number, line in enumerate(lines):
        assert f"MG3D_NUM_PROCESSES=4 MG3D_PROCESS_ID={number} CUDA_VISIBLE_DEVICES={2 * number}" in line
        assert train in line
        assert r"--config.data.windows=\(\(-1000\,\ 1000\)\,\)" in line
    assert len({re.search("localhost:([0-9]+)", line)[1] for line in lines}) == 1
    done = run("slurm.sbatch", "--dry-run", SRUN_OPTIONS="--cpu-bind=none", **common)
    assert done.stdout.startswith("srun --kill-on-bad-exit=1 --wait=120 --cpu-bind=none ") and train in done.stdout
    done = run("tpu_vm.sh", *words, TPU_NAME="pod", TPU_ZONE="us-east5-a", **common)
    assert done.stdout.startswith("gcloud compute tpus tpu-vm ssh pod --zone us-east5-a --worker=all --command ")
    assert (
        r"ENV_SETUP=/on/the/hosts.sh"
        in run("tpu_vm.sh", "--dry-run", TPU_NAME="pod", TPU_ZONE="z", ENV_SETUP="/on/the/hosts.sh", **common).stdout
    )
    remote = subprocess.run(
        ["bash", "-c", f"printf '%s' {done.stdout.split('--command ')[1]}"], capture_output=True, text=True
    )
    assert remote.stdout.startswith("cd mg3d_jax && env CONFIG=configs/quickstart.py WORKDIR=a\\ run ")
    done = run("tpu_vm.sh", "--worker", *words, **common)
    assert done.stdout.startswith("MG3D_CLUSTER=tpu ") and train in done.stdout


@pytest.mark.parametrize("script", ["local.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_what_is_missing_is_said(script):
    assert "set CONFIG=FILE" in run(script).stderr
    assert "set WORKDIR" in run(script, CONFIG="x").stderr
    assert "go after --" in run(script, "--config.seed=1", CONFIG="x", WORKDIR="y").stderr
    if script == "local.sh":
        uneven = run(script, "--dry-run", CONFIG="x", WORKDIR="y", NUM_PROCESSES="2", CUDA_VISIBLE_DEVICES="0,1,2")
        assert (uneven.returncode, uneven.stdout) == (2, "") and "cannot share 3 GPUs evenly" in uneven.stderr
    shown = run(script, "--help").stdout
    assert "MAX_RESTARTS" in shown and "shellcheck" not in shown


FAKE_PYTHON = """#!/usr/bin/env bash
# In place of python: process N does what line "attempt" of the file N says; what it got is recorded.
if [ "$1" = -c ]; then echo 1234; exit; fi
attempt=$(($(cat "$FAKE/count.$MG3D_PROCESS_ID" 2>/dev/null || echo 0) + 1))
trap 'echo TERM >>"$FAKE/signals.$MG3D_PROCESS_ID"; exit 75' TERM
echo "$attempt" >"$FAKE/count.$MG3D_PROCESS_ID"  # from here on a signal is heeded
eval "$(sed -n "${attempt}p" "$FAKE/script.$MG3D_PROCESS_ID")"
"""
HANG = "while true; do sleep 0.1; done"


@pytest.mark.parametrize(
    "scripts,code,attempts",
    [
        (["exit 0", "exit 0"], 0, 1),
        (["exit 75\nexit 0", "sleep 0.5; exit 75\nexit 0"], 0, 2),
        (["kill -KILL $$\nexit 0", "trap '' TERM; " + HANG + "\nexit 0"], 0, 2),  # the other one hangs and is killed
        (["exit 2", HANG], 2, 1),  # a mistake of the user is not repeated
        (["exit 1", "exit 1"], 1, 1),
        (["exit 75\n" * 9, "exit 75\n" * 9], 75, 3),  # MAX_RESTARTS = 2
        (["exit 1\nexit 0", "kill -ABRT $$\nexit 0"], 0, 2),  # lost its peer, which died of a signal
    ],
)
def test_what_is_started_again(tmp_path, scripts, code, attempts):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    for number, script in enumerate(scripts):
        (tmp_path / f"script.{number}").write_text(script + "\n")
    env = environment(FAKE=str(tmp_path), PYTHON=str(fake), CONFIG="c", WORKDIR=str(tmp_path / "run"), MAX_RESTARTS="2")
    env |= {"RESTART_DELAY": "0", "STOP_SECONDS": "5"}
    done = subprocess.run(["bash", str(LAUNCH / "local.sh")], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    for number in range(2):
        assert (tmp_path / f"count.{number}").read_text().strip() == str(attempts)


def test_sigterm_to_the_launcher_stops_all_and_restarts_nothing(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    for number in range(2):
        (tmp_path / f"script.{number}").write_text(HANG + "\n")
    env = environment(FAKE=str(tmp_path), PYTHON=str(fake), CONFIG="c", WORKDIR=str(tmp_path / "run"))
    process = subprocess.Popen(["bash", str(LAUNCH / "local.sh")], env=env, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: all((tmp_path / f"count.{n}").exists() for n in range(2)), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    for number in range(2):
        assert (tmp_path / f"signals.{number}").read_text() == "TERM\n"
        assert (tmp_path / f"count.{number}").read_text().strip() == "1"


def wait_for(condition, process, timeout=500):
    """Polls; fails with the process's output when it ends first."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"exit code {process.poll()}, waited for something else")
        time.sleep(0.02)


CONFIG_FILE = """
import sys
sys.path.insert(0, {tests!r})
from support import slow_steps, tiny_builder, with_plain_towers

slow_steps(0.1)  # a signal takes JAX up to a second, and must find the run before its end

def get_config(arg=""):
    config = tiny_builder({train!r}, {valid!r}, training__steps={steps}, training__checkpoint_every={every})
    return with_plain_towers(config)
"""


@pytest.fixture(scope="module")
def config_file(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("launch") / "tiny.py"
    values = {
        "tests": str(ROOT / "tests"),
        "train": tiny_data["train"],
        "valid": tiny_data["valid"],
        "steps": STEPS,
        "every": EVERY,
    }
    path.write_text(CONFIG_FILE.format(**values))
    return path


@pytest.fixture(scope="module")
def expected_losses(tiny_data, tmp_path_factory):
    """Of an uninterrupted run, in this process, on eight devices."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    settings = {"training__steps": STEPS, "training__checkpoint_every": EVERY}
    builder = tiny_builder(tiny_data["train"], tiny_data["valid"], **settings)
    assert Trainer(config_lib.typed(with_plain_towers(builder)), workdir).run() == 0
    return losses(workdir)


def losses(workdir):
    """Held-out loss last; every step exactly once."""
    lines = read_metrics(workdir, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines] + [read_metrics(workdir, "valid")[-1]["loss"]]


def logged_steps(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def processes_of(workdir):
    """Process ids of a run by rank, from the environment that each was given."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:  # it has ended, or is not ours
            continue
        rank = variables.get(b"MG3D_PROCESS_ID", variables.get(b"SLURM_PROCID"))
        if str(workdir).encode() in command and b"mg3d_jax" in command and rank is not None:
            found[int(rank)] = int(folder.name)
    return found


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")
def test_two_local_processes_survive_sigkill_and_sigterm_to_one(config_file, expected_losses, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    env = environment(2, PYTHON=sys.executable, CONFIG=str(config_file), WORKDIR=str(workdir), EXPECTED_DEVICES="2")
    with log.open("w") as stream:
        process = subprocess.Popen(["bash", str(LAUNCH / "local.sh")], env=env, stdout=stream, stderr=stream)
        try:
            wait_for((workdir / "checkpoints" / str(EVERY)).exists, process)
            os.kill(processes_of(workdir)[1], signal.SIGKILL)
            wait_for(lambda: "resuming after step" in log.read_text(), process)
            resumed = logged_steps(workdir)
            wait_for(lambda: logged_steps(workdir) >= resumed + 2, process)
            os.kill(processes_of(workdir)[1], signal.SIGTERM)  # the one that does not write metrics
            assert process.wait(500) == 0, log.read_text()
        finally:
            for pid in processes_of(workdir).values():
                os.kill(pid, signal.SIGKILL)
    text, other = log.read_text(), (workdir / "logs" / "process-1.log").read_text()
    assert re.search("exit code (137|134): restart 1 of 3", text)  # 134: the other one noticed first
    assert "exit code 75: restart 2 of 3" in text
    (saved,) = re.findall(r"asked to stop: saved step (\d+)", text)
    assert re.findall(r"asked to stop: saved step (\d+)", other) == [saved]
    assert f"resuming after step {saved} of {STEPS}" in text and f"resuming after step {saved} of {STEPS}" in other
    assert "process 0 of 2: 2 x cpu, 4 in all" in text and "process 1 of 2: 2 x cpu, 4 in all" in other
    np.testing.assert_allclose(losses(workdir), expected_losses, rtol=1e-3)


SRUN = """#!/usr/bin/env bash
# In place of srun: two tasks of this job on this host.
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NUM_NODES=1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" 2>>"$FAKE/task.0" & a=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" 2>>"$FAKE/task.1" & b=$!
wait $a; x=$?
wait $b; y=$?
exit $((x > y ? x : y))
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")
def test_slurm_joins_two_tasks_saves_on_sigterm_and_requeues(config_file, expected_losses, tmp_path):
    workdir, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" >>"$FAKE/requeued"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = str(20_000 + os.getpid() % 10_000)  # JAX takes the coordinator's port from it
    env = environment(2, PYTHON=sys.executable, CONFIG=str(config_file), WORKDIR=str(workdir), FAKE=str(tmp_path))
    env |= {"SLURM_JOB_ID": job, "SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}"}
    spool = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # SLURM runs a copy
    process = subprocess.Popen(["bash", spool], env=env, cwd=tmp_path)
    try:
        wait_for(lambda: logged_steps(workdir) >= 3, process)
        for pid in processes_of(workdir).values():  # as SLURM does before the time limit
            os.kill(pid, signal.SIGTERM)
        assert process.wait(500) == 0
        assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
        saved = [re.findall(r"saved step (\d+)", (tmp_path / f"task.{n}").read_text()) for n in range(2)]
        assert saved[0] == saved[1] and len(saved[0]) == 1
        done = subprocess.run(["bash", spool], env=env | {"SLURM_RESTART_COUNT": "1"}, cwd=tmp_path, timeout=500)
        assert done.returncode == 0
    finally:
        for pid in processes_of(workdir).values():
            os.kill(pid, signal.SIGKILL)
    assert f"resuming after step {saved[0][0]} of {STEPS}" in (tmp_path / "task.1").read_text()
    assert (tmp_path / "requeued").read_text().count("\n") == 1
    np.testing.assert_allclose(losses(workdir), expected_losses, rtol=1e-3)


def place(*options, **environ):
    import argparse

    parser = argparse.ArgumentParser()
    distributed.add_arguments(parser)
    return distributed.find_place(parser.parse_args(options), environ)


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_places():
    assert place() is None
    assert place(SLURM_NTASKS="1", SLURM_PROCID="0", TPU_WORKER_HOSTNAMES="a") is None
    assert place("--coordinator", "a:1", "--process-id", "1", "--num-processes", "2").process_id == 1
    assert place(**SLURM).num_processes == 4
    assert place(TPU_WORKER_HOSTNAMES="a,b").cluster == place("--cluster", "tpu").cluster == "tpu"
    assert place(OMPI_COMM_WORLD_SIZE="2").cluster == "ompi"
    pod = {"JOBSET_NAME": "mg3d", "REPLICATED_JOB_NAME": "gpu", "JOB_COMPLETION_INDEX": "1", "MG3D_NUM_PODS": "2"}
    found = place(**pod)
    assert (found.coordinator, found.num_processes, found.process_id) == ("mg3d-gpu-0-0.mg3d:8476", 2, 1)
    assert place("--coordinator", "a:1", "--num-processes", "2", JOB_COMPLETION_INDEX="1").process_id == 1
    for options, environ, message in (
        (("--coordinator", "a:1"), {}, "give all of"),
        (("--coordinator", "a:1", "--process-id", "2", "--num-processes", "2"), {}, r"not in 0\.\.1"),
        (("--cluster", "slurm"), {"SLURM_NTASKS": "2"}, "SLURM_STEP_NODELIST"),
        ((), {"JOBSET_NAME": "x", "JOB_COMPLETION_INDEX": "0"}, "MG3D_NUM_PODS"),
    ):
        with pytest.raises(UserError, match=message):
            place(*options, **environ)


@pytest.mark.parametrize(
    "tasks,local,on_node,visible,expected",
    [
        (
            "1(x2)",
            0,
            "8",
            "0,1,2,3,4,5,6,7",
            tuple(range(8)),
        ),  # the node's only task takes all: JAX alone would take one
        ("1(x2)", 0, "8", None, tuple(range(8))),
        ("8(x2)", 3, "8", "0,1,2,3,4,5,6,7", (3,)),
        ("2(x2)", 1, "8", "0,1,2,3,4,5,6,7", (4, 5, 6, 7)),
        ("4", 3, "4", "2", (0,)),  # bound by --gpus-per-task: all that it sees
        ("2,1", 0, None, None, None),  # no GPUs
    ],
)
def test_gpus_of_a_slurm_task(tasks, local, on_node, visible, expected):
    environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(local)}
    environ |= {k: v for k, v in (("SLURM_GPUS_ON_NODE", on_node), ("CUDA_VISIBLE_DEVICES", visible)) if v is not None}
    assert distributed.slurm_gpus(environ) == expected


def test_devices_are_counted():
    distributed.check_devices(8, {})
    with pytest.raises(UserError, match=r"sees 8 device.*--expected-devices says 4"):
        distributed.check_devices(4, {})
    task = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "4"}
    with pytest.raises(UserError, match=r"SLURM's allocation says 4.*one GPU of its node"):
        distributed.check_devices(None, task)
    distributed.check_devices(None, task | {"JAX_PLATFORMS": "cpu"})
    distributed.check_devices(8, task)  # said on purpose
