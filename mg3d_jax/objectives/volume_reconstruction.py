"""Report-guided masked volume modelling (MG-3D, arXiv 2412.05876): voxels of hidden patches from the others and the report.

The encoder sees the visible patches only; a decoder that also reads the whole report fills in the others; the loss is the
squared error on the hidden ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.objectives.base import Batch, Context, Features, Metrics, Objective
from mg3d_jax.objectives.masking import nested_patch_mask, random_patch_mask
from mg3d_jax.objectives.pairwise import check_shapes, zero_unless
from mg3d_jax.objectives.sums import Sums, masked_sums, mean_of_sums
from mg3d_jax.options import choice, key


@dataclass(frozen=True)
class VolumeReconstructionOptions:
    """Report-guided masked volume modelling."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    mask_ratio: float = key(0.5, "share of the patches that are hidden")
    masking: str = key("random", '"random", or "nested": whole cells of 2x2x2 patches, then patches in the other cells')
    normalize_target: bool = key(False, "is the target of each patch normalised?")
    read_report: bool = key(True, "False: a plain masked autoencoder")


def problems(options: VolumeReconstructionOptions, config: Any) -> list[str]:
    """Masks that the grid of patches cannot have."""
    found = choice("objectives.volume_reconstruction.masking", options.masking, ("random", "nested"))
    if not options.weight > 0:
        return found
    decoder, grid = config.model.voxel_decoder, _grid(config.model)
    if decoder.width % decoder.num_heads:
        found.append(f"model.voxel_decoder.num_heads = {decoder.num_heads} does not divide its width = {decoder.width}")
    if options.masking == "nested" and any(n % 2 for n in grid):
        found.append(
            f'objectives.volume_reconstruction.masking = "nested" needs an even number of patches along each axis, not '
            f'{grid}: use "random" or another patch'
        )
    if math.prod(grid) < 2:
        found.append(f"a grid of {grid} patches has nothing to hide: use a smaller patch_size or a larger volume")
    return found


def _grid(model: Any) -> tuple[int, ...]:
    """Tokens along each axis; even ones where they are wrong themselves, which the checks of the model say."""
    try:
        return model.token_grid()
    except (KeyError, ValueError, ZeroDivisionError):
        return (2, 2, 2)


def draw(rng: jax.Array, batch: Batch, options: VolumeReconstructionOptions, context: Context) -> dict[str, Any]:
    """`visible` int32 [B, Nv], the patches that the encoder sees, and `patch_mask` bool [B, N], True where one is hidden."""
    grid, rows = context.model.token_grid(), batch["volume"].shape[0]
    if options.masking == "nested":
        visible, mask = nested_patch_mask(rng, rows, grid, options.mask_ratio)
    else:
        visible, mask = random_patch_mask(rng, rows, math.prod(grid), options.mask_ratio)
    return {"visible": visible, "patch_mask": mask}


def needs(options: VolumeReconstructionOptions) -> tuple[str, ...]:
    """The prediction of all patches, by a decoder that reads the report or does not, and the patches as they are."""
    return "voxel_prediction" if options.read_report else "voxel_prediction_without_report", "patches", "patch_mask"


def normalize_patches(patches: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """[B, N, P] -> float32: mean 0 and variance 1 over the P values of each patch (He et al. 2022); constant ones to 0.

    `epsilon` is added to the variance, in units of the windowed intensity squared.
    """
    patches = patches.astype(jnp.float32)
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


def patch_sums(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> Sums:
    """Per patient: the summed mean squared error ("loss") and "count" of the masked patches.

    Args:
        prediction, target: [B, N, P]: N patches of P values (voxels times channels). The target gets no gradient.
        mask: bool [B, N], True where the patch was hidden and therefore counts.
    """
    shape = np.shape(prediction)
    check_shapes("prediction and target are [B, N, P], mask [B, N]", target=(target, shape), mask=(mask, shape[:-1]))
    target = jax.lax.stop_gradient(jnp.asarray(target, jnp.float32))
    errors = zero_unless(mask, jnp.asarray(prediction, jnp.float32)) - zero_unless(mask, target)
    return masked_sums(mask, loss=jnp.mean(jnp.square(errors), axis=-1))


def features(modules: Any, needed: Features, options: VolumeReconstructionOptions) -> Features:
    """`voxel_sums`; voxels of the whole batch need not be kept."""
    target = needed["patches"]
    if options.normalize_target:
        target = normalize_patches(target)
    return {"voxel_sums": patch_sums(needed[needs(options)[0]], target, needed["patch_mask"])}


def loss(features: Features, batch: Batch, options: VolumeReconstructionOptions) -> tuple[jax.Array, Metrics]:
    """Mean squared error over the hidden patches of the global batch, and the number of `patches`."""
    means = mean_of_sums(features["voxel_sums"], batch["valid"])
    return means["loss"], {"patches": means["count"]}


VOLUME_RECONSTRUCTION = Objective(
    options=VolumeReconstructionOptions, needs=needs, loss=loss, features=features, draw=draw, problems=problems
)
