"""Sweeps: declared, planned, run, interrupted, resumed and collected, with a trainer that only pretends."""

import csv
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.data.records import FORMAT_VERSION
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.fit import table
from mg3d_jax.scaling.sweep import collect, compare, states
from mg3d_jax.scaling.sweep import declaration as sweep
from mg3d_jax.scaling.sweep import plan as planning
from mg3d_jax.scaling.sweep import runner as runs
from mg3d_jax.scaling.sweep.executors.local import Local
from mg3d_jax.training import cost as step_cost

FAKE = Path(__file__).parent / "reference" / "fake_trainer.py"
SWEEP_FILE = """
from ml_collections import ConfigDict

def get_config(arg=""):
    sweep = ConfigDict()
    sweep.name = "test"
    sweep.base = "base.py"
    sweep.models = tuple((name, (("model.volume_encoder.preset", name),)) for name in ("plain", "wider"))
    sweep.patients = (20, 40)
    sweep.seeds = (0,)
    sweep.overrides = (("data.batch_size", 8),)
    sweep.length = ("epochs", 2.0)
    sweep.loss = "valid/alignment"
    sweep.model_size = "n_active"
    sweep.data_size = "unique_patients"
    if arg == "grid":
        sweep.models = tuple((name, (("model.volume_encoder.preset", name),)) for name in ("plain", "wider", "wide", "heavy"))
        sweep.patients = (10, 20, 40, 80)
    return sweep
"""
BASE_FILE = """
from support import with_plain_towers
from mg3d_jax import config as config_lib

def get_config(arg=""):
    return with_plain_towers(config_lib.default().unlock()).lock()
"""


def prepared(folder: Path, patients: list[str]) -> Path:
    """A prepared folder as far as a sweep looks: two records per patient."""
    folder.mkdir()
    patients_of = [[name, 2] for name in patients]
    shard = {"file": "records.array_record", "records": len(patients_of), "sha256": repr(patients)}
    manifest = {"format_version": FORMAT_VERSION, "patients": patients_of, "shards": [shard]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def project(tmp_path):
    (tmp_path / "sweep.py").write_text(SWEEP_FILE)
    (tmp_path / "base.py").write_text(BASE_FILE)
    prepared(tmp_path / "train", [f"p{i}" for i in range(100)])
    prepared(tmp_path / "valid", [f"q{i}" for i in range(10)])
    return tmp_path


def settings(project: Path) -> list[str]:
    return [f"data.train={project / 'train'}", f"data.valid={project / 'valid'}"]


def declared(project: Path, argument: str = "", more: tuple[str, ...] = ()) -> sweep.Sweep:
    return sweep.load(f"{project / 'sweep.py'}{argument}", [*settings(project), *more])


def outcome(run: sweep.Run, *, steps: int = 6, seconds: float = 0.0, **trouble) -> dict:
    """What the fake trainer shall leave: a loss that follows a law of size and data."""
    cost = step_cost.of_config(run.config()).sizes
    loss = 0.5 + 30 / cost.n_active**0.3 + 4 / run.patients**0.5
    valid = {"alignment": loss, "loss": 2 * loss}
    summary = {
        "state": "done",
        "step": steps,
        "samples_seen": steps * 8,
        "unique_patients": run.patients,
        "unique_records": 2 * run.patients,
        "final": {f"valid/{name}": value for name, value in valid.items()},
        "parameters": {"total": cost.n_total},
        "flops_per_step": 1.0,
        "trained_seconds": 2.0,
        "config_hash": run.config_hash,
        "code_version": "0",
    }
    return {"steps": steps, "seconds": seconds, "valid": valid, "summary": summary} | trouble


def fake(**options):
    """A trainer for `run_all`; an option may be a dict {run id: value}."""

    def command(run: sweep.Run, folder: Path) -> list[str]:
        own = {k: v.get(run.id) if isinstance(v, dict) else v for k, v in options.items()}
        own = {k: v for k, v in own.items() if v is not None}
        return [sys.executable, "-S", str(FAKE), "--workdir", str(folder), "--outcome", json.dumps(outcome(run, **own))]

    return command


def starts(workdir: Path, run: sweep.Run) -> list[int]:
    """The steps from which the trainer of this run started, in order."""
    path = states.run_folder(workdir, run) / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def collected(workdir: Path, out: Path) -> tuple[list[dict], dict]:
    assert main(["sweep", "fit", "--workdir", str(workdir), "--out", str(out), "--draws", "40"]) in (0, 3)
    with (out / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((out / "fit.json").read_text())


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(Local, "look_seconds", 0.05)


def run_all(one: sweep.Sweep, workdir: Path, *, executor=None, retries: int = 0, **options) -> int:
    sweep.write_declaration(workdir, one)
    return runs.run_all(one, workdir, fake(**options), executor, retries=retries)


def test_ids_are_stable_and_follow_the_configuration(project):
    first, again = declared(project), declared(project)
    assert first == again
    assert [run.id.rsplit("-", 1)[0] for run in first.runs] == [
        "plain-p20-s0",
        "wider-p20-s0",
        "plain-p40-s0",
        "wider-p40-s0",
    ]
    for run in first.runs:
        config = run.config()
        assert run.id.endswith(config_lib.config_hash(config)[:8])
        assert (config.data.max_patients, config.training.epochs, config.data.batch_size) == (run.patients, 2.0, 8)
    other = declared(project, more=("optimizer.learning_rate=0.01",))
    assert not {run.id for run in first.runs} & {run.id for run in other.runs}


def test_the_plan_counts_data_parameters_and_flops(project, capsys):
    planned = planning.plan(declared(project), project / "work")
    for one in planned:
        cost = step_cost.of_config(one.run.config())
        assert (one.patients, one.records) == (one.run.patients, 2 * one.run.patients)
        assert one.steps == 2 * one.records // 8
        assert one.training_flops == one.steps * 8 * cost.training.total
        assert one.seconds is None and one.status.action == "run"
    arguments = ["--config", str(project / "sweep.py"), "--workdir", str(project / "work")]
    assert main(["sweep", "plan", *arguments, *(x for s in settings(project) for x in ("--set", s))]) == 0
    text = capsys.readouterr().out
    assert all(one.run.id in text for one in planned) and "4 runs, 4 to do" in text
    assert not (project / "work").exists()


def test_done_runs_are_skipped_and_give_time_estimates(project, capsys):
    one, workdir = declared(project), project / "work"
    assert run_all(one, workdir) == 0
    assert run_all(one, workdir, fail=True) == 0
    assert [starts(workdir, run) for run in one.runs] == [[0]] * 4
    assert capsys.readouterr().err.count("done before, skipped") == 4
    planned = planning.plan(one, workdir)
    assert {p.status.action for p in planned} == {"skip"}
    rates = [p.training_flops / p.seconds for p in planned]
    done = [collect.write_record(workdir, run) for run in one.runs]
    assert rates == pytest.approx([sum(r["training_flops"] for r in done) / 8.0] * 4)
    assert main(["sweep", "status", "--workdir", str(workdir)]) == 0
    assert "4 done" in capsys.readouterr().out


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(project, capsys):
    one, workdir = declared(project), project / "work"
    bad = one.runs[1].id
    assert run_all(one, workdir, fail={bad: True}) == 1
    found = {run.id: states.status(workdir, run) for run in one.runs}
    assert [found[run.id].state for run in one.runs] == ["done", "failed", "done", "done"]
    assert found[bad].detail == "exit code 3: ValueError: the loss is nan"
    rows, fit = collected(workdir, project / "out")
    assert [row["status"] for row in rows] == ["used", "missing", "used", "used"]
    assert fit["missing"] == [{"run": bad, "reason": "failed at step 3: exit code 3: ValueError: the loss is nan"}]
    assert run_all(one, workdir) == 0
    assert starts(workdir, one.runs[1]) == [0, 3]
    assert "is tried again" in capsys.readouterr().err


STAGES = """
    sweep.models = (("first", ()), ("second", (("init_from.take", ("volume_encoder/.*",)),)), ("whole", ()))
    sweep.patients = (20,)
    sweep.length = ("flops", 1e12)
    sweep.shares = (("first", 0.25), ("second", 0.75))
    sweep.starts_from = (("second", "first"),)
    return sweep
"""


def staged(project, workdir, *changes):
    text = SWEEP_FILE[: SWEEP_FILE.index("    if arg")] + STAGES
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (project / "sweep.py").write_text(text)
    return sweep.load(str(project / "sweep.py"), settings(project), workdir)


def test_a_run_starts_from_another_once_that_is_done(project, capsys):
    workdir = project / "work"
    one = staged(project, workdir)
    first, second, whole = one.runs
    assert second.after == str(states.run_folder(workdir, first)) == second.config().init_from.path
    assert first.after == whole.after == "" and second.config().init_from.take == ("volume_encoder/.*",)
    assert run_all(one, workdir, fail={first.id: True}) == 1
    assert [states.status(workdir, run).state for run in one.runs] == ["failed", "not started", "done"]
    assert f"left for later, it starts from {first.id}, which is not done" in capsys.readouterr().err
    with states.acquire(states.run_folder(workdir, first)):
        assert states.waits_for(second).state == "running"  # by somebody else
    assert run_all(one, workdir) == 0
    assert [starts(workdir, run) for run in one.runs] == [[0, 3], [0], [0]]
    assert sweep.read_declaration(workdir) == one
    found, missing = compare.finals(workdir, one)
    assert list(found) == ["second", "whole"] and not missing  # the first is a stage of the second
    # Another folder is another path, of the same run.
    moved = staged(project, project / "elsewhere").runs[1]
    assert moved.id == second.id and moved.config_hash != second.config_hash
    command = runs.train_command(second, project / "x")
    assert f"--config.init_from.path={second.after}" in command


def test_runs_of_equal_flops(project):
    one = staged(project, project / "work")
    for run, share in zip(one.runs, (0.25, 0.75, 1.0), strict=True):
        config = run.config()
        cost = step_cost.of_config(config).training.total * config.data.batch_size
        assert config.training.steps == max(1, round(share * 1e12 / cost))
    assert staged(project, project / "work", ('("flops", 1e12)', '("steps", 10)')).runs[0].config().training.steps == 2
    epochs = staged(project, project / "work", ('("flops", 1e12)', '("epochs", 2.0)')).runs[0].config().training.epochs
    assert epochs == 0.5


def test_runs_of_another_sweep_are_gone_on_from(project):
    workdir = project / "work"
    one = staged(project, workdir)
    sweep.write_declaration(workdir, one)
    more = ("sweep.shares", f"sweep.starts_in = {str(workdir)!r}; sweep.shares"), ("(20,)", "(10, 20)")
    tuned = staged(project, project / "tuned", *more)
    assert [run.after for run in tuned.runs if run.model == "second"] == [
        str(states.run_folder(workdir, one.runs[0]))
    ] * 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('(("second", "first"),)', '(("first", "second"),)', "earlier in this sweep there are 0"),
        ('(("second", "first"),)', '(("third", "first"),)', "'starts_from' names third"),
        ('(("first", 0.25),', '(("first", 0.0),', "above 0 and up to 1"),
    ],
)
def test_wrong_stages_are_clear_errors(project, old, new, message):
    with pytest.raises(UserError, match=message):
        staged(project, project / "work", (old, new))


def test_exit_code_75_means_run_me_again(project):
    one, workdir = declared(project), project / "work"
    assert run_all(one, workdir, again={one.runs[0].id: True}) == 0
    assert starts(workdir, one.runs[0]) == [0, 3]


def test_success_without_a_summary_is_a_failure(project):
    one, workdir = declared(project), project / "work"
    assert run_all(one, workdir, silent={one.runs[0].id: True}) == 1
    assert "exit code 0 but no summary.json" in states.status(workdir, one.runs[0]).detail


def test_a_sweep_goes_on_only_with_the_data_it_was_started_with(project):
    def declare(train: str, valid: str) -> None:
        one = declared(project, more=(f"data.train={project / train}", f"data.valid={project / valid}"))
        sweep.write_declaration(project / "work", dataclasses.replace(one, data=sweep.data_fingerprint(one)))

    declare("train", "valid")
    shutil.copytree(project / "train", project / "moved")
    declare("moved", "valid")
    prepared(project / "other", [f"r{i}" for i in range(10)])
    with pytest.raises(UserError, match=r"other data\.train or data\.valid"):
        declare("train", "other")
    assert sweep.read_declaration(project / "work").data


def test_a_summary_of_another_configuration_does_not_count(project):
    one, workdir = declared(project), project / "work"
    folder = states.run_folder(workdir, one.runs[0])
    folder.mkdir(parents=True)
    summary = outcome(one.runs[0])["summary"] | {"config_hash": "0"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert states.status(workdir, one.runs[0]).state == "not started"


def test_four_runs_are_collected_and_no_law_is_named(project, capsys):
    one, workdir = declared(project), project / "work"
    run_all(one, workdir)
    rows, fit = collected(workdir, workdir / "fit")
    assert len(rows) == 4 and fit["status"] == "refused" and "at least 8" in fit["refusal"]
    assert fit["columns"] == {
        "N": "n_active",
        "D": "unique_patients",
        "loss": "valid/alignment",
        "source": "sweep test",
    }
    assert {"fit.json", "runs.csv", "loss_vs_n.png", "loss_vs_d.png"} <= {p.name for p in (workdir / "fit").iterdir()}
    for row, run in zip(rows, one.runs, strict=True):
        wanted = outcome(run)["summary"]
        assert float(row["loss"]) == wanted["final"]["valid/alignment"]
        assert float(row["N"]) == step_cost.of_config(run.config()).sizes.n_active
        assert (float(row["D"]), int(row["unique_records"])) == (run.patients, 2 * run.patients)
    assert "no law" in capsys.readouterr().err


def test_sixteen_runs_give_the_law_that_made_them(project):
    one, workdir = declared(project, ":grid"), project / "work"
    for run in one.runs:  # what the trainer would leave
        folder = states.run_folder(workdir, run)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(outcome(run)["summary"]))
    sweep.write_declaration(workdir, one)
    _, fit = collected(workdir, workdir / "fit")
    assert fit["params"] == pytest.approx({"E": 0.5, "A": 30, "B": 4, "alpha": 0.3, "beta": 0.5}, rel=1e-4)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("data.batch_size=16", "data.batch_size (8, 16)"),
        ("objectives.volume_reconstruction.mask_ratio=0.75", "objectives.volume_reconstruction.mask_ratio (0.5, 0.75)"),
        ("optimizer.accumulation=2", "negatives of a pair (7, 3)"),
    ],
)
def test_runs_that_cannot_be_compared_share_no_law(project, setting, says):
    one, workdir = declared(project, ":grid"), project / "work"
    other = declared(project, ":grid", (setting,))
    mixed = sweep.Sweep(one.name, one.loss, one.model_size, one.data_size, one.runs[:8] + other.runs[8:])
    for run in mixed.runs:
        folder = states.run_folder(workdir, run)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(outcome(run)["summary"]))
    sweep.write_declaration(workdir, mixed)
    _, fit = collected(workdir, workdir / "fit")
    assert fit["status"] == "refused" and says in fit["refusal"]


def test_a_missing_metric_or_a_wrong_parameter_count_excludes_a_run(project):
    one, workdir = declared(project), project / "work"
    run_all(one, workdir)
    path = states.run_folder(workdir, one.runs[0]) / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"final": {"valid/loss": 1.0}}))
    path = states.run_folder(workdir, one.runs[1]) / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"parameters": {"total": summary["parameters"]["total"] + 1}}))
    path = states.run_folder(workdir, one.runs[2]) / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"final": {"valid/alignment": float("nan")}}))
    found = collect.rows(workdir, one, one.loss)
    assert [row.status for row in found] == [table.EXCLUDED] * 3 + [table.USED]
    assert found[0].reason == "no metric 'valid/alignment' in summary.json; it has valid/loss"
    assert "+1 parameters" in found[1].reason
    assert found[2].reason == "valid/alignment is NaN or empty"


def test_a_smaller_vocabulary_than_declared_is_counted(project):
    run = declared(project).runs[0]
    config = run.config()
    real = step_cost.of_config(config, 777).sizes
    summary = outcome(run)["summary"] | {"parameters": {"total": real.n_total}}
    record = collect.build_record(run, summary, [])
    assert (record["vocab_size"], record["parameters_mismatch"]) == (777, 0)
    assert record["n_text"] == real.n_text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("sweep.patients = (20, 40)", "sweep.patients = ()"), "'patients' is empty"),
        (("sweep.patients = (20, 40)", "sweep.patients = (20, 20)"), "more than once"),
        (('sweep.length = ("epochs", 2.0)', 'sweep.length = ("hours", 2.0)'), "epochs, steps, samples"),
        (('sweep.data_size = "unique_patients"', 'sweep.data_size = "gigabytes"'), "samples_seen"),
        (("sweep.seeds = (0,)", "pass"), "no 'seeds'"),
        (("sweep.seeds = (0,)", "sweep.seeds = (0,); sweep.colour = 1"), "unknown keys colour"),
        (('"data.batch_size", 8', '"data.batch_sise", 8'), "Did you mean"),
        (('"data.batch_size", 8', '"seed", 8'), "axis of the sweep"),
        (('sweep.base = "base.py"', 'sweep.base = "none.py"'), "none.py"),
    ],
)
def test_wrong_declarations_are_clear_errors(project, change, message):
    text = SWEEP_FILE.replace(*change)
    assert text != SWEEP_FILE
    (project / "sweep.py").write_text(text)
    with pytest.raises(UserError, match=message):
        declared(project)


def test_wrong_data_are_clear_errors(project):
    with pytest.raises(UserError, match=r"data\.valid is empty"):
        sweep.load(str(project / "sweep.py"), [settings(project)[0]])
    prepared(project / "few", ["a", "b"])
    with pytest.raises(UserError, match=r"wants 20 patients; .*few have 2"):
        planning.plan(declared(project, more=(f"data.train={project / 'few'}",)), project / "work")
    prepared(project / "leak", ["p3"])
    with pytest.raises(UserError, match=r"1 patients are in data\.train and in data\.valid, e\.g\. p3"):
        planning.plan(declared(project, more=(f"data.valid={project / 'leak'}",)), project / "work")
    unprepared = declared(project, more=(f"data.train={project / 'later'}",))
    assert planning.plan(unprepared, project / "work")[0].records is None
    with pytest.raises(UserError, match="write KEY=VALUE"):
        declared(project, more=("data.train",))
    with pytest.raises(UserError, match=r"no sweep\.json"):
        sweep.read_declaration(project / "work")


def test_the_train_command_loads_the_declared_configuration(project):
    run = declared(project).runs[3]
    command = runs.train_command(run, project / "x")
    assert command[1:4] == ["-m", "mg3d_jax", "train"]
    config = config_lib.load(command[command.index("--config") + 1], command[command.index("--workdir") + 2 :])
    assert config_lib.config_hash(config) == run.config_hash
    assert config.model.volume_encoder.preset == "wider" and config.training.steps == 0
