"""What a tower declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import numpy as np

Grid = tuple[int, int, int]
# `(regex over the parameter names of the tower, share)`: 0.0 where nothing is trained; where an array stacks layers float32
# [layers, 1, ...], 0 at the frozen ones. What no row matches is trained.
FrozenRows = list[tuple[str, "float | np.ndarray"]]


def no_problems(encoder: Any, model: Any) -> list[str]:
    """Nothing to check."""
    return []


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
class Tower:
    """A kind of encoder.

    Args:
        options: frozen dataclass of `options.key` fields that only this kind has.
        presets: sizes by name; each has at least `width`, `depth` and `num_heads`, those of the tokens that come out.
        build: `(model config, channels of the volume or size of the vocabulary, attention backend, further fields) -> module`.
        frozen: `(preset, k) -> rows` of what is not trained when the first k layers are frozen; 0 < k <= depth.
        token_cell: of a volume tower: `(encoder config) -> voxels per token` along each axis.
        poolings: of a volume tower: what `pooling` may be.
        problems: `(encoder config, model config) -> [problem, ...]`, said before anything is built.
    """

    options: type
    presets: Mapping[str, Any]
    build: Callable[..., nn.Module]
    frozen: Callable[[Any, int], FrozenRows]
    token_cell: Callable[[Any], Grid] | None = None
    poolings: tuple[str, ...] = ("attention", "mean")
    problems: Callable[[Any, Any], list[str]] = no_problems


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
