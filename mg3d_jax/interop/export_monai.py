"""A run's ViT as a folder for users of `monai.networks.nets.ViT`, loaded and run there before it is handed out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.interop.export_run import Run
from mg3d_jax.models.towers.vit.monai import exact_gelu, monai_arguments, to_monai


def write(run: Run, folder: Path, volumes: np.ndarray) -> np.ndarray:
    """Writes `config.json` and `model.safetensors`.

    Args:
        volumes: int16 HU `[n, X, Y, Z]`.

    Returns:
        The tokens `[n, N, d]` of MONAI's ViT after a strict load, with the GELU that the model was trained with.
    """
    try:
        import monai
        import torch
        from monai.networks.nets import ViT
    except ImportError as error:
        raise UserError(
            "--format monai is checked with MONAI, which is not installed here: pip install monai"
        ) from error
    from safetensors.torch import load_file, save_file

    model = run.config.model
    arguments = monai_arguments(model, len(run.config.data.windows))
    mapped = to_monai(run.params["volume_encoder"], model)
    state = {name: torch.from_numpy(array) for name, array in mapped.items()}
    vit = ViT(**arguments).eval()
    # Layers for cross-attention, which self-attention never runs; which ones there are depends on MONAI's version.
    unused = {name: tensor for name, tensor in vit.state_dict().items() if "cross_attn" in name}
    save_file(state | unused, folder / "model.safetensors", metadata={"format": "pt"})
    content = {"monai_class": "monai.networks.nets.ViT", "monai_version": monai.__version__}
    content |= {"arguments": arguments, "mg3d_jax": {"version": __version__, "step": run.step}}
    write_json(folder / "config.json", content)
    vit.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    if not exact_gelu(model):
        for block in vit.blocks:
            block.mlp.fn = torch.nn.GELU(approximate="tanh")
    hu = torch.from_numpy(volumes).float()
    windowed = torch.stack([((hu - low) / (high - low)).clamp(0, 1) for low, high in run.config.data.windows], dim=1)
    with torch.no_grad():
        return vit(windowed)[0].numpy()
