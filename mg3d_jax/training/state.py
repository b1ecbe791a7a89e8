"""The training state, how it lies on the mesh, and how it is made there without ever being whole on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mg3d_jax import batch as batch_contract
from mg3d_jax import sharding
from mg3d_jax.config import Config
from mg3d_jax.config.parts import InitConfig, ModelConfig
from mg3d_jax.data.tokens import SPECIAL_TOKENS
from mg3d_jax.models import mg3d
from mg3d_jax.models.attention import choose_backend
from mg3d_jax.models.mg3d import MG3D
from mg3d_jax.training import optimizer, schedule
from mg3d_jax.training.freezing import layer_decay_rows, trained_rows
from mg3d_jax.training.inputs import model_inputs

State = dict[str, Any]  # {"params", "opt_state", "step"}, and "ema" (like "params") with `optimizer.ema`


@dataclass(frozen=True)
class Setup:
    """Everything that is fixed before the first step: model, optimizer, mesh, and the shape and sharding of the state."""

    config: Config
    model: MG3D
    random_parameters: Callable[[jax.Array], Any]  # `random_parameters` below
    mesh: Mesh
    tx: optax.GradientTransformationExtraArgs
    learning_rate: optax.Schedule
    factors: Any  # learning-rate multiplier of every parameter, see `optimizer.multipliers`
    groups: dict[str, optimizer.Group]  # the same by group
    abstract: State  # shapes, dtypes and shardings
    attention: tuple[str, str]  # backend and why
    steps: int

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def build_model(config: Config, vocab_size: int) -> tuple[MG3D, tuple[str, str]]:
    """The model, and the attention backend with the reason for it."""
    preset = config.model.volume_encoder.sizes, config.model.report_encoder.sizes
    head_dim = max(p.width // p.num_heads for p in preset)
    backend = choose_backend(config.model.attention, jax.default_backend(), config.model.dtype, head_dim)
    return mg3d.build(config, vocab_size, backend[0]), backend


def dummy_inputs(config: Config, batch_size: int = 1) -> dict[str, Any]:
    """Zeros of the shapes that the model takes; enough to trace it."""
    shapes = batch_contract.shapes(batch_size, config.model.volume_size, config.data.max_tokens, 1)
    batch = {k: jax.ShapeDtypeStruct(shapes[k], field.dtype) for k, field in batch_contract.FIELDS.items()}
    options: dict[str, Any] = {
        "special": dict.fromkeys(SPECIAL_TOKENS, 0),
        "vocab_size": 8,
        "train": False,
    }  # shapes do not depend on them
    inputs = jax.eval_shape(lambda b: model_inputs(b, jax.random.key(0), config, **options), batch)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)


def random_parameters(model: MG3D, config: Config) -> Callable[[jax.Array], Any]:
    """`key -> parameters` with their logical axis names (boxed). Jitted: who asks for shapes first and for values later
    traces the model once."""
    return jax.jit(lambda key: model.init(key, dummy_inputs(config))["params"])


def abstract_parameters(random: Callable[[jax.Array], Any]) -> Any:
    """The shapes (boxed) of what `random_parameters` gives, without computing anything."""
    return jax.eval_shape(random, jax.random.key(0))


def build(config: Config, vocab_size: int, mesh: Mesh, steps: int, records: int = 0) -> Setup:
    """Model, optimizer and the sharded shape of the state. Nothing is allocated.

    Args:
        steps: length of the run; 0 where a finished state is only opened (the learning rate is then 0).
        records: of one epoch; needed where the schedule counts in epochs.
    """
    model, attention = build_model(config, vocab_size)
    with sharding.in_mesh(mesh):  # as in `initialize`, or the trace could not be shared
        random = random_parameters(model, config)
        boxed = abstract_parameters(random)
    shapes, shardings = nn.unbox(boxed), sharding.parameter_shardings(boxed, mesh)
    rate = _learning_rate(config, steps, records)
    factors = optimizer.multipliers(shapes, config.optimizer, (*trained_rows(config), *layer_decay_rows(config)))
    groups = optimizer.groups(shapes, config.optimizer, factors)
    tx = optimizer.make_optimizer(config.optimizer, rate, shapes, factors)
    whole = sharding.replicated(mesh)
    opt_shapes = jax.eval_shape(tx.init, shapes)
    opt_shardings = optax.tree_utils.tree_map_params(
        tx,
        lambda moment, place: moment if _is_masked(moment) else place,
        opt_shapes,
        shardings,
        transform_non_params=lambda _: whole,
        is_leaf=_is_masked,
    )

    def placed(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    abstract = {
        "params": jax.tree.map(placed, shapes, shardings),
        "opt_state": jax.tree.map(placed, opt_shapes, opt_shardings),
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    }
    if config.optimizer.ema:
        abstract["ema"] = abstract["params"]
    return Setup(config, model, random, mesh, tx, rate, factors, groups, abstract, attention, steps)


def _learning_rate(config: Config, steps: int, records: int) -> optax.Schedule:
    if not steps:
        return optax.constant_schedule(0.0)
    known = {"batch_size": config.data.batch_size, "records": records}
    return schedule.learning_rate(config.schedule, config.optimizer.learning_rate, steps, **known)


def _is_masked(x: Any) -> bool:
    """Where the optimizer keeps nothing: frozen parameters."""
    return isinstance(x, optax.MaskedNode)


def initialize(setup: Setup) -> State:
    """Step 0, from `config.seed`, made in place: explicit output shardings, or the moments would come out replicated."""

    def init(key: jax.Array) -> State:
        params = nn.unbox(setup.random_parameters(key))
        state = {"params": params, "opt_state": setup.tx.init(params), "step": jnp.int32(0)}
        # Step 0 starts the average; until then it must not share its memory with the parameters, which are donated.
        return state | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in setup.abstract else {})

    with sharding.in_mesh(setup.mesh):
        return jax.jit(init, out_shardings=setup.shardings)(jax.random.key(setup.config.seed))


def starts_from(init_from: InitConfig, model: ModelConfig) -> str:
    """The key that says which weights a new run starts from; "" where it starts from random ones."""
    encoders = {"volume_encoder": model.volume_encoder, "report_encoder": model.report_encoder}
    named = [f"model.{name}.pretrained" for name, encoder in encoders.items() if encoder.pretrained]
    return ", ".join(["init_from.path"] * bool(init_from.path) + named)


def evaluated_parameters(state: State) -> Any:
    """What evaluations read: the averaged parameters where the run keeps an average, else the raw ones."""
    return state.get("ema", state["params"])


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))
