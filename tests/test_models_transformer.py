"""The scanned stack: remat, freezing, precision, sharding names, compile time; the block against PyTorch."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import quick_variables

from mg3d_jax import sharding
from mg3d_jax.errors import UserError
from mg3d_jax.models.transformer import REMAT_POLICIES, Attention, Block, Stack, make_remat


def initialised(module, *args, seed=0):
    return quick_variables(module, *args, seed=seed)["params"]


def run(module, params, *args, **options):
    return jax.jit(partial(module.apply, **options))({"params": params}, *args)


def noisy(params, seed=1):
    """The same tree with noise added, so that biases, scales and layer scales are not at their special values."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)


def torch_layer(params, width, heads, hidden, norm_first):
    """`torch.nn.TransformerEncoderLayer` with the parameters of our `Block`."""
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, hidden, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=norm_first
    ).eval()
    p = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params)
    attention, mlp = p["attention"], p["mlp"]
    state = {
        "self_attn.in_proj_weight": torch.cat([attention[n]["kernel"].T for n in ("query", "key", "value")]),
        "self_attn.in_proj_bias": torch.cat([attention[n]["bias"] for n in ("query", "key", "value")]),
        "self_attn.out_proj.weight": attention["out"]["kernel"].T,
        "self_attn.out_proj.bias": attention["out"]["bias"],
        "linear1.weight": mlp["up"]["kernel"].T,
        "linear1.bias": mlp["up"]["bias"],
        "linear2.weight": mlp["down"]["kernel"].T,
        "linear2.bias": mlp["down"]["bias"],
        "norm1.weight": p["attention_layer_norm"]["scale"],
        "norm1.bias": p["attention_layer_norm"]["bias"],
        "norm2.weight": p["mlp_layer_norm"]["scale"],
        "norm2.bias": p["mlp_layer_norm"]["bias"],
    }
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("position", ["pre", "post"])
def test_block_equals_pytorch(position):
    inputs = jax.random.normal(jax.random.key(0), (2, 7, 24))
    mask = jnp.arange(7)[None] < jnp.array([[7], [4]])
    block = Block(3, 40, norm_position=position, exact_gelu=True)
    params = noisy(initialised(block, inputs, mask))
    ours = np.asarray(run(block, params, inputs, mask))
    theirs = torch_layer(params, 24, 3, 40, position == "pre")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(inputs)), src_key_padding_mask=~torch.from_numpy(np.array(mask)))
    valid = np.asarray(mask)
    np.testing.assert_allclose(ours[valid], expected.numpy()[valid], atol=1e-5)


def test_stack_equals_its_blocks_one_after_another():
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 16))
    stack = Stack(3, 2, 32, qk_norm=True, layer_scale=0.1)
    params = noisy(initialised(stack, inputs))
    expected = inputs
    for index in range(3):
        layer = jax.tree.map(lambda x, i=index: x[i], params["blocks"]["block"])
        expected = run(Block(2, 32, qk_norm=True, layer_scale=0.1), layer, expected)
    np.testing.assert_allclose(run(stack, params, inputs), expected, atol=1e-5)


def test_remat_policies_change_memory_not_values():
    inputs = jax.random.normal(jax.random.key(0), (8, 64, 64))
    params = initialised(Stack(6, 2, 256), inputs)
    results, memory = {}, {}
    for policy in REMAT_POLICIES:
        stack = Stack(6, 2, 256, dropout=0.1, remat=policy)

        def loss(p, stack=stack):
            return jnp.sum(stack.apply({"params": p}, inputs, None, True, rngs={"dropout": jax.random.key(3)}) ** 2)

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        results[policy], memory[policy] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
    for policy in REMAT_POLICIES[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), results[policy], results["none"]
        )
    assert memory["full"] < memory["minimal"] < memory["none"]


def test_offload_names_host_memory():
    """The traced program moves the saved products to pinned host memory."""
    inputs = jnp.ones((2, 8, 16))
    params = initialised(Stack(2, 2, 32), inputs)
    stack = Stack(2, 2, 32, remat="offload")
    traced = jax.make_jaxpr(jax.grad(lambda p: stack.apply({"params": p}, inputs).sum()))(params)
    assert "host" in str(traced).lower()


def test_frozen_layers_get_no_gradient():
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 16))
    whole, partly = Stack(4, 2, 32), Stack(4, 2, 32, frozen_layers=3)
    params = noisy(initialised(whole, inputs))
    np.testing.assert_allclose(run(partly, params, inputs), run(whole, params, inputs), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: partly.apply({"params": p}, inputs).var()))(params)["blocks"]["block"]
    assert all(not leaf[:3].any() for leaf in jax.tree.leaves(gradient))
    assert all(leaf[3].any() for leaf in jax.tree.leaves(gradient["mlp"]))


def test_a_frozen_stack_drops_nothing():
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 16))
    stack = Stack(2, 2, 32, dropout=0.5, frozen_layers=-1)
    params = initialised(stack, inputs)
    in_training = stack.apply({"params": params}, inputs, None, True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(in_training, run(stack, params, inputs), atol=1e-6)


def test_frozen_layers_beyond_the_depth_are_an_error():
    with pytest.raises(UserError, match="frozen_layers=5"):
        initialised(Stack(4, 2, 32, frozen_layers=5), jnp.ones((1, 2, 16)))


def test_dropout_depends_on_the_key():
    inputs = jax.random.normal(jax.random.key(0), (1, 4, 16))
    stack = Stack(2, 2, 32, dropout=0.5)
    params = initialised(stack, inputs)
    drop = jax.jit(
        lambda p, seed: stack.apply({"params": p}, inputs, None, True, rngs={"dropout": jax.random.key(seed)})
    )
    assert np.array_equal(drop(params, 0), drop(params, 0))
    assert not np.array_equal(drop(params, 0), drop(params, 1))


def test_bfloat16_keeps_float32_parameters():
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 16))
    stack = Stack(2, 2, 32, dtype="bfloat16")
    params = initialised(stack, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    low = run(stack, params, inputs.astype("bfloat16"))
    assert low.dtype == jnp.bfloat16
    high = run(Stack(2, 2, 32), params, inputs)
    np.testing.assert_allclose(low.astype("float32"), high, atol=0.05)


def test_every_parameter_has_known_axis_names():
    boxed = jax.eval_shape(Stack(2, 2, 32, qk_norm=True, layer_scale=0.1).init, jax.random.key(0), jnp.ones((1, 4, 16)))
    specs = nn.get_partition_spec(boxed)["params"]["blocks"]["block"]
    assert specs["mlp"]["up"]["kernel"] == jax.sharding.PartitionSpec("layers", "embed", "mlp")
    assert specs["attention"]["out"]["kernel"] == jax.sharding.PartitionSpec("layers", "heads", "embed")
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))
    sharding.check_names(name for spec in leaves for name in spec)


def test_attention_weights_can_be_captured():
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 16))
    context = jax.random.normal(jax.random.key(1), (2, 9, 16))
    attention = Attention(4)
    params = initialised(attention, inputs, context)
    output, captured = run(attention, params, inputs, context, mutable="intermediates")
    weights = captured["intermediates"]["attention"][0]
    assert weights.shape == (2, 4, 5, 9)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(output, run(attention, params, inputs, context), atol=1e-6)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="not divisible by num_heads"):
        initialised(Attention(5), jnp.ones((1, 2, 16)), jnp.ones((1, 2, 16)))


def test_unknown_remat_policy_is_an_error():
    with pytest.raises(UserError, match="remat='some'"):
        make_remat("some")


def test_deep_stacks_have_the_program_of_shallow_ones():
    inputs = jax.ShapeDtypeStruct((1, 16, 32), jnp.float32)

    def instructions(depth):  # compile time follows them, and unlike seconds they are the same on every machine
        stack = Stack(depth, 2, 64, remat="minimal")
        params = jax.eval_shape(lambda: nn.unbox(stack.init(jax.random.key(0), jnp.ones((1, 16, 32)))["params"]))
        gradient = jax.jit(jax.grad(lambda p, x: stack.apply({"params": p}, x).sum()))
        return gradient.lower(params, inputs).compile().as_text().count(" = ")

    assert instructions(48) == instructions(12)
