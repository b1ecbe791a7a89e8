"""Fitted heads on disk: `NAME.safetensors` with the weights, and in its header, as JSON, what they are for.

    logits = volume_embedding @ weight.T + bias    # weight [L, k], bias [L], float32: a torch.nn.Linear

`mg3d export --probe FILE` adds them to an exported model. Nothing here imports JAX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes.linear import KINDS, ProbeResult
from mg3d_jax.files import write_bytes

FORMAT = "mg3d_jax probe"
HEAD_FILE = "probe.safetensors"  # its usual name


@dataclass(frozen=True)
class ProbeHead:
    """A linear head on volume embeddings of length 1.

    Attributes:
        weight: float32 `[L, k]`; bias: float32 `[L]`.
        classes: L names.
        kind: "multi_label": a sigmoid for each class; "multi_class": a softmax over them.
        facts: where it comes from: run, step, data, penalties, ...
    """

    weight: np.ndarray
    bias: np.ndarray
    classes: tuple[str, ...]
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, volumes: np.ndarray) -> np.ndarray:
        """`[n, k] -> [n, L]`; embeddings are brought to length 1 first."""
        length = np.linalg.norm(volumes, axis=1, keepdims=True)
        return (volumes / np.maximum(length, 1e-12)) @ self.weight.T + self.bias

    def probabilities(self, volumes: np.ndarray) -> np.ndarray:
        """`[n, k] -> [n, L]`."""
        from scipy.special import expit, softmax

        logits = self.logits(volumes)
        return softmax(logits, axis=1) if self.kind == "multi_class" else expit(logits)


def head_of(result: ProbeResult, classes: tuple[str, ...], kind: str, facts: Mapping[str, Any]) -> ProbeHead:
    """The head of a fitted probe. Classes that it could not learn are left out and named in the facts."""
    kept = [i for i in range(len(classes)) if i not in result.not_learned]
    about: dict[str, Any] = {"penalties": {classes[i]: float(result.penalties[i]) for i in kept}}
    about["not_learned"] = [classes[i] for i in result.not_learned]
    weight, bias = result.weight[:, kept].T, result.bias[kept]
    names = tuple(classes[i] for i in kept)
    return ProbeHead(weight.astype(np.float32), bias.astype(np.float32), names, kind, dict(facts) | about)


def save_head(head: ProbeHead, path: Path) -> None:
    """Writes the file whole or not at all."""
    from safetensors.numpy import save

    about = {
        "format": FORMAT,
        "version": __version__,
        "kind": head.kind,
        "classes": list(head.classes),
        "input": "volume_embedding, l2-normalised; the standardisation of the fit is folded into weight and bias",
        "facts": dict(head.facts),
    }
    arrays = {name: np.ascontiguousarray(getattr(head, name), np.float32) for name in ("weight", "bias")}
    write_bytes(path, save(arrays, metadata={"mg3d_jax": json.dumps(about, ensure_ascii=False)}))


def load_head(path: Path) -> ProbeHead:
    """Reads what `save_head` wrote. `UserError` where it cannot be read, or is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("mg3d_jax", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a probe.safetensors of `mg3d probe`") from error
    whole = {"classes", "facts"} <= about.keys() and arrays.keys() == {"weight", "bias"}
    if about.get("format") != FORMAT or about.get("kind") not in KINDS or not whole:
        raise UserError(f"{path} is no head of a probe: give a probe.safetensors of `mg3d probe`")
    shapes = arrays["weight"].shape[:1], arrays["bias"].shape
    if set(shapes) != {(len(about["classes"]),)}:
        raise UserError(f"{path}: {len(about['classes'])} classes, but weight and bias are for {shapes}")
    return ProbeHead(arrays["weight"], arrays["bias"], tuple(about["classes"]), about["kind"], about["facts"])
