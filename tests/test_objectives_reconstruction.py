"""Reconstruction losses against float64 loops and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import reconstruction as reference
from reference.tools import MESH_SHAPES, fake_mesh, numerical_gradient, shard_rows

from mg3d_jax.objectives.report_reconstruction import sentence_sums, token_sums
from mg3d_jax.objectives.sums import mean_of_sums
from mg3d_jax.objectives.volume_reconstruction import normalize_patches, patch_sums


def loss_of(sums):
    """`(prediction, target, mask) -> (loss, means)` of one of the functions that sum per patient."""

    def loss(prediction, target, mask):
        means = mean_of_sums(sums(prediction, target, mask))
        return means["loss"], means

    return loss


def make_case(name, seed=0):
    """(loss, slow, differentiated input, other input, mask)"""
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 5)) < 0.4
    if name == "voxels":
        return loss_of(patch_sums), reference.masked_patch_mse, *rng.normal(size=(2, 3, 5, 6)).astype(np.float32), mask
    if name == "tokens":
        labels = rng.integers(0, 6, (3, 5)).astype(np.int32)
        logits = rng.normal(size=(3, 5, 6)).astype(np.float32)
        return loss_of(token_sums), reference.masked_token_cross_entropy, logits, labels, mask
    return loss_of(sentence_sums), reference.sentence_alignment, *rng.normal(size=(2, 3, 5, 6)).astype(np.float32), mask


names = pytest.mark.parametrize("name", ["voxels", "tokens", "sentences"])


@names
def test_equals_loops_in_value_and_gradient(name):
    loss, slow, prediction, target, mask = make_case(name)
    value, gradient = jax.value_and_grad(lambda p: loss(p, target, mask)[0])(prediction)
    assert float(value) == pytest.approx(slow(prediction.astype(float), target, mask), abs=1e-5)
    expected = numerical_gradient(lambda p: slow(p, target, mask), prediction)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    np.testing.assert_array_equal(gradient[~mask], 0)


@names
def test_no_mask_and_bfloat16_stay_finite(name):
    loss, _, prediction, target, mask = make_case(name)
    for scale, chosen in ((0.0, mask), (1e3, mask), (1.0, np.zeros_like(mask))):
        inputs = jnp.asarray(prediction * scale, jnp.bfloat16)
        value, gradient = jax.value_and_grad(lambda p, m=chosen: loss(p, target, m)[0])(inputs)
        assert np.isfinite(float(value)) and np.all(np.isfinite(np.asarray(gradient, np.float32)))
        if not chosen.any():
            assert float(value) == 0.0


@names
@pytest.mark.parametrize("shape", MESH_SHAPES)
def test_the_mesh_does_not_matter(name, shape):
    loss, _, prediction, target, mask = make_case(name)
    arrays = [np.concatenate([a, a, a])[:8] for a in (prediction, target, mask)]
    expected = jax.value_and_grad(lambda p, t, m: loss(p, t, m)[0])(*arrays)
    mesh = fake_mesh(shape)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(lambda p, t, m: loss(p, t, m)[0]))
        value, gradient = jax.block_until_ready(step(*shard_rows(mesh, *arrays)))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-6)


def test_targets_get_no_gradient():
    for name in ("voxels", "sentences"):
        loss, _, prediction, target, mask = make_case(name)
        gradient = jax.grad(lambda t, a=loss, p=prediction, m=mask: a(p, t, m)[0])(target)
        np.testing.assert_array_equal(gradient, 0)


def test_tokens_equal_torch_with_ignored_labels():
    _, _, logits, labels, mask = make_case("tokens", seed=4)
    torch_labels = torch.tensor(np.where(mask, labels, -100).reshape(-1).astype(np.int64))
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).reshape(-1, 6), torch_labels)
    means = mean_of_sums(token_sums(logits, labels, mask))
    assert float(means["loss"]) == pytest.approx(expected.item(), abs=1e-6)
    assert float(means["accuracy"]) == pytest.approx(np.mean(logits.argmax(-1)[mask] == labels[mask]))
    assert float(means["count"]) == mask.sum()


def test_normalized_patches_have_mean_zero_and_variance_one():
    patches = np.random.default_rng(0).uniform(size=(2, 3, 64)).astype(np.float32)
    patches[0, 0] = 0.25
    normal = np.asarray(normalize_patches(patches))
    np.testing.assert_array_equal(normal[0, 0], 0)
    expected = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normal, expected, atol=1e-5)
