"""The training state, how it lies on the mesh, and how it is made there without ever being whole on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mg3d_jax import arithmetic, sharding
from mg3d_jax.config import Config
from mg3d_jax.config.parts import InitConfig, ModelConfig
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.models.mg3d import MG3D
from mg3d_jax.objectives.base import Context, Enabled, enabled
from mg3d_jax.options import Group
from mg3d_jax.training import optimizer
from mg3d_jax.training.inputs import dummy_inputs
from mg3d_jax.training.schedule import learning_rate

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
    steps: int

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


class Start(NamedTuple):
    """What training goes on from: the state after `step`, and what its checkpoint has beside it (`hooks.Save`)."""

    state: State
    meta: dict[str, Any]
    step: int


# What a new run begins with. The usual one, `mg3d_jax.trainer.first_state`, is handed in because it reads weights of other
# programs, and `interop` imports this package.
Initializer = Callable[[Setup, ReportTokenizer], Start]


def build_model(config: Config, vocab_size: int) -> MG3D:
    """The model of a configuration. `vocab_size` is that of the run's tokenizer."""
    alignment, on = config.objectives["alignment"], enabled(config.objectives, config.tasks)
    return MG3D(
        Context(config.data, config.model, vocab_size, special=Group({})),
        on,
        temperature=alignment.temperature,
        learn_temperature=alignment.learn_temperature,
        sigmoid=alignment.form == "sigmoid",
        direction_bias=any(has_direction_bias(one) for one in on),
    )


def has_direction_bias(one: Enabled) -> bool:
    """Does an objective or task want the model to keep mean directions (`objectives.base.DIRECTION_BIASES`)? The alignment of
    a centred run, and a task that goes on with one (an option `direction_bias`)."""
    if one.name == "alignment":
        return one.options.center and one.options.report_view == "subsets"
    return getattr(one.options, "direction_bias", False)


def random_parameters(model: MG3D) -> Callable[[jax.Array], Any]:
    """`key -> parameters` with their logical axis names (boxed). Jitted and kept: who asks for shapes first and for values
    later, or opens several runs of one model, traces the model once."""
    return _random_parameters(model, tuple(encoder.sizes for encoder in model.context.model.encoders().values()))


@functools.lru_cache(maxsize=8)
def _random_parameters(model: MG3D, sizes: tuple[Any, ...]) -> Callable[[jax.Array], Any]:
    """`sizes`: those that the presets stand for, which a plug-in may set."""
    return jax.jit(lambda key: model.init(key, dummy_inputs(model))["params"])


def abstract_parameters(random: Callable[[jax.Array], Any]) -> Any:
    """The shapes (boxed) of what `random_parameters` gives, without computing anything."""
    return jax.eval_shape(random, jax.eval_shape(jax.random.key, 0))  # a key itself would be computed on the mesh


def build(config: Config, vocab_size: int, mesh: Mesh, steps: int, records: int = 0) -> Setup:
    """Model, optimizer and the sharded shape of the state. Nothing is allocated.

    Args:
        steps: length of the run; 0 where a finished state is only opened (the learning rate is then 0).
        records: of one epoch; needed where the schedule counts in epochs.
    """
    arithmetic.check()
    model = build_model(config, vocab_size)
    random = random_parameters(model)
    with sharding.in_mesh(mesh):  # as in `initialize`, or the trace could not be shared
        boxed = abstract_parameters(random)
    shapes, shardings = nn.unbox(boxed), sharding.parameter_shardings(boxed, mesh)
    rate = learning_rate(
        config.schedule, config.optimizer.learning_rate, steps, batch_size=config.data.batch_size, records=records
    )
    factors = optimizer.multipliers(shapes, config.optimizer, optimizer.rows_by_depth(config.model, config.optimizer))
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
    return Setup(config, model, random, mesh, tx, rate, factors, groups, abstract, steps)


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


def random_start(setup: Setup, tokenizer: ReportTokenizer) -> Start:
    """The `Initializer` that loads nothing. `ValueError` where the configuration names weights."""
    if keys := starts_from(setup.config.init_from, setup.config.model):
        raise ValueError(f"{keys} is set: give `initialize`, e.g. `mg3d_jax.trainer.first_state`")
    return Start(initialize(setup), {}, 0)


def starts_from(init_from: InitConfig, model: ModelConfig) -> str:
    """The key that says which weights a new run starts from; "" where it starts from random ones."""
    named = [f"model.{name}.pretrained" for name, encoder in model.encoders().items() if encoder.pretrained]
    return ", ".join(["init_from.path"] * bool(init_from.path) + named)


def evaluated_parameters(state: State) -> Any:
    """What evaluations read: the averaged parameters where the run keeps an average, else the raw ones."""
    return state.get("ema", state["params"])


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(int(x.size) for x in jax.tree.leaves(tree))
