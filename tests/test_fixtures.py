"""What version 0.1.0 wrote (`tests/fixtures/v0.1.0`) means the same now. Its evaluation: `test_evaluation_plugins.py`."""

from __future__ import annotations

import importlib.util
import json
import shutil

import nibabel
import numpy as np
import pytest
from support import ROOT, mg3d

from mg3d_jax import config as config_lib
from mg3d_jax.commands.main import main
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.training.writers import read_metrics

FIXTURE = ROOT / "tests" / "fixtures" / "v0.1.0"
EXPECTED = json.loads((FIXTURE / "expected_initial.json").read_text())


def initial():
    spec = importlib.util.spec_from_file_location("initial", FIXTURE / "initial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", sorted(EXPECTED.keys() - {"run"}))
def test_initial_parameters_losses_and_gradients_are_those_of_the_first_version(case):
    """With its masks, views and dropout: the random streams are the same. Of the case "run", steps are compared below."""
    module, expected = initial(), EXPECTED[case]
    config = config_lib.replace(config_lib.read(FIXTURE / "run" / "config.json"), module.CASES[case])
    found = module.measure(config)
    assert found["parameters"].keys() == expected["parameters"].keys()
    for name, sums in expected["parameters"].items():
        np.testing.assert_allclose(found["parameters"][name], sums, rtol=1e-6, atol=1e-6, err_msg=name)
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        np.testing.assert_allclose(found["metrics"][name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, square in expected["gradients"].items():
        np.testing.assert_allclose(found["gradients"][name], square, rtol=1e-3, atol=1e-10, err_msg=name)


@pytest.fixture
def run(tmp_path):
    """A copy of the run, which was killed after its checkpoint of step 3 of 6."""
    return shutil.copytree(FIXTURE / "run", tmp_path / "run")


def command(*words):
    assert main([str(word) for word in words]) == 0


def test_a_run_is_resumed_with_the_same_losses(run):
    data = [f"--config.data.{split}={FIXTURE / split}" for split in ("train", "valid")]
    done = mg3d("train", "--config", str(FIXTURE / "config.py"), "--workdir", str(run), *data, timeout=550)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 3 of 6" in done.stderr and "damaged" not in done.stderr
    expected = [json.loads(line) for line in (FIXTURE / "expected_metrics.jsonl").read_text().splitlines()]
    found = read_metrics(run)
    assert [(line["step"], line["split"]) for line in found] == [(line["step"], line["split"]) for line in expected]
    for line, before in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(before["loss"], rel=1e-4)
    code = json.loads((run / "summary.json").read_text())["code"]
    environment = json.loads((run / "environment.json").read_text())
    assert code == {name: environment[name] for name in ("mg3d_jax", "commit")}


def test_a_run_is_reported_and_exported(run, tmp_path):
    command("report", run)
    assert "0.1.0" in (run / "report.html").read_text()
    command("export", "--workdir", run, "--out", tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_a_run_shows_where_a_sentence_looks(run, tmp_path):
    scan = phantoms.make_patient(5, 0, "valid").scans[0].reconstructions[0]
    (tmp_path / "scan.nii.gz").write_bytes(nifti_bytes(scan.hu, scan.affine))
    words = ["--volume", tmp_path / "scan.nii.gz", "--text", "No nodule.", "--out", tmp_path / "attend"]
    command("attend", "--workdir", run, *words)
    assert nibabel.load(tmp_path / "attend" / "map.nii.gz").shape == scan.hu.shape
