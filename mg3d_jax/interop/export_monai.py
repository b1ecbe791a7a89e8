"""A run's ViT, or its whole segmentation network, as a folder for users of `monai.networks.nets`, loaded strictly and run
there before it is handed out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.interop.export_run import Run
from mg3d_jax.models.towers.base import MonaiNetwork
from mg3d_jax.models.towers.vit.monai import exact_gelu

# Layers and tables that MONAI builds and that no weights of a run belong to: cross-attention that self-attention never runs,
# and indices that follow from the size of a window. Which there are depends on MONAI's version.
_OWN = ("cross_attn", "relative_position_index")


def write(run: Run, folder: Path, network: MonaiNetwork, volumes: np.ndarray) -> np.ndarray:
    """Writes `config.json` and `model.safetensors`.

    Args:
        volumes: int16 HU `[n, X, Y, Z]`.

    Returns:
        What MONAI's network gives after a strict load, with the GELU that the model was trained with: tokens `[n, N, d]` of an
        encoder, logits `[n, K, X, Y, Z]` of a segmentation network.
    """
    try:
        import monai
        import torch
        from monai.networks import nets
    except ImportError as error:
        raise UserError(
            "--format monai is checked with MONAI, which is not installed here: pip install monai"
        ) from error
    from safetensors.torch import load_file, save_file

    whole = getattr(nets, network.name)(**network.arguments).eval()
    made = whole.get_submodule(network.part)
    state = {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in network.state.items()}
    own = {
        name: tensor.contiguous() for name, tensor in made.state_dict().items() if any(part in name for part in _OWN)
    }
    save_file(state | own, folder / "model.safetensors", metadata={"format": "pt"})
    content: dict[str, Any] = {"monai_class": f"monai.networks.nets.{network.name}", "monai_version": monai.__version__}
    content |= {"part": network.part} if network.part else {}
    content |= {"arguments": network.arguments, "mg3d_jax": {"version": __version__, "step": run.step}}
    write_json(folder / "config.json", content)
    made.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    if needs_tanh_gelu(run):
        for block in getattr(made, "vit", made).blocks:
            block.mlp.fn = torch.nn.GELU(approximate="tanh")
    hu = torch.from_numpy(volumes).float()
    windowed = torch.stack([((hu - low) / (high - low)).clamp(0, 1) for low, high in run.config.data.windows], dim=1)
    with torch.no_grad():
        found = made(windowed)
    if network.part:  # the stages of a Swin, channels first
        return found[-1].flatten(2).transpose(1, 2).numpy()
    return (found[0] if network.name == "ViT" else found).numpy()


def needs_tanh_gelu(run: Run) -> bool:
    """Was a ViT trained with the tanh form of the GELU, which MONAI does not have by default?"""
    return run.config.model.volume_encoder.kind == "vit" and not exact_gelu(run.config.model)
