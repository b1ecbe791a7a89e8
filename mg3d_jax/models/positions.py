"""Position embeddings of 3D patch grids: fixed sine-cosine tables, and learned ones on another grid."""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError

Grid = tuple[int, int, int]


def sincos(grid: Grid, width: int, temperature: float = 10_000.0) -> np.ndarray:
    """Fixed 3D sine-cosine table, float32 [N, width], row-major over the grid (a third of the width per axis).

    Each axis takes `width // 6` frequencies, sines then cosines; channels left over when 6 does not divide the width
    are zero.
    """
    frequencies = width // 6
    if frequencies < 1:
        raise UserError(f"sine-cosine positions need a width of at least 6, not {width}.")
    omega = temperature ** (-np.arange(frequencies, dtype=np.float64) / frequencies)
    axes = []
    for coordinate in np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"):
        angle = coordinate.reshape(-1, 1) * omega
        axes += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(axes, axis=1)
    return np.pad(table, ((0, 0), (0, width - table.shape[1]))).astype(np.float32)


def interpolate(learned: jax.Array | np.ndarray, old_grid: Grid, new_grid: Grid) -> jax.Array:
    """Learned positions [N_old, d] of one patch grid, resampled trilinearly to another: [N_new, d].

    Patch centres keep their place relative to the volume's edges (half-pixel centres, as in PyTorch's
    `interpolate(align_corners=False)`).
    """
    if learned.shape[0] != prod(old_grid):
        raise UserError(f"{learned.shape[0]} learned positions do not fill a patch grid of {old_grid}.")
    if old_grid == new_grid:
        return jnp.asarray(learned)
    table = jnp.asarray(learned).reshape(*old_grid, -1)
    resized = jax.image.resize(table, (*new_grid, table.shape[-1]), "trilinear", antialias=False)
    return resized.reshape(prod(new_grid), -1)
