"""Parts of the Swin encoder against definitions; parity with MONAI is in test_interop_monai.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import quick_variables

from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.swin.encoder import SHIFT_MASK, SwinEncoder, fit_window, relative_position_index, shift_mask

SMALL = {"width": 12, "depths": (1, 2), "num_heads": (2, 3), "window": (3, 3, 3)}


def test_relative_positions_are_equal_for_equal_offsets():
    window = (2, 3, 4)
    index = relative_position_index(window)
    places = list(np.ndindex(*window))
    row_of: dict[tuple, int] = {}
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            offset = tuple(np.subtract(a, b))
            assert row_of.setdefault(offset, index[i, j]) == index[i, j]
    assert sorted(row_of.values()) == list(range(3 * 5 * 7))


def test_shift_mask_separates_what_wrapped_around():
    """One axis, windows of 4 shifted by 2: the last window joins the end of the axis and its start."""
    mask = shift_mask((8, 1, 1), (4, 1, 1), (2, 0, 0))
    assert mask.shape == (2, 4, 4)
    assert not mask[0].any()
    expected = np.kron(1 - np.eye(2), np.ones((2, 2))) * SHIFT_MASK
    np.testing.assert_array_equal(mask[1], expected)


def test_small_axes_shrink_the_window():
    assert fit_window((4, 7, 9), (7, 7, 7), (3, 3, 3)) == ((4, 7, 7), (0, 0, 3))


def test_shapes_masks_and_gradients():
    volume = jax.random.normal(jax.random.key(0), (2, 14, 12, 10, 1))
    encoder = SwinEncoder(**SMALL)
    params = quick_variables(encoder, volume)["params"]
    output = jax.jit(encoder.apply)({"params": params}, volume)
    assert [stage.shape[1:] for stage in output["stages"]] == [(7, 6, 5, 12), (4, 3, 3, 24), (2, 2, 2, 48)]
    assert output["tokens"].shape == (2, 8, 48)
    assert output["pooled"].shape == (2, 48)

    gradients = []
    for remat in ("none", "full"):
        module = encoder.clone(remat=remat)
        gradients.append(jax.jit(jax.grad(lambda p, m=module: m.apply({"params": p}, volume)["pooled"].sum()))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients[0]))


@pytest.mark.parametrize(("field", "words"), [("merging", "merging='other'"), ("pooling", "pooling='other'")])
def test_unknown_choice_is_an_error(field, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(SwinEncoder(**SMALL, **{field: "other"}).init, jax.random.key(0), jnp.ones((1, 8, 8, 8, 1)))


def test_wrong_channels_are_an_error():
    with pytest.raises(UserError, match="built for 1 channels"):
        jax.eval_shape(SwinEncoder(**SMALL).init, jax.random.key(0), jnp.ones((1, 8, 8, 8, 2)))
