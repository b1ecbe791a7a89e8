"""Random patients, as the data pipeline would give them."""

from __future__ import annotations

import numpy as np

from mg3d_jax.batch import zeros
from mg3d_jax.config import Config
from mg3d_jax.data.tokens import SPECIAL_TOKENS
from mg3d_jax.objectives.base import Context, enabled, text_fields
from mg3d_jax.options import Group

SENTENCES = 3  # of each report


def random_batch(config: Config, vocab_size: int = 400, labels: int = 18, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random volumes and reports of three sentences, with the dtypes and shapes of `mg3d_jax.batch`."""
    rng = np.random.default_rng(seed)
    size, tokens = config.data.batch_size, config.data.max_tokens
    lengths = rng.integers(12, tokens + 1, size)
    position = np.arange(tokens)[None, :]
    mask = position < lengths[:, None]
    inside = (position > 0) & (position < lengths[:, None] - 1)
    sentence = 1 + np.minimum(SENTENCES * position // lengths[:, None], SENTENCES - 1)
    context = Context(config.data, config.model, vocab_size, Group({}))
    more = text_fields(enabled(config.objectives, config.tasks), context)
    return zeros(more, size) | {
        "volume": rng.integers(-1024, 600, (size, *config.model.volume_size)).astype(np.int16),
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
