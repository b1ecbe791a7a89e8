"""The pieces of a model with their parameters and forward FLOPs per sample: the bill of materials that `flops` adds up.

Each function mirrors one module of `models/`, in the order of its computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from ml_collections import ConfigDict

from mg3d_jax import presets
from mg3d_jax.models.volume_encoder import patch_grid, stem_strides
from mg3d_jax.presets import TowerPreset

# Elementwise FLOPs per element: forward, and forward with backward. Measured on XLA:CPU.
LAYER_NORM = (8, 21)
GELU_TANH = (8, 20)
GELU_ERF = (64, 71)
SOFTMAX = (5, 12)
ADD = (1, 2)  # bias, residual
SCALE = (1, 3)
TYPE_VOCAB = 2
MLP_RATIO = 4  # of fusion and decoder layers


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

    def times(self, repeats: int) -> Part:
        """So many layers of this kind, each with its own parameters."""
        forward, both = self.elementwise
        return Part(
            self.name,
            self.parameters * repeats,
            self.dense * repeats,
            self.mixing * repeats,
            self.constant * repeats,
            self.again * repeats,
            (forward * repeats, both * repeats),
            self.lookup,
        )


@dataclass(frozen=True)
class Widths:
    """Widths of the towers and of the spaces that they are projected to."""

    volume: int
    report: int
    projection: int
    matching: int

    @classmethod
    def of(cls, config: ConfigDict) -> Widths:
        volume, report = towers(config)
        return cls(volume.width, report.width, config.model.projection_dim, config.model.matching_dim)


def towers(config: ConfigDict) -> tuple[TowerPreset, TowerPreset]:
    """The presets of the volume and of the report encoder."""
    model = config.model
    return presets.volume_preset(model.volume_encoder.preset), presets.report_preset(model.report_encoder.preset)


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


def volume_tower(config: ConfigDict, tokens: int, visible: int | None = None) -> list[Part]:
    """`models.volume_encoder.VolumeEncoder` up to its tokens; the blocks see `visible` of the `tokens` patches."""
    encoder, (preset, _) = config.model.volume_encoder, towers(config)
    seen, root, width = tokens if visible is None else visible, "volume_encoder", preset.width
    found = _stem(config, width, tokens)
    if encoder.positions == "learned":
        added = each(ADD, tokens * width)
        found.append(Part(f"{root}/positions", tokens * width, elementwise=added, lookup=True))
    if encoder.num_registers:
        found.append(Part(f"{root}/registers", encoder.num_registers * width))
    options = {"qk_norm": encoder.qk_norm, "layer_scale": encoder.layer_scale}
    layer = block(
        f"{root}/stack/blocks/block",
        seen + encoder.num_registers,
        width,
        preset.num_heads,
        preset.mlp_dim,
        **options,
    )
    return [*found, *(part.times(preset.depth) for part in layer), norm(f"{root}/norm", seen, width)]


def _stem(config: ConfigDict, width: int, tokens: int) -> list[Part]:
    """Patch embedding: one matrix product, or strided convolutions (each a reshape and a product) and then one."""
    name, patch = "volume_encoder/patch_embedding", tuple(config.model.volume_encoder.patch_size)
    channels, grid = len(config.data.windows), tuple(config.model.volume_size)
    if config.model.volume_encoder.stem == "linear":
        return [dense(name, tokens, prod(patch) * channels, width)]
    found, strides = [], stem_strides(patch)
    for level, stride in enumerate(strides):
        outputs = max(16, width >> (len(strides) - level))
        grid = patch_grid(grid, stride)
        found.append(dense(f"{name}/conv_{level}", prod(grid), prod(stride) * channels, outputs))
        found.append(norm(f"{name}/norm_{level}", prod(grid), outputs))
        found.append(Part(f"{name}/gelu_{level}", elementwise=each(GELU_TANH, prod(grid) * outputs)))
        channels = outputs
    return [*found, dense(f"{name}/out", prod(grid), channels, width)]


def volume_embedding(config: ConfigDict) -> list[Part]:
    """Pooling of the volume tokens and the projection."""
    preset, _ = towers(config)
    tokens = prod(patch_grid(tuple(config.model.volume_size), tuple(config.model.volume_encoder.patch_size)))
    found = []
    if config.model.volume_encoder.pooling == "attention":
        found = pool("volume_encoder/pool", tokens, preset.width, preset.num_heads)
    if config.model.volume_encoder.pooling == "flatten":
        found = [dense("volume_encoder/flatten", 1, tokens * preset.width, preset.width)]
    return [*found, dense("volume_projection/out", 1, preset.width, config.model.projection_dim)]


def report_tower(config: ConfigDict, vocab_size: int, length: int) -> list[Part]:
    """`models.report_encoder.ReportEncoder` on one text of `length` tokens."""
    _, preset = towers(config)
    root = "report_encoder"
    rows = {"word": vocab_size, "position": config.model.report_encoder.max_positions, "type": TYPE_VOCAB}
    found = [Part(f"{root}/{name}_embedding", count * preset.width, lookup=True) for name, count in rows.items()]
    found.append(norm(f"{root}/embedding_norm", length, preset.width))
    layer = block(f"{root}/stack/blocks/block", length, preset.width, preset.num_heads, preset.mlp_dim, GELU_ERF)
    return found + [part.times(preset.depth) for part in layer]


def sentence_means(config: ConfigDict, length: int, sentences: int) -> Part:
    """`models.heads.sentence_means`: a product with a matrix of zeros and ones."""
    _, preset = towers(config)
    return Part("sentence_means", constant=2.0 * sentences * length * preset.width)


def report_embedding(config: ConfigDict, sentences: int) -> list[Part]:
    """Pooling of the sentences of one text and the projection."""
    _, preset = towers(config)
    projection = dense("report_projection/out", 1, preset.width, config.model.projection_dim)
    return [*pool("report_pool", sentences, preset.width, preset.num_heads), projection]


def cross_attention(name: str, queries: int, keys: int, width: int, heads: int, context: int) -> list[Part]:
    """`models.fusion.CrossAttention`."""
    found = [norm(f"{name}/norm", queries, width), norm(f"{name}/context_norm", keys, context)]
    return [
        *found,
        *attention(f"{name}/attention", queries, keys, width, heads, context),
        residual(name, queries, width),
    ]


def fusion(config: ConfigDict, length: int, outputs: Sequence[str]) -> list[Part]:
    """`models.fusion.Fusion` of a volume and `length` tokens of report; the last layer updates `outputs` only."""
    (volume, report), depth = towers(config), config.model.fusion.depth
    tokens = prod(patch_grid(tuple(config.model.volume_size), tuple(config.model.volume_encoder.patch_size)))
    sides = {"volume": (tokens, volume), "report": (length, report)}
    found = []
    for number in range(depth):
        for stream in outputs if number == depth - 1 else sides:
            count, own = sides[stream]
            others, other = sides["report" if stream == "volume" else "volume"]
            name, width = f"fusion/layer_{number}/{stream}", own.width
            if config.model.fusion.kind == "gate":
                found += [
                    norm(f"{name}_gate/norm", count, width),
                    norm(f"{name}_gate/context_norm", others, other.width),
                ]
                found.append(dense(f"{name}_gate/query", count, width, width))
                found.append(dense(f"{name}_gate/key", others, other.width, width))
                found.append(Part(f"{name}_gate/mix", mixing=2.0 * (count + others) * width))
            else:
                sizes = (count, others, width, own.num_heads, other.width)
                found += cross_attention(f"{name}_cross_attention", *sizes)
            found += [norm(f"{name}_mlp_norm", count, width), *mlp(f"{name}_mlp", count, width, MLP_RATIO * width)]
            found.append(residual(name, count, width))
    return found + [norm(f"fusion/{stream}_norm", sides[stream][0], sides[stream][1].width) for stream in outputs]


def fused_pair_projections(config: ConfigDict) -> list[Part]:
    widths = Widths.of(config)
    return [
        dense("fused_volume_pair_projection/out", 1, widths.volume, widths.projection, bias=False),
        dense("fused_report_pair_projection/out", 1, widths.report, widths.projection, bias=False),
    ]


def sentence_conditioned_volume(config: ConfigDict) -> list[Part]:
    """`models.fusion.SentenceConditionedVolume`."""
    (volume, report), sentences = towers(config), config.data.max_sentences
    tokens = prod(patch_grid(tuple(config.model.volume_size), tuple(config.model.volume_encoder.patch_size)))
    name = "sentence_conditioned_volume"
    found = [norm(f"{name}/norm", sentences, report.width), norm(f"{name}/context_norm", tokens, volume.width)]
    found += attention(f"{name}/attention", sentences, tokens, report.width, report.num_heads, volume.width)
    projection = dense(f"{name}/projection/out", sentences, report.width, config.model.matching_dim, bias=False)
    return [*found, projection]


def voxel_decoder(config: ConfigDict, visible: int, reads_text: bool) -> list[Part]:
    """`models.decoders.VoxelDecoder`: all patches, of which `visible` come from the encoder."""
    (volume, report), decoder, patch = (
        towers(config),
        config.model.voxel_decoder,
        config.model.volume_encoder.patch_size,
    )
    tokens, name = prod(patch_grid(tuple(config.model.volume_size), tuple(patch))), "voxel_decoder"
    found = [Part(f"{name}/mask_token", decoder.width), dense(f"{name}/embed", visible, volume.width, decoder.width)]
    for number in range(decoder.depth):
        layer = f"{name}/layer_{number}"
        if reads_text:
            sizes = (tokens, config.data.max_tokens, decoder.width, decoder.num_heads, report.width)
            found += cross_attention(f"{layer}/cross_attention", *sizes)
        found += block(f"{layer}/block", tokens, decoder.width, decoder.num_heads, MLP_RATIO * decoder.width)
    values = prod(patch) * len(config.data.windows)
    return [*found, norm(f"{name}/norm", tokens, decoder.width), dense(f"{name}/voxels", tokens, decoder.width, values)]


def token_head(config: ConfigDict, vocab_size: int) -> list[Part]:
    """`models.decoders.TokenHead` and the log-softmax of its logits."""
    (_, preset), length, name = towers(config), config.data.max_tokens, "token_head"
    return [
        dense(f"{name}/transform", length, preset.width, preset.width),
        Part(f"{name}/gelu", elementwise=each(GELU_ERF, length * preset.width)),
        norm(f"{name}/norm", length, preset.width),
        dense(f"{name}/vocab", length, preset.width, vocab_size),
        Part(f"{name}/log_softmax", elementwise=each(SOFTMAX, length * vocab_size)),
    ]
