"""The report encoder on its own; parity with transformers is in test_interop_bert.py."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mg3d_jax import sharding
from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.bert.encoder import ReportEncoder

ENCODER = ReportEncoder(vocab_size=50, width=24, depth=2, num_heads=2, mlp_dim=40, max_positions=16)


@pytest.fixture(scope="module")
def params():
    boxed = jax.jit(ENCODER.init)(jax.random.key(0), jnp.ones((1, 4), int), jnp.ones((1, 4), bool))
    specs = nn.get_partition_spec(boxed)["params"]
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    sharding.check_names(name for spec in leaves for name in spec)
    assert specs["word_embedding"] == jax.sharding.PartitionSpec("vocab", "embed")
    return nn.unbox(boxed)["params"]


def test_padding_has_no_influence(params):
    ids = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)
    mask = jnp.arange(10)[None] < jnp.array([[10], [6]])
    apply = jax.jit(ENCODER.apply)
    whole = apply({"params": params}, ids, mask)
    other = apply({"params": params}, jnp.where(mask, ids, 7), mask)
    np.testing.assert_allclose(whole["tokens"][1, :6], other["tokens"][1, :6], atol=1e-6)
    alone = apply({"params": params}, ids[1:, :6], mask[1:, :6])
    np.testing.assert_allclose(whole["tokens"][1, :6], alone["tokens"][0], atol=1e-5)


def test_embeddings_do_not_depend_on_other_tokens(params):
    apply = jax.jit(ENCODER.apply)
    ids, mask = jnp.arange(8)[None], jnp.ones((1, 8), bool)
    before, after = (apply({"params": params}, x, mask) for x in (ids, ids.at[0, 3].set(40)))
    changed = np.abs(before["embeddings"] - after["embeddings"])[0].max(axis=-1)
    assert list(np.flatnonzero(changed)) == [3]
    assert (np.abs(before["tokens"] - after["tokens"])[0].max(axis=-1) > 0).all()


def test_too_many_tokens_are_an_error(params):
    with pytest.raises(UserError, match="max_positions=16"):
        ENCODER.apply({"params": params}, jnp.ones((1, 17), int), jnp.ones((1, 17), bool))
