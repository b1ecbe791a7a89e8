"""The two towers and their heads, assembled: what turns a batch into the features that the objectives read."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.config import Config
from mg3d_jax.models.decoders import TokenHead, VoxelDecoder
from mg3d_jax.models.fusion import Fusion, SentenceConditionedVolume
from mg3d_jax.models.heads import AttentionPool, Projection, mean_pool, sentence_means
from mg3d_jax.models.volume_encoder import patchify

MAX_LOGIT_SCALE = 100.0  # temperature 0.01: CLIP's clip
FIXED_WORD_DIM = 256  # of the random word vectors that `matching.sentence_source = "words"` compares
INITIAL_LOGIT_BIAS = -10.0  # SigLIP's: at the start nearly every pair is called negative


class MG3D(nn.Module):
    """Volume encoder, report encoder, their embeddings, and the fusion and heads of the enabled objectives.

    Args:
        config: the whole configuration (`config.model`, `config.data`, `config.objectives` are read).
        vocab_size: of the run's tokenizer.
        attention_backend: `config.model.attention`, resolved for the device (never "auto").
    """

    config: Config
    vocab_size: int
    attention_backend: str = "xla"

    def setup(self) -> None:
        model, objective = self.config.model, self.config.objectives["alignment"]
        volume = model.volume_encoder.sizes
        report = model.report_encoder.sizes
        common = {"dtype": model.dtype, "remat": model.remat, "attention_backend": self.attention_backend}
        channels = len(self.config.data.windows)
        self.volume_encoder = model.volume_encoder.tower.build(model, channels, self.attention_backend)
        self.report_encoder = model.report_encoder.tower.build(model, self.vocab_size, self.attention_backend)
        self.volume_projection = Projection(model.projection_dim, dtype=model.dtype, use_bias=True)
        self.report_pool = AttentionPool(report.num_heads, dtype=model.dtype)
        self.report_projection = Projection(model.projection_dim, dtype=model.dtype, use_bias=True)
        largest = min(1.0 / objective.temperature, MAX_LOGIT_SCALE)
        self.logit_scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(largest)))
        if objective.form == "sigmoid":
            self.logit_bias = self.param("logit_bias", lambda _: jnp.float32(INITIAL_LOGIT_BIAS))
        self._setup_objectives(volume.num_heads, report.num_heads, common)

    def _setup_objectives(self, volume_heads: int, report_heads: int, common: dict[str, Any]) -> None:
        """What only some objectives need. A module that is never called has no parameters."""
        model, dtype = self.config.model, self.config.model.dtype
        attention = {"dtype": dtype, "attention_backend": self.attention_backend}
        wanted = {
            "volume": self._on("discrimination") or self._fused_pair(),
            "report": self._on("report_reconstruction"),
        }
        wanted["report"] |= self._fused_pair()
        self.fusion = Fusion(
            depth=model.fusion.depth,
            num_heads=volume_heads,
            report_num_heads=report_heads,
            kind=model.fusion.kind,
            outputs=tuple(name for name, on in wanted.items() if on),
            **common,
        )
        self.fused_volume_projection = Projection(model.matching_dim, dtype=dtype)
        self.fused_volume_pair_projection = Projection(model.projection_dim, dtype=dtype)
        self.fused_report_pair_projection = Projection(model.projection_dim, dtype=dtype)
        self.sentence_conditioned_volume = SentenceConditionedVolume(report_heads, model.matching_dim, **attention)
        self.voxel_decoder = VoxelDecoder(
            grid=model.token_grid(),
            patch_values=math.prod(model.token_cell()) * len(self.config.data.windows),
            width=model.voxel_decoder.width,
            depth=model.voxel_decoder.depth,
            num_heads=model.voxel_decoder.num_heads,
            **common,
        )
        self.token_head = TokenHead(self.vocab_size, dtype)
        self.sentence_projection = Projection(model.matching_dim, dtype=dtype)

    def _on(self, *names: str) -> bool:
        """Is any of these objectives enabled?"""
        return any(self.config.objectives[name].weight > 0 for name in names)

    def _fused_pair(self) -> bool:
        return self._on("alignment") and self.config.objectives["alignment"].fused_weight > 0

    def embed_volume(self, volume: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """Windowed volume [B, X, Y, Z, C] -> `volume_tokens` [B, N, d], `volume_embedding` [B, k] (float32, any length)."""
        encoded = self.volume_encoder(volume, train=train)
        embedding = self.volume_projection(encoded["pooled"]).astype(jnp.float32)
        return {"volume_tokens": encoded["tokens"], "volume_embedding": embedding}

    def embed_report(
        self, report: dict[str, jax.Array], *, train: bool = False, max_sentences: int | None = None
    ) -> dict[str, jax.Array]:
        """Text fields of a batch -> `report_tokens` [B, T, d], `sentences` [B, S, d], `sentence_mask` [B, S],
        `report_embedding` [B, k] (float32, any length; zero for a report without sentences)."""
        encoded = self._encode_report(report, train=train, max_sentences=max_sentences)
        embedding = self.report_projection(self.report_pool(encoded["sentences"], encoded["sentence_mask"]))
        return encoded | {"report_embedding": embedding.astype(jnp.float32)}

    def _encode_report(
        self, report: dict[str, jax.Array], *, train: bool, max_sentences: int | None = None
    ) -> dict[str, jax.Array]:
        encoded = self.report_encoder(report["token_ids"], report["token_mask"], train=train)
        count = max_sentences or self.config.data.max_sentences
        sentences, mask = sentence_means(encoded["tokens"], report["sentence_index"], count)
        features = {"report_tokens": encoded["tokens"], "sentences": sentences, "sentence_mask": mask}
        source, targets = self.config.objectives["matching"].sentence_source, encoded["tokens"]
        if source == "embeddings":
            targets = encoded["embeddings"]
        if source == "words":
            table = jax.random.normal(jax.random.key(0), (self.vocab_size, FIXED_WORD_DIM))
            targets = jnp.take(table, report["token_ids"], axis=0)
        targets = sentence_means(jax.lax.stop_gradient(targets), report["sentence_index"], count)[0]
        return features | {"sentence_targets": targets}

    def logits(self) -> dict[str, jax.Array]:
        """`logit_scale` (1 / temperature) and, for the sigmoid form, `logit_bias`: scalars, not per patient.

        The training step keeps the scale at `MAX_LOGIT_SCALE` or below. Clipped here, it would get no gradient once it is
        above, and stay there.
        """
        scale = jnp.exp(self.logit_scale)
        if not self.config.objectives["alignment"].learn_temperature:
            scale = jax.lax.stop_gradient(scale)
        bias = {"logit_bias": self.logit_bias} if self.config.objectives["alignment"].form == "sigmoid" else {}
        return {"logit_scale": scale} | bias

    def __call__(self, inputs: dict[str, Any], *, train: bool = False) -> dict[str, jax.Array]:
        """Features of the enabled objectives, by name, one row per patient (`objectives.multitask` says who reads what).

        Args:
            inputs: what `training.inputs.model_inputs` makes of a batch: `volume` windowed; `report`, the text fields that
                the report embedding reads; where needed `full_report`, `visible`, `patch_mask`, `corrupted_ids`,
                `predicted`, `selected`.
        """
        features: dict[str, jax.Array] = {}
        # The towers and their embeddings always have parameters, so that every run can be evaluated.
        embeds = self._on("alignment") or self.is_initializing()
        full = inputs.get("full_report", inputs["report"])
        text: dict[str, jax.Array] = {}
        if embeds:
            if "full_report" in inputs:
                features |= self._embed_views(inputs["report"], train)
            else:
                text = self.embed_report(inputs["report"], train=train)
                features["report_embedding"] = text["report_embedding"]
                features["report_has_text"] = jnp.any(text["sentence_mask"], axis=1)
        reads_text = self._on("volume_reconstruction") and self.config.objectives["volume_reconstruction"].read_report
        if self._on("report_reconstruction", "matching", "discrimination") or self._fused_pair() or reads_text:
            text = text or self._encode_report(full, train=train)
            features |= {name: text[name] for name in ("sentence_mask", "sentence_targets")}
        if embeds or self._on("report_reconstruction", "matching", "discrimination"):
            features |= self.embed_volume(inputs["volume"], train=train)
        if self._on("matching", "discrimination"):
            z = self.sentence_conditioned_volume(text["sentences"], features["volume_tokens"])
            features["z"] = z.astype(jnp.float32)
        if self._on("discrimination") or self._fused_pair():
            features |= self._fused_embeddings(features["volume_tokens"], text, full["token_mask"], train)
        if self._on("volume_reconstruction"):
            features |= self._reconstruct_volume(inputs, text if reads_text else {}, full["token_mask"], train)
        if self._on("report_reconstruction"):
            features |= self._reconstruct_report(inputs, full, text, features["volume_tokens"], train)
        return features

    def _embed_views(self, views: dict[str, jax.Array], train: bool) -> dict[str, jax.Array]:
        """Single sentences [B, K, L], each embedded as a report of its own: `view_embeddings` [B, K, k], `view_mask` and
        `view_id` [B, K], with `report_has_text` [B]."""
        batch, count, length = views["token_ids"].shape
        rows = {
            name: views[name].reshape(batch * count, length) for name in ("token_ids", "token_mask", "sentence_index")
        }
        embedded = self.embed_report(rows, train=train, max_sentences=1)
        embeddings = embedded["report_embedding"].reshape(batch, count, -1)
        mask = jnp.any(embedded["sentence_mask"], axis=1).reshape(batch, count)
        return {
            "view_embeddings": embeddings,
            "view_mask": mask,
            "view_id": views["view_id"],
            "report_has_text": jnp.any(mask, axis=1),
        }

    def _fused_embeddings(
        self, volume_tokens: jax.Array, text: dict[str, jax.Array], mask: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """`fused_volume_embedding` [B, matching_dim] and, for the fused pair, `fused_embedding` [B, 2 k], float32."""
        fused, embeddings = self.fusion(volume_tokens, text["report_tokens"], mask, train), {}
        volume = mean_pool(fused["volume"])
        if self._on("discrimination"):
            embeddings["fused_volume_embedding"] = self.fused_volume_projection(volume).astype(jnp.float32)
        if self._fused_pair():
            report = self.fused_report_pair_projection(mean_pool(fused["report"], mask))
            pair = jnp.concatenate([report, self.fused_volume_pair_projection(volume)], axis=-1)
            embeddings["fused_embedding"] = pair.astype(jnp.float32)
        return embeddings

    def _reconstruct_volume(
        self, inputs: dict[str, Any], text: dict[str, jax.Array], mask: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """The encoder sees the visible patches only; the decoder also reads the whole report."""
        encoded = self.volume_encoder(inputs["volume"], inputs["visible"], train=train)
        report_tokens = text.get("report_tokens")
        prediction = self.voxel_decoder(encoded["tokens"], encoded.get("places"), report_tokens, mask, train)
        patches = patchify(inputs["volume"], self.config.model.token_cell())
        return {"voxel_prediction": prediction, "patches": patches, "patch_mask": inputs["patch_mask"]}

    def _reconstruct_report(
        self, inputs: dict[str, Any], full: dict, text: dict[str, jax.Array], volume_tokens: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """The tokens of the corrupted report read the whole volume; hidden words and their sentences are predicted."""
        mask = full["token_mask"]
        tokens = self.report_encoder(inputs["corrupted_ids"], mask, train=train)["tokens"]
        tokens = self.fusion(volume_tokens, tokens, mask, train)["report"]
        sentences, _ = sentence_means(tokens, full["sentence_index"], self.config.data.max_sentences)
        # Logits over the vocabulary are large: only of the tokens that are predicted.
        predicted = jnp.take_along_axis(tokens, inputs["predicted"][..., None], axis=1)
        return {
            "token_logits": self.token_head(predicted),
            "token_labels": jnp.take_along_axis(full["token_ids"], inputs["predicted"], axis=1),
            "token_selected": inputs["selected"],
            "reconstructed_sentences": self.sentence_projection(sentences),
            "original_sentences": self.sentence_projection(text["sentences"]),
        }
