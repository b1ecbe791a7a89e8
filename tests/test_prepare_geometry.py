"""Grid policies, oblique volumes, damaged or missing slices; and a fuzz over everything that a file can get wrong."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.synthetic_ct import affine, body, write_nifti, write_raw_nifti
from test_prepare_volumes import itk_grid, rotated

from mg3d_jax.prepare.geometry import Grid, Metadata, obliqueness
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.volumes import prepare_volume

SAME = Grid((48, 40, 36), (8.0, 8.0, 9.0))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR"])
@pytest.mark.parametrize("degrees", [20, 40])
def test_a_strongly_oblique_volume_is_turned_onto_the_scanners_axes(tmp_path, axes, degrees):
    path = write_nifti(tmp_path / "v.nii.gz", body(), rotated(affine(), degrees), axes)
    grid = Grid((64, 60, 40), (7.0, 7.5, 8.0))
    got = prepare_volume(path, grid)
    assert obliqueness(got.affine) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(np.diag(got.affine)[:3], grid.spacing)
    expected = itk_grid(sitk.ReadImage(str(path)), got.affine, grid.size)
    inside = expected > -1024  # at the very border SimpleITK extends by half a voxel, scipy does not
    near = np.ones_like(inside)
    for axis in range(3):
        near &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis) & inside
    np.testing.assert_allclose(got.volume[near], expected[near], atol=1.01)
    assert any(f"oblique by {degrees} degrees" in warning for warning in got.quality["warnings"])


def test_sheared_gantry_tilt_keeps_the_truth(tmp_path):
    """Slices pushed along y by 0.3 mm per mm (17 degrees): landmarks come out where the affine puts them."""
    matrix = affine()
    matrix[1, 2] = 0.3 * 9
    path = write_nifti(tmp_path / "v.nii.gz", body(), matrix)
    got = prepare_volume(path, Grid((60, 60, 40), (7.0, 7.0, 8.0)))
    source, voxels = nib.load(path), np.array([[24, 8, 10], [24, 8, 26], [30, 20, 18]])
    mm = voxels @ matrix[:3, :3].T + matrix[:3, 3]
    out = np.rint((mm - got.affine[:3, 3]) / np.diag(got.affine)[:3]).astype(int)
    for v, o in zip(voxels, out, strict=True):
        block = np.asarray(source.dataobj)[v[0] - 1 : v[0] + 2, v[1] - 1 : v[1] + 2, v[2] - 1 : v[2] + 2]
        assert block.min() - 15 <= got.volume[tuple(o)] <= block.max() + 15


@pytest.mark.parametrize("axes", ["RAS", "PSL"])
def test_fraction_policy_is_the_papers_crop_and_resize(tmp_path, axes):
    path = write_nifti(tmp_path / "v.nii.gz", body(), affine(), axes)
    got = prepare_volume(path, Grid((22, 20, 16), (1, 1, 1), "fraction", (0.88, 0.875, 0.656)))
    extent = np.array([48 * 8, 40 * 8, 36 * 9.0])
    spacing = extent * (0.88, 0.875, 0.656) / (22, 20, 16)
    np.testing.assert_allclose(np.diag(got.affine)[:3], spacing)
    centre = got.affine @ [10.5, 9.5, 7.5, 1]
    np.testing.assert_allclose(centre, affine() @ [23.5, 19.5, 17.5, 1])


def off_centre(tmp_path, axes):
    """The body in a corner of a large field of view, lying on a thin table."""
    data = np.full((90, 80, 60), -1000, np.int16)
    data[4:52, 34:74, 3:39] = body()
    data[:, 30:32, :] = 100  # the table, 16 mm thick
    rng = np.random.default_rng(0)
    data += rng.normal(0, 10, data.shape).astype(np.int16)
    return write_nifti(tmp_path / "v.nii.gz", np.maximum(data, -1024), affine(), axes)


@pytest.mark.parametrize("axes", ["RAS", "LPS"])
def test_body_and_lung_policies_find_their_part(tmp_path, axes):
    path = off_centre(tmp_path, axes)
    expected = affine() @ [4 + 23.5, 34 + 19.5, 3 + 17.5, 1]  # the middle of the body and of the lungs
    for policy in ("body", "lung"):
        got = prepare_volume(path, Grid((40, 40, 40), (9.0, 8.0, 8.0), policy))
        centre = got.affine @ [19.5, 19.5, 19.5, 1]
        assert np.abs(centre - expected).max() < 13, (policy, centre, expected)
    small = prepare_volume(path, Grid((10, 40, 40), (9.0, 8.0, 8.0), "body"))
    assert any("larger than the grid: cut in x" in warning for warning in small.quality["warnings"])


def test_without_a_lung_the_grid_stays_centred_and_says_so(tmp_path):
    hu = body()
    path = write_nifti(tmp_path / "v.nii.gz", np.where((hu > -900) & (hu < -600), 30, hu).astype(np.int16), affine())
    got = prepare_volume(path, Grid((48, 40, 36), (8.0, 8.0, 9.0), "lung"))
    np.testing.assert_allclose(got.affine, affine())
    text = " ".join(got.quality["warnings"])
    assert "no lung found" in text and "no chest" in text


def test_missing_slices_are_reported(tmp_path):
    hu = body()
    hu[:, :, 10:13] = 0
    got = prepare_volume(write_nifti(tmp_path / "v.nii.gz", hu, affine(), "LPS"), SAME)
    assert any("missing slices" in warning for warning in got.quality["warnings"])
    path = write_nifti(tmp_path / "w.nii.gz", body(), affine(), "LPS")
    got = prepare_volume(path, SAME, Metadata(slices=40))
    assert any("table has 40, the file 36" in warning for warning in got.quality["warnings"])
    assert prepare_volume(path, SAME, Metadata(slices=36)).quality["warnings"] == []


def test_disagreement_with_the_table_is_reported_and_the_header_wins(tmp_path):
    path = write_nifti(tmp_path / "v.nii.gz", body(), affine(), "LPS")
    got = prepare_volume(path, SAME, Metadata(spacing=(1.0, 1.0, 3.0)))
    assert "disagree" in got.quality["warnings"][0]
    np.testing.assert_array_equal(got.volume, body())


def test_a_short_scan_is_called_truncated(tmp_path):
    path = write_nifti(tmp_path / "v.nii.gz", body()[:, :, 12:24], affine())
    assert "truncated: only 108 mm" in prepare_volume(path, SAME).quality["warnings"][0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["int16", "uint16", "int32", "float32", "float64"]),
    slope=st.sampled_from([None, 1.0, 0.5, 2.0, 0.0, -1.0]),
    intercept=st.sampled_from([0.0, -1024.0, -8192.0, 1024.0, 37.0]),
    offset=st.sampled_from([0, 1024, 8192, -1024]),
    table=st.sampled_from([None, (1.0, -1024.0), (1.0, -8192.0), (1.0, 0.0)]),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 2.0, 40.0]),
    degrees=st.sampled_from([0, 3, 25, 45]),
    axes=st.sampled_from(["RAS", "LPS", "SPL", "AIR"]),
    cut=st.sampled_from([1.0, 1.0, 0.99, 0.5, 0.01]),
    shape=st.sampled_from([(24, 20, 18), (24, 20, 1), (1, 20, 18)]),
)
def test_fuzz_never_wrong_without_a_warning(
    tmp_path, dtype, slope, intercept, offset, table, scale, degrees, axes, cut, shape
):
    """Either a `VolumeError`; or the right HU at the right place; or a warning."""
    hu = body((24, 20, 18), spacing=(16, 16, 18))[: shape[0], : shape[1], : shape[2]]
    info = np.iinfo(dtype) if dtype[0] in "iu" else None
    stored = hu.astype(np.float64) + offset
    if info:
        stored = np.clip(stored, info.min, info.max)
    matrix = rotated(affine((16 * scale, 16 * scale, 18 * scale)), degrees)
    image = nib.Nifti1Image(stored.astype(dtype), matrix)
    transform = nib.orientations.ornt_transform(nib.io_orientation(matrix), nib.orientations.axcodes2ornt(axes))
    image = image.as_reoriented(transform)
    path = write_raw_nifti(tmp_path / "v.nii.gz", np.asarray(image.dataobj), image.affine, slope, intercept)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * cut)])
    grid = Grid(shape, tuple(voxel * scale for voxel in (16.0, 16.0, 18.0)))
    try:
        got = prepare_volume(path, grid, Metadata(scaling=table))
    except VolumeError as error:
        assert str(error)
        return
    assert cut == 1.0
    assert got.volume.shape == shape and got.volume.dtype == np.int16
    warnings = [w for w in got.quality["warnings"] if "truncated" not in w and "no chest" not in w]
    if not warnings:
        np.testing.assert_allclose(got.volume, np.clip(hu, -1024, 3071), atol=1.01)
        np.testing.assert_allclose(got.affine, nib.as_closest_canonical(image).affine, atol=1e-6)
