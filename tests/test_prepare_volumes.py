"""Volumes: geometry against SimpleITK and closed forms."""

from __future__ import annotations

import errno
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from reference.synthetic_ct import affine, body, write_nifti

from mg3d_jax.prepare.geometry import Grid, Metadata
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.volumes import prepare_volume

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
AXES = ["RAS", "LPS", "SLP", "AIR", "PSR", "LAI"]


def itk_grid(image: sitk.Image, matrix: np.ndarray, size) -> np.ndarray:
    """SimpleITK's own linear resampling of `image` onto the grid of `matrix` (RAS+ mm), as [X, Y, Z]."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(0))
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(n) for n in size])
    resampler.SetOutputSpacing(spacing.tolist())
    resampler.SetOutputOrigin(lps[:3, 3].tolist())
    resampler.SetOutputDirection((lps[:3, :3] / spacing).ravel().tolist())
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetDefaultPixelValue(-1024)
    resampler.SetOutputPixelType(sitk.sitkFloat64)
    return sitk.GetArrayFromImage(resampler.Execute(image)).transpose(2, 1, 0)


def rotated(matrix: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    out = matrix.copy()
    out[:3, :3] = turn @ matrix[:3, :3]
    return out


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("degrees", [0, 9])
def test_upsampling_equals_simpleitk_in_every_orientation(tmp_path, axes, degrees):
    path = write_nifti(tmp_path / "v.nii.gz", body(), rotated(affine(), degrees), axes)
    grid = Grid((60, 70, 50), (5.5, 6.0, 7.0))  # finer than 8 x 8 x 9 mm; cropped in x, padded in y and z
    got = prepare_volume(path, grid)
    expected = itk_grid(sitk.ReadImage(str(path)), got.affine, grid.size)
    assert got.volume.dtype == np.int16 and got.volume.shape == grid.size
    np.testing.assert_allclose(got.volume, expected, atol=0.51)  # rounding to int16
    assert (got.volume == -1024).mean() > 0.05  # there was padding
    assert nib.aff2axcodes(got.affine) == ("R", "A", "S")


def test_real_ct_on_a_finer_grid_equals_simpleitk():
    path = SHARED / "ct" / "totalseg_example_ct.nii.gz"
    if not path.exists():
        pytest.skip("the shared CT is not here")
    grid = Grid((160, 140, 150), (2.5, 2.4, 2.2))
    got = prepare_volume(path, grid)
    image = sitk.Clamp(sitk.ReadImage(str(path)), sitk.sitkInt32, -1024, 3071)
    np.testing.assert_allclose(got.volume, itk_grid(image, got.affine, grid.size), atol=0.51)


def test_downsampling_by_whole_numbers_is_the_mean_of_blocks(tmp_path):
    data = body((48, 40, 36))
    path = write_nifti(tmp_path / "v.nii.gz", data, affine(), "LPS")
    got = prepare_volume(path, Grid((24, 20, 12), (16.0, 16.0, 27.0)))
    expected = data.astype(np.float64).reshape(24, 2, 20, 2, 12, 3).mean((1, 3, 5))
    np.testing.assert_allclose(got.volume, expected, atol=0.51)
    itk = sitk.GetArrayFromImage(sitk.BinShrink(sitk.GetImageFromArray(data.T.astype(np.float64)), [2, 2, 3]))
    np.testing.assert_allclose(got.volume, itk.T, atol=0.51)


def test_downsampling_does_not_alias(tmp_path):
    """Stripes finer than the new voxels average out; sampling at centres would show false stripes of +-90 HU."""
    data = body((96, 40, 36), spacing=(4.0, 8.0, 9.0))
    stripes = np.where(np.arange(96) % 2 == 0, 90, -90)[:, None, None].astype(np.int16)
    paths = [tmp_path / "plain.nii.gz", tmp_path / "striped.nii.gz"]
    for path, volume in zip(paths, (data, data + stripes), strict=True):
        write_nifti(path, np.maximum(volume, -1024).astype(np.int16), affine((4.0, 8.0, 9.0)))
    plain, striped = (prepare_volume(path, Grid((30, 20, 20), (12.4, 16, 18))).volume for path in paths)
    tissue = (plain > -200) & (plain < 200)
    assert np.abs(striped.astype(int) - plain)[tissue].max() < 40


@pytest.mark.parametrize("spacing", [(3.1, 3.3, 3.7), (8.0, 8.0, 9.0), (13.0, 11.0, 17.0)])
def test_a_landmark_keeps_its_place_in_mm(tmp_path, spacing):
    """The bright sphere's centre of mass through the returned affine is where the file has it, at any spacing."""
    data, matrix = body(), affine()
    path = write_nifti(tmp_path / "v.nii.gz", data, matrix, "PIL")

    def sphere_mm(volume, to_mm, seed_mm):
        indices = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
        mm = indices @ to_mm[:3, :3].T + to_mm[:3, 3]
        weight = np.where(np.linalg.norm(mm - seed_mm, axis=-1) < 50, np.clip(volume + 850.0, 0, None), 0)
        return (mm * weight[..., None]).sum((0, 1, 2)) / weight.sum()

    extent = np.array(data.shape) * (8, 8, 9) / 2
    seed = matrix[:3, 3] + (np.array(data.shape) - 1) / 2 * (8, 8, 9) + extent * (0.35, 0.3, 0.4)
    got = prepare_volume(path, Grid((130, 110, 100), spacing))
    np.testing.assert_allclose(sphere_mm(got.volume, got.affine, seed), sphere_mm(data, matrix, seed), atol=2.5)


def test_cropping_first_equals_cropping_afterwards(tmp_path):
    path = write_nifti(tmp_path / "v.nii.gz", body(), affine(), "LPS")
    large = prepare_volume(path, Grid((60, 60, 60), (6.0, 10.0, 12.0)))
    small = prepare_volume(path, Grid((20, 16, 12), (6.0, 10.0, 12.0)))
    np.testing.assert_array_equal(small.volume, large.volume[20:40, 22:38, 24:36])
    corner = large.affine @ [20, 22, 24, 1]
    np.testing.assert_allclose(small.affine[:3, 3], corner[:3])


def test_blank_header_is_repaired_from_the_table_and_refused_without_it(tmp_path):
    data = body()
    image = nib.Nifti1Image(data[::-1, ::-1], None)
    path = tmp_path / "blank.nii.gz"
    nib.save(image, path)
    with pytest.raises(VolumeError, match="blank"):
        prepare_volume(path, Grid((48, 40, 36), (8.0, 8.0, 9.0)))
    metadata = Metadata(spacing=(8.0, 8.0, 9.0), orientation=(1, 0, 0, 0, 1, 0), position=(-100.0, -50.0, 7.0))
    got = prepare_volume(path, Grid((48, 40, 36), (8.0, 8.0, 9.0)), metadata)
    np.testing.assert_array_equal(got.volume, data)
    np.testing.assert_allclose(got.affine @ [47, 39, 0, 1], [100, 50, 7, 1])
    assert any("metadata table" in warning for warning in got.quality["warnings"])


DAMAGES = ["truncated", "not a nifti", "flipped bit", "missing", "4d", "constant", "nan", "inside header"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_files_are_refused_with_a_reason(tmp_path, damage):
    path = write_nifti(tmp_path / "v.nii.gz", body(), affine())
    raw = path.read_bytes()
    reasons = {"truncated": "truncated", "4d": "3D", "constant": "constant", "nan": "NaN", "missing": "no such"}
    reason = reasons.get(damage, "")
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "inside header":
        path.write_bytes(raw[:40])
    elif damage == "not a nifti":
        path.write_bytes(b"hello" * 100)
    elif damage == "flipped bit":
        middle = len(raw) // 2
        path.write_bytes(raw[:middle] + bytes([raw[middle] ^ 0x55]) + raw[middle + 1 :])
    elif damage == "missing":
        path.unlink()
    elif damage == "4d":
        nib.save(nib.Nifti1Image(np.stack([body()] * 2, -1), affine()), path)
    elif damage == "constant":
        nib.save(nib.Nifti1Image(np.zeros((20, 20, 20), np.int16), affine()), path)
    elif damage == "nan":
        nib.save(nib.Nifti1Image(np.full((20, 20, 20), np.nan, np.float32), affine()), path)
    with pytest.raises(VolumeError, match=reason or "."):
        prepare_volume(path, Grid((10, 10, 10), (20.0, 20.0, 20.0)))


def test_a_read_that_the_system_refuses_is_not_taken_for_a_bad_file(tmp_path):
    (tmp_path / "v.nii").symlink_to("/proc/self/mem")  # Linux refuses to read its first page with EIO
    with pytest.raises(VolumeError, match="Input/output error") as caught:
        prepare_volume(tmp_path / "v.nii", Grid((8, 8, 8), (8.0, 8.0, 9.0)))
    assert caught.value.__cause__.errno == errno.EIO
