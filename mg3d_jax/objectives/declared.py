"""Options of the objectives, and what is impossible in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mg3d_jax.objectives.base import Objective
from mg3d_jax.options import choice, key


@dataclass(frozen=True)
class AlignmentOptions:
    """Global alignment of volume and report."""

    weight: float = key(1.0, "weight in the loss; 0: off")
    temperature: float = key(0.1, "of the softmax, at the start where it is learned")
    learn_temperature: bool = key(False, "is the temperature trained?")
    report_view: str = key(
        "sentences", '"report": the whole report; "sentences": random sentences of it, each a text of its own'
    )
    report_sentences: int = key(8, 'sentences drawn per report and step, for the view "sentences"')
    sentence_tokens: int = key(48, "length of one, [CLS] and [SEP] included; what does not fit is cut")
    center: bool = key(True, "subtract the mean of the batch from the embeddings; the projections' biases follow it")
    form: str = key("softmax", '"softmax": InfoNCE; "sigmoid": SigLIP, with a learned bias')
    volume_report_weight: float = key(1.0, "weight of pair (a): volume against report")
    fused_weight: float = key(0.0, "weight of pair (b): fused patient against its two embeddings")
    block_size: int = key(0, "columns of the similarity matrix at a time; 0 chooses by size")


@dataclass(frozen=True)
class VolumeReconstructionOptions:
    """Report-guided masked volume modelling."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    mask_ratio: float = key(0.5, "share of the patches that are hidden")
    masking: str = key("random", '"random", or "nested": whole cells of 2x2x2 patches, then patches in the other cells')
    normalize_target: bool = key(False, "is the target of each patch normalised?")
    read_report: bool = key(True, "False: a plain masked autoencoder")


@dataclass(frozen=True)
class ReportReconstructionOptions:
    """Volume-guided masked report modelling."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    mask_ratio: float = key(0.15, "share of the words that are hidden")
    sentence_weight: float = key(0.1, "weight of the sentence alignment within it")


@dataclass(frozen=True)
class MatchingOptions:
    """Sentence-wise semantic matching between patients."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    high: float = key(0.9, "report-side cosine from which sentences of two patients attract")
    low: float = key(0.6, "and up to which they repel")
    average: str = key("pairs", 'over "pairs" of sentences, or "patients" as MG-3D\'s release')
    sentence_source: str = key(
        "encoder",
        'compared on the report side: means of the report encoder\'s output ("encoder") or input ("embeddings"), fixed only '
        'where it is frozen; or "words", fixed random word vectors',
    )
    block_size: int = key(0, "patients at a time; 0 chooses by size")


@dataclass(frozen=True)
class DiscriminationOptions:
    """Patient discrimination."""

    weight: float = key(0.0, "weight in the loss; 0: off")
    temperature: float = key(0.1, "of the softmax")
    block_size: int = key(0, "columns of the similarity matrix at a time; 0 chooses by size")


def _alignment_problems(options: AlignmentOptions, config: Any) -> list[str]:
    problems = [
        *choice("objectives.alignment.form", options.form, ("softmax", "sigmoid")),
        *choice("objectives.alignment.report_view", options.report_view, ("report", "sentences")),
    ]
    if options.report_sentences < 1:
        problems.append(f"objectives.alignment.report_sentences = {options.report_sentences}: must be at least 1")
    most = config.model.report_encoder.max_positions
    if not 3 <= options.sentence_tokens <= most:
        problems.append(
            f"objectives.alignment.sentence_tokens = {options.sentence_tokens}: from 3 to "
            f"model.report_encoder.max_positions = {most}"
        )
    return problems


def _volume_problems(options: VolumeReconstructionOptions, config: Any) -> list[str]:
    problems = choice("objectives.volume_reconstruction.masking", options.masking, ("random", "nested"))
    if not options.weight > 0:
        return problems
    decoder, grid = config.model.voxel_decoder, _grid(config.model)
    if decoder.width % decoder.num_heads:
        problems.append(
            f"model.voxel_decoder.num_heads = {decoder.num_heads} does not divide its width = {decoder.width}"
        )
    if options.masking == "nested" and any(n % 2 for n in grid):
        problems.append(
            f'objectives.volume_reconstruction.masking = "nested" needs an even number of patches along each axis, not '
            f'{grid}: use "random" or another patch'
        )
    if math.prod(grid) < 2:
        problems.append(f"a grid of {grid} patches has nothing to hide: use a smaller patch_size or a larger volume")
    return problems


def _grid(model: Any) -> tuple[int, ...]:
    """Tokens along each axis; even ones where they are wrong themselves, which the checks of the model say."""
    try:
        return model.token_grid()
    except (KeyError, ValueError, ZeroDivisionError):
        return (2, 2, 2)


def _matching_problems(options: MatchingOptions, config: Any) -> list[str]:
    problems = [
        *choice("objectives.matching.average", options.average, ("pairs", "patients")),
        *choice("objectives.matching.sentence_source", options.sentence_source, ("encoder", "embeddings", "words")),
    ]
    if not -1 <= options.low < options.high <= 1:
        problems.append(
            f"objectives.matching.low = {options.low}, high = {options.high}: cosines with low < high are needed"
        )
    return problems


DECLARED: dict[str, Objective] = {
    "alignment": Objective(AlignmentOptions, _alignment_problems),
    "volume_reconstruction": Objective(VolumeReconstructionOptions, _volume_problems),
    "report_reconstruction": Objective(ReportReconstructionOptions),
    "matching": Objective(MatchingOptions, _matching_problems),
    "discrimination": Objective(DiscriminationOptions),
}
