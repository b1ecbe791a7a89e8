"""Laws that bend to the loss of guessing: derivatives, laws that are found again, and the command."""

import csv
import json
import math

import numpy as np
import pytest
from test_scaling_fit_forms import write

from mg3d_jax.commands.main import main
from mg3d_jax.scaling.fit import simulate, solver
from mg3d_jax.scaling.fit.certified import fit_form
from mg3d_jax.scaling.fit.laws import FORMS, ND, Law, with_chance
from mg3d_jax.scaling.fit.simulate import Design
from mg3d_jax.scaling.fit.solver import Problem
from mg3d_jax.scaling.fit.table import Row
from mg3d_jax.scaling.sweep import collect

CHANCE = math.log(128)
BOUNDED = with_chance(ND, CHANCE)
N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e5, 1e7, 4), np.geomspace(100, 10_000, 5)))


def law(sharpness: float = 3.0) -> Law:
    return Law.of(BOUNDED, E=0.4, A=0.8 * 1e6**0.5, B=1.2 * 1500**0.7, alpha=0.5, beta=0.7, k=sharpness)


def test_it_is_the_law_far_below_chance_and_chance_far_above():
    plain = Law.of(ND, **{name: law()[name] for name in ND.parameters})
    far, near = (1e12, 1e9), (1e2, 1e-3)
    assert law()(*far) == pytest.approx(float(plain(*far)), rel=1e-3)
    assert law()(*near) == pytest.approx(CHANCE, rel=1e-6) and plain(*near) > 100
    by_hand = (plain(N, D) ** -3.0 + CHANCE**-3.0) ** (-1 / 3.0)
    np.testing.assert_allclose(law()(N, D), by_hand, rtol=1e-12)


@pytest.mark.parametrize("raw", [False, True])
def test_derivatives_are_those_of_the_objective(raw):
    rng = np.random.default_rng(0)
    problem = Problem.of(BOUNDED, {"N": N, "D": D}, law()(N, D) * np.exp(0.02 * rng.normal(size=len(N))), raw=raw)
    theta = problem.theta(law())[None] + 0.05 * rng.normal(size=(1, 6))
    weights, delta, step = np.ones((1, len(N))), np.full(1, 0.5), 1e-5
    gradient, hessian, _ = solver.derivatives(theta, weights, problem, delta)
    for k, move in enumerate(step * np.eye(6)[:, None]):
        up, down = (solver.value(theta + s * move, weights, problem, delta)[0] for s in (1, -1))
        assert gradient[0, k] == pytest.approx((up - down) / (2 * step), rel=1e-6)
        up, down = (solver.derivatives(theta + s * move, weights, problem, delta)[0][0] for s in (1, -1))
        np.testing.assert_allclose(hessian[0, k], (up - down) / (2 * step), atol=1e-6 * np.abs(hessian).max())


@pytest.mark.parametrize("name, sharpness", [("nd", 1.2), ("nd", 6.0), ("nd-tied", 3.0), ("x", 2.0), ("nus-1", 3.0)])
def test_laws_are_found_again(name, sharpness):
    form = with_chance(FORMS[name], CHANCE)
    values = {"E": 0.4, "A": 0.8 * 1e6**0.5, "B": 1.2 * 1500**0.7, "alpha": 0.5, "beta": 0.7, "gamma": 0.5, "P": 1e-4}
    if name == "nd-tied":
        values["B"] = 1.2 * 1500**0.5
    columns = {"N": N, "D": D, "x": np.geomspace(1e4, 1e8, len(N)), "U": D, "S": D}
    if name == "nus-1":
        columns = {key: np.tile(value, 3) for key, value in columns.items()}
        columns["S"] = columns["U"] * np.repeat([1.0, 4.0, 16.0], len(N))
    columns = {key: columns[key] for key in form.variables}
    truth = Law.of(form, **{key: values.get(key, sharpness) for key in form.parameters})
    found = fit_form(form, columns, truth(*columns.values()))
    np.testing.assert_allclose(found.law.values, truth.values, rtol=1e-4)
    assert not found.not_identified


def test_intervals_cover_the_truth():
    found = simulate.simulate(Design("near chance", run=0.02, chance=CHANCE), 6, 30)
    assert found.intervals == 6 and np.mean(list(found.coverage.values())) > 0.7


def test_no_run_below_chance_is_no_law():
    found = fit_form(BOUNDED, {"N": N, "D": D}, np.full(len(N), 4.9) + np.linspace(0, 0.1, len(N)))
    assert found.law is None and "no run is below chance, 4.852: the smallest loss is 4.9" in found.refusal


def test_the_command_predicts_from_it(tmp_path, capsys):
    rng = np.random.default_rng(1)
    n, d = np.tile(N, 2), np.tile(D, 2)
    loss = law()(n, d) * np.exp(0.01 * rng.normal(size=len(n)))
    table = write(tmp_path / "t.csv", N=n, D=d, loss=loss)
    named = [
        "--table",
        str(table),
        "--n",
        "N",
        "--d",
        "D",
        "--loss",
        "loss",
        "--draws",
        "40",
        "--holdout-compute",
        "2e10",
    ]
    assert main(["sweep", "fit", *named, "--out", str(tmp_path / "fit"), "--chance", repr(CHANCE)]) == 0
    assert "+ 4.852^-k)^(-1/k)" in capsys.readouterr().out
    document = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert document["chance"] == CHANCE and document["params"]["k"] == pytest.approx(3, rel=0.3)
    scores = {one["method"]: one["log_rmse"] for one in document["back_test"]["scores"]}
    assert scores["the law"] < 0.3 * scores["the law without a chance level"]
    with (tmp_path / "fit" / "draws.csv").open() as file:
        assert next(csv.reader(file)) == ["E", "A", "B", "alpha", "beta", "k"]
    at = ["--fit", str(tmp_path / "fit"), "--at", "N=1e5", "--at", "D=50"]
    assert main(["sweep", "predict", *at]) == 0  # near chance, where the terms alone are twice as much
    said = capsys.readouterr().out
    assert float(said.split("D 50: ")[1].split(",")[0]) == pytest.approx(float(law()(1e5, 50)), rel=0.02)
    assert main(["sweep", "fit", *named, "--out", str(tmp_path / "x"), "--chance", "-1"]) == 2
    assert "--chance -1: the loss of guessing is above 0" in capsys.readouterr().err
    isoflop = [*named[:4], "--loss", "loss", "--form", "isoflop", "--compute", "D", "--out", str(tmp_path / "x")]
    assert main(["sweep", "fit", *isoflop, "--chance", "4"]) == 2


def test_runs_near_chance_are_said():
    extra = {"evaluation/pool_loss/pool": 128.0}
    rows = [Row(f"{k}", {"N": 1.0, "D": 1.0}, value, extra=extra) for k, value in enumerate((4.7, 4.1, 2.0))]
    said = collect._near_chance(rows, "evaluation/pool_loss")
    assert len(said) == 1 and "2 of 3 runs are within 20% of chance, 4.852" in said[0] and "--chance 4.85203" in said[0]
    assert not collect._near_chance(rows[2:], "evaluation/pool_loss") and not collect._near_chance(
        rows, "valid/alignment"
    )
