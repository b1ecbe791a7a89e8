"""The Medical Segmentation Decathlon (Task06 lung, Task10 colon, ...): `dataset.json`, images and masks as NIfTI."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, Source, SourceOptions
from mg3d_jax.prepare.names import without_suffix

_SPLITS = {"train": "training", "valid": "validation", "test": "test"}


def list_decathlon(options: SourceOptions) -> Listing:
    """ROOT is the folder with `dataset.json` (or that file, or another list of its form): `training` names pairs of image
    and label, `test` images without labels. `train` is `training`; what is held out of it is a fold (`--fold`), as the
    publishers keep the masks of `test`; lists of one's own may have `validation`. A patient is an image."""
    path = options.root / "dataset.json" if options.root.is_dir() else options.root
    if not path.is_file():
        raise UserError(f"{path} does not exist: --root is the folder of a task, such as Task06_Lung")
    content = read_json(path, remedy="download it again")
    key = _SPLITS.get(options.split)
    if not isinstance(content, dict) or key is None or not isinstance(content.get(key), list):
        lists = [split for split, name in _SPLITS.items() if isinstance(content, dict) and content.get(name)]
        raise UserError(f"--split {options.split!r}: {path} has {lists}")
    modality = "MR" if "CT" not in _first_modality(content) else "CT"
    listing = Listing([], (), mask_names=class_names(path, content))
    listing.notes.append(f"classes of the masks: {', '.join(listing.mask_names)}")
    seen: set[Path] = set()
    for row in content[key]:
        named, label = _pair(row)
        if named is None or (label is None and key != "test"):
            listing.add_bad(path, f"an entry without image or label: {str(row)[:80]}")
            continue
        image, mask = path.parent / named, path.parent / label if label else None
        if image in seen:
            listing.add_bad(image, f"named twice in {key!r} of {path.name}")
            continue
        seen.add(image)
        if problem := _missing(image, mask, options):
            listing.add_bad(image, problem)
            continue
        name, about = without_suffix(image.name), Metadata(modality=modality)
        listing.examples.append(
            Example(image, image.name, name, name, "", "", (), about, "decathlon", mask=mask, has_report=False)
        )
    for split, name in _SPLITS.items():
        if name != key and isinstance(content.get(name), list):
            images = [_pair(row)[0] for row in content[name]]
            listing.other_splits[split] = {without_suffix(Path(image).name) for image in images if image}
    return listing


def _missing(image: Path, label: Path | None, options: SourceOptions) -> str:
    if not image.exists() and not options.streaming:
        return "listed, but there is no such file"
    return f"its mask {label} does not exist" if label is not None and not label.exists() else ""


def _pair(row: Any) -> tuple[str | None, str | None]:
    """Image and label of an entry, relative paths; an entry of `test` may be the image alone."""
    if isinstance(row, str):
        return row, None
    if not isinstance(row, dict):
        return None, None
    return row.get("image"), row.get("label")


def _first_modality(content: dict[str, Any]) -> str:
    return str((content.get("modality") or {"0": "CT"}).get("0", "CT"))


def class_names(path: Path, content: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes by value. `UserError` where `labels` does not number them from 0 on."""
    found = content.get("labels")
    pairs = list(found.items()) if isinstance(found, dict) else []
    if pairs and all(re.fullmatch(r"\d+", str(value)) for _, value in pairs):  # nnU-Net's newer form: name -> value
        pairs = [(str(value), name) for name, value in pairs]
    names = {int(value): str(name) for value, name in pairs if re.fullmatch(r"\d+", str(value))}
    if not names or len(names) != len(pairs) or sorted(names) != list(range(len(names))):
        raise UserError(f'{path}: "labels" is {found!r}: expected {{"0": "background", "1": NAME, ...}}')
    return tuple(names[value] for value in range(len(names)))


_BODY = {"spacing": (1.5, 1.5, 1.5), "policy": "body"}
MSD_LUNG = Source(list_decathlon, _BODY | {"size": (256, 256, 224)})
MSD_COLON = Source(list_decathlon, _BODY | {"size": (256, 256, 320)})
