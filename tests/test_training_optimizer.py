"""Regex tables, groups, and the two optimizers against PyTorch and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_config

from mg3d_jax import sharding
from mg3d_jax.errors import UserError
from mg3d_jax.training import optimizer

PARAMS = {"tower": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}, "head": {"kernel": np.zeros((2, 2))}}
HEAD_FIRST = (("head/.*", 5.0), (".*", 1.0))


def test_every_parameter_is_in_exactly_one_group():
    config = tiny_config(optimizer__learning_rate_multipliers=HEAD_FIRST, optimizer__freeze=("tower/bias",)).optimizer
    factors = optimizer.multipliers(PARAMS, config)
    assert factors == {"tower": {"kernel": 1.0, "bias": 0.0}, "head": {"kernel": 5.0}}
    assert optimizer.groups(PARAMS, config, factors) == {
        "x1": optimizer.Group(1.0, ("tower/kernel",)),
        "x5": optimizer.Group(5.0, ("head/kernel",)),
        "frozen": optimizer.Group(0.0, ("tower/bias",)),
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate_multipliers": (("head/.*", 5.0),)}, r"no row for tower/.* \(2 parameters"),
        ({"learning_rate_multipliers": ((".*", 1.0), ("head/.*", 5.0))}, "'head/.*' does nothing, earlier rows take"),
        ({"learning_rate_multipliers": (("haed/.*", 5.0), (".*", 1.0))}, "'haed/.*' does nothing, it matches no"),
        ({"learning_rate_multipliers": ((".*", -1.0),)}, "must not be negative"),
        ({"freeze": ("tour/.*",)}, "freeze: 'tour/.*' matches no parameter"),
        ({"no_weight_decay": (".*/bais",)}, "no_weight_decay: '.*/bais' matches no parameter"),
        ({"freeze": ("(",)}, "not a regular expression"),
    ],
)
def test_gaps_and_typos_in_the_tables_are_errors(changes, says):
    with pytest.raises(UserError, match=says):
        optimizer.multipliers(PARAMS, tiny_config(**{f"optimizer__{k}": v for k, v in changes.items()}).optimizer)


def test_weight_decay_leaves_biases_alone():
    mask = optimizer.decay_mask(PARAMS, tiny_config().optimizer)
    assert mask == {"tower": {"kernel": True, "bias": False}, "head": {"kernel": True}}


def tree_of(rng, **shapes):
    """A parameter tree from `name__part=shape`."""
    tree = {}
    for name, shape in shapes.items():
        *parts, last = name.split("__")
        node = tree
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = rng.normal(size=shape).astype("f")
    return tree


def make(params, trained=(), rate=0.1, **options):
    config = tiny_config(**{f"optimizer__{key}": value for key, value in options.items()}).optimizer
    factors = optimizer.multipliers(params, config, trained)
    return optimizer.make_optimizer(config, lambda _: rate, params, factors), factors


def run(tx, params, gradients):
    """Parameters after one update per gradient."""
    state, update = tx.init(params), jax.jit(tx.update)
    for step, grads in enumerate(gradients):
        updates, state = update(grads, state, params, step=step)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def test_adamw_matches_pytorch():
    """Ten steps of our chain and torch.optim.AdamW on a quadratic: decay on one parameter only, a rate of its own for the
    other, clipping by the global norm."""
    torch = pytest.importorskip("torch")
    params = tree_of(np.random.default_rng(0), a__kernel=(3, 4), b__bias=(4,))
    rows = {"learning_rate_multipliers": (("b/.*", 3.0), (".*", 1.0)), "no_weight_decay": (".*bias",)}
    tx, _ = make(params, rate=0.05, clip_norm=2.0, weight_decay=0.1, b2=0.99, **rows)
    theirs = [torch.nn.Parameter(torch.tensor(params[p][n])) for p, n in (("a", "kernel"), ("b", "bias"))]
    groups = [
        {"params": theirs[:1], "weight_decay": 0.1},
        {"params": theirs[1:], "weight_decay": 0.0, "lr": 0.15},
    ]
    adam = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.99))
    ours, opt_state, update = params, tx.init(params), jax.jit(tx.update)
    for step in range(10):
        grads = {"a": {"kernel": 2 * ours["a"]["kernel"]}, "b": {"bias": 4 * (ours["b"]["bias"] - 1) ** 3}}
        updates, opt_state = update(grads, opt_state, ours, step=step)
        ours = jax.tree.map(np.add, ours, updates)
        adam.zero_grad()
        (theirs[0].square().sum() + (theirs[1] - 1).pow(4).sum()).backward()
        torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        adam.step()
    np.testing.assert_allclose(ours["a"]["kernel"], theirs[0].detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["b"]["bias"], theirs[1].detach().numpy(), rtol=1e-4, atol=1e-5)


def newton_schulz(matrix):
    """Five quintic steps in float64, without transposing (Jordan 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_reference(matrix, gradients, rate, decay):
    """Muon with Nesterov momentum (bias-corrected as Dozat's NAdam), decoupled decay, update scaled to an RMS of 0.2."""
    matrix, momentum = matrix.astype(float), np.zeros(matrix.shape)
    for step, grad in enumerate(gradients, start=1):
        momentum = 0.95 * momentum + 0.05 * grad
        ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * grad / (1 - 0.95**step)
        direction = newton_schulz(ahead) * 0.2 * np.sqrt(max(matrix.shape))
        matrix = matrix - rate * (direction + decay * matrix)
    return matrix


STACKED = {"stack__block__attention__query__kernel": (3, 8, 4), "stack__block__mlp__up__kernel": (3, 4, 12)}


def test_muon_against_numpy_layer_by_layer():
    """Each layer of a stack moves as if it were alone; what is no matrix of a block moves as AdamW moves it."""
    rng = np.random.default_rng(1)
    shapes = STACKED | {"layer__mlp__down__kernel": (6, 4), "embedding": (5, 4), "norm__scale": (4,)}
    shapes |= {"projection__out__kernel": (4, 4)}
    params = tree_of(rng, **shapes)
    gradients = [tree_of(rng, **shapes) for _ in range(3)]
    options = {"clip_norm": 0.0, "weight_decay": 0.1, "no_weight_decay": ("embedding|norm.*",)}
    found = run(make(params, name="muon", **options)[0], params, gradients)
    adam = run(make(params, name="adamw", **options)[0], params, gradients)
    for name in ("embedding", "norm", "projection"):  # two programs: the compiler may round the last bit otherwise
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), found[name], adam[name])
    block, grads = params["stack"]["block"], [g["stack"]["block"] for g in gradients]
    for part, kernel in (("attention", "query"), ("mlp", "up")):
        for layer in range(3):
            own = [g[part][kernel]["kernel"][layer] for g in grads]
            expected = muon_reference(block[part][kernel]["kernel"][layer], own, 0.1, 0.1)
            moved = found["stack"]["block"][part][kernel]["kernel"][layer]
            np.testing.assert_allclose(moved, expected, rtol=2e-4, atol=2e-5)
    own = [g["layer"]["mlp"]["down"]["kernel"] for g in gradients]
    expected = muon_reference(params["layer"]["mlp"]["down"]["kernel"], own, 0.1, 0.1)
    np.testing.assert_allclose(found["layer"]["mlp"]["down"]["kernel"], expected, rtol=2e-4, atol=2e-5)


def test_muon_on_sharded_matrices_is_muon_on_whole_ones():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp", "tensor"))
    rng = np.random.default_rng(2)
    params, gradients = tree_of(rng, **STACKED), [tree_of(rng, **STACKED)]
    tx = make(params, name="muon")[0]
    whole = run(tx, params, gradients)
    sharded = run(tx, jax.device_put(params, place), jax.device_put(gradients, place))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharded, whole)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_layers_of_a_stack_move_neither_by_gradient_nor_by_decay(name):
    """The trained layers move as they would in a stack of their own, clipping included."""
    rng = np.random.default_rng(3)
    params, grads = tree_of(rng, **STACKED), tree_of(rng, **STACKED)
    last = [("stack/.*", np.reshape([0, 0, 1], (3, 1, 1)))]
    tx, factors = make(params, last, name=name, clip_norm=0.5)
    assert all(factor.shape == (3, 1, 1) for factor in jax.tree.leaves(factors))
    after = run(tx, params, [optimizer.trained_gradient(grads, factors)] * 2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:2], b[:2]), after, params)
    alone, own = jax.tree.map(lambda p: p[2:], (params, grads))
    expected = run(make(alone, name=name, clip_norm=0.5)[0], alone, [own] * 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2:], b, rtol=1e-5, atol=1e-6), after, expected)


def test_what_is_wholly_frozen_has_no_moments_and_does_not_count_for_clipping():
    params = tree_of(np.random.default_rng(4), tower__kernel=(3, 4), head__kernel=(4, 2))
    frozen = [("tower/.*", np.zeros((1, 1)))]
    tx, factors = make(params, frozen, clip_norm=1.0)
    assert factors["tower"]["kernel"] == 0.0
    grads = {"tower": {"kernel": np.full((3, 4), np.nan, "f")}, "head": {"kernel": np.full((4, 2), 2.0, "f")}}
    state = tx.init(params)
    assert sum(x.size for x in jax.tree.leaves(state)) == 2 * 8 + 1  # two moments of the head and a counter
    updates, state = tx.update(optimizer.trained_gradient(grads, factors), state, params, step=0)
    assert not np.any(updates["tower"]["kernel"])
    momentum = next(x for x in jax.tree.leaves(state) if np.shape(x) == (4, 2))
    np.testing.assert_allclose(momentum, 0.1 * 2.0 / np.sqrt(8 * 2.0**2), rtol=1e-5)
