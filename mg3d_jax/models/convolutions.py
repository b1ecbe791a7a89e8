"""Convolutional pieces, numerically those of MONAI's U-Nets: instance norm without affine, leaky ReLU, no biases."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.patches import unpatchify
from mg3d_jax.models.positions import Grid
from mg3d_jax.models.transformer import KERNEL_INIT, REMAT_POLICIES, dense, part

NORM_EPSILON = 1e-5
NEGATIVE_SLOPE = 0.01
CONVOLUTION_AXES = ("NXYZC", "XYZIO", "NXYZC")
KEPT = ("conv_general_dilated", "dot_general")  # by "minimal" remat: what is dear to compute


def instance_norm(features: jax.Array) -> jax.Array:
    """Each channel of each volume with mean 0 and variance 1: [B, X, Y, Z, d] -> the same; statistics in float32."""
    return jax.nn.standardize(features.astype(jnp.float32), axis=(1, 2, 3), epsilon=NORM_EPSILON).astype(features.dtype)


class ResidualConvolution(nn.Module):
    """Two 3x3x3 convolutions with instance norm and leaky ReLU around a shortcut: [B, X, Y, Z, d] -> [B, X, Y, Z, width].

    `width` 0: that of the input. Where it is another one, the shortcut is a 1x1x1 convolution with instance norm
    (`UnetResBlock` of MONAI; the stages of SwinUNETR-V2).
    """

    width: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        width = self.width or features.shape[-1]

        def convolve(name: str, inputs: jax.Array) -> jax.Array:
            init = part(nn.initializers.he_normal(), (None, None, None, None, "embed"))
            kernel = self.param(name, init, (3, 3, 3, inputs.shape[-1], width)).astype(self.dtype)
            found = jax.lax.conv_general_dilated(inputs, kernel, (1, 1, 1), "SAME", dimension_numbers=CONVOLUTION_AXES)
            return instance_norm(found)

        features = features.astype(self.dtype)
        hidden = convolve("conv_2", nn.leaky_relu(convolve("conv_1", features), NEGATIVE_SLOPE))
        if width != features.shape[-1]:
            features = instance_norm(dense(width, (None, "embed"), self.dtype, "shortcut", use_bias=False)(features))
        return nn.leaky_relu(hidden + features, NEGATIVE_SLOPE)


class Upsampling(nn.Module):
    """Transposed convolution whose kernel equals its stride, as a matrix product: [B, X, Y, Z, d] -> [B, X sx, ..., width]."""

    stride: Grid
    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        batch, *size, depth = features.shape
        x, y, z = (side * step for side, step in zip(size, self.stride, strict=True))
        shape = (depth, prod(self.stride) * self.width)
        kernel = self.param("kernel", part(KERNEL_INIT, (None, "embed")), shape).astype(self.dtype)
        return unpatchify(features.astype(self.dtype).reshape(batch, -1, depth) @ kernel, self.stride, (x, y, z))


def remat_convolutions(policy: str) -> Callable[..., Any]:
    """`ResidualConvolution` as the backward pass computes it again by this policy (`transformer.make_remat`): "minimal" and
    "offload" keep what convolutions gave and compute norms again, "full" keeps inputs only."""
    if policy not in REMAT_POLICIES:
        raise UserError(f"remat={policy!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}.")
    if policy == "none":
        return ResidualConvolution
    keeps = policy != "full"
    return nn.remat(ResidualConvolution, policy=lambda primitive, *_, **__: keeps and primitive.name in KEPT)
