"""The cost of a step: parameters against the built model and closed forms, FLOPs against XLA, what is frozen or recomputed."""

import itertools

import flax.linen as nn
import jax
import pytest
from support import SPECIAL, tiny_builder

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.models.towers import bert, vit
from mg3d_jax.training import cost as step_cost
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib

VOCAB = 300
SWIN = {
    "model.volume_encoder.kind": "swin",
    "model.volume_encoder.preset": "swin-nano",
    "model.volume_encoder.patch_size": (16, 16, 16),  # the default, which a Swin does not read
}


def small(objectives: str = "clip", **changes):
    """The tiny model with these objectives; `changes` are dotted keys of the configuration."""
    config = tiny_builder()
    config_lib.use_objectives(config, objectives)
    config.update_from_flattened_dict(changes)
    return config_lib.typed(config)


def cost_of(config) -> step_cost.StepCost:
    return step_cost.of_config(config, VOCAB)


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("config", "tables"),
    [
        (small("mg3d"), 0),
        (
            small(**{"model.volume_encoder.positions": "learned", "model.report_encoder.preset": "roberta-base"}),
            8 * 128,
        ),
        (small("mae", **SWIN), 0),
    ],
    ids=["all objectives", "learned positions, roberta", "swin"],
)
def test_sizes_equal_those_of_the_parameters(config, tables):
    params = nn.unbox(state_lib.abstract_parameters(state_lib.random_parameters(state_lib.build_model(config, VOCAB))))
    sizes = cost_of(config).sizes
    assert sizes.n_total == size(params)
    assert sizes.n_vision == size(params["volume_encoder"])
    assert sizes.n_text == size(params["report_encoder"])
    assert sizes.n_fusion == size([params.get("fusion"), params.get("sentence_conditioned_volume")])
    assert sizes.n_decoder == size([params.get("voxel_decoder"), params.get("token_head")])
    report = config.model.report_encoder.sizes
    rows = VOCAB + config.model.report_encoder.max_positions + report.type_vocab
    assert sizes.n_embedding == rows * report.width + tables
    assert sizes.n_active == sizes.n_total - sizes.n_embedding
    parts = (sizes.n_vision, sizes.n_text, sizes.n_fusion, sizes.n_decoder, sizes.n_heads)
    assert sizes.n_total == sum(parts)


@pytest.fixture
def one_layer(monkeypatch):
    """Towers of one layer, whose scans XLA counts whole."""
    monkeypatch.setitem(vit.PRESETS, "nano", vit.Sizes(128, 1, 4, 512))
    monkeypatch.setitem(bert.PRESETS, "nano", bert.BertSizes(128, 1, 4, 512))
    monkeypatch.setattr(step_cost, "_found", {})


@pytest.mark.parametrize("objectives", ["clip", "mg3d"])
def test_flops_of_the_losses_agree_with_xla(objectives, one_layer):
    """What makes masks of random numbers is no work of the model: XLA counts it, and here it is outside."""
    config = small(objectives, **{"model.remat": "none"})
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    setup = state_lib.build(config, VOCAB, mesh, steps=1)
    cost, losses = step_cost.StepCost(setup), step_lib.Losses(setup, SPECIAL, train=False)
    params, batch, key = cost._arguments

    def xla(function):
        return jax.jit(function).lower(params, batch, key).cost_analysis()["flops"] / config.data.batch_size

    forward = xla(lambda *of: losses(*of)[0])
    assert cost.forward.total == pytest.approx(forward, rel=0.01)
    assert cost.training.total == pytest.approx(xla(jax.grad(losses, has_aux=True)), rel=0.01)
    assert cost.training.products < cost.training.total


def test_depth_counts(monkeypatch):
    """Each layer of the volume tower costs the same, forward and backward."""
    found = []
    for depth in (1, 2, 4):
        monkeypatch.setitem(vit.PRESETS, "nano", vit.Sizes(128, depth, 4, 512))
        monkeypatch.setattr(step_cost, "_found", {})
        found.append(cost_of(small("clip")).training.products)
    tokens, width = 8, 128
    layer = 2 * tokens * (4 * width**2 + 2 * width * 512) + 4 * tokens**2 * width
    assert found[1] - found[0] == pytest.approx(3 * layer)
    assert found[2] - found[1] == pytest.approx(2 * 3 * layer)


@pytest.mark.parametrize(("kind", "layers"), [({}, (0, 2)), (SWIN, (0, 3))])
def test_frozen_layers_cost_no_backward_pass(kind, layers):
    """Costs fall with every frozen layer; all layers and then everything are what `optimizer.freeze` says."""
    frozen = [cost_of(small(**kind | {"model.volume_encoder.frozen_layers": k})) for k in (*layers, -1)]
    training = [cost.training.products for cost in frozen]
    assert all(before > after for before, after in itertools.pairwise(training))
    assert frozen[-1].forward.products == frozen[0].forward.products
    whole = cost_of(small(**kind | {"optimizer.freeze": ("volume_encoder/.*",)}))
    assert frozen[-1].training.products == whole.training.products


def test_recomputation_is_no_work_of_the_model():
    kept, again = (cost_of(small("mae", **{"model.remat": policy})) for policy in ("none", "full"))
    assert again.training.products == kept.training.products
    recomputed = [one.products for path, one in again.by_path.items() if step_cost.RECOMPUTED in path]
    assert 0 < sum(recomputed) < again.forward.products * again.batch_rows


def test_micro_batches_have_negatives_of_their_own():
    whole, parts = (cost_of(small(**{"optimizer.accumulation": pieces})) for pieces in (1, 4))
    cached = cost_of(small(**{"optimizer.accumulation": 4, "optimizer.gradient_cache": True}))
    assert (whole.batch_rows, parts.batch_rows, cached.batch_rows) == (8, 2, 8)
    assert parts.training.products < whole.training.products == cached.training.products


def test_tokens_are_those_that_are_computed():
    cost = cost_of(small())  # two sentences of 24 tokens
    assert (cost.volume_tokens, cost.report_tokens) == (8, 2 * 24)
    whole = cost_of(small(**{"objectives.alignment.report_view": "report"}))
    assert whole.report_tokens == 64


def test_runs_of_one_model_share_their_count():
    one = cost_of(small())
    assert cost_of(small(**{"seed": 7, "data.max_patients": 3, "training.steps": 9, "data.train": ("x",)})) is one
    assert cost_of(small(**{"data.batch_size": 4})) is not one
    assert step_cost.of_config(small(), VOCAB + 1) is not one


@pytest.mark.parametrize(
    ("objectives", "changes"),
    [
        ("clip", {}),
        ("mae", {"model.remat": "full"}),
        ("clip", {"optimizer.accumulation": 2}),
        ("mg3d", {"optimizer.freeze": ("volume_encoder/.*",)}),
    ],
)
def test_the_traced_step_gives_the_same_count(objectives, changes):
    """So that a run need not trace its losses a second time."""
    config = small(objectives, **changes)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    setup = state_lib.build(config, VOCAB, mesh, steps=1)
    batch = step_cost.StepCost(setup)._arguments[1]
    rows = config.data.batch_size
    batch = {name: jax.ShapeDtypeStruct((rows, *one.shape[1:]), one.dtype) for name, one in batch.items()}
    found = step_cost.StepCost(setup)
    with sharding.in_mesh(mesh):  # as `compile(..., look=found.count_in)` does, which compiles what it has traced
        found.count_in(step_lib.train_step(setup, SPECIAL).jitted.trace(setup.abstract, batch))
    assert found.counted is not None
    expected = step_cost.StepCost(setup).training
    assert found.training.products == pytest.approx(expected.products, rel=1e-12)
    assert found.training.total == pytest.approx(expected.total, rel=1e-3)


def test_a_step_that_computes_more_is_not_counted_in():
    for changes in ({"data.augment.noise": 5.0}, {"model.volume_encoder.dropout": 0.1}):
        setup = state_lib.build(
            small("clip", **changes), VOCAB, sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]), steps=1
        )
        found = step_cost.StepCost(setup)
        found.count_in(None)
        assert found.counted is None
