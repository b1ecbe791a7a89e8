"""Named sizes of the towers.

`ti` to `g` follow the ViT literature (Dosovitskiy et al. 2021; Touvron et al. 2021; Zhai et al. 2022 for g), `swin-b` and
`swin-l` are the paper's backbone (MONAI's SwinUNETR; `-v2` with the convolutions of SwinUNETR-V2, as VoCo's weights), and
`roberta-base` has the sizes of RadBERT-RoBERTa and BiomedRoBERTa. `pico` and `nano` are ours, for CPU tests and the
quickstart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from mg3d_jax.errors import UserError

Grid = tuple[int, int, int]


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


@dataclass(frozen=True)
class ReportPreset(TowerPreset):
    """Of a BERT-type encoder. RoBERTa has one token type and another epsilon in its norms."""

    type_vocab: int = 2
    norm_epsilon: float = 1e-12


@dataclass(frozen=True)
class SwinPreset:
    """Sizes of a Swin encoder. `width`, `depth` and `num_heads` say what the rest of the model sees: its last stage."""

    embed: int  # width of the first stage; each stage doubles it
    depths: tuple[int, ...]
    stage_heads: tuple[int, ...]
    window: Grid = (7, 7, 7)
    patch_size: Grid = (2, 2, 2)
    residual_convolutions: bool = False

    @property
    def width(self) -> int:
        """Of the tokens: the output of the last stage's merging."""
        return self.embed * 2 ** len(self.depths)

    @property
    def depth(self) -> int:
        """Blocks, all stages together."""
        return sum(self.depths)

    @property
    def num_heads(self) -> int:
        """Of the last stage; attention over the tokens has as many."""
        return self.stage_heads[-1]

    @property
    def cell(self) -> Grid:
        """Voxels per token along each axis."""
        x, y, z = (side * 2 ** len(self.depths) for side in self.patch_size)
        return x, y, z


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

PAPER_STAGES = (2, 2, 2, 2), (3, 6, 12, 24)
SWIN_PRESETS: dict[str, SwinPreset] = {
    "swin-nano": SwinPreset(16, (2, 1), (2, 4), window=(3, 3, 3)),
    "swin-b": SwinPreset(48, *PAPER_STAGES),
    "swin-l": SwinPreset(96, *PAPER_STAGES),
    "swin-b-v2": SwinPreset(48, *PAPER_STAGES, residual_convolutions=True),
    "swin-l-v2": SwinPreset(96, *PAPER_STAGES, residual_convolutions=True),
}

REPORT_PRESETS: dict[str, ReportPreset] = {
    "pico": ReportPreset(64, 2, 4, 256),
    "nano": ReportPreset(128, 2, 4, 512),
    "mini": ReportPreset(384, 6, 12, 1536),
    "base": ReportPreset(768, 12, 12, 3072),
    "roberta-base": ReportPreset(768, 12, 12, 3072, type_vocab=1, norm_epsilon=1e-5),
}


def volume_preset(name: str) -> TowerPreset | SwinPreset:
    """The preset of that name, of either kind of volume encoder; `UserError` names the known ones."""
    return _lookup("volume_encoder", VOLUME_PRESETS | SWIN_PRESETS, name)


def report_preset(name: str) -> ReportPreset:
    """The preset of that name; `UserError` names the known ones."""
    return _lookup("report_encoder", REPORT_PRESETS, name)


def token_cell(model: ConfigDict) -> Grid:
    """Voxels that one volume token stands for, along each axis: what `config.model` calls a patch of a ViT, and for a
    Swin the cell of its last stage. Masked volume modelling hides such cells, and its decoder predicts their voxels."""
    preset = volume_preset(model.volume_encoder.preset)
    if isinstance(preset, SwinPreset):
        return preset.cell
    x, y, z = model.volume_encoder.patch_size
    return x, y, z


def token_grid(model: ConfigDict) -> Grid:
    """Volume tokens along each axis. `config_check` has seen to it that the cells fill the volume."""
    x, y, z = (size // side for size, side in zip(model.volume_size, token_cell(model), strict=True))
    return x, y, z


def _lookup(tower: str, presets: Mapping[str, Any], name: str) -> Any:
    if name not in presets:
        raise UserError(f"{tower} preset {name!r} is unknown; choose one of {', '.join(presets)}.")
    return presets[name]
