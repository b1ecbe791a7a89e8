"""Floating-point operations (FLOPs) of a function, counted in the program that JAX traces. Nothing is computed or compiled.

Conventions, which are those of XLA's `cost_analysis`:
- A multiply-add of a matrix product or a convolution is 2 FLOPs. These are the `products`: the work that model-FLOPs
  utilisation speaks of.
- `elementwise` is the rest: one FLOP per element of a sum, product, comparison, conversion, ..., and per element that a
  reduction takes in. Copies, look-ups, sorting and random numbers are free. So are exponentials, logarithms and roots,
  which XLA counts apart, except `erfc`, which it builds from a polynomial.

XLA's own figure counts the body of a loop once, whatever its length: a scan over 12 layers as one. Here a scan counts as
often as it runs, and a `shard_map` on every device. A `while` whose length depends on the data counts once; of a
`cond` the most expensive branch counts. Inside kernels nothing can be seen (Pallas, fused attention): they are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

# One FLOP per element of the output.
ARITHMETIC = {
    "abs", "add", "add_any", "and", "atan2", "ceil", "clamp", "convert_element_type", "div", "eq", "floor", "ge", "gt",
    "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "rem", "round", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "square", "sub", "xor",
}  # fmt: skip
# One FLOP per element of the input that is merged into another.
REDUCTIONS = {"reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum", "reduce_xor"}
ERFC_FLOPS = 62  # two polynomials and the choice between them
LOGISTIC_FLOPS = 3
LOOPS = ("scan", "while")  # their outputs are the next inputs: all of them count as used
KERNELS = ("pallas_call", "ffi_call", "dot_product_attention")


@dataclass(frozen=True)
class Flops:
    """`products`: of matrix products and convolutions; `elementwise`: all others."""

    products: float = 0.0
    elementwise: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.elementwise

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.elementwise + other.elementwise)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.products * times, self.elementwise * times)


def count(function: Callable[..., Any], *arguments: Any) -> Flops:
    """FLOPs of one call of `function`. Arguments are arrays or `jax.ShapeDtypeStruct`, or trees of them.

    Raises:
        ValueError: the function calls a kernel that cannot be looked into.
    """
    return sum(by_path(function, *arguments).values(), Flops())


def by_path(function: Callable[..., Any], *arguments: Any) -> dict[str, Flops]:
    """As `count`, by the path of names that made each operation: modules, `jax.named_scope`, `jvp(...)`, `transpose(...)`."""
    found: dict[str, Flops] = {}
    for path, flops in operations(jax.make_jaxpr(function)(*arguments).jaxpr):
        found[path] = found.get(path, Flops()) + flops
    return found


def operations(jaxpr: Jaxpr, path: str = "", wanted: Sequence[bool] | None = None) -> Iterator[tuple[str, Flops]]:
    """`(path, FLOPs)` of every operation that costs some, last first; loops are multiplied by their length.

    Args:
        wanted: which outputs are used; default all. What only leads to others is left out, as every compiler does.
    """
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    used = {x for x, on in zip(jaxpr.outvars, wanted, strict=True) if on and isinstance(x, Var)}
    for equation in reversed(jaxpr.eqns):
        outputs = [x in used for x in equation.outvars]
        if not (any(outputs) or equation.effects):
            continue
        used.update(x for x in equation.invars if isinstance(x, Var))
        own = "/".join(filter(None, (path, str(equation.source_info.name_stack))))
        name, inner = equation.primitive.name, _inner(equation)
        if name.startswith(KERNELS):
            raise ValueError(f"the FLOPs of the kernel {name} are not known: count another attention backend ({own})")
        if name == "cond":
            yield from max((list(operations(branch, own)) for branch in inner), key=_sum_of_totals)
        elif inner:
            times, call = _repeats(equation), len(inner) == 1 and name not in LOOPS
            for program in inner:
                for deeper, flops in operations(program, own, outputs if call else None):
                    yield deeper, flops * times
        elif (flops := _flops(equation)).total:
            yield own, flops


def _sum_of_totals(found: list[tuple[str, Flops]]) -> float:
    return sum(flops.total for _, flops in found)


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    """The programs that an operation runs; not the scalar ones by which scatters, sorts and reductions merge two values."""
    if equation.primitive.name.startswith(("scatter", "sort", "reduce", "select_and")):
        return []
    values = [
        x for value in equation.params.values() for x in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in values if isinstance(x, (ClosedJaxpr, Jaxpr))]


def _repeats(equation: JaxprEqn) -> int:
    """How often an operation runs its inner program: iterations of a scan, devices of a `shard_map`, else once."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        params = equation.params
        manual = params[
            "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
        ]  # by the version of JAX
        return prod(size for axis, size in params["mesh"].shape.items() if axis in manual)
    return 1


def _flops(equation: JaxprEqn) -> Flops:
    """Of an operation without an inner program."""
    name, params = equation.primitive.name, equation.params
    inputs: list[Any] = [x.aval for x in equation.invars]
    output: Any = equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return Flops(products=2.0 * output.size * prod(inputs[0].shape[axis] for axis in contracted))
    if name == "conv_general_dilated":
        return Flops(products=2.0 * _convolution(inputs[0].shape, inputs[1].shape, output.shape, params))
    if name in ARITHMETIC:
        return Flops(elementwise=float(output.size))
    if name in REDUCTIONS:
        return Flops(elementwise=float(inputs[0].size - output.size))
    if name.startswith(("scatter-add", "scatter_add")):
        return Flops(elementwise=float(inputs[2].size))
    if name.startswith("cum"):
        return Flops(elementwise=float(output.size))
    if name == "integer_pow":  # by repeated squaring
        power = abs(params["y"])
        products = max(power.bit_length() - 1, 0) + power.bit_count() - 1 + (params["y"] < 0)
        return Flops(elementwise=float(products * output.size))
    factor = {"erfc": ERFC_FLOPS, "logistic": LOGISTIC_FLOPS}.get(name, 0)
    return Flops(elementwise=float(factor * output.size))


def _convolution(image: Sequence[int], kernel: Sequence[int], output: Sequence[int], params: dict[str, Any]) -> int:
    """Multiply-adds of a convolution. Taps on the padding, and on the zeros of a dilated image, are not counted."""
    axes, window = (
        params["dimension_numbers"],
        zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True),
    )
    taps = 1
    for axis, (stride, (before, _), dilation, spread) in enumerate(window):
        side, size, outputs = (shape[spec[2 + axis]] for shape, spec in zip((image, kernel, output), axes, strict=True))
        place = np.arange(outputs)[:, None] * stride + np.arange(size) * spread - before
        inside = (place >= 0) & (place <= (side - 1) * dilation) & (place % dilation == 0)
        taps *= int(inside.sum())
    rows = image[axes.lhs_spec[0]] // params["batch_group_count"]
    return taps * rows * kernel[axes.rhs_spec[0]] * kernel[axes.rhs_spec[1]]
