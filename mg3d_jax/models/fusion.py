"""Cross-modal layers: volume tokens read the report and report tokens the volume; what a sentence sees in the volume."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.heads import Projection, mean_pool
from mg3d_jax.models.transformer import ACTIVATION_AXES, Attention, Mlp, constrain, dense, layer_norm, make_remat

FUSION_KINDS = ("attention", "gate")
Streams = tuple[jax.Array, jax.Array]


class CrossAttention(nn.Module):
    """Pre-norm residual cross-attention: `(x [B, T, d], other [B, Tk, e], mask bool [B, Tk] or None) -> [B, T, d]`.

    Where a patient's mask is empty (a report without text) `x` passes through unchanged.
    """

    num_heads: int
    dtype: str = "float32"
    dropout: float = 0.0
    attention_backend: str = "xla"

    @nn.compact
    def __call__(
        self, inputs: jax.Array, other: jax.Array, mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        query, context = layer_norm(self.dtype, "norm")(inputs), layer_norm(self.dtype, "context_norm")(other)
        attention = Attention(self.num_heads, self.dtype, backend=self.attention_backend, name="attention")
        change = nn.Dropout(self.dropout)(attention(query, context, mask), deterministic=not train)
        if mask is not None:
            change = jnp.where(jnp.any(mask, axis=1)[:, None, None], change, 0)
        return constrain(inputs + change, ACTIVATION_AXES)


class RelevanceGate(nn.Module):
    """Scales each token by the sigmoid of its mean relevance to the other modality; mixes no tokens (MG-3D's release).

    `(x [B, T, d], other [B, Tk, e], mask bool [B, Tk] or None) -> [B, T, d]`. The mean over the other tokens of the
    scaled dot products is the dot product with their mean key, so no [T, Tk] matrix is needed.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, inputs: jax.Array, other: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        width = inputs.shape[-1]
        query = dense(width, ("embed", "heads"), self.dtype, "query")(layer_norm(self.dtype, "norm")(inputs))
        key = dense(width, ("embed", "heads"), self.dtype, "key")(layer_norm(self.dtype, "context_norm")(other))
        relevance = jnp.einsum("btd,bd->bt", query, mean_pool(key, mask), preferred_element_type=jnp.float32)
        gate = nn.sigmoid(relevance * width**-0.5)
        return constrain(inputs * gate[..., None].astype(inputs.dtype), ACTIVATION_AXES)


class FusionLayer(nn.Module):
    """One layer, both directions at once: `((volume, report), report_mask, train) -> (volume, report)`."""

    num_heads: int
    report_num_heads: int
    mlp_ratio: float
    kind: str
    dtype: str
    dropout: float
    attention_backend: str

    @nn.compact
    def __call__(self, streams: Streams, report_mask: jax.Array, train: bool = False) -> Streams:
        volume, report = streams
        new_volume = self._read("volume", self.num_heads, volume, report, report_mask, train)
        new_report = self._read("report", self.report_num_heads, report, volume, None, train)
        return self._mlp("volume", new_volume, train), self._mlp("report", new_report, train)

    def _read(
        self, name: str, num_heads: int, inputs: jax.Array, other: jax.Array, mask: jax.Array | None, train: bool
    ) -> jax.Array:
        if self.kind == "gate":
            return RelevanceGate(self.dtype, name=f"{name}_gate")(inputs, other, mask)
        read = CrossAttention(
            num_heads, self.dtype, self.dropout, self.attention_backend, name=f"{name}_cross_attention"
        )
        return read(inputs, other, mask, train)

    def _mlp(self, name: str, inputs: jax.Array, train: bool) -> jax.Array:
        hidden = round(inputs.shape[-1] * self.mlp_ratio)
        change = layer_norm(self.dtype, f"{name}_mlp_norm")(inputs)
        change = Mlp(hidden, self.dtype, dropout=self.dropout, name=f"{name}_mlp")(change, train)
        return constrain(inputs + nn.Dropout(self.dropout)(change, deterministic=not train), ACTIVATION_AXES)


class Fusion(nn.Module):
    """`(volume_tokens [B, N, d], report_tokens [B, T, e], report_mask bool [B, T]) -> (fused_volume, fused_report)`.

    Same shapes as the inputs, normalised. `kind` "attention" is cross-attention (padding masked out), "gate" the
    release's `RelevanceGate`. The widths d and e may differ; `num_heads` must divide d and `report_num_heads` e.
    """

    depth: int
    num_heads: int
    report_num_heads: int
    kind: str = "attention"
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_backend: str = "xla"

    @nn.compact
    def __call__(
        self, volume_tokens: jax.Array, report_tokens: jax.Array, report_mask: jax.Array, train: bool = False
    ) -> Streams:
        if self.kind not in FUSION_KINDS:
            raise UserError(f"fusion.kind={self.kind!r} is unknown; choose one of {', '.join(FUSION_KINDS)}.")
        streams = volume_tokens.astype(self.dtype), report_tokens.astype(self.dtype)
        layer = make_remat(self.remat)(FusionLayer)
        options = "num_heads report_num_heads mlp_ratio kind dtype dropout attention_backend".split()
        options = {field: getattr(self, field) for field in options}
        for number in range(self.depth):
            streams = layer(**options, name=f"layer_{number}")(streams, report_mask, train)
        volume, report = streams
        return layer_norm(self.dtype, "volume_norm")(volume), layer_norm(self.dtype, "report_norm")(report)


class SentenceConditionedVolume(nn.Module):
    """What sentences find in the volume: `(sentences [B, S, e], volume_tokens [B, N, d]) -> z [B, S, projection_dim]`.

    The sentence is only the query: no residual carries it around the attention, or the features could match the text
    without looking at the volume. Output in the compute dtype.
    """

    num_heads: int
    projection_dim: int = 128
    dtype: str = "float32"
    attention_backend: str = "xla"

    @nn.compact
    def __call__(self, sentences: jax.Array, volume_tokens: jax.Array) -> jax.Array:
        query = layer_norm(self.dtype, "norm")(sentences)
        context = layer_norm(self.dtype, "context_norm")(volume_tokens)
        seen = Attention(self.num_heads, self.dtype, backend=self.attention_backend, name="attention")(query, context)
        return Projection(self.projection_dim, dtype=self.dtype, name="projection")(seen)
