"""What one training step costs per patient: parameters, FLOPs and tokens, from the step's own losses and gradient.

The losses are traced with the shapes of the configuration, which allocates and compiles nothing (`mg3d_jax.flops` says how
operations count). Frozen parameters get no backward pass there either. Not counted: augmentation, dropout, the optimizer,
and what is computed a second time to save memory (`model.remat`, `optimizer.gradient_cache`). Padding is computed, and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax

from mg3d_jax import config as config_lib
from mg3d_jax import flops, sharding
from mg3d_jax.config import Config
from mg3d_jax.data.tokens import SPECIAL_TOKENS
from mg3d_jax.flops import Flops
from mg3d_jax.objectives.base import abstract_batch
from mg3d_jax.training import optimizer
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.step import GRADIENTS, Losses

# Keys of the configuration, or beginnings of keys, that change neither the model nor its losses.
IRRELEVANT = (
    "name", "seed", "training.", "schedule.", "mesh.", "data.train", "data.valid", "data.weights", "data.max_patients",
    "data.subset_seed", "optimizer.learning_rate", "optimizer.weight_decay",
)  # fmt: skip
RECOMPUTED = "rematted_computation"  # in the path of what is computed again in the backward pass
FUSION, DECODER = ("fusion", "sentence_conditioned_volume"), ("voxel_decoder", "token_head", "report_decoder")
_found: dict[tuple[str, int], StepCost] = {}


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, in total and by part of the model."""

    n_total: int
    n_vision: int  # volume encoder
    n_text: int  # report encoder, embedding tables included
    n_fusion: int  # cross-modal layers, sentence-conditioned volume features
    n_decoder: int  # voxel decoder, token head, report decoder
    n_heads: int  # the rest: pooling of sentences, projections, temperature
    n_embedding: int  # look-up tables within n_text and n_vision
    n_active: int  # n_total without look-up tables: the parameters that do arithmetic

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Sizes:
        """From the parameters, or their shapes."""
        parts = {name: state_lib.count(part) for name, part in params.items()}
        total = sum(parts.values())
        named = {
            "n_vision": parts["volume_encoder"],
            "n_text": parts["report_encoder"],
            "n_fusion": sum(parts.get(name, 0) for name in FUSION),
            "n_decoder": sum(parts.get(name, 0) for name in DECODER),
        }
        tables = state_lib.count(params["volume_encoder"].get("positions", ()))
        tables += sum(state_lib.count(v) for k, v in params["report_encoder"].items() if k.endswith("_embedding"))
        heads = total - sum(named.values())
        return cls(n_total=total, **named, n_heads=heads, n_embedding=tables, n_active=total - tables)


@dataclass(eq=False)
class StepCost:
    """The cost of a step of `setup`; FLOPs are of one patient, traced when they are first asked for.

    `counted`: what `training` found before, e.g. when the run began: tracing takes seconds.
    """

    setup: state_lib.Setup
    counted: Flops | None = None

    @cached_property
    def sizes(self) -> Sizes:
        """Numbers of parameters."""
        return Sizes.of(self.setup.abstract["params"])

    @cached_property
    def forward(self) -> Flops:
        """Of the losses alone."""
        return self._per_patient(flops.by_path(lambda *of: self._loss(*of)[0], *self._arguments))

    @property
    def training(self) -> Flops:
        """Of the losses and their gradient."""
        if self.counted is None:
            self.counted = self._per_patient(self.by_path)
        return self.counted

    @cached_property
    def by_path(self) -> dict[str, Flops]:
        """Of the losses and their gradient for all rows of `batch_rows`, by the names that made them (`flops.by_path`)."""
        return flops.by_path(jax.grad(self._loss, has_aux=True), *self._arguments)

    def count_in(self, step: jax.stages.Traced) -> None:
        """Takes the FLOPs from a training step that was traced anyway, where it computes just the losses and their gradient.

        Nothing happens where they are known already, or where the step computes more (augmentation, dropout, the second
        forward pass of the gradient cache) or what cannot be looked into (fused attention): then they are traced when asked
        for.
        """
        config, plain = self.setup.config, self.setup.model.attention[0] == "xla"
        random = [value for key, value in config_lib.flatten(config).items() if key.endswith(".dropout")]
        random += dataclasses.astuple(config.data.augment)
        if self.counted is not None or any(random) or config.optimizer.gradient_cache or not plain:
            return
        paths = flops.operations(step.jaxpr.jaxpr)
        found = (one for path, one in paths if GRADIENTS in path and RECOMPUTED not in path)
        self.counted = sum(found, Flops()) * (1 / config.data.batch_size)

    @property
    def batch_rows(self) -> int:
        """Patients that a loss sees at once: the batch, or a micro-batch of it."""
        options = self.setup.config.optimizer
        return self.setup.config.data.batch_size // (1 if options.gradient_cache else options.accumulation)

    @property
    def losses_per_batch(self) -> int:
        """Micro-batches that are walked one after another: 1, or as `optimizer.accumulation` says."""
        return self.setup.config.data.batch_size // self.batch_rows

    @property
    def volume_tokens(self) -> int:
        """Of one volume."""
        return prod(self.setup.config.model.token_grid())

    @cached_property
    def report_tokens(self) -> int:
        """Of one patient, that the alignment reads, padding included."""
        data, alignment = self.setup.config.data, self.setup.config.objectives["alignment"]
        if alignment.report_view != "report":
            return min(alignment.report_sentences, data.max_sentences) * alignment.sentence_tokens
        return data.max_tokens

    def _per_patient(self, found: dict[str, Flops]) -> Flops:
        whole = sum((one for path, one in found.items() if RECOMPUTED not in path), Flops())
        return whole * (1 / self.batch_rows)

    def _loss(self, params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict]:
        # Fused attention kernels cannot be looked into; the plain form has the same products.
        plain = config_lib.replace(self.setup.config, {"model.attention": "xla"})
        model = state_lib.build_model(plain, self.setup.model.vocab_size)
        losses = Losses(dataclasses.replace(self.setup, model=model), dict.fromkeys(SPECIAL_TOKENS, 0), train=False)
        return losses(optimizer.freeze(params, self.setup.factors), batch, key)

    @property
    def _arguments(self) -> tuple[Any, Any, Any]:
        """Shapes of the parameters, a batch and a random key."""
        config, model = self.setup.config, self.setup.model
        batch = abstract_batch(model.on, model.context, self.batch_rows, config.grid)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.setup.abstract["params"])
        return params, batch, jax.eval_shape(lambda: jax.random.key(0))


def of_config(config: Config, vocab_size: int | None = None) -> StepCost:
    """The cost of a step of `config`, whatever devices there are. `vocab_size` is the tokenizer's (`data.vocab_size`).

    Configurations of one model share their count: many runs of a sweep differ in data and seed only.
    """
    vocab_size = vocab_size or config.data.vocab_size
    relevant = {key: value for key, value in config_lib.flatten(config).items() if not key.startswith(IRRELEVANT)}
    key = repr(sorted(relevant.items())), vocab_size
    if key not in _found:
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        _found[key] = StepCost(state_lib.build(config, vocab_size, mesh, steps=0))
    return _found[key]
