"""Parameters and FLOPs from the configuration against what Flax initialises and what XLA compiles."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from mg3d_jax import config as config_lib
from mg3d_jax.models import presets, transformer
from mg3d_jax.models.mg3d import MG3D
from mg3d_jax.objectives.contrastive import info_nce
from mg3d_jax.scaling import flops

VOCAB, BATCH = 300, 4


def small(**changes):
    """A model of depth 4 and 2 that compiles in seconds; `changes` are dotted keys of the configuration."""
    config = config_lib.default().unlock()
    config.model.volume_encoder.preset = config.model.report_encoder.preset = "nano"
    config.model.volume_size, config.model.volume_encoder.patch_size = (32, 32, 32), (8, 8, 8)
    config.model.projection_dim = 64
    config.model.dtype, config.model.remat = "float32", "none"
    config.data.batch_size, config.data.max_tokens, config.data.max_sentences = BATCH, 64, 8
    config.objectives.alignment.report_tokens = 48
    config.update_from_flattened_dict(changes)
    return config.lock()


VARIANTS = {
    "linear": small(),
    "conv": small(**{"model.volume_encoder.stem": "conv"}),
    "windows, registers, norms, scales, mean": small(
        **{
            "data.windows": ((-1000.0, 1000.0), (-160.0, 240.0)),
            "model.volume_encoder.num_registers": 4,
            "model.volume_encoder.qk_norm": True,
            "model.volume_encoder.layer_scale": 0.1,
            "model.volume_encoder.positions": "learned",
            "model.volume_encoder.pooling": "mean",
            "objectives.alignment.report_view": "report",
        }
    ),
}


def inputs(config):
    length, shape = flops.report_length(config), jax.ShapeDtypeStruct
    report = {name: shape((BATCH, length), jnp.int32) for name in ("token_ids", "sentence_index", "word_index")}
    volume = shape((BATCH, *config.model.volume_size, len(config.data.windows)), jnp.float32)
    return {"volume": volume, "report": report | {"token_mask": shape((BATCH, length), jnp.bool_)}}


def abstract_parameters(module, *arguments):
    return nn.unbox(jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a), *arguments))


def xla_flops(function, *arguments) -> float:
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # code nobody runs
    return jax.jit(function).lower(*arguments).compile(quick).cost_analysis()["flops"]


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_equal_those_of_the_module(name):
    config = VARIANTS[name]
    params = abstract_parameters(MG3D(config, VOCAB), inputs(config))["params"]

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    cost = flops.count(config, VOCAB)
    assert cost.n_total == size(params)
    assert cost.n_vision == size(params["volume_encoder"])
    assert cost.n_text == size(params["report_encoder"])
    tables = [leaf.size for path, leaf in jax.tree.leaves_with_path(params) if "embedding'" in str(path[-1])]
    learned = size(params["volume_encoder"].get("positions", []))
    assert cost.n_embedding == sum(tables) + learned
    assert cost.n_active == cost.n_total - cost.n_embedding
    assert cost.n_heads == cost.n_total - cost.n_vision - cost.n_text


def shallow(monkeypatch, config) -> None:
    """Presets of depth 1: XLA counts the body of a scan once, so the other layers are measured apart."""
    for table, tower in (
        (presets.VOLUME_PRESETS, config.model.volume_encoder),
        (presets.REPORT_PRESETS, config.model.report_encoder),
    ):
        monkeypatch.setitem(table, tower.preset, dataclasses.replace(table[tower.preset], depth=1))


def measured(monkeypatch, config) -> tuple[float, float]:
    """Forward and training FLOPs per sample by XLA: the model with one layer per tower, plus the other layers."""
    encoder = config.model.volume_encoder
    volume, report = presets.volume_preset(encoder.preset), presets.report_preset(config.model.report_encoder.preset)
    cost = flops.count(config, VOCAB)
    shallow(monkeypatch, config)
    model, batch = MG3D(config, VOCAB), inputs(config)
    params = abstract_parameters(model, batch)

    def loss(p, x):
        features = model.apply(p, x)
        pair = features["volume_embedding"], features["report_embedding"]
        return info_nce(*pair, temperature=1 / features["logit_scale"])[0]

    forward, training = xla_flops(loss, params, batch), xla_flops(jax.value_and_grad(loss), params, batch)
    towers = (
        (volume, cost.volume_tokens + encoder.num_registers, {"qk_norm": encoder.qk_norm}, False),
        (report, cost.report_tokens, {"exact_gelu": True, "norm_position": "post"}, True),
    )
    for preset, tokens, options, masked in towers:
        options |= {} if masked else {"layer_scale": encoder.layer_scale or None}
        block = transformer.Block(preset.num_heads, preset.mlp_dim, **options)
        x = jax.ShapeDtypeStruct((BATCH, tokens, preset.width), jnp.float32)
        mask = jax.ShapeDtypeStruct((BATCH, tokens), jnp.bool_) if masked else None
        weights = abstract_parameters(block, x, mask)

        def backward(p, x, m, g, block=block):
            out, pull = jax.vjp(lambda p, x: block.apply(p, x, m), p, x)
            return out, pull(g)

        forward += (preset.depth - 1) * xla_flops(block.apply, weights, x, mask)
        training += (preset.depth - 1) * xla_flops(backward, weights, x, mask, x)
    return forward / BATCH, training / BATCH


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "linear"])  # the larger model has that stem
def test_flops_agree_with_xla(monkeypatch, name):
    config = VARIANTS[name]
    cost = flops.count(config, VOCAB)
    forward, training = measured(monkeypatch, config)
    assert cost.forward_flops == pytest.approx(forward, rel=0.05)
    assert cost.training_flops == pytest.approx(training, rel=0.05)


def test_flops_of_a_larger_model_agree_with_xla(monkeypatch):
    config = small(**{"model.volume_encoder.preset": "s", "model.volume_encoder.patch_size": (4, 4, 8)})
    forward, training = measured(monkeypatch, config)
    monkeypatch.undo()
    cost = flops.count(config, VOCAB)
    assert cost.forward_flops == pytest.approx(forward, rel=0.05)
    assert cost.training_flops == pytest.approx(training, rel=0.05)
    assert cost.matmul_training_flops < cost.training_flops


def test_xla_counts_the_body_of_a_scan_once():
    """Why the trainer must not take FLOPs from `cost_analysis`; if this fails, XLA has learnt to count trips."""
    x = jax.ShapeDtypeStruct((1, 32, 64), jnp.float32)
    counts = [
        xla_flops(stack.apply, abstract_parameters(stack, x), x)
        for stack in (transformer.Stack(2, 4, 128), transformer.Stack(8, 4, 128))
    ]
    assert counts[1] < 2 * counts[0]


def test_a_frozen_tower_costs_no_backward_pass():
    whole, frozen = small(), small(**{"optimizer.freeze": ("report_encoder/.*",)})
    costs = [flops.count(config, VOCAB) for config in (whole, frozen)]
    saved = costs[0].matmul_training_flops - costs[1].matmul_training_flops
    text = sum(part.dense + part.mixing for part in flops.report_parts(whole, VOCAB) if "report_encoder/" in part.name)
    assert saved == pytest.approx(2 * text, rel=0.05)  # the sentence means and the pool's keys need no input gradient
    assert costs[1].forward_flops == costs[0].forward_flops


def test_depth_and_tokens_scale_as_they_should():
    volume = flops.volume_parts(small())
    attention = next(part for part in volume if part.name.endswith("attention/mix"))
    preset = presets.VOLUME_PRESETS["nano"]
    assert attention.mixing == preset.depth * 4 * 64**2 * preset.width
    finer = flops.volume_parts(small(**{"model.volume_encoder.patch_size": (4, 8, 8)}))
    assert next(p for p in finer if p.name.endswith("attention/mix")).mixing == 4 * attention.mixing
