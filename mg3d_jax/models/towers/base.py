"""What a tower declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import numpy as np

Grid = tuple[int, int, int]
Weights = dict[str, np.ndarray]  # a state dict, under the names of whoever wrote it
Params = dict[str, Any]  # of the tower's module, a nested dict of arrays
# `(regex over the parameter names of the tower, share)`: 0.0 where nothing is trained; where an array stacks layers float32
# [layers, 1, ...], 0 at the frozen ones. What no row matches is trained.
FrozenRows = list[tuple[str, "float | np.ndarray"]]


def no_problems(encoder: Any, model: Any) -> list[str]:
    """Nothing to check."""
    return []


def any_volume_size(fields: dict[str, Any], params: Params, size: Grid) -> tuple[dict[str, Any], Params]:
    """Nothing in the weights depends on the volume."""
    return fields, params


@dataclass(frozen=True)
class Sizes:
    """Width, number of layers, attention heads, hidden width of the MLP: a preset as the rest of the model sees it."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int

    @property
    def mlp_ratio(self) -> float:
        """Hidden width over width."""
        return self.mlp_dim / self.width


@dataclass(frozen=True)
class Imported:
    """Published weights as an encoder's: fields of its module, parameters, and the keys that it has no place for."""

    fields: dict[str, Any]
    params: Params
    unused: list[str]


def _no_obstacles(model: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class MonaiNetwork:
    """A network of `monai.networks.nets` that a tower is, with its decoder: class, keyword arguments, state dict; `part`: the
    module in it that the state is of, "" where it is of all."""

    name: str
    arguments: dict[str, Any]
    state: Weights
    part: str = ""


@dataclass(frozen=True)
class Form:
    """A published form of a tower's weights: what `mg3d import NAME` reads.

    Args:
        help: one line for the command line.
        convert: `(state dict, name of its source, **arguments) -> Imported`; strict: what it cannot place is an error that
            names everything.
        arguments: further options of the command line, as `argparse` takes them: what leaves no trace in the weights. Each
            is handed to `convert` under its `dest`.
        folder: it comes as a folder or a name on the Hugging Face hub, with a `config.json`, which `convert` gets as
            `config`, and perhaps a tokenizer; else as one file.
        root: a tensor that every such model has, by which it is found among the tensors of a checkpoint that wraps it;
            "": only prefixes that stand before all keys are removed.
    """

    help: str
    convert: Callable[..., Imported]
    arguments: Mapping[str, dict[str, Any]] = field(default_factory=dict, hash=False)
    folder: bool = False
    root: str = ""


@dataclass(frozen=True)
class Tower:
    """A kind of encoder.

    Args:
        options: frozen dataclass of `options.key` fields that only this kind has.
        presets: sizes by name; each has at least `width`, `depth` and `num_heads`, those of the tokens that come out.
        build: `(model config, channels of the volume or size of the vocabulary, attention backend, further fields) -> module`.
        module: what `build` makes; `module(**fields)` computes what imported weights did.
        frozen: `(preset, k) -> rows` of what is not trained when the first k layers are frozen; 0 <= k <= depth, and with 0
            what comes before the layers. The layer-wise decay of the learning rate finds the depth of parameters by it.
        token_cell: of a volume tower: `(encoder config) -> voxels per token` along each axis.
        poolings: of a volume tower: what `pooling` may be.
        problems: `(encoder config, model config) -> [problem, ...]`, said before anything is built.
        forms: published weights that can be read, by the name that `mg3d import` has for them.
        fresh: parameters (starts of their names) that no imported tower has: they keep their random values.
        at_volume_size: of a volume tower: `(fields, parameters, size) -> the same` for volumes of another size.
        to_torch: `(parameters, model config) -> state dict` of its counterpart in `interop/torch_template`. None: it has none.
        torch_arguments: `(parameters, model config) -> arguments` of that counterpart.
        torch_hint: where `to_torch` is None, what its users can do instead.
        segmenter: of a volume tower: `model config -> module`, `(volume [B, X, Y, Z, C], encoded) -> [B, X, Y, Z, width]`:
            features of every voxel from what `module(volume, train=..., hidden=True)` gives. None: it cannot segment.
        to_monai_network: `(parameters of the whole model, model config, channels) -> MonaiNetwork` of a model that segments;
            `UserError` naming what MONAI has no place for. None: it has no such form.
        to_monai_encoder: the same for the encoder alone, from its parameters.
        monai_obstacles: `model config -> what MONAI has no place for`, before there are parameters.
        to_hugging_face: of a report tower: `(parameters, model config) -> (config.json, state dict)` of a model of
            transformers, which `architectures` names. None: it has no such form.
    """

    options: type
    presets: Mapping[str, Any]
    build: Callable[..., nn.Module]
    module: Callable[..., nn.Module]
    frozen: Callable[[Any, int], FrozenRows]
    token_cell: Callable[[Any], Grid] | None = None
    poolings: tuple[str, ...] = ("attention", "mean")
    problems: Callable[[Any, Any], list[str]] = no_problems
    forms: Mapping[str, Form] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    at_volume_size: Callable[[dict[str, Any], Params, Grid], tuple[dict[str, Any], Params]] = any_volume_size
    to_torch: Callable[[Params, Any], Weights] | None = None
    torch_arguments: Callable[[Params, Any], dict[str, Any]] | None = None
    torch_hint: str = ""
    segmenter: Callable[[Any], nn.Module] | None = None
    to_monai_network: Callable[[Params, Any, int], MonaiNetwork] | None = None
    to_monai_encoder: Callable[[Params, Any, int], MonaiNetwork] | None = None
    monai_obstacles: Callable[[Any], list[str]] = _no_obstacles
    to_hugging_face: Callable[[Params, Any], tuple[dict[str, Any], Weights]] | None = None


def frozen_stack(depth: int, frozen: int, after: tuple[str, ...] = ("stack", "norm", "pool", "flatten")) -> FrozenRows:
    """Rows for a tower whose layers are one scanned `stack`: what comes before it, and its first `frozen` layers.

    `after`: modules that come behind the layers and stay trained.
    """
    layers = (np.arange(depth) >= frozen).astype(np.float32)
    return [
        (f"(?!({'|'.join(after)})/).*", 0.0),
        ("stack/blocks/.*/kernel", layers[:, None, None]),
        ("stack/blocks/.*/(bias|scale)", layers[:, None]),
    ]
