"""What a model card says for programs (YAML before its text) and about the licence: LICENSE and requirements.txt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d_jax.interop import licences
from mg3d_jax.interop.export_run import Run

_CODE = (
    "The Python files of this folder are part of mg3d_jax, under the Apache License, Version 2.0 "
    "(https://www.apache.org/licenses/LICENSE-2.0). That says nothing about the weights."
)
REQUIREMENTS = (
    "torch>=2.6", "transformers>=4.50,<6", "safetensors>=0.5,<1", "numpy>=2.0,<3", "scipy>=1.13,<2", "nibabel>=5.3,<6",
    "isal>=1.7,<2", "pydicom>=3.0,<4  # scans as DICOM",
)  # fmt: skip


def licence_note(run: Run) -> str:
    """What the origin of the data, and of the weights that training began with, means for the weights."""
    return licences.note(run.sources, " and ".join(repr(Path(path).name) for path in _begun_with(run)))


def _begun_with(run: Run) -> list[str]:
    """Folders and names of the weights that training began with."""
    model = run.config.model
    paths = (run.config.init_from.path, model.volume_encoder.pretrained, model.report_encoder.pretrained)
    return [path for path in paths if path]


def write_licence(run: Run, folder: Path, requirements: Sequence[str] = REQUIREMENTS) -> None:
    """`LICENSE` and `requirements.txt`."""
    (folder / "LICENSE").write_text(f"{_CODE}\n\nThe weights:\n\n{licence_note(run)}\n")
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")


def front_matter(run: Run, evaluated: Mapping[str, Any] | None) -> str:
    """YAML between two lines of dashes, as the Hugging Face hub reads it. JSON is YAML, so values are written as JSON.

    Args:
        evaluated: `evaluation.json` of the exported step, whose zero-shot and retrieval results it repeats.
    """
    known = licences.licences(run.sources)
    names = list(dict.fromkeys(one.name for one in known))
    names += ["that-of-its-first-weights"] if _begun_with(run) else []
    links = [one.link for one in known if one.name == names[0]]
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "license": "other",
        "license_name": "-and-".join(names),
        "license_link": links[0] if len(names) == 1 else "LICENSE",
        "language": ["en"],
        "tags": ["medical", "ct", "chest", "radiology", "vision-language", "image-feature-extraction"],
    }
    if datasets := [one.dataset for one in known if one.dataset]:
        content["datasets"] = datasets
    if results := _results(evaluated):
        content["model-index"] = [{"name": run.config.name, "results": results}]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in content.items()), "---"])


def measured(evaluated: Mapping[str, Any] | None) -> list[tuple[str, float, Sequence[float] | None, str]]:
    """What an evaluation found, as (metric, value, 95 % interval or None, protocol): the macro AUROC and the recalls."""
    found: list[tuple[str, float, Sequence[float] | None, str]] = []
    for part in ("zero_shot", "retrieval"):
        result = (evaluated or {}).get(part) or {}
        for name, value in result.items():
            direction, _, metric = name.rpartition("/")
            wanted = name == "auroc_macro" or (
                metric.startswith("recall@") and direction and not metric.endswith("_95")
            )
            if wanted and isinstance(value, int | float) and value == value:
                found.append((name, float(value), result.get(f"{name}_95"), str(result.get("protocol", ""))))
    return found


def evaluated_data(evaluated: Mapping[str, Any]) -> str:
    """On what: names of the prepared folders, and how much that is."""
    names = ", ".join(Path(folder).name for folder in evaluated.get("data", ()))
    return f"{names} ({evaluated.get('volumes')} volumes of {evaluated.get('patients')} patients)"


def _results(evaluated: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    kinds = {"auroc_macro": "zero-shot-image-classification"}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for name, value, interval, protocol in measured(evaluated):
        within = f", 95 % interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        metric = {"type": name, "value": round(value, 4), "name": f"{name}{within}; {protocol}"}
        by_kind.setdefault(kinds.get(name, "image-text-retrieval"), []).append(metric)
    data = {"name": evaluated_data(evaluated), "type": "chest-ct"} if evaluated else {}
    return [{"task": {"type": kind}, "dataset": data, "metrics": metrics} for kind, metrics in by_kind.items()]
