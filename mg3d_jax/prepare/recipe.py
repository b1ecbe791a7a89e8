"""The version of the recipe by which volumes and reports become records, and folders that were begun by other versions.

A preparation may take weeks and must survive a newer version of this code: it goes on where it was for as long as the same
input still gives the same bytes. `RECIPE_VERSION` says whether it does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mg3d_jax.data.records import MANIFEST_NAME
from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json, write_json
from mg3d_jax.version import code

logger = logging.getLogger(__name__)

# Raise it by one, and write `tests/golden/records.json` anew, when any record comes out with other bytes than before:
# another voxel, another sentence, another order of fields. A comment, a new source, a new option or a faster way to the
# same bytes is no reason. `tests/test_prepare_recipe.py` fails where the bytes change and the version does not. Volumes that
# came out wrong may be mended without: where `growth` knows them by their warnings and does them again.
RECIPE_VERSION = 1

WORK_FOLDER = "work"  # in a prepared folder: its plan, and a sidecar per finished shard
PLAN_NAME = "plan.json"
_NOT_COMPARED = ("root", "code", "recipe_version")  # a data set may move; the versions are judged apart

# Keys that earlier versions wrote: (their key, key of today, value made from theirs).
_RENAMED: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    # 0.1.0 wrote its version and a digest of its source files. All that it prepared is of recipe 1.
    ("code_version", "recipe_version", lambda _: 1),
    ("code_version", "code", lambda old: {"mg3d_jax": str(old).partition("+")[0], "commit": None}),
)


def migrated(document: dict[str, Any]) -> dict[str, Any]:
    """A `plan.json` or `manifest.json` of this or an earlier version, with the keys of this one."""
    old_keys = {old for old, _, _ in _RENAMED}
    renamed = {new: value(document[old]) for old, new, value in _RENAMED if old in document}
    return {key: value for key, value in document.items() if key not in old_keys} | renamed


def open_folder(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Creates the output folder with its plan, or checks that what lies there is the same preparation.

    Returns:
        The plan that the folder was begun with: `plan`, and under "code" the version that began it. None where an earlier
        recipe finished the folder: it can be used, and stays as it is.

    Raises:
        UserError: the folder holds other settings, is of a newer recipe, or is unfinished and of an earlier one (a folder
            never mixes recipes).
    """
    path = out / WORK_FOLDER / PLAN_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, plan | {"recipe_version": RECIPE_VERSION, "code": code()})
    found = migrated(read_json(path, remedy=f"delete {out} to start anew"))
    version, finished = found.get("recipe_version"), (out / MANIFEST_NAME).is_file()
    if not isinstance(version, int):
        raise UserError(f"{path}: recipe_version is {version!r}, not a number: delete {out} to start anew")
    keys = (plan.keys() | found.keys()) - set(_NOT_COMPARED) - ({"input"} if version == RECIPE_VERSION else set())
    if changed := sorted(key for key in keys if plan.get(key) != found.get(key)):
        raise UserError(
            f"{out} holds a preparation that differs in {changed}: choose another --out, or delete {out} to start anew"
        )
    begun_by = _described(found.get("code"))
    if version > RECIPE_VERSION:
        raise UserError(
            f"{path}: begun by {begun_by} with recipe version {version}; this code knows recipes up to {RECIPE_VERSION}: "
            "go on with that version of the code or a later one, or choose another --out"
        )
    if version < RECIPE_VERSION and not finished:
        raise UserError(
            f"{path}: begun by {begun_by} with recipe version {version}; this code's is {RECIPE_VERSION} and makes other "
            f"records, which one folder must not mix: finish it with that version of the code, choose another --out, or "
            f"delete {out} to start anew"
        )
    if version < RECIPE_VERSION:
        logger.warning(
            "prepare: %s was finished by %s with recipe version %d; it can be used and stays as it is. "
            "For the records of recipe version %d choose another --out",
            out, begun_by, version, RECIPE_VERSION,
        )  # fmt: skip
        return None
    if not finished and found.get("code") != code():
        logger.info("prepare: %s was begun by %s; %s goes on with the same recipe", out, begun_by, _described(code()))
    return found


def _described(found: dict[str, Any] | None) -> str:
    """`mg3d_jax 0.1.0 (commit 049de0e1f2a3)` of what `mg3d_jax.version.code` gave."""
    found = found or {}
    commit = f" (commit {found['commit']})" if found.get("commit") else ""
    return f"mg3d_jax {found.get('mg3d_jax') or 'of an unknown version'}{commit}"
