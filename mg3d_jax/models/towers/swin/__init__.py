"""The Swin encoder of MONAI's SwinUNETR, the paper's backbone, as a tower: presets, options, freezing, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mg3d_jax.models.segmentation import SwinUnetrDecoder
from mg3d_jax.models.towers.base import Form, FrozenRows, Grid, Tower
from mg3d_jax.models.towers.swin.encoder import MERGE_ORDERS, SwinEncoder
from mg3d_jax.models.towers.swin.monai import from_monai, obstacles, to_swin_unetr, to_swin_vit
from mg3d_jax.options import choice, key


@dataclass(frozen=True)
class SwinSizes:
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


# `-v2` has the convolutions of SwinUNETR-V2, as VoCo's weights; `swin-nano` is for tests.
PAPER_STAGES = (2, 2, 2, 2), (3, 6, 12, 24)
PRESETS: dict[str, SwinSizes] = {
    "swin-nano": SwinSizes(16, (2, 1), (2, 4), window=(3, 3, 3)),
    "swin-b": SwinSizes(48, *PAPER_STAGES),
    "swin-l": SwinSizes(96, *PAPER_STAGES),
    "swin-b-v2": SwinSizes(48, *PAPER_STAGES, residual_convolutions=True),
    "swin-l-v2": SwinSizes(96, *PAPER_STAGES, residual_convolutions=True),
}


@dataclass(frozen=True)
class SwinOptions:
    """Of a Swin."""

    merging: str = key("merging", "MONAI's `downsample` that its weights were trained with: merging or mergingv2")


def _build(model: Any, channels: int, attention_backend: str = "xla", **fields: Any) -> SwinEncoder:
    encoder = model.volume_encoder
    preset = PRESETS[encoder.preset]
    given = {
        "width": preset.embed,
        "depths": preset.depths,
        "num_heads": preset.stage_heads,
        "window": preset.window,
        "patch_size": preset.patch_size,
        "channels": channels,
        "merging": encoder.options.merging,
        "residual_convolutions": preset.residual_convolutions,
        "pooling": encoder.pooling,
        "dropout": encoder.dropout,
        "dtype": model.dtype,
        "remat": model.remat,
        "frozen_layers": encoder.frozen_layers,
    }
    return SwinEncoder(**given | fields)


def _segmenter(model: Any) -> SwinUnetrDecoder:
    preset = PRESETS[model.volume_encoder.preset]
    width = model.segmentation_decoder.width or preset.embed
    return SwinUnetrDecoder(preset.patch_size, width, dtype=model.dtype, remat=model.remat)


def _frozen(preset: SwinSizes, layers: int) -> FrozenRows:
    """What `SwinEncoder` freezes with its first blocks."""
    names, layer = ["patch_embedding", "mask_token"], 0
    for stage, depth in enumerate(preset.depths):
        if layer < layers:
            names.append(f"convolution_{stage}")
        names += [f"stage_{stage}_block_{block}" for block in range(depth) if layer + block < layers]
        layer += depth
        if layer <= layers:
            names.append(f"merging_{stage}")
    return [(f"{name}(/.*)?", 0.0) for name in names]


def _problems(encoder: Any, model: Any) -> list[str]:
    return choice("model.volume_encoder.merging", encoder.options.merging, tuple(MERGE_ORDERS))


SWIN = Tower(
    options=SwinOptions,
    presets=PRESETS,
    build=_build,
    frozen=_frozen,
    token_cell=lambda encoder: PRESETS[encoder.preset].cell,
    problems=_problems,
    module=SwinEncoder,
    forms={
        "monai-swin": Form(
            help="the encoder of MONAI's SwinUNETR (MG-3D, VoCo, MONAI releases)",
            convert=from_monai,
            root="patch_embed.proj.weight",
            arguments={
                "--merging": {
                    "choices": tuple(MERGE_ORDERS),
                    "default": "merging",
                    "help": "MONAI's downsample option that the weights were trained with (default: merging, as SwinUNETR's)",
                }
            },
        )
    },
    fresh=("pool/", "mask_token"),
    torch_hint="its PyTorch form is MONAI's SwinUNETR: --format monai",
    segmenter=_segmenter,
    to_monai_network=to_swin_unetr,
    to_monai_encoder=to_swin_vit,
    monai_obstacles=obstacles,
)
