"""The pieces of a model with their parameters and forward FLOPs per sample: the bill of materials that `flops` adds up.

Each function mirrors one module of `models/`, in the order of its computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mg3d_jax.config import Config
from mg3d_jax.models.towers.base import Sizes
from mg3d_jax.models.towers.swin import SwinSizes
from mg3d_jax.models.volume_encoder import patch_grid, stem_strides
from mg3d_jax.objectives.masking import most_selected
from mg3d_jax.scaling.layer_parts import (
    ADD,
    GELU_ERF,
    GELU_TANH,
    SOFTMAX,
    Part,
    attention,
    block,
    dense,
    each,
    mlp,
    norm,
    pool,
    residual,
    stacked,
)
from mg3d_jax.scaling.swin_parts import swin_tower

MLP_RATIO = 4  # of fusion and decoder layers


@dataclass(frozen=True)
class Widths:
    """Widths of the towers and of the spaces that they are projected to."""

    volume: int
    report: int
    projection: int
    matching: int

    @classmethod
    def of(cls, config: Config) -> Widths:
        volume, report = towers(config)
        return cls(volume.width, report.width, config.model.projection_dim, config.model.matching_dim)


def towers(config: Config) -> tuple[Sizes | SwinSizes, Sizes]:
    """The presets of the volume and of the report encoder."""
    model = config.model
    return model.volume_encoder.sizes, model.report_encoder.sizes


def volume_tower(config: Config, tokens: int, visible: int | None = None) -> list[Part]:
    """The volume encoder up to its tokens; the blocks of a ViT see `visible` of the `tokens` patches, a Swin all."""
    encoder, (preset, _) = config.model.volume_encoder, towers(config)
    if isinstance(preset, SwinSizes):
        return swin_tower(preset, tuple(config.model.volume_size), len(config.data.windows))
    seen, root, width = tokens if visible is None else visible, "volume_encoder", preset.width
    found = _stem(config, width, tokens)
    if encoder.options.positions == "learned":
        added = each(ADD, tokens * width)
        found.append(Part(f"{root}/positions", tokens * width, elementwise=added, lookup=True))
    if encoder.options.num_registers:
        found.append(Part(f"{root}/registers", encoder.options.num_registers * width))
    gelu = GELU_ERF if encoder.options.exact_gelu else GELU_TANH
    layer = block(
        f"{root}/stack/blocks/block",
        seen + encoder.options.num_registers,
        width,
        preset.num_heads,
        preset.mlp_dim,
        gelu,
        qk_norm=encoder.options.qk_norm,
        layer_scale=encoder.options.layer_scale,
    )
    return [*found, *stacked(layer, preset.depth, encoder.frozen_layers), norm(f"{root}/norm", seen, width)]


def _stem(config: Config, width: int, tokens: int) -> list[Part]:
    """Patch embedding: one matrix product, or strided convolutions (each a reshape and a product) and then one."""
    name, patch = "volume_encoder/patch_embedding", tuple(config.model.volume_encoder.options.patch_size)
    channels, grid = len(config.data.windows), tuple(config.model.volume_size)
    if config.model.volume_encoder.options.stem == "linear":
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


def volume_embedding(config: Config) -> list[Part]:
    """Pooling of the volume tokens and the projection."""
    preset, _ = towers(config)
    tokens = prod(config.model.token_grid())
    found = []
    if config.model.volume_encoder.pooling == "attention":
        found = pool("volume_encoder/pool", tokens, preset.width, preset.num_heads)
    if config.model.volume_encoder.pooling == "flatten":
        found = [dense("volume_encoder/flatten", 1, tokens * preset.width, preset.width)]
    return [*found, dense("volume_projection/out", 1, preset.width, config.model.projection_dim)]


def report_tower(config: Config, vocab_size: int, length: int) -> list[Part]:
    """`models.report_encoder.ReportEncoder` on one text of `length` tokens."""
    _, preset = towers(config)
    root = "report_encoder"
    rows = {"word": vocab_size, "position": config.model.report_encoder.max_positions, "type": preset.type_vocab}
    found = [Part(f"{root}/{name}_embedding", count * preset.width, lookup=True) for name, count in rows.items()]
    found.append(norm(f"{root}/embedding_norm", length, preset.width))
    layer = block(f"{root}/stack/blocks/block", length, preset.width, preset.num_heads, preset.mlp_dim, GELU_ERF)
    return found + stacked(layer, preset.depth, config.model.report_encoder.frozen_layers)


def sentence_means(config: Config, length: int, sentences: int) -> Part:
    """`models.heads.sentence_means`: a product with a matrix of zeros and ones."""
    _, preset = towers(config)
    return Part("sentence_means", constant=2.0 * sentences * length * preset.width)


def report_embedding(config: Config, sentences: int) -> list[Part]:
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


def fusion(config: Config, length: int, outputs: Sequence[str]) -> list[Part]:
    """`models.fusion.Fusion` of a volume and `length` tokens of report; the last layer updates `outputs` only."""
    (volume, report), depth = towers(config), config.model.fusion.depth
    tokens = prod(config.model.token_grid())
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


def fused_pair_projections(config: Config) -> list[Part]:
    widths = Widths.of(config)
    return [
        dense("fused_volume_pair_projection/out", 1, widths.volume, widths.projection, bias=False),
        dense("fused_report_pair_projection/out", 1, widths.report, widths.projection, bias=False),
    ]


def sentence_conditioned_volume(config: Config) -> list[Part]:
    """`models.fusion.SentenceConditionedVolume`."""
    (volume, report), sentences = towers(config), config.data.max_sentences
    tokens = prod(config.model.token_grid())
    name = "sentence_conditioned_volume"
    found = [norm(f"{name}/norm", sentences, report.width), norm(f"{name}/context_norm", tokens, volume.width)]
    found += attention(f"{name}/attention", sentences, tokens, report.width, report.num_heads, volume.width)
    projection = dense(f"{name}/projection/out", sentences, report.width, config.model.matching_dim, bias=False)
    return [*found, projection]


def voxel_decoder(config: Config, visible: int, reads_text: bool) -> list[Part]:
    """`models.decoders.VoxelDecoder`: all patches, of which `visible` come from the encoder."""
    (volume, report), decoder = towers(config), config.model.voxel_decoder
    tokens, name = prod(config.model.token_grid()), "voxel_decoder"
    found = [dense(f"{name}/embed", visible, volume.width, decoder.width)]
    if visible < tokens:
        found.append(Part(f"{name}/mask_token", decoder.width))
    for number in range(decoder.depth):
        layer = f"{name}/layer_{number}"
        if reads_text:
            sizes = (tokens, config.data.max_tokens, decoder.width, decoder.num_heads, report.width)
            found += cross_attention(f"{layer}/cross_attention", *sizes)
        found += block(f"{layer}/block", tokens, decoder.width, decoder.num_heads, MLP_RATIO * decoder.width)
    values = prod(config.model.token_cell()) * len(config.data.windows)
    return [*found, norm(f"{name}/norm", tokens, decoder.width), dense(f"{name}/voxels", tokens, decoder.width, values)]


def token_head(config: Config, vocab_size: int) -> list[Part]:
    """`models.decoders.TokenHead` on the tokens that are predicted, and the log-softmax of its logits."""
    (_, preset), name = towers(config), "token_head"
    length = most_selected(config.data.max_tokens, config.objectives["report_reconstruction"].mask_ratio)
    return [
        dense(f"{name}/transform", length, preset.width, preset.width),
        Part(f"{name}/gelu", elementwise=each(GELU_ERF, length * preset.width)),
        norm(f"{name}/norm", length, preset.width),
        dense(f"{name}/vocab", length, preset.width, vocab_size),
        Part(f"{name}/log_softmax", elementwise=each(SOFTMAX, length * vocab_size)),
    ]
