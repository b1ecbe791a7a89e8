"""Which findings are scored, by name: published mean AUROCs are over different sets and compare only over the same one."""

from __future__ import annotations

from collections.abc import Sequence

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError

ALL = "all"
_NOT_IN_16 = ("Medical material", "Lymphadenopathy")
CLASS_SETS: dict[str, tuple[str, ...]] = {
    "ct_rate_18": ABNORMALITIES,
    # What fVLM and HLIP average over.
    "ct_rate_16": tuple(name for name in ABNORMALITIES if name not in _NOT_IN_16),
    # Those of the 16 that HLIP's mapping of Rad-ChestCT's labels has.
    "rad_chestct_15": tuple(n for n in ABNORMALITIES if n not in (*_NOT_IN_16, "Mosaic attenuation pattern")),
}


def classes_of(name: str, label_names: Sequence[str]) -> tuple[str, ...]:
    """The classes of a set, in the order of the labels.

    Args:
        name: "all", one of `CLASS_SETS`, or names of labels with commas between them.
        label_names: what the data is labelled with.

    Raises:
        UserError: the set needs a label that the data does not have.
    """
    if name == ALL:
        return tuple(label_names)
    wanted = CLASS_SETS.get(name) or tuple(part.strip() for part in name.split(",") if part.strip())
    if not wanted:
        raise UserError(f"classes = {name!r} names no class: choose {ALL!r}, or one of {', '.join(CLASS_SETS)}")
    if missing := [one for one in wanted if one not in label_names]:
        what = "needs labels" if name in CLASS_SETS else "is no set of classes and names labels"
        raise UserError(
            f"classes = {name!r} {what} that the data does not have: {', '.join(missing)}. It has: "
            f"{', '.join(label_names) or 'none'}. Choose {ALL!r}, one of {', '.join(CLASS_SETS)}, or names of labels with "
            "commas between them"
        )
    return tuple(one for one in label_names if one in wanted)


def protocol_name(classes: Sequence[str]) -> str:
    """How the set is called in the key of a number: as published, or by how many there are (up to three: by their names)."""
    for name, known in CLASS_SETS.items():
        if set(classes) == set(known):
            return name
    return "+".join(classes) if 0 < len(classes) <= 3 else f"labels_{len(classes)}"
