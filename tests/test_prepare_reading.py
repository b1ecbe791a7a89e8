"""Volumes that are not NIfTI: NumPy arrays, folders of slices, DICOM series. All hold the same body."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from reference.synthetic_ct import affine, body

from mg3d_jax.prepare.geometry import Grid, Metadata
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.volumes import prepare_volume

SPACING = (8.0, 8.0, 9.0)
GRID = Grid((48, 40, 36), SPACING)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("axes", ["RAS", "SPL"])
def test_arrays_need_spacing_and_axes_and_come_out_ras(tmp_path, suffix, axes):
    hu = body()
    if axes == "SPL":  # slice, row, column: what most projects save
        stored, spacing = hu[::-1, ::-1].transpose(2, 1, 0), (9.0, 8.0, 8.0)
    else:
        stored, spacing = hu, SPACING
    path = tmp_path / f"v.{suffix}"
    np.save(path, stored) if suffix == "npy" else np.savez_compressed(path, ct=stored, other=np.zeros(3))
    got = prepare_volume(path, GRID, Metadata(spacing=spacing, axes=axes))
    np.testing.assert_array_equal(got.volume, hu)
    with pytest.raises(VolumeError, match="--array-spacing"):
        prepare_volume(path, GRID, Metadata(axes=axes))
    with pytest.raises(VolumeError, match="--array-axes"):
        prepare_volume(path, GRID, Metadata(spacing=spacing))
    with pytest.raises(VolumeError, match="axes 'XYZ'"):
        prepare_volume(path, GRID, Metadata(spacing=spacing, axes="XYZ"))


def test_arrays_that_are_no_volume_are_refused(tmp_path):
    about = Metadata(spacing=SPACING, axes="RAS")
    np.save(tmp_path / "flat.npy", np.zeros((5, 5)))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 2, 2)), b=np.zeros((2, 2, 2)))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04nothing")
    for name, reason in (("flat", "3D"), ("objects", "unreadable"), ("two", "several"), ("cut", "unreadable")):
        path = next(tmp_path.glob(f"{name}.*"))
        with pytest.raises(VolumeError, match=reason):
            prepare_volume(path, GRID, about)


def write_slices(folder: Path, suffix: str, window=(-1200.0, 800.0)) -> None:
    folder.mkdir()
    grey = np.rint((np.clip(body(), *window) - window[0]) / (window[1] - window[0]) * 255).astype(np.uint8)
    for k in range(grey.shape[2]):  # LPS: columns run to the left, rows to the back, slices upwards
        Image.fromarray(grey[::-1, ::-1, k].T).save(folder / f"slice{k}.{suffix}", quality=97)


def test_a_folder_of_8_bit_slices(tmp_path):
    write_slices(tmp_path / "scan", "png")
    about = Metadata(spacing=SPACING, axes="LPS", window=(-1200.0, 800.0))
    got = prepare_volume(tmp_path / "scan", GRID, about)
    assert np.abs(got.volume - body().astype(int)).max() <= 2000 / 255 / 2 + 1
    assert "8-bit slices: HU known in steps of 7.8" in got.quality["warnings"][0]
    with pytest.raises(VolumeError, match="--slice-window"):
        prepare_volume(tmp_path / "scan", GRID, Metadata(spacing=SPACING, axes="LPS"))
    write_slices(tmp_path / "jpeg", "jpg")
    assert np.abs(prepare_volume(tmp_path / "jpeg", GRID, about).volume - body().astype(int)).mean() < 25
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "scan" / "slice5.png")
    with pytest.raises(VolumeError, match="different sizes"):
        prepare_volume(tmp_path / "scan", GRID, about)
    (tmp_path / "scan" / "slice5.png").write_bytes(b"no image")
    with pytest.raises(VolumeError, match=r"slice5\.png"):
        prepare_volume(tmp_path / "scan", GRID, about)


def write_dicom(folder: Path, leave_out=(), shift_slice=None) -> None:
    """The body as an axial DICOM series, written in random order; intercepts differ between slices."""
    folder.mkdir()
    hu, series = body()[::-1, ::-1], generate_uid()
    corner = np.diag([-1, -1, 1, 1]) @ affine() @ [47, 39, 0, 1]  # LPS position of the first voxel
    for number, k in enumerate(np.random.default_rng(0).permutation(hu.shape[2])):
        if k in leave_out:
            continue
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.Modality = series, "CT"
        dataset.Rows, dataset.Columns = hu.shape[1], hu.shape[0]
        dataset.PixelSpacing, dataset.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        height = corner[2] + 9.0 * k + (4.0 if k == shift_slice else 0.0)
        dataset.ImagePositionPatient = [corner[0], corner[1], height]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        intercept = -1024 - int(k % 2)
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, intercept
        dataset.PixelData = (hu[:, :, k].T.astype(np.int32) - intercept).astype(np.uint16).tobytes()
        dataset.save_as(folder / f"im{number:03d}.dcm", enforce_file_format=True)


def test_a_dicom_series(tmp_path):
    write_dicom(tmp_path / "series")
    (tmp_path / "series" / "notes.txt").write_text("not a slice")
    got = prepare_volume(tmp_path / "series", GRID)
    np.testing.assert_array_equal(got.volume, body())
    np.testing.assert_allclose(got.affine, affine(), atol=1e-6)
    assert got.quality["warnings"] == []


def test_a_dicom_series_with_a_missing_slice_is_filled_with_a_warning(tmp_path):
    write_dicom(tmp_path / "series", leave_out=(17,))
    got = prepare_volume(tmp_path / "series", GRID)
    expected = body().astype(np.float64)
    expected[:, :, 17] = (expected[:, :, 16] + expected[:, :, 18]) / 2
    np.testing.assert_allclose(got.volume, expected, atol=1.01)
    assert "missing slices: 1 of 36" in got.quality["warnings"][0]


@pytest.mark.parametrize("kept", [0, 5, 140, 600, 2000, "refused"])
def test_a_dicom_slice_that_cannot_be_read_is_no_missing_slice(tmp_path, kept, monkeypatch):
    write_dicom(tmp_path / "series")
    top = max((tmp_path / "series").iterdir(), key=lambda p: dcmread(p).ImagePositionPatient[2])
    if kept == "refused":
        opening = pydicom.dcmread

        def refused(file):
            if file == top:
                raise OSError(5, "Input/output error")
            return opening(file)

        monkeypatch.setattr(pydicom, "dcmread", refused)
    else:
        top.write_bytes(top.read_bytes()[:kept])
    # A slice that ends within its pixels is found when they are decoded, all slices in one go.
    with pytest.raises(VolumeError, match="cannot be decoded" if kept == 2000 else f"slice {top.name} is"):
        prepare_volume(tmp_path / "series", GRID)


@pytest.mark.parametrize("fault", ["many missing", "uneven", "text only", "empty"])
def test_unusable_dicom_folders(tmp_path, fault):
    folder = tmp_path / "series"
    if fault == "many missing":
        write_dicom(folder, leave_out=range(10, 20))
    elif fault == "uneven":
        write_dicom(folder, shift_slice=12)
    else:
        folder.mkdir()
        if fault == "text only":
            (folder / "a.txt").write_text("hello")
    with pytest.raises(
        VolumeError, match="missing slices" if fault in ("many missing", "uneven") else "neither images"
    ):
        prepare_volume(folder, GRID)
