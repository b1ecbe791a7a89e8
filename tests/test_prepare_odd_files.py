"""What people's files are like: odd DICOM folders, NIfTI under other names and contradicting headers, tables, texts, links."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid
from reference.synthetic_ct import affine, body, write_nifti

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.cleaning import artefacts, clean
from mg3d_jax.prepare.geometry import Grid, Metadata
from mg3d_jax.prepare.listing import SourceOptions, index_by_name
from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.reports import split_sections, split_sentences
from mg3d_jax.prepare.sources.table import list_table
from mg3d_jax.prepare.volumes import PreparedVolume, prepare_volume

SHAPE, SPACING = (24, 20, 18), (16.0, 16.0, 18.0)
GRID = Grid(SHAPE, SPACING)


def small() -> np.ndarray:
    return body(SHAPE, spacing=SPACING)


def image(k: int, *, series: str = "1.2.1", **changes: object) -> FileDataset:
    """Slice k of the small body, axial; `changes` are tags."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    one = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    hu = small()[::-1, ::-1, k].T
    one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    one.SeriesInstanceUID, one.Modality, one.InstanceNumber = series, "CT", k + 1
    one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    one.Rows, one.Columns = hu.shape
    one.PixelSpacing, one.ImageOrientationPatient = [16.0, 16.0], [1, 0, 0, 0, 1, 0]
    one.ImagePositionPatient = [-184.0, -152.0, 18.0 * k]
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, "MONOCHROME2", 0
    one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
    one.RescaleSlope, one.RescaleIntercept = 1, -1024
    one.PixelData = (hu.astype(np.int32) + 1024).astype(np.uint16).tobytes()
    for tag, value in changes.items():
        setattr(one, tag, value)
    return one


def write_series(folder: Path, names: str = "IM{:04d}", slices=range(18), **changes: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for k in slices:
        image(k, **changes).save_as(folder / names.format(k), enforce_file_format=True)
    return folder


def read(path: Path, metadata: Metadata | None = None) -> PreparedVolume:
    return prepare_volume(path, GRID, metadata)


def said(got: PreparedVolume) -> str:
    return " | ".join([*got.quality["warnings"], *got.quality.get("notes", [])])


@pytest.mark.parametrize("content", [b"", b"\0\1\2binary", b"text that is no slice"])
@pytest.mark.parametrize("names", ["IM{:04d}", "1.2.840.{:d}", "slice_{:d}.dcm", "a.{:03d}"])
def test_a_slice_that_cannot_be_read_is_named_whatever_its_name(tmp_path, names, content):
    folder = write_series(tmp_path / "scan", names)
    path = folder / names.format(5)
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=f"slice {path.name} is"):
        read(folder)


def test_files_that_are_no_slices_are_left_out_with_a_note(tmp_path):
    folder = write_series(tmp_path / "scan")
    (folder / "README").write_text("from the hospital")
    (folder / "Thumbs.db").write_bytes(bytes(200))
    Image.new("L", (8, 8)).save(folder / "preview.jpg")
    np.testing.assert_array_equal(read(folder).volume, small())
    assert "README" in said(read(folder)) and "preview.jpg" in said(read(folder))


def test_scouts_dose_pages_and_copies_do_not_lose_a_scan(tmp_path):
    folder = write_series(tmp_path / "scan")
    scout = image(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    scout.save_as(folder / "scout", enforce_file_format=True)
    page = image(1, Rows=10, Columns=8, PixelData=bytes(160))
    page.save_as(folder / "page", enforce_file_format=True)
    shutil.copy(folder / "IM0003", folder / "IM0003 (1)")
    image(4).save_as(folder / "again", enforce_file_format=True)  # the same slice under another UID
    got = read(folder)
    np.testing.assert_array_equal(got.volume, small())
    assert all(word in said(got) for word in ("1 scouts", "another size", "1 copies", "repeat another"))


def test_series_are_chosen_by_a_rule_in_any_order(tmp_path):
    folder = write_series(tmp_path / "scan", "sharp{:d}", series="1.2.0", ConvolutionKernel="B70f")
    write_series(folder, "soft{:d}", series="1.2.9", ConvolutionKernel="B30f")
    write_series(folder, "pet{:d}", series="1.2.3", Modality="PT")
    write_series(folder, "few{:d}", range(5), series="1.2.2")
    assert "kernel B30f, taken (1.2.9); rule: CT before" in said(read(folder))


def test_instance_numbers_tell_of_slices_that_never_came(tmp_path):
    assert "begin at 4" in said(read(write_series(tmp_path / "end", slices=range(3, 18))))
    folder = write_series(tmp_path / "hole", slices=[k for k in range(18) if k != 7])
    assert "1 of 18 filled in" in said(read(folder)) and "1 instance numbers" in said(read(folder))
    folder = write_series(tmp_path / "order")
    image(3, InstanceNumber=9).save_as(folder / "IM0003", enforce_file_format=True)
    image(8, InstanceNumber=4).save_as(folder / "IM0008", enforce_file_format=True)
    assert "contradicts the positions" in said(read(folder))


def test_slices_that_contradict_one_another_or_the_header_are_said(tmp_path):
    """A table that moved, a copy that broke off, more images announced than there are, another modality."""
    count = SHAPE[2]

    def made(name: str, **changes: object) -> Path:
        (tmp_path / name).mkdir()
        for k in range(count):
            one = image(k, **{tag: value(k) if callable(value) else value for tag, value in changes.items()})
            one.save_as(tmp_path / name / f"{k:03d}.dcm", enforce_file_format=True)
        return tmp_path / name

    aside = made("moved", ImagePositionPatient=lambda k: [-184.0 + 40 * (k > count // 2), -152.0, 18.0 * k])
    with pytest.raises(VolumeError, match=r"do not lie on one line: .* mm aside"):
        prepare_volume(aside, GRID)
    for modality in ("PT",):
        with pytest.raises(VolumeError, match=f"says that it is {modality}, and it is to be read as CT"):
            prepare_volume(made(modality, Modality=modality), GRID)
    said = prepare_volume(made("total", ImagesInAcquisition=30), GRID).quality["warnings"]
    assert any("the acquisition has 30 images, 18 are here" in warning for warning in said)
    cut = made("cut")
    whole = (cut / "009.dcm").read_bytes()
    (cut / "009.dcm").write_bytes(whole[:-940] + bytes(940))
    assert any(
        "hardly more than one number, such as 009.dcm" in w for w in prepare_volume(cut, GRID).quality["warnings"]
    )


def test_slices_out_of_order_or_copied_and_numbers_that_ran_over_are_said(tmp_path):
    big, spacing = body((48, 40, 36)), (8.0, 8.0, 9.0)
    grid = Grid((48, 40, 36), spacing)

    def said(name: str, data: np.ndarray) -> str:
        path = write_nifti(tmp_path / f"{name}.nii", data, affine(spacing))
        return " ".join(prepare_volume(path, grid).quality["warnings"])

    assert said("plain", big) == ""
    shuffled = big[:, :, np.random.default_rng(0).permutation(36)]
    assert "slices out of order" in said("shuffled", shuffled)
    with_nan = shuffled.astype(np.float32)
    with_nan[20, 20] = np.nan  # one voxel of every slice
    assert "slices out of order" in said("shuffled_nan", with_nan)
    assert "neighbouring slices are the same" in said("copied", big[:, :, np.repeat(np.arange(18), 2)])
    assert "numbers ran over" in said("over", np.where(big > 100, big - 4096, big))


def test_dicom_forms_are_read_or_refused_with_the_remedy(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for k in range(18):
        one = image(k)
        del one.file_meta
        Dataset(one).save_as(folder / f"{k}", implicit_vr=True, little_endian=True, enforce_file_format=False)
    np.testing.assert_array_equal(read(folder).volume, small())
    np.testing.assert_array_equal(read(write_series(tmp_path / "top" / "A" / "B").parents[1]).volume, small())
    folder = write_series(tmp_path / "unplaced", ImagePositionPatient=None)
    with pytest.raises(VolumeError, match=r"no positions .*restore"):
        read(folder)
    with pytest.raises(VolumeError, match="two slice spacings"):
        read(write_series(tmp_path / "two", slices=[*range(0, 10, 2), *range(10, 18)]))
    with pytest.raises(VolumeError, match=r"one slice .*give the folder"):
        read(tmp_path / "top" / "A" / "B" / "IM0003")
    phases = write_series(tmp_path / "phases")
    changed = image(2, PixelData=bytes(24 * 20 * 2))
    changed.save_as(phases / "other", enforce_file_format=True)
    with pytest.raises(VolumeError, match="same position and differ"):
        read(phases)


def test_an_enhanced_multi_frame_file_is_a_volume(tmp_path):
    whole = image(0, SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=18)
    whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.PixelData = b"".join(image(k).PixelData for k in range(18))
    shared, frames = Dataset(), []
    measures, direction, scale = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, direction.ImageOrientationPatient = [16.0, 16.0], [1, 0, 0, 0, 1, 0]
    scale.RescaleSlope, scale.RescaleIntercept = 1, -1024
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([direction])
    shared.PixelValueTransformationSequence = Sequence([scale])
    for k in range(18):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [-184.0, -152.0, 18.0 * k]
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    del whole.ImagePositionPatient, whole.ImageOrientationPatient, whole.PixelSpacing
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = Sequence([shared]), Sequence(frames)
    whole.save_as(tmp_path / "all.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read(tmp_path / "all.dcm").volume, small())
    del whole.PerFrameFunctionalGroupsSequence
    whole.save_as(tmp_path / "lost.dcm", enforce_file_format=True)
    with pytest.raises(VolumeError, match="multi-frame"):
        read(tmp_path / "lost.dcm")


def test_the_padding_value_of_the_header_is_air(tmp_path):
    hu = small()
    folder = tmp_path / "scan"
    folder.mkdir()
    for k in range(18):
        stored = (hu[::-1, ::-1, k].T.astype(np.int32) + 1024).astype(np.uint16)
        stored[:3] = 1060  # 36 HU, as tissue has it too
        one = image(k, PixelPaddingValue=1060, PixelData=stored.tobytes())
        one.save_as(folder / f"IM{k}", enforce_file_format=True)
    got = read(folder).volume
    np.testing.assert_array_equal(got[:, -3:], -1024)
    np.testing.assert_array_equal(got[:, :-4], hu[:, :-4])


def test_numbers_in_the_names_of_pictures_have_no_holes(tmp_path):
    grey = np.rint((np.clip(small(), -1200, 800) + 1200) / 2000 * 255).astype(np.uint8)
    for k in range(18):
        if k not in (6, 7):
            Image.fromarray(grey[::-1, ::-1, k].T).save(tmp_path / f"s{k}.png")
    got = read(tmp_path, Metadata(spacing=SPACING, axes="LPS", window=(-1200.0, 800.0)))
    assert "2 holes" in said(got)


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz", "v.nii.bz2", "volume", "v.img", "v.hdr.gz"])
@pytest.mark.parametrize("packed", ["plain", "gzip", "bz2"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_nifti_is_told_by_its_content(tmp_path, name, packed, kind):
    pack = {"plain": bytes, "gzip": gzip.compress, "bz2": bz2.compress}[packed]
    pair = {nib.Nifti1Image: nib.nifti1.Nifti1Pair, nib.Nifti2Image: nib.nifti2.Nifti2Pair}[kind]
    if name.startswith("v.img") or name.startswith("v.hdr"):
        files = pair.make_file_map({"header": io.BytesIO(), "image": io.BytesIO()})
        pair(small(), affine(SPACING)).to_file_map(files)
        suffix = ".gz" if name.endswith(".gz") else ""
        (tmp_path / f"v.hdr{suffix}").write_bytes(pack(files["header"].fileobj.getvalue()))
        (tmp_path / f"v.img{suffix}").write_bytes(pack(files["image"].fileobj.getvalue()))
    else:
        (tmp_path / name).write_bytes(pack(kind(small(), affine(SPACING)).to_bytes()))
    np.testing.assert_array_equal(read(tmp_path / name).volume, small())


def coded(path: Path, sform: np.ndarray, qform: np.ndarray, unit: str = "mm") -> Path:
    made = nib.Nifti1Image(small(), sform)
    made.set_sform(sform, 1)
    made.set_qform(qform, 1)
    made.header.set_xyzt_units(unit)
    nib.save(made, path)
    return path


def test_contradicting_forms_are_repaired_by_evidence_or_refused_with_both(tmp_path):
    right, wrong, tiny = affine(SPACING), affine((16.0, 16.0, 5.0)), affine((0.016, 0.016, 0.018))
    both = coded(tmp_path / "both.nii", right, wrong)
    with pytest.raises(VolumeError, match=r"contradicts itself.*18\.0\].*5\.0\]"):
        read(both)
    got = read(both, Metadata(spacing=SPACING))
    np.testing.assert_array_equal(got.volume, small())
    assert "contradicts itself" in said(got) and "the metadata table" in said(got)
    np.testing.assert_array_equal(read(coded(tmp_path / "tiny.nii", right, tiny)).volume, small())
    flipped = right @ np.diag([-1.0, 1.0, 1.0, 1.0])
    with pytest.raises(VolumeError, match=r"RAS and .*LAS"):
        read(coded(tmp_path / "flip.nii", right, flipped))
    metres = coded(tmp_path / "metres.nii", tiny, tiny, "meter")
    np.testing.assert_array_equal(read(metres).volume, small())
    mislabelled = read(coded(tmp_path / "mm.nii", right, right, "micron"))
    np.testing.assert_array_equal(mislabelled.volume, small())
    assert "taken for mm" in said(mislabelled)
    old = nib.Nifti1Image(small(), right)
    old.header["pixdim"][3] = 9.0
    nib.save(old, tmp_path / "pixdim.nii")
    with pytest.raises(VolumeError, match="contradicts itself"):
        read(tmp_path / "pixdim.nii")


@pytest.mark.parametrize("what", ["pipe", "loop", "gone", "bomb", "long tail"])
def test_what_is_no_volume_neither_hangs_nor_fills_the_memory(tmp_path, what):
    path = tmp_path / "v.nii.gz"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "gone":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        header = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).header
        if what == "bomb":
            header.set_data_shape((1200, 1200, 400))
        path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + 16), 1) + gzip.compress(bytes(1 << 25), 1) * 2)
    reasons = {"pipe": "not a regular", "loop": "cannot be opened", "gone": "no such file: a link", "bomb": "announced"}
    with pytest.raises(VolumeError, match=reasons.get(what, "bytes follow")):
        read(path)


def test_links_are_followed_and_cycles_end(tmp_path):
    write_nifti(tmp_path / "disk" / "a.nii.gz", small(), affine(SPACING))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "set")
    assert index_by_name(tmp_path / "set") == {"a": [tmp_path / "set" / "linked" / "a.nii.gz"]}


WORDS = st.lists(st.sampled_from(["The lungs are clear", "No effusion", "Heart size normal"]), min_size=1, max_size=4)
BREAKS = ["_x000D_\n", "\\n", "\\r\\n", "<br>", "<BR/>", "</p><p>", "&#10;", "_x000d__x000a_", "</li>\n<li class='x'>"]


@settings(max_examples=60, deadline=None)
@given(
    words=WORDS,
    breaks=st.lists(st.sampled_from(BREAKS), min_size=4, max_size=4),
    space=st.sampled_from([" ", "&nbsp;"]),
)
def test_what_exports_leave_in_texts_is_taken_out(words, breaks, space):
    text = "".join(w.replace(" ", space) + "." + b for w, b in zip(words, breaks, strict=False))
    assert split_sentences(text) == tuple(f"{word}." for word in words)
    assert artefacts(text) and clean(clean(text)) == clean(text)


@pytest.mark.parametrize("text", ["Nodules <3 mm and >2 mm.", "C:\\new\\table is a path.", "A & B; x_x0y_ stays."])
def test_what_only_looks_like_an_artefact_stays(text):
    assert clean(text) == text and artefacts(text) == []


@pytest.mark.parametrize("stop", "।۔。｡።։")
def test_full_stops_of_other_scripts(stop):
    assert split_sentences(f"Clear lungs{stop} No effusion{stop}") == ("Clear lungs.", "No effusion.")


@settings(max_examples=60, deadline=None)
@given(
    before=st.sampled_from(["", "HISTORY: Cough.\n", "Clinical information: Cough\n", "EXAM: CT CHEST\n\n"]),
    heading=st.sampled_from(["FINDINGS: {}", "Findings:\n{}", "FINDINGS\n{}", "**Findings:** {}", "FINDINGS - {}"]),
    end=st.sampled_from(["IMPRESSION: {}", "Conclusion:\n{}", "IMPRESSION\n{}", "IMPRESSION {}", "**Impression:** {}"]),
    other=st.sampled_from(["", "TECHNIQUE: Axial 1 mm slices.\n", "Comparison: None.\n"]),
)
def test_sections_of_one_text(before, heading, end, other):
    text = before + other + heading.format("No nodule is seen.") + "\n\n" + end.format("Normal chest.")
    assert split_sections(text) == ("No nodule is seen.", "Normal chest.")


def test_times_of_day_and_numbered_items():
    assert split_sentences("Scanned at 8 a.m. and 10.30 p.m. today. Normal.")[0].endswith("today.")
    for form in ("1) {} 2) {}", "1. {} 2. {}", "(1) {} (2) {}", "1.) {} 2.) {}", "#1: {} #2: {}", "1- {}\n2- {}"):
        assert split_sentences(form.format("Ödem.", "Şişlik.")) == ("Ödem.", "Şişlik.")


def listed(folder: Path, text: str | bytes):
    (folder / "t.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return list_table(SourceOptions(folder / "t.csv", "train"))


@pytest.fixture(scope="module")
def two_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(folder / name, small(), affine(SPACING))
    return folder


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "{d}\n", "\r\n", "{d}{d}\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_any_form_move_no_column(two_files, delimiter, end, encoding):
    rows = [["volume", "report", "patient"], ["a.nii.gz", '"Nodule, left; ""x""."', "p0"], ["b.nii.gz", "Clear.", "p1"]]
    text = delimiter.join(rows[0]) + "\n" + "".join(delimiter.join(row) + end.format(d=delimiter) for row in rows[1:])
    found = listed(two_files, text.encode(encoding))
    assert [(e.path.name, e.patient) for e in found.examples] == [("a.nii.gz", "p0"), ("b.nii.gz", "p1")]
    assert any("divided by" in note for note in found.notes) == (delimiter != ",")


def test_tables_that_cannot_be_read_are_refused_with_the_place(two_files):
    with pytest.raises(UserError, match=r"not UTF-8: byte 0xFC in line 2.*Windows-1252"):
        listed(two_files, "volume,report\na.nii.gz,Schädel für\n".replace("ä", "a").encode("cp1252"))
    with pytest.raises(UserError, match="line 3 has 4 cells, the header 2"):
        listed(two_files, "volume,report\na.nii.gz,Clear.\nb.nii.gz,Nodule, left, small\n")
    with pytest.raises(UserError, match="never ends"):
        listed(two_files, 'volume,report\na.nii.gz,"Clear.\nb.nii.gz,Nodule\n')


def test_labels_with_blanks_and_booleans_and_the_first_bad_value(two_files):
    text = "volume,report,Nodule,Effusion,Age,Score\n" + "".join(
        f"{name},Clear.,{nodule},{effusion},61,{score}\n"
        for name, nodule, effusion, score in [("a.nii.gz", " True ", "yes", 1), ("b.nii.gz", "", " 0 ", 0)] * 3
        + [("a.nii.gz", "false", "no", "maybe")]
    )
    found = listed(two_files, text)
    assert found.label_names == ("Nodule", "Effusion")
    assert [e.labels for e in found.examples] == [(1, 1), (-1, 0)]
    assert any("'Score' is not taken for a label: row 8 has 'maybe'" in note for note in found.notes)
    assert [b["reason"] for b in found.bad] == [
        "second report row of a.nii.gz",
        "second report row of b.nii.gz",
    ] * 2 + ["second report row of a.nii.gz"]
