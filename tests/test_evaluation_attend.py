"""`mg3d attend`: the map lies where it should in the scan's own space, and shows what the model depends on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from support import tiny_config

from mg3d_jax import api, sharding
from mg3d_jax.commands import attend as command
from mg3d_jax.data.tokens import train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import attend
from mg3d_jax.models.patches import patchify
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.scans import Scan, read_scan
from mg3d_jax.training import inputs as step_inputs
from mg3d_jax.training import state as state_lib
from mg3d_jax.training.restore import RestoredRun, exact_model

SPACING = (20.0, 18.0, 20.0)


@pytest.fixture(scope="module", params=[False, True], ids=["contrastive", "matching"])
def run(request, tmp_path_factory):
    """An untrained run; with the matching objective it has the sentence-conditioned head."""
    overrides = {"objectives__matching__weight": 0.1} if request.param else {}
    config = tiny_config(**overrides)
    tokenizer = train_wordpiece(["right pleural effusion", "no nodule"] * 5, 60)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    setup = state_lib.build(config, tokenizer.get_vocab_size(), mesh, steps=0)
    params, meta = state_lib.initialize(setup)["params"], {"step": 7, "spacing": SPACING}
    return RestoredRun(tmp_path_factory.mktemp("run"), config, setup, params, meta, tokenizer, ema=False)


def on_the_grid(volume):
    return Scan(volume, np.eye(4), volume.shape, np.eye(4), np.eye(4))


def scan_file(folder, orientation):
    """A chest of boxes with a bright block, 320 x 288 x 320 mm: the file in `orientation`, and the block in mm."""
    volume = np.full((32, 32, 32), -1000, np.int16)
    volume[4:28, 4:28] = 40
    volume[7:25, 7:25, 4:28] = -850
    volume[20:26, 8:14, 18:24] = 300
    affine = np.diag([10.0, 9.0, 10.0, 1.0])
    affine[:3, 3] = (-100, -80, 50)
    centre = (affine @ [22.5, 10.5, 20.5, 1])[:3]
    image = nib.Nifti1Image(volume, affine)
    codes = nib.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), codes))
    image.header.set_sform(image.affine, 1)
    path = folder / f"{orientation}.nii.gz"
    nib.save(image, path)
    return path, centre


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_map_lies_in_the_scans_own_space(tmp_path, orientation):
    """The patch that holds the block is marked; in the scan's space the marked voxels surround the block."""
    path, centre = scan_file(tmp_path, orientation)
    prepared = read_scan(path, Grid((16, 16, 16), SPACING))
    values = np.asarray(patchify(prepared.volume[None, ..., None].astype(np.float32), (4, 4, 4)))[0].max(axis=1)
    patches = (values > 150).astype(np.float32).reshape(4, 4, 4)
    scan = nib.load(path)
    affine = attend.patch_affine(prepared.affine, (4, 4, 4))
    found = attend.in_scan_space(patches, affine, scan.shape, scan.affine)
    assert found.shape == scan.shape
    block = np.asarray(scan.dataobj) > 150
    assert found[block].min() > 0
    strong = np.argwhere(found > 0.5)
    mm = (scan.affine[:3, :3] @ strong.mean(axis=0)) + scan.affine[:3, 3]
    np.testing.assert_allclose(mm, centre, atol=45)  # within half a patch of 80 x 72 x 80 mm


def test_voxels_outside_the_models_view_are_zero():
    found = attend.in_scan_space(np.ones((2, 2, 2)), np.diag([4.0, 4, 4, 1]), (12, 12, 12), np.eye(4))
    assert found[:6, :6, :6].all()
    assert not found[7:].any()


def test_occlusion_equals_occluding_by_hand(run):
    volume = np.random.default_rng(0).integers(-1000, 400, (16, 16, 16)).astype(np.int16)
    found = attend.SentenceMaps(run)(on_the_grid(volume), "right pleural effusion", "occlusion")
    assert found.patches.shape == (2, 2, 2)
    model = exact_model(run.config, run.tokenizer.get_vocab_size())
    row = run.view_tokenizer(["right pleural effusion"])
    fields = {name: row[name][None] for name in ("token_ids", "token_mask", "sentence_index")}

    @jax.jit
    def cosine(hounsfield):
        windowed = step_inputs.window(hounsfield[None], run.config.data.windows)
        image = model.apply({"params": run.params}, windowed, method="embed_volume")["volume_embedding"][0]
        text = model.apply({"params": run.params}, fields, method="embed_report")["report_embedding"][0]
        return image @ text / jnp.linalg.norm(image) / jnp.linalg.norm(text)

    occluded = volume.copy()
    occluded[8:, :8, 8:] = step_inputs.AIR_HU
    assert found.patches[1, 0, 1] == pytest.approx(float(cosine(volume) - cosine(occluded)), abs=1e-5)
    assert found.similarity == pytest.approx(float(cosine(volume)), abs=1e-5)


def test_attention_is_relative_to_even_attention(run):
    volume = np.random.default_rng(0).integers(-1000, 400, (16, 16, 16)).astype(np.int16)
    if attend.ATTENTION_HEAD not in run.params:
        with pytest.raises(UserError, match="--method occlusion"):
            attend.SentenceMaps(run)(on_the_grid(volume), "right pleural effusion", "attention")
        return
    found = attend.SentenceMaps(run)(on_the_grid(volume), "right pleural effusion")
    assert found.method == "attention"
    assert found.patches.mean() == pytest.approx(1, abs=1e-5)
    assert found.patches.min() > 0


def test_command_writes_map_and_overlay(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api, "restore_run", lambda *_, **__: run)
    path, _ = scan_file(tmp_path, "LPS")
    options = [
        "--workdir",
        "run",
        "--volume",
        str(path),
        "--text",
        "right pleural effusion",
        "--out",
        str(tmp_path / "o"),
    ]
    assert command.main(options) == 0
    found = nib.load(tmp_path / "o" / "map.nii.gz")
    np.testing.assert_allclose(found.affine, nib.load(path).affine)
    assert found.shape == (32, 32, 32) and found.header.get_xyzt_units()[0] == "mm"
    scan = read_scan(path, Grid((16, 16, 16), SPACING))
    drawn = read_scan(path, attend.own_grid(scan), whole=True)  # the slices, as they are in the file
    np.testing.assert_array_equal(drawn.volume[::-1, ::-1], np.asarray(nib.load(path).dataobj))
    assert (tmp_path / "o" / "overlay.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "mm (RAS+)" in said and "similarity of the scan and the sentence" in said
    with pytest.raises(UserError, match="cannot be used"):
        command.main([*options[:3], str(tmp_path / "none.nii.gz"), *options[4:]])
