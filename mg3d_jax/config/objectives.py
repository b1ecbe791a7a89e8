"""Which objectives are on, by name: the whole method, and the baselines of the same family on equal footing."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError

OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
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


def use_objectives(config: ConfigDict, name: str) -> None:
    """Switches on the objectives of a preset, with the paper's weights, and all others off."""
    if name not in OBJECTIVE_PRESETS:
        raise UserError(f"objectives {name!r} are unknown: choose one of {', '.join(OBJECTIVE_PRESETS)}")
    off = {f"{objective}.weight": 0.0 for objective in config.objectives}
    config.objectives.update_from_flattened_dict(off | OBJECTIVE_PRESETS[name])
