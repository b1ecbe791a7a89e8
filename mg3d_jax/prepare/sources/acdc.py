"""ACDC, cardiac MR: `training/` and `testing/` with a folder per patient: `Info.cfg`, the 4D file, two frames with masks."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, Source, SourceOptions

FOLDERS = {"train": "training", "test": "testing"}
CLASSES = ("background", "right ventricle", "myocardium", "left ventricle")
# Normal, heart failure with infarction, dilated and hypertrophic cardiomyopathy, abnormal right ventricle.
GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
PHASES = ("ED", "ES")  # end of diastole and of systole: the frames that have masks


def list_acdc(options: SourceOptions) -> Listing:
    """Two examples per patient, the frames at the end of diastole and of systole, each with its mask. Labels: the diagnosis,
    one of `GROUPS`. A frame that has no file of its own is taken from the 4D file."""
    if options.split not in FOLDERS:
        raise UserError(f"--split {options.split!r}: ACDC has {', '.join(FOLDERS)}")
    root = options.root / "database" if (options.root / "database").is_dir() else options.root
    folder = root / FOLDERS[options.split]
    patients = sorted(path for path in folder.glob("patient*") if path.is_dir())
    if not patients:
        raise UserError(f"{folder} has no folders patient001, ...: --root is the folder with training/ and testing/")
    listing = Listing([], GROUPS, mask_names=CLASSES)
    for patient in patients:
        try:
            _add(listing, patient, read_info(patient / "Info.cfg"))
        except UserError as error:
            listing.add_bad(patient, str(error))
    for split, other in FOLDERS.items():
        if split != options.split:
            listing.other_splits[split] = {path.name for path in (root / other).glob("patient*") if path.is_dir()}
    return listing


def read_info(path: Path) -> dict[str, str]:
    """`Info.cfg`: `ED: 1`, `Group: DCM`, ... `UserError` where it is missing, or lacks frames or group."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    pairs = [line.partition(":") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = {key.strip(): value.strip() for key, colon, value in pairs if colon}
    if wrong := [phase for phase in PHASES if not found.get(phase, "").isdecimal() or int(found[phase]) < 1]:
        raise UserError(f"{path}: {wrong[0]} is {found.get(wrong[0])!r}, expected the number of a frame, from 1")
    if found.get("Group") not in GROUPS:
        raise UserError(f"{path}: Group is {found.get('Group')!r}, expected one of {', '.join(GROUPS)}")
    return found


def _add(listing: Listing, patient: Path, info: dict[str, str]) -> None:
    labels = tuple(int(info["Group"] == group) for group in GROUPS)
    whole = patient / f"{patient.name}_4d.nii.gz"
    for phase in PHASES:
        number = int(info[phase])
        name = f"{patient.name}_frame{number:02d}"
        own, mask = patient / f"{name}.nii.gz", patient / f"{name}_gt.nii.gz"
        path = own if own.is_file() else whole
        if not path.is_file():
            listing.add_bad(own, f"the frame {phase} of Info.cfg: neither this file nor {whole.name} exists")
        elif not mask.is_file():
            listing.add_bad(path, f"its mask {mask} does not exist")
        else:
            about = Metadata(modality="MR", frame=number - 1 if path == whole else None)
            listing.examples.append(
                Example(path, name, patient.name, name, "", "", labels, about, "acdc", mask=mask, has_report=False)
            )


# Short-axis stacks: thick slices keep their own spacing, or a heart would be two voxels high.
ACDC = Source(list_acdc, {"size": (160, 160, 16), "spacing": (1.5, 1.5, 10.0)})
