"""What only the compiled program says (HLO text): who made an operation, how often it runs, and the collectives."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_DIGITS = re.compile(r"\d+")
_COMPUTATION = re.compile(r"(ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[a-z][a-z\-]*)\(")
_PATH = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `shape` is the text of the result's type, `path` JAX's name of what made it (may be empty), `times`
    how often it runs; what a loop of unknown length repeats counts once."""

    name: str
    shape: str
    opcode: str
    path: str
    times: int = 1


def instructions(text: str) -> list[Instruction]:
    """All instructions of `Compiled.as_text()`. A fusion or call without a path has that of what it holds."""
    computations = _computations(text)
    times: dict[str, int] = defaultdict(int)
    found = []
    for name, lines in reversed(computations.items()):  # the text names a computation before its callers
        times[name] = times[name] or 1
        for line, instruction in lines:
            inside = times[name] * int(trips[1] if (trips := _TRIPS.search(line)) else 1)
            called = [one for groups in _CALLED.findall(line) for one in re.findall(r"[\w.\-]+", " ".join(groups))]
            for other in called:
                times[other] += inside
            inner = (one.path for other in called for _, one in computations[other])
            path = instruction.path or next(filter(None, inner), "")
            found.append(replace(instruction, path=path, times=times[name]))
    return found


def _computations(text: str) -> dict[str, list[tuple[str, Instruction]]]:
    """Lines and instructions of every computation, in the order of the text."""
    found: dict[str, list[tuple[str, Instruction]]] = {}
    lines: list[tuple[str, Instruction]] = []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            path = _PATH.search(line)
            instruction = Instruction(match["name"], match["shape"], match["opcode"], path[1] if path else "")
            lines.append((line, instruction))
        elif not line.startswith(("HloModule", " ")) and (match := _COMPUTATION.match(line)):
            lines = found.setdefault(match["name"], [])
    return found


def collectives(found: Iterable[Instruction]) -> dict[str, tuple[int, int]]:
    """`{kind: (executions, bytes of their results)}` of one device and one run of the program."""
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in found:
        kind = one.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            total[kind][0] += one.times
            total[kind][1] += one.times * size_in_bytes(one.shape)
    return {kind: (count, size) for kind, (count, size) in sorted(total.items())}


def size_in_bytes(shape: str) -> int:
    """Of an array type such as `f32[8,128]{1,0}`, or of all arrays of a tuple type."""
    bits = 0
    for kind, dimensions in _SHAPE.findall(shape):
        width = 8 if kind == "pred" else int(_DIGITS.findall(kind)[0])
        bits += width * prod(int(d) for d in dimensions.split(",") if d)
    return bits // 8
