"""Exports in other forms (BERT, ONNX, torch.export, bfloat16, several files, MONAI's Swin), and the way back."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
import torch
from exported_runs import random_run, small_tokenizer
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import tiny_config

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.commands.main import main as cli
from mg3d_jax.config.parts import InitConfig
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.probes import HEAD_FILE, load_head
from mg3d_jax.interop import export as export_lib
from mg3d_jax.interop import export_options, import_model, state_dict
from mg3d_jax.interop.export_format import Probe
from mg3d_jax.interop.export_options import Extras
from mg3d_jax.interop.hugging_face import load_checkpoint
from mg3d_jax.interop.sources import open_source
from mg3d_jax.interop.torch_template import modeling_mg3d
from mg3d_jax.interop.warm_start import account
from mg3d_jax.models.towers import bert, swin, vit
from mg3d_jax.training import state as state_lib

ENCODER = "model__volume_encoder__"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def run(tokenizer_folder):
    """With layer scale, two windows, learned positions, a head, and report directions that were centred."""
    yield random_run(
        tokenizer_folder, tasks__classification__weight=1.0, tasks__classification__num_labels=2,
        objectives__alignment__report_view="subsets", data__windows=((-1000.0, 1000.0), (-150.0, 250.0)),
        **{ENCODER + "positions": "learned", ENCODER + "layer_scale": 0.1, ENCODER + "num_registers": 2},
    )  # fmt: skip
    del vit.PRESETS["smallest"], bert.PRESETS["smallest"]
    swin.PRESETS.pop("four", None)


def said(lines):
    """The largest of the differences that an export names."""
    return max(float(found) for line in lines for found in re.findall(r"differ by at most (\S+)", line))


def test_the_report_encoder_is_a_bert_of_transformers(run, tmp_path):
    """Which the export runs beside ours; read again, its arrays are the run's."""
    assert said(export_lib.export(run, tmp_path / "bert", "bert")) < 1e-4
    again = load_checkpoint(str(tmp_path / "bert"), bert.BERT.forms["bert"], run.tokenizer.tokenizer.get_vocab())
    ours = flatten_dict(run.params["report_encoder"], sep="/")
    for name, array in flatten_dict(again.params, sep="/").items():
        np.testing.assert_array_equal(array, ours[name], err_msg=name)
    assert not (tmp_path / "bert" / "preprocessor_config.json").exists()


TASKS = {  # beside the classification head
    "tasks__segmentation__weight": 1.0, "tasks__segmentation__num_classes": 3, "model__segmentation_decoder__width": 4,
    "tasks__generation__weight": 1.0, "model__report_decoder__width": 32, "model__report_decoder__depth": 1,
    "model__report_decoder__num_heads": 4, "tasks__classification__weight": 1.0, "tasks__classification__num_labels": 2,
    "objectives__alignment__weight": 0.0,
}  # fmt: skip
GRAPHS = {  # of the encoders, and of what a run was fine-tuned for: their outputs
    "volume_encoder": ["image_embeds", "last_hidden_state", "classification_logits"],
    "report_encoder": ["text_embeds"],
    "segmenter": ["segmentation_logits"],
    "report_decoder": ["next_token_logits"],
}


def snippet(folder):
    """Of the card, as if it ran in that folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    found = {}
    exec(code.replace('("volume', f'("{folder}/volume'), found)
    return found["embedding"]


def test_onnx_takes_float_and_int16_any_batch_and_has_all_heads(run, tokenizer_folder, tmp_path):
    """The export runs every graph beside the Linen model, with two sizes of batches."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    import onnxruntime

    tuned, out = random_run(tokenizer_folder, **TASKS), tmp_path / "out"
    assert said(export_lib.export(tuned, out, "onnx")) < 1e-5
    for name, outputs in GRAPHS.items():
        session = onnxruntime.InferenceSession(str(out / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == outputs
    assert {file.stem for file in out.glob("*_int16.onnx")} == {"volume_encoder_int16", "segmenter_int16"}
    assert snippet(out).shape == (2, tuned.config.model.projection_dim) and (out / "tokenizer.json").exists()
    assert "sliding_window_inference" in (out / "README.md").read_text()


def test_programs_take_float_and_int16_and_any_batch(run, tmp_path):
    assert said(export_lib.export(run, tmp_path / "out", "pt2")) < 1e-5
    names = {file.stem for file in (tmp_path / "out").glob("*.pt2")}
    assert names == {"volume_encoder", "volume_encoder_int16", "report_encoder"}
    assert tuple(snippet(tmp_path / "out").shape) == (2, run.config.model.projection_dim)


def test_half_the_bytes_in_several_files_and_back(run, tmp_path):
    """bfloat16 values are exact on both sides; a tampered setting is noticed; `mg3d import hf` gives the rounded run."""
    out = tmp_path / "out"
    lines = export_lib.export(run, out, extras=Extras(dtype="bf16", shard_size="50KB"))
    assert said(lines) < 1e-5
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 1 and not (out / "model.safetensors").exists()
    with safe_open(files[0], framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    load = modeling_mg3d.MG3DModel.from_pretrained
    wide = load(out, torch_dtype=torch.bfloat16).eval()
    hu = torch.from_numpy(np.random.default_rng(0).integers(-1024, 1500, (2, 16, 16, 16)).astype(np.int16))
    with torch.no_grad():
        near = torch.nn.functional.cosine_similarity(wide.encode_volume(hu), load(out).float().encode_volume(hu))
    assert wide.dtype == torch.bfloat16 and near.min() > 0.99
    model = import_model.read_model(out)
    for name, array in flatten_dict(model.params, sep="/").items():
        before = flatten_dict(run.params, sep="/")[name]
        np.testing.assert_array_equal(array, np.asarray(before, jax.numpy.bfloat16).astype("f"), err_msg=name)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"volume_heads": 1}))
    with pytest.raises(ValueError, match="volume_heads = 1, not 2"):
        load(out)
    with pytest.raises(UserError, match="--shard-size 5 miles"):
        export_options.shard_bytes("5 miles")


def test_a_tuned_folder_comes_back(run, tmp_path, capsys):
    """From transformers' `save_pretrained`, to the last bit; `init_from` takes all of it; the keys are printed."""
    rng, k = np.random.default_rng(3), run.config.model.projection_dim
    probe = Probe(rng.normal(size=(3, k)).astype("f"), rng.normal(size=3).astype("f"), ("x", "y", "z"), "multi_class")
    export_lib.export(run, tmp_path / "exported", extras=Extras(probe))
    tuned = modeling_mg3d.MG3DModel.from_pretrained(tmp_path / "exported")
    with torch.no_grad():
        tuned.volume_projection.weight.add_(1)
    tuned.save_pretrained(tmp_path / "tuned")
    assert cli(["import", "hf", str(tmp_path / "tuned"), "--out", str(tmp_path / "back")]) == 0
    printed = capsys.readouterr().out
    assert "--config.model.volume_encoder.preset=smallest   (" in printed and "classification_head" in printed
    assert f"--config.init_from.path={tmp_path / 'back'}" in printed
    head, model = load_head(tmp_path / "back" / HEAD_FILE), import_model.read_model(tmp_path / "back")
    assert (head.classes, head.kind) == (probe.classes, probe.kind) and model.unused == []
    for one in (head, model.probe):  # which `mg3d export --probe` adds again
        np.testing.assert_array_equal(one.weight, probe.weight)
        np.testing.assert_array_equal(one.bias, probe.bias)
    setup = state_lib.build(model.config, run.tokenizer.vocab_size, sharding.make_mesh(model.config.mesh), steps=0)
    wanted = {name: tuple(x.shape) for name, x in flatten_dict(setup.abstract["params"], sep="/").items()}
    found = account(open_source(str(tmp_path / "back"), setup, run.tokenizer), InitConfig(), wanted, run.tokenizer)
    before = flatten_dict(run.params, sep="/")
    assert found.taken.keys() == wanted.keys() and not found.resized
    for name, array in found.taken.items():
        expected = before[name] + (1 if name == "volume_projection/out/kernel" else 0)
        np.testing.assert_array_equal(array, expected.astype("f"), err_msg=name)
    state = load_file(tmp_path / "tuned" / "model.safetensors")
    wrapped = {f"model.backbone.{key}": x for key, x in state.items()} | {"model.head.weight": torch.ones(2, 2)}
    torch.save({"state_dict": wrapped, "optimizer_states": [], "epoch": 3}, tmp_path / "last.ckpt")  # as Lightning does
    again = import_model.read_model(tmp_path / "tuned", tmp_path / "last.ckpt")
    assert again.unused == ["state_dict.model.head.weight"]
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    state["volume_encoder.extra"] = state.pop("volume_encoder.norm.bias")
    save_file(state, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"norm.bias \[32\]: missing in the file\n.*extra \[32\]: unknown to the model"):
        import_model.read_model(tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json: copy it"):
        import_model.read_model(tmp_path / "tuned")


class Whole:
    """What somebody pickled with their weights."""


WRAPPED = {  # what people save -> the prefix that is found
    "DDP": ({"module.": 1}, "module."),
    "compiled, Lightning": ({"state_dict.model._orig_mod.": 1, "state_dict.criterion.": 0}, "state_dict.model."),
    "CLIP": ({"model.visual.": 1, "model.text.": 0, "logit_scale.": 0}, "model.visual."),
    "MoCo without its momentum encoder": ({"encoder_q.": 1, "queue.": 0}, "encoder_q."),
    "PEFT, merged": ({"base_model.model.vision_encoder.": 1}, "base_model.model.vision_encoder."),
    "a DINO teacher": ({"teacher.backbone.": 1, "teacher.head.": 0}, "teacher.backbone."),
    "FSDP": ({"_fsdp_wrapped_module.": 1}, ""),
}  # fmt: skip


def nested(prefixes, weights):
    """`{"a.b.": 1}` -> the weights under `{"a": {"b.": ...}}`; 0: other tensors."""
    tree = {}
    for prefix, ours in prefixes.items():
        first, _, rest = prefix.partition(".")
        into = tree.setdefault(first, {}) if first in ("state_dict", "teacher", "student") else tree
        rest = rest if into is not tree else prefix
        into |= {f"{rest}{key}": x for key, x in (weights if ours else {"w": torch.ones(1)}).items()}
    return tree


@pytest.mark.parametrize("case", WRAPPED)
def test_what_people_wrap_weights_in(tmp_path, case):
    weights = {"patch.proj.weight": torch.ones(2), "norm.bias": torch.zeros(1)}
    prefixes, found = WRAPPED[case]
    torch.save(nested(prefixes, weights), tmp_path / "w.pt")
    kept, left_out = state_dict.read_weights(tmp_path / "w.pt", "patch.proj.weight")
    assert kept.keys() == weights.keys()
    assert len(left_out) == len([ours for ours in prefixes.values() if not ours])
    again, _ = state_dict.read_weights(tmp_path / "w.pt", "patch.proj.weight", found)
    assert again.keys() == weights.keys()


def test_weights_that_are_not_found_are_said(tmp_path):
    file, root = tmp_path / "w.pt", "patch.proj.weight"
    several = {
        "student": {"backbone.patch.proj.weight": torch.ones(2)},
        "teacher": {"patch.proj.weight": torch.zeros(2)},
    }
    torch.save(several | {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, file)
    with pytest.raises(UserError, match=r"2 models .*\n  --prefix student\.backbone\.\n  --prefix teacher\.$"):
        state_dict.read_weights(file, root)
    for prefix in ("student.", "student.backbone.", "teacher."):
        kept, left_out = state_dict.read_weights(file, root, prefix)
        assert kept[root].tolist() == ([0, 0] if prefix == "teacher." else [1, 1]) and len(left_out) == 1
    with pytest.raises(UserError, match=r"keys begin with student\.backbone\. \(1\), teacher\.patch\. \(1\)"):
        state_dict.read_state_dict(file, "encoder.")
    with pytest.raises(
        UserError, match=r"no key ends with volume_projection.weight, .* begin with student\.backbone\."
    ):
        state_dict.read_weights(file, "volume_projection.weight")
    torch.save(
        {f"base_model.model.{key}": torch.ones(1) for key in (root, "q.base_layer.weight", "q.lora_A.weight")}, file
    )
    with pytest.raises(UserError, match=r"adapters beside the layers .*model\.merge_and_unload\(\)"):
        state_dict.read_weights(file, root)
    torch.save({"model": Whole()}, file)
    with pytest.raises(UserError, match=r"torch\.save\(model\.state_dict\(\), FILE\)"):
        state_dict.read_state_dict(file)


def test_a_swin_that_was_only_pre_trained(tokenizer_folder, tmp_path):
    """As the `swinViT` of SwinUNETR, loaded strictly; what has no such form is refused before weights are read."""
    swin.PRESETS["four"] = swin.SwinSizes(12, (1, 1, 1, 1), (1, 2, 2, 2), (2, 2, 2), residual_convolutions=True)
    options = {"kind": "swin", "preset": "four", "patch_size": (16, 16, 16)}
    run = random_run(tokenizer_folder, model__volume_size=(32, 32, 64), **{ENCODER + k: v for k, v in options.items()})
    assert said(export_lib.export(run, tmp_path / "out", "monai")) < 1e-4
    card, found = (tmp_path / "out" / "README.md").read_text(), {"torch": torch}
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('("', f'("{tmp_path / "out"}/')
    exec(f"volume = torch.zeros(1, 1, 32, 32, 64)\n{code}", found)  # the card's snippet
    assert found["stages"][-1].shape == (1, 192, 1, 1, 2) and found["logits"].shape[1] == 2
    small = tiny_config(**{ENCODER + k: v for k, v in (options | {"preset": "swin-nano"}).items()})
    for form, says in (
        ("hf", "is a swin, which cannot be exported: its PyTorch form is MONAI's SwinUNETR"),
        ("onnx", "is a swin, which cannot be exported"),
        ("monai", r"MONAI cannot hold .*\n.*2 stages: it has 4"),
    ):
        with pytest.raises(UserError, match=says):
            export_lib.refuse(small, form)


def test_the_command_refuses_before_it_reads_weights(tmp_path, capsys):
    config = tiny_config(
        **{ENCODER + "kind": "swin", ENCODER + "preset": "swin-nano", ENCODER + "patch_size": (16,) * 3}
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config_lib.to_json(config))
    assert cli(["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "which cannot be exported" in capsys.readouterr().err
