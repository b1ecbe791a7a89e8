"""Parameters and floating-point operations (FLOPs) of a model, counted from its configuration. Nothing is built.

Conventions:
- A multiply-add is 2 FLOPs. `matmul` counts matrix products only (dense layers, attention, pooling, similarity matrix):
  the figure for model-FLOPs utilisation. `forward` and `training` add norms, activations, softmax, biases and residuals
  as XLA's compiled CPU program counts them (the error function is a polynomial there); looking up rows is free.
- Everything is per sample, one volume with its report, padding included: padded positions are computed.
- The backward pass costs each dense layer one product for its weights (unless frozen) and one for its input (unless
  nothing above it is trained, as for the patch embedding), each product of two activations two more.
- Not counted: recomputation under `model.remat`, HU windows and augmentation, the optimizer's update.
- XLA's own `cost_analysis` counts the body of a scan over layers ONCE whatever its length; do not use it for depth.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from ml_collections import ConfigDict

from mg3d_jax.models import presets
from mg3d_jax.models.presets import TowerPreset
from mg3d_jax.models.volume_encoder import patch_grid, stem_strides

# Elementwise FLOPs per element: forward, and forward with backward. Measured on XLA:CPU.
LAYER_NORM = (8, 21)
GELU_TANH = (8, 20)
GELU_ERF = (64, 71)
SOFTMAX = (5, 12)
ADD = (1, 2)  # bias, residual
SCALE = (1, 3)
TYPE_VOCAB = 2


@dataclass(frozen=True)
class Part:
    """A piece of a tower: one kind of layer, all its repeats. Costs are forward FLOPs of one sample."""

    name: str  # of one of its parameters: what `optimizer.freeze` is matched against
    parameters: int = 0
    dense: float = 0.0  # products with weights
    mixing: float = 0.0  # products of two activations
    elementwise: tuple[float, float] = (0.0, 0.0)  # forward; forward with backward
    lookup: bool = False  # a table of embeddings

    def times(self, repeats: int) -> Part:
        forward, both = self.elementwise
        costs = (self.dense * repeats, self.mixing * repeats, (forward * repeats, both * repeats))
        return Part(self.name, self.parameters * repeats, *costs, self.lookup)


@dataclass(frozen=True)
class Cost:
    """What a configuration costs. FLOPs are per sample; see the module's conventions."""

    n_total: int
    n_vision: int  # volume encoder
    n_text: int  # report encoder, embedding tables included
    n_heads: int  # pooling of sentences, projections, temperature
    n_embedding: int  # look-up tables within n_text and n_vision
    n_active: int  # n_total without look-up tables: the parameters that do arithmetic
    forward_flops: float
    training_flops: float  # forward and backward
    matmul_forward_flops: float
    matmul_training_flops: float
    volume_tokens: int
    report_tokens: int
    not_counted: list[str] = field(default_factory=list)  # objectives that this module does not know

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def count(config: ConfigDict, vocab_size: int | None = None) -> Cost:
    """Parameters and per-sample FLOPs of `config`. `vocab_size` is the tokenizer's (default: `data.vocab_size`)."""
    volume, report = volume_parts(config), report_parts(config, vocab_size or config.data.vocab_size)
    chains = (volume, report)
    loss = objective_part(config)
    parts = [part for chain in chains for part in chain] + [loss]
    trained = [_training(chain, config.optimizer.freeze) for chain in chains] + [(4 * loss.mixing, 4 * loss.mixing)]

    def parameters(prefix: str) -> int:
        return sum(part.parameters for part in parts if part.name.startswith(prefix))

    total = sum(part.parameters for part in parts)
    vision, text = parameters("volume_encoder/"), parameters("report_encoder/")
    embedding = sum(part.parameters for part in parts if part.lookup)
    matmul = sum(part.dense + part.mixing for part in parts)
    return Cost(
        n_total=total,
        n_vision=vision,
        n_text=text,
        n_heads=total - vision - text,
        n_embedding=embedding,
        n_active=total - embedding,
        forward_flops=matmul + sum(part.elementwise[0] for part in parts),
        training_flops=sum(both for both, _ in trained),
        matmul_forward_flops=matmul,
        matmul_training_flops=sum(products for _, products in trained),
        volume_tokens=prod(patch_grid(config.model.volume_size, config.model.volume_encoder.patch_size)),
        report_tokens=report_length(config),
        not_counted=sorted(name for name, one in config.objectives.items() if name != "alignment" and one.weight > 0),
    )


def _training(chain: Sequence[Part], frozen: Sequence[str]) -> tuple[float, float]:
    """Forward with backward of a chain of parts: all FLOPs, and those of matrix products only."""
    total = products = 0.0
    upstream = False  # is anything before this part trained, so that its input needs a gradient?
    for part in chain:
        own = part.parameters > 0 and not any(re.fullmatch(pattern, part.name) for pattern in frozen)
        matmul = part.dense * (1 + own + upstream) + part.mixing * (1 + 2 * upstream)
        products += matmul
        total += matmul + part.elementwise[own or upstream]
        upstream |= own
    return total, products


def report_length(config: ConfigDict) -> int:
    """Tokens of the report that the text tower reads."""
    options = config.objectives.alignment
    return (
        min(options.report_tokens, config.data.max_tokens)
        if options.report_view == "sentences"
        else config.data.max_tokens
    )


def volume_parts(config: ConfigDict) -> list[Part]:
    """The volume tower with its projection, in the order of computation."""
    model, encoder = config.model, config.model.volume_encoder
    preset = presets.volume_preset(encoder.preset)
    tokens = prod(patch_grid(model.volume_size, encoder.patch_size))
    root = "volume_encoder"
    parts = _stem(config, preset.width, tokens)
    if encoder.positions == "learned":
        parts.append(
            Part(f"{root}/positions", tokens * preset.width, elementwise=_each(ADD, tokens * preset.width), lookup=True)
        )
    if encoder.num_registers:
        parts.append(Part(f"{root}/registers", encoder.num_registers * preset.width))
    length = tokens + encoder.num_registers
    parts += _stack(
        f"{root}/stack", preset, length, GELU_TANH, qk_norm=encoder.qk_norm, layer_scale=encoder.layer_scale
    )
    parts.append(_norm(f"{root}/norm", tokens, preset.width))
    if encoder.pooling == "attention":
        parts += _pool(f"{root}/pool", tokens, preset.width, preset.num_heads)
    return [*parts, _dense("volume_projection/out", 1, preset.width, model.projection_dim, bias=False)]


def report_parts(config: ConfigDict, vocab_size: int) -> list[Part]:
    """The report tower with its pooling and projection, in the order of computation."""
    model, preset = config.model, presets.report_preset(config.model.report_encoder.preset)
    length, sentences, root = report_length(config), config.data.max_sentences, "report_encoder"
    rows = {"word": vocab_size, "position": model.report_encoder.max_positions, "type": TYPE_VOCAB}
    parts = [Part(f"{root}/{name}_embedding", count * preset.width, lookup=True) for name, count in rows.items()]
    parts.append(_norm(f"{root}/embedding_norm", length, preset.width))
    parts += _stack(f"{root}/stack", preset, length, GELU_ERF)
    # The mean of each sentence is a product with a constant matrix: one product back, not two.
    parts.append(Part("sentence_means", mixing=2.0 * sentences * length * preset.width * 2 / 3))
    parts += _pool("report_pool", sentences, preset.width, preset.num_heads)
    return [*parts, _dense("report_projection/out", 1, preset.width, model.projection_dim, bias=False)]


def objective_part(config: ConfigDict) -> Part:
    """InfoNCE: a row of the similarity matrix per sample; backward, the row once more and two products."""
    return Part("logit_scale", 1, mixing=2.0 * config.data.batch_size * config.model.projection_dim)


def _each(cost: tuple[int, int], elements: int) -> tuple[float, float]:
    return float(cost[0] * elements), float(cost[1] * elements)


def _sum(*costs: tuple[float, float]) -> tuple[float, float]:
    return sum(one[0] for one in costs), sum(one[1] for one in costs)


def _dense(name: str, tokens: int, inputs: int, outputs: int, *, bias: bool = True) -> Part:
    added = _each(ADD, tokens * outputs) if bias else (0.0, 0.0)
    return Part(f"{name}/kernel", (inputs + bias) * outputs, 2.0 * tokens * inputs * outputs, elementwise=added)


def _norm(name: str, tokens: int, width: int) -> Part:
    return Part(f"{name}/scale", 2 * width, elementwise=_each(LAYER_NORM, tokens * width))


def _attention(name: str, queries: int, keys: int, width: int, heads: int) -> list[Part]:
    """Projections of `queries` and `keys` tokens, and their attention."""
    weights = _each(SOFTMAX, heads * queries * keys)
    return [
        _dense(f"{name}/query", queries, width, width),
        _dense(f"{name}/key", keys, width, width),
        _dense(f"{name}/value", keys, width, width),
        Part(f"{name}/mix", mixing=4.0 * queries * keys * width, elementwise=weights),
        _dense(f"{name}/out", queries, width, width),
    ]


def _pool(name: str, tokens: int, width: int, heads: int) -> list[Part]:
    return [Part(f"{name}/query", width), *_attention(f"{name}/attention", 1, tokens, width, heads)]


def _stack(
    root: str,
    preset: TowerPreset,
    length: int,
    gelu: tuple[int, int],
    *,
    qk_norm: bool = False,
    layer_scale: float = 0.0,
) -> list[Part]:
    name, width, elements = f"{root}/blocks/block", preset.width, length * preset.width
    block = _attention(f"{name}/attention", length, length, width, preset.num_heads)
    if qk_norm:
        norm = Part(
            f"{name}/attention/query_norm/scale", width // preset.num_heads, elementwise=_each(LAYER_NORM, elements)
        )
        block += [norm, norm]
    block += [_norm(f"{name}/{branch}_layer_norm", length, width) for branch in ("attention", "mlp")]
    up = _dense(f"{name}/mlp/up", length, width, preset.mlp_dim)
    block += [up, Part(f"{name}/mlp/gelu", elementwise=_each(gelu, length * preset.mlp_dim))]
    block += [_dense(f"{name}/mlp/down", length, preset.mlp_dim, width)]
    block += [Part(f"{name}/residual", elementwise=_each(ADD, 2 * elements))]
    if layer_scale:
        block += [Part(f"{name}/attention_scale/scale", width, elementwise=_each(SCALE, elements))] * 2
    return [part.times(preset.depth) for part in block]


def _stem(config: ConfigDict, width: int, tokens: int) -> list[Part]:
    """Patch embedding: one matrix product, or strided convolutions (each a reshape and a product) and then one."""
    name, patch = "volume_encoder/patch_embedding", config.model.volume_encoder.patch_size
    channels, grid = len(config.data.windows), tuple(config.model.volume_size)
    if config.model.volume_encoder.stem == "linear":
        return [_dense(name, tokens, prod(patch) * channels, width)]
    parts, strides = [], stem_strides(patch)
    for level, stride in enumerate(strides):
        outputs = max(16, width >> (len(strides) - level))
        grid = patch_grid(grid, stride)
        parts.append(_dense(f"{name}/conv_{level}", prod(grid), prod(stride) * channels, outputs))
        parts.append(_norm(f"{name}/norm_{level}", prod(grid), outputs))
        parts.append(Part(f"{name}/gelu_{level}", elementwise=_each(GELU_TANH, prod(grid) * outputs)))
        channels = outputs
    return [*parts, _dense(f"{name}/out", prod(grid), channels, width)]
