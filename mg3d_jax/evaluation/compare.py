"""Two models on the same patients: the difference of every metric that both have, with a paired interval.

Both are resampled by the same draws of patients, so that what is hard for both cancels out. Several runs on a side are
seeds of one recipe: they are drawn as clusters, and the interval then says what another training would give, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.bootstrap import DRAWS, PatientDraws, interval
from mg3d_jax.evaluation.embedding_files import load_npz
from mg3d_jax.registry import EVALUATIONS

FILE = "scores.npz"
SMALLER_IS_BETTER = ("median_rank", "brier", "calibration_error")
FEW_RUNS = 5
SHOWN = 10  # names in a message

Arrays = Mapping[str, Mapping[str, np.ndarray]]  # of a run: evaluation -> name -> array


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        metrics: by key: `a`, `b`, `difference` (b - a), `difference_95`, and `better`: "a", "b", or "" where the interval
            holds 0.
        only_in: keys that the other side lacks, or that are not defined there, of "a" and of "b".
        notes: what a reader of the numbers should know.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    patients: int
    metrics: Mapping[str, Mapping[str, Any]]
    only_in: Mapping[str, Sequence[str]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        protocol = f"paired bootstrap of b - a: {DRAWS} draws of {self.patients} patients" + (
            ", and of runs" if max(len(self.a), len(self.b)) > 1 else ""
        )
        fields = ("patients", "metrics", "only_in", "notes")
        return {"a": list(self.a), "b": list(self.b), "protocol": protocol} | {f: getattr(self, f) for f in fields}


def compare(a: Sequence[Path], b: Sequence[Path], *, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Compares the runs of two sides, each with at least one.

    Args:
        a, b: folders of runs that `mg3d evaluate` evaluated, folders that it wrote, or `scores.npz` files.

    Raises:
        UserError: there are no scores, or the runs were not evaluated on the same volumes with the same labels.
    """
    read = {path: read_scores(path) for path in (*a, *b)}
    first, *others = read
    for other in others:
        _check_same(first, read[first], other, read[other])
    patients = {str(one) for run in read.values() for _, _, array in _named(run, "patients") for one in array}
    drawn = PatientDraws(np.array(sorted(patients), str), draws, seed)
    values = {path: _resampled(run, drawn) for path, run in read.items()}
    rng = np.random.default_rng(seed + 1)
    sides = {name: _side([values[path] for path in paths], rng) for name, paths in (("a", a), ("b", b))}
    both = [key for key in sides["a"] if key in sides["b"]]
    return Comparison(
        tuple(map(str, a)),
        tuple(map(str, b)),
        len(patients),
        {key: _difference(key, sides["a"][key], sides["b"][key]) for key in both},
        {name: [key for key in sides[name] if key not in sides[other]] for name, other in (("a", "b"), ("b", "a"))},
        _notes(read, len(a), len(b)),
    )


def read_scores(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every evaluation in a `scores.npz`, which is looked for in a run's folder too."""
    places = [path] if path.suffix == ".npz" else [path / FILE, path / "evaluation" / FILE]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(
            f"{path}: there are no scores ({' or '.join(map(str, places))}). Evaluate it first: mg3d evaluate --workdir {path} "
            "--data FOLDER"
        )
    arrays = load_npz(file, "scores", "evaluate the run again")
    if not any("/" in key for key in arrays):
        raise UserError(
            f"{file}: holds no scores of an evaluation, but {', '.join(arrays) or 'nothing'}: evaluate it first"
        )
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        evaluation, _, name = key.partition("/")
        found.setdefault(evaluation, {})[name] = array
    return found


def _named(run: Arrays, field: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """`(evaluation, place, array)` of every array whose last name is `field`; the place is what stands before it."""
    for evaluation, arrays in run.items():
        for name, array in arrays.items():
            place, _, last = name.rpartition("/")
            if last == field:
                yield evaluation, place, array


def _check_same(first: Path, one: Arrays, second: Path, other: Arrays) -> None:
    """Both were measured on the same things: ids, their patients, and what is true of them."""
    for evaluation, place, ids in _named(one, "ids"):
        start = f"{place}/" if place else ""
        found = other.get(evaluation, {})
        if f"{start}ids" not in found:
            continue
        theirs = found[f"{start}ids"]
        if missing := sorted(set(ids.tolist()) ^ set(theirs.tolist()))[:SHOWN]:
            raise UserError(
                f"{first} and {second} were not evaluated on the same data: {evaluation} has {len(ids)} and {len(theirs)} "
                f"entries, and only one of them has {', '.join(map(str, missing))}. Evaluate both on the same data"
            )
        sets = [(str(run.get(f"{start}class_set", "")), set(run.get(f"{start}classes", np.zeros(0, str)).tolist()))
                for run in (one[evaluation], found)]  # fmt: skip
        if sets[0][0] == sets[1][0] and sets[0][1] != sets[1][1]:
            raise UserError(
                f"{first} and {second}: {evaluation} scored other classes under one name, {sets[0][0]}; not in both: "
                f"{', '.join(sorted(sets[0][1] ^ sets[1][1])[:SHOWN])}. Evaluate both on the same classes, with --classes"
            )
        orders = np.argsort(ids, kind="stable"), np.argsort(theirs, kind="stable")
        for field in ("patients", "labels"):
            ours, other_field = one[evaluation].get(f"{start}{field}"), found.get(f"{start}{field}")
            if ours is None or other_field is None or not _same_classes(one[evaluation], found, start, field):
                continue
            if not np.array_equal(ours[orders[0]], other_field[orders[1]]):
                raise UserError(
                    f"{first} and {second} differ in the {field} of {evaluation}: evaluate both with the same label tables"
                )


def _same_classes(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], start: str, field: str) -> bool:
    """Labels of different classes are not compared: such metrics have different keys, which is checked before."""
    name = f"{start}classes"
    return field != "labels" or np.array_equal(one.get(name, np.zeros(0)), other.get(name, np.zeros(0)))


def _resampled(run: Arrays, draws: PatientDraws) -> dict[str, np.ndarray]:
    """Every metric of the evaluations that are known here, where it is defined."""
    found: dict[str, np.ndarray] = {}
    for name, arrays in run.items():
        if name in EVALUATIONS:
            found |= EVALUATIONS[name].resampled(arrays, draws)
    return {key: values for key, values in found.items() if not np.isnan(values[0])}


def _side(runs: Sequence[Mapping[str, np.ndarray]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The mean over runs of every metric that all of them have, `[1 + draws]`; each draw takes its runs with replacement.

    What a drawn mean of s runs varies about their mean is (s - 1) / s of the variance that it should have, which is
    corrected: with three seeds it would hide a third.
    """
    count = len(runs)
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    if count == 1:
        return {key: runs[0][key] for key in keys}
    found: dict[str, np.ndarray] = {}
    times: np.ndarray | None = None
    for key in keys:
        values = np.stack([run[key] for run in runs])
        if times is None:  # the same runs for all metrics
            chosen = rng.integers(0, count, (values.shape[1], count))
            times = (chosen[None] == np.arange(count)[:, None, None]).sum(axis=2) / count
            times[:, 0] = 1 / count
        mean = values.mean(axis=0)
        found[key] = mean + np.sqrt(count / (count - 1)) * ((values - mean) * times).sum(axis=0)
    return found


def _difference(key: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    low, high = interval(b - a)
    larger = "b" if low > 0 else "a" if high < 0 else ""
    smaller_is_better = any(part.startswith(SMALLER_IS_BETTER) for part in key.split("/"))
    better = {"a": "b", "b": "a", "": ""}[larger] if smaller_is_better else larger
    return {
        "a": float(a[0]),
        "b": float(b[0]),
        "difference": float(b[0] - a[0]),
        "difference_95": [low, high],
        "better": better,
    }


def _notes(read: Mapping[Path, Arrays], a: int, b: int) -> list[str]:
    found = []
    unknown = sorted({name for run in read.values() for name in run if name not in EVALUATIONS})
    if unknown:
        found.append(
            f"Left out, because these evaluations are not known here: {', '.join(unknown)}. Name the modules that define them "
            "in front: mg3d --plugins MODULE compare ..."
        )
    if a == b == 1:
        found.append(
            "One run on each side: the intervals are about these two models. They do not say what another seed would give."
        )
    elif min(a, b) == 1:
        found.append("One side has one run: what another seed of it would give is not in the intervals.")
    elif min(a, b) < FEW_RUNS:
        found.append(f"Fewer than {FEW_RUNS} runs on a side: how much seeds vary is itself known roughly.")
    return found
