"""Reconstruction heads: voxels of hidden patches from the visible ones and the report; words from report tokens."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.models.fusion import CrossAttention
from mg3d_jax.models.positions import Grid, sincos
from mg3d_jax.models.transformer import (
    ACTIVATION_AXES,
    TABLE_INIT,
    Block,
    constrain,
    dense,
    layer_norm,
    make_remat,
    part,
)


class DecoderLayer(nn.Module):
    """Reads the report (where there is one), then mixes the patches: `(streams, report_mask, train) -> tokens`."""

    num_heads: int
    mlp_dim: int
    dtype: str
    dropout: float
    attention_backend: str

    @nn.compact
    def __call__(
        self, streams: tuple[jax.Array, jax.Array | None], report_mask: jax.Array | None, train: bool = False
    ) -> jax.Array:
        tokens, report = streams
        common = {"dtype": self.dtype, "dropout": self.dropout, "attention_backend": self.attention_backend}
        if report is not None:
            tokens = CrossAttention(self.num_heads, **common, name="cross_attention")(
                tokens, report, report_mask, train
            )
        return Block(self.num_heads, self.mlp_dim, **common, name="block")(tokens, None, train)


class VoxelDecoder(nn.Module):
    """Light decoder of masked volume modelling (He et al. 2022) that also reads the report.

    `(tokens [B, Nv, d], places int32 [B, Nv], report_tokens [B, T, e], report_mask bool [B, T])` ->
    `[B, N, patch_values]` in float32, in the order of `patchify`. `places` says where the encoder's tokens belong; all
    others hold a learned mask token. None: the encoder gave the tokens of all places, [B, N, d]. All places get
    sine-cosine positions. Without report tokens (None) it is a plain masked autoencoder's decoder.
    """

    grid: Grid
    patch_values: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_backend: str = "xla"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        places: jax.Array | None,
        report_tokens: jax.Array | None = None,
        report_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        positions = jnp.asarray(sincos(self.grid, self.width))
        tokens = dense(self.width, ("embed", None), self.dtype, "embed")(tokens.astype(self.dtype))
        if places is not None:
            mask_token = self.param("mask_token", part(TABLE_INIT, ("embed",)), (self.width,)).astype(self.dtype)
            everywhere = jnp.broadcast_to(mask_token, (tokens.shape[0], *positions.shape))
            tokens = everywhere.at[jnp.arange(tokens.shape[0])[:, None], places].set(tokens)
        tokens = constrain(tokens + positions.astype(self.dtype), ACTIVATION_AXES)
        if report_tokens is not None:
            report_tokens = report_tokens.astype(self.dtype)
        layer = make_remat(self.remat, scanned=False)(DecoderLayer)
        mlp_dim = round(self.width * self.mlp_ratio)
        for number in range(self.depth):
            block = layer(
                self.num_heads, mlp_dim, self.dtype, self.dropout, self.attention_backend, name=f"layer_{number}"
            )
            tokens = block((tokens, report_tokens), report_mask, train)
        tokens = layer_norm(self.dtype, "norm")(tokens)
        return dense(self.patch_values, ("embed", "patch"), self.dtype, "voxels")(tokens).astype(jnp.float32)


class TokenHead(nn.Module):
    """Masked-language-model head (Devlin et al. 2019): [B, T, d] -> logits [B, T, vocab_size] in the compute dtype."""

    vocab_size: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        hidden = nn.gelu(dense(tokens.shape[-1], ("embed", None), self.dtype, "transform")(tokens), approximate=False)
        hidden = layer_norm(self.dtype, "norm", 1e-12)(hidden)
        return dense(self.vocab_size, ("embed", "vocab"), self.dtype, "vocab")(hidden)
