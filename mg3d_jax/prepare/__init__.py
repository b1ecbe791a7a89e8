"""Volumes and reports on disk -> checked, sharded records: `prepare(Settings("ctrate", root, "train", out))`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mg3d_jax.prepare.folder import Settings, prepare, summary

__all__ = ["Settings", "prepare", "summary"]


def __getattr__(name: str) -> Any:
    # On first use: a trainer splits reports into sentences, and does not need what reads and resamples scans.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mg3d_jax.prepare import folder

    return getattr(folder, name)
