"""Our volume encoder as a state dict of `monai.networks.nets.ViT`.

The two are the same pre-norm ViT but for three things. MONAI joins query, key and value into one matrix: they are
concatenated. Its norms have epsilon 1e-5, ours 1e-6: made up for exactly, because a norm sees its input only up to
scale, by a residual stream that is sqrt(10) times as large. Its GELU is the exact one, ours by default the tanh form:
one line that the user adds after loading (`README.md` of the export has it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import __version__
from mg3d_jax.config import Config
from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json
from mg3d_jax.interop import export_format
from mg3d_jax.interop.export_run import Run

MONAI_EPSILON = 1e-5


def stream_scale(config: Config) -> float:
    """What the residual stream is multiplied with, so that norms with MONAI's epsilon give what ours give."""
    return float(np.sqrt(MONAI_EPSILON / config.model.volume_encoder.options.norm_epsilon))


def exact_gelu(config: Config) -> bool:
    """Was the volume encoder trained with the exact GELU, as MONAI has it?"""
    return config.model.volume_encoder.options.exact_gelu


def obstacles(config: Config) -> list[str]:
    """Settings of the volume encoder that MONAI's `ViT` has no place for."""
    options = config.model.volume_encoder.options
    checks = (
        (options.stem != "linear", f"stem = {options.stem!r}: MONAI's stem is one convolution; train with 'linear'"),
        (options.num_registers, f"num_registers = {options.num_registers}: MONAI has no register tokens; train with 0"),
        (options.qk_norm, "qk_norm = True: MONAI does not normalise queries and keys; train with False"),
        (options.layer_scale, f"layer_scale = {options.layer_scale}: MONAI has no layer scale; train with 0"),
    )  # fmt: skip
    return [f"model.volume_encoder.{text}" for prevents, text in checks if prevents]


def vit_arguments(config: Config) -> dict[str, Any]:
    """Keyword arguments of `monai.networks.nets.ViT`."""
    volume = config.model.volume_encoder.sizes
    return {
        "in_channels": len(config.data.windows),
        "img_size": list(config.model.volume_size),
        "patch_size": list(config.model.volume_encoder.options.patch_size),
        "hidden_size": volume.width,
        "mlp_dim": volume.mlp_dim,
        "num_layers": volume.depth,
        "num_heads": volume.num_heads,
        "proj_type": "conv",
        "qkv_bias": True,
    }


def vit_state(params: dict[str, Any], config: Config) -> dict[str, np.ndarray]:
    """State dict of MONAI's `ViT`, float32. `UserError` naming the settings for which there is none."""
    if found := obstacles(config):
        raise UserError("MONAI's ViT cannot hold this volume encoder:\n  - " + "\n  - ".join(found))
    scale = stream_scale(config)
    ours = export_format.torch_state({"volume_encoder": params["volume_encoder"]}, config)
    ours = {name.removeprefix("volume_encoder."): array for name, array in ours.items()}
    state = {
        "patch_embedding.position_embeddings": ours["positions"][None] * scale,
        "patch_embedding.patch_embeddings.weight": ours["patch_embedding.weight"] * scale,
        "patch_embedding.patch_embeddings.bias": ours["patch_embedding.bias"] * scale,
        "norm.weight": ours["norm.weight"],
        "norm.bias": ours["norm.bias"],
    }
    for number in range(config.model.volume_encoder.sizes.depth):
        for kind in ("weight", "bias"):
            block, to = (lambda name, i=number, k=kind: ours[f"blocks.{i}.{name}.{k}"]), f"blocks.{number}."
            state[f"{to}norm1.{kind}"], state[f"{to}norm2.{kind}"] = (
                block("attention_layer_norm"),
                block("mlp_layer_norm"),
            )
            parts = [block(f"attention.{name}") for name in ("query", "key", "value")]
            state[f"{to}attn.qkv.{kind}"] = np.concatenate(parts)
            state[f"{to}attn.out_proj.{kind}"] = block("attention.out") * scale
            state[f"{to}mlp.linear1.{kind}"] = block("mlp.up")
            state[f"{to}mlp.linear2.{kind}"] = block("mlp.down") * scale
    return {name: np.ascontiguousarray(array, np.float32) for name, array in state.items()}


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

    state = {name: torch.from_numpy(array) for name, array in vit_state(run.params, run.config).items()}
    vit = ViT(**vit_arguments(run.config)).eval()
    # Layers for cross-attention, which self-attention never runs; which ones there are depends on MONAI's version.
    unused = {name: tensor for name, tensor in vit.state_dict().items() if "cross_attn" in name}
    save_file(state | unused, folder / "model.safetensors", metadata={"format": "pt"})
    content = {"monai_class": "monai.networks.nets.ViT", "monai_version": monai.__version__}
    content |= {"arguments": vit_arguments(run.config), "mg3d_jax": {"version": __version__, "step": run.step}}
    write_json(folder / "config.json", content)
    vit.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    if not exact_gelu(run.config):
        for block in vit.blocks:
            block.mlp.fn = torch.nn.GELU(approximate="tanh")
    hu = torch.from_numpy(volumes).float()
    windowed = torch.stack([((hu - low) / (high - low)).clamp(0, 1) for low, high in run.config.data.windows], dim=1)
    with torch.no_grad():
        return vit(windowed)[0].numpy()
