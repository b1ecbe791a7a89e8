"""3D vision transformer: a windowed CT volume -> patch tokens and one pooled embedding.

Patches are cut by reshape and embedded by a matrix product (`stem="linear"`) or by a short hierarchy of strided
convolutions (`stem="conv"`). Positions are added before masked patches are dropped, so a visible-only pass (masked
autoencoding, He et al. 2022) sees each patch at its true place.
"""

from __future__ import annotations

from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.heads import AttentionPool, mean_pool
from mg3d_jax.models.patches import halvings, patch_grid, patchify
from mg3d_jax.models.positions import Grid, sincos
from mg3d_jax.models.transformer import ACTIVATION_AXES, TABLE_INIT, Stack, constrain, dense, layer_norm, part


class ConvStem(nn.Module):
    """[B, X, Y, Z, C] -> [B, N, width]: strided convolutions with norm and GELU, then linear (Xiao et al. 2021).

    Each level halves the axes that the patch still asks for. A convolution whose kernel equals its stride is a reshape
    and a matrix product, which is fast on every device; channels double per level, up to the width.
    """

    width: int
    patch_size: Grid
    dtype: str = "float32"

    @nn.compact
    def __call__(self, volume: jax.Array) -> jax.Array:
        strides = halvings(self.patch_size)
        features, grid = volume, volume.shape[1:4]
        for level, stride in enumerate(strides):
            channels = max(16, self.width >> (len(strides) - level))
            grid = patch_grid(grid, stride)
            features = patchify(features, stride)
            features = dense(channels, ("patch", None), self.dtype, f"conv_{level}")(features)
            features = nn.gelu(layer_norm(self.dtype, f"norm_{level}", axis=None)(features))
            features = features.reshape(features.shape[0], *grid, channels)
        return dense(self.width, ("patch", "embed"), self.dtype, "out")(
            features.reshape(features.shape[0], prod(grid), -1)
        )


class VolumeEncoder(nn.Module):
    """3D ViT. `(volume float [B, X, Y, Z, C], visible int32 [B, Nv] or None) -> {"tokens", "pooled"}`.

    "tokens" is [B, N, d], or [B, Nv, d] in the order of `visible`, which then comes back as "places"; "pooled" is
    [B, d]. With `hidden` there is "hidden", too: [depth, B, N, d], what every layer gave, before the last norm. Register
    tokens (Darcet et al. 2024) take part in attention and are dropped from the output.
    `mlp_ratio * width` is the hidden width of the MLP. `frozen_layers` = k > 0 freezes what comes before the layers and
    the first k of them, -1 everything.

    `pooling`: "attention" (one learned query), "mean", or "flatten": one linear layer over all tokens in their places,
    as CT-CLIP embeds a scan. It has N * d * d parameters and is tied to the grid, but a small model on registered
    anatomy learns with it in a hundred steps what takes the others thousands.
    """

    width: int
    depth: int
    num_heads: int
    patch_size: Grid
    volume_size: Grid
    mlp_ratio: float = 4.0
    channels: int = 1
    positions: str = "learned"
    pooling: str = "attention"
    num_registers: int = 0
    qk_norm: bool = False
    layer_scale: float | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_backend: str = "xla"
    stem: str = "linear"
    norm_epsilon: float = 1e-6
    exact_gelu: bool = False
    frozen_layers: int = 0

    @nn.compact
    def __call__(
        self, volume: jax.Array, visible: jax.Array | None = None, train: bool = False, hidden: bool = False
    ) -> dict[str, jax.Array]:
        expected = (*self.volume_size, self.channels)
        if volume.shape[1:] != expected:
            raise UserError(f"the volume encoder was built for volumes of {expected}, not {volume.shape[1:]}.")
        tokens = self._embed(volume.astype(self.dtype)) + self._positions()
        if visible is not None:
            tokens = jnp.take_along_axis(tokens, visible[..., None], axis=1)
        tokens = constrain(tokens, ACTIVATION_AXES)
        tokens = nn.Dropout(self.dropout)(tokens, deterministic=not train or self.frozen_layers != 0)
        if self.num_registers:
            shape = (self.num_registers, self.width)
            registers = self.param("registers", part(TABLE_INIT, ("register", "embed")), shape).astype(tokens.dtype)
            tokens = jnp.concatenate([jnp.broadcast_to(registers, (tokens.shape[0], *shape)), tokens], axis=1)
        found = Stack(
            self.depth,
            self.num_heads,
            round(self.width * self.mlp_ratio),
            self.dtype,
            norm_epsilon=self.norm_epsilon,
            exact_gelu=self.exact_gelu,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            attention_backend=self.attention_backend,
            remat=self.remat,
            frozen_layers=self.frozen_layers,
            name="stack",
        )(tokens, None, train, hidden)
        tokens, states = found if hidden else (found, None)
        tokens = layer_norm(self.dtype, "norm", self.norm_epsilon)(tokens[:, self.num_registers :])
        encoded = {"tokens": tokens} | ({} if states is None else {"hidden": states[:, :, self.num_registers :]})
        if visible is None or self.pooling != "flatten":  # whose layer is made for all patches, each at its place
            encoded["pooled"] = self._pool(tokens)
        if self.frozen_layers == -1:
            encoded = jax.lax.stop_gradient(encoded)
        return encoded | ({} if visible is None else {"places": visible})

    def _embed(self, volume: jax.Array) -> jax.Array:
        if self.stem == "linear":
            return dense(self.width, ("patch", "embed"), self.dtype, "patch_embedding")(
                patchify(volume, self.patch_size)
            )
        if self.stem == "conv":
            return ConvStem(self.width, self.patch_size, self.dtype, name="patch_embedding")(volume)
        raise UserError(f"volume_encoder.stem={self.stem!r} is unknown; choose linear or conv.")

    def _positions(self) -> jax.Array:
        grid = patch_grid(self.volume_size, self.patch_size)
        if self.positions == "learned":
            table = self.param("positions", part(TABLE_INIT, ("position", "embed")), (prod(grid), self.width))
        elif self.positions == "sincos":
            table = jnp.asarray(sincos(grid, self.width))
        else:
            raise UserError(f"volume_encoder.positions={self.positions!r} is unknown; choose learned or sincos.")
        return table.astype(self.dtype)

    def _pool(self, tokens: jax.Array) -> jax.Array:
        if self.pooling == "flatten":
            flat = tokens.reshape(tokens.shape[0], -1)
            return dense(self.width, (None, "embed"), self.dtype, "flatten")(flat)
        if self.pooling == "mean":
            return mean_pool(tokens)
        if self.pooling == "attention":
            return AttentionPool(self.num_heads, self.dtype, name="pool")(tokens)
        raise UserError(f"volume_encoder.pooling={self.pooling!r} is unknown; choose attention, mean or flatten.")
