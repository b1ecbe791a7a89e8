"""The results of evaluations as one document, and the files that `mg3d evaluate` writes of it. Without JAX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import charts
from mg3d_jax import options as options_lib
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import examples, page
from mg3d_jax.evaluation.base import Embedded, Evaluation, chosen, sections
from mg3d_jax.evaluation.embedding_files import save_npz
from mg3d_jax.files import write_json, write_text
from mg3d_jax.registry import EVALUATIONS

OVERRIDE = "--evaluations."


@dataclass(frozen=True)
class Evaluated:
    """Evaluations of one set of embeddings.

    Args:
        document: what `evaluation.json` says.
        evaluations, found: the evaluations by name, and what each was given.
        volume: reads the volume of a row for the examples of the page; None where there are no volumes.
    """

    document: Mapping[str, Any]
    evaluations: Mapping[str, Evaluation]
    found: Mapping[str, Embedded]
    volume: examples.Volume | None = None

    @property
    def metrics(self) -> dict[str, float | list[float]]:
        """The numbers of all evaluations; each key says its protocol."""
        merged: dict[str, float | list[float]] = {}
        for name, one in self._measured():
            merged |= one.flat(self.document[name])
        return merged

    def write(self, out: Path) -> list[Path]:
        """Writes `evaluation.json`, `metrics.json`, `scores.npz` (what `mg3d compare` reads), `evaluation.html`, and, where
        an evaluation has them, `classes.csv` (a row per class) and `evaluation.png`."""
        out.mkdir(parents=True, exist_ok=True)
        written = [out / name for name in ("evaluation.json", "metrics.json", "scores.npz", "evaluation.html")]
        write_json(written[0], self.document, allow_nan=True)
        write_json(written[1], self.metrics, allow_nan=True)
        save_npz(written[2], self._arrays(), compressed=True)
        page.write(self.document, written[3], self._examples(), examples.written_examples(self.document, self.volume))
        for name, text in self._files().items():
            write_text(out / name, text)
            written.append(out / name)
        if table := _class_table(self.document):
            write_text(out / "classes.csv", table)
            written.append(out / "classes.csv")
        if plot(self.document, out / "evaluation.png"):
            written.append(out / "evaluation.png")
        return written

    def _measured(self) -> Iterable[tuple[str, Evaluation]]:
        return [(name, one) for name, one in self.evaluations.items() if self.document.get(name)]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            f"{name}/{key}": array
            for name, one in self._measured()
            for key, array in one.arrays(self.found[name]).items()
        }

    def _files(self) -> dict[str, str]:
        return {name: text for key, one in self._measured() for name, text in one.files(self.found[key]).items()}

    def _examples(self) -> Sequence[examples.Example]:
        with_reports = [one for one in self.found.values() if len(one.reports) and len(one.volumes)]
        return examples.retrieval_examples(with_reports[0], self.volume) if with_reports else ()


def measure(
    found: Mapping[str, Embedded],
    evaluations: Mapping[str, Evaluation],
    about: Mapping[str, Any],
    volume: examples.Volume | None = None,
) -> Evaluated:
    """Runs every evaluation on what it was given. Evaluations that have nothing to say are not in the document.

    Args:
        about: what stands first in the document.
    """
    results = {name: one.full(found[name]) for name, one in evaluations.items()}
    return Evaluated(dict(about) | {name: one for name, one in results.items() if one}, evaluations, found, volume)


def configured(
    only: Iterable[str] | None, base: Mapping[str, Any] | None = None, overrides: Mapping[str, str] | None = None
) -> dict[str, Evaluation]:
    """The evaluations of these names (None: all) with their options.

    Args:
        base: options by name; the defaults for names that it lacks.
        overrides: text by `NAME.KEY`.

    Raises:
        UserError: there is no such evaluation, key or value, or the options are impossible.
    """
    options = {name: (base or {}).get(name) or EVALUATIONS[name].options() for name in EVALUATIONS}
    options |= options_lib.overridden(options, overrides or {}, OVERRIDE)
    evaluations = chosen(only, options)
    problems = [line for one in evaluations.values() for line in one.problems(one.settings, None)]
    if problems:
        raise UserError("the options of the evaluations are impossible:\n  - " + "\n  - ".join(problems))
    return evaluations


def short_forms(values: Mapping[str, str | None], only: Iterable[str] | None = None) -> dict[str, str]:
    """`{"NAME.KEY": value}` for every evaluation that has an option of that name. `UserError` where none has."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if value is None:
            continue
        names = [name for name, one in chosen(only).items() if hasattr(one.settings, key)]
        if not names:
            raise UserError(f"--{key} {value}: none of the evaluations has such an option")
        found |= {f"{name}.{key}": value for name in names}
    return found


@charts.plain_text()
def plot(document: Mapping[str, Any], path: Path) -> bool:
    """Draws a panel for each evaluation that has one into a PNG; False where none has."""
    from matplotlib.figure import Figure

    shown = [one.plot for one in sections(document) if one.plot is not None]
    if not shown:
        return False
    figure = Figure(figsize=(6 * len(shown), 6), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(axes)
    what = document.get("run") or document.get("embeddings", "")
    step = f", step {document['step']}" if "step" in document else ""
    figure.suptitle(f"{what}{step}, {document['volumes']} volumes of {document['patients']} patients")
    figure.savefig(path, dpi=110)
    return True


def _class_table(document: Mapping[str, Any]) -> str:
    """A row for each class and evaluation, of the results that have `by_class`; "" where none has."""
    rows = [
        {"evaluation": name, "class": title} | dict(row)
        for name, result in document.items()
        if isinstance(result, Mapping)
        for title, row in result.get("by_class", {}).items()
    ]
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
