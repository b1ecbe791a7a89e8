"""The assembled model: a Swin in place of the ViT, passes through the report encoder, bfloat16, frozen layers."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import unbox
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec
from support import SPECIAL, random_batch, tiny_builder

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.multitask import multitask_loss
from mg3d_jax.training import optimizer
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.inputs import model_inputs

VOCAB = 400
VOLUME, REPORT = "model__volume_encoder__", "model__report_encoder__"
SWIN = {VOLUME + "kind": "swin", VOLUME + "preset": "swin-nano", VOLUME + "patch_size": (16, 16, 16)}
# Softmax ignores a shift of the keys, and a constant column of the centred projections leaves the loss.
STILL = r".*key/bias|(volume|report)_projection/out/bias|logit_scale"


def make_config(**overrides):
    """Small, to compile quickly. Whole reports in the alignment: pooling a single sentence trains no query."""
    small = {"data__batch_size": 4, "model__fusion__depth": 1, "model__voxel_decoder__depth": 1}
    small |= {"objectives__alignment__report_view": "report"}
    config = tiny_builder(**small | overrides)
    config_lib.use_objectives(config, "mg3d")
    config = config_lib.typed(config)
    checks.validate(config)
    return config


def losses(config):
    """The model, fresh parameters' shapes, and `(params, batch) -> (loss, metrics)` as the step computes it."""
    model = state_lib.build_model(config, VOCAB)

    def inputs(batch, train=False):
        return model_inputs(batch, jax.random.key(1), model, special=SPECIAL, train=train)

    def loss(params, batch):
        features = model.apply({"params": params}, inputs(batch, True), train=True, rngs={"dropout": jax.random.key(2)})
        logits = model.apply({"params": params}, method="logits")
        return multitask_loss(features, logits, batch, model.on)

    def init(batch):
        return model.init(jax.random.key(0), inputs(batch))["params"]

    return init, loss


QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # to compile in a third of the time


@functools.cache
def parameters(swin: bool = False):
    """Random, all biases and norms moved; made by NumPy, which compiles nothing."""
    config, rng = make_config(**SWIN if swin else {}), np.random.default_rng(0)
    shapes = unbox(jax.eval_shape(losses(config)[0], random_batch(config, VOCAB)))

    def draw(path, leaf):
        kind, noise = str(path[-1].key), rng.standard_normal(leaf.shape).astype(np.float32)
        if kind == "kernel":
            return noise * leaf.shape[-2] ** -0.5
        return {"scale": 1.0, "logit_scale": np.log(10.0)}.get(kind, 0.0) + np.float32(0.02) * noise

    return jax.tree_util.tree_map_with_path(draw, shapes)


def gradients(config, params, batch):
    step = jax.jit(jax.value_and_grad(losses(config)[1], has_aux=True))
    return jax.device_get(step.lower(params, batch).compile(QUICK)(params, batch))


def flat(tree):
    names = jax.tree.leaves(optimizer.parameter_names(tree))
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def test_all_objectives_work_with_a_swin():
    """A gradient for every parameter, the mask token's too."""
    config = make_config(**SWIN)
    (value, metrics), grads = gradients(config, parameters(swin=True), random_batch(config, VOCAB))
    still = {name for name, grad in flat(grads).items() if not np.any(grad)}
    assert all(re.fullmatch(STILL, name) for name in still), still
    assert "volume_encoder/mask_token" in flat(grads)
    assert "voxel_decoder/mask_token" not in flat(grads)  # the encoder fills all places
    assert np.isfinite(value)
    assert metrics["volume_reconstruction/patches"] == 4 * 4  # half of 2 x 2 x 2 cells of 8 voxels


def test_a_swin_on_a_mesh_gives_what_it_gives_on_one_device():
    config = make_config(**SWIN, mesh__fsdp=2, mesh__tensor=2)
    encoder, mesh = config.model.volume_encoder.tower.build(config.model, 1), sharding.make_mesh(config.mesh)
    volume = np.random.default_rng(0).random((4, 16, 16, 16, 1), np.float32)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), volume)["params"]
    places = sharding.parameter_shardings(boxed, mesh)
    assert places["stage_0_block_1"]["mlp"]["up"]["kernel"].spec == PartitionSpec("fsdp", "tensor")
    params = {name: part for name, part in parameters(swin=True)["volume_encoder"].items() if name in boxed}
    expected = jax.jit(encoder.apply)({"params": params}, volume)["pooled"]
    with sharding.in_mesh(mesh):
        sharded = jax.device_put(params, places), sharding.to_global({"volume": volume}, mesh, 4)["volume"]
        found = jax.jit(lambda p, v: encoder.apply({"params": p}, v)["pooled"])(*sharded)
        np.testing.assert_allclose(jax.block_until_ready(found), expected, atol=1e-5)


def test_a_swin_does_not_see_what_is_hidden():
    config = make_config(**SWIN)
    model, params = state_lib.build_model(config, VOCAB), parameters(swin=True)
    volume = jax.random.uniform(jax.random.key(0), (1, 16, 16, 16, 1))
    visible = jnp.array([[0, 3, 6]])  # of 2 x 2 x 2 cells

    @jax.jit
    def tokens(volume):
        def encode(bound, volume):
            return bound.volume_encoder(volume, visible)

        return model.apply({"params": params}, volume, method=encode)["tokens"]

    seen = tokens(volume)
    hidden_changed = volume.at[0, 8:, :8, 8:].add(0.5)  # cell 5
    seen_changed = volume.at[0, :8, 8:, 8:].add(0.5)  # cell 3
    assert seen.shape == (1, 8, 64)
    np.testing.assert_array_equal(tokens(hidden_changed), seen)
    assert np.abs(tokens(seen_changed) - seen).max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({VOLUME + "pooling": "flatten"}, "pooling = 'flatten'"),
        ({VOLUME + "positions": "learned"}, "positions = 'learned': means nothing with kind = 'swin'"),
        ({"model__volume_size": (20, 16, 16)}, "X = 20 is not divisible by the swin-nano cell X = 8"),
        ({VOLUME + "frozen_layers": 4}, "frozen_layers = 4: from 0"),
        ({VOLUME + "preset": "b"}, "preset = 'b'"),
    ],
)
def test_settings_that_a_swin_has_not_are_errors(overrides, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_config(**SWIN | overrides)


def encoder_scans(config) -> dict[str, list[int]]:
    """Lengths of the scans over encoder layers in the gradient's program: forward, and backward."""
    init, loss = losses(config)
    batch = random_batch(config, VOCAB)
    params = unbox(jax.eval_shape(init, batch))
    program = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b)[0]))(params, batch)
    found = {f"{tower} {way}": [] for tower in ("volume", "report") for way in ("forward", "backward")}

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            scope = str(equation.source_info.name_stack)
            tower = re.search(r"(volume|report)_encoder", scope)
            if equation.primitive.name == "scan" and tower:
                found[f"{tower[1]} {'backward' if 'transpose' in scope else 'forward'}"].append(
                    equation.params["length"]
                )
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(program.jaxpr)
    return found


def test_passes_through_the_encoders():
    """Of all objectives: the report encoder reads the whole report once for all of them, its corrupted twin once, and the
    drawn sentences once; frozen, nothing comes back through it, and from a partly frozen one only the trained layers."""
    scans = encoder_scans(make_config())
    assert scans["report forward"] == scans["report backward"] == [2, 2]
    assert scans["volume forward"] == scans["volume backward"] == [4, 4]

    frozen = {REPORT + "frozen_layers": -1, VOLUME + "frozen_layers": 1}
    scans = encoder_scans(make_config(**frozen, objectives__alignment__report_view="sentences"))
    assert scans["report forward"] == [2, 2, 2] and not scans["report backward"]
    assert scans["volume forward"] == [1, 3, 1, 3] and scans["volume backward"] == [3, 3]


def encoder_gradients(config, name):
    """Of everything that an encoder gives, with its parameters; `name` is its name in the model."""
    if name == "volume_encoder":
        encoder, inputs = (
            config.model.volume_encoder.tower.build(config.model, 1),
            (np.random.default_rng(0).random((2, 16, 16, 16, 1)),),
        )
    else:
        ids = np.random.default_rng(0).integers(0, VOCAB, (2, 12))
        encoder, inputs = config.model.report_encoder.tower.build(config.model, VOCAB), (ids, ids >= 0)
    params = {
        k: v for k, v in parameters(config.model.volume_encoder.kind == "swin")[name].items() if k != "mask_token"
    }

    def total(params):
        outputs = encoder.apply({"params": params}, *inputs, train=True, rngs={"dropout": jax.random.key(0)})
        weights = (jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in jax.tree.leaves(outputs))
        return sum(jnp.sum(x * w) for x, w in zip(jax.tree.leaves(outputs), weights, strict=True))

    return params, jax.device_get(jax.jit(jax.grad(total))(params))


@pytest.mark.parametrize(
    ("overrides", "name", "layers"),
    [
        ({}, "volume_encoder", 1),
        (SWIN, "volume_encoder", 2),
        (SWIN, "volume_encoder", -1),
        ({}, "report_encoder", 1),
        ({}, "report_encoder", -1),
    ],
)
def test_frozen_layers_by_name_and_layer(overrides, name, layers):
    """The gradient is zero exactly where the optimizer's factor is, parameter by parameter and layer by layer."""
    config = make_config(**overrides | {f"model__{name}__frozen_layers": layers, f"model__{name}__dropout": 0.1})
    params, grads = encoder_gradients(config, name)
    factors = flat(optimizer.multipliers({name: params}, config.optimizer, optimizer.trained_rows(config.model)))
    for parameter, grad in flat({name: grads}).items():
        factor, by_layer = factors[parameter], "stack" in parameter
        if parameter.endswith("key/bias"):
            continue
        moved = [layer.any() for layer in grad] if by_layer else [grad.any()]
        expected = np.broadcast_to(factor, grad.shape).reshape(len(moved), -1).all(axis=1)
        assert moved == list(expected), parameter
    trained = {parameter.split("/")[1] for parameter, factor in factors.items() if np.any(factor)}
    if layers == -1:
        assert not trained
    elif overrides:
        assert trained == {"stage_1_block_0", "merging_1", "pool"}
    else:
        assert trained == {"volume_encoder": {"stack", "norm", "pool"}, "report_encoder": {"stack"}}[name]


def test_bfloat16_is_close_to_float32():
    """All objectives at temperature 0.01, a report without text and one patient that is only padding among the batch.

    Parameters, gradients and losses are float32 in both. Tolerances: 2 % of the loss, each named loss 5 %; the gradients of
    all parameters together point the same way to a cosine of 0.98.
    """
    params, found = parameters(), {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(
            model__dtype=dtype, objectives__alignment__temperature=0.01, objectives__discrimination__temperature=0.01
        )
        batch = random_batch(config, VOCAB)
        batch["token_mask"][0, 2:], batch["sentence_index"][0], batch["word_index"][0] = False, 0, 0
        batch["valid"][3] = False
        found[dtype] = gradients(config, params, batch)
    (loss, metrics), grads = found["float32"]
    (rounded, rounded_metrics), rounded_grads = found["bfloat16"]
    assert {leaf.dtype for leaf in jax.tree.leaves([rounded, rounded_metrics, rounded_grads])} == {np.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert rounded == pytest.approx(loss, rel=0.02)
    for name in ("alignment", "volume_reconstruction", "report_reconstruction", "matching", "discrimination"):
        assert rounded_metrics[name] == pytest.approx(metrics[name], rel=0.05, abs=0.01), name
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (grads, rounded_grads))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
