"""The options of `mg3d prepare`: what to prepare and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.errors import UserError
from mg3d_jax.prepare import leaks
from mg3d_jax.prepare.fetch import check_command
from mg3d_jax.prepare.geometry import PAPER_FRACTION, POLICIES, Grid
from mg3d_jax.prepare.growth import COMPARE
from mg3d_jax.registry import SOURCES


@dataclass(frozen=True)
class Settings:
    """What to prepare and how: the options of `mg3d prepare`. Axes are in RAS+ order: x to the patient's right, y anterior, z
    superior."""

    source: str  # layout of the data set: a name in `mg3d_jax.registry.SOURCES`
    root: Path  # folder of the data set, or its table
    split: str
    out: Path  # folder for the records
    size: tuple[int, int, int] = (128, 128, 96)  # of the grid, voxels
    spacing: tuple[float, float, float] = (2.8, 2.8, 3.5)  # mm per voxel
    policy: str = "center"  # which part of a volume the grid is laid on: a name in `geometry.POLICIES`
    fraction: tuple[float, float, float] = PAPER_FRACTION  # share of each axis that the policy "fraction" keeps
    workers: int = 1  # processes
    max_bad_share: float = 0.1  # largest share of bad volumes that is accepted, 0 to 1
    shard_records: int = 256  # records per shard
    zstd_level: int = 3  # compression of the volumes, 1 to 22; 0: none
    window: tuple[float, float] | None = None  # (low, high) in HU: clipped to it and stored as uint8; None: HU as int16
    reconstructions: str = "all"  # which ones of a scan are kept: "all", "first", "best" (`prepare/selection.py`)
    exclude: Path | None = None  # text file of volumes, scans or patients to leave out, one a line
    array_spacing: tuple[float, float, float] | None = None  # of arrays and slices: mm of the three index axes
    array_axes: str | None = None  # of arrays and slices: where the index axes point, such as "LPS"
    slice_window: tuple[float, float] | None = None  # of 8-bit slices: HU of grey 0 and 255
    fetch: str | None = None  # shell command that brings a volume (see `prepare/fetch.py`)
    shard: tuple[int, int] = (0, 1)  # (i, n), i from 0: this machine's share is the shards i, i + n, i + 2n, ...
    against: tuple[Path, ...] = ()  # prepared folders to check for leaks
    allow_leak: tuple[str, ...] = ()  # leaks to accept: names in `leaks.LEAKS`
    qa_samples: int = 8  # volumes drawn in qa.html
    compare: str = "time"  # by what a volume counts as changed since: "time" (and size), "size", "checksum"
    fold: tuple[int, int] | None = None  # (i, n): only this part of the patients, i from 0 (`prepare/folds.py`)
    fold_seed: int = 0  # of the folds
    fold_file: Path | None = None  # the fold of every patient: read where it is there, else written
    filters: tuple[str, ...] = ()  # of CT-RATE's evaluations: names in `selection.FILTERS`
    label_mapping: str = (
        "hlip"  # rad-chestct: which abnormalities stand for which finding (`data.rad_chestct.MAPPINGS`)
    )
    modality: str = "CT"  # "MR": intensities are scaled by percentiles, never taken for HU
    negatives: int = 20  # of a list of candidates (luna16): how many negatives of a scan are kept; 0: all

    def __post_init__(self) -> None:
        for name in ("root", "out", "exclude", "fold_file"):  # strings are paths, too
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """These settings, and for what is not given the defaults of the source, then those of all sources."""
        return cls(**{**source_defaults(given["source"]), **given})

    @property
    def grid(self) -> Grid:
        return Grid(self.size, self.spacing, self.policy, self.fraction)

    def plan(self) -> dict[str, Any]:
        """The settings that an interrupted preparation must be continued with; `root` is only recorded.

        `exclude`, `array_spacing`, `array_axes` and `slice_window` are left out: they change the listed examples, and
        `prepare` adds a digest of those.
        """
        fraction = self.policy == "fraction"
        return {
            "source": self.source,
            "split": self.split,
            "root": str(self.root),
            "size": list(self.size),
            "spacing": None if fraction else list(self.spacing),
            "policy": self.policy,
            "fraction": list(self.fraction) if fraction else None,
            "window": list(self.window) if self.window else None,
            "reconstructions": self.reconstructions,
            "shard_records": self.shard_records,
            "zstd_level": self.zstd_level,
            **({"fold": [*self.fold, self.fold_seed]} if self.fold else {}),
            **({"modality": self.modality} if self.modality != "CT" else {}),
        }

    def check(self) -> None:
        """Raises `UserError` for settings that cannot work, before anything is read."""
        if min(self.size) < 1 or not all(0 < mm < float("inf") for mm in self.spacing):
            raise UserError(f"--size {self.size} and --spacing {self.spacing} must be positive")
        if self.policy not in POLICIES:
            raise UserError(f"--policy {self.policy!r}: there are {sorted(POLICIES)}")
        if not all(0 < share <= 1 for share in self.fraction):
            raise UserError(f"--fraction {self.fraction} must be shares above 0 and up to 1")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max-bad-share {self.max_bad_share} is not a share between 0 and 1")
        if self.shard_records < 1 or not 0 <= self.zstd_level <= 22:
            raise UserError("--shard-records must be at least 1 and --zstd-level 0..22")
        for name, window in (("--window", self.window), ("--slice-window", self.slice_window)):
            if window is not None and window[0] >= window[1]:
                raise UserError(f"{name} {window[0]:g} {window[1]:g}: the first must be below the second, in HU")
        if not 0 <= self.shard[0] < self.shard[1]:
            raise UserError(f"--shard {self.shard[0]}/{self.shard[1]}: expected i/n with 0 <= i < n")
        if self.fold is not None and not (0 <= self.fold[0] < self.fold[1] and self.fold[1] >= 2):
            raise UserError(f"--fold {self.fold[0]}/{self.fold[1]}: expected i/n with 0 <= i < n and n at least 2")
        if self.negatives < 0 or (self.fold is None and self.fold_file is not None):
            raise UserError("--negatives must not be negative, and --fold-file needs --fold")
        if unknown := set(self.allow_leak) - leaks.LEAKS.keys():
            raise UserError(f"--allow-leak {sorted(unknown)}: there are {sorted(leaks.LEAKS)}")
        if self.modality not in ("CT", "MR"):
            raise UserError(f"--modality {self.modality!r}: there are ct and mr")
        if self.compare not in COMPARE:
            raise UserError(f"--compare {self.compare!r}: there are {COMPARE}")
        if self.fetch is not None:
            check_command(self.fetch)


def source_defaults(source: str) -> dict[str, Any]:
    """The settings that a source has of its own."""
    return dict(getattr(SOURCES[source], "defaults", {}))
