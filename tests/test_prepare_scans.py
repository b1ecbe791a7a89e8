"""Where a scan is placed: as the training data of a run were."""

import pytest

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import PAPER_FRACTION, Grid
from mg3d_jax.prepare.scans import trained_grid
from mg3d_jax.training.run_folder import shared_settings

SIZE, SPACING = (16, 16, 16), (2.0, 2.0, 3.0)


def test_settings_of_several_folders():
    lung, center = {"policy": "lung", "fraction": None, "window": None}, {"policy": "center", "modality": "MR"}
    assert shared_settings([lung, lung]) == {**lung, "modality": None, "mixed": []}
    both = shared_settings([lung, center])
    assert both == {"fraction": None, "window": None, "mixed": ["modality", "policy"]}
    with pytest.raises(UserError, match="more than one policy"):
        trained_grid(SIZE, both, SPACING)
    assert trained_grid(SIZE, both, SPACING, "lung") == Grid(SIZE, SPACING, "lung")


def test_the_grid_of_a_run():
    assert trained_grid(SIZE, {}, SPACING) == Grid(SIZE, SPACING, "center")
    shares = {"policy": "fraction", "fraction": [0.5, 0.5, 1.0]}
    assert trained_grid(SIZE, shares, None).fraction == (0.5, 0.5, 1.0)
    assert trained_grid(SIZE, {"policy": "fraction"}, None).fraction == PAPER_FRACTION
    with pytest.raises(UserError, match="which spacing"):
        trained_grid(SIZE, {"policy": "lung"}, None)
    with pytest.raises(UserError, match="policy 'middle'"):
        trained_grid(SIZE, {}, SPACING, "middle")
