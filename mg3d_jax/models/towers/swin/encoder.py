"""3D Swin encoder (Liu et al. 2021; Hatamizadeh et al. 2022), numerically equal to `swinViT` of MONAI's `SwinUNETR`.

Equal means its conventions too, because published weights were trained with them: windows are padded with zeros behind
the first norm, a window that the feature map does not fill shrinks while its relative positions keep the indices of the
full window, and the patch merging of `merging="merging"` has MONAI 0.9's order of the eight neighbours.
"""

from __future__ import annotations

from itertools import product
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.models.convolutions import ResidualConvolution
from mg3d_jax.models.heads import AttentionPool, mean_pool
from mg3d_jax.models.patches import patchify, unpatchify
from mg3d_jax.models.positions import Grid
from mg3d_jax.models.transformer import TABLE_INIT, Mlp, constrain, dense, frozen_count, layer_norm, make_remat, part

NORM_EPSILON = 1e-5
FEATURE_AXES = ("batch", None, None, None, "embed")
SHIFT_MASK = -100.0  # added to the logits between regions that only the cyclic shift brought together
# The order in which a 2x2x2 neighbourhood is concatenated.
MERGE_ORDERS: dict[str, tuple[Grid, ...]] = {
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(product((0, 1), repeat=3)),
}


def fit_window(size: Grid, window: Grid, shift: Grid) -> tuple[Grid, Grid]:
    """Window and shift for a feature map: an axis that fits into one window shrinks it, and nothing shifts along it."""
    fits = [side <= extent for side, extent in zip(size, window, strict=True)]
    small = tuple(side if fit else extent for side, extent, fit in zip(size, window, fits, strict=True))
    return small, tuple(0 if fit else step for step, fit in zip(shift, fits, strict=True))


def relative_position_index(window: Grid) -> np.ndarray:
    """int [n, n] with n = prod(window): row of the bias table for each pair of positions in a full window."""
    coordinates = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij")).reshape(3, -1)
    offset = coordinates[:, :, None] - coordinates[:, None, :] + np.array(window).reshape(3, 1, 1) - 1
    spans = [2 * extent - 1 for extent in window]
    return (offset[0] * spans[1] + offset[1]) * spans[2] + offset[2]


def shift_mask(padded: Grid, window: Grid, shift: Grid) -> np.ndarray:
    """float32 [windows, n, n]: 0 within a region, `SHIFT_MASK` between regions that only the shift made neighbours."""
    labels = []
    for side, extent, step in zip(padded, window, shift, strict=True):
        axis = np.arange(side)
        labels.append((axis >= side - extent).astype(int) + ((axis >= side - step) if step else 0))
    region = labels[0][:, None, None] * 9 + labels[1][:, None] * 3 + labels[2]
    windows = np.asarray(patchify(region[None, ..., None], window))[0]
    return np.where(windows[:, None, :] == windows[:, :, None], 0.0, SHIFT_MASK).astype(np.float32)


class WindowAttention(nn.Module):
    """Attention inside windows with a relative position bias: [B * windows, n, d] -> the same.

    `mask` float [windows, n, n] is added to the logits; None: no shift.
    """

    num_heads: int
    window: Grid
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: np.ndarray | None = None) -> jax.Array:
        rows, length, width = tokens.shape
        head_dim = width // self.num_heads
        query, key, value = (
            dense(width, ("embed", "heads"), self.dtype, name)(tokens).reshape(rows, length, self.num_heads, head_dim)
            for name in ("query", "key", "value")
        )
        table_shape = (prod(2 * extent - 1 for extent in self.window), self.num_heads)
        table = self.param("position_bias", part(TABLE_INIT, ("position", "heads")), table_shape)
        index = relative_position_index(self.window)[:length, :length]
        logits = jnp.einsum("bqhd,bkhd->bhqk", query * head_dim**-0.5, key, preferred_element_type=jnp.float32)
        logits += table[index].transpose(2, 0, 1)
        if mask is not None:
            by_window = logits.reshape(-1, mask.shape[0], *logits.shape[1:]) + mask[:, None]
            logits = by_window.reshape(logits.shape)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(rows, length, width)
        return dense(width, ("heads", "embed"), self.dtype, "out")(mixed)


class SwinBlock(nn.Module):
    """Pre-norm block with (shifted) window attention: [B, X, Y, Z, d] -> the same."""

    num_heads: int
    window: Grid
    shift: Grid
    mlp_dim: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)
        features = features + drop(self._attend(layer_norm(self.dtype, "attention_layer_norm", NORM_EPSILON)(features)))
        mlp = Mlp(self.mlp_dim, self.dtype, exact_gelu=True, dropout=self.dropout, name="mlp")
        flat = layer_norm(self.dtype, "mlp_layer_norm", NORM_EPSILON)(features)
        flat = mlp(flat.reshape(flat.shape[0], -1, flat.shape[-1]), train)
        return constrain(features + drop(flat).reshape(features.shape), FEATURE_AXES)

    def _attend(self, features: jax.Array) -> jax.Array:
        batch, *size, width = features.shape
        window, shift = fit_window(tuple(size), self.window, self.shift)
        padding = [-side % extent for side, extent in zip(size, window, strict=True)]
        padded_size = tuple(side + pad for side, pad in zip(size, padding, strict=True))
        padded = jnp.pad(features, ((0, 0), *((0, pad) for pad in padding), (0, 0)))
        shifted = any(shift)
        if shifted:
            padded = jnp.roll(padded, tuple(-step for step in shift), axis=(1, 2, 3))
        windows = patchify(padded, window).reshape(-1, prod(window), width)
        mask = shift_mask(padded_size, window, shift) if shifted else None
        windows = WindowAttention(self.num_heads, self.window, self.dtype, name="attention")(windows, mask)
        merged = unpatchify(windows.reshape(batch, -1, prod(window) * width), window, padded_size)
        if shifted:
            merged = jnp.roll(merged, shift, axis=(1, 2, 3))
        return merged[:, : size[0], : size[1], : size[2]]


class PatchMerging(nn.Module):
    """Halves each axis and doubles the channels: [B, X, Y, Z, d] -> [B, X/2, Y/2, Z/2, 2d]; odd sides are padded."""

    order: str = "merging"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        if self.order not in MERGE_ORDERS:
            raise UserError(f"merging={self.order!r} is unknown; choose one of {', '.join(MERGE_ORDERS)}.")
        features = jnp.pad(features, ((0, 0), *((0, side % 2) for side in features.shape[1:4]), (0, 0)))
        merged = jnp.concatenate([features[:, i::2, j::2, k::2] for i, j, k in MERGE_ORDERS[self.order]], axis=-1)
        merged = layer_norm(self.dtype, "norm", NORM_EPSILON)(merged)
        return dense(2 * features.shape[-1], (None, "embed"), self.dtype, "reduction", use_bias=False)(merged)


class SwinEncoder(nn.Module):
    """`(volume float [B, X, Y, Z, C], visible int32 [B, Nv] or None) -> {"tokens", "pooled", "stages"}`.

    "tokens" [B, N, 16 w] are the last stage, flattened row-major: one per 32^3 voxels with patches of 2; "pooled" is
    [B, 16 w]. "stages" are the patch embedding and the four stages' outputs, each [B, x, y, z, channels], normalised
    without affine as MONAI does; they feed segmentation decoders, and are there without `hidden`, too. `width` is MONAI's
    `feature_size` (48 is the paper's "B", 96 its "L").

    A Swin cannot skip tokens as a ViT does. With `visible`, the places of the last stage that may be seen, the embedded
    patches of all others are replaced by a learned mask token (SimMIM, Xie et al. 2022), and "tokens" are still those
    of all places.

    `frozen_layers` = k > 0 freezes the patch embedding and the first k blocks, counted over all stages, with the merging
    behind a stage's last block and the convolutions before its first; -1 freezes everything.
    """

    width: int = 48
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Grid = (7, 7, 7)
    patch_size: Grid = (2, 2, 2)
    channels: int = 1
    mlp_ratio: float = 4.0
    merging: str = "merging"
    residual_convolutions: bool = False
    pooling: str = "attention"
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    frozen_layers: int = 0

    @nn.compact
    def __call__(
        self, volume: jax.Array, visible: jax.Array | None = None, train: bool = False, hidden: bool = False
    ) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
        if volume.shape[-1] != self.channels:
            raise UserError(f"the Swin encoder was built for {self.channels} channels, not {volume.shape[-1]}.")
        frozen = frozen_count(self.frozen_layers, sum(self.depths))
        features = self._embed(volume.astype(self.dtype))
        if visible is not None:
            features = self._hide(features, visible)
        if frozen:
            features = jax.lax.stop_gradient(features)
        stages, behind = [self._normalised(features)], 0
        for index, depth in enumerate(self.depths):
            if self.residual_convolutions:
                features = ResidualConvolution(dtype=self.dtype, name=f"convolution_{index}")(features)
            for block in range(depth):
                is_frozen, behind = behind < frozen, behind + 1
                features = self._block(index, block)(features, train and not is_frozen)
                if is_frozen:
                    features = jax.lax.stop_gradient(features)
            features = PatchMerging(self.merging, self.dtype, name=f"merging_{index}")(features)
            if is_frozen:  # the last block of the stage was
                features = jax.lax.stop_gradient(features)
            stages.append(self._normalised(features))
        tokens = stages[-1].reshape(volume.shape[0], -1, stages[-1].shape[-1])
        encoded = {"tokens": tokens, "pooled": self._pool(tokens), "stages": tuple(stages)}
        return jax.lax.stop_gradient(encoded) if self.frozen_layers == -1 else encoded

    def _block(self, stage: int, number: int) -> SwinBlock:
        width = self.width * 2**stage
        return make_remat(self.remat, train_argument=2, scanned=False)(SwinBlock)(
            self.num_heads[stage],
            self.window,
            tuple(extent // 2 for extent in self.window) if number % 2 else (0, 0, 0),
            round(width * self.mlp_ratio),
            self.dropout,
            self.dtype,
            name=f"stage_{stage}_block_{number}",
        )

    def _embed(self, volume: jax.Array) -> jax.Array:
        padding = [-side % patch for side, patch in zip(volume.shape[1:4], self.patch_size, strict=True)]
        volume = jnp.pad(volume, ((0, 0), *((0, pad) for pad in padding), (0, 0)))
        grid = [side // patch for side, patch in zip(volume.shape[1:4], self.patch_size, strict=True)]
        patches = patchify(volume, self.patch_size)
        embedded = dense(self.width, ("patch", "embed"), self.dtype, "patch_embedding")(patches)
        return embedded.reshape(volume.shape[0], *grid, self.width)

    def _hide(self, features: jax.Array, visible: jax.Array) -> jax.Array:
        """The mask token in every patch whose place of the last stage is not among `visible`."""
        batch, *size, _ = features.shape
        step = 2 ** len(self.depths)  # patches per place, along each axis
        grid = [-(-side // step) for side in size]
        hidden = jnp.ones((batch, prod(grid)), bool).at[jnp.arange(batch)[:, None], visible].set(False)
        hidden = hidden.reshape(batch, *grid)
        for axis, side in enumerate(size, start=1):
            hidden = jnp.take(hidden, np.arange(side) // step, axis=axis)
        token = self.param("mask_token", part(TABLE_INIT, ("embed",)), (self.width,))
        return jnp.where(hidden[..., None], token.astype(features.dtype), features)

    def _normalised(self, features: jax.Array) -> jax.Array:
        return jax.nn.standardize(features.astype(jnp.float32), epsilon=NORM_EPSILON).astype(features.dtype)

    def _pool(self, tokens: jax.Array) -> jax.Array:
        if self.pooling == "mean":
            return mean_pool(tokens)
        if self.pooling == "attention":
            return AttentionPool(self.num_heads[-1], self.dtype, name="pool")(tokens)
        raise UserError(f"volume_encoder.pooling={self.pooling!r} is unknown; choose attention or mean.")
