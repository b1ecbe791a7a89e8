"""Which code this is: the package version, and in a git checkout the commit. Runs and prepared folders record both."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from mg3d_jax import __version__


@functools.cache
def commit() -> str | None:
    """Short hash of the checkout that the package lies in, with "+" where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+", "--abbrev=12"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def code() -> dict[str, str | None]:
    """JSON for a run or a prepared folder: `{"mg3d_jax": VERSION, "commit": HASH or None}`."""
    return {"mg3d_jax": __version__, "commit": commit()}
