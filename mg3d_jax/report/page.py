"""The page of a run: gathers what `templates/run.html` shows. Each section is there only when the run has what it shows."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax import html
from mg3d_jax.registry import EVALUATIONS
from mg3d_jax.report import curves
from mg3d_jax.report.run_files import RunFiles

LISTED = 100  # rows of a long table
STEPS_SHOWN = 8  # small images over time
THUMBNAIL = 320  # pixels wide
FOLDED = ("Inside the objectives", "Other")  # charts that wait behind a click


def render(run: RunFiles, evaluated: Iterable[html.Section] = ()) -> str:
    """The whole page of a run, finished or not. `evaluated` are the results of its evaluations."""
    name = run.config.name if run.config is not None else run.folder.name
    return html.render(
        "run.html",
        f"{name}: run report",
        heading=name,
        facts=_facts(run),
        finished="state" in run.summary,
        damaged=run.damaged,
        charts=_charts(run),
        folded=FOLDED,
        slices=[_slices(title.replace("-", " "), by_step) for title, by_step in run.images.items()],
        evaluation=run.evaluation,
        evaluated=evaluated,
        not_shown=[
            name
            for name, value in run.evaluation.items()
            if isinstance(value, dict) and name not in (*EVALUATIONS, "left_out")
        ],
        attention=[(title, path.read_bytes()) for title, path in run.attention.items()],
        faults=_faults(run),
        configuration=_configuration(run),
        environment=_environment(run.environment),
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    step = run.summary.get("step", run.last("step", 0))
    identity = run.checkpoint | run.summary
    seconds, samples = identity.get("trained_seconds"), identity.get("samples_seen")
    samples = max(samples or 0, run.last("samples_seen", 0) or 0)
    planned = run.config.training.steps if run.config is not None else 0
    config_hash = identity.get("config_hash") or (config_lib.config_hash(run.config) if run.config is not None else "")
    total = (run.summary.get("parameters") or {}).get("total")
    return [
        ("state", run.summary.get("state", "in progress or stopped")),
        ("steps", f"{step:,}" + (f" of {planned:,}" if planned and planned != step else "")),
        ("samples", f"{samples:,.0f}"),
        ("trained for", _duration(seconds) if seconds else "not saved yet"),
        *([("parameters", f"{total / 1e6:.3g} M")] if total else []),
        ("training loss", _number(run.last("loss"))),
        ("code version", identity.get("code_version") or run.environment.get("mg3d_jax") or "unknown"),
        ("config", config_hash or "unknown"),
    ]


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "none yet"


def _charts(run: RunFiles) -> dict[str, list[tuple[str, str]]]:
    """Title and SVG of every chart, by section."""
    objectives = list(run.config.objectives) if run.config is not None else _objectives_by_name(run.metrics)
    found = curves.sections(run.metrics, objectives)
    return {
        title: [(panel.title, curves.draw(panel, series)) for panel, series in charts]
        for title, charts in found.items()
    }


def _objectives_by_name(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Without a config: metrics that have details of their own ("alignment" beside "alignment/accuracy")."""
    names = {name for line in metrics for name in line}
    return sorted(
        n for n in names if any(other.startswith(f"{n}/") for other in names) and "norm" not in n and "rate" not in n
    )


def _slices(name: str, by_step: Mapping[int, Path]) -> dict[str, Any]:
    """The newest image of a name, and small ones over time where there are several."""
    steps = list(by_step)
    chosen = np.unique(np.linspace(0, len(steps) - 1, STEPS_SHOWN).round().astype(int))
    newest = max(steps)
    return {
        "name": name,
        "newest": by_step[newest].read_bytes(),
        "caption": f"{name}, step {newest:,}",
        "count": len(steps),
        "small": [(f"step {steps[i]:,}", _thumbnail(by_step[steps[i]])) for i in chosen] if len(steps) > 1 else [],
    }


def _thumbnail(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, 4 * THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, format="jpeg", quality=85)
    return buffer.getvalue()


def _faults(run: RunFiles) -> list[tuple[str, html.Table]]:
    found = []
    for title, rows in (("Skipped updates", run.skipped), ("Bad records", run.bad_records)):
        if rows:
            head = list(dict.fromkeys(key for row in rows for key in row))
            shown = [[_cell(row.get(key, "")) for key in head] for row in rows[-LISTED:]]
            more = f"The last {LISTED} are shown." if len(rows) > LISTED else ""
            found.append(
                (f"{title}: {len(rows)}", html.Table([key.replace("_", " ") for key in head], shown, more=more))
            )
    return found


def _cell(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _configuration(run: RunFiles) -> dict[str, html.Table] | None:
    """What differs from the defaults, and every key."""
    if run.config is None:
        return None
    own, default = config_lib.flatten(run.config), config_lib.flatten(config_lib.Config())
    changed = [key for key in own if own[key] != default.get(key)]
    head = ("key", "value", "default")

    def row(key: str) -> tuple[str, ...]:
        before = repr(default[key]) if key in default else "no default"
        return key, repr(own[key]), before if key in changed else ""

    marks = ["changed" if key in changed else "" for key in own]
    whole = html.Table(head, [row(key) for key in own], classes=marks)
    return {"changed": html.Table(head, [row(key) for key in sorted(changed)]), "whole": whole}


def _environment(found: Mapping[str, Any]) -> html.Table:
    rows = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {what}" for name, what in value.items())
        rows.append((key.replace("_", " "), value))
    return html.Table((), rows)
