"""Grid policies, oblique volumes, damaged or missing slices; and a fuzz over everything that a file can get wrong."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference.synthetic_ct import affine, body, write_nifti, write_raw_nifti
from test_prepare_volumes import itk_grid, rotated

from mg3d_jax.prepare.geometry import Grid, Metadata, obliqueness, resolve_geometry, voxel_spacing
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
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


def test_disagreement_with_the_table_is_settled_and_said(tmp_path):
    path = write_nifti(tmp_path / "v.nii.gz", body(), affine(), "LPS")
    got = prepare_volume(path, SAME, Metadata(spacing=(1.0, 1.0, 3.0)))
    assert "disagree: header used, since by the other the scan would be 48 x 40 x 108 mm" in got.quality["warnings"][0]
    np.testing.assert_array_equal(got.volume, body())


TRUE, SHAPE = (0.7, 0.7, 1.25), (512, 512, 300)
IDENTITY = np.eye(4)


def header(spacing, origin=(-170.0, -180.0, -300.0), turn=0.0) -> np.ndarray:
    """LPS index axes, in RAS+ mm."""
    matrix = rotated(np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]), turn) if turn else np.diag([*spacing, 1.0])
    matrix[:2] *= 1 if turn else -1
    matrix[:3, 3] = origin
    return matrix


def resolved(matrix, *, shape=SHAPE, **known) -> tuple[np.ndarray, list[str]]:
    """(spacing that is believed, warnings) of a header and what a table says."""
    warnings: list[str] = []
    stored = StoredVolume(np.broadcast_to(np.int16(0), shape), matrix, None, has_orientation=True)
    return voxel_spacing(resolve_geometry(stored, Metadata(**known), warnings)), warnings


SAME_GRID = {"plane": SHAPE[:2], "slices": SHAPE[2]}
RIGHT = [  # header, shape of the file, what the table says, what is right, the evidence
    (IDENTITY, SHAPE, {"spacing": TRUE}, TRUE, "no usable geometry"),
    (np.diag([-1.0, -1, 1, 1]), SHAPE, {"spacing": TRUE, **SAME_GRID}, TRUE, "no usable geometry"),
    (header((1, 1, 1)), SHAPE, {"spacing": TRUE, **SAME_GRID}, TRUE, "as many as the table's"),
    (header((0.7, 0.7, 1)), (512, 512, 64), {"spacing": (0.7, 0.7, 5)}, (0.7, 0.7, 5), "odd in length"),
    (header((1, 1, 1)), (358, 358, 375), {"spacing": TRUE, **SAME_GRID}, (1, 1, 1), "was resampled"),
    (IDENTITY, (358, 358, 375), {"spacing": TRUE, **SAME_GRID}, (1, 1, 1), "was resampled"),
    (header((0.7, 0.7, 2.5)), (512, 512, 150), {"spacing": TRUE, "slices": SHAPE[2]}, (0.7, 0.7, 2.5), "was resampled"),
    (header((7, 7, 12.5)), SHAPE, {"spacing": TRUE}, TRUE, "3584 x 3584 x 3750 mm"),
    (header(TRUE), SHAPE, {"spacing": (0.07, 0.07, 0.125)}, TRUE, "36 x 36 x 38 mm"),
    (header((0.7, 1.4, 1.25)), SHAPE, {"spacing": TRUE}, TRUE, "not be square"),
    (header(TRUE), SHAPE, {"spacing": (0.7, 0.35, 1.25), **SAME_GRID}, TRUE, "not be square"),
]  # fmt: skip


@pytest.mark.parametrize("matrix, shape, known, expected, why", RIGHT)
def test_clear_evidence_decides_between_header_and_table(matrix, shape, known, expected, why):
    spacing, warnings = resolved(matrix, shape=shape, **known)
    np.testing.assert_allclose(spacing, expected)
    assert len(warnings) == 1 and why in warnings[0]


@pytest.mark.parametrize(
    "matrix, known, said",
    [
        (header((0.7, 0.7, 2.5)), {"spacing": TRUE, **SAME_GRID}, r"\[0.7, 0.7, 2.5\] and table \[0.7, 0.7, 1.25\] mm"),
        (header((0.9, 0.9, 1.25)), {"spacing": TRUE}, "nothing shows which is right.*empty spacing"),
        (header((0.7, 0.7, 1)), {"spacing": TRUE, **SAME_GRID}, "nothing shows which is right"),
        (header((1, 1, 1)), {"spacing": TRUE}, "nothing shows which is right"),
        (header((1, 1, 1)), {"spacing": (0.9, 0.8, 1.25), **SAME_GRID}, "for the header: .*; for the table: "),
        (header(TRUE), {"axes": "RAS"}, r"header \(LPS\) and table \(RAS\)"),
        (header(TRUE, turn=30), {"spacing": TRUE, "orientation": (1, 0, 0, 0, 1, 0), **SAME_GRID}, "axes of header"),
    ],
)
def test_header_and_table_that_nothing_settles_are_refused_with_both_values(matrix, known, said):
    with pytest.raises(VolumeError, match=said):
        resolved(matrix, **known)


def test_a_header_that_was_never_filled_in_is_said_without_a_table():
    assert "as where nothing is known" in resolved(IDENTITY)[1][0]
    assert resolved(header((1, 1, 1)))[1] == [] and resolved(header(TRUE), axes="LPS")[1] == []


@settings(max_examples=100, deadline=None)
@given(
    plane=st.sampled_from([0.34, 0.6, 0.7, 0.98, 1.0]),
    between=st.sampled_from([0.5, 1.0, 1.5, 3.0, 5.0]),
    fault=st.sampled_from(["none", "default", "identity", "z default", "scale", "thickness", "one side", "resampled"]),
    at=st.sampled_from(["header", "table"]),
    factor=st.sampled_from([0.1, 0.5, 2.0, 10.0, 1000.0]),
    counts=st.booleans(),
    order=st.permutations([0, 1, 2]),
)
def test_header_and_table_end_right_or_refused(plane, between, fault, at, factor, counts, order):
    """Whatever is wrong in one of the two: the true voxel size, or a refusal; never the wrong one."""
    assume(plane != 1 or between != 1)  # then a header of 1 mm is no default
    true, shape = np.array([plane, plane, between]), np.array([512, 512, round(330 / between)])
    wrong = true.copy()
    if fault in ("default", "identity"):
        wrong[:] = 1
    elif fault == "z default":
        wrong[2] = 1
    elif fault in ("scale", "thickness", "one side"):
        wrong[{"scale": slice(None), "thickness": 2, "one side": 1}[fault]] *= factor
    listed, own = (tuple(wrong), true) if at == "table" else (tuple(true), wrong)
    known = {"spacing": listed, **({"plane": (512, 512), "slices": int(shape[2])} if counts else {})}
    if fault == "resampled":
        listed, own, shape = tuple(true), np.array([1.0, 1.0, 2.0]), np.rint(shape * true / (1, 1, 2)).astype(int)
        known, true = {"spacing": listed, "plane": (512, 512), "slices": round(330 / between)}, own
    matrix = IDENTITY if fault == "identity" and at == "header" else header(own)[:, [*order, 3]]
    order = [0, 1, 2] if matrix is IDENTITY else order
    try:
        spacing, _ = resolved(matrix, shape=tuple(shape[order]), **known)
    except VolumeError as error:
        assert (fault != "none" and "disagree" in str(error)) or "usable" in str(error)
        return
    np.testing.assert_allclose(spacing, true[order], rtol=0.03)


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
