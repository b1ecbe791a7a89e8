"""Which configurations are the same run: the hash that names it, and what may differ between a run and its resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from mg3d_jax import options as options_lib
from mg3d_jax.config.parts import DECLARED, Config, options_of

# What version 0.1.0 knew: its hashes cover all keys of these, whether they are on or off.
_FIRST_OBJECTIVES = ("alignment", "volume_reconstruction", "report_reconstruction", "matching", "discrimination")
_FIRST_TOWERS = ("vit", "swin", "bert")


@functools.cache
def resume_free() -> frozenset[str]:
    """Full keys, or groups of them, that may differ between the run that wrote a checkpoint and the one that resumes it."""
    groups = {field.name for field in dataclasses.fields(Config) if field.metadata["resume_free"]}
    return frozenset(groups | {key for key, _, field in options_lib.walk(Config) if field.metadata["resume_free"]})


def relevant(config: Config) -> dict[str, Any]:
    """The keys that matter for the result, flat."""
    kept = {name: part for name, part in options_lib.to_dict(config).items() if name not in resume_free()}
    return {key: value for key, value in options_lib.flatten(kept).items() if key not in resume_free()}


def config_hash(config: Config) -> str:
    """12 hex digits over every key that matters for the result.

    Keys that are newer than version 0.1.0 count only where they are not neutral, so that a run keeps its hash when the
    code gets another key.
    """
    kept = {key: value for key, value in relevant(config).items() if not _newer_and_neutral(config, key, value)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _newer_and_neutral(config: Config, key: str, value: Any) -> bool:
    group, _, rest = key.partition(".")
    if group in DECLARED:
        name, _, option = rest.partition(".")
        if name not in _FIRST_OBJECTIVES and not getattr(config, group)[name].weight:
            return True
        return _is_neutral(options_of(DECLARED[group][name]), option, value)
    if key.startswith(("model.volume_encoder.", "model.report_encoder.")):
        encoder = getattr(config.model, rest.split(".")[0])
        option = rest.split(".", 1)[1]
        for kind, tower in encoder.towers().items():
            if option in options_lib.types_of(options_of(tower)):
                foreign = kind not in _FIRST_TOWERS and kind != encoder.kind
                return foreign or _is_neutral(options_of(tower), option, value)
    return _is_neutral(Config, key, value)


@functools.cache
def _newer(kind: type) -> dict[str, Any]:
    """The neutral values of the keys below a dataclass that are newer than version 0.1.0."""
    found = options_lib.walk(kind)
    return {key: field.metadata["neutral"] for key, _, field in found if field.metadata["newer"]}


def _is_neutral(kind: type, key: str, value: Any) -> bool:
    newer = _newer(kind)
    return key in newer and newer[key] == value


def resume_differences(old: Config, new: Config) -> list[str]:
    """`["optimizer.learning_rate: 0.001 -> 0.0001", ...]` for the keys that must not change within a run."""
    a, b = relevant(old), relevant(new)
    keys = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in keys if a.get(k) != b.get(k)]
