"""The cached gradient of a contrastive loss equals the gradient of the full batch, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.tools import fake_mesh, shard_rows

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.contrastive import info_nce
from mg3d_jax.objectives.gradient_cache import cached_value_and_grad


def make_problem(batch_size=32, hidden=16, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "x": rng.normal(size=(6, hidden)).astype(np.float32),
        "y": rng.normal(size=(6, hidden)).astype(np.float32),
        "temperature": np.float32(0.2),
    }
    x, y = rng.normal(size=(2, batch_size, 6)).astype(np.float32)
    groups = np.arange(batch_size, dtype=np.int32) // 2
    return params, {"x": x, "y": y, "group": groups}


def embed(params, batch, rng):
    """Two one-layer towers and a per-patient reconstruction error."""
    x, y = jnp.tanh(batch["x"] @ params["x"]), jnp.tanh(batch["y"] @ params["y"])
    error = jnp.mean(jnp.square(x @ params["x"].T - batch["x"]), axis=1)
    return {"x": x, "y": y, "error": error}


def loss_of(batch):
    def loss(params, features):
        value, metrics = info_nce(
            features["x"], features["y"], temperature=params["temperature"], group_ids=batch["group"]
        )
        return value + jnp.mean(features["error"]), metrics

    return loss


def cached(params, batch, embed=embed, key=0, microbatch_size=8):
    key = jax.random.key(key)
    return cached_value_and_grad(embed, loss_of(batch), params, batch, key, microbatch_size=microbatch_size)


def direct(params, batch, embed=embed):
    loss = jax.value_and_grad(lambda p, b: loss_of(b)(p, embed(p, b, None)), has_aux=True)
    return jax.jit(loss)(params, batch)


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("microbatch_size", [1, 8, 32])
def test_equals_the_gradient_of_the_full_batch(microbatch_size):
    params, batch = make_problem()
    step = jax.jit(lambda p, b: cached(p, b, microbatch_size=microbatch_size))
    assert_close(step(params, batch), direct(params, batch))


def test_the_mesh_does_not_matter():
    params, batch = make_problem()
    mesh = fake_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        sharded = shard_rows(mesh, batch)[0]
        result = jax.block_until_ready(jax.jit(cached)(params, sharded))
    assert_close(result, direct(params, batch))


def test_both_passes_draw_the_same():
    params, batch = make_problem()

    def noisy(params, batch, rng):
        features = embed(params, batch, rng)
        return features | {"x": features["x"] * jax.random.bernoulli(rng, 0.5, features["x"].shape)}

    def by_hand(params):
        """The same micro-batches (every fourth row) and keys, embedded one after the other."""
        keys, parts = jax.random.split(jax.random.key(5), 4), []
        for number in range(4):
            parts.append(noisy(params, jax.tree.map(lambda a, n=number: a[n::4], batch), keys[number]))
        features = jax.tree.map(lambda *rows: jnp.stack(rows, axis=1).reshape(32, *rows[0].shape[1:]), *parts)
        return loss_of(batch)(params, features)

    ours = jax.jit(lambda p, b: cached(p, b, noisy, key=5))(params, batch)
    assert_close(ours, jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params))


def test_activations_of_one_microbatch_only():
    params, batch = make_problem(1024, 512)

    def temporary(function):
        return jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    def deep(params, batch, rng):
        """Twenty steps whose activations the backward pass needs."""
        features = embed(params, batch, rng)
        for _ in range(20):
            features["x"] = jnp.sin(features["x"]) * jnp.tanh(features["x"])
        return {name: value[:, :8] if value.ndim == 2 else value for name, value in features.items()}

    small = temporary(lambda p, b: cached(p, b, deep, microbatch_size=16))
    assert small < temporary(lambda p, b: direct(p, b, deep)) / 4


def test_a_size_that_does_not_divide_the_batch_is_refused():
    params, batch = make_problem()
    with pytest.raises(UserError, match="divisor"):
        cached(params, batch, microbatch_size=5)
