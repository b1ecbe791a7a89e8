"""The page of an evaluation, `evaluation.html`: one file, whatever was evaluated, a run or somebody's embeddings."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d_jax import html
from mg3d_jax.evaluation.base import sections
from mg3d_jax.evaluation.examples import Example, Written
from mg3d_jax.files import write_text

LONG_TABLE = 24  # rows; a longer one waits behind a click


def render(document: Mapping[str, Any], examples: Sequence[Example] = (), written: Sequence[Written] = ()) -> str:
    """The page of a document of `evaluation.json`."""
    shown = sections(document)
    what = document.get("run") or document.get("embeddings") or "embeddings"
    facts = {
        "evaluated": Path(str(what)).name or str(what),
        "step": document.get("step"),
        "weights": document.get("weights"),
        "volumes": document.get("volumes"),
        "patients": document.get("patients"),
        "data": ", ".join(Path(str(folder)).name for folder in document.get("data", ())),
    }
    return html.render(
        "evaluation.html",
        f"{facts['evaluated']}: evaluation",
        heading=f"Evaluation of {facts['evaluated']}",
        facts=[(name, f"{value:,}" if isinstance(value, int) else value) for name, value in facts.items() if value],
        headline=[one for section in shown for one in section.headline],
        warnings=[warning for section in shown for warning in section.warnings],
        shown=shown,
        long_table=LONG_TABLE,
        examples=examples,
        written=written,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write(
    document: Mapping[str, Any], path: Path, examples: Sequence[Example] = (), written: Sequence[Written] = ()
) -> None:
    """Writes the page to `path`."""
    write_text(path, render(document, examples, written))
