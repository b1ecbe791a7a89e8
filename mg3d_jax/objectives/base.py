"""What an objective declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def no_problems(options: Any, config: Any) -> list[str]:
    """Nothing to check."""
    return []


@dataclass(frozen=True)
class Objective:
    """An objective as the configuration knows it.

    Args:
        options: frozen dataclass of `options.key` fields, with a `weight`; weight 0 switches the objective off.
        problems: `(own options, whole config) -> [problem, ...]`, said before anything is built.
    """

    options: type
    problems: Callable[[Any, Any], list[str]] = no_problems
