"""The objectives wired to the model: who gets a gradient, what a disabled objective leaves out, meshes, overfitting."""

import functools
import math
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from support import (
    SPECIAL,
    quick_state,
    random_batch,
    records_of,
    tiny_builder,
    tiny_config,
    with_plain_towers,
    with_smallest_towers,
)

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import checks
from mg3d_jax.config.objectives import OBJECTIVE_PRESETS
from mg3d_jax.data.pipeline import PreparedData, evaluation_batches
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.base import enabled
from mg3d_jax.registry import OBJECTIVES
from mg3d_jax.training import optimizer
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib

VOCAB = 400

TOWERS = "volume_encoder/(?!pool).*|report_encoder/.*"
# What each preset or single objective must train; everything else gets no gradient.
TRAINS = {
    "clip": "volume_encoder/.*|report_encoder/.*|report_pool/.*|(volume|report)_projection/.*",
    "siglip": "volume_encoder/.*|report_encoder/.*|report_pool/.*|(volume|report)_projection/.*|logit_(scale|bias)",
    "mae": "volume_encoder/(?!pool).*|voxel_decoder/.*",
    "mg3d": ".*(?<!logit_scale)",
    "mg3d_same_words": ".*(?<!logit_scale)",
    "report_reconstruction": f"{TOWERS}|fusion/.*|token_head/.*|sentence_projection/.*",
    "matching": f"{TOWERS}|sentence_conditioned_volume/.*",
    # Statements are single sentences: pooling one of them needs no query.
    "negation": "(volume|report)_encoder/.*|report_pool/attention/(value|out)/.*|(volume|report)_projection/.*",
    "discrimination": f"{TOWERS}|fusion/.*|fused_volume_projection/.*|sentence_conditioned_volume/.*",
}
HEADS = {
    "voxel_decoder": {"volume_reconstruction"},
    "token_head": {"report_reconstruction"},
    "sentence_projection": {"report_reconstruction"},
    "sentence_conditioned_volume": {"matching", "discrimination"},
    "fused_volume_projection": {"discrimination"},
    "fused_volume_pair_projection": {"alignment"},
    "fusion": {"report_reconstruction", "discrimination", "alignment"},
}


def make_config(objectives, **overrides):
    """A tiny config with the objectives of a preset, or with a single one, in the form where all parameters take part.

    Pooling a single sentence trains no query, and centred embeddings no bias: so whole reports, not centred.
    """
    config = with_smallest_towers(tiny_builder(**overrides))
    config.objectives.alignment.report_view, config.objectives.alignment.center = "report", False
    preset = objectives in OBJECTIVE_PRESETS
    config_lib.use_objectives(config, objectives if preset else "clip")
    if not preset:
        config.objectives.alignment.weight = 0.0
        config.objectives[objectives].weight = 1.0
    return config_lib.typed(config)


@functools.cache
def compiled(config_json, sizes):
    """`batch -> ((loss, metrics), gradients)` of the step's loss on a mesh of these sizes, with fresh parameters."""
    config = config_lib.from_json(config_json)
    mesh = sharding.make_mesh(sharding.MeshConfig(*("", *sizes)), jax.devices()[: math.prod(sizes)])
    setup = state_lib.build(config, VOCAB, mesh, steps=10)
    losses, params = step_lib.Losses(setup, SPECIAL, train=True), quick_state(setup)["params"]

    def loss(params, batch, key):
        return losses(optimizer.freeze(params, setup.factors), batch, key)

    # XLA's default schedule on CPU lets fake devices meet independent collectives in different orders: they deadlock.
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)

    def run(batch):
        batch = sharding.to_global(batch, mesh, config.data.batch_size)
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            return jax.device_get(jax.block_until_ready(step(params, batch, jax.random.key(5))))

    return run


def loss_and_gradients(config, *sizes, batch=None):
    run = compiled(config_lib.to_json(config), sizes or (1, 1, 1))
    return run(random_batch(config, VOCAB) if batch is None else batch)


def names_of(config):
    """Of the objectives that are on."""
    return {one.name for one in enabled(config.objectives)}


def moved_names(gradients):
    """Names of the parameters with a gradient.

    Biases of attention keys never have one (softmax ignores a shift), nor have those of the centred projections.
    """
    still = r".*key/bias|(volume|report)_projection/out/bias|(volume|report)_direction_bias"
    largest = jax.tree.map(lambda g: float(np.max(np.abs(g))), gradients)
    names = jax.tree.leaves(optimizer.parameter_names(gradients))
    pairs = zip(names, jax.tree.leaves(largest), strict=True)
    moved = {name for name, size in pairs if size > 0 and not re.fullmatch(still, name)}
    return moved, {name for name in names if not re.fullmatch(still, name)}


@pytest.mark.parametrize("objectives", TRAINS)
def test_a_gradient_reaches_every_parameter_of_what_is_enabled_and_no_other(objectives):
    (loss, metrics), gradients = loss_and_gradients(make_config(objectives))
    moved, names = moved_names(gradients)
    expected = {name for name in names if re.fullmatch(TRAINS[objectives], name)}
    assert moved == expected
    assert np.isfinite(loss) and set(metrics) >= names_of(make_config(objectives))


def test_the_default_form_trains_all_but_what_single_sentences_and_centring_leave_out():
    """The mean of one sentence needs no query, and the biases of centred projections follow the batch mean instead."""
    config = tiny_builder()
    config_lib.use_objectives(config, "clip")
    moved, names = moved_names(loss_and_gradients(config_lib.typed(config))[1])
    alignment = config.objectives.alignment
    assert alignment.report_view == "sentences" and alignment.center
    softmax_of_one = re.compile(r"report_pool/(query|attention/(query|key)/.*)")
    assert moved == {
        name for name in names if re.fullmatch(TRAINS["clip"], name) and not softmax_of_one.fullmatch(name)
    }


def test_frozen_parameters_get_no_gradient():
    config = make_config("matching", optimizer__freeze=("report_encoder/.*",))
    moved, names = moved_names(loss_and_gradients(config)[1])
    expected = {name for name in names if re.fullmatch(TRAINS["matching"], name)}
    assert moved == {name for name in expected if not name.startswith("report_encoder")}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_disabled_objective_has_no_parameters(objective):
    config = config_lib.replace(make_config("mg3d"), {f"objectives.{objective}.weight": 0.0})
    model = state_lib.build_model(config, VOCAB)
    names = set(state_lib.abstract_parameters(state_lib.random_parameters(model)))
    on = names_of(config)
    assert {head for head in HEADS if head in names} == {head for head, users in HEADS.items() if users & on}
    assert names >= {"volume_projection", "report_projection"}  # every run can be evaluated


def test_the_total_is_the_weighted_sum():
    config = make_config("mg3d")
    (loss, metrics), _ = loss_and_gradients(config)
    total = sum(config.objectives[name].weight * metrics[name] for name in names_of(config))
    assert float(loss) == pytest.approx(float(total), rel=1e-6)
    sentence = 0.1 * metrics["report_reconstruction/sentence_loss"]
    parts = metrics["report_reconstruction/token_loss"] + sentence
    assert float(metrics["report_reconstruction"]) == pytest.approx(float(parts), rel=1e-6)


def test_the_mesh_does_not_change_the_full_objective():
    config = make_config("mg3d")
    (loss, metrics), gradients = loss_and_gradients(config)
    (mesh_loss, mesh_metrics), mesh_gradients = loss_and_gradients(config, 2, 2, 2)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    for name in names_of(config):
        np.testing.assert_allclose(mesh_metrics[name], metrics[name], rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), mesh_gradients, gradients)


def test_rows_that_only_pad_change_nothing():
    config, batch = make_config("mg3d"), random_batch(make_config("mg3d"), VOCAB)
    batch["valid"][5:] = False
    (loss, _), gradients = loss_and_gradients(config, batch=batch)
    for name in ("volume", "token_ids"):
        batch[name][5:] = batch[name][:3]
    (other_loss, _), other_gradients = loss_and_gradients(config, batch=batch)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), other_gradients, gradients)


def test_empty_reports_and_air_stay_finite():
    config, batch = make_config("mg3d"), random_batch(make_config("mg3d"), VOCAB)
    batch["sentence_index"][:], batch["word_index"][:], batch["volume"][:] = 0, 0, -1024
    (loss, metrics), gradients = loss_and_gradients(config, batch=batch)
    assert np.isfinite(loss) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    for name in ("alignment", "report_reconstruction", "matching", "discrimination"):
        assert metrics[name] == 0


def test_the_gradient_cache_steps_like_the_whole_batch():
    """Alignment and matching with whole reports draw nothing at random, so the steps must agree."""
    options = {"objectives__alignment__report_view": "report", "objectives__alignment__center": False}
    options |= {"objectives__matching__weight": 1.0}
    options |= {"schedule__kind": "constant", "schedule__warmup_percent": 0.0}
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=1, tensor=1), jax.devices()[:2])
    small = [
        config_lib.typed(with_plain_towers(tiny_builder(**options, **more)))
        for more in ({}, {"optimizer__accumulation": 4, "optimizer__gradient_cache": True})
    ]
    batch = random_batch(small[0], VOCAB)
    setups = [state_lib.build(config, VOCAB, mesh, steps=10) for config in small]
    state, rows = quick_state(setups[0]), sharding.to_global(batch, mesh, 8)
    params, taken = jax.device_get(state["params"]), []
    for setup in setups:
        copy = jax.tree.map(jax.numpy.copy, state)  # a step takes its memory
        taken.append(jax.device_get(step_lib.train_step(setup, SPECIAL)(copy, rows)[1]))
    whole, cached = taken
    for name in ("loss", "alignment", "matching", "gradient_norm"):
        np.testing.assert_allclose(cached[name], whole[name], rtol=1e-4, err_msg=name)
    # Not so the mean over micro-batches, whose patients have fewer negatives.
    losses = jax.jit(step_lib.Losses(setups[0], SPECIAL, train=True))
    pieces = [{name: value[start::4] for name, value in batch.items()} for start in range(4)]
    averaged = np.mean([losses(params, piece, jax.random.key(0))[0] for piece in pieces])
    assert abs(averaged - whole["loss"]) > 0.1


@pytest.fixture(scope="module")
def phantom_batch(tiny_data):
    """4 phantom patients and the tokenizer of their reports."""
    data = PreparedData((tiny_data["train"],))
    config = tiny_config()
    sentences = [s for record in records_of(data) for s in record.sentences]
    tokenizer = ReportTokenizer(train_wordpiece(sentences, VOCAB), config.data.max_tokens, config.data.max_sentences)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    return next(iter(evaluation_batches(data, tokenizer, mesh, 4, threads=0))), tokenizer, mesh


def test_every_loss_goes_near_its_floor_on_one_batch(phantom_batch):
    """Which share of the first loss may be left after 220 steps. Matching ends above 0: pulls and pushes conflict."""
    left = {
        "alignment": 0.05,
        "volume_reconstruction": 0.05,
        "report_reconstruction": 0.1,
        "matching": 0.2,
        "discrimination": 0.05,
    }
    batch, tokenizer, mesh = phantom_batch
    options = {
        "optimizer__learning_rate": 1e-2,
        "optimizer__weight_decay": 0.0,
        "schedule__final_fraction": 0.1,
        "data__batch_size": 4,
    }
    weights = {f"objectives.{name}.weight": 1.0 for name in ("alignment", "matching", "discrimination")}
    changes = {"objectives.matching.sentence_source": "words"} | weights
    config = config_lib.replace(make_config("mg3d", **options), changes)
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=220)
    state, step = quick_state(setup), step_lib.train_step(setup, tokenizer.special)
    history = []
    for _ in range(220):
        state, metrics = step(state, batch)
        history.append({name: float(value) for name, value in jax.block_until_ready(metrics).items()})
    shares = {name: np.mean([row[name] for row in history[-10:]]) / history[0][name] for name in left}
    assert all(shares[name] < left[name] for name in left), shares


def test_impossible_objectives_are_refused_with_the_remedy():
    config = make_config("mg3d")
    checks.validate(config)
    changes = {
        "objectives.matching.low": 0.95,
        "objectives.report_reconstruction.mask_ratio": 1.0,
        "objectives.discrimination.temperature": 0.0,
        "objectives.volume_reconstruction.masking": "cubes",
        "model.fusion.kind": "mixer",
    }
    config = config_lib.replace(config, changes)
    with pytest.raises(UserError) as caught:
        checks.validate(config)
    for word in ("matching.low = 0.95", "mask_ratio = 1.0", "temperature = 0.0", "'cubes'", "'mixer'"):
        assert word in str(caught.value)
    with pytest.raises(UserError, match="clip, siglip, mae, mg3d"):
        config_lib.use_objectives(config, "moco")
