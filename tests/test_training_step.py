"""The compiled step: the same loss and gradients on every mesh, accumulation, freezing, averaging, skipped updates."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar
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
from mg3d_jax.data.tokens import save_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.objectives.multitask import multitask_loss
from mg3d_jax.training import integrity
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.integrity import checksums
from mg3d_jax.training.optimizer import parameter_names as names_of
from mg3d_jax.training.restore import restore_run

VOCAB = 400


def small_config(**overrides):
    return config_lib.typed(with_plain_towers(tiny_builder(**overrides)))


def build(config, data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)
    setup = state_lib.build(config, VOCAB, mesh, steps=10)
    return setup, sharding.to_global(random_batch(config, VOCAB), mesh, config.data.batch_size)


def loss_and_gradients(config, *sizes):
    setup, batch = build(config, *sizes)
    loss_fn = step_lib.Losses(setup, SPECIAL, train=True)
    params = quick_state(setup)["params"]
    with jax.set_mesh(setup.mesh), nn.logical_axis_rules(sharding.RULES):
        (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, jax.random.key(5))
        return jax.block_until_ready((jax.device_get(loss), jax.device_get(grads)))


@pytest.fixture(scope="module")
def single_device():
    return loss_and_gradients(tiny_config())


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_every_mesh_gives_the_single_device_loss_and_gradients(single_device, sizes):
    loss, grads = loss_and_gradients(tiny_config(), *sizes)
    np.testing.assert_allclose(loss, single_device[0], rtol=1e-5)

    def close(found, expected):  # 1e-5 of the largest entry of each gradient
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.max(np.abs(expected))))

    jax.tree.map(close, grads, single_device[1])


def test_loss_falls_on_one_batch_and_repeats_exactly():
    builder = with_smallest_towers(tiny_builder(optimizer__learning_rate=1e-2, schedule__warmup_steps=1))
    setup, batch = build(config_lib.typed(builder), 2, 2, 2)
    step = step_lib.train_step(setup, SPECIAL)

    def losses(count):
        state, found = state_lib.initialize(setup), []
        for _ in range(count):
            state, metrics = step(state, batch)
            found.append(float(jax.block_until_ready(metrics["loss"])))
        return found

    first = losses(10)
    assert losses(4) == first[:4]
    assert first[-1] < 0.8 * first[0]
    assert step.jitted._cache_size() == 1  # shardings of the returned state are those it came with


def test_a_learned_temperature_stops_at_its_limit_and_comes_back():
    model = build(tiny_config(objectives__alignment__learn_temperature=True))[0].model

    def scale(parameter):
        return model.apply({"params": {"logit_scale": parameter}}, method="logits")["logit_scale"]

    limit = step_lib.clip_logit_scale({"logit_scale": jnp.float32(9.0), "other": 1})
    assert limit["other"] == 1 and float(scale(limit["logit_scale"])) == pytest.approx(100.0)
    assert float(jax.grad(scale)(limit["logit_scale"])) == pytest.approx(100.0)


def test_a_balance_by_uncertainty_is_each_objective_with_its_best_noise():
    on = tuple(
        SimpleNamespace(
            name=name,
            options=SimpleNamespace(weight=weight),
            objective=SimpleNamespace(loss=lambda features, batch, options: (features["loss"], {})),
        )
        for name, weight in (("large", 0.5), ("small", 2.0))
    )

    def total(values):
        features = {"large": {"loss": values[0]}, "small": {"loss": values[1]}}
        return multitask_loss(features, {}, {}, on, "uncertainty")

    losses = jnp.array([7.0, 0.03])
    (loss, metrics), gradient = jax.value_and_grad(total, has_aux=True)(losses)
    # The loss of the paper with the noise that minimises it, found by search.
    best = [minimize_scalar(lambda s, x=x: x * np.exp(-s) + s, bracket=(-5, 5)).fun for x in (7.0, 0.03)]
    np.testing.assert_allclose(loss, 0.5 * best[0] + 2.0 * best[1], rtol=1e-5)
    np.testing.assert_allclose(gradient, [0.5 / 7.0, 2.0 / 0.03], rtol=1e-5)
    np.testing.assert_allclose([metrics["large"], metrics["small"]], losses)  # the curves stay those of the losses
    np.testing.assert_array_equal(jax.grad(total, has_aux=True)(jnp.array([1.0, 0.0]))[0], [0.5, 0.0])
    assert np.isnan(total(jnp.array([1.0, jnp.nan]))[0])


def test_accumulation_averages_the_gradients_of_its_micro_batches():
    """Two micro-batches with the same rows have the same loss; with report view "report" nothing random differs."""
    config = small_config(objectives__alignment__report_view="report", optimizer__accumulation=2)
    setup, batch = build(config)
    host = {k: np.repeat(np.asarray(v)[:4], 2, axis=0) for k, v in batch.items()}  # interleaved halves are equal
    state, metrics = step_lib.train_step(setup, SPECIAL)(quick_state(setup), sharding.to_global(host, setup.mesh, 8))
    whole = small_config(objectives__alignment__report_view="report", data__batch_size=4)
    other, half = build(whole)
    half = sharding.to_global({k: np.asarray(v)[:4] for k, v in batch.items()}, other.mesh, 4)
    _, expected_metrics = step_lib.train_step(other, SPECIAL)(quick_state(other), half)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], expected_metrics["gradient_norm"], rtol=1e-4)
    assert metrics["gradient_norm"] > config.optimizer.clip_norm  # the first moment is 0.1 of what came out of the clip
    clipped = 10 * optax.tree.norm(state["opt_state"][1].inner_states["adam"].inner_state.mu)
    np.testing.assert_allclose(clipped, config.optimizer.clip_norm, rtol=1e-5)


NAN_LOSS, NAN_GRADIENT = -32768, -32767  # HU values of the first voxel that make `poisoned_loss` misbehave


def poisoned_loss(features, logits, batch, on, balance):
    loss, metrics = multitask_loss(features, logits, batch, on, balance)
    voxel = batch["volume"][0, 0, 0, 0]
    spike = voxel == NAN_GRADIENT  # the root of 0 is 0, its derivative times 0 is not
    root = jnp.sqrt(jnp.where(spike, 0.0 * jnp.sum(features["alignment"]["volume_embedding"]), 1.0)) - jnp.where(
        spike, 0.0, 1.0
    )
    loss = jnp.where(voxel == NAN_LOSS, jnp.nan, loss + root)
    return loss, metrics | {"loss": loss}


@pytest.fixture(scope="module")
def poisonable():
    """One compiled step of a run with everything on: setup, host batch, and `(host state, batch) -> (state, metrics)`."""
    heads = (r"(?!volume_encoder|report_encoder).*", 5.0)
    config = small_config(
        optimizer__freeze=("report_encoder/.*",),
        optimizer__learning_rate_multipliers=(heads, (".*", 1.0)),
        optimizer__ema=0.3,
        schedule__warmup_steps=1,
    )
    setup, batch = build(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "multitask_loss", poisoned_loss)
        compiled = step_lib.train_step(setup, SPECIAL).compile(setup.abstract, batch)

    def step(state, rows):
        placed = jax.device_put(state, setup.shardings)
        after, metrics = compiled(placed, sharding.to_global(rows, setup.mesh, config.data.batch_size))
        jax.block_until_ready(after)
        assert all(x.is_deleted() for x in jax.tree.leaves(placed))  # donated: there is no second copy of the state
        return jax.device_get(after), jax.device_get(metrics)

    return setup, random_batch(config, VOCAB), step


@pytest.fixture(scope="module")
def trajectory(poisonable):
    """States and metrics of four good steps; the second half of the batch of the last is padding."""
    setup, batch, step = poisonable
    states, metrics = [jax.device_get(quick_state(setup))], []
    for number in range(4):
        rows = batch | {"valid": np.arange(8) < 4} if number == 3 else batch
        state, found = step(states[-1], rows)
        states.append(state)
        metrics.append(found)
    return states, metrics


@pytest.mark.parametrize("poison", [NAN_LOSS, NAN_GRADIENT])
def test_a_non_finite_step_changes_nothing_but_the_step(poisonable, trajectory, poison):
    _, batch, step = poisonable
    before, bad = trajectory[0][2], batch | {"volume": batch["volume"].copy()}
    bad["volume"][0, 0, 0, 0] = poison
    after, metrics = step(before, bad)
    assert metrics["finite"] == 0.0 and np.isfinite(metrics["loss"]) == (poison == NAN_GRADIENT)
    jax.tree.map(np.testing.assert_array_equal, after, before | {"step": before["step"] + 1})
    # The next step reads the random numbers and the learning rate of its own number.
    good, metrics = step(after, batch)
    expected, _ = step(before | {"step": before["step"] + 1}, batch)
    assert metrics["finite"] == 1.0 and good["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, good, expected)


def test_the_average_of_the_parameters_against_numpy(trajectory):
    """Decays min(0.3, (1 + t) / (10 + t)): 0.1, 0.18, 0.25, 0.3; from the first parameters, to the last bit if frozen."""
    states, _ = trajectory
    expected = jax.tree.map(np.float64, states[0]["params"])
    for decay, state in zip((1 / 10, 2 / 11, 3 / 12, 0.3), states[1:], strict=True):
        expected = jax.tree.map(lambda mean, new, d=decay: d * mean + (1 - d) * new, expected, state["params"])
        close = lambda found, mean: np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, state["ema"], expected)
    last = states[-1]
    jax.tree.map(np.testing.assert_array_equal, last["ema"]["report_encoder"], last["params"]["report_encoder"])


def test_frozen_parameters_do_not_move_and_have_no_moments(poisonable, trajectory):
    (setup, _, _), (states, _) = poisonable, trajectory
    before, after = states[0]["params"], states[-1]["params"]
    jax.tree.map(np.testing.assert_array_equal, before["report_encoder"], after["report_encoder"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["volume_encoder"], after["volume_encoder"])
    assert all(jax.tree.leaves(moved))
    frozen, total = state_lib.count(before["report_encoder"]), state_lib.count(before)
    assert state_lib.count(setup.abstract["opt_state"]) < 2 * (total - frozen) + 100


def test_metrics_of_the_step(trajectory):
    metrics = trajectory[1]
    names = {
        "gradient_norm",
        "gradient_norm/volume_encoder",
        "gradient_norm/heads",
        "learning_rate",
        "learning_rate/x1",
    }
    assert metrics[0].keys() >= names | {"learning_rate/x5", "finite", "valid_share", "update_ratio", "loss"}
    assert "gradient_norm/report_encoder" not in metrics[0]  # frozen
    squares = [metrics[2][f"gradient_norm/{tower}"] ** 2 for tower in ("volume_encoder", "heads")]
    np.testing.assert_allclose(metrics[2]["gradient_norm"], np.sqrt(np.sum(squares)), rtol=1e-6)
    rates = [row["learning_rate"] for row in metrics]
    np.testing.assert_allclose(rates, [0.0, 1e-4, 1e-4 * 8 / 9, 1e-4 * 7 / 9], rtol=1e-5)
    np.testing.assert_allclose([row["learning_rate/x5"] for row in metrics], 5 * np.array(rates), rtol=1e-6)
    assert [row["valid_share"] for row in metrics] == [1.0, 1.0, 1.0, 0.5]
    assert metrics[0]["update_ratio"] == 0.0 < metrics[1]["update_ratio"] < 0.1


def test_gradient_norms_of_towers_against_numpy():
    rng = np.random.default_rng(0)
    sizes = {
        "volume_encoder": (3, 4),
        "fusion": (5,),
        "token_head": (2,),
        "report_projection": (7,),
        "report_encoder": (9,),
    }
    grads = {name: {"kernel": rng.normal(size=size).astype("f")} for name, size in sizes.items()}
    factors = {name: {"kernel": float(name != "report_encoder")} for name in sizes}
    heads = np.concatenate([grads["token_head"]["kernel"], grads["report_projection"]["kernel"]])
    towers = {"volume_encoder": grads["volume_encoder"]["kernel"], "fusion": grads["fusion"]["kernel"], "heads": heads}
    expected = {f"gradient_norm/{name}": np.linalg.norm(value) for name, value in towers.items()}
    expected["gradient_norm"] = np.sqrt(sum(np.sum(value**2) for value in towers.values()))
    found = step_lib.gradient_norms(grads, factors)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_moments_and_average_lie_like_their_parameters():
    """With Muon too, whose momentum covers the matrices only."""
    setup, _ = build(tiny_config(optimizer__name="muon", optimizer__ema=0.99), 2, 2, 2)
    params, opt_state = setup.abstract["params"], setup.abstract["opt_state"]
    assert setup.abstract["ema"] == params
    kernel = lambda tree: tree["volume_encoder"]["stack"]["blocks"]["block"]["mlp"]["up"]["kernel"]  # noqa: E731
    embedding = lambda tree: tree["report_encoder"]["word_embedding"]  # noqa: E731
    inner = opt_state[1].inner_states
    assert kernel(inner["muon"].inner_state[0].mu).sharding == kernel(params).sharding
    assert embedding(inner["adam"].inner_state.nu).sharding == embedding(params).sharding
    assert kernel(params).sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert not jax.tree.leaves(kernel(inner["adam"].inner_state.mu))


def test_frozen_layers_of_the_config_reach_the_optimizer():
    config = tiny_config(model__volume_encoder__frozen_layers=1, model__report_encoder__frozen_layers=-1)
    setup, _ = build(config)
    blocks = setup.factors["volume_encoder"]["stack"]["blocks"]["block"]
    np.testing.assert_array_equal(np.ravel(blocks["mlp"]["up"]["kernel"]), [0, 1, 1, 1])
    frozen, encoder = set(setup.groups["frozen"].parameters), setup.abstract["params"]["report_encoder"]
    assert {n for n in frozen if n.startswith("report_encoder")} == set(
        jax.tree.leaves(names_of({"report_encoder": encoder}))
    )
    assert "volume_encoder/patch_embedding/kernel" in frozen
    assert not jax.tree.leaves(setup.abstract["opt_state"][1].inner_states["adam"].inner_state.mu["report_encoder"])


def test_a_restored_run_gives_the_average_unless_told_otherwise(poisonable, trajectory, tmp_path, monkeypatch):
    (setup, _, _), (states, _) = poisonable, trajectory
    tokenizer = train_wordpiece([f"word{number} finding{number}" for number in range(200)] * 2, VOCAB)
    assert tokenizer.get_vocab_size() == VOCAB
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(config_lib.to_json(setup.config))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(jax.device_put(states[-1], setup.shardings), {"step": 4}, 4)
    checkpoints.close()
    read = []
    monkeypatch.setattr(integrity, "checksums", lambda state: read.append(set(state)) or checksums(state))
    for ema, name in ((None, "ema"), (False, "params")):
        run = restore_run(tmp_path, ema=ema)
        assert read.pop() == {name}  # and not the moments, which take twice as much
        assert run.ema == (name == "ema") and run.meta["step"] == 4
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.params), states[-1][name])
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_config()))
    with pytest.raises(UserError, match=r"keeps no average.*leave ema out"):
        restore_run(tmp_path, ema=True)
