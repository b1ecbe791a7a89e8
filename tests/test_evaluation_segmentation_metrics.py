"""Segmentation metrics against MONAI's, with empty masks, thin slices and voxels of any shape."""

import numpy as np
import pytest
from scipy import ndimage

from mg3d_jax.evaluation.segmentation_metrics import (
    dice,
    hausdorff,
    normalised_surface_distance,
    scores,
    surface_distances,
)

torch = pytest.importorskip("torch")
monai = pytest.importorskip("monai.metrics")


def blob(rng, shape):
    return ndimage.gaussian_filter(rng.normal(size=shape), 1.5, mode="constant") > 0


def theirs(prediction, reference, spacing, tolerance):
    one_hot = [torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, reference)]
    found = monai.DiceMetric(include_background=False)(*one_hot)
    surface = monai.compute_surface_dice(*one_hot, [tolerance], spacing=spacing)
    hd95 = monai.compute_hausdorff_distance(*one_hot, percentile=95, spacing=spacing)
    return found.item(), surface.item(), hd95.item()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (3.1, 0.9, 1.3)])
@pytest.mark.parametrize("shape", [(9, 11, 12), (14, 13, 1)])
def test_they_are_monais(spacing, shape):
    rng = np.random.default_rng(0)
    for tolerance in (0.5, 2.0):
        prediction, reference = blob(rng, shape), blob(rng, shape)
        distances = surface_distances(prediction, reference, spacing)
        ours = (
            dice(prediction, reference),
            normalised_surface_distance(distances, tolerance),
            hausdorff(distances),
        )
        np.testing.assert_allclose(ours, theirs(prediction, reference, spacing, tolerance), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:the (ground truth|prediction)")
def test_empty_masks():
    """MONAI's percentile of infinite distances is NaN, its maximum infinite: we say infinite, which tells a mask that was
    missed from one that was not there."""
    some, empty = np.zeros((5, 5, 5), bool), np.zeros((5, 5, 5), bool)
    some[2, 2, 1:3] = True
    for prediction, reference in ((some, empty), (empty, some), (empty, empty), (some, some)):
        distances = surface_distances(prediction, reference, (1, 1, 1))
        *expected, hd95 = theirs(prediction, reference, (1, 1, 1), 1.0)
        ours = dice(prediction, reference), normalised_surface_distance(distances, 1.0)
        np.testing.assert_array_equal(ours, expected)
        assert np.isfinite(hausdorff(distances)) == np.isfinite(hd95)
        one_hot = [torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, reference)]
        assert hausdorff(distances, 100) == pytest.approx(
            monai.compute_hausdorff_distance(*one_hot).item(), nan_ok=True
        )


def test_scores_by_class_without_what_is_unknown():
    rng = np.random.default_rng(1)
    prediction, reference = rng.integers(0, 4, (8, 7, 6)), rng.integers(0, 4, (8, 7, 6))
    found = scores(prediction, reference, 4, (1, 2, 3), 1.0)
    assert all(one.shape == (3,) for one in found.values())
    distances = surface_distances(prediction == 2, reference == 2, (1, 2, 3))
    assert found["dice"][1] == dice(prediction == 2, reference == 2) and found["hd95"][1] == hausdorff(distances)
    unknown = np.where(np.arange(8)[:, None, None] < 4, -1, reference)
    half = scores(prediction[4:], reference[4:], 4, (1, 2, 3), 1.0)
    for name, values in scores(prediction, unknown, 4, (1, 2, 3), 1.0).items():
        np.testing.assert_allclose(values, half[name], err_msg=name)
    assert scores(prediction, reference, 1, (1, 1, 1), 1.0)["dice"].shape == (0,)
