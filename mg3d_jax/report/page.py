"""The page of a run, section by section. Each section is there only when the run has what it shows."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mg3d_jax import config as config_lib
from mg3d_jax import html
from mg3d_jax.report import curves
from mg3d_jax.report.run_files import RunFiles

LISTED = 100  # rows of a long table
STEPS_SHOWN = 8  # small images over time
THUMBNAIL = 320  # pixels wide


def render(run: RunFiles) -> str:
    """The whole page of a run, finished or not."""
    name = run.config.name if run.config is not None and "name" in run.config else run.folder.name
    parts = {
        **_curves(run),
        "Reconstructed slices": _slices(run),
        "Evaluation": _evaluation(run.evaluation),
        "Where sentences look": _attention(run),
        "Skipped updates and bad records": _faults(run),
        "Configuration": _configuration(run),
        "Environment": _environment(run.environment),
    }
    parts = {title: content for title, content in parts.items() if content}
    links = "".join(f"<a href='#{html.anchor(title)}'>{html.text(title)}</a>" for title in parts)
    body = [
        html.Markup(f"<header><h1>{html.text(name)}</h1>"),
        *_header(run),
        html.Markup(f"<nav>{links}</nav></header>"),
    ]
    body += [html.section(title, content) for title, content in parts.items()]
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body.append(html.Markup(f"<footer>made by mg3d report, {made}; this page needs no network</footer>"))
    return html.page(f"{name}: run report", body)


def _header(run: RunFiles) -> list[html.Markup]:
    step = run.summary.get("step", run.last("step", 0))
    identity = run.checkpoint | run.summary
    seconds, samples = identity.get("trained_seconds"), identity.get("samples_seen")
    samples = max(samples or 0, run.last("samples_seen", 0) or 0)
    planned = run.config.training.steps if run.config is not None else 0
    state = run.summary.get("state", "in progress or stopped")
    config_hash = identity.get("config_hash") or (config_lib.config_hash(run.config) if run.config is not None else "")
    items = [
        ("state", state),
        ("steps", f"{step:,}" + (f" of {planned:,}" if planned and planned != step else "")),
        ("samples", f"{samples:,.0f}"),
        ("trained for", _duration(seconds) if seconds else "not saved yet"),
        ("training loss", _number(run.last("loss"))),
        ("code version", identity.get("code_version") or run.environment.get("mg3d_jax") or "unknown"),
        ("config", html.Markup(f"<code>{html.text(config_hash or 'unknown')}</code>")),
    ]
    if total := (run.summary.get("parameters") or {}).get("total"):
        items.insert(4, ("parameters", f"{total / 1e6:.3g} M"))
    found = [html.facts(items)]
    if "state" not in run.summary:
        found.append(
            html.paragraph("No summary yet: the run is still going, or was stopped; the same command goes on with it.")
        )
    if run.damaged:
        found.append(
            html.paragraph(f"{run.damaged} lines of metrics.jsonl could not be read and are left out.", "note")
        )
    return found


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "none yet"


def _curves(run: RunFiles) -> dict[str, html.Markup]:
    """The charts by section; details of the objectives and unknown metrics wait behind a click."""
    objectives = list(run.config.objectives) if run.config is not None else _objectives_by_name(run.metrics)
    found = {}
    for title, charts in curves.sections(run.metrics, objectives).items():
        figures = html.grid(html.chart(curves.draw(panel, series), panel.title) for panel, series in charts)
        folded = title in ("Inside the objectives", "Other")
        found[title] = html.details(f"{len(charts)} chart{'s' * (len(charts) != 1)}", figures) if folded else figures
    return found or {"Losses": html.paragraph("No metrics yet.")}


def _objectives_by_name(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Without a config: metrics that have details of their own ("alignment" beside "alignment/accuracy")."""
    names = {name for line in metrics for name in line}
    return sorted(
        n for n in names if any(other.startswith(f"{n}/") for other in names) and "norm" not in n and "rate" not in n
    )


def _slices(run: RunFiles) -> html.Markup | None:
    """The newest image of every name, and for each a row of small ones over time."""
    if not run.images:
        return None
    newest = [
        html.picture(by_step[step].read_bytes(), f"{name.replace('-', ' ')}, step {step:,}")
        for name, by_step in run.images.items()
        for step in [max(by_step)]
    ]
    rows = []
    for name, by_step in run.images.items():
        steps = list(by_step)
        if len(steps) > 1:
            chosen = np.unique(np.linspace(0, len(steps) - 1, STEPS_SHOWN).round().astype(int))
            small = [html.picture(_thumbnail(by_step[steps[i]]), f"step {steps[i]:,}", "jpeg") for i in chosen]
            title = f"{name.replace('-', ' ')} over time, {len(small)} of {len(steps)} pictures"
            rows.append(html.details(title, html.grid(small, small=True), shown=not rows))
    return html.join([html.grid(newest), *rows])


def _thumbnail(path: Any) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, 4 * THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, format="jpeg", quality=85)
    return buffer.getvalue()


def _evaluation(result: Mapping[str, Any]) -> html.Markup | None:
    """The tables of `mg3d evaluate`: AUROC with intervals, recall beside chance."""
    if not result:
        return None
    parts: list[object] = [
        html.paragraph(
            f"Step {result.get('step')}: {result.get('volumes')} volumes of {result.get('patients')} patients, held out."
        )
    ]
    if zero := result.get("zero_shot"):
        names = [k for k in zero if k.startswith("auroc/") and not k.endswith("_95")]
        names = ["auroc_macro", *sorted(names, key=lambda k: -zero[k])]
        rows = []
        for key in names:
            low, high = zero.get(f"{key}_95", (float("nan"),) * 2)
            label = "macro mean" if key == "auroc_macro" else key.removeprefix("auroc/")
            rows.append((label, f"{zero[key]:.3f}", f"{low:.3f} to {high:.3f}", _interval_bar(zero[key], low, high)))
        parts += [html.Markup("<h3>Zero-shot AUROC</h3>"), html.paragraph(zero.get("protocol", ""))]
        head = ("abnormality", "AUROC", "95 % interval", "0 to 1; the line is chance")
        parts.append(html.table(head, rows, numbers=(1,), classes=["total"] + [""] * (len(rows) - 1)))
        if missing := zero.get("classes_without_both_outcomes"):
            parts.append(html.paragraph(f"Left out, all present or all absent: {', '.join(missing)}."))
    if found := result.get("retrieval"):
        parts += [html.Markup("<h3>Retrieval</h3>"), html.paragraph(found.get("protocol", "")), _recall_table(found)]
    return html.join(parts)


def _interval_bar(value: float, low: float, high: float) -> html.Markup | str:
    """A dot with its interval between 0 and 1."""
    if not np.isfinite([value, low, high]).all():
        return ""
    return html.Markup(
        f"<div class='bar'><i style='left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%'></i>"
        f"<b style='left:{100 * value:.1f}%'></b></div>"
    )


def _recall_table(found: Mapping[str, Any]) -> html.Markup:
    rows = []
    for key, value in found.items():
        if "/recall@" not in key:
            continue
        direction, _, k = key.partition("/recall@")
        chance = found.get(f"{direction}/chance@{k}")
        times = f"{value / chance:.1f}" if chance else ""
        label = direction.replace("_", " ")
        label = f"{label}, of {found[f'{direction}/gallery']}" if f"{direction}/gallery" in found else label
        rows.append((label, k, f"{value:.3f}", "" if chance is None else f"{chance:.3f}", times))
    return html.table(("direction", "k", "recall at k", "chance", "times chance"), rows, numbers=(1, 2, 3, 4))


def _attention(run: RunFiles) -> html.Markup | None:
    if not run.attention:
        return None
    return html.grid(html.picture(path.read_bytes(), name) for name, path in run.attention.items())


def _faults(run: RunFiles) -> html.Markup | None:
    parts: list[object] = []
    for title, rows in (("Skipped updates", run.skipped), ("Bad records", run.bad_records)):
        if rows:
            head = list(dict.fromkeys(key for row in rows for key in row))
            shown = [[_cell(row.get(key, "")) for key in head] for row in rows[-LISTED:]]
            parts.append(html.Markup(f"<h3>{title}: {len(rows)}</h3>"))
            if len(rows) > LISTED:
                parts.append(html.paragraph(f"The last {LISTED}."))
            parts.append(html.table([key.replace("_", " ") for key in head], shown))
    return html.join(parts) if parts else None


def _cell(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _configuration(run: RunFiles) -> html.Markup | None:
    """What differs from the defaults at once, everything behind a click."""
    if run.config is None:
        return None
    own, default = config_lib.flatten(run.config), config_lib.flatten(config_lib.default())
    changed = {key for key in own if own[key] != default.get(key)}
    head = ("key", "value", "default")

    def row(key: str) -> tuple[object, ...]:
        before = repr(default[key]) if key in default else "not a key any more"
        return html.Markup(f"<code>{html.text(key)}</code>"), repr(own[key]), before if key in changed else ""

    whole = html.table(head, map(row, own), classes=["changed" if key in changed else "" for key in own])
    return html.join(
        [
            html.paragraph(f"{len(changed)} of {len(own)} keys differ from the defaults."),
            html.table(head, map(row, sorted(changed))),
            html.details("every key", whole),
        ]
    )


def _environment(found: Mapping[str, Any]) -> html.Markup | None:
    if not found:
        return None
    rows = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {what}" for name, what in value.items())
        rows.append((key.replace("_", " "), value))
    return html.table((), rows)
