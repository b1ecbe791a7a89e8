"""Sentence-wise semantic matching against float64 loops; invariances; memory; extreme inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import matching as reference
from reference.tools import MESH_SHAPES, fake_mesh, numerical_gradient, shard_rows

from mg3d_jax.errors import UserError
from mg3d_jax.objectives.matching import sentence_matching


def make_batch(patients, sentences, seed=0, width=4, kinds=3):
    """Ragged reports whose sentences repeat a few statements with small changes; empty reports; duplicate groups."""
    rng = np.random.default_rng(seed)
    statements = rng.normal(size=(kinds, 6))
    s = statements[rng.integers(0, kinds, (patients, sentences))] + 0.1 * rng.normal(size=(patients, sentences, 6))
    z = rng.normal(size=(patients, sentences, width))
    lengths = rng.integers(0, sentences + 1, patients)
    mask = np.arange(sentences) < lengths[:, None]
    groups = rng.integers(0, patients, patients).astype(np.int32)
    return z.astype(np.float32), s.astype(np.float32), mask, groups


def value_and_gradient(z, s, mask, **options):
    return jax.jit(jax.value_and_grad(lambda z: sentence_matching(z, s, mask, **options)[0]))(z)


@pytest.mark.parametrize("average", ["pairs", "patients"])
@pytest.mark.parametrize("patients,sentences,block_size", [(1, 3, None), (2, 1, 1), (5, 4, None), (5, 4, 2), (6, 2, 6)])
def test_equals_loops_in_value_and_gradient(patients, sentences, block_size, average):
    z, s, mask, groups = make_batch(patients, sentences)
    value, gradient = value_and_gradient(z, s, mask, group_ids=groups, block_size=block_size, average=average)

    def slow(z):
        return reference.sentence_matching(z, s.astype(float), mask, groups, average=average)

    assert float(value) == pytest.approx(slow(z.astype(float)), abs=1e-5)
    np.testing.assert_allclose(gradient, numerical_gradient(slow, z), atol=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0)


def test_equals_loops_with_up_to_32_sentences():
    z, s, mask, groups = make_batch(6, 32, seed=3)
    value, metrics = sentence_matching(z, s, mask, group_ids=groups)
    assert float(value) == pytest.approx(reference.sentence_matching(z, s, mask, groups), abs=1e-5)
    assert 0 < float(metrics["attract_fraction"]) < 1 and 0 < float(metrics["repel_fraction"]) < 1


def test_no_gradient_reaches_the_report_side():
    z, s, mask, groups = make_batch(5, 4)
    gradient = jax.grad(lambda s: sentence_matching(z, s, mask, group_ids=groups)[0])(s)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("average", ["pairs", "patients"])
def test_order_and_padding_do_not_matter(average):
    z, s, mask, groups = make_batch(6, 4, seed=1)
    value, gradient = value_and_gradient(z, s, mask, group_ids=groups, average=average)
    order = np.random.default_rng(2).permutation(6)
    moved, moved_gradient = value_and_gradient(
        z[order], s[order], mask[order], group_ids=groups[order], average=average
    )
    np.testing.assert_allclose(moved, value, rtol=1e-5)
    np.testing.assert_allclose(moved_gradient, gradient[order], atol=1e-6)
    sides = [np.pad(a, ((0, 3), (0, 2), (0, 0)), constant_values=7) for a in (z, s)]
    wide = np.pad(mask, ((0, 3), (0, 2)))
    ids = np.concatenate([groups, [97, 98, 99]]).astype(np.int32)
    padded, padded_gradient = value_and_gradient(*sides, wide, group_ids=ids, average=average)
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    np.testing.assert_allclose(padded_gradient[:6, :4], gradient, atol=1e-6)


@pytest.mark.parametrize("shape", MESH_SHAPES)
def test_the_mesh_and_the_block_do_not_matter(shape):
    z, s, mask, groups = make_batch(16, 4)
    value, gradient = value_and_gradient(z, s, mask, group_ids=groups)
    mesh = fake_mesh(shape)
    with jax.set_mesh(mesh):
        sharded = shard_rows(mesh, z, s, mask)
        results = value_and_gradient(*sharded, group_ids=groups, block_size=1)
        value_mesh, gradient_mesh = jax.block_until_ready(results)
    np.testing.assert_allclose(value_mesh, value, rtol=1e-5)
    np.testing.assert_allclose(gradient_mesh, gradient, atol=1e-6)


@pytest.mark.parametrize("case", ["zeros", "no sentence", "one group", "nothing in range"])
def test_nothing_is_ever_infinite(case):
    z, s, mask, groups = make_batch(5, 4)
    z, s, options = jnp.asarray(z, jnp.bfloat16), jnp.asarray(s, jnp.bfloat16), {}
    if case == "zeros":
        z, s = z * 0, s * 0
    if case == "no sentence":
        mask = np.zeros_like(mask)
    if case == "one group":
        groups = np.zeros(5, np.int32)
    if case == "nothing in range":
        options = {"high": 2.0, "low": -2.0}
    value, gradient = value_and_gradient(z, s, mask, group_ids=groups, **options)
    assert float(value) == 0.0
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))


@pytest.mark.parametrize("average", ["pairs", "patients"])
@pytest.mark.parametrize("side", [0, 1])
def test_not_a_number_shows_on_either_side_but_not_where_it_only_pads(side, average):
    batch = list(make_batch(5, 4, seed=3))
    mask = batch[2]
    mask[0] = [True, True, True, False]
    mask[1] = True
    groups = np.arange(5, dtype=np.int32)

    def value(row):
        sides = [batch[0].copy(), batch[1].copy()]
        sides[side][row] = np.nan
        return float(sentence_matching(*sides, mask, group_ids=groups, average=average)[0])

    assert np.isnan(value((0, 2)))
    assert np.isfinite(value((0, 3)))


def test_an_unknown_average_is_named():
    with pytest.raises(UserError, match="mean"):
        sentence_matching(*make_batch(2, 2)[:3], average="mean")
