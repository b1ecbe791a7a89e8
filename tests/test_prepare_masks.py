"""Masks: in the record and out of it, on the grid as nearest neighbour, refused where they do not belong to their volume, and
in the batch where a task reads them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from reference.synthetic_ct import affine, body, write_nifti
from test_data_records import assert_same, make

from mg3d_jax.batch import AIR_HU
from mg3d_jax.commands.main import main
from mg3d_jax.config.parts import AugmentConfig
from mg3d_jax.data.pipeline import BatchReader, PreparedData
from mg3d_jax.data.record import decode, encode
from mg3d_jax.data.shard_reader import DamagedRecordError
from mg3d_jax.data.tokens import ReportTokenizer, train_wordpiece
from mg3d_jax.errors import UserError
from mg3d_jax.prepare import Settings, prepare
from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.masks import place_mask
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.volumes import prepare_volume
from mg3d_jax.training import inputs

SMALL = {"size": (16, 14, 12), "spacing": (20.0, 20.0, 24.0), "workers": 1, "qa_samples": 0}


def with_mask(number: int = 0, size=(6, 5, 4)):
    mask = np.random.default_rng(number).integers(-1, 4, size).astype(np.int8)
    return dataclasses.replace(make(number, size), mask=mask)


@pytest.mark.parametrize("level", [0, 3])
def test_a_mask_comes_out_as_it_went_in(level):
    record = with_mask(size=(60, 50, 70))  # more than one packed piece
    assert_same(decode(encode(record, zstd_level=level)), record)


def test_a_record_without_a_mask_has_the_bytes_that_it_always_had():
    """The version is that of records without masks, and the rest says nothing of them. `test_prepare_recipe` has digests."""
    data = encode(make())
    assert b'"version":"2"' in data and b"mask" not in data
    assert b'"version":"3"' in encode(with_mask())  # which earlier code refuses by its version


def test_every_bit_of_a_mask_is_checked():
    data = bytearray(encode(with_mask()))
    data[-1] ^= 1
    with pytest.raises(DamagedRecordError):
        decode(bytes(data))


# ---- on the grid
def slow_nearest(mask, matrix, kept, size):
    """Voxel by voxel: the class of the voxel that holds the centre."""
    out = np.zeros(size, np.int8)
    for index in np.ndindex(*size):
        place = np.linalg.inv(matrix) @ kept @ [*index, 1]
        near = np.ceil(place[:3] - 0.5 - 1e-4).astype(int)
        if (near >= 0).all() and (near < mask.shape).all():
            out[index] = mask[tuple(near)]
    return out


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL"])
def test_a_mask_lies_where_its_volume_lies(tmp_path, axes):
    """The bright sphere of the phantom, marked: where the mask is, the volume on the grid is bright."""
    hu, matrix = body(), affine()
    marked = (hu > 300).astype(np.uint8)  # the spine
    volume = write_nifti(tmp_path / "v.nii", hu, matrix, axes)
    mask = write_nifti(tmp_path / "m.nii", marked, matrix, axes)
    grid = Grid((32, 28, 24), (8.0, 8.0, 9.0))
    found = prepare_volume(volume, grid, mask=mask, mask_classes=2)
    assert found.mask.dtype == np.int8 and found.mask.shape == grid.size
    assert found.volume[found.mask == 1].mean() > 250 and found.volume[found.mask == 0].mean() < 0
    np.testing.assert_array_equal(found.mask, slow_nearest(marked, matrix, found.affine, grid.size))


def test_nearest_neighbour_with_anisotropic_voxels_and_one_slice():
    rng = np.random.default_rng(0)
    mask, matrix = rng.integers(0, 5, (9, 7, 1)).astype(np.int8), affine((1.1, 0.7, 10.0))
    kept = affine((0.9, 1.3, 3.1), (-151.0, -121.0, 24.0))
    kept[0, 1] = 0.2  # askew
    size = (13, 8, 5)
    found = place_mask(mask, matrix, kept, size)
    np.testing.assert_array_equal(found, slow_nearest(mask, matrix, kept, size))
    assert found.any() and not found[..., 0].any()  # 6 mm below a slice of 10 mm


def wrong(tmp_path, **change):
    """A volume, and a mask that is `change`d."""
    hu, matrix = body(), affine()
    volume = write_nifti(tmp_path / "v.nii", hu, matrix)
    data = change.get("data", (hu > 300).astype(np.uint8))
    nib.save(nib.Nifti1Image(data, change.get("affine", matrix)), tmp_path / "m.nii")
    return volume, tmp_path / "m.nii"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": np.full((48, 40, 36), 7, np.uint8)}, r"m\.nii has the label values \[7\.0\]: expected .* 0 to 1"),
        ({"data": np.full((48, 40, 36), 0.5, np.float32)}, r"label values \[0\.5\]"),
        ({"data": np.zeros((48, 40, 35), np.uint8)}, r"m\.nii has the shape \(48, 40, 35\), its volume \(48, 40, 36\)"),
        (
            {"affine": affine(origin=(-150.0, -120.0, 39.0))},
            r"m\.nii lies elsewhere than its volume, by up to 9\.00 mm",
        ),
        ({"affine": np.diag([-8.0, 8.0, 9.0, 1.0])}, "lies elsewhere"),
    ],
)
def test_a_mask_that_is_not_the_volumes(tmp_path, change, says):
    volume, mask = wrong(tmp_path, **change)
    with pytest.raises(VolumeError, match=says):
        prepare_volume(volume, Grid((16, 14, 12), (20.0, 20.0, 24.0)), mask=mask, mask_classes=2)


def test_a_missing_or_broken_mask_is_named(tmp_path):
    volume, _ = wrong(tmp_path)
    (tmp_path / "b.nii").write_bytes(b"nothing")
    for name, says in (("no.nii", "no such file"), ("b.nii", "unreadable")):
        with pytest.raises(VolumeError, match=rf"mask .*{name}: {says}"):
            prepare_volume(volume, Grid((16, 14, 12), (20.0, 20.0, 24.0)), mask=tmp_path / name, mask_classes=2)


# ---- in batches
@pytest.fixture(scope="module")
def lungs(tmp_path_factory):
    """A miniature of MSD Task06, prepared: (folder of the data set, folder of the records)."""
    folder = tmp_path_factory.mktemp("lungs")
    assert main(["phantom", str(folder / "task"), "--layout", "msd-lung", "--patients", "4"]) == 0
    settings = Settings("decathlon", folder / "task", "train", folder / "train", **SMALL)
    assert prepare(settings)["mask_names"] == ["background", "cancer"]
    return folder / "task", folder / "train"


def batches(folder, **options):
    tokenizer = ReportTokenizer(train_wordpiece({"a nodule"}, 100), 16, 4)
    return BatchReader(PreparedData((str(folder),), **options), tokenizer)


def test_batches_have_masks_where_they_are_asked_for(lungs):
    plain, reader = batches(lungs[1])([0, 1]), batches(lungs[1], masks=True)
    assert "mask" not in plain
    batch = reader([0, 1, 2, 3])
    assert batch["mask"].dtype == np.int8 and batch["mask"].shape == (4, 16, 14, 12)
    assert {0, 1} == set(np.unique(batch["mask"]))
    assert batch["volume"][batch["mask"] == 1].mean() > -200 > batch["volume"][batch["mask"] == 0].mean()
    assert main(["prepare", "--verify", "--out", str(lungs[1])]) == 0


def test_what_has_no_mask_is_unknown_everywhere(lungs, tmp_path):
    settings = Settings("decathlon", lungs[0], "test", tmp_path / "test", **SMALL)
    prepare(settings)
    assert (batches(tmp_path / "test", masks=True)([0])["mask"] == -1).all()


def test_a_folder_without_masks_does_for_no_task_that_reads_them(lungs, tiny_data):
    with pytest.raises(UserError, match="has no masks, which a task needs"):
        PreparedData((tiny_data["train"],), masks=True)
    manifest = lungs[1] / "manifest.json"
    before = manifest.read_text()
    other = lungs[1].parent / "other"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps(json.loads(before) | {"mask_names": ["background", "liver"]}))
    with pytest.raises(UserError, match="differ in the classes of their masks"):
        PreparedData((str(lungs[1]), str(other)), masks=True)


def test_a_shift_moves_mask_and_volume_together():
    rng = np.random.default_rng(0)
    volume = rng.integers(-1000, 1000, (3, 8, 7, 6)).astype(np.int16)
    mask = (volume > 0).astype(np.int8)
    key, options = jax.random.key(1), AugmentConfig(shift=2)
    moved = inputs.augment(key, jnp.asarray(volume), options)
    classes = inputs.shifted(inputs.shift_key(key), jnp.asarray(mask), 2, -1)
    assert not np.array_equal(moved, volume)
    np.testing.assert_array_equal(classes, np.where(moved == AIR_HU, -1, moved > 0))
