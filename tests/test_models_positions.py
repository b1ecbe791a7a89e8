"""Sine-cosine positions against their formula, interpolation against PyTorch, and a change of resolution end to end."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mg3d_jax.errors import UserError
from mg3d_jax.models.positions import interpolate, sincos
from mg3d_jax.models.towers.vit.encoder import VolumeEncoder


def test_sincos_formula():
    table = sincos((3, 4, 5), 20)
    assert table.shape == (60, 20)
    x, y, z = 2, 1, 3
    row = table[(x * 4 + y) * 5 + z]
    omega = 10_000.0 ** -(np.arange(3) / 3)
    expected = np.concatenate([f(c * omega) for c in (x, y, z) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(row[:18], expected, atol=1e-6)
    assert not row[18:].any()
    assert len(np.unique(table.round(5), axis=0)) == 60


def test_sincos_needs_six_channels():
    with pytest.raises(UserError, match="at least 6"):
        sincos((2, 2, 2), 5)


@pytest.mark.parametrize("new", [(8, 6, 10), (3, 3, 3), (4, 3, 5), (5, 2, 9)])
def test_interpolation_equals_pytorch(new):
    old = (4, 3, 5)
    table = np.random.default_rng(0).normal(size=(60, 7)).astype(np.float32)
    as_image = torch.from_numpy(table.reshape(*old, 7).transpose(3, 0, 1, 2)[None])
    expected = torch.nn.functional.interpolate(as_image, new, mode="trilinear", align_corners=False)
    expected = expected[0].permute(1, 2, 3, 0).reshape(-1, 7).numpy()
    np.testing.assert_allclose(interpolate(table, old, new), expected, atol=1e-5)


def test_interpolation_checks_the_grid():
    with pytest.raises(UserError, match="do not fill"):
        interpolate(np.zeros((7, 3)), (2, 2, 2), (4, 4, 4))


def test_checkpoint_runs_at_another_resolution():
    """A 96^3 model at 128x128x96: for a smooth volume, patches at the same place get similar features."""
    old = VolumeEncoder(48, 2, 4, (16, 16, 16), (96, 96, 96), pooling="mean")
    new = old.clone(volume_size=(128, 128, 96))

    def smooth(size):
        axes = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size), indexing="ij")
        return jnp.asarray(sum(axes)[None, ..., None], jnp.float32)

    params = nn.unbox(jax.jit(old.init)(jax.random.key(0), smooth((96, 96, 96)))["params"])
    ramp = np.stack(np.meshgrid(*map(np.arange, (6, 6, 6)), indexing="ij"), -1).reshape(-1, 3) / 6
    params["positions"] = jnp.asarray(ramp @ np.random.default_rng(0).normal(size=(3, 48)), jnp.float32)
    moved = params | {"positions": interpolate(params["positions"], (6, 6, 6), (8, 8, 6))}
    before = jax.jit(old.apply)({"params": params}, smooth((96, 96, 96)))
    after = jax.jit(new.apply)({"params": moved}, smooth((128, 128, 96)))
    assert after["tokens"].shape == (1, 8 * 8 * 6, 48)
    cosine = jnp.sum(before["pooled"] * after["pooled"]) / (
        jnp.linalg.norm(before["pooled"]) * jnp.linalg.norm(after["pooled"])
    )
    assert cosine > 0.99
