"""Pooling, projection and sentence means against loops."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mg3d_jax.models.heads import AttentionPool, Projection, mean_pool, sentence_means


def test_sentence_means_equal_a_loop():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 12, 5)).astype(np.float32)
    index = rng.integers(0, 5, (3, 12))
    index[2] = 0
    means, mask = sentence_means(jnp.asarray(tokens), jnp.asarray(index), 6)
    assert means.shape == (3, 6, 5)
    for b, s in np.ndindex(3, 6):
        members = tokens[b, index[b] == s + 1]
        assert mask[b, s] == (len(members) > 0)
        expected = members.mean(axis=0) if len(members) else np.zeros(5)
        np.testing.assert_allclose(means[b, s], expected, atol=1e-6)


def test_sentence_beyond_the_maximum_is_left_out():
    means, mask = sentence_means(jnp.ones((1, 3, 2)), jnp.array([[1, 2, 3]]), 2)
    assert means.shape == (1, 2, 2)
    assert mask.all()


def test_mean_pool_counts_valid_tokens_only():
    tokens = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[True, False, True], [False, False, False]])
    np.testing.assert_allclose(mean_pool(tokens, mask), [[2, 3], [0, 0]])
    np.testing.assert_allclose(mean_pool(tokens), tokens.mean(axis=1))


def test_attention_pool_ignores_padding_and_zeroes_empty_rows():
    tokens = jax.random.normal(jax.random.key(0), (3, 6, 8))
    mask = jnp.arange(6)[None] < jnp.array([[6], [2], [0]])
    pool = AttentionPool(2)
    params = nn.unbox(jax.jit(pool.init)(jax.random.key(1), tokens, mask))
    pooled = jax.jit(pool.apply)(params, tokens, mask)
    np.testing.assert_allclose(pooled[1], jax.jit(pool.apply)(params, tokens[1:2, :2])[0], atol=1e-6)
    assert not pooled[2].any()
    gradient = jax.jit(jax.grad(lambda t: pool.apply(params, t, mask).sum()))(tokens)
    assert np.isfinite(gradient).all()
    assert not gradient[2].any()


def test_projection_is_linear():
    features, module = jax.random.normal(jax.random.key(0), (4, 8)), Projection(3)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), features))
    output = jax.jit(module.apply)(params, features)
    assert output.shape == (4, 3)
    np.testing.assert_allclose(jax.jit(module.apply)(params, 2 * features), 2 * output, atol=1e-5)
