"""The compiled step: the same loss and gradients on every mesh, accumulation, freezing, repeatability."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from support import SPECIAL, random_batch, tiny_config

from mg3d_jax import sharding
from mg3d_jax.training import optimizer
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib

VOCAB = 400


def build(config, data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}), devices)
    setup = state_lib.build(config, VOCAB, mesh, steps=10)
    return setup, sharding.to_global(random_batch(config, VOCAB), mesh, config.data.batch_size)


def loss_and_gradients(config, *sizes):
    setup, batch = build(config, *sizes)
    loss_fn = step_lib.Losses(setup, SPECIAL, train=True)
    params = state_lib.initialize(setup)["params"]
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


def run_steps(config, count, *sizes):
    setup, batch = build(config, *sizes)
    state, step_fn, losses = state_lib.initialize(setup), step_lib.train_step(setup, SPECIAL), []
    before = jax.device_get(state["params"])
    for _ in range(count):
        state, metrics = step_fn(state, batch)
        losses.append(float(jax.block_until_ready(metrics["loss"])))
    assert step_fn.jitted._cache_size() == 1  # shardings of the returned state are those it came with
    return losses, before, jax.device_get(state["params"])


def test_loss_falls_on_one_batch_and_repeats_exactly():
    config = tiny_config(optimizer__learning_rate=1e-2, schedule__warmup_steps=1)
    losses = run_steps(config, 10, 2, 2, 2)[0]
    assert losses == run_steps(config, 10, 2, 2, 2)[0]
    assert losses[-1] < 0.8 * losses[0]


def test_accumulation_averages_the_gradients_of_its_micro_batches():
    """Two micro-batches with the same rows have the same loss; with report view "report" nothing random differs."""
    config = tiny_config(objectives__alignment__report_view="report", optimizer__accumulation=2)
    setup, batch = build(config)
    host = {k: np.repeat(np.asarray(v)[:4], 2, axis=0) for k, v in batch.items()}  # interleaved halves are equal
    _, metrics = step_lib.train_step(setup, SPECIAL)(
        state_lib.initialize(setup), sharding.to_global(host, setup.mesh, 8)
    )
    whole = tiny_config(objectives__alignment__report_view="report", data__batch_size=4)
    other, half = build(whole)
    half = sharding.to_global({k: np.asarray(v)[:4] for k, v in batch.items()}, other.mesh, 4)
    _, expected_metrics = step_lib.train_step(other, SPECIAL)(state_lib.initialize(other), half)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], expected_metrics["gradient_norm"], rtol=1e-4)


def test_frozen_parameters_do_not_move_and_have_no_moments():
    config = tiny_config(optimizer__freeze=("report_encoder/.*",), schedule__warmup_steps=1)
    _, before, after = run_steps(config, 3)
    jax.tree.map(np.testing.assert_array_equal, before["report_encoder"], after["report_encoder"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["volume_encoder"], after["volume_encoder"])
    assert all(jax.tree.leaves(moved))
    setup, _ = build(config)
    frozen = state_lib.count(setup.abstract["params"]["report_encoder"])
    total = state_lib.count(setup.abstract["params"])
    assert state_lib.count(setup.abstract["opt_state"]) < 2 * (total - frozen) + 100


def test_adamw_matches_pytorch():
    """Ten steps of our chain (no clipping) and torch.optim.AdamW on a quadratic, with decay on one parameter only."""
    torch = pytest.importorskip("torch")
    config = tiny_config(
        optimizer__clip_norm=0.0,
        optimizer__weight_decay=0.1,
        optimizer__no_weight_decay=(".*bias",),
        optimizer__b2=0.99,
    ).optimizer
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(3, 4)).astype("f")}, "b": {"bias": rng.normal(size=4).astype("f")}}
    tx = optimizer.make_optimizer(config, lambda _: 0.05, params)
    theirs = [
        torch.nn.Parameter(torch.tensor(params["a"]["kernel"])),
        torch.nn.Parameter(torch.tensor(params["b"]["bias"])),
    ]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.99))
    ours, opt_state = jax.tree.map(jnp.asarray, params), tx.init(params)
    for _ in range(10):
        grads = jax.grad(lambda p: jnp.sum(p["a"]["kernel"] ** 2) + jnp.sum((p["b"]["bias"] - 1) ** 4))(ours)
        updates, opt_state = tx.update(grads, opt_state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        adam.zero_grad()
        (theirs[0].square().sum() + (theirs[1] - 1).pow(4).sum()).backward()
        adam.step()
    np.testing.assert_allclose(ours["a"]["kernel"], theirs[0].detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["b"]["bias"], theirs[1].detach().numpy(), rtol=1e-4, atol=1e-5)
