"""Which objectives are on, by name: what is recommended ("recipe"), the whole published method ("mg3d"), and the baselines of
the same family on equal footing. "mg3d_same_words" is the method with other forms of three terms (docs/objectives.md)."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError

OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "recipe": {
        "alignment.weight": 1.0,
        "alignment.report_view": "subsets",
        "alignment.subset_sizes": (1, 2, 4),
        "alignment.report_sentences": 8,
        "alignment.sentence_tokens": 40,
        "alignment.reworded": 0.5,
        # A young model's pairs are not aligned yet; with a low temperature it first learns to make all of them alike.
        "alignment.temperature": 0.5,
        "alignment.learn_temperature": True,
        "negation.weight": 1.0,
        "negation.wordings": 2,
        "negation.tokens": 40,
    },
    "clip": {"alignment.weight": 1.0},
    "siglip": {"alignment.weight": 1.0, "alignment.form": "sigmoid", "alignment.learn_temperature": True},
    "mae": {"volume_reconstruction.weight": 1.0, "volume_reconstruction.read_report": False},
    "mg3d": {
        "alignment.weight": 0.1,
        "alignment.fused_weight": 1.0,
        "volume_reconstruction.weight": 1.0,
        "report_reconstruction.weight": 1.0,
        "matching.weight": 0.1,
        "discrimination.weight": 0.1,
    },
}
# The same with the three terms between patients in the form in which their words cannot answer for the volume.
SAME_WORDS_FORMS = {
    "alignment.fused_form": "same_words",
    "matching.form": "same_words",
    "discrimination.form": "same_words",
}
OBJECTIVE_PRESETS["mg3d_same_words"] = OBJECTIVE_PRESETS["mg3d"] | SAME_WORDS_FORMS


def use_objectives(config: ConfigDict, name: str) -> None:
    """Switches on the objectives of a preset, with the paper's weights, and all others off."""
    if name not in OBJECTIVE_PRESETS:
        raise UserError(f"objectives {name!r} are unknown: choose one of {', '.join(OBJECTIVE_PRESETS)}")
    off = {f"{objective}.weight": 0.0 for objective in config.objectives}
    config.objectives.update_from_flattened_dict(off | OBJECTIVE_PRESETS[name])


def use_frozen_report_encoder(config: ConfigDict, source: str, preset: str) -> None:
    """The paper's setting: a pre-trained report encoder that stays as it is, its sentences encoded once.

    Args:
        source: a BERT-type folder or hub name, of which the tokenizer is taken too.
        preset: its sizes (docs/towers.md).
    """
    config.data.tokenizer = source
    encoder = config.model.report_encoder
    encoder.pretrained, encoder.preset = source, preset
    encoder.frozen_layers, encoder.precompute = -1, True
