"""The floors of the package: which folder, and which module at its top, may import which. `CONTRIBUTING.md` draws them.

Read from the source text: every `import` and `from ... import`, those within functions and under `TYPE_CHECKING` too.
What is looked up by name (registries, the table of commands) is no import: that is how a lower floor reaches a higher one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support import ROOT

PACKAGE = ROOT / "mg3d_jax"

GROUND = {
    "__init__", "arithmetic", "batch", "charts", "config_files", "devices", "environment", "errors", "files", "flops",
    "html", "locks", "log", "options", "progress", "registry", "sharding", "version",
}  # fmt: skip
MIDDLE = {"config", "data", "language", "models", "objectives", "tasks"}
BESIDE = {"prepare", "phantom"}
UPPER = {"evaluation", "interop", "report", "scaling"}

# A folder, or a module at the top of the package, and what it may import beside itself and the ground floor.
FLOORS: dict[str, set[str]] = {
    **{module: set() for module in GROUND},
    "__init__": {"api", "trainer"},  # on first use of a name, so that `import mg3d_jax` stays light
    "config": set(),
    "data": {"config"},
    "language": set(),
    "objectives": {"config", "language"},
    "tasks": {"config", "objectives"},
    "models": {"config", "objectives", "tasks"},
    "training": MIDDLE,
    # Four folders side by side: they do not import one another.
    "evaluation": {"training", *MIDDLE, *BESIDE},
    "interop": {"training", *MIDDLE, *BESIDE},
    "report": {"training", *MIDDLE},
    "scaling": {"training", *MIDDLE},
    "trainer": {"training", *MIDDLE, *UPPER},
    "api": {"training", "trainer", *MIDDLE, *UPPER, *BESIDE},
    # Files on disk -> records, and procedural scans.
    "prepare": {"data"},
    "phantom": {"data"},
    "benchmarks": {"training", *MIDDLE, *UPPER, *BESIDE},
    "commands": {"training", *MIDDLE, *UPPER, *BESIDE, "api", "trainer", "benchmarks"},
    "__main__": {"commands"},
}


def room_of(module: str) -> str:
    """`mg3d_jax.data.order -> data`, `mg3d_jax -> __init__`."""
    return [*module.split("."), "__init__"][1]


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imported(file: Path, module: str) -> Iterator[str]:
    """Modules of the package that a file imports; `from x import y` is `x.y` where that is a module, else `x`."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" if exists(f"{source}.{alias.name}") else source for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] == PACKAGE.name)


def edges() -> dict[tuple[str, str], list[str]]:
    """(from, to) of two different rooms -> the imports, in words."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name in imported(file, module):
            if room_of(module) != room_of(name):
                found.setdefault((room_of(module), room_of(name)), []).append(f"{module} imports {name}")
    return found


EDGES = edges()
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_only_point_down(room):
    assert room in FLOORS, f"mg3d_jax/{room} is new: give it a row in FLOORS and in CONTRIBUTING.md"
    allowed = FLOORS[room] | GROUND
    wrong = {to: lines for (source, to), lines in EDGES.items() if source == room and to not in allowed}
    assert not wrong, f"{room} may import {sorted(FLOORS[room])} and the ground floor only: {wrong}"


def test_the_table_has_no_row_of_what_is_gone():
    assert set(FLOORS) == ROOMS
    drawn = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    assert [room for room in ROOMS - BESIDE - {"__init__", "__main__"} if room not in drawn.split()] == []


def test_no_cycle_between_folders():
    graph = {room: set() for room in ROOMS}
    for source, to in EDGES:
        if to != "__init__":
            graph[source].add(to)
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports go round in a circle: {' <- '.join(error.args[1])}")


def test_the_reader_of_imports(tmp_path):
    file = tmp_path / "order.py"
    file.write_text(
        "import os, mg3d_jax.data.order\nfrom mg3d_jax import files, __version__\nfrom mg3d_jax.data import records\n"
        "from . import tokens\nfrom ..models import mg3d\n\ndef f():\n    from mg3d_jax.errors import UserError\n"
    )
    assert list(imported(file, "mg3d_jax.data.order")) == [
        "mg3d_jax.data.order", "mg3d_jax.files", "mg3d_jax", "mg3d_jax.data.records", "mg3d_jax.data.tokens",
        "mg3d_jax.models.mg3d", "mg3d_jax.errors",
    ]  # fmt: skip
