"""Forms, IsoFLOP profiles, metrics of the loss, back-test, advice and registered predictions, through the command."""

import csv
import json

import numpy as np
import pytest
from reference.scaling_tables import CHINCHILLA, grid, typical_law

from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.fit import advise, holdout, isoflop, metric, outputs, registration, solver
from mg3d_jax.scaling.fit.certified import fit_form
from mg3d_jax.scaling.fit.laws import FORMS, ND, Law
from mg3d_jax.scaling.fit.solver import Problem
from mg3d_jax.scaling.fit.table import Row


def write(path, mark=",", **columns):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=mark).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A table and the folder of its fit, with a back-test."""
    folder = tmp_path_factory.mktemp("fitted")
    n, d, loss = grid(typical_law(), noise=0.003, repeats=2)
    table = write(folder / "t.csv", ";", N=n, D=d, loss=loss)
    named = ["--n", "N", "--d", "D", "--loss", "loss", "--out", str(folder / "fit")]
    assert main(["sweep", "fit", "--table", str(table), *named, "--draws", "40", "--holdout-compute", "6e12"]) == 0
    return folder


def repeated():
    """N, U, S where data are seen up to 40 times."""
    n = np.tile(np.repeat(np.geomspace(5e7, 2e9, 4), 4), 3)
    u = np.repeat([1e9, 4e9, 1.6e10], 16)
    return {"N": n, "U": u, "S": u * np.tile([1, 4, 16, 40], 12)}


X = {"x": np.geomspace(1e3, 1e7, 9)}
VALUES = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.366, "gamma": 0.35}
VALUES |= {"P": 0.002, "delta": 1.2, "kappa": 0.8, "R": 15.4}


@pytest.mark.parametrize("name", ["nd-tied", "nd-no-floor", "x", "x-no-floor", "nus-1", "nus-effective"])
def test_every_form_is_recovered(name):
    form = FORMS[name]
    columns = X if form.variables == ("x",) else repeated()
    if "D" in form.variables:
        columns = {"N": columns["N"], "D": columns["S"]}
    truth = Law.of(form, **{key: VALUES[key] for key in form.parameters})
    fit = fit_form(form, columns, truth(*columns.values()), raw=name == "nd-tied")
    np.testing.assert_allclose(fit.law.values, truth.values, rtol=1e-4)
    assert not fit.not_identified


def test_the_cost_of_repeats_is_what_it_says():
    law = Law.of(FORMS["nus"], **{key: VALUES[key] for key in FORMS["nus"].parameters})
    once = 1.8 + 480 / 1e9**0.35 + 2000 / 4e10**0.366
    assert law(1e9, 4e10, 4e10) == pytest.approx(once)
    assert law(1e9, 1e10, 4e10) == pytest.approx(once + 0.002 * 3**1.2 * (1e9 / 1e10) ** 0.8)
    columns = repeated() | {"U": repeated()["S"]}
    assert "cost of repeats" in fit_form(FORMS["nus"], columns, law(*columns.values())).refusal


def test_repeated_data_are_worth_what_the_paper_says():
    """Muennighoff et al. 2023: of R = 15.4, four epochs are nearly as good as new, and forty are worth about fifteen."""
    law = Law.of(FORMS["nus-effective"], **{key: VALUES[key] for key in FORMS["nus-effective"].parameters})
    for epochs in (1, 4, 40):
        worth = 1e9 * (1 + 15.4 * (1 - np.exp(-(epochs - 1) / 15.4)))
        assert law(1e9, 1e9, epochs * 1e9) == pytest.approx(1.8 + 480 / 1e9**0.35 + 2000 / worth**0.366, rel=1e-12)
    columns, form = repeated(), FORMS["nus-effective"]
    problem = Problem.of(form, columns, law(*columns.values()))
    theta = problem.theta(law)[None] + 0.02 * np.random.default_rng(1).normal(size=(1, 6))
    ones, wide, step = np.ones((1, 48)), np.full(1, 1e-2), 1e-6
    gradient, hessian, _ = solver.derivatives(theta, ones, problem, wide)
    for k, one in enumerate(step * np.eye(6)):
        up, down = (solver.value(theta + sign * one, ones, problem, wide)[0] for sign in (1, -1))
        assert gradient[0, k] == pytest.approx((up - down) / (2 * step), rel=1e-5)
        up, down = (solver.derivatives(theta + sign * one, ones, problem, wide)[0][0] for sign in (1, -1))
        np.testing.assert_allclose(hessian[0, k], (up - down) / (2 * step), rtol=1e-4)


def test_held_out_runs_choose_between_forms_of_repeated_data():
    law = Law.of(FORMS["nus-effective"], **{key: VALUES[key] for key in FORMS["nus-effective"].parameters})
    columns = repeated()
    loss = law(*columns.values()) * np.exp(0.002 * np.random.default_rng(0).normal(size=48))
    rows = [
        Row(f"{k}", {name: values[k] for name, values in columns.items()}, loss[k], compute=6 * columns["N"][k] * s)
        for k, s in enumerate(columns["S"])
    ]
    result = outputs.fit_rows(rows, outputs.Options(form=FORMS["nus-effective"], draws=20))
    low, high = result.drawn.interval("R", 90)
    assert low < result.fit.law["R"] < high and result.fit.law["R"] == pytest.approx(15.4, rel=0.15)
    found = holdout.back_test(
        rows,
        FORMS["nus-effective"],
        2e20,
        lambda below: outputs.fit_rows(below, outputs.Options(FORMS["nus-effective"], 0)),
    )
    scores = {one.method: one.log_rmse for one in found.scores}
    assert scores["the law"] < min(scores["form nus-1"], scores["repeats as good as new"])


def test_isoflop_minima_and_their_flags():
    """Tied exponents have symmetric profiles: parabolas find the optimum, which goes as C^0.5."""
    law = Law.of(ND, E=1.0, A=400.0, B=400.0, alpha=0.35, beta=0.35)
    compute = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
    n = np.sqrt(compute / 6) * np.tile(np.geomspace(0.5, 2, 7), 4)
    found = isoflop.isoflop(n, compute, law(n, compute / (6 * n)))
    assert found.exponent == pytest.approx(0.5, abs=1e-3) and found.optimum(1e22) == pytest.approx(
        (1e22 / 6) ** 0.5, rel=0.01
    )
    edge = isoflop.isoflop(n * 4, compute, law(n * 4, compute / (24 * n)))
    assert edge.exponent is None and all("edge" in one.flag for one in edge.profiles)
    bent = isoflop.isoflop(n, compute, 10 - law(n, compute / (6 * n)))
    assert all("no minimum" in one.flag for one in bent.profiles)


def test_a_metric_of_the_loss():
    loss = np.linspace(0.5, 3, 12)
    values = 0.5 + 0.45 / (1 + np.exp(2.5 * (loss - 1.4)))
    best = metric.fit_metric(loss, values, chance=0.5, ceiling=0.95)[0]
    assert (best.shape, best.k, best.L0) == ("sigmoid", pytest.approx(2.5, rel=1e-4), pytest.approx(1.4, rel=1e-4))
    with pytest.raises(ValueError, match="below the ceiling"):
        metric.fit_metric(loss, values, chance=1.0, ceiling=0.9)


def test_the_optimum_is_that_of_the_closed_form():
    """Hoffmann et al. 2022, equation 4: N = G (C / 6)^(beta / (alpha + beta))."""
    law, c = CHINCHILLA, 5.76e23
    power = 1 / (law.alpha + law.beta)
    best_n = (law.alpha * law.A / (law.beta * law.B)) ** power * (c / 6) ** (law.beta * power)
    ladder = advise.continuous_ladder(1e8, 1e10)
    found = advise.advise(Law.of(ND, **law.as_dict()), np.zeros((0, 5)), ladder, c, largest_fitted=1e22)
    assert found.best.n == pytest.approx(best_n, rel=0.05) and found.best.regret == 0
    far = advise.advise(Law.of(ND, **law.as_dict()), np.zeros((0, 5)), ladder, c, largest_fitted=1e21)
    assert "guess" in far.refusal and far.best is None
    few = advise.advise(Law.of(ND, **law.as_dict()), np.zeros((0, 5)), ladder, c, largest_fitted=1e22, unique_data=1e9)
    assert max(one.d for one in few.choices) <= 1e9 and any("unspent" in text for text in few.warnings)
    short = advise.advise(Law.of(ND, **law.as_dict()), np.zeros((0, 5)), ladder[:5], c, largest_fitted=1e22)
    assert any("largest of the ladder" in text for text in short.warnings)


def test_the_back_test_shows_naive_guesses_beside_the_law(fitted):
    document = json.loads((fitted / "fit" / "fit.json").read_text())
    tested = document["back_test"]
    scores = {one["method"]: one["log_rmse"] for one in tested["scores"]}
    assert {"the law", "last loss of the same run or size", "nearest run", "power law of the compute"} <= set(scores)
    assert scores["the law"] == min(scores.values()) and tested["fitted"] + tested["held_out"] == 50
    page = (fitted / "fit" / "fit.html").read_text()
    assert "Held-out runs" in page and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    with (fitted / "fit" / "draws.csv").open() as file:
        assert len(list(csv.reader(file))) == 41


def test_advice_and_predictions_of_a_fit(fitted, capsys):
    fit = ["--fit", str(fitted / "fit")]
    assert main(["sweep", "advise", *fit, "--compute", "1e15"]) == 0
    assert "80 % interval: N" in capsys.readouterr().out
    assert main(["sweep", "advise", *fit, "--device-hours", "1", "--flops-per-second", "1e12"]) == 0
    assert main(["sweep", "advise", *fit, "--compute", "1e18"]) == 3
    assert "is a guess" in capsys.readouterr().err
    out = fitted / "big.json"
    assert main(["sweep", "predict", *fit, "--at", "N=3e8", "--at", "D=3e5", "--register", str(out)]) == 0
    digest = json.loads(out.read_text())["sha256"]
    assert digest in capsys.readouterr().out
    predicted = json.loads(out.read_text())["predicted"]
    assert predicted == pytest.approx(float(typical_law()(3e8, 3e5)), rel=0.02)
    assert main(["sweep", "check", str(out), "--measured", repr(predicted * 1.002), "--digest", digest[:12]]) == 0
    assert main(["sweep", "check", str(out), "--measured", repr(predicted * 1.2)]) == 3
    assert "OUTSIDE the 90 %" in capsys.readouterr().out
    assert main(["sweep", "predict", *fit, "--at", "N=3e8", "--at", "D=3e5", "--register", str(out)]) == 2
    out.write_text(out.read_text().replace('"extrapolation"', '"extrapolation "'))
    assert main(["sweep", "check", str(out), "--measured", repr(predicted)]) == 2
    assert "was changed after it was registered" in capsys.readouterr().err
    with pytest.raises(UserError, match="no registered prediction"):
        registration.read(fitted / "fit" / "fit.json")


def test_what_cannot_be_fitted_is_a_clear_error(fitted, capsys):
    table, out = ["--table", str(fitted / "t.csv"), "--loss", "loss"], ["--out", str(fitted / "x")]
    assert main(["sweep", "fit", *table, "--n", "N", "--d", "N", *out]) == 2
    assert "'N' is named twice" in capsys.readouterr().err
    assert main(["sweep", "fit", *table, "--n", "N", "--d", "D", "--out", str(fitted / "t.csv")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert main(["sweep", "fit", *table, "--form", "x", "--n", "N", "--x", "D", *out]) == 2
    assert "takes no --n" in capsys.readouterr().err
    assert main(["sweep", "fit", *table, "--form", "isoflop", "--n", "N", "--compute", "D", *out]) == 3
    assert "0 budgets have a minimum" in capsys.readouterr().err  # at one D the largest model is the best
    tabs = write(fitted / "tabs.csv", "\t", auroc=np.linspace(0.9, 0.6, 8), loss=np.linspace(1, 2, 8))
    named = ["--form", "metric", "--x", "loss", "--loss", "auroc", "--chance", "0.5", "--draws", "20"]
    assert main(["sweep", "fit", "--table", str(tabs), *named, "--out", str(fitted / "m")]) == 0
    assert json.loads((fitted / "m" / "fit.json").read_text())["shapes"][0]["rmse"] < 0.02
