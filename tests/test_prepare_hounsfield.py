"""The guarded reader: every way in which HU reach a file, and every way in which files lie about it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.synthetic_ct import affine, body, write_raw_nifti

from mg3d_jax.benchmarks import hounsfield as benchmark
from mg3d_jax.prepare.geometry import Grid, Metadata
from mg3d_jax.prepare.hounsfield import decide
from mg3d_jax.prepare.nifti import StoredVolume, VolumeError
from mg3d_jax.prepare.volumes import prepare_stored, prepare_volume

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
GRID = Grid((48, 40, 36), (8.0, 8.0, 9.0))


def write(path, stored, slope=None, intercept=None):
    """A NIfTI with exactly these stored numbers and exactly this scaling in the header."""
    write_raw_nifti(path, stored, affine(), slope, intercept)
    raw = nib.load(path)
    assert (raw.dataobj.slope, raw.dataobj.inter) == ((1, 0) if slope is None else (slope, intercept))
    np.testing.assert_array_equal(np.asarray(raw.dataobj.get_unscaled()), stored)
    return path


# name: (stored numbers from true HU, header scaling, table scaling, must there be a warning)
FILES = {
    "int16 HU, blank header": (lambda hu: hu, None, None, False),
    "int32 HU": (lambda hu: hu.astype(np.int32), None, None, False),
    "float32 HU": (lambda hu: hu.astype(np.float32), None, None, False),
    "uint16, header -1024": (lambda hu: (hu + 1024).astype(np.uint16), (1.0, -1024.0), None, False),
    "header and table agree": (lambda hu: (hu + 1024).astype(np.uint16), (1.0, -1024.0), (1.0, -1024.0), False),
    "slope 0.5": (lambda hu: ((hu + 1024) * 2).astype(np.int16), (0.5, -1024.0), None, False),
    "Siemens -8192": (lambda hu: hu.astype(np.int16) + 8192, (1.0, -8192.0), (1.0, -8192.0), False),
    "HU already, table -1024 (CT-RATE v2)": (lambda hu: hu, None, (1.0, -1024.0), False),
    "HU already, table -8192 (CT-RATE v2)": (lambda hu: hu, (1.0, 0.0), (1.0, -8192.0), False),
    "HU already, header -1024": (lambda hu: hu, (1.0, -1024.0), None, True),
    "HU already, header and table -8192": (lambda hu: hu, (1.0, -8192.0), (1.0, -8192.0), True),
    "raw, blank header, table -1024 (CT-RATE v1)": (lambda hu: hu + 1024, None, (1.0, -1024.0), False),
    "raw, blank header, table -8192": (lambda hu: hu + 8192, None, (1.0, -8192.0), False),
    "raw, wrong header, right table": (lambda hu: hu + 1024, (1.0, -8192.0), (1.0, -1024.0), True),
    "raw, nothing says so": (lambda hu: (hu + 1024).astype(np.uint16), None, None, True),
    "shifted twice": (lambda hu: hu - 1024, None, (1.0, -1024.0), True),
    "shifted by 8192 too much": (lambda hu: hu - 8192, None, None, True),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("anatomy", ["chest", "abdomen"])
def test_hu_come_out_right_whatever_the_file_says(tmp_path, name, anatomy):
    to_stored, header, table, must_warn = FILES[name]
    hu = body()
    if anatomy == "abdomen":  # no air at all: soft tissue and fat only
        fat = np.random.default_rng(2).normal(-100, 12, hu.shape)
        hu = np.where(hu < -400, np.rint(fat), hu).astype(np.int16)
    path = write(tmp_path / "v.nii.gz", to_stored(hu), *(header or (None, None)))
    got = prepare_volume(path, GRID, Metadata(scaling=table))
    np.testing.assert_array_equal(got.volume, hu)
    said = [warning for warning in got.quality["warnings"] if "no chest" not in warning]
    assert bool(said) == must_warn, got.quality
    assert ("no chest" in " ".join(got.quality["warnings"])) == (anatomy == "abdomen")


def test_scanner_padding_does_not_disturb_and_becomes_air(tmp_path):
    hu = body().astype(np.int16)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in hu.shape[:2]), indexing="ij")
    outside = x**2 + y**2 > 1.05
    for padding in (-2000, -3024):
        stored = hu.copy()
        stored[outside] = padding
        got = prepare_volume(write(tmp_path / "v.nii.gz", stored), GRID)
        np.testing.assert_array_equal(got.volume[outside], -1024)
        np.testing.assert_array_equal(got.volume[~outside], hu[~outside])


def test_a_blurred_rim_of_the_padding_does_not_disturb(tmp_path):
    hu = body((96, 80, 36), spacing=(4.0, 4.0, 9.0)).astype(np.float32)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in hu.shape[:2]), indexing="ij")
    radius = np.sqrt(x**2 + y**2)[..., None]
    share = np.clip((radius - 1.02) / 0.03, 0, 1)  # an interpolated border between air and -3024
    stored = np.rint(hu * (1 - share) - 3024 * share).astype(np.int16)
    assert 0 < np.mean((stored > -3000) & (stored < -1200)) < 0.04
    got = prepare_volume(write(tmp_path / "v.nii.gz", stored), Grid(hu.shape, (8.0, 8.0, 9.0)))
    np.testing.assert_array_equal(got.volume, np.clip(stored, -1024, None))


def test_what_is_not_ct_is_refused():
    rng = np.random.default_rng(0)
    for sample in (
        rng.normal(300, 100, 50_000),  # MR
        rng.integers(0, 30, 50_000),  # label map
        rng.uniform(0, 1, 50_000),  # normalised to [0, 1]
        rng.uniform(-1000, 1000, 50_000),  # noise
        rng.integers(0, 256, 50_000),  # 8-bit slices
        np.full(1000, -1000.0),
    ):
        with pytest.raises(VolumeError):
            decide(sample, None, None)


@pytest.mark.parametrize("name, is_ct", [("ct", True), ("ct_labels", False), ("mr_sm", False)])
def test_real_files(name, is_ct):
    path = SHARED / "ct" / f"totalseg_example_{name}.nii.gz"
    if not path.exists():
        pytest.skip("the shared volumes are not here")
    if is_ct:
        quality = prepare_volume(path, GRID, Metadata(scaling=(1.0, -8192.0))).quality
        assert [warning.split(":")[0] for warning in quality["warnings"]] == ["no chest"]  # it is an abdomen
        assert "not applied a second time" in quality["decision"]
    else:
        with pytest.raises(VolumeError, match="does not look like CT"):
            prepare_volume(path, GRID)


@pytest.mark.parametrize("share, refused", [(0.001, False), (0.2, True)])
def test_a_few_nan_are_air_with_a_warning_and_many_are_refused(tmp_path, share, refused):
    hu = body().astype(np.float32)
    holes = np.random.default_rng(1).random(hu.shape) < share
    path = write(tmp_path / "v.nii.gz", np.where(holes, np.nan, hu).astype(np.float32))
    if refused:
        with pytest.raises(VolumeError, match="NaN"):
            prepare_volume(path, GRID)
        return
    got = prepare_volume(path, GRID)
    np.testing.assert_array_equal(got.volume, np.where(holes, -1024, hu))
    assert "NaN" in got.quality["warnings"][0]


@pytest.fixture(scope="module")
def bases():
    return benchmark.bases([])


@pytest.mark.parametrize("base", ["chest, noise 10", "abdomen, noise 100", "head, noise 40", "no air, noise 60"])
def test_hu_stored_in_every_way_are_never_wrong_in_silence(bases, base):
    answers = {way: benchmark.answer(bases[base], way) for way in benchmark.WAYS}
    assert [way for way, (what, _) in answers.items() if what == "wrong"] == []
    claimed = [way for way, (_, header, table) in benchmark.WAYS.items() if header or table]
    right = {way for way, (what, _) in answers.items() if what == "right"}
    assert {w for w in claimed if "+ " not in w and "- 1024" not in w} | {"HU", "0 outside", "40 outside"} <= right
    assert not {"HU + 200", "HU - 300", "negated", "half"} & right


@settings(max_examples=25, deadline=None)
@given(
    shift=st.integers(60, 700).flatmap(lambda n: st.sampled_from([n, -n])),
    noise=st.sampled_from([10, 60, 100]),
    claim=st.sampled_from([None, (1.0, -1024.0)]),
    base=st.sampled_from(["chest", "head"]),
)
def test_any_shift_is_refused_or_said(shift, noise, claim, base):
    hu = benchmark.noisy(benchmark.head((40, 48, 24)) if base == "head" else benchmark.trunk((48, 40, 24)), noise)
    try:
        said = decide(hu + shift - (claim[1] if claim else 0), claim, None).warnings
    except VolumeError:
        return
    assert said


@settings(max_examples=15, deadline=None)
@given(value=st.integers(-900, 3000), noise=st.sampled_from([5, 50, 100]), turned=st.booleans(), nan=st.booleans())
def test_any_constant_up_to_the_border_becomes_air_with_a_note(value, noise, turned, nan):
    hu = benchmark.noisy(benchmark.trunk((48, 40, 24)), noise)
    hu = hu.transpose(2, 0, 1) if turned else hu
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in hu.shape[:2]), indexing="ij")
    outside = np.broadcast_to((x**2 + y**2 > 1.0)[..., None], hu.shape)
    stored = np.where(outside, np.nan if nan else value, hu).astype(np.float32 if nan else np.int16)
    grid = Grid(hu.shape, (8.0, 8.0, 9.0))
    got = prepare_stored(StoredVolume(np.asfortranarray(stored), affine(), None, True), grid)
    known = outside | (hu != value)  # tissue of the same number beside the padding cannot be told from it
    np.testing.assert_array_equal(got.volume[known], np.where(outside, -1024, hu)[known])
    assert any("padding" in warning for warning in got.quality["warnings"])


def test_measured_constants_are_no_padding(tmp_path):
    """Air that is cut off at -1024, and a saturated implant inside, stay what they are."""
    hu = benchmark.noisy(benchmark.trunk((48, 40, 24)), 60).astype(np.int16)
    hu[20:23, 18:21, 10:12] = 3071
    got = prepare_volume(write(tmp_path / "v.nii.gz", hu), Grid(hu.shape, (8.0, 8.0, 9.0)))
    np.testing.assert_array_equal(got.volume, hu)
    assert got.quality["warnings"] == []


def test_a_windowed_scan_is_said_to_be_cut_off(tmp_path):
    hu = np.clip(benchmark.noisy(benchmark.trunk((48, 40, 24)), 10), -160, 240).astype(np.int16)
    got = prepare_volume(write(tmp_path / "v.nii.gz", hu), GRID)
    assert "cut off below -160" in " ".join(got.quality["warnings"])


def test_with_air_around_only_small_shifts_are_silent(monkeypatch):
    """As docs/preparation.md has it: up to 30 HU, and no scale."""
    monkeypatch.setattr(benchmark, "SMALL_SHIFTS", (-40, -20, 50))
    monkeypatch.setattr(benchmark, "SMALL_SCALES", (0.9, 1.1))
    assert benchmark.silent(benchmark.noisy(benchmark.trunk(), 10)) == ([-20], [])
