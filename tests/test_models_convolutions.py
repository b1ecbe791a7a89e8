"""3D convolutions: what is computed on CPU and elsewhere is the same, with the same gradients, also as PyTorch has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mg3d_jax.models import convolutions

SIZES = ((2, 5, 4, 3), (1, 1, 7, 2), (1, 6, 1, 1), (3, 2, 2, 9))  # batch and voxels: odd, one slice, one line


def drawn(size: tuple[int, ...], inputs: int = 3, outputs: int = 4, kernel: tuple[int, ...] = (3, 3, 3)):
    random = np.random.default_rng(0)
    features = random.normal(size=(*size, inputs)).astype(np.float32)
    return features, random.normal(size=(*kernel, inputs, outputs)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_planes_and_volumes_are_pytorchs_convolution(size):
    torch = pytest.importorskip("torch")
    features, kernel = drawn(size)
    tensors = [
        torch.tensor(features.transpose(0, 4, 1, 2, 3), dtype=torch.float64, requires_grad=True),
        torch.tensor(kernel.transpose(4, 3, 0, 1, 2), dtype=torch.float64, requires_grad=True),
    ]
    expected = torch.nn.functional.conv3d(*tensors, padding=1)
    (expected**2).sum().backward()
    wanted = (
        expected.detach().numpy().transpose(0, 2, 3, 4, 1),
        tensors[0].grad.numpy().transpose(0, 2, 3, 4, 1),
        tensors[1].grad.numpy().transpose(2, 3, 4, 1, 0),
    )
    for form in (convolutions.convolve, convolutions._of_planes, convolutions._of_volumes):
        gradients = jax.grad(lambda f, k, form=form: (form(f, k) ** 2).sum(), (0, 1))(features, kernel)
        for found, reference in zip((form(features, kernel), *gradients), wanted, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (5, 1, 3), (1, 1, 1)])
def test_kernels_of_other_odd_sizes(kernel):
    features, weights = drawn((2, 5, 4, 3), kernel=kernel)
    np.testing.assert_allclose(
        convolutions.convolve(features, weights), convolutions._of_volumes(features, weights), atol=1e-5
    )


def test_only_the_cpu_computes_planes():
    arguments = drawn(SIZES[0])
    for function in (convolutions.convolve, jax.grad(lambda f, k: convolutions.convolve(f, k).sum(), (0, 1))):
        traced = jax.jit(function).trace(*arguments)
        for platform, planes in (("cpu", True), ("cuda", False), ("tpu", False)):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "stablehlo.convolution" in text
            assert ("[b, 0, 1, f]" in text) == planes, platform
            assert ("[b, 0, 1, 2, f]" in text) != planes, platform


def test_the_gradient_keeps_the_input_alone():
    features, kernel = drawn((1, 16, 16, 16), inputs=8, outputs=8)
    _, backward = jax.vjp(convolutions.convolve, features, kernel)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(backward))
    assert kept <= 1.01 * (features.nbytes + kernel.nbytes)


@pytest.mark.parametrize("policy", ["none", "minimal", "offload", "full"])
def test_remat_changes_what_is_kept_and_nothing_else(policy):
    features = jnp.asarray(drawn((1, 6, 6, 6), inputs=4)[0])

    def loss(module, params):
        return (module.apply(params, features) ** 2).sum()

    plain, remat = convolutions.ResidualConvolution(4), convolutions.remat_convolutions(policy)(4)
    params = plain.init(jax.random.key(0), features)
    wanted, found = (jax.grad(lambda p, m=m: loss(m, p))(params) for m in (plain, remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), wanted, found)
    gradient = str(jax.make_jaxpr(jax.grad(lambda p: loss(remat, p)))(params))
    # Two convolutions and their gradients; those of the backward pass alone where nothing but inputs is kept.
    again = gradient.count("conv_general_dilated") > str(
        jax.make_jaxpr(jax.grad(lambda p: loss(plain, p)))(params)
    ).count("conv_general_dilated")
    assert again == (policy == "full")
