"""`mg3d sweep fit --table`: rows, files and messages."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from reference.scaling_tables import PARAMETERS, Law, grid, objective, typical_law

from mg3d_jax.commands.main import main
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.fit import table


@pytest.fixture
def runs(tmp_path):
    """A table of 25 good rows and four bad ones."""
    path = tmp_path / "runs.csv"
    n, d, loss = grid(typical_law(), noise=0.01)
    lines = [["model", "params", "scans", "valid loss"]]
    lines += [[f"m{i}", *row] for i, row in enumerate(zip(n, d, loss, strict=True))]
    lines += [["a", 1e6, 1e3, "nan"], ["b", -2, 1e3, 2.0], ["c", "many", 1e3, 2.0], ["d", 1e6]]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def arguments(path, out, *more):
    named = ["--n", "params", "--d", "scans", "--loss", "valid loss"]
    return ["sweep", "fit", "--table", str(path), *named, "--out", str(out), *more]


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_writes_the_fit_the_rows_and_the_plots(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(runs, out, "--draws", "60")) == 0
    fit = json.loads((out / "fit.json").read_text())
    assert fit["status"] == "fitted" and set(fit["params"]) == set(PARAMETERS)
    used = [row for row in read(out / "runs.csv") if row["status"] == "used"]
    n, d, loss = (np.asarray([float(row[name]) for row in used]) for name in ("N", "D", "loss"))
    assert fit["objective"] == pytest.approx(objective(Law(**fit["params"]), n, d, loss), rel=1e-9)
    for name, value in fit["params"].items():
        (low, high), (wide_low, wide_high) = fit["intervals"][name]["80"], fit["intervals"][name]["90"]
        assert wide_low <= low <= high <= wide_high
        assert wide_low <= value <= wide_high
    predicted = [float(row["predicted"]) for row in used]
    np.testing.assert_allclose(predicted, Law(**fit["params"])(n, d), rtol=1e-12)
    for stem in ("loss_vs_n", "loss_vs_d", "residuals", "predicted_vs_actual"):
        assert (out / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert len(read(out / f"{stem}.csv")) >= 25
    assert "25 used, 4 excluded, 0 missing" in capsys.readouterr().out


def test_every_bad_row_is_named_with_its_reason(runs, tmp_path):
    main(arguments(runs, tmp_path / "out", "--draws", "0"))
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert [one["run"] for one in fit["excluded"]] == [f"row {i} (line {i + 1})" for i in (26, 27, 28, 29)]
    reasons = [one["reason"] for one in fit["excluded"]]
    assert reasons[0] == "valid loss is NaN or empty"
    assert reasons[1] == "params is -2; it must be > 0"
    assert reasons[2] == "params is 'many', not a number"
    assert reasons[3] == "2 cells, the header has 4"
    assert [row["status"] for row in read(tmp_path / "out" / "runs.csv")] == ["used"] * 25 + ["excluded"] * 4


def test_too_few_rows_write_a_refusal_and_the_data(tmp_path, capsys):
    path, out = tmp_path / "four.csv", tmp_path / "out"
    path.write_text("params,scans,valid loss\n1e6,100,3\n1e6,1000,2.5\n1e7,100,2.6\n1e7,1000,2\n")
    assert main(arguments(path, out)) == 3
    fit = json.loads((out / "fit.json").read_text())
    assert fit["status"] == "refused" and "at least 8" in fit["refusal"]
    assert set(fit["params"].values()) == {None}
    assert (out / "loss_vs_n.png").exists() and not (out / "residuals.png").exists()
    assert "not identified" in capsys.readouterr().out


def test_a_term_at_zero_has_no_value(tmp_path):
    path, out = tmp_path / "flat.csv", tmp_path / "out"
    n, d, loss = grid(Law(**(typical_law().as_dict() | {"B": 0.0})), noise=0.0)
    path.write_text("params,scans,valid loss\n" + "".join(f"{a},{b},{c}\n" for a, b, c in zip(n, d, loss, strict=True)))
    main(arguments(path, out, "--draws", "20"))
    fit = json.loads((out / "fit.json").read_text())
    assert fit["params"]["B"] is None and fit["params"]["beta"] is None
    assert fit["estimate"]["B"] == 0
    assert fit["params"]["alpha"] == pytest.approx(0.4, rel=1e-4)
    assert any("B is not identified" in warning for warning in fit["warnings"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,scans\n1,2\n", "no column 'valid loss'. Columns: params, scans"),
        ("", "the table is empty"),
        ("params,scans,valid loss\n", "no usable row"),
        ("params,scans,valid loss\n1,2,nan\n", "row 1 .line 2.: valid loss is NaN"),
        ("params,params,scans,valid loss\n1,1,2,3\n", "more than once"),
    ],
)
def test_unusable_tables_are_clear_errors(text, message, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        table.read_table(path, {"N": "params", "D": "scans"}, "valid loss")


def test_missing_files_and_options_are_clear_errors(tmp_path, capsys):
    assert main(arguments(tmp_path / "none.csv", tmp_path / "out")) == 2
    assert "none.csv" in capsys.readouterr().err
    assert main(["sweep", "fit", "--table", "t.csv", "--n", "N"]) == 2
    assert "--d, --loss, --out" in capsys.readouterr().err
    assert main(["sweep", "fit"]) == 2


def test_columns_that_group_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("﻿n,d,l,seed,cell\n1,2,3,0,x\n1,2,3.1,1,x\n", encoding="utf-8")
    rows = table.read_table(path, {"N": "n", "D": "d"}, "l", ["cell", "seed"])
    assert [row.group for row in rows] == ["x | 0", "x | 1"]


def test_fitting_a_table_never_imports_jax(runs, tmp_path):
    code = (
        "import sys; from mg3d_jax.commands.main import main; sys.modules['jax'] = None\n"
        f"raise SystemExit(main({arguments(runs, tmp_path / 'out', '--draws', '5')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
