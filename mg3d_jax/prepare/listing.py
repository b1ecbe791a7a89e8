"""What a source gives: examples whose volumes were not opened yet, and everything that does not fit together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mg3d_jax.prepare.cleaning import artefacts, clean
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.reading import ARRAY_SUFFIXES, IMAGE_SUFFIXES, NIFTI_SUFFIXES
from mg3d_jax.prepare.walk import walk


@dataclass(frozen=True)
class SourceOptions:
    """What a source is asked for. The last four are for files that do not say it themselves."""

    root: Path
    split: str
    reconstructions: str = "all"  # of one scan: all, first, best
    exclude: Path | None = None  # text file with one volume name (or patient, or scan) per line
    streaming: bool = False  # volumes need not be on disk: they are fetched one by one
    array_spacing: tuple[float, float, float] | None = None  # mm of the index axes
    array_axes: str | None = None  # where the index axes point, such as "LPS"
    slice_window: tuple[float, float] | None = None  # HU of grey 0 and 255
    filters: tuple[str, ...] = ()  # names in `selection.FILTERS`
    label_mapping: str = "hlip"  # of Rad-ChestCT's abnormalities, in `data.rad_chestct.MAPPINGS`
    negatives: int = 20  # of candidate lists: how many negatives of a scan are kept; 0: all


@dataclass(frozen=True)
class Example:
    """One volume with its report, before any voxel is read."""

    path: Path
    name: str
    patient: str
    scan: str
    findings: str
    impression: str
    labels: tuple[int, ...]
    metadata: Metadata
    source: str
    mask: Path | None = None  # file of the class of each voxel, on the volume's own grid
    has_report: bool = True  # False: the data set has no reports, and the record's is empty


@dataclass
class Listing:
    """What a source found."""

    examples: list[Example]
    label_names: tuple[str, ...]
    bad: list[dict[str, str]] = field(default_factory=list)  # {"path", "reason"}
    skipped: dict[str, int] = field(default_factory=dict)  # rule -> how many it left out; not for a fault
    notes: list[str] = field(default_factory=list)  # said once, in the summary and the manifest
    other_splits: dict[str, set[str]] = field(default_factory=dict)  # patients of the data set's other splits
    mask_names: tuple[
        str, ...
    ] = ()  # classes of the masks, by their value: "background" first; () where there are no masks

    cleaned: dict[str, int] = field(default_factory=dict)  # what was taken out of texts -> how many texts had it

    def clean(self, text: object) -> str:
        """`cleaning.clean`, counted."""
        for kind in artefacts(text):
            self.cleaned[kind] = self.cleaned.get(kind, 0) + 1
        return clean(text)

    def add_bad(self, path: Path | str, reason: str) -> None:
        self.bad.append({"path": str(path), "reason": reason})


@dataclass(frozen=True)
class Source:
    """A layout with settings of its own.

    Args:
        list_all: from what is asked for to what is there; opens no volume.
        defaults: fields of `folder.Settings` (`size`, `spacing`, `policy`, ...) where the user gives none: how the data set is
            usually read.
    """

    list_all: Callable[[SourceOptions], Listing]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, options: SourceOptions) -> Listing:
        return self.list_all(options)


def second_file(name: str, first: Path) -> str:
    """Why the second file of a name is bad."""
    return f"second file of {name}, the first is {first}: keep one of them"


def outside_metadata(path: Path, options: SourceOptions, about: Metadata | None = None) -> Metadata:
    """`about`, completed by what the command line says of files without a header."""
    about = about or Metadata()
    if path.name.endswith(NIFTI_SUFFIXES):
        return about
    return replace(
        about,
        spacing=about.spacing or options.array_spacing,
        axes=about.axes or options.array_axes,
        window=options.slice_window,
    )


def index_by_name(root: Path) -> dict[str, list[Path]]:
    """Stem -> paths of every volume under `root`: NIfTI and array files, and folders that hold slices. More than one
    path is a fault of the data set."""
    found: dict[str, list[Path]] = {}
    for parent, files in walk(root):
        for file in files:
            if file.endswith((*NIFTI_SUFFIXES, *ARRAY_SUFFIXES)) and not file.startswith("."):
                found.setdefault(re.sub(r"\.(nii\.gz|nii|npy|npz)$", "", file), []).append(parent / file)
        if parent != root and any(file.lower().endswith((*IMAGE_SUFFIXES, ".dcm")) for file in files):
            found.setdefault(parent.name, []).append(parent)
    return found
