"""The two towers and their heads, assembled: what turns a batch into the features that objectives and tasks need."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mg3d_jax.errors import UserError
from mg3d_jax.models.attention import choose_backend
from mg3d_jax.models.decoders import TokenHead, VoxelDecoder
from mg3d_jax.models.fusion import Fusion, SentenceConditionedVolume
from mg3d_jax.models.heads import AttentionPool, Projection, mean_pool, sentence_means
from mg3d_jax.models.patches import patchify
from mg3d_jax.models.report_decoder import Cache, ReportDecoder
from mg3d_jax.models.steps import ALWAYS, STEPS, steps_for
from mg3d_jax.objectives.base import DIRECTION_BIASES, REPORT_BIAS, VOLUME_BIAS, Context, Enabled
from mg3d_jax.objectives.pairwise import l2_normalize
from mg3d_jax.objectives.same_words import others

MAX_LOGIT_SCALE = 100.0  # temperature 0.01: the bound that CLIP uses
FIXED_WORD_DIM = 256  # length of the random word vectors of `sentence_words`
SENTENCE_FEATURES = "sentence_features"  # of a report, where these are given in place of its tokens
INITIAL_LOGIT_BIAS = -10.0  # SigLIP's: at the start nearly every pair is called negative


def text_embedding(params: Any, directions: Any) -> Any:
    """What a text is compared by, `[..., k]`, l2-normalised: its direction (a unit vector), or the mean direction of its
    parts, less the mean of all texts where the model was trained so (`objectives.alignment`)."""
    return l2_normalize(directions + params[REPORT_BIAS] if REPORT_BIAS in params else directions)


def volume_embedding(params: Any, embeddings: Any) -> Any:
    """What a volume is compared by, `[..., k]`, l2-normalised, of `embed_volume`'s embeddings of any length."""
    directions = l2_normalize(embeddings)
    return l2_normalize(directions + params[VOLUME_BIAS]) if VOLUME_BIAS in params else directions


class MG3D(nn.Module):
    """Volume encoder, report encoder, their embeddings, and the fusion and heads that `on` needs.

    Args:
        context: sizes; its `special` ids are empty, as the model reads none.
        on: the objectives and tasks with a positive weight (`objectives.base.enabled`).
        temperature: of the softmax at the start; `logit_scale` starts at its inverse, at most `MAX_LOGIT_SCALE`.
        learn_temperature: if False, `logit_scale` gets no gradient.
        sigmoid: adds the learned `logit_bias` of SigLIP's loss.
        direction_bias: adds `DIRECTION_BIASES` [k], see `objectives.alignment`.
    """

    context: Context
    on: tuple[Enabled, ...]
    temperature: float = 0.1
    learn_temperature: bool = False
    sigmoid: bool = False
    direction_bias: bool = False

    @property
    def vocab_size(self) -> int:
        """Of the run's tokenizer."""
        return self.context.vocab_size

    @property
    def attention(self) -> tuple[str, str]:
        """The backend of the attention on this platform, and why. `UserError` for one that cannot run here."""
        model = self.context.model
        sizes = [encoder.sizes for encoder in model.encoders().values()]
        head_dim = max(one.width // one.num_heads for one in sizes)
        return choose_backend(model.attention, jax.default_backend(), model.dtype, head_dim)

    def setup(self) -> None:
        model, (backend, _) = self.context.model, self.attention
        report = model.report_encoder.sizes
        self.volume_encoder = model.volume_encoder.tower.build(model, len(self.context.data.windows), backend)
        self.report_encoder = model.report_encoder.tower.build(model, self.vocab_size, backend)
        self.volume_projection = Projection(model.projection_dim, dtype=model.dtype, use_bias=True)
        self.report_pool = AttentionPool(report.num_heads, dtype=model.dtype)
        self.report_projection = Projection(model.projection_dim, dtype=model.dtype, use_bias=True)
        initial = min(1.0 / self.temperature, MAX_LOGIT_SCALE)
        self.logit_scale = self.param("logit_scale", lambda _: jnp.log(jnp.float32(initial)))
        if self.sigmoid:
            self.logit_bias = self.param("logit_bias", lambda _: jnp.float32(INITIAL_LOGIT_BIAS))
        if self.direction_bias:
            for name in DIRECTION_BIASES:
                setattr(self, name, self.param(name, nn.initializers.zeros, (model.projection_dim,)))
        self._setup_heads(model.volume_encoder.sizes.num_heads, report.num_heads, backend)
        own = {one.name: one.objective.modules(one.options, self.context) for one in self.on}
        for modules in own.values():
            for name, module in modules.items():
                setattr(self, name, module)  # at the top of the parameter tree, beside the towers
        self.own_modules = {name: tuple(modules) for name, modules in own.items()}

    def _setup_heads(self, volume_heads: int, report_heads: int, backend: str) -> None:
        """What only some features need. A module that is never called has no parameters."""
        model, dtype = self.context.model, self.context.model.dtype
        common = {"dtype": dtype, "remat": model.remat, "attention_backend": backend}
        needed = self._needed()
        read = {*needed, *(name for step in steps_for(needed) for name in step.reads)}
        streams = {
            "volume": {"fused_volume", "fused_volume_others"},
            "report": {"fused_report", "fused_report_others", "reconstructed_tokens"},
        }
        self.fusion = Fusion(
            depth=model.fusion.depth,
            num_heads=volume_heads,
            report_num_heads=report_heads,
            kind=model.fusion.kind,
            outputs=tuple(name for name, readers in streams.items() if readers & read),
            **common,
        )
        self.fused_volume_projection = Projection(model.matching_dim, dtype=dtype)
        self.fused_volume_pair_projection = Projection(model.projection_dim, dtype=dtype)
        self.fused_report_pair_projection = Projection(model.projection_dim, dtype=dtype)
        self.sentence_conditioned_volume = SentenceConditionedVolume(report_heads, model.matching_dim, dtype, backend)
        self.voxel_decoder = VoxelDecoder(
            grid=model.token_grid(),
            patch_values=math.prod(model.token_cell()) * len(self.context.data.windows),
            width=model.voxel_decoder.width,
            depth=model.voxel_decoder.depth,
            num_heads=model.voxel_decoder.num_heads,
            **common,
        )
        if (segmenter := model.volume_encoder.tower.segmenter) is not None:
            self.segmentation_decoder = segmenter(model)
        self.token_head = TokenHead(self.vocab_size, dtype)
        self.sentence_projection = Projection(model.matching_dim, dtype=dtype)
        decoder = model.report_decoder
        self.report_decoder = ReportDecoder(
            self.vocab_size,
            max_tokens=self.context.data.max_tokens - 1,  # nothing follows the last one
            width=decoder.width,
            depth=decoder.depth,
            num_heads=decoder.num_heads,
            num_findings=self._findings_read(),
            **common,
        )

    def _findings_read(self) -> int:
        """How many findings the report decoder reads: those of the classification head, or none."""
        options = {one.name: one.options for one in self.on}
        if "generation" not in options or not options["generation"].findings:
            return 0
        return options["classification"].num_labels

    def _needed(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for one in self.on for name in one.needs))

    def __call__(self, inputs: dict[str, Any], *, train: bool = False) -> dict[str, dict[str, Any]]:
        """What each loss reads, by the name of its objective or task: trees of arrays, one row per patient.

        Args:
            inputs: what `training.inputs.model_inputs` makes of a batch.
        """
        needed = self._needed() + (ALWAYS if self.is_initializing() else ())
        values = self.compute(inputs, needed, train=train)
        found = {}
        for one in self.on:
            modules = {name: getattr(self, name) for name in self.own_modules[one.name]}
            needs = {name: values[name] for name in one.needs}
            found[one.name] = one.objective.features(modules, needs, one.options)
        return found

    def compute(self, inputs: dict[str, Any], names: tuple[str, ...], *, train: bool = False) -> dict[str, Any]:
        """These features and inputs by name, see `models.steps.STEPS`. `UserError` where there is none of that name."""
        values = dict(inputs)
        for step in steps_for(names):
            if missing := [name for name in step.reads if name not in values]:
                raise UserError(f"{', '.join(step.gives)} need {missing}, which no objective that is on draws")
            found = getattr(self, step.method)(*(values[name] for name in step.reads), train=train)
            values |= dict(zip(step.gives, found, strict=True))
        if missing := [name for name in names if name not in values]:
            known = sorted({name for step in STEPS for name in step.gives} | inputs.keys())
            raise UserError(f"the model has no features {missing}; it has {', '.join(known)}")
        return {name: values[name] for name in names}

    def embed_volume(self, volume: jax.Array) -> dict[str, jax.Array]:
        """Windowed volume [B, X, Y, Z, C] -> `volume_tokens` [B, N, d], `volume_embedding` [B, k] (float32, not normalised)."""
        return self.compute({"volume": volume}, ("volume_tokens", "volume_embedding"))

    def embed_report(self, report: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Text fields of a batch -> `report_tokens` [B, T, d], `sentences` [B, S, d], `sentence_mask` [B, S],
        `report_embedding` [B, k] (float32, any length; zero for a report without sentences)."""
        names = ("report_tokens", "sentences", "sentence_mask", "report_embedding")
        return self.compute({"report": report}, names)

    def fuse(self, volume_tokens: jax.Array, report: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Tokens [B, N, d] and reports -> `fused_volume` [B, d], `fused_report` [B, e] of each report with its volume,
        and `fused_embedding` [B, 2k] where an objective reads it."""
        tokens, _ = self._encode_report(report, train=False)
        volume, words = self._fused(volume_tokens, tokens, report, train=False)
        assert volume is not None and words is not None, "no objective that is on reads both"
        found = {"fused_volume": volume, "fused_report": words}
        if "fused_embedding" in self._needed():
            found["fused_embedding"] = self._fused_embedding(volume, words, train=False)[0]
        return found

    def start_report(self, volume: jax.Array, texts: int, length: int) -> Cache:
        """Windowed volume [B, X, Y, Z, C] -> the cache for `texts` reports of at most `length` tokens of each. A decoder that
        reads findings is given those that the classification head finds more likely than not."""
        seen = self.compute({"volume": volume}, ("volume_tokens", "volume_pooled"))
        findings = None
        if self._findings_read():
            findings = self.classification_head(seen["volume_pooled"].astype(jnp.float32)) > 0
        return self.report_decoder.start(seen["volume_tokens"], texts, length, findings)

    def report_step(self, token_ids: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Logits [B, K, vocab] of what follows the tokens [B, K] at `position`, and the cache (`ReportDecoder.step`)."""
        return self.report_decoder.step(token_ids, position, cache)

    def logits(self) -> dict[str, jax.Array]:
        """`logit_scale` (1 / temperature) and, for the sigmoid form, `logit_bias`: scalars, not per patient.

        The training step keeps the scale at `MAX_LOGIT_SCALE` or below. Clipped here, it would get no gradient once it is
        above, and stay there.
        """
        scale = jnp.exp(self.logit_scale)
        if not self.learn_temperature:
            scale = jax.lax.stop_gradient(scale)
        return {"logit_scale": scale} | ({"logit_bias": self.logit_bias} if self.sigmoid else {})

    # The steps: `(what the row of `models.steps.STEPS` reads, train) -> what it gives`.

    def _embed_views(self, views: dict[str, jax.Array], train: bool) -> tuple[jax.Array, ...]:
        """Sentence views, token arrays [B, V, L], each encoded as a report of its own -> [B, V, k], mask and id [B, V]."""
        return *self._embed_sentences(views, train), views["view_id"]

    def _embed_statements(self, statements: dict[str, jax.Array], train: bool) -> tuple[jax.Array, ...]:
        """Statements and their opposites, token arrays [B, V, 2, L] -> [B, V, 2, k], and what they say [B, V]."""
        return self._embed_sentences(statements, train)[0], statements["kind"]

    def _volume_direction(self, embedding: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """[B, k]: what evaluations compare volumes by."""
        return (volume_embedding(self._direction_biases(), embedding),)

    def _statement_directions(self, embeddings: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """[B, V, 2, k]: what evaluations compare texts by."""
        return (text_embedding(self._direction_biases(), l2_normalize(embeddings)),)

    def _direction_biases(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name) for name in DIRECTION_BIASES} if self.direction_bias else {}

    def _embed_sentences(self, texts: dict[str, jax.Array], train: bool) -> tuple[jax.Array, jax.Array]:
        """Single sentences [..., L], each encoded as a report of its own, or their features [..., e] -> embeddings [..., k],
        and which there are [...]."""
        if self.is_initializing():  # a report goes through the same modules, and each pass takes a while to trace
            axes = texts["there"].shape if "features" in texts else texts["token_ids"].shape[:-1]
            return jnp.zeros((*axes, self.context.model.projection_dim)), jnp.zeros(axes, bool)
        if "features" in texts:
            features, there = texts["features"], texts["there"]
        else:
            features, there = self.sentence_features(texts, train=train)
        axes = there.shape
        rows = features.reshape(-1, 1, features.shape[-1]).astype(self.context.model.dtype)
        (embeddings,) = self._report_embedding(rows, there.reshape(-1, 1), train=train)
        return embeddings.reshape(*axes, -1), there

    def sentence_features(self, texts: dict[str, jax.Array], *, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Single sentences, token arrays [..., L] -> means of their tokens [..., e], and which have any [...]."""
        *axes, length = texts["token_ids"].shape
        names = ("token_ids", "token_mask", "sentence_index")
        rows = {name: texts[name].reshape(-1, length) for name in names}
        tokens, _ = self._encode_report(rows, train=train)
        means, mask = sentence_means(tokens, rows["sentence_index"], 1)
        return means.reshape(*axes, -1), jnp.any(mask, axis=1).reshape(axes)

    def _encode_report(self, report: dict[str, jax.Array], train: bool) -> tuple[jax.Array, ...]:
        if SENTENCE_FEATURES in report:  # with `model.report_input` = "sentences" these are its tokens
            if self.is_initializing():  # the encoder belongs to the run: evaluations encode texts
                self.report_encoder(report["token_ids"], jnp.ones_like(report["token_ids"], bool))
            features = report[SENTENCE_FEATURES].astype(self.context.model.dtype)
            return features, features
        encoded = self.report_encoder(report["token_ids"], report["token_mask"], train=train)
        return encoded["tokens"], encoded["embeddings"]

    def _sentences(self, tokens: jax.Array, report: dict[str, jax.Array], train: bool) -> tuple[jax.Array, ...]:
        return sentence_means(tokens, report["sentence_index"], self.context.data.max_sentences)

    def _report_embedding(self, sentences: jax.Array, mask: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        return (self.report_projection(self.report_pool(sentences, mask)).astype(jnp.float32),)

    def _sentence_embeddings(
        self, embeddings: jax.Array, report: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array, ...]:
        """[B, S, d]: means of what enters the report encoder."""
        return self._sentences(embeddings, report, train)[:1]

    def _sentence_words(self, report: dict[str, jax.Array], train: bool) -> tuple[jax.Array, ...]:
        """[B, S, FIXED_WORD_DIM]: means of word vectors that are random, but the same in every run."""
        table = jax.random.normal(jax.random.key(0), (self.vocab_size, FIXED_WORD_DIM))
        return self._sentences(jnp.take(table, report["token_ids"], axis=0), report, train)[:1]

    def _volume(self, volume: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        encoded = self.volume_encoder(volume, train=train)
        return encoded["tokens"], encoded["pooled"]

    def _volume_embedding(self, pooled: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        return (self.volume_projection(pooled).astype(jnp.float32),)

    def _sentence_conditioned(
        self, sentences: jax.Array, volume_tokens: jax.Array, train: bool
    ) -> tuple[jax.Array, ...]:
        return (self.sentence_conditioned_volume(sentences, volume_tokens).astype(jnp.float32),)

    def _sentence_conditioned_others(
        self, sentences: jax.Array, volume_tokens: jax.Array, train: bool
    ) -> tuple[jax.Array, ...]:
        """[B, K, S, m]: what the sentences of a patient find in the volumes of the K next rows."""
        count = self.context.model.fusion.other_volumes
        (found,) = self._sentence_conditioned(*_with_others(count, sentences, volume_tokens), train=train)
        return (found.reshape(-1, count, *found.shape[1:]),)

    def _fused(
        self, volume_tokens: jax.Array, report_tokens: jax.Array, report: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array | None, ...]:
        """Means [B, d] over the fused tokens of both; None for the one that nobody reads."""
        mask = report["token_mask"]
        fused = self.fusion(volume_tokens, report_tokens, mask, train)
        volume = mean_pool(fused["volume"]) if "volume" in fused else None
        return volume, mean_pool(fused["report"], mask) if "report" in fused else None

    def _fused_others(
        self, volume_tokens: jax.Array, report_tokens: jax.Array, report: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array | None, ...]:
        """As `_fused`, of each report with the volumes of the K next rows: [B, K, d] and [B, K, e]."""
        count = self.context.model.fusion.other_volumes
        words = {"tokens": report_tokens, "mask": report["token_mask"]}
        words, volumes = _with_others(count, words, volume_tokens)
        found = self._fused(volumes, words["tokens"], {"token_mask": words["mask"]}, train)
        return tuple(None if one is None else one.reshape(-1, count, *one.shape[1:]) for one in found)

    def _fused_volume_embedding(self, volume: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        return (self.fused_volume_projection(volume).astype(jnp.float32),)

    def _fused_embedding(self, volume: jax.Array, report: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        pair = self.fused_report_pair_projection(report), self.fused_volume_pair_projection(volume)
        return (jnp.concatenate(pair, axis=-1).astype(jnp.float32),)

    def _patches(self, volume: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        return (patchify(volume, self.context.model.token_cell()),)

    def _reconstruct_volume(
        self,
        volume: jax.Array,
        visible: jax.Array,
        report_tokens: jax.Array | None = None,
        report: dict[str, jax.Array] | None = None,
        *,
        train: bool,
    ) -> tuple[jax.Array, ...]:
        """The encoder sees the visible patches only; the decoder also reads the whole report, where it is given."""
        encoded = self.volume_encoder(volume, visible, train=train)
        mask = None if report is None else report["token_mask"]
        return (self.voxel_decoder(encoded["tokens"], encoded.get("places"), report_tokens, mask, train),)

    def _reconstruct_report(
        self, corrupted_ids: jax.Array, volume_tokens: jax.Array, report: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array, ...]:
        """The tokens of the corrupted report read the whole volume: [B, T, d]."""
        mask = report["token_mask"]
        tokens = self.report_encoder(corrupted_ids, mask, train=train)["tokens"]
        return (self.fusion(volume_tokens, tokens, mask, train)["report"],)

    def _token_logits(
        self, tokens: jax.Array, predicted: jax.Array, report: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array, ...]:
        """[B, N, vocab] and the ids [B, N]. Logits over the vocabulary are large: only of the tokens that are predicted."""
        logits = self.token_head(jnp.take_along_axis(tokens, predicted[..., None], axis=1))
        return logits, jnp.take_along_axis(report["token_ids"], predicted, axis=1)

    def _reconstructed_sentences(
        self, tokens: jax.Array, report: dict[str, jax.Array], train: bool
    ) -> tuple[jax.Array, ...]:
        return (self.sentence_projection(self._sentences(tokens, report, train)[0]),)

    def _crops(
        self, volume: jax.Array, mask: jax.Array, starts: jax.Array, flips: jax.Array, train: bool
    ) -> tuple[jax.Array, ...]:
        """Crops of the volume [B, X, Y, Z, C] and the mask [B, X, Y, Z], of the size that the tower takes."""
        size = self.context.model.volume_size

        def cut(voxels: jax.Array, start: jax.Array, flip: jax.Array) -> jax.Array:
            crop = jax.lax.dynamic_slice(voxels, (*start, *(0,) * (voxels.ndim - 3)), (*size, *voxels.shape[3:]))
            for axis in range(3):
                crop = jnp.where(flip[axis], jnp.flip(crop, axis), crop)
            return crop

        of_each = jax.vmap(jax.vmap(cut, (None, 0, 0)))
        return of_each(volume, starts, flips), of_each(mask, starts, flips)

    def segment(self, crops: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """Crops [B, K, x, y, z, C], windowed -> features of every voxel [B, K, x, y, z, f]."""
        flat = crops.reshape(-1, *crops.shape[2:])
        features = self.segmentation_decoder(flat, self.volume_encoder(flat, train=train, hidden=True))
        return (features.reshape(*crops.shape[:-1], -1),)

    def _original_sentences(self, sentences: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        return (self.sentence_projection(sentences),)

    def _next_token_logits(
        self,
        volume_tokens: jax.Array,
        report: dict[str, jax.Array],
        findings: jax.Array | None = None,
        *,
        train: bool,
    ) -> tuple[jax.Array, ...]:
        """[B, T - 1, vocab]: at each token of the report those of the next one, from the volume, what was written, and with
        `findings` [B, L] which there are."""
        return (self.report_decoder(report["token_ids"][:, :-1], volume_tokens, findings),)


def _with_others(count: int, words: Any, volumes: jax.Array) -> tuple[Any, jax.Array]:
    """The words [B, ...] `count` times, [B K, ...], and beside each the volume of another row (`same_words.others`)."""
    repeated = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), words)
    return repeated, others(volumes, count).reshape(-1, *volumes.shape[1:])
