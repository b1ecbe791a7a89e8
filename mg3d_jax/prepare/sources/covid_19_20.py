"""COVID-19-20: `Train/` and `Validation/` with `NAME_ct.nii.gz` and, of `Train/`, `NAME_seg.nii.gz`."""

from __future__ import annotations

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.geometry import Metadata
from mg3d_jax.prepare.listing import Example, Listing, Source, SourceOptions

FOLDERS = {"train": "Train", "test": "Validation"}
CLASSES = ("background", "lesion")
_CT, _SEG = "_ct.nii.gz", "_seg.nii.gz"


def list_covid_19_20(options: SourceOptions) -> Listing:
    """Masks of COVID-19 lesions. The publishers keep the masks of `Validation/` (split `test`): `--fold` holds patients of
    `train` out. A patient is a volume."""
    if options.split not in FOLDERS:
        raise UserError(f"--split {options.split!r}: COVID-19-20 has {', '.join(FOLDERS)}")
    folder = options.root / FOLDERS[options.split]
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: --root is the folder with Train/ and Validation/")
    listing = Listing([], (), mask_names=CLASSES)
    volumes = {path.name.removesuffix(_CT): path for path in sorted(folder.glob(f"*{_CT}"))}
    masks = {path.name.removesuffix(_SEG): path for path in sorted(folder.glob(f"*{_SEG}"))}
    for name in sorted(volumes.keys() | masks.keys()):
        if name not in volumes:
            listing.add_bad(masks[name], "a mask without a volume")
        elif name not in masks and options.split == "train":
            listing.add_bad(volumes[name], f"its mask {folder / (name + _SEG)} does not exist")
        else:
            listing.examples.append(
                Example(
                    volumes[name],
                    volumes[name].name,
                    name,
                    name,
                    "",
                    "",
                    (),
                    Metadata(),
                    "covid-19-20",
                    mask=masks.get(name),
                    has_report=False,
                )
            )
    for split, other in FOLDERS.items():
        if split != options.split:
            found = (options.root / other).glob(f"*{_CT}")
            listing.other_splits[split] = {path.name.removesuffix(_CT) for path in found}
    return listing


COVID_19_20 = Source(list_covid_19_20, {"size": (256, 256, 224), "spacing": (1.5, 1.5, 1.5), "policy": "body"})
