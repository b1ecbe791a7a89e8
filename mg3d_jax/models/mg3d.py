"""The two towers and their heads, assembled: what turns a batch into the features that the objectives read."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mg3d_jax.models import presets
from mg3d_jax.models.heads import AttentionPool, Projection, sentence_means
from mg3d_jax.models.report_encoder import ReportEncoder
from mg3d_jax.models.volume_encoder import VolumeEncoder

MAX_LOGIT_SCALE = 100.0  # temperature 0.01: CLIP's clip


class MG3D(nn.Module):
    """Volume encoder, report encoder, pooling and projections into one embedding space.

    Args:
        config: the whole configuration (`config.model`, `config.data`, `config.objectives` are read).
        vocab_size: of the run's tokenizer.
        attention_backend: `config.model.attention`, resolved for the device (never "auto").
    """

    config: ConfigDict
    vocab_size: int
    attention_backend: str = "xla"

    def setup(self) -> None:
        model, objective = self.config.model, self.config.objectives.alignment
        volume, report = presets.volume_preset(model.volume_encoder.preset), presets.report_preset(model.report_encoder.preset)
        common = {"dtype": model.dtype, "remat": model.remat, "attention_backend": self.attention_backend}
        self.volume_encoder = VolumeEncoder(
            width=volume.width,
            depth=volume.depth,
            num_heads=volume.num_heads,
            mlp_ratio=volume.mlp_ratio,
            patch_size=tuple(model.volume_encoder.patch_size),
            volume_size=tuple(model.volume_size),
            channels=len(self.config.data.windows),
            positions=model.volume_encoder.positions,
            pooling=model.volume_encoder.pooling,
            num_registers=model.volume_encoder.num_registers,
            qk_norm=model.volume_encoder.qk_norm,
            layer_scale=model.volume_encoder.layer_scale or None,
            dropout=model.volume_encoder.dropout,
            stem=model.volume_encoder.stem,
            **common,
        )
        self.report_encoder = ReportEncoder(
            vocab_size=self.vocab_size,
            width=report.width,
            depth=report.depth,
            num_heads=report.num_heads,
            mlp_dim=report.mlp_dim,
            max_positions=model.report_encoder.max_positions,
            dropout=model.report_encoder.dropout,
            **common,
        )
        self.volume_projection = Projection(model.projection_dim, dtype=model.dtype)
        self.report_pool = AttentionPool(report.num_heads, dtype=model.dtype)
        self.report_projection = Projection(model.projection_dim, dtype=model.dtype)
        self.logit_scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(1.0 / objective.temperature)))

    def embed_volume(self, volume: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Windowed volume `[B, X, Y, Z, C]` -> `volume_tokens [B, N, d]`, `volume_embedding [B, k]` (float32, not normalised)."""
        encoded = self.volume_encoder(volume, train=train)
        embedding = self.volume_projection(encoded["pooled"]).astype(jnp.float32)
        return {"volume_tokens": encoded["tokens"], "volume_embedding": embedding}

    def embed_report(self, report: dict[str, jax.Array], *, train: bool = False) -> dict[str, jax.Array]:
        """Text fields of a batch -> `report_tokens [B, T, d]`, `sentences [B, S, d]`, `sentence_mask`, `report_embedding [B, k]`."""
        tokens = self.report_encoder(report["token_ids"], report["token_mask"], train=train)["tokens"]
        sentences, mask = sentence_means(tokens, report["sentence_index"], self.config.data.max_sentences)
        embedding = self.report_projection(self.report_pool(sentences, mask)).astype(jnp.float32)
        return {"report_tokens": tokens, "sentences": sentences, "sentence_mask": mask, "report_embedding": embedding}

    def __call__(self, inputs: dict[str, Any], *, train: bool = False) -> dict[str, jax.Array]:
        """`inputs`: `volume` windowed, and the text fields of the report's view. Returns every feature, by name."""
        scale = jnp.minimum(jnp.exp(self.logit_scale), MAX_LOGIT_SCALE)
        if not self.config.objectives.alignment.learn_temperature:
            scale = jax.lax.stop_gradient(scale)
        report = self.embed_report(inputs["report"], train=train)
        return self.embed_volume(inputs["volume"], train=train) | report | {"logit_scale": scale}
