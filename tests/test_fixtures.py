"""What version 0.1.0 wrote (`tests/fixtures/v0.1.0`) means the same now."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from support import ROOT

from mg3d_jax import config as config_lib

FIXTURE = ROOT / "tests" / "fixtures" / "v0.1.0"
EXPECTED = json.loads((FIXTURE / "expected_initial.json").read_text())


def initial():
    spec = importlib.util.spec_from_file_location("initial", FIXTURE / "initial.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", EXPECTED)
def test_initial_parameters_losses_and_gradients_are_those_of_the_first_version(case):
    """With its masks, views and dropout: the random streams are the same."""
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
