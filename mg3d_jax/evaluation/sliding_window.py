"""Inference on volumes larger (or smaller) than the window of a network: overlapping windows, blended by a Gaussian.

Exact: every voxel is the weighted mean of all windows that cover it, as in MONAI's `sliding_window_inference`, whose places
and weights these are. Batched: several windows of each volume go through the network at once. Sharded: under a mesh they
are split over its batch axes, so that one scan uses all devices. One compiled program per shape of volume.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError

SIGMA_SCALE = 0.125  # standard deviation of the Gaussian, in shares of the window
LEAST_WEIGHT = 1e-3  # so that a voxel in the corner of its only window is not divided by nothing
Size = tuple[int, int, int]


@dataclass(frozen=True)
class SlidingWindow:
    """How windows lie on a volume.

    Args:
        size: voxels of a window: what the network takes.
        overlap: of neighbouring windows, as a share of the window, along every axis.
        per_call: windows of each volume that go through the network together; on a mesh, best a multiple of its devices
            where volumes come one at a time.
    """

    size: Size
    overlap: float = 0.5
    per_call: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise UserError(f"overlap = {self.overlap}: windows overlap by a share from 0 to below 1")
        if self.per_call < 1:
            raise UserError(f"{self.per_call} windows per call: at least 1 is needed")

    def starts(self, shape: tuple[int, ...]) -> np.ndarray:
        """First voxels of the windows, int32 [n, 3], x slowest. The last window of an axis ends with the volume."""
        axes = []
        for side, window in zip(shape, self.size, strict=True):
            step = max(int(window * (1 - self.overlap)), 1)
            axes.append(sorted({min(start, side - window) for start in range(0, side - window + step, step)}))
        return np.array(list(product(*axes)), np.int32)

    def padding(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """Voxels before and behind, along each axis, that a volume of this shape lacks to hold one window."""
        lacking = [max(window - side, 0) for side, window in zip(shape, self.size, strict=True)]
        return [(lack // 2, lack - lack // 2) for lack in lacking]


def gaussian(size: Size) -> np.ndarray:
    """Weight of every voxel of a window, float32: 1 in its middle, at least `LEAST_WEIGHT`."""
    weights = np.ones((1, 1, 1), np.float32)
    for axis, side in enumerate(size):
        places = np.arange(side, dtype=np.float32) - (side - 1) / 2
        along = np.exp(-(places**2) / (2 * (SIGMA_SCALE * side) ** 2)).astype(np.float32)
        weights = weights * along.reshape([-1 if number == axis else 1 for number in range(3)])
    return np.maximum(weights, max(weights.min(), LEAST_WEIGHT))


def sliding_window(
    network: Callable[[jax.Array], jax.Array], volumes: jax.Array, windows: SlidingWindow, fill: float
) -> jax.Array:
    """What a network says of every voxel. Traced: call it within a jitted function, under `sharding.in_mesh` for a mesh.

    Args:
        network: `[n, x, y, z] -> float [n, x, y, z, K]` of windows.
        volumes: [B, X, Y, Z] of any size.
        fill: value of what a volume smaller than a window lacks; it is laid around the volume evenly.

    Returns:
        float32 [B, X, Y, Z, K], the weighted means.
    """
    shape, padding = volumes.shape[1:], windows.padding(volumes.shape[1:])
    padded = jnp.pad(volumes, ((0, 0), *padding), constant_values=fill)
    batch, size, weights = len(volumes), windows.size, gaussian(windows.size)[..., None]
    starts = windows.starts(padded.shape[1:])
    per_call = min(windows.per_call, len(starts))
    calls = math.ceil(len(starts) / per_call)
    # The last call is filled up with windows that count nothing.
    counts = (np.arange(calls * per_call) < len(starts)).astype(np.float32).reshape(calls, per_call)
    starts = np.resize(starts, (calls * per_call, 3)).reshape(calls, per_call, 3)

    def call(total: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        places, counted = given
        cut = [jax.lax.dynamic_slice(padded, (0, *places[i]), (batch, *size)) for i in range(per_call)]
        crops = jnp.stack(cut, axis=1).reshape(batch * per_call, *size)
        found = network(nn.with_logical_constraint(crops, ("batch", None, None, None))).astype(jnp.float32)
        found = jnp.concatenate([found, jnp.ones((*found.shape[:-1], 1), jnp.float32)], axis=-1) * weights
        found = found.reshape(batch, per_call, *found.shape[1:])
        for i in range(per_call):
            place = (0, *places[i], 0)
            before = jax.lax.dynamic_slice(total, place, (batch, *size, total.shape[-1]))
            total = jax.lax.dynamic_update_slice(total, before + counted[i] * found[:, i], place)
        return total, None

    classes = jax.eval_shape(network, jax.ShapeDtypeStruct((per_call * batch, *size), volumes.dtype)).shape[-1]
    total = jnp.zeros((*padded.shape, classes + 1), jnp.float32)
    total, _ = jax.lax.scan(call, total, (jnp.asarray(starts), jnp.asarray(counts)))
    inside = tuple(slice(before, before + side) for (before, _), side in zip(padding, shape, strict=True))
    means = total[..., :-1] / total[..., -1:]
    return means[(slice(None), *inside)]
