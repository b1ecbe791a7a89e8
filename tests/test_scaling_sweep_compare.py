"""Tables of variants: means, Student intervals and paired differences against values computed by hand."""

import json
import math

import pytest

from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.scaling.sweep import compare
from mg3d_jax.scaling.sweep import declaration as sweep

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


def test_the_ablation_is_a_possible_sweep():
    folders = [f"data.{split}=FOLDER" for split in ("train", "valid")]
    declared = sweep.load("configs/sweeps/ablation.py", folders)
    assert len(declared.runs) == 24
    for run in declared.runs:
        checks.validate(run.config())
