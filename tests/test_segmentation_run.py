"""Segmentation end to end on a miniature: `mg3d finetune`, its evaluation, and `mg3d segment` in the scan's own space.

With a tower of one matrix and a decoder without layers: what is learnt does not matter here.
"""

import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from support import TESTS, tiny_builder, with_plain_towers  # noqa: F401

import mg3d_jax
from mg3d_jax.commands.main import main
from mg3d_jax.data.pipeline import PreparedData
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import segmenter
from mg3d_jax.evaluation.bootstrap import PatientDraws
from mg3d_jax.evaluation.segmentation import Segmentation
from mg3d_jax.evaluation.segmenter import logits_of
from mg3d_jax.evaluation.sliding_window import SlidingWindow
from mg3d_jax.training.writers import read_metrics

CONFIG = """
from support import tiny_builder, with_plain_towers

def get_config(arg=""):
    config = with_plain_towers(tiny_builder(
        objectives__alignment__weight=0.0, tasks__segmentation__weight=1.0, tasks__segmentation__crops=1,
        tasks__segmentation__foreground=1.0, tasks__segmentation__include_background=False,
        tasks__segmentation__cross_entropy_weight=0.5, data__grid=(40, 30, 36), data__windows=((-1000.0, 600.0),),
        data__vocab_size=100, optimizer__learning_rate=0.5, optimizer__weight_decay=0.0, schedule__kind="constant",
        training__steps=60, training__checkpoint_every=60, training__log_every=20, training__evaluate_every=60,
    ))
    for name, evaluation in config.evaluations.items():
        evaluation.every = 0 if name == "segmentation" else -1
    return config
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run's folder, with the data beside it."""
    folder = tmp_path_factory.mktemp("segmentation")
    assert main(["phantom", str(folder / "lung"), "--layout", "msd-lung", "--patients", "12"]) == 0
    listed = json.loads((folder / "lung" / "dataset.json").read_text())
    listed["training"], listed["validation"] = listed["training"][:8], listed["training"][8:]
    (folder / "lung" / "split.json").write_text(json.dumps(listed))
    for split in ("train", "valid"):
        command = ["prepare", "--source", "decathlon", "--root", str(folder / "lung" / "split.json"), "--split", split]
        command += [
            "--out",
            str(folder / split),
            "--size",
            "40",
            "30",
            "36",
            "--spacing",
            "7",
            "7",
            "8",
            "--workers",
            "1",
        ]
        assert main(command) == 0
    (folder / "recipe.py").write_text(CONFIG)
    words = [f"--config.data.{split}={folder / split}" for split in ("train", "valid")]
    command = ["finetune", "--config", str(folder / "recipe.py"), "--workdir", str(folder / "run"), *words]
    assert main(command) == 0
    return folder / "run"


def document_of(run):
    return json.loads((run / "test" / "evaluation.json").read_text())["segmentation"]


def test_the_evaluation_is_that_of_the_run(trained):
    """Volume by volume without a batch; in training, after it, and for a comparison of two models it is one number."""
    run = mg3d_jax.load(trained)
    data = PreparedData((str(trained.parent / "valid"),), masks=True)
    setup, params = run.restored.setup, jax.device_get(run.restored.params)
    windows, dices = SlidingWindow((16, 16, 16), 0.5, 1), []
    program = jax.jit(lambda volume: logits_of(setup, params, volume, windows))
    for index in range(len(data)):
        record = data.read(index)
        found = np.argmax(program(record.volume[None])[0], axis=-1) == 1
        dices.append(2 * np.sum(found & (record.mask == 1)) / (found.sum() + np.sum(record.mask == 1)))
    document = document_of(trained)
    assert document["dice"] == pytest.approx(np.mean(dices), abs=2e-3)
    assert read_metrics(trained, "evaluation")[-1]["segmentation/dice"] == pytest.approx(document["dice"], abs=1e-6)
    flat = Segmentation().flat(document)
    scores = np.load(trained / "test" / "scores.npz")
    arrays = {key.partition("/")[2]: scores[key] for key in scores.files}
    resampled = Segmentation.resampled(arrays, PatientDraws(arrays["patients"], draws=10))
    assert {key for key in flat if not key.endswith("_95")} == resampled.keys()
    for key, values in resampled.items():
        assert values[0] == pytest.approx(flat[key], nan_ok=True), key
    assert "Segmentation" in (trained / "test" / "evaluation.html").read_text()


def test_predictions_lie_in_the_space_of_the_scan(trained, tmp_path):
    """The same shape and affine as the scan, whatever the order of its axes; a scan of one slice works, too."""
    lung = trained.parent / "lung"
    source = nib.load(lung / "imagesTr" / "lung_010.nii.gz")
    turned = source.as_reoriented(nib.orientations.axcodes2ornt(("S", "L", "P")))
    slab = nib.Nifti1Image(np.asarray(source.dataobj)[:, :, 17:18], source.affine)
    files = {"plain": source, "turned": turned, "slab": slab}
    for name, image in files.items():
        nib.save(image, tmp_path / f"{name}.nii.gz")
    command = ["segment", "--workdir", str(trained), "--out", str(tmp_path / "out"), "--volume"]
    assert main([*command, *(str(tmp_path / f"{name}.nii.gz") for name in files)]) == 0
    found = {name: nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in files}
    for name, image in files.items():
        assert found[name].shape == image.shape and found[name].get_data_dtype() == np.uint8
        np.testing.assert_allclose(found[name].affine, image.affine, atol=1e-5)


SPHERES = (((-60.0, 20.0, 45.0), 34.0), ((55.0, -35.0, -60.0), 22.0))  # centre and radius, mm: nothing is symmetric


def scan_of_spheres(axes, spacing, degrees):
    """A NIfTI image of dense spheres in a body, on voxels along `axes` ("RAS", ...) that are turned about x and z; where the
    spheres are on them."""
    about_x, about_z = np.deg2rad(degrees)
    turn_x = np.array([
        [1, 0, 0], [0, np.cos(about_x), -np.sin(about_x)], [0, np.sin(about_x), np.cos(about_x)],
    ])  # fmt: skip
    turn_z = np.array([
        [np.cos(about_z), -np.sin(about_z), 0], [np.sin(about_z), np.cos(about_z), 0], [0, 0, 1],
    ])  # fmt: skip
    to_axes = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)),
        (1, 1, 1),
    )[:3, :3]
    affine = np.eye(4)
    affine[:3, :3] = turn_x @ turn_z @ to_axes @ np.diag(spacing)
    shape = tuple(int(n) for n in np.ceil(np.abs(to_axes).T @ (300, 240, 290) / spacing))
    affine[:3, 3] = (7.0, -4.0, 11.0) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    hu = np.where(np.sum((places / (130, 95, 135)) ** 2, axis=-1) < 1, 40, -1000)
    inside = np.zeros(shape, bool)
    for centre, radius in SPHERES:
        inside |= np.linalg.norm(places - centre, axis=-1) < radius
    hu = np.where(inside, 900, hu) + np.random.default_rng(0).integers(-9, 10, shape)
    return nib.Nifti1Image(hu.astype(np.int16), affine), inside, places


@pytest.mark.parametrize(
    "axes, spacing, degrees",
    [
        ("RAS", (2.5, 3.0, 10.0), (0, 0)),
        ("SLP", (9.0, 3.0, 2.5), (0, 0)),
        ("LPS", (4.0, 3.0, 6.0), (4, -3)),
        ("PIR", (3.0, 6.0, 4.0), (25, 15)),
    ],
)
def test_classes_lie_at_the_voxels_of_the_scan(trained, tmp_path, monkeypatch, axes, spacing, degrees):
    """Anisotropic, flipped and oblique scans, with a network that knows: what is dense is of class 1."""
    image, inside, places = scan_of_spheres(axes, spacing, degrees)
    nib.save(image, tmp_path / "scan.nii.gz")

    def knowing(setup, params, volumes, windows):
        return jnp.stack([450.0 - volumes, volumes - 450.0], axis=-1) / 100

    monkeypatch.setattr(segmenter, "logits_of", knowing)
    command = ["segment", "--workdir", str(trained), "--out", str(tmp_path / "out")]
    assert main([*command, "--volume", str(tmp_path / "scan.nii.gz")]) == 0
    found = nib.load(tmp_path / "out" / "scan.nii.gz")
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-4)
    mask = np.asarray(found.dataobj) == 1
    dice = 2 * np.sum(mask & inside) / (mask.sum() + inside.sum())
    assert dice > 0.9, dice
    for centre, radius in SPHERES:
        around = np.linalg.norm(places - centre, axis=-1) < radius + 15
        apart = places[mask & around].mean(axis=0) - places[inside & around].mean(axis=0)
        assert np.linalg.norm(apart) < 1.0, apart  # mm; the grid has voxels of 7 to 8


def test_a_run_without_segmentation(old_run):
    with pytest.raises(UserError, match="does not segment"):
        mg3d_jax.load(old_run).segment((np.zeros((16, 16, 16), np.int16), np.diag([7.0, 7, 8, 1])))
