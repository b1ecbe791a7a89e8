"""Volumes as patches and back."""

from __future__ import annotations

from math import prod

import jax

from mg3d_jax.errors import UserError
from mg3d_jax.models.positions import Grid


def patch_grid(volume_size: tuple[int, ...], patch_size: tuple[int, ...]) -> Grid:
    """Number of patches along each axis; `UserError` when a side is not a multiple of the patch."""
    if any(side % patch for side, patch in zip(volume_size, patch_size, strict=True)):
        raise UserError(
            f"volume_size {tuple(volume_size)} is not divisible by patch_size {tuple(patch_size)} on each axis."
        )
    x, y, z = (side // patch for side, patch in zip(volume_size, patch_size, strict=True))
    return x, y, z


def patchify(volume: jax.Array, patch_size: Grid) -> jax.Array:
    """[B, X, Y, Z, C] -> [B, N, px*py*pz*C]; patches row-major over the grid, voxels row-major in the patch, C last."""
    batch, channels = volume.shape[0], volume.shape[-1]
    gx, gy, gz = patch_grid(volume.shape[1:4], patch_size)
    px, py, pz = patch_size
    split = volume.reshape(batch, gx, px, gy, py, gz, pz, channels)
    return split.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, gx * gy * gz, px * py * pz * channels)


def unpatchify(patches: jax.Array, patch_size: Grid, volume_size: Grid) -> jax.Array:
    """The inverse of `patchify`: [B, N, px*py*pz*C] -> [B, X, Y, Z, C]."""
    gx, gy, gz = patch_grid(volume_size, patch_size)
    px, py, pz = patch_size
    split = patches.reshape(patches.shape[0], gx, gy, gz, px, py, pz, -1)
    return split.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(patches.shape[0], *volume_size, -1)


def halvings(patch_size: Grid) -> list[Grid]:
    """Strides from full resolution to one voxel per patch: 2 along each axis that can still be halved; their product is the
    patch.

    What no 2 divides (a patch side of 6 leaves 3) goes into the last level.
    """
    rest, levels = list(patch_size), []
    while any(side % 2 == 0 for side in rest):
        x, y, z = (2 if side % 2 == 0 else 1 for side in rest)
        rest = [side // step for side, step in zip(rest, (x, y, z), strict=True)]
        levels.append((x, y, z))
    if prod(rest) > 1:
        last = levels.pop() if levels else (1, 1, 1)
        x, y, z = (step * side for step, side in zip(last, rest, strict=True))
        levels.append((x, y, z))
    return levels or [(1, 1, 1)]
