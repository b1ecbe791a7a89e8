"""Segmentation decoders against MONAI's UNETR and SwinUNETR, and the hidden states of the towers that they read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR
from support import quick_variables

from mg3d_jax.models.convolutions import remat_convolutions
from mg3d_jax.models.segmentation import SwinUnetrDecoder, UnetrDecoder
from mg3d_jax.models.towers import swin, vit
from mg3d_jax.models.towers.segmentation_weights import (
    SWIN_UNETR_ROWS,
    UNETR_ROWS,
    decoder_from_monai,
    decoder_to_monai,
)
from mg3d_jax.models.towers.vit.encoder import VolumeEncoder


def weights_of(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3 if parameter.ndim < 3 else parameter[0].numel() ** -0.5)
    return {name: value.detach().numpy() for name, value in network.state_dict().items()}


def theirs(network, volume):
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(volume).permute(0, 4, 1, 2, 3))
    return found.permute(0, 2, 3, 4, 1).numpy()


def ours(encoder, encoder_params, decoder, weights, rows, volume):
    params, head = decoder_from_monai(weights, rows)

    @jax.jit
    def segment(volume):
        encoded = encoder.apply({"params": encoder_params}, volume, hidden=True)
        return decoder.apply({"params": params}, volume, encoded) @ head["kernel"] + head["bias"]

    for name, array in decoder_to_monai(params, head, rows).items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)
    return segment(volume)


def test_unetr_is_monais():
    network = UNETR(2, 3, (32, 16, 16), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2, qkv_bias=True)
    weights, volume = weights_of(network), np.random.default_rng(0).normal(size=(1, 32, 16, 16, 2)).astype("f")
    found = vit.VIT.forms["monai-vit"].convert(weights, "net", volume_size=(32, 16, 16), num_heads=2, patch_size=None)
    encoder, decoder = vit.VIT.module(**found.fields), UnetrDecoder((16, 16, 16), 4)
    fresh = {"pool": quick_variables(encoder, jnp.zeros((1, 32, 16, 16, 2)))["params"]["pool"]}
    logits = ours(encoder, found.params | fresh, decoder, weights, UNETR_ROWS, volume)
    np.testing.assert_allclose(logits, theirs(network, volume), rtol=1e-3, atol=1e-3)


def test_swin_unetr_is_monais():
    network = SwinUNETR(1, 3, feature_size=12, num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1), window_size=2)
    weights, volume = weights_of(network), np.random.default_rng(0).normal(size=(1, 32, 32, 64, 1)).astype("f")
    found = swin.SWIN.forms["monai-swin"].convert(weights, "net")
    encoder, decoder = swin.SWIN.module(**found.fields), SwinUnetrDecoder((2, 2, 2), 12)
    fresh = {"pool": quick_variables(encoder, jnp.zeros((1, 32, 32, 64, 1)))["params"]["pool"]}
    logits = ours(encoder, found.params | fresh, decoder, weights, SWIN_UNETR_ROWS, volume)
    np.testing.assert_allclose(logits, theirs(network, volume), rtol=1e-3, atol=1e-3)


def test_hidden_states_of_a_vit():
    """They are those of shallower towers, whatever is frozen; without registers."""
    fields = {"width": 8, "num_heads": 2, "patch_size": (2, 2, 2), "volume_size": (4, 4, 4), "num_registers": 2}
    volume = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 1)).astype("f")
    params = quick_variables(VolumeEncoder(**fields, depth=3), volume)["params"]

    def hidden(depth, frozen=0):
        encoder = VolumeEncoder(**fields, depth=depth, frozen_layers=frozen)
        first = params | {"stack": jax.tree.map(lambda x: x[:depth], params["stack"])}
        return jax.jit(lambda p, v: encoder.apply({"params": p}, v, hidden=True)["hidden"])(first, volume)

    found = hidden(3)
    assert found.shape == (3, 2, 8, 8)
    np.testing.assert_allclose(found, hidden(3, frozen=2), rtol=1e-5, atol=1e-6)
    for depth in (1, 2):
        np.testing.assert_allclose(found[depth - 1], hidden(depth)[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [(8, 4, 6), (2, 2, 1), (3, 1, 1)])
def test_unetr_of_any_patch(patch):
    size, tokens = tuple(2 * side for side in patch), jax.ShapeDtypeStruct((1, 8, 6), jnp.float32)
    volume = jax.ShapeDtypeStruct((1, *size, 1), jnp.float32)
    encoded = {"tokens": tokens, "hidden": jax.ShapeDtypeStruct((5, *tokens.shape), jnp.float32)}
    found, _ = jax.eval_shape(UnetrDecoder(patch, 2).init_with_output, jax.random.key(0), volume, encoded)
    assert found.shape == (1, *size, 2)


def test_remat_keeps_the_gradient():
    volume = np.random.default_rng(0).normal(size=(1, 4, 4, 4, 1)).astype("f")
    params = quick_variables(remat_convolutions("none")(2), volume)

    def gradient(policy):
        module = remat_convolutions(policy)(2)
        return jax.jit(jax.grad(lambda p: jnp.sum(module.apply(p, volume)[..., 0] ** 2)))(params)

    grads = [gradient(policy) for policy in ("none", "minimal", "full")]
    for other in grads[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads[0], other)
