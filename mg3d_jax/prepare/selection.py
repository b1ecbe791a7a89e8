"""Which of the examples of a source are prepared: `--exclude` and `--reconstructions`, the same for every source."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.prepare.listing import Example, Listing, SourceOptions
from mg3d_jax.prepare.names import excluded_names, without_suffix
from mg3d_jax.prepare.walk import walk
from mg3d_jax.registry import SOURCES

RECONSTRUCTIONS = ("all", "first", "best")
_CHEST = re.compile(r"lung|thorax|chest|toraks|akci", re.IGNORECASE)


def choose_reconstructions(listing: Listing, policy: str) -> None:
    """Keeps one volume per scan unless `policy` is "all". "first": the lowest reconstruction number. "best": a lung or
    thorax series or kernel before others, then the finest slice spacing, then the most slices."""
    if policy not in RECONSTRUCTIONS:
        raise UserError(f"--reconstructions {policy!r}: there are {RECONSTRUCTIONS}")
    if policy == "all":
        return

    def rank(example: Example) -> tuple:
        m = example.metadata
        number = [int(part) for part in re.findall(r"\d+", example.name)]
        if policy == "first":
            return (number, example.name)
        chest = bool(m.kernel and _CHEST.search(m.kernel))
        return (not chest, m.spacing[2] if m.spacing else 1e9, -(m.slices or 0), number, example.name)

    best: dict[tuple[str, str], Example] = {}
    for example in listing.examples:
        scan = (example.patient, example.scan)
        if scan not in best or rank(example) < rank(best[scan]):
            best[scan] = example
    if left_out := len(listing.examples) - len(best):
        listing.skipped[f"other reconstructions of the scan (--reconstructions {policy})"] = left_out
    listing.examples = list(best.values())


FILTERS = {
    "all": "every volume",
    "no-head": "without the volumes of no_chest_SPLIT.txt, which CT-RATE ships",
    "first-per-scan": "the first reconstruction of each scan",
    "smallest-spacing-distinct-text": "of volumes with the same findings the one with the smallest voxels",
    "no-known-bad": "without volumes of the training split that are known to be unusable",
}
_KNOWN_BAD = {  # named in public code that trains on CT-RATE
    "train_1267_a_4", "train_11755_a_2", "train_11755_a_3", "train_11755_a_4", "train_3821_a_5",
    "train_9792_a_1", "train_9792_a_2", "train_9792_a_3", "train_9792_a_4",
}  # fmt: skip


def apply_filters(listing: Listing, options: SourceOptions) -> None:
    """Leaves out what the evaluations of CT-RATE in use leave out, by name, and counts it. Raises `UserError`."""
    for name in options.filters:
        before = len(listing.examples)
        if name == "first-per-scan":
            choose_reconstructions(listing, "first")
            continue
        if name == "no-head":
            _leave_out(listing, excluded_names(_no_chest_list(options)))
        elif name == "no-known-bad":
            _leave_out(listing, _KNOWN_BAD)
        elif name == "smallest-spacing-distinct-text":
            _keep_distinct(listing)
        if left_out := before - len(listing.examples):
            listing.skipped[f"--filter {name}: {FILTERS[name]}"] = left_out


def _leave_out(listing: Listing, names: set[str]) -> None:
    listing.examples = [e for e in listing.examples if not {without_suffix(e.name), e.scan, e.patient} & names]


def _no_chest_list(options: SourceOptions) -> Path:
    wanted = f"no_chest_{options.split}.txt"
    found = [folder / wanted for folder, names in walk(options.root) if wanted in names]
    if not found:
        raise UserError(
            f"--filter no-head needs {wanted}, of which there is none below {options.root}: download it with CT-RATE"
        )
    return found[0]


def _keep_distinct(listing: Listing) -> None:
    best: dict[str, Example] = {}

    def rank(example: Example) -> tuple[float, str]:
        spacing = example.metadata.spacing
        return (math.prod(spacing) if spacing else math.inf, example.name)

    for example in listing.examples:
        if example.findings not in best or rank(example) < rank(best[example.findings]):
            best[example.findings] = example
    kept = set(map(id, best.values()))
    listing.examples = [example for example in listing.examples if id(example) in kept]


def apply_exclusion(listing: Listing, exclude: Path | None) -> None:
    """Leaves out what the --exclude file names (volume, scan or patient), and counts it, and the names that name
    nothing here: they may be of another split, or misspelt."""
    if exclude is None:
        return
    names, matched, kept = excluded_names(exclude), set(), []
    for e in listing.examples:
        hits = {without_suffix(e.name), e.scan, e.patient} & names
        matched |= hits
        if not hits:
            kept.append(e)
    if left_out := len(listing.examples) - len(kept):
        listing.skipped[f"named in {Path(exclude).name}"] = left_out
    if len(matched) < len(names) or not names:
        listing.notes.append(f"{len(names) - len(matched)} of {len(names)} names in {exclude} matched nothing")
    listing.examples = kept


def list_source(source: str, options: SourceOptions) -> Listing:
    """The listing of one source, after exclusion and the choice of reconstructions. Raises `UserError`."""
    list_all = SOURCES[source]
    if not options.root.exists():
        raise UserError(f"--root {options.root} does not exist")
    listing = list_all(options)
    apply_exclusion(listing, options.exclude)
    apply_filters(listing, options)
    choose_reconstructions(listing, options.reconstructions)
    return listing
