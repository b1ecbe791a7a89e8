"""Names of volumes, and files that list them: text alone, as an evaluation needs it that reads no scan."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.errors import UserError


def without_suffix(name: str) -> str:
    """`train_1_a_1.nii.gz` -> `train_1_a_1`."""
    return name.removesuffix(".gz").removesuffix(".nii")


def split_name(text: str) -> str:
    """A split as tables and users name it, with one name for that which validates: `Validation` -> `valid`."""
    name = text.strip().lower()
    return "valid" if name in ("val", "validation", "dev") else name


def excluded_names(path: Path | None) -> set[str]:
    """Names in an --exclude file, with and without file suffix."""
    if path is None:
        return set()
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"--exclude {path} cannot be read: {error}") from error
    return {without_suffix(line) for line in lines if line and not line.startswith("#")}
