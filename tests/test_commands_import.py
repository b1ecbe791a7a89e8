"""`mg3d import` end to end: the written folder gives the features of the original model."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from monai.networks.nets import SwinUNETR, ViT
from support import quick_variables

from mg3d_jax.commands.import_ import main
from mg3d_jax.config.parts import InitConfig
from mg3d_jax.errors import UserError
from mg3d_jax.interop.sources import Source
from mg3d_jax.interop.tower import at_volume_size, load_tower
from mg3d_jax.interop.warm_start import account


@pytest.fixture
def vit(tmp_path):
    """A tiny MONAI ViT and the folder that it was imported to."""
    model = ViT(1, (16, 16, 16), (8, 8, 8), 24, 32, 2, 2).eval()
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    out = tmp_path / "vit"
    sizes = ["--volume-size", "16", "16", "16", "--heads", "2"]
    assert main(["monai-vit", str(tmp_path / "vit.pt"), *sizes, "--out", str(out)]) == 0
    return model, out


def fresh(module, size):
    volume = jnp.zeros((1, *size, 1))
    return quick_variables(module, volume)["params"]


def merged(fresh, tower):
    """The freshly initialised parameters, with the tower's in their place; all of the tower's have one."""
    into, loaded = flatten_dict(fresh, sep="/"), flatten_dict(tower.params, sep="/")
    assert {name: array.shape for name, array in loaded.items()}.items() <= {
        n: x.shape for n, x in into.items()
    }.items()
    return unflatten_dict(into | loaded, sep="/")


def test_vit_folder_gives_the_same_features(vit):
    model, folder = vit
    tower = load_tower(folder)
    module = tower.module(pooling="attention")
    params = merged(fresh(module, (16, 16, 16)), tower)
    volume = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        expected = model(volume)[0].numpy()
    ours = jax.jit(module.apply)({"params": params}, jnp.asarray(volume.numpy()).transpose(0, 2, 3, 4, 1))["tokens"]
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert len(tower.unused) == 4
    assert all("norm_cross_attn" in key for key in tower.unused)


def test_vit_at_another_size(vit):
    tower = at_volume_size(load_tower(vit[1]), (32, 16, 16))
    module = tower.module()
    params = merged(fresh(module, (32, 16, 16)), tower)
    output = jax.jit(module.apply)({"params": params}, jnp.ones((1, 32, 16, 16, 1)))
    assert output["tokens"].shape == (1, 16, 24)


def test_all_that_does_not_fit_is_named(vit):
    tower = load_tower(vit[1])
    other = fresh(tower.module(qk_norm=True, mlp_ratio=2.0), (16, 16, 16))
    params = {f"volume_encoder/{name}": array for name, array in flatten_dict(tower.params, sep="/").items()}
    wanted = {f"volume_encoder/{name}": array.shape for name, array in flatten_dict(other, sep="/").items()}
    source = Source("somewhere", params, complete="volume_encoder", fresh=("volume_encoder/pool/",))
    no_tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict))
    with pytest.raises(UserError) as error:
        account(source, InitConfig(), wanted, no_tokenizer)
    assert "query_norm/scale [2, 12]: missing in the checkpoint" in str(error.value)
    assert "mlp/up/kernel: [2, 24, 32] in the checkpoint, [2, 24, 48] in the model" in str(error.value)


def test_swin_and_bert_are_written(tmp_path):
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    torch.save(model.state_dict(), tmp_path / "swin.pt")
    assert main(["monai-swin", str(tmp_path / "swin.pt"), "--out", str(tmp_path / "swin")]) == 0
    tower = load_tower(tmp_path / "swin")
    assert tower.encoder["depths"] == (2, 2, 2, 2)
    # All of MONAI's parameters; its buffers (relative_position_index) are not parameters.
    assert tower.parameter_count == sum(p.numel() for p in model.swinViT.parameters())

    config = transformers.BertConfig(vocab_size=40, hidden_size=12, num_hidden_layers=2, num_attention_heads=2)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "hf")
    assert main(["bert", str(tmp_path / "hf"), "--out", str(tmp_path / "bert")]) == 0
    tower = load_tower(tmp_path / "bert")
    ids = jnp.ones((1, 4), int)
    params = quick_variables(tower.module(), ids, ids > 0)["params"]
    jax.tree.map(np.testing.assert_array_equal, merged(params, tower), tower.params)


def test_out_is_not_overwritten_and_folders_are_checked(vit, tmp_path):
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "notes.txt").write_text("mine")
    sizes = ["--volume-size", "16", "16", "16", "--heads", "2"]
    with pytest.raises(UserError, match="choose another --out"):
        main(["monai-vit", str(tmp_path / "vit.pt"), *sizes, "--out", str(busy)])
    with pytest.raises(UserError, match="no folder written by `mg3d import`"):
        load_tower(busy)
