"""What the towers' mappings of published weights share: a state dict that is used up, and layouts of PyTorch and Linen.

Arrays are NumPy's; files are read and written in `interop`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError

MAX_LISTED = 12


class StrictWeights:
    """A state dict to be used up: `take` what the model needs, `ignore` what it has no place for, then `finish`."""

    def __init__(self, weights: dict[str, np.ndarray], source: str) -> None:
        self.source = source
        self._left = dict(weights)
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, shape: Iterable[int]) -> np.ndarray:
        """The array `key`; zeros (and an error in `finish`) when it is absent or of another shape."""
        shape = tuple(shape)
        array = self._left.pop(key, None)
        if array is None:
            self._missing.append(f"{key} {list(shape)}")
        elif array.shape != shape:
            self._wrong.append(f"{key}: {list(array.shape)} in the file, {list(shape)} in the model")
        else:
            return array
        return np.zeros(shape, np.float32)

    def ignore(self, *patterns: str) -> list[str]:
        """Drops the keys that a pattern matches from the start (heads, buffers) and returns them, for the report."""
        dropped = [key for key in self._left if any(re.match(pattern, key) for pattern in patterns)]
        for key in dropped:
            del self._left[key]
        return dropped

    def finish(self) -> None:
        """`UserError` listing every missing key, wrong shape and unknown key."""
        problems = [
            *_listing("missing in the file", self._missing),
            *_listing("of another shape", self._wrong),
            *_listing("in the file but unknown to the model", sorted(self._left)),
        ]
        if problems:
            raise UserError(f"{self.source} does not fit the model:\n  " + "\n  ".join(problems))


def _listing(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"    ... and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return [f"{len(names)} {what}:", *(f"    {name}" for name in names[:MAX_LISTED]), *more]


def dense_params(weights: StrictWeights, prefix: str, inputs: int, outputs: int, bias: bool = True) -> dict:
    """A PyTorch Linear as Linen `{"kernel": [in, out], "bias": [out]}`."""
    params = {"kernel": weights.take(f"{prefix}.weight", (outputs, inputs)).T}
    return params | ({"bias": weights.take(f"{prefix}.bias", (outputs,))} if bias else {})


def norm_params(weights: StrictWeights, prefix: str, width: int) -> dict:
    """A PyTorch LayerNorm as Linen `{"scale", "bias"}`; also under TensorFlow's old names gamma and beta."""
    if f"{prefix}.gamma" in weights:
        return {"scale": weights.take(f"{prefix}.gamma", (width,)), "bias": weights.take(f"{prefix}.beta", (width,))}
    return {"scale": weights.take(f"{prefix}.weight", (width,)), "bias": weights.take(f"{prefix}.bias", (width,))}


def split_qkv(weights: StrictWeights, prefix: str, width: int, bias: bool) -> dict:
    """A fused PyTorch `qkv` Linear [3d, d] as our "query", "key", "value"; no bias becomes a bias of zeros."""
    kernels = np.split(weights.take(f"{prefix}.weight", (3 * width, width)), 3)
    biases = np.split(weights.take(f"{prefix}.bias", (3 * width,)) if bias else np.zeros(3 * width, np.float32), 3)
    return {
        name: {"kernel": kernel.T, "bias": offset}
        for name, kernel, offset in zip(("query", "key", "value"), kernels, biases, strict=True)
    }


def stack_layers(layers: list[dict]) -> dict:
    """Per-layer parameter dicts -> the layout of `transformer.Stack`: leaves with a leading "layers" axis."""
    import jax

    return {"blocks": {"block": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}}


def torch_state(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Linen parameters under PyTorch's names and layouts.

    | Linen | PyTorch |
    |---|---|
    | `kernel [in, out]` | `weight [out, in]` |
    | `scale` of a norm or layer scale, `*_embedding` tables | `weight` |
    | `stack/blocks/block/... [L, ...]` | `blocks.0. ... blocks.L-1.` |
    | `conv_0`, `norm_0` | `convs.0`, `norms.0` |
    """
    state: dict[str, np.ndarray] = {}
    for path, leaf in _flatten(params):
        if "stack" in path:
            state |= _stack(path, leaf)
        else:
            name = re.sub(r"(^|\.)(conv|norm)_(\d+)\.", r"\1\2s.\3.", ".".join(_leaf_name(path)))
            state[name] = _layout(path, leaf)
    return state


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], np.ndarray]]:
    if isinstance(tree, dict):
        return [item for key, value in tree.items() for item in _flatten(value, (*path, key))]
    return [(path, np.asarray(tree))]


def _stack(path: tuple[str, ...], leaf: np.ndarray) -> dict[str, np.ndarray]:
    """One array per layer."""
    at = path.index("stack")
    before, rest = path[:at], path[at + 3 :]  # "stack", "blocks", "block"
    names = (".".join((*before, "blocks", str(number), *_leaf_name(rest))) for number in range(len(leaf)))
    return dict(zip(names, (_layout(rest, layer) for layer in leaf), strict=True))


def _leaf_name(path: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    *before, last = path
    if last in ("kernel", "scale"):
        return (*before, "weight")
    return (*before, last, "weight") if last.endswith("_embedding") else (*before, last)


def _layout(path: tuple[str, ...] | list[str], leaf: np.ndarray) -> np.ndarray:
    return leaf.T if path[-1] == "kernel" else leaf
