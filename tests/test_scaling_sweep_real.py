"""A miniature sweep with the real trainer: planned, run, killed in the middle, resumed, collected."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import TESTS, environment, tiny_builder, with_plain_towers
from zygote import Forked, of_session

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.registry import EXECUTORS
from mg3d_jax.scaling.sweep import declaration as sweep
from mg3d_jax.scaling.sweep import states
from mg3d_jax.scaling.sweep.executors.base import Executor, Job, Start
from mg3d_jax.training import cost as step_cost

PATIENCE = 1200.0  # seconds; about a minute on two idle cores
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(3 * PATIENCE)]

SWEEP_FILE = """
from ml_collections import ConfigDict

def get_config(arg=""):
    sweep = ConfigDict()
    sweep.name = "miniature"
    sweep.base = "base.py"
    sweep.models = tuple((name, (("model.volume_encoder.preset", name),)) for name in ("plain", "wider"))
    sweep.patients = (16,)
    sweep.seeds = (0,)
    sweep.overrides = (("training.checkpoint_every", 3),)
    sweep.length = ("steps", 24)
    sweep.loss = "valid/alignment"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    return sweep
"""
BASE_FILE = """
from pathlib import Path
from ml_collections import ConfigDict
from mg3d_jax import config as config_lib

def get_config(arg=""):
    config = config_lib.from_json((Path(__file__).parent / "base.json").read_text())
    return ConfigDict(config_lib.to_dict(config))
"""


class ForkedJob(Job):
    label = "a forked trainer"

    def __init__(self, start: Start):
        self._process = Forked(of_session(), list(start.command[3:]), start.log)

    def poll(self) -> int | None:
        return self._process.poll()


class ForkedTrainers(Executor):
    """An executor of a user: its trainers are forked, and take the lock of their run themselves."""

    name = "forked"

    def start(self, start: Start) -> Job:
        return ForkedJob(start)


EXECUTORS.register("forked", ForkedTrainers)


@pytest.fixture(scope="module")
def project(tiny_data, tmp_path_factory) -> Iterator[dict]:
    """The declaration, its arguments, and the sweep run without interruption."""
    folder = tmp_path_factory.mktemp("sweep")
    base = config_lib.typed(with_plain_towers(tiny_builder(tiny_data["train"], tiny_data["valid"])))
    (folder / "base.json").write_text(config_lib.to_json(base))
    (folder / "base.py").write_text(BASE_FILE)
    (folder / "sweep.py").write_text(SWEEP_FILE)
    with pytest.MonkeyPatch.context() as patch:  # the runner is in this process, its trainers have their own
        for name, value in environment(**TESTS).items():
            patch.setenv(name, value)
        command = ["sweep", "run", "--config", str(folder / "sweep.py"), "--workdir"]
        with contextlib.redirect_stderr(io.StringIO()) as output:
            assert main([*command, str(folder / "whole"), "--at-once", "2", "--executor", "forked"]) == 0
        declared = sweep.load(str(folder / "sweep.py"))
        yield {"folder": folder, "sweep": declared, "command": command, "output": output.getvalue()}


def fit(workdir: Path) -> tuple[bytes, dict]:
    assert main(["sweep", "fit", "--workdir", str(workdir)]) == 3  # two runs are no law
    return (workdir / "fit" / "runs.csv").read_bytes(), json.loads((workdir / "fit" / "fit.json").read_text())


def test_every_run_leaves_a_record(project):
    assert "2 of 2 runs done" in project["output"]
    for run in project["sweep"].runs:
        record = json.loads((states.run_folder(project["folder"] / "whole", run) / "record.json").read_text())
        assert (record["unique_patients"], record["steps"], record["samples_seen"]) == (run.patients, 24, 24 * 8)
        assert record["parameters_mismatch"] == 0
        cost = step_cost.of_config(run.config(), record["vocab_size"])
        assert record["n_total"] == record["parameters"]["total"] == cost.sizes.n_total
        assert record["training_flops"] == 24 * 8 * cost.training.total
        assert record["evaluations"][-1]["alignment"] == record["final"]["valid/alignment"]
    _, document = fit(project["folder"] / "whole")
    assert document["rows"] == {"used": 2, "excluded": 0, "missing": 0}
    assert document["status"] == "refused"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the trainer's process as Linux shows it")
def test_sigkill_of_sweep_and_trainer_gives_the_same_table(project, capsys):
    """The second run is killed after a checkpoint, with the sweep; the other is that of the whole sweep."""
    whole, killed, runs = project["folder"] / "whole", project["folder"] / "killed", project["sweep"].runs
    shutil.copytree(whole, killed)
    folder = states.run_folder(killed, runs[1])
    shutil.rmtree(folder)
    command = [*project["command"], str(killed)]
    process = Forked(of_session(), command, project["folder"] / "killed.log")
    deadline = time.monotonic() + PATIENCE
    while states.last_step(folder) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    trainer = states.holder(folder).pid
    assert trainer != process.pid  # it has the lock from its sweep, and says who it is
    os.kill(trainer, signal.SIGSTOP)  # or it might save and leave when the sweep dies
    os.kill(process.pid, signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    process.wait(PATIENCE)
    while states.holder(folder):  # a killed process keeps its locks until the last of its threads is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before = states.status(killed, runs[1])
    assert (before.state, before.action) == ("interrupted", "resume") and before.step < 24
    assert main([*command, "--executor", "forked"]) == 0
    said = capsys.readouterr().err
    assert said.count("skipped") == 1 and "goes on after step" in said
    assert "resuming after step" in (folder / "train.log").read_text()
    assert fit(killed) == fit(whole)
