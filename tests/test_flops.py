"""FLOPs of traced programs against closed forms, and of every kind of tower against XLA's own count."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from support import tiny_config

from mg3d_jax import flops
from mg3d_jax.models import transformer
from mg3d_jax.models.towers import bert, vit

ONCE = 2 * 4 * 32 * 32  # a product [4, 32] x [32, 32]
X, W = jax.ShapeDtypeStruct((4, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
STACKED = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)


def xla(function, *arguments) -> float:
    """What XLA counts in the program as it is given."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def products(function, *arguments) -> float:
    return flops.count(function, *arguments).products


def deep(weights, x):
    def layer(carry, weight):
        with jax.named_scope("layer"):
            return jnp.tanh(carry @ weight), None

    return jax.lax.scan(layer, x, weights)[0].sum()


def test_every_trip_of_a_loop_counts():
    """7 products forward, two for each of them backward; XLA counts one trip."""
    gradient = jax.grad(deep, argnums=(0, 1))
    assert products(deep, STACKED, X) == 7 * ONCE
    assert products(gradient, STACKED, X) == 3 * 7 * ONCE
    assert all("layer" in path for path, found in flops.by_path(gradient, STACKED, X).items() if found.products)
    assert xla(gradient, STACKED, X) < 7 * ONCE


def test_recomputation_has_its_own_path():
    layer = jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w, policy=jax.checkpoint_policies.nothing_saveable)
    found = flops.by_path(jax.value_and_grad(lambda w, x: layer(x, w).sum()), W, X)
    again = sum(one.products for path, one in found.items() if "rematted_computation" in path)
    assert again == ONCE  # the second product is not needed again
    assert sum(one.products for one in found.values()) == again + (2 + 3) * ONCE


def test_nested_calls_count():
    @jax.custom_vjp
    def double(x, w):
        return 2 * (x @ w)

    double.defvjp(lambda x, w: (double(x, w), (x, w)), lambda kept, g: (2 * g @ kept[1].T, 2 * kept[0].T @ g))
    assert products(jax.jit(double), X, W) == ONCE
    assert products(jax.value_and_grad(lambda x, w: double(x, w).sum(), argnums=(0, 1)), X, W) == 3 * ONCE
    assert products(jax.vmap(jnp.matmul, in_axes=(None, 0)), X, STACKED) == 7 * ONCE
    assert products(lambda x, w: jax.lax.fori_loop(0, 5, lambda _, y: y @ w, x), X, W) == 5 * ONCE
    assert products(lambda x, w: jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: y @ w, x), X, W) == ONCE


def test_the_most_expensive_branch_counts():
    def choose(x, w):
        return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

    assert products(choose, X, W) == 2 * ONCE


def test_what_nobody_reads_is_free():
    @jax.jit
    def both(x, w):
        return x @ w, x @ w @ w

    assert products(lambda x, w: both(x, w)[0], X, W) == ONCE


def test_a_shard_map_counts_on_every_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert products(sharded, X, W) == ONCE


def test_kernels_are_errors():
    from jax.experimental import pallas

    copy = pallas.pallas_call(lambda x, out: out.__setitem__(..., x[...]), out_shape=X)
    with pytest.raises(ValueError, match="kernel pallas_call"):
        flops.count(copy, X)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.gelu(x, approximate=False),
        jax.nn.gelu,
        lambda x: jax.nn.softmax(x * 3.0),
        lambda x: jnp.where(x > 0, x, 1.0) ** 3 / jnp.sqrt(jnp.abs(x)),
        lambda x: jnp.max(x, axis=-1) - jnp.mean(x, axis=-1).astype(jnp.bfloat16),
        lambda x: jax.nn.sigmoid(x) + x**-2,
    ],
)
def test_elementwise_operations_agree_with_xla(function):
    assert flops.count(function, X).total == pytest.approx(xla(function, X), rel=0.01)


def test_convolutions():
    image, kernel = jnp.zeros((2, 8, 8, 8, 3)), jnp.zeros((2, 2, 2, 3, 5))
    axes = ("NXYZC", "XYZIO", "NXYZC")
    convolve = partial(jax.lax.conv_general_dilated, window_strides=(2, 2, 2), padding="VALID", dimension_numbers=axes)
    assert products(convolve, image, kernel) == 2 * (2 * 4**3 * 5) * (2**3 * 3)
    assert products(convolve, image, kernel) == xla(convolve, image, kernel)
    padded = partial(jax.lax.conv_general_dilated, window_strides=(1, 2, 1), padding="SAME", dimension_numbers=axes)
    gradient = jax.grad(lambda image, kernel: padded(image, kernel).sum(), argnums=(0, 1))
    for function in (padded, gradient):
        assert products(function, image, kernel) == pytest.approx(xla(function, image, kernel), rel=1e-3)


def agree(module, *inputs) -> None:
    """Forward, and forward with backward, within 1 % of XLA."""
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))

    def loss(p, *of):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(module.apply(p, *of)))

    for function in (loss, jax.grad(loss)):
        assert flops.count(function, params, *inputs).total == pytest.approx(xla(function, params, *inputs), rel=0.01)


def volume_encoder(config):
    return config.model.volume_encoder.tower.build(config.model, 1, pooling="mean")


def numbers(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", vit.PRESETS)
def test_layers_of_every_vit_agree_with_xla(name):
    preset = vit.PRESETS[name]
    agree(transformer.Block(preset.num_heads, preset.mlp_dim), numbers(2, 64, preset.width))


@pytest.mark.parametrize("name", bert.PRESETS)
def test_layers_of_every_bert_agree_with_xla(name):
    preset = bert.PRESETS[name]
    block = transformer.Block(preset.num_heads, preset.mlp_dim, exact_gelu=True, norm_position="post")
    agree(block, numbers(2, 48, preset.width), numbers(2, 48, dtype=jnp.bool_))


@pytest.mark.parametrize("name", ["swin-nano", "swin-b", "swin-b-v2"])
def test_every_kind_of_swin_agrees_with_xla(name):
    """Whole encoders: nothing is scanned there. Windows that are padded, shifted and cut to a small map are among them.
    `swin-l` and `swin-l-v2` only are wider."""
    options = {"kind": "swin", "preset": name, "patch_size": (16, 16, 16)}
    config = tiny_config(**{f"model__volume_encoder__{key}": value for key, value in options.items()})
    agree(volume_encoder(config), numbers(2, 32, 32, 32, 1))


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_a_whole_vit_of_one_layer_agrees_with_xla(stem, monkeypatch):
    """With registers, norms of queries and keys, and scales; a scan over one layer is counted whole."""
    monkeypatch.setitem(vit.PRESETS, "nano", vit.Sizes(128, 1, 4, 512))
    options = {"stem": stem, "num_registers": 4, "qk_norm": True, "layer_scale": 0.1, "positions": "learned"}
    config = tiny_config(**{f"model__volume_encoder__{key}": value for key, value in options.items()})
    agree(volume_encoder(config), numbers(2, 16, 16, 16, 1))


def test_a_whole_bert_of_one_layer_agrees_with_xla(monkeypatch):
    monkeypatch.setitem(bert.PRESETS, "nano", bert.BertSizes(128, 1, 4, 512))
    ids, mask = numbers(2, 64, dtype=jnp.int32), numbers(2, 64, dtype=jnp.bool_)
    model = tiny_config().model
    agree(model.report_encoder.tower.build(model, 300), ids, mask)
