"""BERT-type report encoder (Devlin et al. 2019): token ids -> contextual token features.

The layout follows BERT exactly (post-norm, learned positions, exact GELU), so that weights of any BERT or RoBERTa
checkpoint can be loaded (`hugging_face.py`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.transformer import ACTIVATION_AXES, TABLE_INIT, Stack, constrain, layer_norm, part


class ReportEncoder(nn.Module):
    """`(token_ids int32 [B, T], token_mask bool [B, T]) -> {"tokens": [B, T, d], "embeddings": [B, T, d]}`.

    "tokens" are the features of the last layer, "embeddings" the input embeddings (word + position + type, normalised)
    that enter the first. Features at padding are not meaningful. `frozen_layers` = k > 0 freezes the embeddings and the
    first k layers, -1 everything.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    max_positions: int
    type_vocab: int = 2  # RoBERTa: 1
    norm_epsilon: float = 1e-12  # RoBERTa: 1e-5
    dropout: float = 0.0
    dtype: str = "float32"
    remat: str = "none"
    attention_backend: str = "xla"
    frozen_layers: int = 0

    @nn.compact
    def __call__(self, token_ids: jax.Array, token_mask: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        length = token_ids.shape[1]
        if length > self.max_positions:
            raise UserError(f"{length} tokens do not fit the report encoder's max_positions={self.max_positions}.")
        words = self._table("word_embedding", self.vocab_size, "vocab")
        positions = self._table("position_embedding", self.max_positions, "position")
        types = self._table("type_embedding", self.type_vocab, None)
        # A report is one segment: type 0 throughout. Looked up in a table that is whole along its width, like any weight in
        # use: looking up pieces of rows would replicate the whole batch on the way.
        summed = jnp.take(constrain(words, ("vocab", None)), token_ids, axis=0) + positions[:length] + types[0]
        embeddings = layer_norm(self.dtype, "embedding_norm", self.norm_epsilon)(summed.astype(self.dtype))
        embeddings = constrain(embeddings, ACTIVATION_AXES)
        if self.frozen_layers:
            entering = embeddings = jax.lax.stop_gradient(embeddings)
        else:
            entering = nn.Dropout(self.dropout)(embeddings, deterministic=not train)
        tokens = Stack(
            self.depth,
            self.num_heads,
            self.mlp_dim,
            self.dtype,
            norm_position="post",
            norm_epsilon=self.norm_epsilon,
            exact_gelu=True,
            dropout=self.dropout,
            attention_backend=self.attention_backend,
            remat=self.remat,
            frozen_layers=self.frozen_layers,
            name="stack",
        )(entering, token_mask, train)
        return {"tokens": tokens, "embeddings": embeddings}

    def _table(self, name: str, rows: int, axis: str | None) -> jax.Array:
        return self.param(name, part(TABLE_INIT, (axis, "embed")), (rows, self.width))
