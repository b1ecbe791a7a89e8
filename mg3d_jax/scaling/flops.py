"""Parameters and floating-point operations (FLOPs) of a model, counted from its configuration. Nothing is built.

Conventions:
- A multiply-add is 2 FLOPs. `matmul` counts matrix products only (dense layers, attention, pooling, similarities): the
  figure for model-FLOPs utilisation. `forward` and `training` add norms, activations, softmax, biases and residuals as
  XLA's compiled CPU program counts them (the error function is a polynomial there); looking up rows is free.
- Everything is per sample, one volume with its report, padding included: padded positions are computed.
- A tower is counted as often as the enabled objectives run it: a masked autoencoder runs the encoder a second time, on
  the visible patches; masked report modelling runs the report encoder on the corrupted report.
- The backward pass costs each dense layer one product for its weights (unless frozen) and one for its input (unless
  nothing before it is trained, as for the patch embedding), each product of two activations two more.
- Not counted: recomputation under `model.remat` or `optimizer.gradient_cache`, HU windows and augmentation, the
  optimizer's update.
- XLA's own `cost_analysis` counts the body of a scan over layers ONCE whatever its length; do not use it for depth.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from mg3d_jax.config import Config
from mg3d_jax.models.mg3d import FIXED_WORD_DIM
from mg3d_jax.objectives.masking import masked_count
from mg3d_jax.scaling import parts
from mg3d_jax.scaling.layer_parts import Part
from mg3d_jax.training.freezing import trained_rows


@dataclass(frozen=True)
class Cost:
    """What a configuration costs. FLOPs are per sample; see the module's conventions."""

    n_total: int
    n_vision: int  # volume encoder
    n_text: int  # report encoder, embedding tables included
    n_fusion: int  # cross-modal layers, sentence-conditioned volume features
    n_decoder: int  # voxel decoder, token head
    n_heads: int  # the rest: pooling of sentences, projections, temperature
    n_embedding: int  # look-up tables within n_text and n_vision
    n_active: int  # n_total without look-up tables: the parameters that do arithmetic
    forward_flops: float
    training_flops: float  # forward and backward
    matmul_forward_flops: float
    matmul_training_flops: float
    volume_tokens: int
    report_tokens: int  # that the alignment reads

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pass:
    """One run through a piece of the model: parts in order, `rows` times per sample."""

    parts: list[Part]
    rows: int = 1
    after_trained: bool = False  # its input already depends on trained parameters


def count(config: Config, vocab_size: int | None = None) -> Cost:
    """Parameters and per-sample FLOPs of `config`. `vocab_size` is the tokenizer's (default: `data.vocab_size`)."""
    vocab_size = vocab_size or config.data.vocab_size
    inventory = parameter_parts(config, vocab_size)

    def parameters(*prefixes: str) -> int:
        return sum(part.parameters for part in inventory if part.name.startswith(prefixes))

    total, vision, text = parameters(""), parameters("volume_encoder/"), parameters("report_encoder/")
    fusion = parameters("fusion/", "sentence_conditioned_volume/")
    decoder = parameters("voxel_decoder/", "token_head/")
    embedding = sum(part.parameters for part in inventory if part.lookup)
    whole = [pattern for pattern, share in trained_rows(config) if isinstance(share, float)]
    flops = [_flops(one, (*config.optimizer.freeze, *whole)) for one in passes(config, vocab_size)]
    forward, training, matmul_forward, matmul_training = (sum(column) for column in zip(*flops, strict=True))
    return Cost(
        n_total=total,
        n_vision=vision,
        n_text=text,
        n_fusion=fusion,
        n_decoder=decoder,
        n_heads=total - vision - text - fusion - decoder,
        n_embedding=embedding,
        n_active=total - embedding,
        forward_flops=forward,
        training_flops=training,
        matmul_forward_flops=matmul_forward,
        matmul_training_flops=matmul_training,
        volume_tokens=volume_tokens(config),
        report_tokens=prod(report_shape(config)[:2]),
    )


def _flops(one: Pass, frozen: Sequence[str]) -> tuple[float, float, float, float]:
    """Forward, training, and the matrix products of both, of one pass."""
    forward = training = matmul_forward = matmul_training = 0.0
    upstream = one.after_trained  # is anything before this part trained, so that its input needs a gradient?
    for part in one.parts:
        own = (
            part.parameters > 0 and not part.frozen and not any(re.fullmatch(pattern, part.name) for pattern in frozen)
        )
        once = part.dense + part.mixing + part.constant
        both = part.dense * (1 + own + upstream) + part.mixing * (1 + 2 * upstream) + part.constant * (1 + upstream)
        both += part.again * upstream
        matmul_forward += once
        matmul_training += both
        forward += once + part.elementwise[0]
        training += both + part.elementwise[own or upstream]
        upstream |= own
    return tuple(one.rows * value for value in (forward, training, matmul_forward, matmul_training))


def volume_tokens(config: Config) -> int:
    """Tokens of a volume."""
    return prod(config.model.token_grid())


def visible_tokens(config: Config) -> int:
    """Tokens that the masked pass of the volume encoder gives: of the patches that a ViT sees, of all with a Swin."""
    tokens = volume_tokens(config)
    if config.model.volume_encoder.kind == "swin":
        return tokens
    return tokens - masked_count(tokens, config.objectives["volume_reconstruction"].mask_ratio)


def report_shape(config: Config) -> tuple[int, int, int]:
    """Texts per sample that the text tower reads for the alignment, tokens of each, and sentences of each."""
    options, data = config.objectives["alignment"], config.data
    if options.report_view == "sentences":
        return min(options.report_sentences, data.max_sentences), options.sentence_tokens, 1
    return 1, data.max_tokens, data.max_sentences


@dataclass(frozen=True)
class Enabled:
    """What the enabled objectives make the model compute (as `models.mg3d.MG3D.__call__` decides it)."""

    alignment: bool
    fused_pair: bool
    voxels: bool
    words: bool
    matching: bool
    discrimination: bool
    reads_text: bool  # the voxel decoder reads the report

    @classmethod
    def of(cls, config: Config) -> Enabled:
        options = config.objectives
        on = {name: options[name].weight > 0 for name in options}
        return cls(
            alignment=on["alignment"],
            fused_pair=on["alignment"] and options["alignment"].fused_weight > 0,
            voxels=on["volume_reconstruction"],
            words=on["report_reconstruction"],
            matching=on["matching"],
            discrimination=on["discrimination"],
            reads_text=on["volume_reconstruction"] and options["volume_reconstruction"].read_report,
        )

    @property
    def fusion_outputs(self) -> tuple[str, ...]:
        volume, report = self.discrimination or self.fused_pair, self.words or self.fused_pair
        return ("volume",) * volume + ("report",) * report


def parameter_parts(config: Config, vocab_size: int) -> list[Part]:
    """Every part with parameters, once. Both towers and their embeddings always exist: every run can be evaluated."""
    on, widths = Enabled.of(config), parts.Widths.of(config)
    shape = report_shape(config)
    found = parts.volume_tower(config, volume_tokens(config)) + parts.volume_embedding(config)
    found += parts.report_tower(config, vocab_size, shape[1]) + parts.report_embedding(config, shape[2])
    found.append(Part("logit_scale", 1))
    if config.objectives["alignment"].form == "sigmoid":
        found.append(Part("logit_bias", 1))
    if on.fusion_outputs:
        found += parts.fusion(config, config.data.max_tokens, on.fusion_outputs)
    if on.matching or on.discrimination:
        found += parts.sentence_conditioned_volume(config)
    if on.discrimination:
        found.append(parts.dense("fused_volume_projection/out", 1, widths.volume, widths.matching, bias=False))
    if on.fused_pair:
        found += parts.fused_pair_projections(config)
    if on.voxels:
        found += parts.voxel_decoder(config, visible_tokens(config), on.reads_text)
        if config.model.volume_encoder.kind == "swin":
            found.append(Part("volume_encoder/mask_token", parts.towers(config)[0].embed))
    if on.words:
        found += parts.token_head(config, vocab_size)
        found.append(parts.dense("sentence_projection/out", 1, widths.report, widths.matching, bias=False))
    return found


def passes(config: Config, vocab_size: int) -> list[Pass]:
    """What one training step computes for a sample, as `models.mg3d.MG3D.__call__` does it."""
    on, data = Enabled.of(config), config.data
    texts, length, sentences = report_shape(config)
    tokens, found = volume_tokens(config), []
    whole_volume = on.alignment or on.words or on.matching or on.discrimination
    whole_report = on.words or on.matching or on.discrimination or on.fused_pair or on.reads_text
    if whole_volume:
        embedding = parts.volume_embedding(config) if on.alignment else []
        found.append(Pass(parts.volume_tower(config, tokens) + embedding))
    if on.alignment:
        text = [*parts.report_tower(config, vocab_size, length), parts.sentence_means(config, length, sentences)]
        found.append(Pass(text + parts.report_embedding(config, sentences), rows=texts))
    if whole_report:
        means = [parts.sentence_means(config, data.max_tokens, data.max_sentences)]
        if config.objectives["alignment"].report_view == "sentences" or not on.alignment:
            found.append(Pass(parts.report_tower(config, vocab_size, data.max_tokens) + means))
        if on.matching:  # the targets are means without a gradient
            found.append(Pass(means))
    found += [Pass(chain, after_trained=True) for chain in _cross_modal(config, vocab_size, on)]
    if on.voxels:
        decoder = parts.voxel_decoder(config, visible_tokens(config), on.reads_text)
        found.append(Pass(parts.volume_tower(config, tokens, visible_tokens(config)) + decoder))
    if on.words:
        found.append(Pass(parts.report_tower(config, vocab_size, data.max_tokens)))
    return [*found, *(Pass(chain, after_trained=True) for chain in _similarities(config, on))]


def _cross_modal(config: Config, vocab_size: int, on: Enabled) -> Iterable[list[Part]]:
    """Chains that read both towers."""
    widths, length = parts.Widths.of(config), config.data.max_tokens
    if on.matching or on.discrimination:
        yield parts.sentence_conditioned_volume(config)
    if on.discrimination or on.fused_pair:
        yield parts.fusion(config, length, ("volume", "report") if on.fused_pair else ("volume",))
    if on.discrimination:
        yield [parts.dense("fused_volume_projection/out", 1, widths.volume, widths.matching, bias=False)]
    if on.fused_pair:
        yield parts.fused_pair_projections(config)
    if on.words:
        yield parts.fusion(config, length, ("report",)) + parts.token_head(config, vocab_size)
        yield [parts.sentence_means(config, length, config.data.max_sentences)]
        projected = parts.dense(
            "sentence_projection/out", config.data.max_sentences, widths.report, widths.matching, bias=False
        )
        yield [projected, projected]  # of the reconstructed and of the original sentences


def _similarities(config: Config, on: Enabled) -> Iterable[list[Part]]:
    """Rows of similarity matrices, which the backward pass makes again."""
    widths, batch, sentences = parts.Widths.of(config), config.data.batch_size, config.data.max_sentences

    def row(length: int, width: int) -> Part:
        products = 2.0 * length * width
        return Part("similarity", mixing=products, again=products)

    if on.alignment:
        yield [row(report_shape(config)[0] * batch, widths.projection)]
    if on.fused_pair:
        yield [row(batch, 2 * widths.projection)]
    if on.discrimination:
        yield [row(batch, widths.matching)]
    if on.matching:
        source = config.objectives["matching"].sentence_source
        width = FIXED_WORD_DIM if source == "words" else widths.report
        pairs = sentences * batch * sentences
        # The similarities of the targets have no gradient, but the backward pass makes them again.
        yield [row(pairs, widths.matching), Part("targets", constant=2.0 * pairs * width)]
