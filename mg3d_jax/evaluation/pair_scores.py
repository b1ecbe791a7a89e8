"""How well a report and a volume go together by what their fusion says: the second pass of `evaluation.rescoring`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.base import Embedded, Model
from mg3d_jax.evaluation.embed import Embedder, stacked
from mg3d_jax.evaluation.galleries import Pairs
from mg3d_jax.models.mg3d import SENTENCE_FEATURES
from mg3d_jax.objectives.alignment import FUSED_HEAD
from mg3d_jax.training import inputs as step_inputs

Pair = tuple[int, int]  # place of the volume, place of the report


def pair_scores(found: Embedded, model: Model, pairs: Pairs, wanted: Sequence[Pair]) -> dict[Pair, float]:
    """The fused score of each (volume, report).

    Towers read each volume and each report once, their fusion each pair. The tokens of all reports are kept on the host:
    [reports, T, e] in the compute dtype, 1.2 GB of 1,564 reports of 512 tokens of a bfloat16 BERT-base.

    Args:
        wanted: places in `pairs`, by ascending volume.
    """
    embedder, texts = model.embedder, [found.report_texts[row] for row in pairs.reports]
    reports = _encoded(embedder, model.params, texts)
    program = embedder.compiled(lambda params, batch: _pair_scores(embedder, params, batch))
    scores: dict[Pair, float] = {}
    with model.progress("rescore", len(wanted), "pairs") as progress:
        for some, tokens in _batches(model, pairs, wanted):
            volumes, texts_of = np.array(some).T
            batch = {name: array[texts_of] for name, array in reports.items()} | {
                "volume_tokens": np.stack(tokens),
                "volume_embedding": found.volumes[pairs.volumes[volumes]],
                "report_embedding": found.reports[pairs.reports[texts_of]],
            }
            (values,) = embedder.in_batches(program, model.params, batch)
            scores |= zip(some, values.tolist(), strict=True)
            progress.advance(len(some))
    return scores


def _batches(model: Model, pairs: Pairs, wanted: Sequence[Pair]) -> Iterator[tuple[list[Pair], list[np.ndarray]]]:
    """The pairs, as many at a time as a batch holds, each with the tokens [N, d] of its volume."""
    of_volume: dict[int, list[Pair]] = {}
    for pair in wanted:
        of_volume.setdefault(int(pairs.volumes[pair[0]]), []).append(pair)
    some: list[Pair] = []
    tokens: list[np.ndarray] = []
    for row, seen in _volume_tokens(model):
        for pair in of_volume.get(row, ()):
            some.append(pair)
            tokens.append(seen)
            if len(some) == model.embedder.batch_size:
                yield some, tokens
                some, tokens = [], []
    if some:
        yield some, tokens


def _volume_tokens(model: Model) -> Iterator[tuple[int, np.ndarray]]:
    """(row of the volume, its tokens [N, d]), volume by volume."""
    embedder = model.embedder

    def program(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        windowed = step_inputs.window(batch["volume"], embedder.config.data.windows)
        tokens = embedder.setup.model.apply({"params": params}, windowed, method="embed_volume")["volume_tokens"]
        return {"tokens": tokens} | {name: array for name, array in batch.items() if name != "volume"}

    row = 0
    for batch in embedder.walk(embedder.compiled(program), model.params, model.data):
        for tokens in batch["tokens"]:
            yield row, tokens
            row += 1


def _encoded(embedder: Embedder, params: Any, texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """What the fusion reads of each report: its tokens, or with `model.report_input` = "sentences" those of its sentences, as
    `inputs.features_as_tokens` has them."""
    model, of_sentences = embedder.setup.model, embedder.config.model.report_input == "sentences"

    def program(params: Any, report: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if of_sentences:
            features, there = model.apply({"params": params}, report, method="sentence_features")
            return step_inputs.features_as_tokens(features, there)
        (tokens,) = model.apply({"params": params}, {"report": report}, ("report_tokens",), method="compute").values()
        return step_inputs.features_as_tokens(tokens, report["token_mask"])

    fields = _sentences(embedder, texts) if of_sentences else stacked([embedder.tokenizer(text) for text in texts])
    parts = list(embedder.in_batches(embedder.compiled(program), params, fields))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sentences(embedder: Embedder, texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """The text fields [reports, S, T] of as many sentences as training reads."""
    config = embedder.config
    tokenizer = ReportTokenizer(embedder.tokenizer.tokenizer, config.text_tokens(), config.data.max_sentences)
    count = config.objectives["alignment"].report_sentences or config.data.max_sentences
    empty = tokenizer([])
    sentences = [[tokenizer([s]) for s in text[:count]] + [empty] * (count - len(text[:count])) for text in texts]
    there = np.array([[number < len(text) for number in range(count)] for text in texts])
    fields = stacked([stacked(row) for row in sentences])
    fields["token_mask"] = fields["token_mask"] & there[..., None]
    return fields


def _pair_scores(embedder: Embedder, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Logits [P]: of the head of the form "same_words" where the run has it, else the cosine of the fused embedding with the
    two embeddings side by side, which is what the published form brings together, over the temperature of the run."""
    report = {name: batch[name] for name in ("token_mask", "sentence_index", SENTENCE_FEATURES)}
    fused = embedder.setup.model.apply({"params": params}, batch["volume_tokens"], report, method="fuse")
    if FUSED_HEAD in params:
        both = jnp.concatenate([fused["fused_volume"], fused["fused_report"]], axis=-1).astype(jnp.float32)
        return (both @ params[FUSED_HEAD]["kernel"])[:, 0]
    single = jnp.concatenate([batch["report_embedding"], batch["volume_embedding"]], axis=-1)
    lengths = jnp.linalg.norm(fused["fused_embedding"], axis=-1) * jnp.linalg.norm(single, axis=-1)
    cosines = jnp.sum(fused["fused_embedding"] * single, axis=-1) / jnp.maximum(lengths, 1e-6)
    return cosines / embedder.config.objectives["alignment"].temperature
