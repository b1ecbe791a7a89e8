"""Named sizes of the towers.

`ti` to `g` follow the ViT literature (Dosovitskiy et al. 2021; Touvron et al. 2021; Zhai et al. 2022 for g);
`pico` and `nano` are ours, for CPU tests and the quickstart.
"""

from __future__ import annotations

from dataclasses import dataclass

from mg3d_jax.errors import UserError


@dataclass(frozen=True)
class TowerPreset:
    """Width, number of layers, attention heads, hidden width of the MLP."""

    width: int
    depth: int
    num_heads: int
    mlp_dim: int

    @property
    def mlp_ratio(self) -> float:
        """Hidden width over width, as `VolumeEncoder` takes it."""
        return self.mlp_dim / self.width


VOLUME_PRESETS: dict[str, TowerPreset] = {
    "pico": TowerPreset(128, 2, 4, 512),
    "nano": TowerPreset(128, 4, 4, 512),
    "ti": TowerPreset(192, 12, 3, 768),
    "s": TowerPreset(384, 12, 6, 1536),
    "b": TowerPreset(768, 12, 12, 3072),
    "l": TowerPreset(1024, 24, 16, 4096),
    "h": TowerPreset(1280, 32, 16, 5120),
    "g": TowerPreset(1408, 40, 16, 6144),
}

REPORT_PRESETS: dict[str, TowerPreset] = {
    "pico": TowerPreset(64, 2, 4, 256),
    "nano": TowerPreset(128, 2, 4, 512),
    "mini": TowerPreset(384, 6, 12, 1536),
    "base": TowerPreset(768, 12, 12, 3072),
}


def volume_preset(name: str) -> TowerPreset:
    """The preset of that name; `UserError` names the known ones."""
    return _lookup("volume_encoder", VOLUME_PRESETS, name)


def report_preset(name: str) -> TowerPreset:
    """The preset of that name; `UserError` names the known ones."""
    return _lookup("report_encoder", REPORT_PRESETS, name)


def _lookup(tower: str, presets: dict[str, TowerPreset], name: str) -> TowerPreset:
    if name not in presets:
        raise UserError(f"{tower} preset {name!r} is unknown; choose one of {', '.join(presets)}.")
    return presets[name]
