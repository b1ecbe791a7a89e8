"""How well a report and a volume go together by what their fusion says: the second pass of `evaluation.rescoring`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax import sharding
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.evaluation.base import Embedded, Model
from mg3d_jax.evaluation.embed import TEXT_FIELDS, Embedder
from mg3d_jax.evaluation.galleries import Pairs
from mg3d_jax.objectives.alignment import FUSED_HEAD
from mg3d_jax.training import inputs as step_inputs

Scores = dict[tuple[int, int], float]  # (place of the volume, place of the report) -> score


def pair_scores(found: Embedded, model: Model, pairs: Pairs, wanted: Sequence[tuple[int, int]]) -> Scores:
    """The fused score of each (volume, report).

    Args:
        wanted: places in `pairs`, by ascending volume.
    """
    embedder, texts = model.embedder, [found.report_texts[row] for row in pairs.reports]
    fields = _tokenized(embedder, texts)
    score = embedder.compiled(lambda params, batch: _pair_scores(embedder, params, batch))
    of_volume: dict[int, list[int]] = {}
    for volume, report in wanted:
        of_volume.setdefault(volume, []).append(report)
    place = {int(row): number for number, row in enumerate(pairs.volumes)}
    scores: Scores = {}
    for row, tokens in _volume_tokens(model):
        if (volume := place.get(row, -1)) not in of_volume:
            continue
        reports = of_volume[volume]
        for start in range(0, len(reports), embedder.batch_size):
            some = np.array(reports[start : start + embedder.batch_size])
            rows = np.resize(some, embedder.batch_size)  # the last batch is filled with copies
            batch = {name: array[rows] for name, array in fields.items()}
            batch |= {
                "volume_tokens": np.broadcast_to(tokens, (len(rows), *tokens.shape)),
                "volume_embedding": np.broadcast_to(found.volumes[row], (len(rows), found.volumes.shape[1])),
                "report_embedding": found.reports[pairs.reports[rows]],
            }
            local = np.array(sharding.local_rows(embedder.setup.mesh, len(rows)))
            placed = sharding.to_global({n: a[local] for n, a in batch.items()}, embedder.setup.mesh, len(rows))
            with sharding.in_mesh(embedder.setup.mesh):
                values = jax.device_get(jax.block_until_ready(score(model.params, placed)))
            scores |= {(volume, int(report)): float(value) for report, value in zip(some, values, strict=False)}
    return scores


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


def _tokenized(embedder: Embedder, texts: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """What the fusion reads of reports: their tokens, or with `model.report_input` = "sentences" those of each sentence."""
    config = embedder.config
    if config.model.report_input != "sentences":
        rows = [embedder.tokenizer(text) for text in texts]
        return {name: np.stack([row[name] for row in rows]) for name in TEXT_FIELDS}
    tokenizer = ReportTokenizer(embedder.tokenizer.tokenizer, config.text_tokens(), config.data.max_sentences)
    count = config.objectives["alignment"].report_sentences or config.data.max_sentences
    empty = tokenizer([])
    sentences = [[tokenizer([s]) for s in text[:count]] + [empty] * (count - len(text[:count])) for text in texts]
    there = np.array([[number < len(text) for number in range(count)] for text in texts])
    fields = {name: np.stack([np.stack([one[name] for one in row]) for row in sentences]) for name in TEXT_FIELDS}
    fields["token_mask"] = fields["token_mask"] & there[..., None]
    return fields


def _pair_scores(embedder: Embedder, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[P], by the head of the form "same_words" where the run has it, else the cosine of the fused embedding with the two
    embeddings side by side, which is what the published form brings together."""
    model, config = embedder.setup.model, embedder.config
    report = {name: batch[name] for name in TEXT_FIELDS}
    if config.model.report_input == "sentences":
        features, there = model.apply({"params": params}, report, method="sentence_features")
        report = step_inputs.features_as_tokens(features, there)
    fused = model.apply({"params": params}, batch["volume_tokens"], report, method="fuse")
    if FUSED_HEAD in params:
        both = jnp.concatenate([fused["fused_volume"], fused["fused_report"]], axis=-1).astype(jnp.float32)
        return (both @ params[FUSED_HEAD]["kernel"])[:, 0]
    single = jnp.concatenate([batch["report_embedding"], batch["volume_embedding"]], axis=-1)
    lengths = jnp.linalg.norm(fused["fused_embedding"], axis=-1) * jnp.linalg.norm(single, axis=-1)
    return jnp.sum(fused["fused_embedding"] * single, axis=-1) / jnp.maximum(lengths, 1e-6)
