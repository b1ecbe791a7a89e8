"""Forms in which the words are the same and the volumes differ: against float64 loops; what equal volumes give."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from reference import same_words as reference
from reference.tools import fake_mesh, numerical_gradient, shard_rows
from support import (
    SPECIAL,
    quick_state,
    random_batch,
    tiny_builder,
    tiny_config,
    with_plain_towers,
    with_smallest_towers,
)

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.objectives import same_words
from mg3d_jax.objectives.discrimination import answered_discrimination
from mg3d_jax.objectives.gradient_cache import split
from mg3d_jax.objectives.matching import agreement, agreement_matching
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib

VOCAB, OTHERS = 400, 3
FORMS = ("alignment.fused_form", "matching.form", "discrimination.form")


def value_and_gradient(function, x):
    return jax.jit(jax.value_and_grad(lambda x: function(x)[0]))(x)


def test_which_volume_equals_loops_in_value_and_gradient():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(6, 1 + OTHERS)).astype(np.float32)
    there = rng.random((6, OTHERS)) < 0.6
    there[0], there[1] = True, False
    value, gradient = value_and_gradient(lambda x: same_words.own_among_others(x, there), logits)
    slow = functools.partial(reference.which_volume, there=there)
    assert float(value) == pytest.approx(slow(logits.astype(float)), abs=1e-6)
    np.testing.assert_allclose(gradient, numerical_gradient(slow, logits), atol=1e-6)
    metrics = same_words.own_among_others(np.zeros_like(logits), there)[1]
    rows = there.any(axis=1)
    assert float(metrics["chance"]) == pytest.approx(np.mean(np.log1p(there[rows].sum(axis=1))))
    assert float(metrics["accuracy"]) == 0.0  # a tie tells nothing apart
    assert float(same_words.own_among_others(logits, np.zeros_like(there))[0]) == 0.0


def test_discrimination_equals_loops_in_value_and_gradient():
    rng = np.random.default_rng(1)
    found = rng.normal(size=(5, 1 + OTHERS, 4)).astype(np.float32)
    answers, there = rng.normal(size=(5, 4)).astype(np.float32), rng.random((5, OTHERS)) < 0.7
    value, gradient = value_and_gradient(lambda x: answered_discrimination(x, answers, there, temperature=0.2), found)

    def slow(found):
        return reference.discrimination(found, answers.astype(float), there, 0.2)

    assert float(value) == pytest.approx(slow(found.astype(float)), abs=1e-5)
    np.testing.assert_allclose(gradient, numerical_gradient(slow, found), atol=1e-5)


def test_matching_equals_loops_in_value_and_gradient():
    rng, patients, sentences = np.random.default_rng(2), 5, 4
    statements = rng.normal(size=(3, 6))
    s = statements[rng.integers(0, 3, (patients, sentences))] + 0.1 * rng.normal(size=(patients, sentences, 6))
    s, z = s.astype(np.float32), rng.normal(size=(patients, sentences, 4)).astype(np.float32)
    z_others = rng.normal(size=(patients, OTHERS, sentences, 4)).astype(np.float32)
    mask = np.arange(sentences) < np.array([4, 1, 0, 3, 2])[:, None]
    has_text = mask.any(axis=1)
    pairs = np.array(same_words.other_patients(has_text, np.array([0, 0, 1, 2, 3]), OTHERS))
    for b in range(patients):
        for k in range(OTHERS):
            c = (b + 1 + k) % patients
            assert pairs[b, k] == (has_text[b] and has_text[c] and {b, c} != {0, 1})

    def ours(z_others):
        targets = agreement(s, mask, OTHERS)
        return agreement_matching(z, z_others, targets, pairs[..., None] & mask[:, None])

    def slow(z_others):
        return reference.matching(z, z_others, s.astype(float), mask, pairs)

    value, gradient = value_and_gradient(ours, z_others)
    assert float(value) == pytest.approx(slow(z_others.astype(float)), abs=1e-5)
    np.testing.assert_allclose(gradient, numerical_gradient(slow, z_others), atol=1e-5)
    metrics = ours(z_others)[1]
    assert float(metrics["attract_fraction"]) > 0 and float(metrics["repel_fraction"]) > 0
    only = agreement_matching(z, z_others, np.ones((patients, OTHERS, sentences)), pairs[..., None] & mask[:, None])
    assert float(only[0]) == 0.0  # nothing to tell apart


def config_of(form, **overrides):
    """The three terms between patients, each as large as the others, and nothing else. Whole reports are compared."""
    ours = form == same_words.SAME_WORDS
    config = (with_plain_towers if ours else with_smallest_towers)(tiny_builder(**overrides))
    config.model.matching_dim = 16
    config_lib.use_objectives(config, "mg3d_same_words" if ours else "mg3d")
    for name in ("volume_reconstruction", "report_reconstruction"):
        config.objectives[name].weight = 0.0
    config.objectives.alignment.update({"report_view": "report", "volume_report_weight": 0.0, "weight": 1.0})
    config.objectives.matching.update({"weight": 1.0, "sentence_source": "words"})
    config.objectives.discrimination.weight = 1.0
    config = config_lib.typed(config)
    checks.validate(config)
    return config


def patients(config):
    """Every second report has its first sentence in common with the others of them."""
    batch = random_batch(config, VOCAB)
    first = batch["sentence_index"][0] == 1
    for row in range(2, config.data.batch_size, 2):
        before = batch["sentence_index"][row] == 1
        batch["sentence_index"][row, before] = 0
        batch["sentence_index"][row, first] = 1
        batch["token_ids"][row, first] = batch["token_ids"][0, first]
    return batch


QUICK = {  # to compile
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def losses_of(config):
    """`(params, batch, key) -> (loss, metrics)` of the step on one device, fresh parameters, and the mesh of that device."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    setup = state_lib.build(config, VOCAB, mesh, steps=10)
    params = jax.device_get(quick_state(setup)["params"])
    return step_lib.Losses(setup, SPECIAL, train=True), params, mesh


def on_mesh(function, mesh, batch):
    with sharding.in_mesh(mesh):
        rows = sharding.to_global(batch, mesh, len(batch["valid"]))
        return jax.device_get(jax.block_until_ready(function(rows)))


@functools.cache
def trained(config, steps=50):
    """`batch -> metrics [steps]` and the largest gradient of the first step, along steps of Adam from fresh parameters."""
    losses, params, mesh = losses_of(config)
    optimizer = optax.adam(3e-3)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def train(rows):
        def step(carry, _):
            params, state = carry
            (_, metrics), gradient = jax.value_and_grad(losses, has_aux=True)(params, rows, jax.random.key(0))
            updates, state = optimizer.update(gradient, state, params)
            largest = jax.numpy.stack([abs(g).max() for g in jax.tree.leaves(gradient)]).max()
            return (optax.apply_updates(params, updates), state), metrics | {"largest": largest}

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]

    return lambda batch: on_mesh(train, mesh, batch)


def test_volumes_that_do_not_differ_cannot_lower_these_forms_and_do_lower_the_published_ones():
    """All patients have one volume, so any volume encoder gives them the same: what is lowered is lowered by words."""
    config = config_of(same_words.SAME_WORDS)
    batch = patients(config)
    batch["volume"][:] = batch["volume"][0]
    found = trained(config)(batch)
    chance = math.log(1 + OTHERS)
    np.testing.assert_allclose(found["discrimination/chance"], chance, atol=1e-5)
    for name, value in (("alignment/fused_loss", chance), ("discrimination", chance), ("matching", 0.5)):
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)  # at every step
    assert found["largest"][0] < 1e-3  # there is nothing to follow
    found = trained(config_of(same_words.PUBLISHED))(batch)
    for name in ("alignment/fused_loss", "discrimination"):
        assert found[name][-1] < 0.5 * math.log(config.data.batch_size), name
    assert found["matching"][-1] < 0.7 * found["matching"][0]


def test_volumes_that_differ_lower_these_forms():
    config = config_of(same_words.SAME_WORDS)
    found = trained(config)(patients(config))
    for name in ("alignment/fused_loss", "discrimination", "matching"):
        assert found[name][-1] < 0.8 * found[name][0], (name, found[name])


def test_the_mesh_does_not_matter_to_who_meets_whom():
    rng = np.random.default_rng(3)
    s, mask = rng.normal(size=(8, 3, 4)).astype(np.float32), rng.random((8, 3)) < 0.8
    valid, groups = rng.random(8) < 0.8, rng.integers(0, 4, 8).astype(np.int32)

    def both(s, mask, valid, groups):
        return agreement(s, mask, OTHERS), same_words.other_patients(valid, groups, OTHERS)

    wanted, mesh = jax.jit(both)(s, mask, valid, groups), fake_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(both)(*shard_rows(mesh, s, mask, valid, groups)))
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_array_equal(found[1], wanted[1])


def test_rows_that_only_pad_and_scans_of_one_report_are_no_other_volumes():
    config = config_of(same_words.SAME_WORDS)
    batch = patients(config)
    batch["valid"][4:] = False
    batch["report_id"][:4], batch["patient_id"][:4] = [0, 0, 1, 2], [0, 0, 1, 2]
    before = trained(config)(batch)
    # Rows 0 and 1 see two others of rows 1 to 3 or 2 to 4; row 2 sees row 3 only; row 3 sees none.
    chance = np.mean([math.log(3), math.log(3), math.log(2)])
    np.testing.assert_allclose(before["discrimination/chance"], chance, atol=1e-6)
    batch["volume"][4:] = batch["volume"][:4]
    np.testing.assert_allclose(trained(config)(batch)["loss"][:3], before["loss"][:3], rtol=1e-4)


def test_micro_batches_offer_their_own_other_volumes():
    """Features of micro-batches put together, as the cached gradient does: the mean over all rows is that of the micro-batches,
    where all have as many rows."""
    config = config_of(same_words.SAME_WORDS)
    losses, params, mesh = losses_of(config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(rows):
        features = jax.lax.map(lambda piece: losses.features(params, piece, jax.random.key(0)), split(rows, 4))
        joined = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), features)
        pieces = jax.lax.map(lambda of: losses.objectives(params, *of)[1], (features, split(rows, 4)))
        return losses.objectives(params, joined, rows)[1], pieces

    found, pieces = on_mesh(both, mesh, patients(config))
    alone = pieces["alignment/fused_loss"]
    assert alone.shape == (2,) and alone[0] != alone[1]
    np.testing.assert_allclose(found["alignment/fused_loss"], np.mean(alone), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_other_volumes_is_an_error(form):
    names = {f"objectives.{form}": same_words.SAME_WORDS, "data.batch_size": 3}
    names |= {"objectives.matching.weight": 0.1, "objectives.discrimination.weight": 0.1}
    config = config_lib.replace(tiny_config(objectives__alignment__fused_weight=0.1), names)
    with pytest.raises(UserError, match="other_volumes = 3 to be at least 1, and below the 3 patients"):
        checks.validate(config)
    with pytest.raises(UserError, match="choose"):
        checks.validate(config_lib.replace(config, {f"objectives.{form}": "words"}))


def test_runs_of_before_keep_their_hash():
    """The forms that are published are neutral: keys that did not exist do not count."""
    config = tiny_config(objectives__matching__weight=0.1)
    flat = config_lib.flatten(config)
    assert all(flat[f"objectives.{form}"] == same_words.PUBLISHED for form in FORMS)
    changed = config_lib.replace(config, {"objectives.matching.form": same_words.SAME_WORDS})
    assert config_lib.config_hash(changed) != config_lib.config_hash(config)
