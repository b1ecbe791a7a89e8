"""Cross-modal layers: volume tokens read the report and report tokens the volume; what a sentence sees in it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.heads import Projection, mean_pool
from mg3d_jax.models.transformer import ACTIVATION_AXES, Attention, Mlp, constrain, dense, layer_norm, make_remat

FUSION_KINDS = ("attention", "gate")
STREAMS = ("volume", "report")
Streams = dict[str, jax.Array]


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
    scaled dot products is the dot product with their mean key, so no [T, Tk] matrix is needed. Where all of `other` is
    masked, as by an empty report, every token is halved, the sigmoid of 0.
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
    """`(streams, report_mask, train) -> streams`: each stream in `updated` reads the other as it was before."""

    num_heads: dict[str, int]
    updated: tuple[str, ...]
    mlp_ratio: float
    kind: str
    dtype: str
    dropout: float
    attention_backend: str

    @nn.compact
    def __call__(self, streams: Streams, report_mask: jax.Array, train: bool = False) -> Streams:
        return {name: self._update(name, streams, report_mask, train) for name in self.updated}

    def _update(self, name: str, streams: Streams, report_mask: jax.Array, train: bool) -> jax.Array:
        inputs, other, mask = streams[name], streams["volume"], None
        if name == "volume":
            other, mask = streams["report"], report_mask
        if self.kind == "gate":
            inputs = RelevanceGate(self.dtype, name=f"{name}_gate")(inputs, other, mask)
        else:
            options = self.num_heads[name], self.dtype, self.dropout, self.attention_backend
            inputs = CrossAttention(*options, name=f"{name}_cross_attention")(inputs, other, mask, train)
        change = layer_norm(self.dtype, f"{name}_mlp_norm")(inputs)
        mlp = Mlp(round(inputs.shape[-1] * self.mlp_ratio), self.dtype, dropout=self.dropout, name=f"{name}_mlp")
        change = nn.Dropout(self.dropout)(mlp(change, train), deterministic=not train)
        return constrain(inputs + change, ACTIVATION_AXES)


class Fusion(nn.Module):
    """`(volume_tokens [B, N, d], report_tokens [B, T, e], report_mask bool [B, T]) -> {"volume", "report"}`.

    The streams keep their shapes and come out normalised. `kind` "attention" is cross-attention (padding is not read),
    "gate" that of MG-3D's release (`RelevanceGate`). The widths may differ: `num_heads` must divide d, `report_num_heads` e.
    Streams that `outputs` does not name are not returned, and the last layer does not compute them.
    """

    depth: int
    num_heads: int
    report_num_heads: int
    kind: str = "attention"
    outputs: tuple[str, ...] = STREAMS
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
        streams = {"volume": volume_tokens.astype(self.dtype), "report": report_tokens.astype(self.dtype)}
        layer = make_remat(self.remat, scanned=False)(FusionLayer)
        for number in range(self.depth):
            streams = layer(
                num_heads={"volume": self.num_heads, "report": self.report_num_heads},
                updated=self.outputs if number == self.depth - 1 else STREAMS,
                mlp_ratio=self.mlp_ratio,
                kind=self.kind,
                dtype=self.dtype,
                dropout=self.dropout,
                attention_backend=self.attention_backend,
                name=f"layer_{number}",
            )(streams, report_mask, train)
        return {name: layer_norm(self.dtype, f"{name}_norm")(streams[name]) for name in self.outputs}


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
