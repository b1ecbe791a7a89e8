"""The 3D ViT: patches, stems, positions, registers, visible-only encoding, presets and their parameter counts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import quick_variables

from mg3d_jax import sharding
from mg3d_jax.config.parts import ReportEncoderConfig, VolumeEncoderConfig
from mg3d_jax.errors import UserError
from mg3d_jax.models.patches import halvings, patchify, unpatchify
from mg3d_jax.models.towers import vit
from mg3d_jax.models.towers.vit.encoder import VolumeEncoder

SIZE, PATCH = (16, 8, 12), (4, 2, 6)
TOKENS = 4 * 4 * 2


def encoder(**options):
    fields = {"width": 24, "depth": 2, "num_heads": 2, "patch_size": PATCH, "volume_size": SIZE} | options
    return VolumeEncoder(**fields)


def volumes(size=SIZE, channels=1, batch=2, seed=0):
    return jax.random.uniform(jax.random.key(seed), (batch, *size, channels))


def initialised(module, *args):
    return quick_variables(module, *args)["params"]


def run(module, params, *args):
    return jax.jit(module.apply)({"params": params}, *args)


def test_patchify_equals_slicing_and_is_inverted():
    volume = np.random.default_rng(0).normal(size=(2, *SIZE, 3)).astype(np.float32)
    patches = np.asarray(patchify(volume, PATCH))
    assert patches.shape == (2, TOKENS, 4 * 2 * 6 * 3)
    # Patch (2, 1, 1) of a grid (4, 4, 2) is number 2 * 8 + 1 * 2 + 1.
    np.testing.assert_array_equal(patches[1, 19].reshape(4, 2, 6, 3), volume[1, 8:12, 2:4, 6:12])
    np.testing.assert_array_equal(unpatchify(patches, PATCH, SIZE), volume)


def test_linear_stem_equals_a_pytorch_convolution():
    module, volume = encoder(positions="sincos", depth=1), volumes(channels=2)
    module = module.clone(channels=2)
    params = initialised(module, volume)
    kernel = params["patch_embedding"]["kernel"].reshape(*PATCH, 2, 24)
    convolution = torch.nn.Conv3d(2, 24, PATCH, stride=PATCH)
    convolution.weight.data = torch.from_numpy(np.array(kernel.transpose(4, 3, 0, 1, 2)))
    convolution.bias.data[:] = 0
    expected = convolution(torch.from_numpy(np.array(volume.transpose(0, 4, 1, 2, 3)))).flatten(2).transpose(1, 2)
    ours = patchify(volume, PATCH) @ params["patch_embedding"]["kernel"]
    np.testing.assert_allclose(ours, expected.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("patch", "strides"),
    [
        ((8, 8, 8), [(2, 2, 2)] * 3),
        ((8, 16, 16), [(2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)]),
        ((24, 24, 8), [(2, 2, 2), (2, 2, 2), (6, 6, 2)]),
        ((3, 3, 3), [(3, 3, 3)]),
        ((1, 1, 1), [(1, 1, 1)]),
    ],
)
def test_stem_strides_multiply_to_the_patch(patch, strides):
    assert halvings(patch) == strides
    assert tuple(np.prod(strides, axis=0)) == patch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stem": "conv"},
        {"positions": "sincos", "pooling": "mean"},
        {"num_registers": 3, "qk_norm": True, "layer_scale": 1e-4},
        {"channels": 3},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_shapes_and_axis_names(options):
    module, volume = encoder(**options), volumes(channels=options.get("channels", 1))
    boxed = jax.jit(module.init)(jax.random.key(0), volume)
    output = run(module, nn.unbox(boxed)["params"], volume)
    assert output["tokens"].shape == (2, TOKENS, 24)
    assert output["pooled"].shape == (2, 24)
    assert all(np.isfinite(array.astype(jnp.float32)).all() for array in output.values())
    specs = nn.get_partition_spec(boxed)["params"]
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    sharding.check_names(name for spec in leaves for name in spec)
    assert all(len(spec) for spec in leaves)


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_a_patch_token_of_the_stem_sees_only_its_patch(stem):
    """Without layers between, changing one voxel changes one token."""
    module, volume = encoder(stem=stem, depth=0), volumes()
    params = initialised(module, volume)
    changed = volume.at[0, 9, 3, 7, 0].add(1.0)  # in patch (2, 1, 1)
    difference = run(module, params, changed)["tokens"] - run(module, params, volume)["tokens"]
    assert list(np.flatnonzero(np.abs(difference[0]).max(axis=-1) > 1e-6)) == [19]


def test_all_visible_in_another_order_is_the_same():
    module, volume = encoder(num_registers=2), volumes()
    params = initialised(module, volume)
    order = jnp.stack([jax.random.permutation(jax.random.key(i), TOKENS) for i in range(2)])
    plain = run(module, params, volume)
    shuffled = run(module, params, volume, order)
    expected = jnp.take_along_axis(plain["tokens"], order[..., None], axis=1)
    np.testing.assert_allclose(shuffled["tokens"], expected, atol=1e-5)
    np.testing.assert_allclose(shuffled["pooled"], plain["pooled"], atol=1e-5)


def test_masked_patches_have_no_influence():
    module, volume = encoder(), volumes()
    params = initialised(module, volume)
    visible = jnp.array([[1, 5, 30], [0, 2, 31]])
    outside = jnp.ones((2, TOKENS, 1)).at[jnp.arange(2)[:, None], visible].set(0.0)
    noise = unpatchify(jnp.broadcast_to(outside, (2, TOKENS, 48)), PATCH, SIZE) * volumes(seed=5)
    before, after = (run(module, params, v, visible) for v in (volume, volume + noise))
    assert before["tokens"].shape == (2, 3, 24)
    np.testing.assert_array_equal(before["tokens"], after["tokens"])


def test_wrong_volume_and_patch_are_errors():
    with pytest.raises(UserError, match="built for volumes"):
        initialised(encoder(), volumes((16, 8, 6)))
    with pytest.raises(UserError, match="not divisible by patch_size"):
        initialised(encoder(volume_size=(16, 8, 13)), volumes((16, 8, 13)))


@pytest.mark.parametrize("field", ["stem", "positions", "pooling"])
def test_unknown_choice_is_an_error(field):
    with pytest.raises(UserError, match=f"{field}='other' is unknown"):
        initialised(encoder(**{field: "other"}), volumes())


def closed_form(preset, patch_voxels, tokens):
    """Parameters of a ViT with learned positions and attention pooling, counted on paper."""
    d, m = preset.width, preset.mlp_dim
    attention, mlp, norm = 4 * (d * d + d), d * m + m + m * d + d, 2 * d
    layer = attention + mlp + 2 * norm
    return patch_voxels * d + d + tokens * d + preset.depth * layer + norm + (d + attention)


# Parameters with 16^3 patches of a 128 x 128 x 96 volume; ViT-B/L/H/g have 86, 303, 631 and 1011 million in 2D.
GOLDEN = {
    "zepto": 173_120,
    "atto": 403_584,
    "femto": 691_392,
    "pico": 1_036_544,
    "nano": 1_433_088,
    "micro": 1_898_880,
    "ti": 6_347_520,
    "s": 23_606_784,
    "b": 90_860_544,
    "l": 311_099_392,
    "h": 641_976_320,
    "g": 1_024_256_000,
}


@pytest.mark.parametrize("name", vit.PRESETS)
def test_golden_parameter_counts(name):
    preset = vit.PRESETS[name]
    module = VolumeEncoder(
        preset.width, preset.depth, preset.num_heads, (16, 16, 16), (128, 128, 96), mlp_ratio=preset.mlp_ratio
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 128, 128, 96, 1)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == closed_form(preset, 16**3, 384)
    assert count == GOLDEN[name]


def test_unknown_preset_is_an_error():
    with pytest.raises(UserError, match="vit preset 'xl' is unknown; choose one of zepto"):
        _ = VolumeEncoderConfig(preset="xl").sizes
    with pytest.raises(UserError, match="bert preset 'xl' is unknown; choose one of pico"):
        _ = ReportEncoderConfig(preset="xl").sizes
