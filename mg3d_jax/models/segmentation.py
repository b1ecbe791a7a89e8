"""Decoders that turn what a volume tower saw back into features of every voxel, for segmentation.

`UnetrDecoder` for a ViT (UNETR, Hatamizadeh et al. 2022, arXiv 2103.10504), `SwinUnetrDecoder` for a Swin (SwinUNETR,
arXiv 2201.01266). With the published patch sizes and widths both are numerically MONAI's; a 1x1x1 convolution to classes
comes behind them (`tasks.segmentation`).

A decoder is called with `(volume float [B, X, Y, Z, C], what the tower gave with hidden=True)` and returns
[B, X, Y, Z, width].
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.models.convolutions import Upsampling, remat_convolutions
from mg3d_jax.models.patches import halvings, patch_grid
from mg3d_jax.models.positions import Grid

UNETR_WIDTH = 16  # MONAI's default feature_size


class Merge(nn.Module):
    """`(coarse [B, x, y, z, d], skip [B, X, Y, Z, e]) -> [B, X, Y, Z, width]`: upsampled, joined, convolved."""

    stride: Grid
    width: int
    dtype: str = "float32"
    remat: str = "none"

    @nn.compact
    def __call__(self, coarse: jax.Array, skip: jax.Array) -> jax.Array:
        grown = Upsampling(self.stride, self.width, self.dtype, name="up")(coarse)
        joined = jnp.concatenate([grown, skip.astype(grown.dtype)], axis=-1)
        return remat_convolutions(self.remat)(self.width, self.dtype, name="convolution")(joined)


class UnetrDecoder(nn.Module):
    """UNETR's decoder for any patch. A patch of L halvings has L levels; level k has `width * 2**k` channels.

    Level 0 convolves the volume itself; level k < L reads the layer `k * depth // L` (counted from 0) of the ViT, brought up
    from the patch grid; the last tokens are the bottom. For 12 layers and patches of 16 these are MONAI's layers 3, 6, 9.
    """

    patch_size: Grid
    width: int = UNETR_WIDTH
    dtype: str = "float32"
    remat: str = "none"

    @nn.compact
    def __call__(self, volume: jax.Array, encoded: dict[str, Any]) -> jax.Array:
        strides, hidden = halvings(self.patch_size), encoded["hidden"]
        grid = patch_grid(volume.shape[1:4], self.patch_size)
        convolution = remat_convolutions(self.remat)

        def on_grid(tokens: jax.Array) -> jax.Array:
            return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])

        skips = [convolution(self.width, self.dtype, name="skip_0")(volume)]
        for level in range(1, len(strides)):
            width, name = self.width * 2**level, f"skip_{level}"
            features = on_grid(hidden[level * len(hidden) // len(strides)])
            features = Upsampling(strides[-1], width, self.dtype, name=f"{name}_up_0")(features)
            for number, stride in enumerate(reversed(strides[level:-1]), start=1):
                features = Upsampling(stride, width, self.dtype, name=f"{name}_up_{number}")(features)
                features = convolution(width, self.dtype, name=f"{name}_convolution_{number}")(features)
            skips.append(features)
        features = on_grid(encoded["tokens"])
        for level in reversed(range(len(strides))):
            merge = Merge(strides[level], self.width * 2**level, self.dtype, self.remat, name=f"merge_{level}")
            features = merge(features, skips[level])
        return features


class SwinUnetrDecoder(nn.Module):
    """SwinUNETR's decoder. `encoded["stages"]` are the patch embedding and the stages' outputs, each half as fine.

    The volume and all stages but the last two go through a convolution of their own; the one before the last is joined as
    it is, the last is the bottom. `width` is the number of channels at full resolution; MONAI's is that of the embedding.
    """

    patch_size: Grid
    width: int
    dtype: str = "float32"
    remat: str = "none"

    @nn.compact
    def __call__(self, volume: jax.Array, encoded: dict[str, Any]) -> jax.Array:
        *stages, bottom = encoded["stages"]
        widths = [self.width * 2**stage for stage in range(len(stages) + 1)]
        convolution = remat_convolutions(self.remat)
        skips = [
            convolution(width, self.dtype, name=f"skip_{stage}")(features)
            for stage, (width, features) in enumerate(zip(widths, stages[:-1], strict=False), start=1)
        ]
        features = convolution(widths[-1], self.dtype, name="bottom")(bottom)
        for stage, skip in reversed(list(enumerate([*skips, stages[-1]]))):
            features = Merge((2, 2, 2), widths[stage], self.dtype, self.remat, name=f"merge_{stage + 1}")(
                features, skip
            )
        skip = convolution(self.width, self.dtype, name="skip_0")(volume)
        return Merge(self.patch_size, self.width, self.dtype, self.remat, name="merge_0")(features, skip)
