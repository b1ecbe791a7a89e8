"""The features of the model by name: which method computes each, and what it reads.

Objectives and tasks name the features that they need; `steps_for` says what has to be computed for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One computation of the model: the method, the features that it gives, the features and inputs that it reads."""

    method: str
    gives: tuple[str, ...]
    reads: tuple[str, ...]


# Axes: B patients, N volume tokens, T report tokens, S sentences, V sentence views of a report, M predicted tokens; d, e the
# widths of volume and report tower; k = projection_dim, m = matching_dim; P voxel values of a token's cell.
#   volume_tokens [B, N, d]; report_tokens, reconstructed_tokens [B, T, e]; sentences [B, S, e]; view_embeddings [B, V, k];
#   volume_embedding, report_embedding [B, k]; volume_direction [B, k], statement_directions [B, V, 2, k], of length 1;
#   fused_volume_embedding [B, m]; fused_embedding [B, 2k]; z, the sentence-conditioned volume, and *_sentences [B, S, m];
#   z_others [B, K, S, m], fused_*_others [B, K, d or e]: the words of a patient with the volumes of K others
#   (`objectives.same_words`); patches, voxel_prediction* [B, N, P]; token_logits [B, M, vocab]; crops [B, K, x, y, z, C],
#   crop_mask [B, K, x, y, z], crop_features [B, K, x, y, z, f] of K crops of each volume, of the size that the tower takes;
#   next_token_logits [B, T - 1, vocab].
# Computed in this order: a module that is called twice draws its dropout by the number of the call. Inputs are those of
# `training.inputs.model_inputs`: `volume`, `report`, and what the objectives draw.
STEPS: tuple[Step, ...] = (
    Step("_embed_views", ("view_embeddings", "view_mask", "view_id"), ("views",)),
    Step("_embed_statements", ("statement_embeddings", "statement_kind"), ("drawn_statements",)),
    Step("_encode_report", ("report_tokens", "report_input_embeddings"), ("report",)),
    Step("_sentences", ("sentences", "sentence_mask"), ("report_tokens", "report")),
    Step("_report_embedding", ("report_embedding",), ("sentences", "sentence_mask")),
    Step("_sentence_embeddings", ("sentence_embeddings",), ("report_input_embeddings", "report")),
    Step("_sentence_words", ("sentence_words",), ("report",)),
    Step("_volume", ("volume_tokens", "volume_pooled"), ("volume",)),
    Step("_volume_embedding", ("volume_embedding",), ("volume_pooled",)),
    Step("_volume_direction", ("volume_direction",), ("volume_embedding",)),
    Step("_statement_directions", ("statement_directions",), ("statement_embeddings",)),
    Step("_sentence_conditioned", ("z",), ("sentences", "volume_tokens")),
    Step("_sentence_conditioned_others", ("z_others",), ("sentences", "volume_tokens")),
    Step("_fused", ("fused_volume", "fused_report"), ("volume_tokens", "report_tokens", "report")),
    Step("_fused_others", ("fused_volume_others", "fused_report_others"), ("volume_tokens", "report_tokens", "report")),
    Step("_fused_volume_embedding", ("fused_volume_embedding",), ("fused_volume",)),
    Step("_fused_embedding", ("fused_embedding",), ("fused_volume", "fused_report")),
    Step("_patches", ("patches",), ("volume",)),
    Step("_reconstruct_volume", ("voxel_prediction",), ("volume", "visible", "report_tokens", "report")),
    Step("_reconstruct_volume", ("voxel_prediction_without_report",), ("volume", "visible")),
    Step("_reconstruct_report", ("reconstructed_tokens",), ("corrupted_ids", "volume_tokens", "report")),
    Step("_token_logits", ("token_logits", "token_labels"), ("reconstructed_tokens", "predicted", "report")),
    Step("_reconstructed_sentences", ("reconstructed_sentences",), ("reconstructed_tokens", "report")),
    Step("_original_sentences", ("original_sentences",), ("sentences",)),
    Step("_crops", ("crops", "crop_mask"), ("volume", "mask", "crop_starts", "crop_flips")),
    Step("segment", ("crop_features",), ("crops",)),
    Step("_next_token_logits", ("next_token_logits",), ("volume_tokens", "report")),
    Step("_next_token_logits", ("next_token_logits_of_findings",), ("volume_tokens", "report", "findings")),
)
# Computed when parameters are made, whether an objective needs them or not, so that every run can be evaluated.
ALWAYS = ("volume_embedding", "report_embedding")


def steps_for(needed: Iterable[str]) -> tuple[Step, ...]:
    """What has to be computed for these features, in order."""
    wanted, chosen = set(needed), []
    for step in reversed(STEPS):
        if wanted & set(step.gives):
            chosen.append(step)
            wanted |= set(step.reads)
    return tuple(reversed(chosen))
