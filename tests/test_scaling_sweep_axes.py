"""Axes and rules of a sweep: subsets by seed, several lengths, a setting that follows the size, and its check at both ends."""

from __future__ import annotations

import math
import re

import pytest
from test_scaling_sweep import SWEEP_FILE, declared, outcome, project, settings  # noqa: F401  (a fixture)

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.scaling.fit import table
from mg3d_jax.scaling.sweep import collect, plan, rate_check, states
from mg3d_jax.training import cost as step_cost

RATE = "optimizer.learning_rate"


def change(project, *lines):  # noqa: F811
    """The sweep with more keys, and with three sizes."""
    text = SWEEP_FILE.replace('("plain", "wider"))', '("plain", "wider", "wide"))')
    (project / "sweep.py").write_text(
        text.replace("    if arg", "".join(f"    {line}\n" for line in lines) + "    if arg")
    )
    return declared(project)


def test_seeds_draw_their_subset_and_old_sweeps_keep_their_ids(project):  # noqa: F811
    before = declared(project)
    both = change(project, "sweep.seeds = (0, 1)", "sweep.subset_seeds = (0, 7)")
    assert {(run.seed, run.subset) for run in both.runs} == {(0, 0), (1, 7)}
    assert {run.id for run in before.runs} < {run.id for run in both.runs}
    assert all(run.config().data.subset_seed == run.subset for run in both.runs)
    assert {one.records for one in plan.plan(both, project / "work")} == {40, 80}
    with pytest.raises(UserError, match="one for each of the seeds"):
        change(project, "sweep.subset_seeds = (1, 2)")


def test_several_lengths_are_an_axis(project):  # noqa: F811
    found = change(project, 'sweep.length = ("samples", (160, 320))')
    assert len(found.runs) == 3 * 2 * 2 and len({run.id for run in found.runs}) == 12
    assert all(run.config().training.samples == run.length for run in found.runs)
    with pytest.raises(UserError, match="kind one of"):
        change(project, 'sweep.length = ("samples", ())')


def test_a_setting_follows_the_size(project):  # noqa: F811
    found = change(project, f'sweep.rule = (("{RATE}", 1e-3, 1000, -0.5),)')
    for run in found.runs:
        config = run.config()
        size = step_cost.of_config(config).sizes.n_active
        assert config.optimizer.learning_rate == pytest.approx(1e-3 * math.sqrt(1000 / size), rel=1e-3)
    with pytest.raises(UserError, match="follows the rule"):
        change(project, f'sweep.rule = (("{RATE}", 1e-3, 1000, -0.5),)', f'sweep.overrides += (("{RATE}", 1e-4),)')
    with pytest.raises(UserError, match="reference size, exponent"):
        change(project, f'sweep.rule = (("{RATE}", 1e-3),)')


@pytest.fixture
def checked(project):  # noqa: F811
    return change(project, f'sweep.check = ("{RATE}", (0.5, 1, 2))')


def rows_of(sweep, workdir, loss):
    """Rows of finished runs whose loss is `loss(run)`."""
    for run in sweep.runs:
        done = outcome(run)["summary"]
        done["final"] |= {sweep.loss: loss(run)}
        states.run_folder(workdir, run).mkdir(parents=True)
        write_json(states.run_folder(workdir, run) / states.SUMMARY_FILE, done)
    return collect.rows(workdir, sweep, sweep.loss)


def test_a_check_adds_runs_at_both_ends(checked):
    extra = [run for run in checked.runs if run.factor != 1]
    assert [(run.model, run.factor, run.patients) for run in extra] == [
        ("plain", 0.5, 40), ("plain", 2.0, 40), ("wide", 0.5, 40), ("wide", 2.0, 40)
    ]  # fmt: skip
    rate = config_lib.default().optimizer.learning_rate
    assert [run.config().optimizer.learning_rate for run in extra] == [0.5 * rate, 2 * rate] * 2
    assert [(run.model, run.patients) for run in checked.runs if run.check and run.factor == 1] == [
        ("plain", 40),
        ("wide", 40),
    ]


@pytest.mark.parametrize(
    ("best", "says"),
    [
        (1.0, None),
        (2.0, r"wide is best with optimizer\.learning_rate times 2, the largest factor"),
        (0.5, "the smallest factor"),
    ],
)
def test_an_optimum_at_the_edge_refuses_the_law(checked, tmp_path, best, says):
    def loss(run):  # the largest is best at `best`, the smallest at 1
        return 1.0 + 0.02 * abs(math.log(run.factor / (best if run.model == "wide" else 1.0)))

    rows = rows_of(checked, tmp_path, loss)
    assert len(table.used(rows)) == 6  # the grid; not the checks
    refused, said = collect.objections(checked, rows, checked.loss)
    if says is None:
        assert refused is None and not said
    else:
        assert refused is not None and "the largest model is not tuned" in refused
        assert re.search(says, refused)


def test_what_a_rule_costs_and_what_is_missing_is_said(checked, tmp_path):
    rows = rows_of(checked, tmp_path, lambda run: 1.0 + 0.1 * (math.log(run.factor) - 0.33) ** 2)
    small, large = rate_check.checks(checked, rows, checked.loss, "n_active")
    assert (small.model, large.model) == ("plain", "wide") and small.size < large.size
    assert large.inside and large.cost == pytest.approx(0.1 * 0.33**2, rel=1e-3)
    assert "1.1 % lower with another optimizer.learning_rate" in large.problem()
    lost = next(run for run in checked.runs if run.model == "wide" and run.factor == 2)
    (states.run_folder(tmp_path, lost) / states.SUMMARY_FILE).unlink()
    refused, _ = collect.objections(checked, collect.rows(tmp_path, checked, checked.loss), checked.loss)
    assert refused is not None and "no loss for optimizer.learning_rate times 2" in refused


@pytest.mark.parametrize("wrong", ["(0.5, 2)", "(1, 2, 4)", "(1,)", "2"])
def test_a_check_needs_factors_on_both_sides(project, wrong):  # noqa: F811
    with pytest.raises(UserError, match="1 among them"):
        change(project, f'sweep.check = ("{RATE}", {wrong})')


def test_a_weighted_sum_has_no_law(project, tmp_path):  # noqa: F811
    found = change(project, 'sweep.loss = "valid/loss"', 'sweep.overrides += (("objectives.matching.weight", 0.1),)')
    refused, _ = collect.objections(found, rows_of(found, tmp_path, lambda run: 1.0), found.loss)
    assert refused is not None and "weighted sum of alignment, matching" in refused


TRUNKS = (
    'sweep.length = ("samples", (80, 160, 320))', "sweep.trunks = True", "sweep.patients = (20,)",
    'sweep.overrides += (("schedule.kind", "constant"), ("schedule.warmup_steps", 2), ("schedule.warmup_percent", 0.0))',
)  # fmt: skip


def test_shorter_runs_are_branches_of_the_longest(project):  # noqa: F811
    found = change(project, *TRUNKS)
    trunks = {run.model: run for run in found.runs if run.length == 320}
    assert [run.model for run in found.runs[:3]] == list(trunks) and not any(run.after for run in trunks.values())
    for run in found.runs[3:]:
        config, trunk = run.config(), trunks[run.model]
        steps = int(run.length) // 8
        assert run.begins == steps - round(0.2 * steps)  # the cooldown is a fifth of each run
        assert run.after.endswith(trunk.id) and config.init_from.path == f"{run.after}@{run.begins}"
        assert config.init_from.whole and trunk.config().training.keep_steps == (8, 16)
    costs = {run.run.id: run for run in plan.plan(found, project / "work")}
    for run in found.runs:
        assert (
            costs[run.id].training_flops == (costs[run.id].steps - run.begins) * 8 * costs[run.id].cost.training.total
        )
    elsewhere = declared(project)
    assert [run.id for run in elsewhere.runs] == [run.id for run in found.runs]


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        (('("schedule.kind", "constant")', '("schedule.kind", "cosine")'), r'need schedule\.kind = "constant"'),
        (('("schedule.warmup_percent", 0.0)', '("schedule.cooldown_percent", 0.0)'), "need schedule"),
        (('("schedule.warmup_steps", 2)', '("schedule.warmup_steps", 8)'), "is over before its warm-up of 8 steps"),
        (('"samples", (80, 160, 320)', '"epochs", (1, 2)'), "a length in steps or samples"),
    ],
)
def test_what_is_no_trunk_is_said(project, replaced, says):  # noqa: F811
    with pytest.raises(UserError, match=says):
        change(project, *(line.replace(*replaced) for line in TRUNKS))


def test_a_plan_says_hours_memory_and_how_sure_the_law_will_be(project, capsys):  # noqa: F811
    change(project, "sweep.patients = (20, 40, 80)", "sweep.seeds = (0, 1)", "sweep.subset_seeds = (1, 2)")
    words = ["sweep", "plan", "--config", str(project / "sweep.py"), "--workdir", str(project / "work")]
    words += [word for setting in settings(project) for word in ("--set", setting)]
    assert main([*words, "--device", "H100", "--devices", "8", "--utilisation", "0.4"]) == 0
    text = capsys.readouterr().out
    assert "8 x H100 at 40 % of 989 TFLOP/s" in text and "device-hours" in text and "GiB" in text
    assert "alpha to" in text and "simulated sweeps" in text and "subset_seeds" not in text
    assert main([*words, "--device", "abacus"]) == 2 and "known are B200" in capsys.readouterr().err
    assert main([*words, "--flops-per-second", "1e12", "--noise", "0"]) == 2


def test_a_small_plan_is_not_enough(project, capsys):  # noqa: F811
    words = ["sweep", "plan", "--config", str(project / "sweep.py"), "--workdir", str(project / "work")]
    assert main([*words, *(word for setting in settings(project) for word in ("--set", setting))]) == 0
    text = capsys.readouterr().out
    assert "not enough: 4 distinct usable runs" in text and "nothing checks the learning rate" in text
    assert "evaluation/pool_loss" in text
