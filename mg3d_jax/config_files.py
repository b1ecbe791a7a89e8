"""Finds config files: those of the user, and those that came with the package."""

from __future__ import annotations

from pathlib import Path

from mg3d_jax.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# In a wheel the folder lies within the package, in a checkout beside it.
SHIPPED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def find(path: str) -> str:
    """`FILE[:ARG]` with FILE as it is to be opened.

    A FILE that is not there, seen from the working directory, is looked for among the configs that came with the package:
    `configs/quickstart.py` works from any folder.

    Raises:
        UserError: there is no such file.
    """
    file, colon, argument = path.partition(":")
    if Path(file).is_file():
        return path
    parts = Path(file).parts
    if parts[:1] == ("configs",) and ".." not in parts and (shipped := SHIPPED.joinpath(*parts[1:])).is_file():
        return f"{shipped}{colon}{argument}"
    names = [str(Path("configs", one.relative_to(SHIPPED))) for one in sorted(SHIPPED.rglob("*.py"))]
    raise UserError(
        f"config file {file!r} does not exist. Write --config FILE[:ARG]; these came with the package: {', '.join(names)}"
    )
