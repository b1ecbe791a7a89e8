"""What follows from the law of a sweep's runs: advice over its models and a ladder, predictions of configs, trunks."""

from __future__ import annotations

import numpy as np
import pytest
from test_scaling_sweep import BASE_FILE, SWEEP_FILE, prepared
from test_scaling_sweep_axes import TRUNKS

from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.scaling.fit import plots
from mg3d_jax.scaling.sweep import collect, declaration, ladder, states
from mg3d_jax.scaling.sweep.speed import Speed
from mg3d_jax.training import cost as step_cost

DEVICES = 4
RATE = "optimizer.learning_rate"


def sweep_in(folder, *lines):
    """A sweep of four sizes with more `lines` in its file, and the overrides that name its data."""
    folder.mkdir()
    text = SWEEP_FILE.replace('("plain", "wider"))', '("plain", "wider", "wide", "heavy"))')
    changed = "".join(f"    {line}\n" for line in lines) + "    if arg"
    (folder / "sweep.py").write_text(text.replace("    if arg", changed))
    (folder / "base.py").write_text(BASE_FILE)
    prepared(folder / "train", [f"p{i}" for i in range(100)])
    prepared(folder / "valid", [f"q{i}" for i in range(10)])
    settings = [f"data.train={folder / 'train'}", f"data.valid={folder / 'valid'}"]
    declared = declaration.load(str(folder / "sweep.py"), settings, folder / "work")
    declaration.write_declaration(folder / "work", declared)
    return declared, settings


def finished(declared, workdir, loss, *, noise):
    """What trainers on four devices leave, at 1e9 FLOP/s each; runs of one trunk share half of the noise."""
    rng, shared = np.random.default_rng(0), {}
    for run in declared.runs:
        cost, config = step_cost.of_config(run.config()), run.config()
        samples = int(config.training.samples or config.training.epochs * 2 * run.patients)
        trunk = shared.setdefault(run.after or str(states.run_folder(workdir, run)), rng.normal())
        measured = loss(cost.sizes.n_active, run.patients, samples) * np.exp(noise * (trunk + rng.normal()))
        summary = {
            "state": "done",
            "step": samples // config.data.batch_size,
            "samples_seen": samples,
            "unique_patients": run.patients,
            "unique_records": 2 * run.patients,
            "final": {declared.loss: float(measured)},
            "parameters": {"total": cost.sizes.n_total},
            "trained_seconds": samples * cost.training.total / (1e9 * DEVICES),
            "devices": DEVICES,
            "config_hash": run.config_hash,
            "code_version": "0",
        }
        folder = states.run_folder(workdir, run)
        folder.mkdir(parents=True)
        write_json(folder / states.SUMMARY_FILE, summary)


@pytest.fixture(autouse=True, scope="module")
def undrawn():
    """Plots are looked at elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_all", lambda *_: [])
        yield


def law(n, d):
    return 0.5 + 30 / n**0.3 + 4 / d**0.5


def run(*words):
    return main(["sweep", *map(str, words)])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Folder of a sweep of patients, its declaration and its data; its runs are fitted."""
    folder = tmp_path_factory.mktemp("advice") / "sweep"
    rule = f'sweep.rule = (("{RATE}", 1e-3, 10000, -0.5),)'
    declared, settings = sweep_in(
        folder, "sweep.patients = (10, 20, 40, 80)", "sweep.seeds = (0, 1)", "sweep.subset_seeds = (1, 2)", rule
    )
    finished(declared, folder / "work", lambda n, patients, seen: law(n, patients), noise=0.0005)
    assert run("fit", "--workdir", folder / "work", "--draws", 40) == 0
    return folder, declared, settings


def test_advice_is_over_the_models_of_the_sweep(fitted, capsys):
    folder, declared, _ = fitted
    assert run("advise", "--workdir", folder / "work", "--compute", "1e11") == 0
    text = capsys.readouterr().out
    sizes, costs = {}, {}
    for one in declared.runs:
        counted = step_cost.of_config(one.config())
        sizes[one.model], costs[one.model] = (
            counted.sizes.n_active,
            4 * counted.training.total,
        )  # two records, two epochs
    best = min(sizes, key=lambda name: law(sizes[name], 1e11 / costs[name]))
    assert f"N {sizes[best]:.4g}, D {1e11 / costs[best]:.4g}, D/N" in text
    assert all(f"  {name}: N " in text for name in sizes) and "of the draws" in text


def test_hours_are_those_of_one_device(fitted, capsys):
    folder, declared, _ = fitted
    records = collect.records(folder / "work", declared)
    speed = Speed.measured(records)
    assert (speed.device, speed.run, speed.devices) == (pytest.approx(1e9), pytest.approx(4e9), DEVICES)
    assert run("advise", "--workdir", folder / "work", "--device-hours", 0.05) == 0
    assert f"{0.05 * 3600 * 1e9:.3g} FLOPs" in capsys.readouterr().out
    silent = Speed.measured([one | {"devices": None} for one in records])
    assert silent.device is None and silent.run == pytest.approx(4e9)
    assert Speed.measured([one | {"trained_seconds": None} for one in records]) is None
    mixed = Speed.measured([records[0], records[0] | {"devices": 2 * DEVICES}])
    assert mixed.devices is None and mixed.device == pytest.approx(1e9 / 1.5)


def test_a_ladder_adds_models_and_one_name_is_one_size(fitted, tmp_path, capsys):
    folder, _, settings = fitted
    words = ["advise", "--workdir", folder / "work", "--compute", "1e11", *(w for s in settings for w in ("--set", s))]
    more = tmp_path / "more"
    sweep_in(
        more, 'sweep.models = (("tall", (("model.volume_encoder.preset", "heavy"), ("model.projection_dim", 64))),)'
    )
    assert run(*words, "--ladder", more / "sweep.py") == 0
    assert "  tall: N " in capsys.readouterr().out
    other = tmp_path / "other"
    sweep_in(other, 'sweep.models = (("plain", (("model.volume_encoder.preset", "heavy"),)),)')
    assert run(*words, "--ladder", other / "sweep.py") == 2
    assert "plain has N" in capsys.readouterr().err
    assert run(*words) == 2 and "--set goes with --ladder" in capsys.readouterr().err


def test_a_config_is_predicted_registered_and_checked(fitted, tmp_path, capsys):
    folder, declared, settings = fitted
    biggest = max(declared.runs, key=lambda one: step_cost.of_config(one.config()).sizes.n_active)
    base = [*settings, "model.volume_encoder.preset=heavy", "data.batch_size=8", "data.max_patients=100"]
    n = step_cost.of_config(biggest.config()).sizes.n_active
    base.append(f"{RATE}={declaration.by_rule(1e-3, 10000, -0.5, n)}")

    def predict(*more):
        given = (word for setting in (*base, *more) for word in ("--set", setting))
        words = ["predict", "--workdir", folder / "work", "--config", folder / "base.py", *given]
        return run(*words, "--register", tmp_path / "p.json")

    assert predict("training.epochs=2") == 0
    document, text = read_json(tmp_path / "p.json"), capsys.readouterr().out
    assert document["at"] == {"N": n, "D": 100} and not document["warnings"] and "learning_rate" not in text
    assert document["predicted"] == pytest.approx(law(n, 100), rel=0.01)
    low, high = document["intervals"]["90"]
    assert low < document["predicted"] < high < 1.02 * low
    summary = {"state": "done", "config_hash": document["run"]["config_hash"], "final": {declared.loss: law(n, 100)}}
    write_json(tmp_path / "summary.json", summary)
    assert run("check", tmp_path / "p.json", "--run", tmp_path) == 0
    for change, says in (
        ({"config_hash": "0"}, "the prediction is of"),
        ({"state": "stopped"}, "the run is not done"),
        ({"final": {"valid/loss": 1.0}}, "it has valid/loss"),
    ):
        write_json(tmp_path / "summary.json", summary | change)
        assert run("check", tmp_path / "p.json", "--run", tmp_path) == 2 and says in capsys.readouterr().err
    assert predict("training.epochs=3") == 2 and "runs of 4 samples for each of the" in capsys.readouterr().err
    assert predict("training.epochs=2", "data.batch_size=16") == 2
    assert "data.batch_size 16 (the sweep: 8)" in capsys.readouterr().err
    (tmp_path / "p.json").unlink()
    assert predict("training.epochs=2", f"{RATE}=0.5") == 0
    assert f"{RATE} is 0.5; by the sweep's rule" in capsys.readouterr().out


def test_runs_of_one_trunk_share_noise_and_repeats_have_a_law(tmp_path, capsys):
    """Branches stand in one group with their trunk; data seen again cost what the law of repeats says."""
    lines = [*TRUNKS, 'sweep.data_size = "samples_seen"', "sweep.models = sweep.models[:3]"]
    lines[0] = 'sweep.length = ("samples", (160, 640, 2560))'
    lines[2] = "sweep.patients = (10, 40)"
    folder, work = tmp_path / "sweep", tmp_path / "sweep" / "work"
    declared, _ = sweep_in(folder, *lines)

    def loss(n, patients, seen):
        return law(n, seen) + 1e-6 * (seen / (2 * patients) - 1) * n / (2 * patients)

    finished(declared, work, loss, noise=0.0003)
    rows = collect.rows(work, declared, declared.loss, ("N", "U", "S"))
    groups = {row.group for row in rows}
    assert len(groups) == 6 and all(sum(row.group == one for row in rows) == 3 for one in groups)
    assert run("fit", "--workdir", work, "--form", "nus-1", "--draws", 20) == 0
    document = read_json(work / "fit" / "fit.json")
    assert document["columns"]["U"] == "unique_records" and "6 clusters by group" in document["no_intervals"]
    assert document["params"]["P"] == pytest.approx(1e-6, rel=0.1)
    assert run("advise", "--workdir", work, "--compute", "1e12", "--unique-data", 100) == 0
    assert "times the unique data)" in capsys.readouterr().out
    config = declared.runs[0].config()
    point = ladder.locate(config, declared, collect.records(work, declared), ("N", "U", "S"))
    assert (point.at["U"], point.at["S"]) == (2 * declared.runs[0].patients, 2560)
    with pytest.raises(UserError, match="between"):
        by_patients = declaration.replace(declared, data_size="unique_patients")
        ladder.samples_per_datum(collect.records(work, declared), by_patients)


def test_equal_epochs_are_one_length_however_many_scans_a_patient_has():
    def of(patients, records, samples):
        return {"unique_patients": patients, "unique_records": records, "samples_seen": samples, "batch_size": 8}

    # Two epochs over subsets with 1.34 to 1.44 scans for each patient, rounded to steps of 8.
    alike = [of(200, 284, 568), of(200, 268, 536), of(800, 1109, 2224), of(1600, 2300, 4600)]
    assert ladder._same_length(alike, "unique_records") and not ladder._same_length(alike[1:], "unique_patients")
    assert not ladder._same_length([*alike, of(1600, 2300, 6904)], "unique_records")
    assert ladder._same_length([of(20, 30, 64), of(20, 31, 64)], "unique_records")
