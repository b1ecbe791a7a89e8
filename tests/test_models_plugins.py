"""An objective, a tower and a head that are declared in this file alone: trained, counted, saved, resumed, evaluated."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import SPECIAL, random_batch, tiny_builder

from mg3d_jax import config as config_lib
from mg3d_jax import registry, sharding
from mg3d_jax.commands.main import main
from mg3d_jax.config import checks
from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.base import Form, Imported, Sizes, Tower
from mg3d_jax.objectives.base import Objective, enabled
from mg3d_jax.options import key
from mg3d_jax.training import cost, inputs
from mg3d_jax.training import state as state_lib
from mg3d_jax.training import step as step_lib
from mg3d_jax.training.writers import read_metrics

VOCAB = 400


@dataclass(frozen=True)
class DensityOptions:
    """The mean density of each scan, from the pooled volume and a random number that must not help."""

    weight: float = key(0.0, "weight in the loss; 0: off", neutral=0.0)
    width: int = key(4, "width of the hidden layer")


class DensityHead(nn.Module):
    width: int

    @nn.compact
    def __call__(self, pooled, noise):
        hidden = nn.gelu(nn.Dense(self.width)(jnp.concatenate([pooled, noise], axis=-1)))
        return nn.Dense(1)(hidden)[..., 0]


def density_loss(features, batch, options):
    target = jnp.mean(batch["volume"].astype(jnp.float32), axis=(1, 2, 3)) / 1000
    errors = jnp.where(batch["valid"], jnp.square(features["density"] - target), 0.0)
    return jnp.sum(errors) / jnp.maximum(jnp.sum(batch["valid"]), 1), {"largest": jnp.max(errors)}


DENSITY = Objective(
    options=DensityOptions,
    needs=lambda options: ("volume_pooled", "density_noise"),
    loss=density_loss,
    features=lambda modules, needed, options: {
        "density": modules["density_head"](needed["volume_pooled"], needed["density_noise"])
    },
    draw=lambda rng, batch, options, context: {
        "density_noise": jax.random.normal(rng, (batch["volume"].shape[0], 1)) + 0.0 * context.vocab_size
    },
    modules=lambda options, context: {"density_head": DensityHead(options.width)},
    problems=lambda options, config: [] if options.width > 0 else ["objectives.density.width: must be at least 1"],
)


class Blocks(nn.Module):
    """A tower of one linear layer on cubes, with the places of visible ones."""

    width: int
    side: int

    @nn.compact
    def __call__(self, volume, visible=None, train=False):
        grid, side = [size // self.side for size in volume.shape[1:4]], self.side
        cubes = volume.reshape(-1, grid[0], side, grid[1], side, grid[2], side, volume.shape[-1])
        cubes = cubes.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(volume.shape[0], prod(grid), -1)
        tokens = nn.Dense(self.width, name="embed")(cubes)
        if visible is not None:
            tokens = jnp.take_along_axis(tokens, visible[..., None], axis=1)
        return {"tokens": tokens, "pooled": tokens.mean(axis=1)} | ({} if visible is None else {"places": visible})


@dataclass(frozen=True)
class BlocksOptions:
    side: int = key(8, "voxels along a cube", neutral=8)


BLOCKS = Tower(
    options=BlocksOptions,
    presets={"one": Sizes(16, 1, 2, 16)},
    build=lambda model, channels, backend="xla": Blocks(16, model.volume_encoder.options.side),
    frozen=lambda preset, layers: [("embed/.*", 0.0)],
    token_cell=lambda encoder: (encoder.options.side,) * 3,
    module=Blocks,
    forms={
        "blocks": Form(
            "weights of this test",
            lambda weights, source, side: Imported({"width": 16, "side": side}, {"embed": dict(weights)}, []),
            {"--side": {"type": int, "required": True}},
        )
    },
)


@pytest.fixture
def registered():
    registry.OBJECTIVES.register("density", DENSITY)
    registry.VOLUME_TOWERS.register("blocks", BLOCKS)
    yield
    registry.OBJECTIVES.unregister("density")
    registry.VOLUME_TOWERS.unregister("blocks")


def builder(**overrides):
    config = tiny_builder(**overrides)
    config.plugins = ("test_models_plugins",)
    config.model.volume_encoder.update({"kind": "blocks", "preset": "one", "patch_size": (16, 16, 16), "side": 8})
    config.model.report_encoder.preset = "pico"
    config.objectives.alignment.weight = 0.0
    config.objectives.density.weight = 1.0
    config.tasks.classification.weight = 0.5
    return config


def build(config):
    return state_lib.build(config, VOCAB, sharding.make_mesh(config.mesh, jax.devices()[:1]), steps=10)


def test_one_step_moves_what_they_declare(registered):
    config = config_lib.typed(builder())
    checks.validate(config)
    setup = build(config)
    assert [one.name for one in setup.model.on] == ["density", "classification"]
    batch = random_batch(config, VOCAB)
    batch["labels"][:, :9] = -1  # half of them unknown
    batch = sharding.to_global(batch, setup.mesh, config.data.batch_size)
    state = state_lib.initialize(setup)
    before = jax.device_get(state["params"])
    after, metrics = jax.device_get(step_lib.train_step(setup, SPECIAL)(state, batch))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after["params"])
    assert all(jax.tree.leaves([moved[name] for name in ("density_head", "classification_head")]))
    assert moved["volume_encoder"]["embed"]["kernel"]
    assert metrics["classification"] == pytest.approx(np.log(2), rel=1e-5)  # every label at 1/2 before the first step
    assert metrics["classification/known"] == 8 * 9 and np.isfinite(metrics["density"])
    assert metrics["loss"] == pytest.approx(metrics["density"] + 0.5 * metrics["classification"], rel=1e-6)
    head = before["density_head"]
    assert state_lib.count(head) == (16 + 1 + 1) * 4 + (4 + 1)
    found = cost.StepCost(setup)
    assert found.sizes.n_vision == 8**3 * 16 + 16
    names = {name for path in found.by_path for name in path.split("/")}
    assert {"density_head", "classification_head"} <= names


def test_what_is_off_has_no_parameters_and_moves_no_random_number(registered):
    """And does not count in the hash of a run that knows nothing of them."""
    plain = tiny_builder()
    alone = config_lib.typed(plain)
    assert not {"density_head", "classification_head"} & build(alone).abstract["params"].keys()
    batch, options = random_batch(alone, VOCAB), {"special": SPECIAL, "train": False}
    plain.objectives.density.weight = 1.0
    both = config_lib.typed(plain)
    models = [state_lib.build_model(config, VOCAB) for config in (alone, both)]
    found = [inputs.model_inputs(batch, jax.random.key(3), model, **options) for model in models]
    assert found[1].keys() - found[0].keys() == {"density_noise"}
    jax.tree.map(np.testing.assert_array_equal, found[0], {name: found[1][name] for name in found[0]})
    with_them = config_lib.config_hash(alone)
    registry.OBJECTIVES.unregister("density")
    registry.VOLUME_TOWERS.unregister("blocks")
    try:
        assert config_lib.config_hash(config_lib.typed(tiny_builder())) == with_them
    finally:
        registry.OBJECTIVES.register("density", DENSITY)
        registry.VOLUME_TOWERS.register("blocks", BLOCKS)


def test_what_does_not_fit_is_said(registered):
    with pytest.raises(UserError, match=r"objectives\.density\.width"):
        checks.validate(config_lib.typed(builder(objectives__density__width=0)))
    config = config_lib.typed(builder(tasks__classification__num_labels=3))
    setup = build(config)
    with pytest.raises(UserError, match=r"tasks\.classification\.num_labels=18"):
        one = enabled(config.objectives, config.tasks)[-1]
        one.objective.loss({"classification_logits": jnp.zeros((8, 3))}, random_batch(config, VOCAB), one.options)
    with pytest.raises(UserError, match=r"no features \['liver'\]; it has .*volume_pooled"):
        made = inputs.dummy_inputs(setup.model)
        jax.eval_shape(lambda: setup.model.init(jax.random.key(0), made, ("liver",), method="compute"))


def test_the_commands_import_train_resume_and_evaluate(registered, tiny_data, tmp_path):
    """What is trained starts from the imported tower; a resumed run repeats the losses of the one that went on."""
    weights = {"kernel": np.full((8**3, 16), 0.01, np.float32), "bias": np.zeros(16, np.float32)}
    save_file(weights, tmp_path / "blocks.safetensors")
    tower = tmp_path / "tower"
    assert main(["import", "blocks", str(tmp_path / "blocks.safetensors"), "--side", "8", "--out", str(tower)]) == 0
    file = tmp_path / "tiny.py"
    file.write_text(
        "from test_models_plugins import builder\n\n\ndef get_config(arg=''):\n"
        f"    config = builder(model__volume_encoder__pretrained={str(tower)!r})\n"
        "    config.data.vocab_size, config.training.steps = 300, 4\n    return config\n"
    )
    run = tmp_path / "run"
    command = ["train", "--config", str(file), "--workdir", str(run), f"--config.data.train={tiny_data['train']}"]
    assert main(command) == 0
    found = losses(run)
    assert sorted(found) == [1, 2, 3, 4] and np.isfinite(list(found.values())).all()
    shutil.rmtree(run / "checkpoints" / "4")  # as if it had been killed after step 2
    (run / "summary.json").unlink()
    assert main(command) == 0
    assert losses(run) == found
    assert main(["evaluate", "--workdir", str(run), "--data", str(tiny_data["valid"])]) == 0


def losses(run):
    return {row["step"]: (row["density"], row["classification"]) for row in read_metrics(run, "train")}
