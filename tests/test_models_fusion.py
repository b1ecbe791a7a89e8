"""Cross-modal layers and decoders: masks, permutation, an empty report, and the attention against PyTorch."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import quick_variables

from mg3d_jax.errors import UserError
from mg3d_jax.models.decoders import TokenHead, VoxelDecoder
from mg3d_jax.models.fusion import CrossAttention, Fusion, SentenceConditionedVolume

kinds = pytest.mark.parametrize("kind", ["attention", "gate"])


def make_inputs(batch=3, patches=5, tokens=7, seed=0):
    """Volume tokens of width 12, report tokens of width 8, ragged mask; the last report is empty."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=(batch, patches, 12)).astype(np.float32)
    report = rng.normal(size=(batch, tokens, 8)).astype(np.float32)
    lengths = np.array([tokens, tokens - 3, 0])[:batch]
    return volume, report, np.arange(tokens) < lengths[:, None]


def build(module, *inputs, seed=0):
    """Parameters drawn wide enough that every path shows in the output."""
    params, rng = quick_variables(module, *inputs, seed=seed), np.random.default_rng(seed + 1)
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), params)


@functools.cache
def compiled(module):
    return jax.jit(module.apply)


def apply(module, *args):
    """`module.apply`, compiled once for arguments of the same shapes."""
    return compiled(module)(*args)


volume_and_report = operator.itemgetter("volume", "report")


def make_fusion(kind="attention", **options):
    return Fusion(depth=2, num_heads=3, report_num_heads=2, kind=kind, **options)


@kinds
def test_each_modality_reads_the_other_and_padding_is_not_read(kind):
    volume, report, mask = inputs = make_inputs()
    model = make_fusion(kind)
    params = build(model, *inputs)
    fused_volume, fused_report = volume_and_report(apply(model, params, *inputs))
    assert fused_volume.shape == volume.shape and fused_report.shape == report.shape
    changed = np.where(mask[..., None], report, 9.0)  # padding only
    again_volume, again_report = volume_and_report(apply(model, params, volume, changed, mask))
    np.testing.assert_allclose(again_volume, fused_volume, atol=1e-5)
    np.testing.assert_allclose(again_report[mask], fused_report[mask], atol=1e-5)
    other_volume = apply(model, params, volume, report + mask[..., None] * np.arange(8), mask)["volume"]
    assert np.abs(other_volume - fused_volume)[:2].max() > 1e-3
    np.testing.assert_allclose(other_volume[2], fused_volume[2], atol=1e-6)  # the empty report says nothing
    other_report = apply(model, params, volume + np.arange(12), report, mask)["report"]
    assert np.abs(other_report - fused_report)[:2].max() > 1e-3


@kinds
def test_patients_do_not_mix_and_the_order_of_tokens_carries_over(kind):
    volume, report, mask = inputs = make_inputs()
    model = make_fusion(kind)
    params = build(model, *inputs)
    fused_volume, fused_report = volume_and_report(apply(model, params, *inputs))
    single = apply(model, params, volume[:1], report[:1], mask[:1])
    np.testing.assert_allclose(single["volume"], fused_volume[:1], atol=1e-5)
    order = np.random.default_rng(1).permutation(7)
    moved_volume, moved_report = volume_and_report(apply(model, params, volume, report[:, order], mask[:, order]))
    np.testing.assert_allclose(moved_volume, fused_volume, atol=1e-5)
    np.testing.assert_allclose(moved_report, fused_report[:, order], atol=1e-5)


def test_the_gate_mixes_no_tokens():
    volume, report, mask = make_inputs()
    model = Fusion(depth=1, num_heads=3, report_num_heads=2, kind="gate")
    params = build(model, volume, report, mask)
    before = apply(model, params, volume, report, mask)["volume"]
    volume[:, 0] += 1
    after = apply(model, params, volume, report, mask)["volume"]
    np.testing.assert_allclose(after[:, 1:], before[:, 1:], atol=1e-6)


@pytest.mark.parametrize("remat", ["minimal", "full"])
def test_rematerialised_gradients_are_the_same(remat):
    inputs = make_inputs()
    params = build(make_fusion(), *inputs)

    def loss(params, model):
        return sum(jnp.sum(jnp.sin(stream)) for stream in model.apply(params, *inputs).values())

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    expected, ours = gradient(params, make_fusion()), gradient(params, make_fusion(remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, expected)


def test_a_stream_that_nobody_reads_is_not_computed_in_the_last_layer():
    inputs = make_inputs()
    both, one = make_fusion(), make_fusion(outputs=("report",))
    params = build(both, *inputs)
    kept = jax.eval_shape(one.init, jax.random.key(0), *inputs)["params"]
    assert "volume_mlp" in kept["layer_0"] and not any(name.startswith("volume") for name in kept["layer_1"])
    fewer = {name: {key: params["params"][name][key] for key in tree} for name, tree in kept.items()}
    ours, theirs = apply(one, {"params": fewer}, *inputs), apply(both, params, *inputs)
    assert set(ours) == {"report"}
    np.testing.assert_allclose(ours["report"], theirs["report"], atol=1e-6)


def test_cross_attention_equals_torch():
    volume, report, mask = make_inputs(batch=2)
    model = CrossAttention(num_heads=3)
    params = build(model, volume, report, mask)
    ours = apply(model, params, volume, report, mask)
    tree = params["params"]

    def tensor(array):
        return torch.tensor(np.array(array))

    def norm(x, name):
        scale, bias = tensor(tree[name]["scale"]), tensor(tree[name]["bias"])
        return torch.nn.functional.layer_norm(tensor(x), x.shape[-1:], scale, bias, 1e-6)

    attention = torch.nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    weights = tree["attention"]
    with torch.no_grad():
        for name, target in (("query", "q"), ("key", "k"), ("value", "v")):
            getattr(attention, f"{target}_proj_weight").copy_(tensor(weights[name]["kernel"]).T)
        attention.in_proj_bias.copy_(torch.cat([tensor(weights[n]["bias"]) for n in ("query", "key", "value")]))
        attention.out_proj.weight.copy_(tensor(weights["out"]["kernel"]).T)
        attention.out_proj.bias.copy_(tensor(weights["out"]["bias"]))
        context = norm(report, "context_norm")
        change, _ = attention(norm(volume, "norm"), context, context, key_padding_mask=tensor(~mask))
    np.testing.assert_allclose(ours, volume + change.numpy(), atol=1e-4)


def test_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="mixer"):
        make_fusion("mixer").init(jax.random.key(0), *make_inputs())


def test_sentence_features_come_from_the_volume_alone():
    """With a volume that is the same everywhere, every sentence must see the same: the text has no way around."""
    volume, report, _ = make_inputs()
    model = SentenceConditionedVolume(num_heads=2, projection_dim=6)
    params = build(model, report, volume)
    z = apply(model, params, report, volume)
    assert z.shape == (3, 7, 6)
    assert np.std(z, axis=1).min() > 1e-3
    flat = np.broadcast_to(volume[:, :1], volume.shape)
    z = apply(model, params, report, flat)
    np.testing.assert_allclose(z, np.broadcast_to(z[:, :1], z.shape), atol=1e-5)


def test_the_voxel_decoder_puts_tokens_in_their_place_and_reads_the_report():
    _, report, mask = make_inputs()
    rng = np.random.default_rng(2)
    tokens = rng.normal(size=(3, 4, 12)).astype(np.float32)
    visible = np.sort(np.stack([rng.permutation(8)[:4] for _ in range(3)]), axis=1).astype(np.int32)
    model = VoxelDecoder(grid=(2, 2, 2), patch_values=10, width=12, depth=2, num_heads=3)
    params = build(model, tokens, visible, report, mask)
    voxels = apply(model, params, tokens, visible, report, mask)
    assert voxels.shape == (3, 8, 10) and voxels.dtype == jnp.float32
    order = np.array([2, 0, 3, 1])
    moved = apply(model, params, tokens[:, order], visible[:, order], report, mask)
    np.testing.assert_allclose(moved, voxels, atol=1e-5)
    elsewhere = apply(model, params, tokens, (visible + 1) % 8, report, mask)
    assert np.abs(elsewhere - voxels).max() > 1e-3
    told = apply(model, params, tokens, visible, report + 1 * np.arange(8), mask)
    assert np.abs(told - voxels)[:2].max() > 1e-3
    np.testing.assert_allclose(told[2], voxels[2], atol=1e-6)
    alone = jax.eval_shape(model.init, jax.random.key(0), tokens, visible)["params"]["layer_0"]
    assert "cross_attention" not in alone


def test_heads_compute_in_bfloat16_with_float32_parameters():
    volume, report, mask = make_inputs()
    fused, params = jax.jit(make_fusion(dtype="bfloat16").init_with_output)(jax.random.key(0), volume, report, mask)
    logits, head = jax.jit(TokenHead(20, "bfloat16").init_with_output)(jax.random.key(0), report)
    assert {fused["volume"].dtype, fused["report"].dtype, logits.dtype} == {jnp.dtype("bfloat16")} and logits.shape == (
        3,
        7,
        20,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((params, head))} == {jnp.dtype("float32")}
