"""How the configuration of an older version becomes one of this version.

A key that an old run lacks gets its neutral value (`options.key`). Everything else is a row of the tables below, oldest
first; rows are never removed, and never changed once they are published.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mg3d_jax import options as options_lib
from mg3d_jax.config.parts import (
    DECLARED,
    Config,
    ReportEncoderConfig,
    VolumeEncoderConfig,
    options_of,
    tower_neutral,
)

# Old key -> new key.
RENAMED: dict[str, str] = {}
# Removed key -> (the value whose behaviour is now the only one, what to do with another value).
REMOVED: dict[str, tuple[Any, str]] = {}


def upgrade(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration as an older version wrote it, with all keys of this version; and what cannot be carried over."""
    whole, problems = copy.deepcopy(dict(values)), []
    for old, new in RENAMED.items():
        if (found := _pop(whole, old)) is not None:
            _put(whole, new, found[0])
    for old, (kept, remedy) in REMOVED.items():
        if (found := _pop(whole, old)) is not None and options_lib.tuples(found[0]) != kept:
            problems.append(options_lib.problem(old, found[0], f"this version knows only {kept!r}; {remedy}"))
    return _complete(whole), problems


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the neutral value of each key that it lacks."""
    values = _merge(options_lib.neutral(Config), values)
    for name, registry in DECLARED.items():
        group = values.setdefault(name, {})
        for item_name, item in registry.items():
            values_of = options_lib.neutral(options_of(item))
            if item_name not in group and "weight" in values_of:
                values_of["weight"] = 0.0  # what an old run does not name was not there: it is off
            group[item_name] = values_of | group.get(item_name, {})
    for name, kind in (("volume_encoder", VolumeEncoderConfig), ("report_encoder", ReportEncoderConfig)):
        values["model"][name] = tower_neutral(kind.towers()) | values["model"][name]
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _pop(values: dict[str, Any], key: str) -> tuple[Any] | None:
    *path, name = key.split(".")
    for part in path:
        if not isinstance(values.get(part), dict):
            return None
        values = values[part]
    return (values.pop(name),) if name in values else None


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[name] = value
