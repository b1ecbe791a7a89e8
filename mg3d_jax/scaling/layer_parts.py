"""Parameters and forward FLOPs of single layers: what `parts` puts models together from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Elementwise FLOPs per element: forward, and forward with backward. Measured on XLA:CPU.
LAYER_NORM = (8, 21)
GELU_TANH = (8, 20)
GELU_ERF = (64, 71)
SOFTMAX = (5, 12)
ADD = (1, 2)  # bias, residual
SCALE = (1, 3)


@dataclass(frozen=True)
class Part:
    """One kind of layer, all its repeats. Costs are forward FLOPs of one sample."""

    name: str  # of one of its parameters: what `optimizer.freeze` is matched against
    parameters: int = 0
    dense: float = 0.0  # products with weights
    mixing: float = 0.0  # products of two activations
    constant: float = 0.0  # products with a matrix that has no gradient
    again: float = 0.0  # what the backward pass makes again
    elementwise: tuple[float, float] = (0.0, 0.0)  # forward; forward with backward
    lookup: bool = False  # a table of embeddings
    frozen: bool = False  # these are the frozen ones of the layers that share a name

    def times(self, repeats: int) -> Part:
        """So many layers of this kind, each with its own parameters."""
        forward, both = self.elementwise
        return replace(
            self,
            parameters=self.parameters * repeats,
            dense=self.dense * repeats,
            mixing=self.mixing * repeats,
            constant=self.constant * repeats,
            again=self.again * repeats,
            elementwise=(forward * repeats, both * repeats),
        )


def stacked(layer: Sequence[Part], depth: int, frozen_layers: int) -> list[Part]:
    """`models.transformer.Stack`: so many layers of these parts, the frozen ones apart."""
    frozen = depth if frozen_layers == -1 else frozen_layers
    found = [replace(part.times(frozen), frozen=True) for part in layer] if frozen else []
    return found + ([part.times(depth - frozen) for part in layer] if frozen < depth else [])


def each(cost: tuple[int, int], elements: int) -> tuple[float, float]:
    """An elementwise cost for so many elements."""
    return float(cost[0] * elements), float(cost[1] * elements)


def dense(name: str, tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Part:
    added = each(ADD, tokens * outputs) if bias else (0.0, 0.0)
    return Part(f"{name}/kernel", (inputs + bias) * outputs, 2.0 * tokens * inputs * outputs, elementwise=added)


def norm(name: str, tokens: int, width: int) -> Part:
    return Part(f"{name}/scale", 2 * width, elementwise=each(LAYER_NORM, tokens * width))


def attention(name: str, queries: int, keys: int, width: int, heads: int, context: int | None = None) -> list[Part]:
    """`queries` tokens of `width` read `keys` tokens of width `context` (default: the same)."""
    context = context or width
    return [
        dense(f"{name}/query", queries, width, width),
        dense(f"{name}/key", keys, context, width),
        dense(f"{name}/value", keys, context, width),
        Part(f"{name}/mix", mixing=4.0 * queries * keys * width, elementwise=each(SOFTMAX, heads * queries * keys)),
        dense(f"{name}/out", queries, width, width),
    ]


def mlp(name: str, tokens: int, width: int, hidden: int, gelu: tuple[int, int] = GELU_TANH) -> list[Part]:
    return [
        dense(f"{name}/up", tokens, width, hidden),
        Part(f"{name}/gelu", elementwise=each(gelu, tokens * hidden)),
        dense(f"{name}/down", tokens, hidden, width),
    ]


def residual(name: str, tokens: int, width: int) -> Part:
    return Part(f"{name}/residual", elementwise=each(ADD, tokens * width))


def pool(name: str, tokens: int, width: int, heads: int) -> list[Part]:
    """`models.heads.AttentionPool`."""
    return [Part(f"{name}/query", width), *attention(f"{name}/attention", 1, tokens, width, heads)]


def block(
    name: str,
    tokens: int,
    width: int,
    heads: int,
    hidden: int,
    gelu: tuple[int, int] = GELU_TANH,
    *,
    qk_norm: bool = False,
    layer_scale: float = 0.0,
) -> list[Part]:
    """`models.transformer.Block`."""
    found = [norm(f"{name}/attention_layer_norm", tokens, width)]
    found += attention(f"{name}/attention", tokens, tokens, width, heads)
    if qk_norm:
        one = Part(f"{name}/attention/query_norm/scale", width // heads, elementwise=each(LAYER_NORM, tokens * width))
        found += [one, one]
    found += [norm(f"{name}/mlp_layer_norm", tokens, width), *mlp(f"{name}/mlp", tokens, width, hidden, gelu)]
    found.append(residual(name, 2 * tokens, width))
    if layer_scale:
        found += [Part(f"{name}/attention_scale/scale", width, elementwise=each(SCALE, tokens * width))] * 2
    return found
