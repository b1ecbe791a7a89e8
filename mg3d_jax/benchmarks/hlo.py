"""Reads XLA's programs (HLO text): matrix-product FLOPs with every trip of every loop, collectives, and who made an op.

XLA's own `cost_analysis` counts the body of a loop once, whatever its length, so a scan over 12 layers counts as one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLERS = ("while", "call", "fusion", "conditional", "async-start")  # not: regions of reductions, sorts, scatters


@dataclass(frozen=True)
class Instruction:
    """One line of HLO. `shape` is the text of the result's type, `path` JAX's name of what made it (may be empty)."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    path: str


@dataclass(frozen=True)
class Program:
    """Computations by name, each a list of instructions in order; `entry` is where it starts."""

    computations: dict[str, list[Instruction]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """From `Compiled.as_text()`, or `Lowered.as_text("hlo", debug_info=True)`."""
        computations: dict[str, list[Instruction]] = {}
        entry, current = "", []
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(("HloModule", " ")):
                name = line.removeprefix("ENTRY ").split(maxsplit=1)[0].lstrip("%")
                current = computations.setdefault(name, [])
                entry = name if line.startswith("ENTRY ") else entry
            elif match := _INSTRUCTION.match(line):
                current.append(_instruction(match["name"], match["rest"]))
        return cls(computations, entry)

    def walk(self, name: str = "", times: int = 1, prefix: str = "") -> Iterator[tuple[Instruction, int, str]]:
        """Every instruction as often as it is reached, with the number of its executions and its full path."""
        for instruction in self.computations[name or self.entry]:
            path = instruction.path if instruction.path.startswith("jit(") else f"{prefix}/{instruction.path}"
            yield instruction, times, path
            if instruction.opcode in _CALLERS:
                inside = times * (self.trips(instruction) if instruction.opcode == "while" else 1)
                for called in _called(instruction):
                    yield from self.walk(called, inside, path)

    def trips(self, loop: Instruction) -> int:
        """Iterations of a `while`: XLA's own note, or else the bound in its condition; 1 where it depends on the data."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self.computations[re.search(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
        bounds = [int(i.operands[0]) for i in condition if i.opcode == "constant" and i.shape.startswith("s32[]")]
        return bounds[0] if len(bounds) == 1 else 1

    def paths(self) -> dict[str, str]:
        """Path of every instruction by its name; a fusion or call without one has that of what it holds."""
        found = {i.name: i.path for body in self.computations.values() for i in body}
        for body in self.computations.values():
            for instruction in body:
                if not instruction.path and instruction.opcode in _CALLERS:
                    inner = (i.path for called in _called(instruction) for i in self.computations[called])
                    found[instruction.name] = next(filter(None, inner), "")
        return found

    def matmul_flops(self) -> dict[str, float]:
        """FLOPs (2 per multiply-add) of all matrix products and convolutions, by path. Those inside hand-written kernels
        (custom calls: fused attention, cuBLAS in compiled GPU programs) are not seen."""
        shapes = {body: {i.name: i.shape for i in items} for body, items in self.computations.items()}
        owner = {id(i): body for body, items in self.computations.items() for i in items}
        flops: dict[str, float] = defaultdict(float)
        for instruction, times, path in self.walk():
            if instruction.opcode in ("dot", "convolution"):
                flops[path] += times * _product_flops(instruction, shapes[owner[id(instruction)]])
        return dict(flops)

    def collectives(self) -> dict[str, tuple[int, int]]:
        """`{kind: (executions, bytes of their results)}` of one device and one run of the program."""
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for instruction, times, _ in self.walk():
            kind = instruction.opcode.removesuffix("-done")
            if kind in COLLECTIVES:
                found[kind][0] += times
                found[kind][1] += times * size_in_bytes(instruction.shape)
        return {kind: (count, size) for kind, (count, size) in sorted(found.items())}


def _called(instruction: Instruction) -> list[str]:
    branches = _BRANCHES.search(instruction.attributes)
    return _CALLED.findall(instruction.attributes) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    attributes = rest[closing + 1 :]
    operands = tuple(o.split()[-1].lstrip("%") for o in rest[opening + 1 : closing].split(", ") if o.strip())
    op_name = _OP_NAME.search(attributes)
    opcode = rest[end:opening].strip()
    return Instruction(name, rest[:end], opcode, operands, attributes, op_name[1] if op_name else "")


def _closing(text: str, opening: int) -> int:
    """Place of the parenthesis that closes the one at `opening`."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text) - 1


def _dimensions(shape: str) -> list[int]:
    return [int(d) for d in _SHAPE.search(shape)[2].split(",") if d]


def _product_flops(instruction: Instruction, shapes: dict[str, str]) -> float:
    outputs = prod(_dimensions(instruction.shape))
    left, right = (_dimensions(shapes[operand]) for operand in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        return (
            2.0 * outputs * prod(left[int(d)] for d in contracted[1].split(",") if d) if contracted else 2.0 * outputs
        )
    kernel = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)[1]
    return 2.0 * outputs * prod(size for size, label in zip(right, kernel, strict=True) if label != "o")


def size_in_bytes(shape: str) -> int:
    """Of an array type such as `f32[8,128]{1,0}`, or of all arrays of a tuple type."""
    bits = 0
    for kind, dimensions in _SHAPE.findall(shape):
        width = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        bits += width * prod(int(d) for d in dimensions.split(",") if d)
    return bits // 8
