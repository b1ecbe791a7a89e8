"""The files of a DICOM folder: which are images, of which series, and which series is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mg3d_jax.prepare.nifti import VolumeError
from mg3d_jax.prepare.walk import check_regular

SERIES_RULE = "CT before other modalities, then most slices, then the softest kernel, then the lowest UID"
_FIRST_TAGS = tuple(
    b"\x08\x00" + bytes([element, 0]) for element in (0x00, 0x05, 0x08, 0x16)
)  # of a file without preamble
_TEXT_SUFFIXES = (
    ".txt",
    ".xml",
    ".html",
    ".htm",
    ".json",
    ".csv",
    ".pdf",
    ".md",
    ".log",
    ".ini",
    ".db",
    ".exe",
    ".inf",
)
_KERNELS = {"soft": 20, "smooth": 20, "standard": 30, "chest": 35, "detail": 45, "lung": 60, "bone": 70, "edge": 80}


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does; one without the preamble (some exports) is told by its first tag."""
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == b"DICM" or start[:4] in _FIRST_TAGS


def read_files(files: list[Path]) -> tuple[dict[str, list[tuple[Path, Any]]], list[str], int]:
    """(series UID -> files with their datasets, notes, how many images have no position)."""
    try:
        import pydicom
        from pydicom.uid import CTImageStorage
    except ImportError as error:
        raise VolumeError("DICOM needs pydicom: pip install pydicom") from error
    series: dict[str, list[tuple[Path, Any]]] = {}
    unreadable: list[tuple[Path, str]] = []
    readable: list[Path] = []
    others = unplaced = 0
    for file in files:
        dataset, reason = _open(pydicom, file)
        if dataset is None:
            unreadable.append((file, reason))
            continue
        kind = _sop_class(dataset, CTImageStorage)
        if "PixelData" not in dataset and kind == CTImageStorage:
            raise VolumeError(f"slice {file.name} is truncated: it ends before its pixels")
        if "PixelData" not in dataset:
            others += 1
            continue
        readable.append(file)
        if (dataset.get("NumberOfFrames") and int(dataset.NumberOfFrames) > 1) or (
            dataset.get("ImagePositionPatient") and dataset.get("ImageOrientationPatient")
        ):
            series.setdefault(series_uid(dataset), []).append((file, dataset))
        else:
            unplaced += 1
    left = _foreign(unreadable, readable)
    notes = [f"left out, no DICOM: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}"] if left else []
    if others:
        notes.append(f"left out: {others} DICOM files without an image")
    return series, notes, unplaced


def _open(pydicom: Any, file: Path) -> tuple[Any, str]:
    """(dataset, "") of a file, or (None, why it has none). Raises `VolumeError` for a slice that the system fails to read."""
    if isinstance(file, Path):
        check_regular(file)
    if not file.stat().st_size:
        return None, "empty"
    try:
        return pydicom.dcmread(_source(file)), ""
    except pydicom.errors.InvalidDicomError:
        try:  # without preamble and header, as some exports are
            dataset = pydicom.dcmread(_source(file), force=True)
        except Exception:
            return None, "no DICOM, or only the start of one"
        whole = "Rows" in dataset and "SOPClassUID" in dataset and "PixelData" in dataset
        if not whole:
            return None, "no DICOM, or only the start of one"
        _set_syntax(dataset)
        return dataset, ""
    except Exception as error:  # pydicom raises exceptions of many kinds
        raise VolumeError(f"slice {file.name} is unreadable: {type(error).__name__}: {error}") from error


def _source(file: Path) -> Any:
    """What pydicom reads: a path, or the content of a file in an archive."""
    return file if isinstance(file, Path) else file.open("rb")


def _set_syntax(dataset: Any) -> None:
    """A file without header does not say how its pixels are coded: as its tags are, uncompressed."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if getattr(dataset, "file_meta", None) is None:
        from pydicom.dataset import FileMetaDataset

        dataset.file_meta = FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def _sop_class(dataset: Any, default: str) -> str:
    # pydicom gives no error for a file that ends early. One that does not even say what it is ended early.
    meta = getattr(dataset, "file_meta", None) or {}
    return meta.get("MediaStorageSOPClassUID") or dataset.get("SOPClassUID", default)


def series_uid(dataset: Any) -> str:
    return str(dataset.get("SeriesInstanceUID", ""))


def _foreign(unreadable: list[tuple[Path, str]], readable: list[Path]) -> list[str]:
    """Names of the files that are no slices. Raises `VolumeError` for one that must have been: named as the slices are, or
    empty or binary under their suffix."""
    patterns = {re.sub(r"\d+", "#", path.name.lower()) for path in readable}
    suffixes = {path.suffix.lower() for path in readable if not path.suffix[1:].isdigit()} | {".dcm", ".ima"}
    left = []
    for path, reason in unreadable:
        like = re.sub(r"\d+", "#", path.name.lower()) in patterns
        text = path.suffix.lower() in _TEXT_SUFFIXES or (reason != "empty" and not path.suffix and _is_text(path))
        if like or (path.suffix.lower() in suffixes and not text) or (not path.suffix and not text and not readable):
            raise VolumeError(f"slice {path.name} is {reason}: copy it again, or delete it if it is none of the scan")
        if not text and not path.suffix and reason == "empty":
            raise VolumeError(f"slice {path.name} is empty: copy it again, or delete it if it is none of the scan")
        left.append(path.name)
    return left


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(1024)


def rank(found: list[tuple[Path, Any]]) -> tuple:
    """Smaller is taken first: `SERIES_RULE`."""
    dataset = found[0][1]
    frames = sum(int(d.get("NumberOfFrames") or 1) for _, d in found)
    return (dataset.get("Modality", "CT") != "CT", -frames, _sharpness(kernel_of(dataset)), series_uid(dataset))


def kernel_of(dataset: Any) -> str:
    kernel = dataset.get("ConvolutionKernel") or ""
    return str(kernel) if isinstance(kernel, str) else " ".join(map(str, kernel))


def _sharpness(kernel: str) -> float:
    """A number that grows from soft to sharp kernels: that of Siemens and Canon names (B30f, FC51), or of a word."""
    for word, value in _KERNELS.items():
        if word in kernel.lower():
            return value
    digits = re.search(r"\d+", kernel)
    return float(digits[0]) if digits else 50.0
