"""Exported weights against the Linen model: Hugging Face folder, MONAI state dict, geometry and tokens without JAX."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import environment, quick_state, tiny_config

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.commands import main as cli
from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.embed import Embedder
from mg3d_jax.interop import export as export_lib
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_run import Run
from mg3d_jax.interop.torch_template import modeling_mg3d
from mg3d_jax.models.mg3d import text_embedding, volume_embedding
from mg3d_jax.models.towers.vit.monai import to_monai
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.dataset import nifti_bytes
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.reports import report_sentences
from mg3d_jax.prepare.volumes import prepare_volume
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.checkpoints import Checkpoints

SPACING = (20.0, 18.0, 20.0)
ENCODER = "model__volume_encoder__"
VARIANTS = {
    "linear": {},
    "conv, two windows, groups of sentences": {
        ENCODER + "stem": "conv", "data__windows": ((-1000.0, 1000.0), (-150.0, 250.0)),
        "objectives__alignment__report_view": "subsets",
    },
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
FOR_MONAI = {
    "sincos": {},
    "learned, mean, two windows": {
        ENCODER + "positions": "learned", ENCODER + "pooling": "mean", ENCODER + "patch_size": (8, 4, 16),
        "data__windows": ((-1000.0, 1000.0), (-150.0, 250.0)),
    },
}  # fmt: skip


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
    """A run with random weights, none of them zero or one: an untrained bias or scale would hide a mix-up."""

    def make(policy="center", **overrides):
        config = tiny_config(**overrides)
        model = state_lib.build_model(config, load_tokenizer(str(tokenizer_folder)).get_vocab_size())
        shapes = jax.eval_shape(model.init, jax.random.key(0), step_inputs.dummy_inputs(model))["params"]
        rng = np.random.default_rng(1)
        params = jax.tree.map(lambda x: np.float32(0.15 * rng.standard_normal(x.shape)), state_lib.nn.unbox(shapes))
        return Run(config, params, tokenizer_folder, 7, Grid(config.grid, SPACING, policy), ("ctrate",))

    return make


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
def test_the_exported_model_gives_the_embeddings_of_the_linen_model(make_run, tmp_path, overrides):
    run = make_run(**overrides)
    export_lib.export(run, tmp_path / "out")
    model = modeling_mg3d.MG3DModel.from_pretrained(tmp_path / "out").eval()
    hf_tokenizer = modeling_tokenizer(tmp_path / "out")
    text = model.tokenize(hf_tokenizer, [*scans()[1], ["Emphysema is present."], []])
    rng = np.random.default_rng(0)
    volumes = rng.integers(-1024, 1500, (5, *run.config.model.volume_size)).astype(np.int16)
    volume, report, tokens = linen(run, volumes, text)
    with torch.no_grad():
        found = model(torch.from_numpy(volumes), **text)
    np.testing.assert_allclose(found.volume_embedding.numpy(), volume, atol=1e-5)
    np.testing.assert_allclose(found.report_embedding.numpy()[:4], report[:4], atol=1e-5)
    assert np.isfinite(found.report_embedding.numpy()).all()  # also of a report without a sentence
    np.testing.assert_allclose(found.volume_tokens.numpy(), tokens, atol=2e-4 * np.abs(tokens).max())
    expected = np.exp(run.params["logit_scale"]) * (volume @ report[:4].T) + run.params.get("logit_bias", 0)
    np.testing.assert_allclose(found.logits_per_volume.numpy()[:, :4], expected, atol=1e-4)


def modeling_tokenizer(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


WITHOUT_JAX = """
import sys
for name in ("jax", "jaxlib", "flax", "orbax", "mg3d_jax"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np, torch
from transformers import AutoModel, AutoTokenizer
folder, data = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = np.load(f"{data}/inputs.npz")
hu, affine = model.prepare_volume(inputs["hu"], inputs["affine"])
with torch.no_grad():
    volume = model.encode_volume(hu[None])
texts = model.encode_texts(tokenizer, [["Emphysema is present."], ["No pleural effusion.", "The heart is normal."]])
np.savez(f"{data}/outputs.npz", hu=hu, volume=volume, texts=texts)
assert not any(name.split(".")[0] in ("jax", "mg3d_jax") and m is not None for name, m in sys.modules.items())
"""


def test_a_colleague_without_jax_loads_it_in_one_line(make_run, tmp_path):
    run = make_run(**VARIANTS["conv, two windows, groups of sentences"])
    out = tmp_path / "out"
    export_lib.export(run, out)
    reconstruction = scans(1)[0][0].reconstructions[0]
    np.savez(tmp_path / "inputs.npz", hu=reconstruction.hu, affine=reconstruction.affine)
    command = [sys.executable, "-c", WITHOUT_JAX, str(out), str(tmp_path)]
    environ = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH="")
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "outputs.npz")
    tokenizer = ReportTokenizer(load_tokenizer(str(run.tokenizer_folder)), 24, 16)
    rows = [tokenizer([text]) for text in ("Emphysema is present.", "No pleural effusion.", "The heart is normal.")]
    names = {"input_ids": "token_ids", "attention_mask": "token_mask", "sentence_index": "sentence_index"}
    text = {name: torch.from_numpy(np.stack([row[ours] for row in rows])) for name, ours in names.items()}
    volume, report, _ = linen(run, found["hu"][None], text)
    np.testing.assert_allclose(found["volume"], volume, atol=1e-5)
    mean = report[1:].mean(0)  # it was trained on single sentences: a text of two is their mean direction
    np.testing.assert_allclose(found["texts"], [report[0], mean / np.linalg.norm(mean)], atol=1e-5)


def test_wrong_or_missing_tensors_are_named(make_run, tmp_path):
    out = tmp_path / "out"
    export_lib.export(make_run(), out)
    good = load_file(out / "model.safetensors")
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in good.values())
    name = "volume_encoder.blocks.1.attention.key.weight"
    broken = {
        "missing": {key: value for key, value in good.items() if key != name},
        "unknown": good | {"volume_encoder.extra": torch.zeros(2)},
        "wrong shape": good | {name: torch.zeros(3, 3)},
    }
    for kind, state in broken.items():
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=kind) as error:
            modeling_mg3d.MG3DModel.from_pretrained(out)
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


def test_the_command_exports_a_checkpoint(tokenizer_folder, tiny_data, tmp_path, capsys):
    config = tiny_config(tiny_data["train"], model__dtype="bfloat16")
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
        assert cli.main(command) == 0
        assert cli.main(command) == 0  # an earlier export is replaced
        assert "differ by at most" in capsys.readouterr().out
        preprocessing = json.loads((out / form / "preprocessor_config.json").read_text())
        assert preprocessing["spacing_mm"] == list(SPACING)  # of the manifest
        assert (preprocessing["orientation"], preprocessing["pad_value_hu"]) == ("RAS", -1024)
        assert "CC-BY-NC-SA-4.0" in (out / form / "README.md").read_text()
    content = json.loads((out / "hf" / "config.json").read_text())
    assert (content["mg3d_jax"]["step"], content["spacing"], content["vocab_size"]) == (3, list(SPACING), vocab)
    assert cli.main(["export", "--workdir", str(workdir), "--out", str(out / "hf"), "--step", "9"]) == 2
    assert "/9 cannot be restored" in capsys.readouterr().err
    assert cli.main(["export", "--workdir", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
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
    volumes = rng.integers(-1024, 1500, (3, 16, 16, 16)).astype(np.int16)
    windowed = np.moveaxis(np.asarray(step_inputs.window(volumes, run.config.data.windows)), -1, 1)
    with torch.no_grad():
        tokens = vit.eval()(torch.from_numpy(windowed.copy()))[0].numpy()
    model = state_lib.build_model(run.config, 300)
    encode = jax.jit(partial(model.apply, method=lambda m, v: m.volume_encoder(v)["tokens"]))
    expected = encode({"params": run.params}, np.moveaxis(windowed, 1, -1))
    np.testing.assert_allclose(tokens, expected, atol=1e-4)


def test_settings_without_a_place_in_monais_vit_are_named():
    config = tiny_config(**VARIANTS["everything else"], model__volume_encoder__stem="conv")
    with pytest.raises(UserError) as error:
        to_monai({}, config.model)
    for setting in ("stem = 'conv'", "num_registers = 3", "qk_norm = True", "layer_scale = 0.1"):
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
        found, affine = modeling_mg3d.prepare_volume(reconstruction.hu, reconstruction.affine, size, spacing)
        assert found.dtype == torch.int16
        assert np.abs(found.numpy().astype(int) - expected.volume).max() <= 1
        np.testing.assert_allclose(affine, expected.affine, atol=1e-3)
    assert orientations == {"RAS", "LPS"}


def test_tokens_are_those_of_training(tokenizer_folder):
    ours, theirs = load_tokenizer(str(tokenizer_folder)), modeling_tokenizer(tokenizer_folder)
    reports = [*scans(6)[1], ("Emphysema.",), (), ("x" * 300, "Unicode: Ödem, 5 µm."), ("One.",) * 40]
    for length, most in ((24, 3), (250, 32)):
        for report in reports:
            row = ReportTokenizer(ours, length, most)(report)
            found = modeling_mg3d.tokenize(theirs, report, length, most)
            np.testing.assert_array_equal(found["input_ids"][0], row["token_ids"])
            np.testing.assert_array_equal(found["attention_mask"][0], row["token_mask"])
            np.testing.assert_array_equal(found["sentence_index"][0], row["sentence_index"])
    with pytest.raises(TypeError, match="list of sentences"):
        modeling_mg3d.tokenize(theirs, "Emphysema.", 32)


def test_a_report_is_the_mean_direction_of_its_sentences(make_run, tmp_path):
    run = make_run(objectives__alignment__report_view="subsets")
    export_lib.export(run, tmp_path / "out")
    model = modeling_mg3d.MG3DModel.from_pretrained(tmp_path / "out").eval()
    hf_tokenizer = modeling_tokenizer(tmp_path / "out")
    report = list(scans(1)[1][0])[:6]
    with torch.no_grad():
        directions = model._direction(**model.tokenize(hf_tokenizer, [[sentence] for sentence in report]))[0]
    expected = torch.nn.functional.normalize(directions.mean(0) + model.report_direction_bias, dim=0)
    found = model.encode_texts(hf_tokenizer, [report])
    torch.testing.assert_close(found[0], expected)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    setup = state_lib.build(run.config, run.tokenizer.vocab_size, mesh, steps=0)
    ours = Embedder(setup, run.tokenizer, 4)
    embedded = ours.texts(run.params, ours.tokenize([ours.report_texts(report)]))
    np.testing.assert_allclose(found.numpy(), embedded, atol=1e-5)


def test_encode_volume_says_what_it_wants(make_run):
    config = modeling_mg3d.MG3DConfig(
        volume_size=(16, 16, 16), patch_size=(8, 8, 8), volume_depth=1, report_depth=1, vocab_size=10
    )
    model = modeling_mg3d.MG3DModel(config)
    with pytest.raises(ValueError, match=r"HU \[B, 16, 16, 16\] at 2.8 x 2.8 x 3.5 mm in RAS"):
        model.encode_volume(torch.zeros(1, 16, 16, 8))
    with pytest.warns(UserWarning, match="takes HU and does the windowing itself"):
        model.encode_volume(torch.rand(1, 16, 16, 16))
    assert model.half().window(torch.zeros(1, 16, 16, 16, dtype=torch.int16)).dtype == torch.float16


def test_a_swin_is_refused(tokenizer_folder, tmp_path):
    swin = {"kind": "swin", "preset": "swin-nano", "patch_size": (16, 16, 16)}
    config = tiny_config(**{ENCODER + key: value for key, value in swin.items()})
    for form in export_lib.FORMATS:
        with pytest.raises(
            UserError, match="is a swin, which cannot be exported: its PyTorch form is MONAI's SwinUNETR"
        ):
            export_lib.export(
                Run(config, {}, tokenizer_folder, 7, Grid(config.grid, SPACING), ()), tmp_path / "out", form
            )
    assert not (tmp_path / "out").exists()


def test_heads_go_with_the_export(make_run, tmp_path, capsys):
    """A probe of the embeddings, and the head that a run was trained with, against NumPy; the card says how to call them."""
    run = make_run(tasks__classification__weight=1.0, tasks__classification__num_labels=2)
    run = dataclasses.replace(run, label_names=("a", "b"))
    rng = np.random.default_rng(3)
    k = run.config.model.projection_dim
    probe = Probe(rng.normal(size=(3, k)).astype("f"), rng.normal(size=3).astype("f"), ("x", "y", "z"), "multi_class")
    lines = export_lib.export(run, tmp_path / "out", probe=probe)
    assert any("probability of the probe" in line for line in lines)
    assert any("probability of the trained head" in line for line in lines) and not any(
        "not exported" in x for x in lines
    )
    model = modeling_mg3d.MG3DModel.from_pretrained(tmp_path / "out").eval()
    assert model.config.probe_classes == ["x", "y", "z"] and model.config.head_classes == ["a", "b"]
    hu = torch.from_numpy(rng.integers(-1024, 1500, (2, *run.config.model.volume_size)).astype(np.int16))
    with torch.no_grad():
        expected = model.encode_volume(hu).numpy() @ probe.weight.T + probe.bias
        np.testing.assert_allclose(model.probe_logits(hu).numpy(), expected, atol=1e-4)
        assert model.classification_logits(hu).shape == (2, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "model.probe_logits(hu[None]).softmax(-1)" in card and "model.classification_logits(hu[None]).sigmoid()" in card
    )
    with pytest.raises(UserError, match=f"the run's have {k}"):
        export_lib.export(run, tmp_path / "out", probe=dataclasses.replace(probe, weight=probe.weight[:, 1:]))
    with pytest.raises(UserError, match="export it with hf"):
        export_lib.export(run, tmp_path / "other", "monai", probe=probe)


def test_without_heads_their_methods_say_so(make_run, tmp_path):
    export_lib.export(make_run(), tmp_path / "out")
    model = modeling_mg3d.MG3DModel.from_pretrained(tmp_path / "out")
    for method, says in ((model.probe_logits, "mg3d export --probe"), (model.classification_logits, "without a class")):
        with pytest.raises(ValueError, match=says):
            method(torch.zeros(1, 16, 16, 16))


RECEIVES = """
import json, os, sys
for name in ("jax", "jaxlib", "flax", "orbax", "mg3d_jax"):
    sys.modules[name] = None  # importing it raises ImportError
import nibabel, numpy as np
from transformers import AutoImageProcessor, AutoProcessor
folder, data = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
found = {}
for name in json.load(open(f"{data}/scans.json")):
    found[name] = processor(f"{data}/{name}")["volume"].numpy()
image = nibabel.load(f"{data}/lps.nii.gz")
found["array"] = processor((np.asarray(image.dataobj), image.affine))["volume"].numpy()
both = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(images=f"{data}/lps.nii.gz", text=["No nodule."])
found["both"], found["ids"] = both["volume"].numpy(), both["input_ids"].numpy()
np.savez(f"{data}/outputs.npz", **found)
sys.path.insert(0, folder)
import verify_mg3d
assert verify_mg3d.main() == 0
with open(f"{folder}/mg3d_resample.py", "a") as file:
    file.write("# changed")
assert verify_mg3d.main() == 1
try:
    processor((np.where(image.get_fdata() > 100, np.nan, 0.0), image.affine))
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("policy", ["lung", "fraction"])
def test_the_exported_processor_gives_the_voxels_of_prepare(make_run, tmp_path, policy):
    """Without this package and without JAX: centred or not, stored as HU + 1024 or not, askew or not."""
    run, out, data = make_run(policy), tmp_path / "out", tmp_path / "data"
    export_lib.export(run, out)
    data.mkdir()
    hu, affine = scans(1)[0][0].reconstructions[0].hu, scans(1)[0][0].reconstructions[0].affine
    hu = np.pad(hu, ((0, 30), (0, 0), (0, 0)), constant_values=-1024)
    turn = np.array([[0.97, -0.26, 0, 0], [0.26, 0.97, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    cases = {
        "lps.nii.gz": (hu, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine),
        "raised.nii.gz": (hu + 1024, affine),
        "askew.nii.gz": (hu, turn @ affine),
    }
    for name, (voxels, place) in cases.items():
        (data / name).write_bytes(nifti_bytes(voxels, place))
    (data / "scans.json").write_text(json.dumps(sorted(cases)))
    command = [sys.executable, "-c", RECEIVES, str(out), str(data)]
    environ = environment(HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH="")
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the array given: cannot be used" in done.stdout and "finite" in done.stdout
    assert "verified" in done.stdout and "not as exported: mg3d_resample.py" in done.stdout
    found = np.load(data / "outputs.npz")
    for name in cases:
        np.testing.assert_array_equal(found[name][0], prepare_volume(data / name, run.grid).volume, err_msg=name)
    np.testing.assert_array_equal(found["array"], found["lps.nii.gz"])
    np.testing.assert_array_equal(found["both"], found["lps.nii.gz"])
    assert found["ids"].shape[0] == 1
    with pytest.raises(ValueError, match="AutoImageProcessor"):
        modeling_mg3d.MG3DModel.from_pretrained(out).prepare_volume(hu, affine)


def test_preprocessing_that_is_not_the_preparations_is_refused(make_run, tmp_path, monkeypatch):
    run = make_run("lung")
    told = export_lib.export_preparation.preprocessor_config
    monkeypatch.setattr(
        export_lib.export_preparation, "preprocessor_config", lambda run: told(run) | {"policy": "center"}
    )
    with pytest.raises(UserError, match=r"other voxels than a preparation by Grid\(.*'lung'"):
        export_lib.export(run, tmp_path / "out")


def test_an_export_takes_the_place_of_an_earlier_one(make_run, tmp_path):
    out = tmp_path / "out"
    export_lib.export(make_run(), out)
    (out / "files.txt").write_text((out / "files.txt").read_text() + "stale.py\n")
    (out / "stale.py").write_text("of an earlier version")
    (out / "mine.txt").write_text("notes")
    export_lib.export(make_run(), out)
    assert not (out / "stale.py").exists() and (out / "mine.txt").exists()
    written = (out / "files.txt").read_text().split()
    assert {oct((out / name).stat().st_mode & 0o777) for name in written} == {"0o644"}


@pytest.mark.parametrize("fault", ["windows", "heads", "nan", "tokenizer"])
def test_what_does_not_belong_together_is_an_error_at_load(make_run, tmp_path, fault):
    """None of these changes a shape, and each gave numbers without a word."""
    run, out = make_run(**FOR_MONAI["learned, mean, two windows"]), tmp_path / "out"
    export_lib.export(run, out)
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
            load(out).encode_texts(modeling_tokenizer(other), [["Emphysema."]])
        return
    else:
        key, value = ("windows", config["windows"][::-1]) if fault == "windows" else ("volume_heads", 1)
        (out / "config.json").write_text(json.dumps(config | {key: value}))
        assert load(out, check_config=False).config.to_dict()[key] == value
        says = f"{key} = .*, not "
    with pytest.raises(ValueError, match=says):
        load(out)
