"""Named configurations of `mg3d bench step --case NAME`: a config file whose argument is the case."""

from __future__ import annotations

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from mg3d_jax import config as config_lib

FROZEN_REPORT = "report_encoder/.*"
BERT_VOCABULARY = 30522


def mg3d_b() -> ConfigDict:
    """All objectives, ViT-B/16 on 128 x 128 x 96, a frozen report encoder of BERT-base's size, 384 tokens, 2 patients."""
    config = config_lib.default().unlock()
    config.name = "mg3d-b"
    config_lib.use_objectives(config, "mg3d")
    config.data.batch_size, config.data.max_tokens, config.data.vocab_size = 2, 384, BERT_VOCABULARY
    config.optimizer.freeze = (FROZEN_REPORT,)
    # Two patients fit without recomputation; CPUs multiply bfloat16 no faster than float32.
    config.model.remat = "none"
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return config.lock()


CASES: dict[str, Callable[[], ConfigDict]] = {"mg3d-b": mg3d_b}


def get_config(name: str = "mg3d-b") -> ConfigDict:
    """The case of that name."""
    return CASES[name]()
