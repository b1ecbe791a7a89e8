"""Exported weights against the Linen model: Hugging Face folder, MONAI state dict, geometry and tokens without JAX."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import yaml
from exported_runs import SPACING, random_run
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from support import ROOT, environment, quick_state, tiny_builder, tiny_config, with_smallest_towers
from test_prepare_reading import write_dicom
from transformers import PreTrainedTokenizerFast

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.commands.main import main as cli
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.embed import Embedder
from mg3d_jax.evaluation.evaluate import evaluate
from mg3d_jax.evaluation.zero_shot import ZeroShot
from mg3d_jax.interop import export as export_lib
from mg3d_jax.interop import export_front_matter, export_preparation, licences
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.torch_template import configuration_mg3d, modeling_mg3d, text_mg3d, volume_mg3d
from mg3d_jax.models.mg3d import text_embedding, volume_embedding
from mg3d_jax.models.towers import bert, vit
from mg3d_jax.models.towers.vit.monai import to_monai
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.reports import report_sentences
from mg3d_jax.prepare.volumes import prepare_volume
from mg3d_jax.registry import SOURCES
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.checkpoints import Checkpoints
from mg3d_jax.training.restore import restore_run

ENCODER = "model__volume_encoder__"
TWO_WINDOWS = {"data__windows": ((-1000.0, 1000.0), (-150.0, 250.0))}
VARIANTS = {
    "linear": {},
    "everything else": {
        ENCODER + "positions": "learned", ENCODER + "pooling": "mean", ENCODER + "num_registers": 3,
        ENCODER + "qk_norm": True, ENCODER + "layer_scale": 0.1, ENCODER + "patch_size": (8, 4, 16),
        "objectives__alignment__report_view": "report", "model__dtype": "bfloat16",
        "objectives__alignment__form": "sigmoid",
    },
    "conv, odd patch": {
        ENCODER + "stem": "conv", ENCODER + "patch_size": (12, 8, 4), "model__volume_size": (24, 16, 8),
    },
}  # fmt: skip
SHARED = {ENCODER + "stem": "conv", "objectives__alignment__report_view": "subsets", **TWO_WINDOWS}
FOR_MONAI = {
    "sincos, as a UNETR": {
        ENCODER + "preset": "twelve", ENCODER + "patch_size": (16, 16, 16), "model__volume_size": (32, 16, 16),
    },
    "learned, mean, two windows, layer scale": {
        ENCODER + "positions": "learned", ENCODER + "pooling": "mean", ENCODER + "patch_size": (8, 4, 16),
        ENCODER + "layer_scale": 0.1, **TWO_WINDOWS,
    },
}  # fmt: skip
LABELS = ("Emphysema", "Pleural effusion", "Cyst")
# As `mg3d evaluate` and a run write them.
EVALUATED = {
    "step": 7, "data": ["somewhere/valid"], "volumes": 20, "patients": 12,
    "zero_shot": {"protocol": "of prompts", "auroc_macro": 0.8123, "auroc_macro_95": [0.75, 0.87], "auroc/Cyst": 0.9},
    "retrieval": {"protocol": "of reports", "report_to_volume/recall@5": 0.4, "report_to_volume/gallery": 20},
}  # fmt: skip
TRAINED = {"unique_records": 3210, "unique_patients": 1234, "samples_seen": 20000, "step": 7}


def scans(count=3):
    """Phantom scans and their reports as lists of sentences."""
    found = [phantoms.make_patient(5, index, "train").scans[0] for index in range(count)]
    return found, [report_sentences(scan.report.findings, scan.report.impression) for scan in found]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    sentences = {sentence for report in scans(12)[1] for sentence in report}
    save_tokenizer(train_wordpiece(sentences, 300), folder)
    return folder


@pytest.fixture(scope="module")
def make_run(tokenizer_folder):
    vit.PRESETS["twelve"] = vit.Sizes(32, 12, 2, 64)
    yield partial(random_run, tokenizer_folder)
    del vit.PRESETS["smallest"], vit.PRESETS["twelve"], bert.PRESETS["smallest"]


def asked(labels=LABELS):
    return ZeroShot().exported(labels)


@pytest.fixture(scope="module")
def exported(make_run, tmp_path_factory):
    """The run that most tests share, the folder that was exported of it, and what the export said."""
    run = make_run("lung", tasks__classification__weight=1.0, tasks__classification__num_labels=2, **SHARED)
    run = dataclasses.replace(run, label_names=("a", "b"))
    rng, k = np.random.default_rng(3), run.config.model.projection_dim
    probe = Probe(rng.normal(size=(3, k)).astype("f"), rng.normal(size=3).astype("f"), ("x", "y", "z"), "multi_class")
    out = tmp_path_factory.mktemp("exported") / "out"
    lines = export_lib.export(run, out, extras=Extras(probe, asked(), EVALUATED, TRAINED))
    return run, out, lines, probe


@pytest.fixture(scope="module")
def model(exported):
    return modeling_mg3d.MG3DModel.from_pretrained(exported[1]).eval()


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of the shared folder that a test may change."""
    return shutil.copytree(exported[1], tmp_path / "copy")


def volumes_of(run, count):
    shape = (count, *run.config.model.volume_size)
    return np.random.default_rng(0).integers(-1024, 1500, shape).astype(np.int16)


def linen(run, volumes, text):
    """Normalised embeddings of the Linen model in float32, computed here."""
    config = config_lib.replace(run.config, {"model.dtype": "float32"})
    model = state_lib.build_model(config, load_tokenizer(str(run.tokenizer_folder)).get_vocab_size())
    windowed = step_inputs.window(volumes, config.data.windows)
    embed_volume, embed_report = (jax.jit(partial(model.apply, method=f"embed_{of}")) for of in ("volume", "report"))
    volume = embed_volume({"params": run.params}, windowed)
    report = {
        "token_ids": text["input_ids"].numpy(),
        "token_mask": text["attention_mask"].numpy() > 0,
        "sentence_index": text["sentence_index"].numpy(),
    }
    report = embed_report({"params": run.params}, report)
    direction = report["report_embedding"] / np.linalg.norm(report["report_embedding"], axis=-1, keepdims=True)
    found = volume_embedding(run.params, volume["volume_embedding"]), text_embedding(run.params, direction)
    return *map(np.asarray, found), np.asarray(volume["volume_tokens"])


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_the_exported_model_is_the_linen_model(make_run, tmp_path, overrides):
    """By the export's own comparison; `test_embeddings_of_the_shared_folder` has one that is independent of it. Sine positions
    are rounded to bfloat16 on both sides."""
    dtype = "bf16" if overrides.get(ENCODER + "stem") == "conv" else "float32"
    lines = export_lib.export(make_run(**overrides), tmp_path / "out", extras=Extras(dtype=dtype))
    differences = [float(line.split()[-1]) for line in lines if "differ by" in line]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_embeddings_of_the_shared_folder(exported, model):
    run = exported[0]
    text = model.tokenize([*scans()[1], ["Emphysema is present."], []])
    volumes = volumes_of(run, 5)
    volume, report, tokens = linen(run, volumes, text)
    with torch.no_grad():
        found = model(torch.from_numpy(volumes), **text, return_loss=True, output_hidden_states=True)
    np.testing.assert_allclose(found.image_embeds.numpy(), volume, atol=1e-5)
    np.testing.assert_allclose(found.text_embeds.numpy()[:4], report[:4], atol=1e-5)
    assert np.isfinite(found.text_embeds.numpy()).all()  # also of a report without a sentence
    last = found.vision_model_output.last_hidden_state.numpy()
    np.testing.assert_allclose(last, tokens, atol=2e-4 * np.abs(tokens).max())
    scaled = np.minimum(np.exp(run.params["logit_scale"]), 100) * (volume @ report[:4].T)
    np.testing.assert_allclose(found.logits_per_image.numpy()[:, :4], scaled, atol=1e-4)
    torch.testing.assert_close(found.logits_per_text, found.logits_per_image.T)
    target = torch.arange(5)
    sides = (torch.nn.functional.cross_entropy(x, target) for x in (found.logits_per_image, found.logits_per_text))
    torch.testing.assert_close(found.loss, sum(sides) / 2)
    assert len(found.vision_model_output.hidden_states) == 2 and len(found.text_model_output.hidden_states) == 3
    assert model.config.hidden_size == run.config.model.volume_encoder.sizes.width


def test_a_tokenizers_own_output_and_plain_strings_are_one_sentence(model):
    """What a pipeline of transformers gives, without `sentence_index`; right padding of any length."""
    texts = ["Emphysema is present.", "The heart is normal."]
    plain = model.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        torch.testing.assert_close(model.get_text_features(**plain), model.encode_texts(texts), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_texts(texts), model.encode_texts([[text] for text in texts]))


def test_towers_alone_and_what_is_saved_loads_again(exported, model, tmp_path):
    """A side of the whole folder; a tuned model with its code; activations computed again in the backward pass."""
    with pytest.raises(ValueError, match="tower='image': 'vision' or 'text' is needed"):
        modeling_mg3d.MG3DModel.from_pretrained(exported[1], tower="image")
    run, out = exported[:2]
    volumes, text = torch.from_numpy(volumes_of(run, 2)), model.tokenize(["A cyst.", "No mass."])
    vision, words = (
        kind.from_pretrained(out).eval() for kind in (modeling_mg3d.MG3DVisionModel, modeling_mg3d.MG3DTextModel)
    )
    with torch.no_grad():
        torch.testing.assert_close(vision(volumes).image_embeds, model.get_image_features(volumes))
        torch.testing.assert_close(words(**text).text_embeds, model.get_text_features(**text))
    assert not any(name.startswith("report") for name in vision.state_dict())
    gradients = {}
    for checkpointing in (False, True):
        tuned = modeling_mg3d.MG3DModel.from_pretrained(out, attn_implementation="sdpa").train()
        if checkpointing:
            tuned.gradient_checkpointing_enable()
            assert tuned.volume_encoder.gradient_checkpointing and tuned.report_encoder.gradient_checkpointing
        tuned(volumes, **text, return_loss=True).loss.backward()
        gradients[checkpointing] = {name: x.grad for name, x in tuned.named_parameters() if x.grad is not None}
    torch.testing.assert_close(gradients[True], gradients[False])
    tuned.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "layers_mg3d.py").exists()  # `AutoModel` finds all of the code
    modeling_mg3d.MG3DModel.from_pretrained(tmp_path / "tuned")


def test_zero_shot_is_the_evaluations(exported, model):
    """Probabilities, to the last bits: whatever is computed from them (AUROC, thresholds) is the same."""
    run, settings = exported[0], asked()
    volumes = torch.from_numpy(volumes_of(run, 6))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    embedder = Embedder(state_lib.build(run.config, run.tokenizer.vocab_size, mesh, steps=0), run.tokenizer, 4)
    report = list(scans(1)[1][0])[:6]  # as the mean direction of its sentences
    asked_of = [[[p] for p in settings["classes"][one][side]] for side in ("present", "absent") for one in LABELS]
    rows = embedder.texts(run.params, embedder.tokenize([*asked_of, embedder.report_texts(report)]))
    np.testing.assert_allclose(model.encode_texts([report]).numpy()[0], rows[-1], atol=1e-5)
    with torch.no_grad():
        cosines = model.encode_volume(volumes).double().numpy() @ rows[:-1].astype(float).T
    scale = min(float(np.exp(run.params["logit_scale"])), 100.0)
    expected = 1 / (1 + np.exp(-scale * (cosines[:, :3] - cosines[:, 3:])))
    found = model.zero_shot(volumes)
    np.testing.assert_allclose([[*row.values()] for row in found], expected, atol=1e-5)
    assert list(found[0]) == list(LABELS)
    own = {"Mass": ("A mass.", ["No mass.", "There is no mass."])}
    assert list(model.zero_shot(volumes[:1], own)[0]) == ["Mass"]
    assert model.zero_shot(volumes[:1], ["Cyst"])[0]["Cyst"] == pytest.approx(found[0]["Cyst"], abs=1e-6)
    with pytest.raises(ValueError, match="no prompts for Mass; it has Emphysema"):
        model.zero_shot(volumes, ["Mass"])


def test_wrong_or_missing_tensors_are_named(copied):
    good = load_file(copied / "model.safetensors")
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in good.values())
    name = "volume_encoder.blocks.1.attention.key.weight"
    broken = {
        "missing": {key: value for key, value in good.items() if key != name},
        "unknown": good | {"volume_encoder.extra": torch.zeros(2)},
        "wrong shape": good | {name: torch.zeros(3, 3)},
    }
    for kind, state in broken.items():
        save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=kind) as error:
            modeling_mg3d.MG3DModel.from_pretrained(copied)
        assert ("volume_encoder.extra" if kind == "unknown" else name) in str(error.value)


def test_a_difference_between_the_frameworks_stops_the_export(make_run, tmp_path, monkeypatch):
    run, out = make_run(), tmp_path / "out"
    right = export_lib.export_format.torch_state

    def wrong(params, config):
        state = right(params, config)
        return state | {"report_encoder.embedding_norm.bias": state["report_encoder.embedding_norm.bias"] + 0.01}

    monkeypatch.setattr(export_lib.export_format, "torch_state", wrong)
    with pytest.raises(UserError, match=r"report_embedding .* differ by"):
        export_lib.export(run, out)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not an earlier export"):
        export_lib.export(run, tmp_path / "mine")


def test_the_command_exports_a_checkpoint(make_run, tokenizer_folder, tiny_data, tmp_path, capsys):
    config = config_lib.typed(with_smallest_towers(tiny_builder(tiny_data["train"])))
    workdir, out = tmp_path / "run", tmp_path / "out"
    save_tokenizer(load_tokenizer(str(tokenizer_folder)), workdir / "tokenizer")
    (workdir / "config.json").write_text(config_lib.to_json(config))
    vocab = load_tokenizer(str(tokenizer_folder)).get_vocab_size()
    setup = state_lib.build(config, vocab, sharding.make_mesh(config.mesh), steps=1)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(quick_state(setup), {"step": 3}, 3)
    checkpoints.close()
    for form in ("hf", "monai"):
        command = ["export", "--workdir", str(workdir), "--out", str(out / form), "--format", form]
        assert cli(command) == 0
        assert "differ by at most" in capsys.readouterr().out
        preprocessing = json.loads((out / form / "preprocessor_config.json").read_text())
        assert preprocessing["spacing_mm"] == list(SPACING)  # of the manifest
        assert (preprocessing["orientation"], preprocessing["pad_value_hu"]) == ("RAS", -1024)
        assert "CC-BY-NC-SA-4.0" in (out / form / "README.md").read_text()
    content = json.loads((out / "hf" / "config.json").read_text())
    assert (content["mg3d_jax"]["step"], content["spacing"], content["vocab_size"]) == (3, list(SPACING), vocab)
    evaluated = evaluate(restore_run(workdir), [tiny_data["valid"]], only=["zero_shot"]).document["zero_shot"]
    data = PreparedData((tiny_data["valid"],), volume_size=config.grid)
    records = [data.read(index) for index in range(len(data))]
    scores = (
        modeling_mg3d.MG3DModel.from_pretrained(out / "hf")
        .eval()
        .zero_shot(torch.from_numpy(np.stack([record.volume for record in records])))
    )
    labels = {label: [record.labels[number] for record in records] for number, label in enumerate(data.label_names)}
    for label, present in labels.items():
        if label not in evaluated["classes_without_both_outcomes"]:
            area = roc_auc_score(present, [row[label] for row in scores])
            assert area == pytest.approx(evaluated[f"auroc/{label}"]), label
    assert len(evaluated["classes_without_both_outcomes"]) < 5
    assert cli(["export", "--workdir", str(workdir), "--out", str(out / "hf"), "--step", "9"]) == 2
    assert "/9 cannot be restored" in capsys.readouterr().err
    assert cli(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "is not a training run" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", FOR_MONAI.values(), ids=FOR_MONAI)
def test_monais_vit_loads_the_state_dict_and_gives_the_tokens(make_run, tmp_path, overrides):
    from monai.networks.nets import ViT

    run, out = make_run(**overrides), tmp_path / "out"
    export_lib.export(run, out, "monai")
    vit = ViT(**json.loads((out / "config.json").read_text())["arguments"])
    vit.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    for block in vit.blocks:
        block.mlp.fn = torch.nn.GELU(approximate="tanh")
    rng = np.random.default_rng(0)
    volumes = rng.integers(-1024, 1500, (3, *run.config.model.volume_size)).astype(np.int16)
    windowed = np.moveaxis(np.asarray(step_inputs.window(volumes, run.config.data.windows)), -1, 1)
    with torch.no_grad():
        tokens = vit.eval()(torch.from_numpy(windowed.copy()))[0].numpy()
    model = state_lib.build_model(run.config, 300)
    encode = jax.jit(partial(model.apply, method=lambda m, v: m.volume_encoder(v)["tokens"]))
    expected = encode({"params": run.params}, np.moveaxis(windowed, 1, -1))
    np.testing.assert_allclose(tokens, expected, atol=1e-4)
    card = re.sub(r'\("(?=\w+\.\w+")', f'("{out}/', (out / "README.md").read_text())  # its snippets are executed
    blocks, names = re.findall(r"```python\n(.*?)```", card, re.DOTALL), {"volume": torch.from_numpy(windowed.copy())}
    for block in blocks:
        exec(block, names)
    torch.testing.assert_close(names["tokens"], names["vit"](names["volume"])[0])
    assert len(blocks) == (2 if "twelve" in overrides.values() else 1)
    if len(blocks) == 2:
        assert names["unetr"](names["volume"]).shape == (3, 2, 32, 16, 16)


def test_settings_without_a_place_in_monais_vit_are_named():
    config = tiny_config(**VARIANTS["everything else"], model__volume_encoder__stem="conv")
    with pytest.raises(UserError) as error:
        to_monai({}, config.model)
    for setting in ("stem = 'conv'", "num_registers = 3", "qk_norm = True"):
        assert f"model.volume_encoder.{setting}" in str(error.value)


@pytest.mark.parametrize("size,spacing", [((16, 16, 16), SPACING), ((40, 30, 50), (2.0, 3.5, 1.5))])
def test_prepare_volume_is_what_training_did(tmp_path, size, spacing):
    orientations = set()
    for number, scan in enumerate(scans(4)[0]):
        reconstruction = scan.reconstructions[0]
        orientations.add(reconstruction.orientation)
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(nifti_bytes(reconstruction.hu, reconstruction.affine))
        expected = prepare_volume(path, Grid(size, spacing))
        found, affine = volume_mg3d.prepare_volume(reconstruction.hu, reconstruction.affine, size, spacing)
        assert found.dtype == torch.int16
        assert np.abs(found.numpy().astype(int) - expected.volume).max() <= 1
        np.testing.assert_allclose(affine, expected.affine, atol=1e-3)
    assert orientations == {"RAS", "LPS"}


def test_tokens_are_those_of_training(tokenizer_folder):
    ours, theirs = load_tokenizer(str(tokenizer_folder)), PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    reports = [*scans(6)[1], ("Emphysema.",), (), ("x" * 300, "Unicode: Ödem, 5 µm."), ("One.",) * 40]
    for length, most in ((24, 3), (250, 32)):
        for report in reports:
            row = ReportTokenizer(ours, length, most)(report)
            found = text_mg3d.tokenize(theirs, report, length, most)
            np.testing.assert_array_equal(found["input_ids"][0], row["token_ids"])
            np.testing.assert_array_equal(found["attention_mask"][0], row["token_mask"])
            np.testing.assert_array_equal(found["sentence_index"][0], row["sentence_index"])
    as_string, as_list = (
        text_mg3d.tokenize(theirs, text, 32) for text in ("A cyst. No mass.", ["A cyst.", "No mass."])
    )
    for name, rows in as_list.items():
        torch.testing.assert_close(as_string[name], rows)


@pytest.fixture(scope="module")
def blank():
    """A model from nothing, of no folder."""
    sizes = {f"{tower}_{name}": size for tower in ("volume", "report") for name, size in
             {"width": 32, "depth": 1, "heads": 2, "mlp_dim": 32}.items()}  # fmt: skip
    config = configuration_mg3d.MG3DConfig(volume_size=(16, 16, 16), patch_size=(8, 8, 8), vocab_size=10, **sizes)
    return modeling_mg3d.MG3DModel(config)


def test_encode_volume_says_what_it_wants(blank):
    with pytest.raises(ValueError, match=r"HU \[B, 16, 16, 16\] at 2.8 x 2.8 x 3.5 mm in RAS"):
        blank.encode_volume(torch.zeros(1, 16, 16, 8))
    with pytest.warns(UserWarning, match="takes HU and does the windowing itself"):
        blank.encode_volume(torch.rand(1, 16, 16, 16))
    hu = torch.linspace(-1024, 1000, 16**3).reshape(1, 16, 16, 16)
    with pytest.warns(UserWarning, match=r"no voxel below 0 HU, .* HU \+ 1024\? Subtract 1024"):
        blank.get_image_features((hu + 1024).short())
    with pytest.raises(ValueError, match="voxels that are not finite"):
        blank.encode_volume(torch.where(hu > 900, torch.nan, hu))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blank.encode_volume(hu)
    half = copy.deepcopy(blank).half()
    assert half.window(torch.zeros(1, 16, 16, 16, dtype=torch.int16)).dtype == torch.float16


def test_heads_go_with_the_export(exported, model, tmp_path):
    """A probe of the embeddings, and the head that a run was trained with, against NumPy; the card says how to call them."""
    run, out, lines, probe = exported
    assert any("probability of the probe" in line for line in lines)
    assert any("probability of the trained head" in line for line in lines) and not any(
        "not exported" in x for x in lines
    )
    assert model.config.probe_classes == ["x", "y", "z"] and model.config.head_classes == ["a", "b"]
    hu = torch.from_numpy(volumes_of(run, 2))
    with torch.no_grad():
        expected = model.encode_volume(hu).numpy() @ probe.weight.T + probe.bias
        np.testing.assert_allclose(model.probe_logits(hu).numpy(), expected, atol=1e-4)
        assert model.classification_logits(hu).shape == (2, 2)
    card = (out / "README.md").read_text()
    assert (
        "model.probe_logits(hu[None]).softmax(-1)" in card and "model.classification_logits(hu[None]).sigmoid()" in card
    )
    other = dataclasses.replace(probe, weight=probe.weight[:, 1:])
    with pytest.raises(UserError, match=f"the run's have {run.config.model.projection_dim}"):
        export_lib.export(run, tmp_path / "out", extras=Extras(probe=other))
    with pytest.raises(UserError, match="export it with hf"):
        export_lib.export(run, tmp_path / "other", "monai", Extras(probe=probe))


def test_the_card_is_read_by_programs(exported):
    """Front matter of the hub, with results and their intervals and protocols; licence and requirements beside it."""
    out = exported[1]
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert (about["pipeline_tag"], about["license_name"]) == ("zero-shot-image-classification", "cc-by-nc-sa-4.0")
    assert about["datasets"] == ["ibrahimhamamci/CT-RATE"] and about["language"] == ["en"]
    zero_shot, retrieval = about["model-index"][0]["results"]
    (metric,) = zero_shot["metrics"]
    assert (metric["type"], metric["value"]) == ("auroc_macro", 0.8123) and zero_shot["dataset"]["name"].startswith(
        "valid (20"
    )
    assert "95 % interval 0.7500 to 0.8700; of prompts" in metric["name"]
    assert [one["type"] for one in retrieval["metrics"]] == ["report_to_volume/recall@5"]
    assert "3,210 volumes of 1,234 patients" in text and "| auroc_macro | 0.812 | 0.750 to 0.870 |" in text
    assert "CC-BY-NC-SA-4.0" in (out / "LICENSE").read_text() and "Intended use and limits" in text
    ours = [*(ROOT / "requirements.txt").read_text().split("\n"), "torch>=2.6", "pydicom>=3.0,<4"]
    assert {line.partition("  #")[0] for line in (out / "requirements.txt").read_text().split("\n")} <= {*ours}


def test_licences_of_mixed_data_are_all_named(exported):
    """Each data set, all conditions together, what is not known, and what training began with."""
    assert set(licences.LICENCES) | {"csv", "zip"} == set(SOURCES)
    run = dataclasses.replace(exported[0], sources=("ctrate", "msd-lung", "msd-colon", "acdc"))
    run = dataclasses.replace(run, config=config_lib.replace(run.config, {"init_from.path": "somewhere/first"}))
    front, note = (
        yaml.safe_load(export_front_matter.front_matter(run, None).strip("-")),
        export_front_matter.licence_note(run),
    )
    assert front["license_name"] == "cc-by-nc-sa-4.0-and-cc-by-sa-4.0-and-not-known-and-that-of-its-first-weights"
    assert front["license_link"] == "LICENSE" and note.count("Segmentation Decathlon's layout") == 1
    assert "ACDC's layout. Its licence is not known here: look it up (https://www.creatis" in note
    assert (
        "only non-commercial use, because of CT-RATE; to be passed on under the same licence, because of CT-RATE and"
        in note
    )
    assert (
        "Until the terms of ACDC are known, do not pass them on." in note
        and "began with the weights of 'first'" in note
    )
    merlin = licences.note(["merlin"])
    assert (
        "gated and under an agreement" in merlin and "non-commercial purposes and be passed on only as that" in merlin
    )


def test_without_heads_their_methods_say_so(blank):
    model = blank
    for method, says in ((model.probe_logits, "mg3d export --probe"), (model.classification_logits, "without a class")):
        with pytest.raises(ValueError, match=says):
            method(torch.zeros(1, 16, 16, 16))
    with pytest.raises(ValueError, match="not loaded from a folder"):
        model.zero_shot(torch.zeros(1, 16, 16, 16))


RECEIVES = """
import json, os, re, sys
for name in ("jax", "jaxlib", "flax", "orbax", "mg3d_jax"):
    sys.modules[name] = None  # importing it raises ImportError
import nibabel, numpy as np, torch, transformers
print("transformers", transformers.__version__)
from transformers import AutoImageProcessor, AutoModel, AutoModelForTextEncoding, AutoProcessor, AutoTokenizer, pipeline
folder, data = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
found = {}
for name in json.load(open(f"{data}/scans.json")):
    found[name] = processor(f"{data}/{name}")["pixel_values"].numpy()
scan = f"{data}/lps.nii.gz"
image = nibabel.load(scan)
found["array"] = processor((np.asarray(image.dataobj), image.affine))["pixel_values"].numpy()
AutoTokenizer.from_pretrained(folder)  # asks nothing
inputs = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(images=scan, text=["No nodule.", ["A.", "B."]])
found["both"] = inputs["pixel_values"].numpy()
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    output = model(**inputs)
found |= {"volume": output.image_embeds.numpy(), "texts": output.text_embeds.numpy()}
AutoModelForTextEncoding.from_pretrained(folder, trust_remote_code=True)  # which must not change what is saved below
towers = {one: AutoModel.from_pretrained(folder, trust_remote_code=True, tower=one) for one in ("vision", "text")}
towers["text"].save_pretrained(f"{data}/text")
alone = AutoModel.from_pretrained(f"{data}/text", trust_remote_code=True)
assert [type(one).__name__ for one in (*towers.values(), alone)] == ["MG3DVisionModel", "MG3DTextModel", "MG3DTextModel"]
found["volume again"] = towers["vision"].encode_volume(inputs["pixel_values"]).detach().numpy()
found["texts again"] = alone.encode_texts(["No nodule."]).numpy()
scores = model.zero_shot(scan)
pipe = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
piped = {one["label"]: one["score"] for one in pipe(scan)}
assert piped.keys() == scores.keys() and all(abs(piped[one] - scores[one]) < 1e-6 for one in scores), (piped, scores)
chosen = pipe(scan, candidate_labels=["Cyst", "Mass"], hypothesis_template="{} is present.")
assert {one["label"] for one in chosen} == {"Cyst", "Mass"} and chosen[0]["score"] >= chosen[1]["score"], chosen
assert abs({one["label"]: one["score"] for one in chosen}["Cyst"] - scores["Cyst"]) < 1e-6
np.savez(f"{data}/outputs.npz", **found)
sys.path.insert(0, folder)
os.chdir(folder)
blocks = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
for block in blocks:
    exec(block, {})
assert len(blocks) == 5 and AutoModel.from_pretrained("tuned", trust_remote_code=True).zero_shot(scan).keys() == scores.keys()
import verify_mg3d
assert verify_mg3d.main() == 0
with open(f"{folder}/mg3d_resample.py", "a") as file:
    file.write("# changed")
assert verify_mg3d.main() == 1
try:
    processor((np.where(image.get_fdata() > 100, np.nan, 0.0), image.affine))
except Exception as error:
    print(error)
assert not any(name.split(".")[0] in ("jax", "mg3d_jax") and m is not None for name, m in sys.modules.items())
"""


def received(out, tmp_path, cases, others=""):
    """What a process without this package and without JAX makes of these scans and the folder: arrays, and its output.

    Args:
        others: a folder with other versions of packages.
    """
    data = tmp_path / "data"
    data.mkdir()
    for name, (voxels, place) in cases.items():
        (data / name).write_bytes(nifti_bytes(voxels, place))
    (data / "scans.json").write_text(json.dumps(sorted(cases)))
    command = [sys.executable, "-c", RECEIVES, str(out), str(data)]
    environ = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH=others)
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=400, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return data, np.load(data / "outputs.npz"), done.stdout


def of_oldest():
    """The folder of `launch/old_transformers.sh`; the test is skipped where there is none."""
    folder = Path(os.environ.get("MG3D_OLD_TRANSFORMERS") or ROOT / ".venvs" / "old_transformers")
    if not (folder / "transformers").is_dir():
        pytest.skip("no MG3D_OLD_TRANSFORMERS=FOLDER and no .venvs: bash launch/old_transformers.sh makes one")
    return str(folder)


@pytest.mark.parametrize("transformers", ["installed", "oldest"])
def test_a_colleague_without_jax(exported, copied, tmp_path, transformers):
    """Voxels as `mg3d prepare` makes them (centred or not, stored as HU + 1024 or not, askew or not), and what the model
    makes of them, by every way that transformers has."""
    run = exported[0]
    hu, affine = scans(1)[0][0].reconstructions[0].hu, scans(1)[0][0].reconstructions[0].affine
    hu = np.pad(hu, ((0, 30), (0, 0), (0, 0)), constant_values=-1024)
    turn = np.array([[0.97, -0.26, 0, 0], [0.26, 0.97, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    cases = {
        "lps.nii.gz": (hu, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine),
        "raised.nii.gz": (hu + 1024, affine),
        "askew.nii.gz": (hu, turn @ affine),
    }
    write_dicom(copied / "series")  # the card's snippets are executed, and one reads such a folder
    data, found, said = received(copied, tmp_path, cases, of_oldest() if transformers == "oldest" else "")
    oldest = re.search(r"transformers>=([0-9.]+)", (ROOT / "requirements.txt").read_text())[1]
    assert transformers == "installed" or f"transformers {oldest}." in said
    assert "the array given: cannot be used" in said and "finite" in said
    assert "verified" in said and "zero_shot: differs" in said and "not as exported: mg3d_resample.py" in said
    for name in cases:
        np.testing.assert_array_equal(found[name][0], prepare_volume(data / name, run.grid).volume, err_msg=name)
    np.testing.assert_array_equal(found["array"], found["lps.nii.gz"])
    np.testing.assert_array_equal(found["both"], found["lps.nii.gz"])
    text = modeling_mg3d.MG3DModel.from_pretrained(exported[1]).tokenize([["No nodule."], ["A.", "B."]])
    volume, report, _ = linen(run, found["both"], text)
    np.testing.assert_allclose(found["volume"], volume, atol=1e-5)
    np.testing.assert_allclose(found["volume again"], volume, atol=1e-5)
    np.testing.assert_allclose(found["texts"], report, atol=1e-5)
    np.testing.assert_allclose(found["texts again"], report[:1], atol=1e-5)
    with pytest.raises(ValueError, match="AutoImageProcessor"):
        modeling_mg3d.MG3DModel.from_pretrained(exported[1]).prepare_volume(hu, affine)


def test_every_module_names_all_files_that_it_needs(tmp_path):
    """Of a local folder, transformers before 5 copies only the files that the loaded one names, not those which these need; and
    it asks for packages that are imported at the top, which the optional ones are not."""
    export_preparation.write(tmp_path, (*export_preparation.MODULES, "modeling_mg3d_tasks"))
    texts = {file.stem: file.read_text() for file in tmp_path.glob("*.py")}
    named = {name: set(re.findall(r"^ *from \.(\w+) import ", text, re.MULTILINE)) for name, text in texts.items()}
    for name in named:
        todo, needed = [name], set()
        while todo:
            needed |= (new := named[todo.pop()] - needed)
            todo += new
        assert needed - {name} <= named[name] and needed <= named.keys(), name
        for line in texts[name].split("\n"):
            assert not re.match(r"(import|from) (jax|flax|monai|mg3d_jax|pydicom|pandas)\b", line), f"{name}: {line}"


@pytest.mark.parametrize("policy", ["center", "body", "lung"])
def test_a_real_scan_is_brought_to_the_grid_as_prepare_does(shared_data, tmp_path, policy):
    """By the exported code alone; zero-shot and all else start from these voxels."""
    export_preparation.write(tmp_path)
    module, size, spacing = export_preparation.load(tmp_path), (48, 40, 44), (6.0, 7.0, 7.5)
    processor = module.MG3DImageProcessor(size_voxels=size, spacing_mm=spacing, policy=policy)
    file = shared_data / "ct" / "totalseg_example_ct.nii.gz"
    found = processor(str(file), return_tensors="np")["pixel_values"][0]
    expected = prepare_volume(file, Grid(size, spacing, policy)).volume
    np.testing.assert_array_equal(found, expected)
    assert found.std() > 100
    with pytest.raises(module.UserError, match="cannot be used"):  # a label map is no CT
        processor(str(file.with_name("totalseg_example_ct_labels.nii.gz")))


def test_a_fixed_share_of_each_axis(make_run, tmp_path):
    """Policy `fraction`, whose spacing varies: the export itself compares the processor with the preparation."""
    export_lib.export(make_run("fraction"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["spacing_mm"] is None


def test_preprocessing_that_is_not_the_preparations_is_refused(make_run, tmp_path, monkeypatch):
    run = make_run("lung")
    told = export_lib.export_preparation.preprocessor_config
    monkeypatch.setattr(
        export_lib.export_preparation, "preprocessor_config", lambda run: told(run) | {"policy": "center"}
    )
    with pytest.raises(UserError, match=r"other voxels than a preparation by Grid\(.*'lung'"):
        export_lib.export(run, tmp_path / "out")


def test_an_export_takes_the_place_of_an_earlier_one(exported, copied):
    (copied / "files.txt").write_text((copied / "files.txt").read_text() + "stale.py\n")
    (copied / "stale.py").write_text("of an earlier version")
    (copied / "mine.txt").write_text("notes")
    export_lib.export(exported[0], copied)
    assert not (copied / "stale.py").exists() and (copied / "mine.txt").exists()
    written = (copied / "files.txt").read_text().split()
    assert {oct((copied / name).stat().st_mode & 0o777) for name in written} == {"0o644"}


@pytest.mark.parametrize("fault", ["windows", "heads", "nan", "tokenizer"])
def test_what_does_not_belong_together_is_an_error_at_load(copied, tmp_path, fault):
    """None of these changes a shape, and each gave numbers without a word."""
    out = copied
    config, load = json.loads((out / "config.json").read_text()), modeling_mg3d.MG3DModel.from_pretrained
    if fault == "nan":
        state = load_file(out / "model.safetensors")
        state["volume_projection.weight"][0, 0] = float("nan")
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        says = "weights that are not finite: volume_projection.weight"
    elif fault == "tokenizer":
        other = tmp_path / "other"
        save_tokenizer(train_wordpiece(["an entirely different vocabulary."], 60), other)
        with pytest.raises(ValueError, match="another vocabulary"):
            load(out).encode_texts([["Emphysema."]], PreTrainedTokenizerFast.from_pretrained(other))
        return
    else:
        key, value = ("windows", config["windows"][::-1]) if fault == "windows" else ("volume_heads", 1)
        (out / "config.json").write_text(json.dumps(config | {key: value}))
        assert load(out, check_config=False).config.to_dict()[key] == value
        says = f"{key} = .*, not "
    with pytest.raises(ValueError, match=says):
        load(out)
