"""The grid of a run: where scans from outside the prepared data are brought to."""

from __future__ import annotations

from mg3d_jax.prepare.geometry import Grid
from mg3d_jax.prepare.scans import Spacing, trained_grid
from mg3d_jax.training.restore import RestoredRun


def run_grid(run: RestoredRun, spacing: Spacing | None = None, policy: str | None = None) -> Grid:
    """The grid that the volumes of a run were brought to: as its checkpoint says, or its first data folder. `trained_grid`
    says what the arguments mean and what is an error."""
    settings = run.prepared("settings") or {}
    return trained_grid(run.config.grid, settings, spacing or run.prepared("spacing"), policy)
