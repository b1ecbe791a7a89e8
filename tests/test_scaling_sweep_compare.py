"""Tables of variants: means, Student intervals and paired differences against values computed by hand."""

import json
import math
from types import SimpleNamespace

import pytest

from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import enabled
from mg3d_jax.scaling.sweep import compare
from mg3d_jax.scaling.sweep import declaration as sweep
from mg3d_jax.training import cost as step_cost

T_2 = 4.302652729911275  # 97.5 % quantile of Student's t with 2 degrees of freedom, from a printed table

FOUND = {
    "all": {0: {"a": 0.70, "b": 1.0}, 1: {"a": 0.80, "b": 2.0}, 2: {"a": 0.75, "b": 6.0}},
    "less": {0: {"a": 0.68}, 1: {"a": 0.79}, 2: {"a": 0.72}},
    "one": {1: {"a": 0.5, "b": math.nan}},
}


def test_means_and_intervals():
    rows = compare.compare(FOUND, ("a", "b"))
    mean = rows[0]["a"]
    assert mean.mean == pytest.approx(0.75) and mean.n == 3
    assert mean.high - mean.mean == pytest.approx(T_2 * 0.05 / math.sqrt(3))
    assert rows[0]["b"].mean == pytest.approx(3.0)
    assert rows[2]["a"].n == 1 and math.isnan(rows[2]["a"].low)
    assert rows[1]["b"].n == 0 and rows[2]["b"].n == 0  # off, and not a number


def test_differences_are_paired_by_seed():
    rows = compare.compare(FOUND, ("a", "b"))
    difference = rows[1]["a difference"]
    assert difference.mean == pytest.approx(-0.02)  # of -0.02, -0.01, -0.03: far tighter than the two intervals
    assert difference.high - difference.mean == pytest.approx(T_2 * 0.01 / math.sqrt(3))
    assert rows[2]["a difference"].mean == pytest.approx(-0.3)  # against seed 1 only
    assert rows[0]["a difference"].n == 0


def test_what_is_written(tmp_path):
    rows = compare.compare(FOUND, ("a", "b"))
    for name in compare.write(tmp_path, rows, ("a", "b")):
        assert (tmp_path / name).stat().st_size > 0
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["reference"] == "all" and document["rows"][1]["b"]["mean"] is None
    text = (tmp_path / "compare.md").read_text()
    assert "| less | 0.730 (0.592 to 0.868); -0.020 (-0.045 to +0.005) | - |" in text
    assert "| one | 0.500; -0.300 | - |" in text


def test_an_unknown_metric_is_an_error():
    with pytest.raises(UserError, match="there are a, b"):
        compare.compare(FOUND, ("c",))


def test_the_default_columns_are_those_that_there_are():
    def sweep_of(*patients):
        runs = tuple(sweep.Run(f"r{n}", "m", n, 0, "base.py", (), "0") for n in patients)
        return sweep.Sweep("test", "a", "n_active", "unique_patients", runs)

    auroc, recall = compare.METRICS[:2]
    assert compare.columns({"m": {0: {auroc: 0.5, "b": 1.0}}}, sweep_of(5)) == (auroc,)
    assert compare.columns({"m": {0: {auroc: 0.5}}}, sweep_of(5), [recall]) == (recall,)  # which `compare` then misses
    both = {compare.of_patients(auroc, n): n / 10 for n in (5, 7)}
    assert compare.columns({"m": {0: both}}, sweep_of(7, 5)) == tuple(both)
    assert compare.compare({"m": {0: both}}, tuple(both))[0][f"{auroc}, 7 patients"].mean == 0.7
    with pytest.raises(UserError, match="choose with --metric: b"):
        compare.columns({"m": {0: {"b": 1.0}}}, sweep_of(5))


def test_multi_task_and_fine_tuning_are_possible_sweeps(tmp_path, monkeypatch):
    """The same FLOPs for all, but for rounding to steps; every method fine-tuned from its own last stage, seed by seed."""

    def cost_of(config, vocab_size=None):
        """Stands in for the tracing of nine models: more objectives, more FLOPs."""
        return SimpleNamespace(training=SimpleNamespace(total=4e8 * len(enabled(config.objectives))))

    monkeypatch.setattr(step_cost, "of_config", cost_of)
    folders = [f"data.{split}=FOLDER" for split in ("train", "valid")]
    declared = sweep.load("configs/sweeps/multitask.py:scratch,seeds=2,patients=300", folders, tmp_path)
    spent: dict[tuple[str, int], float] = {}
    for run in declared.runs:
        config = run.config()
        checks.validate(config)
        method = "mae-then-clip" if run.model == "mae-half" else run.model
        work = cost_of(config).training.total * config.data.batch_size * config.training.steps
        spent[method, run.seed] = spent.get((method, run.seed), 0.0) + work
    assert len(spent) == 16 and list(spent.values()) == pytest.approx([1.65e13] * 16, rel=0.005)
    sweep.write_declaration(tmp_path, declared)
    tuned = sweep.load(f"configs/sweeps/finetune.py:{tmp_path}", folders, tmp_path / "tuned")
    assert len(tuned.runs) == 9 * 3 * 2 and {run.patients for run in tuned.runs} == {3, 30, 300}
    before = {run.id: run for run in declared.runs}
    for run in tuned.runs:
        checks.validate(run.config())
        if run.model == "no-pretraining":
            assert not run.after and not run.config().init_from.path
            continue
        first = before[run.config().init_from.path.rpartition("/")[2]]
        assert (first.model, first.seed) == (run.model, run.seed) and run.after == run.config().init_from.path


def test_the_recipe_is_a_possible_sweep():
    folders = [f"data.{split}=FOLDER" for split in ("train", "valid")]
    declared = sweep.load("configs/sweeps/recipe.py:scratch,steps=700,patients=640,seeds=2", folders)
    steps = {run.model: run.config().training.steps for run in declared.runs}
    assert len(declared.runs) == 6 and steps == {"recipe": 700, "twice": 1400, "shuffled": 700}
    assert {run.model for run in declared.runs if run.config().data.shuffle_reports} == {"shuffled"}


def test_the_ablation_is_a_possible_sweep():
    folders = [f"data.{split}=FOLDER" for split in ("train", "valid")]
    declared = sweep.load("configs/sweeps/ablation.py", folders)
    assert len(declared.runs) == 24
    for run in declared.runs:
        checks.validate(run.config())
