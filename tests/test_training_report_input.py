"""`model.report_input` = "sentences": objectives that read a report are given the features of its sentences, computed once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import quick_state, tiny_config

from mg3d_jax import sharding
from mg3d_jax.benchmarks.patients import random_batch
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.models.mg3d import SENTENCE_FEATURES
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.inputs import model_inputs

SENTENCES: dict[str, Any] = {
    "model__report_encoder__frozen_layers": -1,
    "model__report_encoder__precompute": True,
    "model__report_input": "sentences",
}
TERMS: dict[str, Any] = {
    "objectives__report_reconstruction__weight": 0.0,
    "objectives__volume_reconstruction__weight": 1.0,
    "objectives__alignment__fused_weight": 1.0,
    "objectives__matching__weight": 1.0,
    "objectives__discrimination__weight": 1.0,
    "objectives__discrimination__form": "same_words",
}


def setup_of(**options: Any) -> state_lib.Setup:
    config = tiny_config(**SENTENCES, **TERMS, **options)
    checks.validate(config)
    return state_lib.build(config, 400, sharding.make_mesh(config.mesh), steps=1)


def test_terms_read_one_token_for_each_sentence_and_encode_nothing() -> None:
    setup = setup_of(objectives__alignment__report_view="subsets")
    assert "report_encoder" in setup.abstract["params"]  # of the run all the same: evaluations encode texts with it
    batch = {name: jnp.asarray(array) for name, array in random_batch(setup.config, 400).items()}
    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    inputs = model_inputs(batch, jax.random.key(0), setup.model, special=special, train=False)
    report, there = inputs["report"], np.asarray(batch["sentence_lengths"])[..., 0] > 0
    np.testing.assert_array_equal(report["token_mask"], there)
    np.testing.assert_array_equal(report[SENTENCE_FEATURES], batch["sentences"][:, :, 0])
    assert inputs["asking"].shape == there.shape and not np.any(np.asarray(inputs["asking"]) & ~there)
    variables = {"params": quick_state(setup)["params"]}
    names = ("sentences", "sentence_mask", "z")
    found = setup.model.apply(variables, inputs, names, method="compute")
    np.testing.assert_array_equal(found["sentence_mask"], there)
    expected = np.where(there[..., None], np.asarray(report[SENTENCE_FEATURES], np.float32), 0.0)
    np.testing.assert_allclose(found["sentences"], expected, rtol=1e-6)
    without = {"params": {k: v for k, v in variables["params"].items() if k != "report_encoder"}}
    again = setup.model.apply(without, inputs, names, method="compute")
    np.testing.assert_array_equal(found["z"], again["z"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__report_encoder__precompute": False}, "precompute=True"),
        ({"objectives__report_reconstruction__weight": 1.0}, r"objectives\.report_reconstruction reads the tokens"),
        ({"objectives__matching__sentence_source": "words"}, r"sentence_source = 'words' reads the tokens"),
        ({"objectives__alignment__report_view": "report"}, "report_view"),
        ({"model__report_input": "pictures"}, r"model\.report_input"),
    ],
)
def test_what_needs_tokens_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        checks.validate(tiny_config(**(SENTENCES | TERMS | options)))
