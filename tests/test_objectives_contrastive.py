"""InfoNCE and the sigmoid loss against float64 loops and PyTorch; invariances; extreme inputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import contrastive as reference
from reference.tools import MESH_SHAPES, fake_mesh, numerical_gradient, shard_rows

from mg3d_jax.objectives.contrastive import info_nce, sigmoid_contrastive
from mg3d_jax.objectives.discrimination import patient_discrimination


def make_batch(batch_size, width=5, seed=0):
    """x, y, group ids with duplicates, validity with holes."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, batch_size, width)).astype(np.float32)
    groups = rng.integers(0, max(2 * batch_size // 3, 1), batch_size).astype(np.int32)
    valid = rng.random(batch_size) > 0.2
    valid[0] = True
    return x, y, groups, valid


LOSSES = {
    "info_nce": (
        partial(info_nce, temperature=0.1),
        lambda x, y, groups, valid: reference.info_nce(x, y, 0.1, groups, valid),
    ),
    "sigmoid": (
        partial(sigmoid_contrastive, scale=10.0, bias=-3.0),
        lambda x, y, groups, valid: reference.sigmoid(x, y, 10.0, -3.0, groups, valid),
    ),
}
losses = pytest.mark.parametrize("loss,slow", LOSSES.values(), ids=LOSSES)


def value_and_gradients(loss, x, y, **options):
    return jax.jit(jax.value_and_grad(lambda x, y: loss(x, y, **options)[0], argnums=(0, 1)))(x, y)


@losses
@pytest.mark.parametrize("batch_size,block_size", [(1, None), (2, 1), (7, None), (7, 3), (9, 9)])
def test_equals_loops_in_value_and_gradient(loss, slow, batch_size, block_size):
    x, y, groups, valid = make_batch(batch_size)
    value, (dx, dy) = value_and_gradients(loss, x, y, group_ids=groups, valid=valid, block_size=block_size)
    assert float(value) == pytest.approx(slow(x.astype(float), y.astype(float), groups, valid), abs=1e-5)
    expected_dx = numerical_gradient(lambda v: slow(v, y.astype(float), groups, valid), x)
    expected_dy = numerical_gradient(lambda v: slow(x.astype(float), v, groups, valid), y)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    np.testing.assert_allclose(dy, expected_dy, atol=1e-5)


def test_info_nce_equals_torch_cross_entropy_with_a_learned_temperature():
    x, y, _, _ = make_batch(8, 16)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, y, np.float32(0.07))]
    unit = torch.nn.functional.normalize
    logits = unit(tensors[0]) @ unit(tensors[1]).T / tensors[2]
    targets = torch.arange(8)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    expected.backward()

    def loss(x, y, temperature):
        return info_nce(x, y, temperature=temperature)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, y, jnp.float32(0.07))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for ours, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-3, atol=1e-5)


def test_sigmoid_equals_torch_with_learned_scale_and_bias():
    x, y, _, _ = make_batch(8, 16)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, y, np.float32(10.0), np.float32(-10.0))]
    unit = torch.nn.functional.normalize
    logits = unit(tensors[0]) @ unit(tensors[1]).T * tensors[2] + tensors[3]
    expected = -torch.nn.functional.logsigmoid((2 * torch.eye(8) - 1) * logits).sum() / 8
    expected.backward()

    def loss(x, y, scale, bias):
        return sigmoid_contrastive(x, y, scale=scale, bias=bias, block_size=3)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(x, y, jnp.float32(10), jnp.float32(-10))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for ours, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(ours, tensor.grad.numpy(), rtol=1e-4, atol=1e-5)


@losses
def test_order_and_invalid_rows_do_not_matter(loss, slow):
    x, y, groups, valid = make_batch(9)
    value, (dx, _) = value_and_gradients(loss, x, y, group_ids=groups, valid=valid)
    order = np.random.default_rng(1).permutation(9)
    moved, (moved_dx, _) = value_and_gradients(loss, x[order], y[order], group_ids=groups[order], valid=valid[order])
    np.testing.assert_allclose(moved, value, rtol=1e-5)
    np.testing.assert_allclose(moved_dx, dx[order], atol=1e-5)
    padded = [np.concatenate([a, a[:4]]) for a in (x, y, groups)]
    mask = np.concatenate([valid, np.zeros(4, bool)])
    value_padded, (dx_padded, _) = value_and_gradients(loss, *padded[:2], group_ids=padded[2], valid=mask)
    np.testing.assert_allclose(value_padded, value, rtol=1e-5)
    np.testing.assert_allclose(dx_padded[:9], dx, atol=1e-5)
    np.testing.assert_array_equal(dx_padded[9:], 0)


@losses
@pytest.mark.parametrize("shape", MESH_SHAPES)
def test_the_mesh_does_not_matter(loss, slow, shape):
    x, y, groups, valid = make_batch(16, 8)
    value, gradients = value_and_gradients(loss, x, y, group_ids=groups, valid=valid)
    mesh = fake_mesh(shape)
    with jax.set_mesh(mesh):
        sharded = shard_rows(mesh, x, y)
        results = value_and_gradients(loss, *sharded, group_ids=groups, valid=valid, block_size=1)
        value_mesh, gradients_mesh = jax.block_until_ready(results)
    np.testing.assert_allclose(value_mesh, value, rtol=1e-5)
    for ours, theirs in zip(gradients_mesh, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_batch_that_the_mesh_does_not_divide():
    x, y, groups, valid = make_batch(11)
    expected = info_nce(x, y, temperature=0.1, group_ids=groups, valid=valid)[0]
    mesh = fake_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        loss = jax.jit(lambda x, y: info_nce(x, y, temperature=0.1, group_ids=groups, valid=valid)[0])
        np.testing.assert_allclose(jax.block_until_ready(loss(x, y)), expected, rtol=1e-5)


def test_duplicate_reports_are_not_negatives():
    x, y, _, _ = make_batch(6)
    x[3], y[3] = x[0], y[0]
    groups = np.array([0, 1, 2, 0, 4, 5], np.int32)
    apart = info_nce(x, y, temperature=0.1, group_ids=groups)[0]
    assert float(info_nce(x, y, temperature=0.1)[0]) > float(apart)
    assert float(info_nce(x, y, temperature=0.1, group_ids=np.zeros(6, np.int32))[0]) == 0.0


def test_metrics_say_what_they_claim():
    x, y, groups, valid = make_batch(12, 4)
    _, metrics = info_nce(x, y, temperature=0.1, group_ids=groups, valid=valid)
    unit = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y)]
    cosines = unit[0] @ unit[1].T
    negative = (groups[:, None] != groups) & valid[:, None] & valid
    hits = []
    for table in (cosines, cosines.T):
        hits += [table[i, i] > np.max(table[i][negative[i]], initial=-np.inf) for i in np.flatnonzero(valid)]
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(hits))
    assert float(metrics["positive_similarity"]) == pytest.approx(np.diag(cosines)[valid].mean(), abs=1e-5)
    assert float(metrics["negative_similarity"]) == pytest.approx(cosines[negative].mean(), abs=1e-5)


@losses
@pytest.mark.parametrize("case", ["zeros", "huge", "nobody valid", "one group", "equal"])
def test_nothing_is_ever_infinite(loss, slow, case):
    x, y, groups, valid = make_batch(8, 16)
    x, y = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    if case == "zeros":
        x, y = x * 0, y * 0
    if case == "huge":
        x, y = x * 1e15, y * 1e-15
    if case == "equal":
        x, y = jnp.ones_like(x), -jnp.ones_like(y)
    if case == "nobody valid":
        valid = np.zeros(8, bool)
    if case == "one group":
        groups = np.zeros(8, np.int32)
    if loss.func is info_nce:
        loss = partial(info_nce, temperature=0.01)
    step = jax.value_and_grad(lambda x, y: loss(x, y, group_ids=groups, valid=valid), argnums=(0, 1), has_aux=True)
    (value, metrics), gradients = jax.jit(step)(x, y)
    for number in (value, *jax.tree.leaves(metrics), *gradients):
        assert np.all(np.isfinite(np.asarray(number, np.float32)))
    if case == "nobody valid":
        assert float(value) == 0.0


def test_memory_is_linear_in_the_batch():
    def temporary(batch_size):
        arguments = [jax.ShapeDtypeStruct((batch_size, 32), jnp.float32)] * 2
        loss = jax.jit(jax.grad(lambda x, y: info_nce(x, y, temperature=0.1, block_size=16)[0], argnums=(0, 1)))
        return loss.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(512), temporary(4096)
    assert large < 8.5 * small
    assert large < 4096 * 4096 * 4 / 8


def test_patient_discrimination_averages_the_sentences_and_skips_empty_reports():
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(5, 4)).astype(np.float32)
    z = rng.normal(size=(5, 3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], bool)
    groups = np.array([0, 1, 2, 0, 4], np.int32)
    loss, _ = patient_discrimination(volume, z, mask, temperature=0.1, group_ids=groups)
    kept = [0, 1, 3, 4]
    means = np.stack([z[b][mask[b]].mean(0) for b in kept]).astype(float)
    assert float(loss) == pytest.approx(
        reference.info_nce(volume[kept].astype(float), means, 0.1, groups[kept]), abs=1e-5
    )
