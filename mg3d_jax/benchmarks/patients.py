"""Random patients, as the data pipeline would give them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mg3d_jax.config import Config
from mg3d_jax.data.tokens import SPECIAL_TOKENS
from mg3d_jax.objectives.base import Context, enabled, reads_masks, text_maker
from mg3d_jax.options import Group

SENTENCES = 3  # of each report
STATEMENTS = ("There is a hiatal hernia.", "No pleural effusion was detected.", "Heart size is normal.")
CLS, SEP = (SPECIAL_TOKENS.index(name) for name in ("[CLS]", "[SEP]"))


def random_batch(config: Config, vocab_size: int = 400, labels: int = 18, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random volumes and reports of three sentences, with the dtypes and shapes of `mg3d_jax.batch`."""
    rng = np.random.default_rng(seed)
    size, tokens = config.data.batch_size, config.data.max_tokens
    lengths = rng.integers(12, tokens + 1, size)
    position = np.arange(tokens)[None, :]
    mask = position < lengths[:, None]
    inside = (position > 0) & (position < lengths[:, None] - 1)
    sentence = 1 + np.minimum(SENTENCES * position // lengths[:, None], SENTENCES - 1)
    more = _more_text(config, vocab_size, rng)
    if reads_masks(enabled(config.objectives, config.tasks)):
        classes = config.tasks["segmentation"].num_classes
        more["mask"] = rng.integers(0, classes, (size, *config.grid)).astype(np.int8)
    return more | {
        "volume": rng.integers(-1024, 600, (size, *config.grid)).astype(np.int16),
        "token_ids": np.where(mask, rng.integers(len(SPECIAL_TOKENS), vocab_size, (size, tokens)), 0).astype(np.int32),
        "token_mask": mask,
        "sentence_index": np.where(inside, sentence, 0).astype(np.int32),
        "word_index": np.where(inside, position, 0).astype(np.int32),
        "labels": rng.integers(0, 2, (size, labels)).astype(np.int8),
        "report_id": np.arange(size, dtype=np.int32),
        "patient_id": np.arange(size, dtype=np.int32),
        "valid": np.ones(size, np.bool_),
        "record_index": np.arange(size, dtype=np.int32),
    }


def _more_text(config: Config, vocab_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the objectives make of reports of `STATEMENTS`, in random tokens or features."""
    on, context = enabled(config.objectives, config.tasks), Context(config.data, config.model, vocab_size, Group({}))
    encoder = config.model.report_encoder

    def encode(texts: Sequence[str]) -> list[list[int]]:
        drawn = rng.integers(len(SPECIAL_TOKENS), vocab_size, (len(texts), 6)).tolist()
        return [[CLS, *ids, SEP] for ids in drawn]

    def lookup(ids: np.ndarray) -> np.ndarray:
        return rng.normal(size=(*ids.shape[:-1], encoder.sizes.width)).astype(np.float16)

    make = text_maker(on, encode, context, lookup if encoder.precompute else None)
    reports = [make(STATEMENTS) for _ in range(config.data.batch_size)]
    return {name: np.stack([report[name] for report in reports]) for name in reports[0]}
