"""Parameters and FLOPs from the configuration against what Flax initialises and what XLA compiles."""

import dataclasses
import itertools
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SPECIAL, random_batch

from mg3d_jax import config as config_lib
from mg3d_jax.models import transformer
from mg3d_jax.models.mg3d import MG3D
from mg3d_jax.models.towers import bert, vit
from mg3d_jax.objectives.multitask import multitask_loss, per_patient
from mg3d_jax.scaling import flops, parts
from mg3d_jax.training.inputs import model_inputs

VOCAB, BATCH = 300, 4


def small(objectives: str = "clip", **changes):
    """A model of depth 4 and 2 that compiles in seconds; `changes` are dotted keys of the configuration."""
    config = config_lib.default().unlock()
    config_lib.use_objectives(config, objectives)
    config.model.volume_encoder.preset = config.model.report_encoder.preset = "nano"
    config.model.volume_size, config.model.volume_encoder.patch_size = (32, 32, 32), (8, 8, 8)
    config.model.projection_dim, config.model.voxel_decoder.width = 64, 96
    config.model.dtype, config.model.remat = "float32", "none"
    config.data.batch_size, config.data.max_tokens, config.data.max_sentences = BATCH, 64, 8
    config.objectives.alignment.report_sentences, config.objectives.alignment.sentence_tokens = 2, 48
    config.update_from_flattened_dict(changes)
    return config_lib.typed(config)


SWIN = {
    "model.volume_encoder.kind": "swin",
    "model.volume_encoder.preset": "swin-nano",
    "model.volume_encoder.patch_size": (16, 16, 16),  # the default, which a Swin does not read
}
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
    "siglip, flatten": small("siglip", **{"model.volume_encoder.pooling": "flatten"}),
    "masked autoencoder": small("mae"),
    "all objectives": small("mg3d"),
    "all objectives, whole report, gate": small(
        "mg3d", **{"objectives.alignment.report_view": "report", "model.fusion.kind": "gate"}
    ),
    "swin, all objectives": small("mg3d", **SWIN),
    "swin with convolutions": small(
        **SWIN | {"model.volume_encoder.preset": "swin-b-v2", "model.volume_encoder.pooling": "mean"}
    ),
    "frozen, roberta": small(
        "mg3d",
        **{
            "model.volume_encoder.frozen_layers": 1,
            "model.report_encoder.frozen_layers": -1,
            "model.report_encoder.preset": "roberta-base",
        },
    ),
    "words only": small(
        "mae", **{"objectives.volume_reconstruction.weight": 0.0, "objectives.report_reconstruction.weight": 1.0}
    ),
}
COMPILED = ("conv", "windows, registers, norms, scales, mean", "all objectives")  # the others are parts of these


@cache
def batch_of(name: str) -> dict[str, np.ndarray]:
    return random_batch(VARIANTS[name], vocab_size=VOCAB)


def inputs(config, batch):
    return model_inputs(batch, jax.random.key(0), config, special=SPECIAL, vocab_size=VOCAB, train=False)


def abstract_parameters(module, *arguments):
    return nn.unbox(jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a), *arguments))


def model_parameters(config, batch):
    return nn.unbox(jax.eval_shape(lambda b: MG3D(config, VOCAB).init(jax.random.key(0), inputs(config, b)), batch))[
        "params"
    ]


def xla_flops(function, *arguments) -> float:
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # code nobody runs
    return jax.jit(function).lower(*arguments).compile(quick).cost_analysis()["flops"]


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_equal_those_of_the_module(name):
    config = VARIANTS[name]
    params = model_parameters(config, batch_of(name))
    cost = flops.count(config, VOCAB)
    assert cost.n_total == size(params)
    assert cost.n_vision == size(params["volume_encoder"])
    assert cost.n_text == size(params["report_encoder"])
    assert cost.n_fusion == size([params.get("fusion"), params.get("sentence_conditioned_volume")])
    assert cost.n_decoder == size([params.get("voxel_decoder"), params.get("token_head")])
    tables = [leaf.size for path, leaf in jax.tree.leaves_with_path(params) if "embedding'" in str(path[-1])]
    learned = size(params["volume_encoder"].get("positions", []))
    assert cost.n_embedding == sum(tables) + learned
    assert cost.n_active == cost.n_total - cost.n_embedding
    assert cost.n_heads == cost.n_total - cost.n_vision - cost.n_text - cost.n_fusion - cost.n_decoder


def tower_passes(config) -> list[tuple[str, int, int]]:
    """(tower, rows per sample, tokens) of every run through a tower, as the model's `__call__` reads."""
    on = {name: one.weight > 0 for name, one in config.objectives.items()}
    texts, length, _ = flops.report_shape(config)
    registers = config.model.volume_encoder.num_registers
    found = []
    if any(weight for name, weight in on.items() if name != "volume_reconstruction"):
        found.append(("volume", 1, flops.volume_tokens(config) + registers))
    if on["volume_reconstruction"]:
        found.append(("volume", 1, flops.volume_tokens(config) // 2 + registers))
    if on["alignment"]:
        found.append(("report", texts, length))
    if on["report_reconstruction"]:
        found += [("report", 1, config.data.max_tokens)] * 2
    return found


def layer_flops(config, tower: str, rows: int, tokens: int) -> tuple[float, float]:
    """Forward and training FLOPs of one layer of a tower in one pass, by XLA."""
    encoder, preset = config.model.volume_encoder, parts.towers(config)[tower == "report"]
    options = {"exact_gelu": True, "norm_position": "post"}
    if tower == "volume":
        options = {"qk_norm": encoder.qk_norm, "layer_scale": encoder.layer_scale or None}
    block = transformer.Block(preset.num_heads, preset.mlp_dim, **options)
    x = jax.ShapeDtypeStruct((BATCH * rows, tokens, preset.width), jnp.float32)
    mask = jax.ShapeDtypeStruct(x.shape[:2], jnp.bool_) if tower == "report" else None
    weights = abstract_parameters(block, x, mask)

    def backward(p, x, m, g):
        out, pull = jax.vjp(lambda p, x: block.apply(p, x, m), p, x)
        return out, pull(g)

    return xla_flops(block.apply, weights, x, mask), xla_flops(backward, weights, x, mask, x)


def measured(monkeypatch, config, batch) -> tuple[float, float]:
    """Forward and training FLOPs per sample by XLA: the model with one layer per tower, plus the other layers.

    XLA counts the body of a scan once, so the layers beyond the first are measured apart.
    """
    presets_of = dict(zip(("volume", "report"), parts.towers(config), strict=True))
    with monkeypatch.context() as shallow:
        names = config.model.volume_encoder.preset, config.model.report_encoder.preset
        for table, name in zip((vit.PRESETS, bert.PRESETS), names, strict=True):
            shallow.setitem(table, name, dataclasses.replace(table[name], depth=1))
        model, params = MG3D(config, VOCAB), model_parameters(config, batch)

        def loss(p, b):
            features = per_patient(model.apply({"params": p}, inputs(config, b)), config.objectives)
            logits = model.apply({"params": p}, method="logits")
            return multitask_loss(features | logits, b, config.objectives)[0]

        forward, training = xla_flops(loss, params, batch), xla_flops(jax.value_and_grad(loss), params, batch)
    for tower, rows, tokens in tower_passes(config):
        once, both = layer_flops(config, tower, rows, tokens)
        forward += (presets_of[tower].depth - 1) * once
        training += (presets_of[tower].depth - 1) * both
    return forward / BATCH, training / BATCH


@pytest.mark.parametrize("name", COMPILED)
def test_flops_agree_with_xla(monkeypatch, name):
    config = VARIANTS[name]
    cost = flops.count(config, VOCAB)
    forward, training = measured(monkeypatch, config, batch_of(name))
    assert cost.forward_flops == pytest.approx(forward, rel=0.05)
    assert cost.training_flops == pytest.approx(training, rel=0.05)


def test_flops_of_a_larger_model_agree_with_xla(monkeypatch):
    config = small(**{"model.volume_encoder.preset": "s", "model.volume_encoder.patch_size": (4, 4, 8)})
    forward, training = measured(monkeypatch, config, batch_of("linear"))
    cost = flops.count(config, VOCAB)
    assert cost.forward_flops == pytest.approx(forward, rel=0.05)
    assert cost.training_flops == pytest.approx(training, rel=0.05)
    assert cost.matmul_training_flops < cost.training_flops


def test_flops_of_a_swin_agree_with_xla():
    """Windows that are padded, shifted and cut to a small map are among them."""
    config = small(**SWIN)
    encoder = config.model.volume_encoder.tower.build(config.model, 1, pooling="mean")
    volume = jax.ShapeDtypeStruct((BATCH, 32, 32, 32, 1), jnp.float32)
    weights = abstract_parameters(encoder, volume)

    def loss(p, v):
        return jnp.square(encoder.apply(p, v)["tokens"]).sum()

    one = flops.Pass(parts.volume_tower(config, flops.volume_tokens(config)))
    forward, training, _, _ = flops._flops(one, ())
    assert forward * BATCH == pytest.approx(xla_flops(loss, weights, volume), rel=0.05)
    assert training * BATCH == pytest.approx(xla_flops(jax.value_and_grad(loss), weights, volume), rel=0.05)


@pytest.mark.parametrize(("kind", "layers"), [({}, 4), (SWIN, 3)])
def test_frozen_layers_cost_no_backward_pass(kind, layers):
    """Costs fall with every frozen layer; all layers and then everything are what `optimizer.freeze` says."""
    costs = [
        flops.count(small(**kind | {"model.volume_encoder.frozen_layers": k}), VOCAB) for k in (*range(layers + 1), -1)
    ]
    training = [cost.matmul_training_flops for cost in costs]
    assert all(before > after for before, after in itertools.pairwise(training))
    assert {cost.forward_flops for cost in costs} == {costs[0].forward_flops}
    whole = flops.count(small(**kind | {"optimizer.freeze": ("volume_encoder/.*",)}), VOCAB)
    assert costs[-1].training_flops == whole.training_flops


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
    tower = parts.report_tower(whole, VOCAB, 48)
    assert saved == pytest.approx(2 * 2 * sum(part.dense + part.mixing for part in tower), rel=0.05)  # two sentences
    assert costs[1].forward_flops == costs[0].forward_flops


def test_depth_and_tokens_scale_as_they_should():
    def attention(config):
        tower = parts.volume_tower(config, flops.volume_tokens(config))
        return next(part for part in tower if part.name.endswith("attention/mix")).mixing

    preset = vit.PRESETS["nano"]
    assert attention(small()) == preset.depth * 4 * 64**2 * preset.width
    assert attention(small(**{"model.volume_encoder.patch_size": (4, 8, 8)})) == 4 * attention(small())
