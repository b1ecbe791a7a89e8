"""MONAI's SwinUNETR encoder and ViT: equal outputs for equal weights, strict keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR, ViT

from mg3d_jax.errors import UserError
from mg3d_jax.interop.state_dict import read_state_dict
from mg3d_jax.models.towers import swin, vit
from mg3d_jax.models.towers.swin.encoder import SwinEncoder
from mg3d_jax.models.towers.vit.encoder import VolumeEncoder


def load_monai_swin(path, *arguments):
    imported = swin.SWIN.forms["monai-swin"].convert(read_state_dict(path), str(path), *arguments)
    return imported.fields, imported.params, imported.unused


def load_monai_vit(path, *arguments, **named):
    imported = vit.VIT.forms["monai-vit"].convert(read_state_dict(path), str(path), *arguments, **named)
    return imported.fields, imported.params, imported.unused


def shaken(model):
    """In evaluation mode, with biases, norms and position tables moved away from their starting values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "table" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def channel_last(array):
    return jnp.asarray(np.moveaxis(array.numpy(), 1, -1))


def stages_differ_by(model, encoder, params, size, channels=1):
    volume = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(volume)
    ours = jax.jit(SwinEncoder(**encoder, pooling="mean").apply)({"params": params}, channel_last(volume))["stages"]
    return max(
        float(np.abs(np.moveaxis(theirs.numpy(), 1, -1) - np.asarray(mine)).max())
        for theirs, mine in zip(expected, ours, strict=True)
    )


SWINS = [
    # Maps of 16^3 and 8^3 do not fill windows of 7: padded and shifted; maps of 4 and 2 shrink the window.
    ({}, [(32, 32, 32), (64, 32, 96)]),
    ({"use_v2": True, "in_channels": 2}, [(32, 64, 32)]),
    ({"downsample": "mergingv2", "window_size": (4, 5, 3), "depths": (2, 1, 2, 2)}, [(64, 64, 32)]),
]


@pytest.mark.parametrize(("options", "sizes"), SWINS, ids=["paper", "v2", "other"])
def test_swin_equals_monai(tmp_path, options, sizes):
    fields = {"in_channels": 1, "out_channels": 2, "feature_size": 12} | options
    model = shaken(SwinUNETR(**fields))
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "m.pt")
    encoder, params, unused = load_monai_swin(tmp_path / "m.pt", fields.get("downsample", "merging"))
    assert encoder["residual_convolutions"] == fields.get("use_v2", False)
    assert encoder["window"] == fields.get("window_size", (7, 7, 7))
    assert any(key.startswith("decoder") for key in unused)
    for size in sizes:
        assert stages_differ_by(model.swinViT, encoder, params, size, fields["in_channels"]) < 1e-4


def test_swin_alone_with_odd_maps_and_old_names(tmp_path):
    """`swinViT` itself takes sizes that SwinUNETR refuses: 36 -> maps of 18, 9, 5, 3, padded when merged."""
    model = shaken(SwinUNETR(in_channels=1, out_channels=2, feature_size=12)).swinViT
    old = {key.replace("linear1", "fc1").replace("linear2", "fc2"): value for key, value in model.state_dict().items()}
    torch.save(old, tmp_path / "m.pt")
    encoder, params, _ = load_monai_swin(tmp_path / "m.pt")
    assert stages_differ_by(model, encoder, params, (36, 33, 30)) < 1e-4


def test_swin_with_a_wrong_key_is_refused(tmp_path):
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    state = model.state_dict()
    state["swinViT.layers2.0.gate.weight"] = torch.zeros(2)
    del state["swinViT.layers3.0.downsample.norm.bias"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(UserError) as error:
        load_monai_swin(tmp_path / "m.pt")
    assert "layers2.0.gate.weight" in str(error.value)
    assert "layers3.0.downsample.norm.bias [384]" in str(error.value)


VITS = [
    {"proj_type": "conv"},
    {"proj_type": "perceptron", "qkv_bias": True, "pos_embed_type": "sincos"},
]


@pytest.mark.parametrize("options", VITS, ids=["conv", "perceptron"])
def test_vit_equals_monai(tmp_path, options):
    model = shaken(ViT(2, (32, 48, 16), (8, 16, 4), 48, 100, 3, 4, **options))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    encoder, params, _ = load_monai_vit(tmp_path / "m.pt", (32, 48, 16), num_heads=4, patch_size=(8, 16, 4))
    volume = torch.randn(2, 2, 32, 48, 16)
    with torch.no_grad():
        expected = model(volume)[0].numpy()
    module = VolumeEncoder(**encoder, pooling="mean")
    ours = jax.jit(module.apply)({"params": params}, channel_last(volume))["tokens"]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_unetr_gives_its_encoder(tmp_path):
    model = UNETR(1, 2, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=3)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    encoder, params, unused = load_monai_vit(tmp_path / "m.pt", (32, 32, 32), num_heads=3)
    assert (encoder["depth"], encoder["patch_size"]) == (12, (16, 16, 16))
    assert params["positions"].shape == (8, 24)
    assert any(key.startswith("decoder") for key in unused)


def test_vit_errors(tmp_path):
    model = ViT(1, (16, 16, 16), (8, 8, 8), 24, 32, 2, 2, proj_type="perceptron")
    path = tmp_path / "m.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UserError, match="--patch-size"):
        load_monai_vit(path, (16, 16, 16), 2)
    with pytest.raises(UserError, match=r"position_embeddings: \[1, 8, 24\] in the file, \[1, 16, 24\] in the model"):
        load_monai_vit(path, (32, 16, 16), 2, (8, 8, 8))
    with pytest.raises(UserError, match="not divisible by 5 heads"):
        load_monai_vit(path, (16, 16, 16), 5, (8, 8, 8))
    torch.save({"weights": 3}, path)
    with pytest.raises(UserError, match="no tensors found"):
        load_monai_vit(path, (16, 16, 16), 2)
    with pytest.raises(UserError, match="no such file"):
        load_monai_vit(tmp_path / "nothing.pt", (16, 16, 16), 2)
