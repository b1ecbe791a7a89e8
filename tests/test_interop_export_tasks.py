"""Exports of fine-tuned models: decoders for PyTorch and MONAI users against the Linen model."""

import itertools
import json
from dataclasses import replace
from functools import partial

import jax
import nibabel as nib
import numpy as np
import pytest
import torch
from exported_runs import SPACING, random_run, small_tokenizer
from flax.traverse_util import flatten_dict
from monai.inferers import sliding_window_inference
from support import quick_variables

from mg3d_jax import config as config_lib
from mg3d_jax import sharding
from mg3d_jax.config import checks
from mg3d_jax.data.tokens import load_tokenizer
from mg3d_jax.evaluation.segmenter import Segmenter
from mg3d_jax.interop import export as export_lib
from mg3d_jax.interop import export_check, export_format, export_monai, import_model
from mg3d_jax.interop.sources import open_source
from mg3d_jax.interop.torch_template import modeling_mg3d_tasks
from mg3d_jax.interop.torch_template.configuration_mg3d import MG3DConfig
from mg3d_jax.interop.torch_template.modeling_mg3d_tasks import MG3DTaskModel
from mg3d_jax.interop.warm_start import account
from mg3d_jax.models import sampling
from mg3d_jax.models.segmentation import UnetrDecoder
from mg3d_jax.models.towers import bert, swin, vit
from mg3d_jax.models.towers.segmentation_weights import decoder_to_torch
from mg3d_jax.models.towers.swin.monai import to_swin_unetr
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.prepare.cleaning import readable
from mg3d_jax.prepare.scans import read_scan
from mg3d_jax.prepare.volumes import Grid
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.restore import RestoredRun

ENCODER = "model__volume_encoder__"
SEGMENTS = {
    "tasks__segmentation__weight": 1.0, "tasks__segmentation__num_classes": 3, "objectives__alignment__weight": 0.0,
    "model__segmentation_decoder__width": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A run with random weights on the smallest towers of its kind."""
    folder = small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    towers = {ENCODER + "preset": "three", "model__report_encoder__preset": "nano", "model__projection_dim": 32}

    def make(**overrides):
        vit.PRESETS["three"] = vit.Sizes(32, 3, 2, 64)
        run = random_run(folder, near_start=True, **towers | overrides)
        return replace(run, sources=("msd-lung",), mask_names=("background", "a", "b"))

    yield make
    for tower in (vit, bert, swin):
        for name in ("smallest", "three", "four", "twelve"):
            tower.PRESETS.pop(name, None)


def restored(run, tmp_path):
    """The same run as evaluation has it."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    setup = state_lib.build(run.config, run.tokenizer.vocab_size, mesh, steps=0)
    params, meta = jax.device_put(run.params, setup.shardings["params"]), {"step": 7, "mask_names": run.mask_names}
    return RestoredRun(tmp_path, run.config, setup, params, meta, load_tokenizer(str(run.tokenizer_folder)), False)


def linen_logits(run, volumes):
    """Of volumes of the window's size, float32 [n, X, Y, Z, K]."""
    model = state_lib.build_model(run.config, run.tokenizer.vocab_size)
    windowed = step_inputs.window(volumes, run.config.data.windows)[:, None]
    program = jax.jit(partial(model.apply, train=False, method="segment"))
    (features,) = program({"params": run.params}, windowed)
    head = run.params["segmentation_head"]
    return np.asarray(features[:, 0] @ head["kernel"] + head["bias"])


def difference(lines, what):
    """What the export found between JAX and the other framework on phantoms."""
    (line,) = [line for line in lines if what in line]
    return float(line.split()[-1])


def hounsfield(shape, seed=0):
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


@pytest.mark.parametrize("patch", [(4, 6, 16), (2, 1, 3)])
def test_a_decoder_for_any_patch_in_pytorch(patch):
    rng, grid = np.random.default_rng(0), (2, 3, 2)
    volume = rng.normal(size=(1, *(n * side for n, side in zip(grid, patch, strict=True)), 2)).astype("f")
    encoded = {"tokens": rng.normal(size=(1, 12, 6)).astype("f"), "hidden": rng.normal(size=(5, 1, 12, 6)).astype("f")}
    linen = UnetrDecoder(patch, 2)
    params = quick_variables(linen, volume, encoded)["params"]
    config = MG3DConfig(patch_size=patch, volume_width=6, windows=((0, 1), (0, 2)), segmentation_width=2)
    decoder = modeling_mg3d_tasks.UnetrDecoder(config).eval()
    decoder.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in decoder_to_torch(params, patch).items()})
    with torch.no_grad():
        hidden = list(torch.from_numpy(encoded["hidden"]))
        found = decoder(torch.from_numpy(volume).movedim(-1, 1), torch.from_numpy(encoded["tokens"]), hidden)
    expected = jax.jit(linen.apply)({"params": params}, volume, encoded)
    np.testing.assert_allclose(found.movedim(1, -1), expected, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def segmenting(make_run, tmp_path_factory):
    """A run that segments, its export, and what that said."""
    run, out = make_run(**SEGMENTS, model__volume_size=(16, 24, 16)), tmp_path_factory.mktemp("segments") / "out"
    return run, out, export_lib.export(run, out)


def test_a_segmentation_run_in_pytorch(segmenting, tmp_path):
    """Logits of a window, and of a scan in its own space, whose axes are turned and of other voxels."""
    run, out, lines = segmenting
    assert difference(lines, export_check.SHARES) < 1e-5
    model = MG3DTaskModel.from_pretrained(out).eval()
    assert model.config.segmentation_classes == ["background", "a", "b"]
    large = torch.from_numpy(hounsfield((1, 21, 30, 11)))
    theirs = sliding_window_inference(
        large[:, None].float(), (16, 24, 16), 3, lambda x: model.segmentation_logits(x[:, 0]), overlap=0.5,
        mode="gaussian", cval=-1024,
    )  # fmt: skip
    torch.testing.assert_close(model.segment(large), theirs, rtol=1e-4, atol=1e-4)
    scan = phantoms.make_patient(5, 0, "train").scans[0].reconstructions[0]
    order = nib.orientations.axcodes2ornt(("S", "L", "P"))
    turned = nib.Nifti1Image(scan.hu[::4, ::5, ::2], scan.affine @ np.diag([4, 5, 2, 1])).as_reoriented(order)
    hu, affine = np.asarray(turned.dataobj), turned.affine
    source = read_scan((hu, affine), Grid(run.config.grid, SPACING), whole=True)
    ours = Segmenter(restored(run, tmp_path))(source).classes
    agree = model.segment_scan(hu, affine) == ours
    assert agree.shape == hu.shape and agree.mean() > 0.999 and len(np.unique(ours)) > 1
    comes_back(run, out)
    card = (out / "README.md").read_text()
    assert "model.segment_scan(" in card and "background, a, b" in card and "nothing compared volumes with rep" in card


def comes_back(run, out):
    """Does `mg3d import hf` read all of an export, to the last bit?"""
    found = flatten_dict(import_model.read_model(out).params, sep="/")
    kept = flatten_dict(export_format.split_params(run.params)[0], sep="/")
    assert found.keys() == kept.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("recipe", ["msd_lung", "cc_ccii"])
def test_a_recipe_starts_from_an_export(segmenting, recipe):
    """Its tower is taken as it was, whatever its decoder, its head and the report encoder beside it are."""
    run, out, _ = segmenting
    config = config_lib.load(f"configs/downstream/{recipe}.py:small,{out}", ["--config.model.volume_size=(16,24,16)"])
    checks.validate(config)
    setup = state_lib.build(config, run.tokenizer.vocab_size, sharding.make_mesh(config.mesh), steps=1)
    wanted = {name: tuple(x.shape) for name, x in flatten_dict(setup.abstract["params"], sep="/").items()}
    found = account(open_source(str(out), setup, run.tokenizer), config.init_from, wanted, run.tokenizer)
    theirs = flatten_dict({"volume_encoder": run.params["volume_encoder"]}, sep="/")
    assert found.taken.keys() == {name for name in wanted if name.startswith("volume_encoder/")} and not found.resized
    for name, array in found.taken.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("findings", [False, True])
def test_a_report_decoder_in_pytorch(make_run, tmp_path, findings):
    """The same tokens, one after the other, as the Linen decoder with its cache; also where it reads what the head finds."""
    from transformers import PreTrainedTokenizerFast

    run = make_run(
        tasks__generation__weight=1.0, objectives__alignment__weight=0.0, data__max_tokens=20,
        model__report_decoder__width=32, model__report_decoder__depth=2, model__report_decoder__num_heads=4,
        **({"tasks__generation__findings": True, "tasks__classification__weight": 1.0} if findings else {}),
        evaluations__generation__no_repeat=2 * findings,
    )  # fmt: skip
    if findings:
        head = run.params["classification_head"]["kernel"]
        run.params["classification_head"]["kernel"] = (
            np.random.default_rng(1).normal(size=head.shape).astype(np.float32)
        )
        run.params["report_decoder"]["finding_embedding"] *= 30
    decoder = run.params["report_decoder"]  # so that a text is not the same word all over
    decoder["position_embedding"] *= 100
    for layer in ("layers_0", "layers_1"):
        decoder[layer]["cross_attention"]["out"]["kernel"] *= 3
    lines = export_lib.export(run, tmp_path / "out")
    assert difference(lines, "probability of the next token") < 1e-5
    comes_back(run, tmp_path / "out")
    model = MG3DTaskModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    first, second, third = hounsfield((3, 16, 16, 16))
    volumes = np.stack([first // 3 - 600, second // 3 + 300, third])  # else they look the same to random weights
    text = load_tokenizer(str(run.tokenizer_folder))
    linen = state_lib.build_model(run.config, run.tokenizer.vocab_size)
    special = [text.token_to_id(f"[{name}]") for name in ("CLS", "SEP", "PAD", "MASK", "UNK")]
    start, end, pad, *others = special
    options = sampling.Sampling("greedy", 19, start, end, pad, forbidden=(pad, start, *others), no_repeat=2 * findings)

    @jax.jit
    def write(params):
        step = partial(linen.apply, {"params": params}, method="report_step")
        windowed = step_inputs.window(volumes, run.config.data.windows)
        cache = linen.apply({"params": params}, windowed, 1, 19, method="start_report")
        keys = jax.random.split(jax.random.key(0), 3)
        return sampling.write(step, cache, 3, options, keys, sampling.beam_reorder)

    written = write(run.params)
    hu = torch.from_numpy(volumes)
    expected = [readable(text.decode(row[:n].tolist(), skip_special_tokens=True)) for row, n in zip(
        np.asarray(written["tokens"]), np.asarray(written["length"]), strict=True
    )]  # fmt: skip
    assert model.write_reports(hu, tokenizer) == expected and len(set(expected)) > 1
    whole = torch.from_numpy(np.concatenate([np.full((3, 1), start), np.asarray(written["tokens"])[:, :-1]], 1)).long()
    with torch.no_grad():
        logits = model.report_logits(hu, whole)
    logits[:, :, list(options.forbidden)] = -torch.inf
    if findings:  # each pair of tokens once
        pairs = [list(itertools.pairwise(row[:n].tolist())) for row, n in zip(
            np.asarray(written["tokens"]), np.asarray(written["length"]), strict=True
        )]  # fmt: skip
        assert all(len(set(one)) == len(one) for one in pairs)
        absent = (model.classification_logits(hu) <= 0).to(torch.int8)
        assert model.write_reports(hu, tokenizer, findings=absent) != expected
        return
    best, length = logits.argmax(-1).numpy(), np.asarray(written["length"])
    for row in range(3):  # without a cache
        np.testing.assert_array_equal(best[row, : length[row]], np.asarray(written["tokens"])[row, : length[row]])
    with pytest.raises(ValueError, match="not trained to segment"):
        model.segmentation_logits(hu)


def test_monais_unetr_is_the_run(make_run, tmp_path):
    """With the epsilon and the GELU that ours has by default, and MONAI does not."""
    vit.PRESETS["twelve"] = vit.Sizes(16, 12, 2, 32)
    options = {"preset": "twelve", "patch_size": (16, 16, 16)}
    run = make_run(**SEGMENTS, model__volume_size=(16, 32, 16), **{ENCODER + k: v for k, v in options.items()})
    lines = export_lib.export(run, tmp_path / "out", "monai")
    assert difference(lines, export_check.SHARES) < 1e-5  # after a strict load
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["monai_class"], about["classes"]) == ("monai.networks.nets.UNETR", ["background", "a", "b"])
    said = (tmp_path / "out" / "README.md").read_text()
    assert "for block in network.vit.blocks" in said and "sliding_window_inference" in said


def test_monais_swin_unetr_is_the_run(make_run, tmp_path):
    swin.PRESETS["four"] = swin.SwinSizes(12, (1, 1, 1, 1), (1, 2, 2, 2), (2, 2, 2), residual_convolutions=True)
    options = {"kind": "swin", "preset": "four", "patch_size": (16, 16, 16)}
    run = make_run(
        **SEGMENTS | {"model__segmentation_decoder__width": 0}, model__volume_size=(32, 32, 64),
        **{ENCODER + k: v for k, v in options.items()},
    )  # fmt: skip
    network, volumes = to_swin_unetr(run.params, run.config.model, 1), hounsfield((1, 32, 32, 64))
    found = np.moveaxis(export_monai.write(run, tmp_path, network, volumes), 1, -1)
    expected = linen_logits(run, volumes)
    # The coarsest level has two voxels, whose instance norm makes the last bits large.
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    assert export_lib._monai_network(run)[0].name == "SwinUNETR"


def test_a_decoder_that_unetr_has_no_place_for_is_said(make_run):
    network, lines = export_lib._monai_network(make_run(**SEGMENTS))
    assert network.name == "ViT" and "the encoder alone" in lines[0] and "patch_size = (8, 8, 8)" in lines[0]
