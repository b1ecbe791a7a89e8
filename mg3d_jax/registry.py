"""Named things that a user may add without touching the package: objectives, tasks, towers, evaluations, sources, commands.

Each kind has one `Registry`. The folder that is the kind's home fills it in its `__init__.py`, a line per name, and is
imported when the registry is first asked. So the floors below (the configuration, the command line) can look names up
without importing what stands above them. A module of a user registers in the same way; `plugins` in a configuration, or
`--plugins` on a command line, names such modules.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from mg3d_jax.errors import UserError, in_code_of_users

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to things of one kind, in the order of registration.

    Args:
        kind: what one of them is called in messages, e.g. "objective".
        home: the package whose import registers those of this library.
    """

    def __init__(self, kind: str, home: str):
        self.kind, self._home, self._filled = kind, home, False
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Adds `item`; returns it. `ValueError` where the name is taken by another one."""
        if self._items.get(name, item) is not item:
            raise ValueError(f"there is a {self.kind} {name!r} already")
        self._items[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Takes a thing out again: for tests and notebooks that try several versions of it."""
        del self._items[name]

    def __getitem__(self, name: str) -> T:
        """`UserError` with the nearest names where there is none; `in` and `get` work as for any mapping."""
        self._fill()
        if name not in self._items:
            close = difflib.get_close_matches(name, self._items, 1, 0.4)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UnknownNameError(
                f"there is no {self.kind} {name!r}: choose one of {', '.join(self._items)}.{hint} One of your own is known "
                "once its module is named in `plugins`"
            )
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(self._items)

    def __len__(self) -> int:
        self._fill()
        return len(self._items)

    def _fill(self) -> None:
        if not self._filled:
            self._filled = True  # first: the home may look into its own registry while it is imported
            importlib.import_module(self._home)


class UnknownNameError(UserError, KeyError):
    """A name that is not registered. A `KeyError` too, so that `in` and `get` of a mapping work."""

    __str__ = UserError.__str__


def load_plugins(modules: tuple[str, ...] | list[str]) -> None:
    """Imports the modules by which a user registers things of their own. `UserError` names one that cannot be imported."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"the plugin {name!r} cannot be imported ({error}): plugins are names of Python modules; put the folder that "
                "holds it on PYTHONPATH or install its package"
            ) from error
        except Exception as error:
            raise UserError(f"the plugin {name!r} cannot be imported: {in_code_of_users(error)}") from error


OBJECTIVES: Registry[Any] = Registry("objective", home="mg3d_jax.objectives")
TASKS: Registry[Any] = Registry("task", home="mg3d_jax.tasks")
VOLUME_TOWERS: Registry[Any] = Registry("volume tower", home="mg3d_jax.models.towers")
REPORT_TOWERS: Registry[Any] = Registry("report tower", home="mg3d_jax.models.towers")
EVALUATIONS: Registry[Any] = Registry("evaluation", home="mg3d_jax.evaluation")
LABELLERS: Registry[Any] = Registry("report labeller", home="mg3d_jax.evaluation")
SOURCES: Registry[Any] = Registry("source", home="mg3d_jax.prepare.sources")
LAYOUTS: Registry[Any] = Registry("phantom layout", home="mg3d_jax.phantom.layouts")
EXECUTORS: Registry[Any] = Registry("executor", home="mg3d_jax.scaling.sweep.executors")
COMMANDS: Registry[Any] = Registry("command", home="mg3d_jax.commands")
