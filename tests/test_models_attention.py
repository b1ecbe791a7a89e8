"""Attention backends against attention written out in float64, and the choice between them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mg3d_jax.errors import UserError
from mg3d_jax.models.attention import choose_backend, cudnn_attention, dot_product_attention
from mg3d_jax.models.attention_tpu import splash_attention

# (queries, keys, heads, head_dim): odd lengths, more keys than one kernel block, widths that are no multiple of 128.
SHAPES = [(5, 9, 2, 8), (37, 150, 2, 32)]


def reference(query, key, value, mask):
    """One example, one head, one query at a time, in float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    output = np.zeros_like(query)
    for b, q, h in np.ndindex(query.shape[:3]):
        kept = np.arange(key.shape[1]) if mask is None else np.flatnonzero(mask[b])
        logits = key[b, kept, h] @ query[b, q, h] / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max())
        output[b, q, h] = weights / weights.sum() @ value[b, kept, h]
    return output


def inputs(shape, seed=0):
    queries, keys, heads, width = shape
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(2, queries, heads, width)).astype(np.float32)
    key, value = (rng.normal(size=(2, keys, heads, width)).astype(np.float32) for _ in range(2))
    mask = rng.random((2, keys)) < 0.6
    mask[:, 0] = True
    return query, key, value, mask


BACKENDS = {
    "xla": dot_product_attention,
    "cudnn wrapper": lambda q, k, v, m: cudnn_attention(q, k, v, m, implementation="xla"),
    "splash": lambda q, k, v, m: splash_attention(q, k, v, m, interpret=True),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_backend_equals_written_out_attention(name, shape, masked):
    query, key, value, mask = inputs(shape)
    mask = mask if masked else None
    output = BACKENDS[name](*map(jnp.asarray, (query, key, value)), None if mask is None else jnp.asarray(mask))
    np.testing.assert_allclose(output, reference(query, key, value, mask), atol=2e-6)


@pytest.mark.parametrize("name", ["cudnn wrapper", "splash"])
def test_gradients_equal_plain_attention(name):
    query, key, value, mask = map(jnp.asarray, inputs((7, 150, 2, 8)))

    def gradients(attend):
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv, mask) ** 2), argnums=(0, 1, 2))(query, key, value)

    for ours, plain in zip(gradients(BACKENDS[name]), gradients(dot_product_attention), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_empty_row_is_finite(name):
    query, key, value, _ = map(jnp.asarray, inputs((5, 9, 2, 8)))
    assert np.isfinite(BACKENDS[name](query, key, value, jnp.zeros((2, 9), bool))).all()


def test_splash_on_a_mesh_equals_one_device():
    query, key, value, mask = map(jnp.asarray, inputs((24, 40, 2, 8)))
    import flax.linen as nn
    from jax.sharding import AxisType, Mesh

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"), ("heads", "tensor"))):
        sharded = jax.jit(lambda *a: splash_attention(*a, interpret=True))(query, key, value, mask)
    np.testing.assert_allclose(sharded, reference(query, key, value, np.asarray(mask)), atol=2e-6)
    assert not sharded.sharding.is_fully_replicated


def test_bfloat16_softmax_is_float32():
    """With 4096 equal logits a bfloat16 softmax sum would be off by percents; the mean of the values must survive."""
    value = jnp.asarray(np.random.default_rng(0).normal(1, 0.1, (1, 4096, 1, 8)), jnp.bfloat16)
    zeros = jnp.zeros((1, 4096, 1, 8), jnp.bfloat16)
    output = dot_product_attention(zeros[:, :1], zeros, value)
    np.testing.assert_allclose(output[0, 0, 0], value.astype(jnp.float32).mean(axis=(0, 1, 2)), rtol=0.01)


@pytest.mark.parametrize(
    ("requested", "platform", "dtype", "head_dim", "chosen"),
    [
        ("auto", "cpu", "float32", 64, "xla"),
        ("auto", "gpu", "bfloat16", 64, "cudnn"),
        ("auto", "gpu", "float32", 64, "xla"),
        ("auto", "gpu", "bfloat16", 20, "xla"),
        ("auto", "tpu", "bfloat16", 88, "splash"),
        ("xla", "tpu", "bfloat16", 64, "xla"),
    ],
)
def test_choice(requested, platform, dtype, head_dim, chosen):
    name, reason = choose_backend(requested, platform, dtype, head_dim)
    assert name == chosen
    assert reason


@pytest.mark.parametrize(
    ("requested", "platform", "dtype", "words"),
    [
        ("cudnn", "cpu", "bfloat16", "needs a gpu"),
        ("cudnn", "gpu", "float32", "needs bfloat16"),
        ("splash", "gpu", "bfloat16", "needs a tpu"),
        ("flash", "gpu", "bfloat16", "unknown"),
    ],
)
def test_impossible_request_is_an_error(requested, platform, dtype, words):
    with pytest.raises(UserError, match=words):
        choose_backend(requested, platform, dtype, 64)


def test_unresolved_backend_is_an_error():
    query, key, value, _ = map(jnp.asarray, inputs((5, 9, 2, 8)))
    with pytest.raises(UserError, match="choose_backend"):
        dot_product_attention(query, key, value, backend="auto")
