"""Convolutional pieces, numerically those of MONAI's U-Nets: instance norm without affine, leaky ReLU, no biases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mg3d_jax.errors import UserError
from mg3d_jax.models.patches import unpatchify
from mg3d_jax.models.positions import Grid
from mg3d_jax.models.transformer import KERNEL_INIT, REMAT_POLICIES, dense, part

NORM_EPSILON = 1e-5
NEGATIVE_SLOPE = 0.01
CONVOLVED = "convolved"  # name of what a convolution gave, for "minimal" remat


def instance_norm(features: jax.Array) -> jax.Array:
    """Each channel of each volume with mean 0 and variance 1: [B, X, Y, Z, d] -> the same; statistics in float32."""
    return jax.nn.standardize(features.astype(jnp.float32), axis=(1, 2, 3), epsilon=NORM_EPSILON).astype(features.dtype)


def _of_volumes(features: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = ("NXYZC", "XYZIO", "NXYZC")
    return jax.lax.conv_general_dilated(features, kernel, (1, 1, 1), "SAME", dimension_numbers=axes)


def _of_planes(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_of_volumes` in two dimensions: each plane along X with the channels of its neighbours beside its own."""
    batch, x, y, z, depth = features.shape
    near = kernel.shape[0]
    padded = jnp.pad(features, ((0, 0), (near // 2, near // 2), (0, 0), (0, 0), (0, 0)))
    planes = jnp.concatenate([padded[:, shift : shift + x] for shift in range(near)], axis=-1)
    flat = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], near * depth, -1)
    axes = ("NHWC", "HWIO", "NHWC")
    found = jax.lax.conv_general_dilated(
        planes.reshape(batch * x, y, z, near * depth), flat, (1, 1), "SAME", dimension_numbers=axes
    )
    return found.reshape(batch, x, y, z, -1)


@jax.custom_vjp
def convolve(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of odd kernels with zeros outside: ([B, X, Y, Z, d], [x, y, z, d, width]) -> [B, X, Y, Z, width].

    On CPU it is computed by planes, about ten times as fast: XLA has no fast kernel for three dimensions there
    (docs/benchmarks.md). Its gradient has a rule of its own so that the threefold channels of planes are not kept.
    """
    return jax.lax.platform_dependent(features, kernel, cpu=_of_planes, default=_of_volumes)


def _forward(features: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(features, kernel), (features, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    def of(form: Callable[..., jax.Array], features: jax.Array, kernel: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(form, features, kernel)[1](gradient)

    return jax.lax.platform_dependent(*kept, gradient, cpu=partial(of, _of_planes), default=partial(of, _of_volumes))


convolve.defvjp(_forward, _backward)


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

        def normed(name: str, inputs: jax.Array) -> jax.Array:
            init = part(nn.initializers.he_normal(), (None, None, None, None, "embed"))
            kernel = self.param(name, init, (3, 3, 3, inputs.shape[-1], width)).astype(self.dtype)
            return instance_norm(checkpoint_name(convolve(inputs, kernel), CONVOLVED))

        features = features.astype(self.dtype)
        hidden = normed("conv_2", nn.leaky_relu(normed("conv_1", features), NEGATIVE_SLOPE))
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
    policies = jax.checkpoint_policies
    kept = policies.save_from_both_policies(policies.dots_saveable, policies.save_only_these_names(CONVOLVED))
    return nn.remat(ResidualConvolution, policy=policies.nothing_saveable if policy == "full" else kept)
