"""Volumes and reports on disk -> checked, sharded records: `prepare(Settings("ctrate", root, "train", out))`."""

from mg3d_jax.prepare.folder import Settings, prepare, summary

__all__ = ["Settings", "prepare", "summary"]
