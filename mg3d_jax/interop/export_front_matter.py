"""What a model card says for programs (YAML before its text) and about the licence: LICENSE and requirements.txt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mg3d_jax.interop.export_run import Run


@dataclass(frozen=True)
class _Licence:
    """Of what is trained on a data set: its identifier, where it stands, its name on the hub, and what it means."""

    name: str
    link: str
    dataset: str
    note: str


_LICENCES = {
    "ctrate": _Licence(
        "cc-by-nc-sa-4.0",
        "https://creativecommons.org/licenses/by-nc-sa/4.0/",
        "ibrahimhamamci/CT-RATE",
        "The training data lay in CT-RATE's layout. If it was CT-RATE: that data set is gated and under "
        "CC-BY-NC-SA-4.0, so these weights may only be used for non-commercial purposes, with attribution, and passed on "
        "under the same licence. If it was phantoms (`mg3d phantom`), there is no such condition.",
    ),
    "ctrg": _Licence(
        "not-stated",
        "LICENSE",
        "",
        "The training data lay in CTRG-Chest's layout. That data set states no licence: ask its authors before you "
        "pass these weights on.",
    ),
}
_UNKNOWN = _Licence(
    "not-known",
    "LICENSE",
    "",
    "Nothing is known about the licence of the training data: ask whoever trained the model before you pass it on.",
)
_CODE = (
    "The Python files of this folder are part of mg3d_jax, under the Apache License, Version 2.0 "
    "(https://www.apache.org/licenses/LICENSE-2.0). That says nothing about the weights."
)
REQUIREMENTS = (
    "torch>=2.6", "transformers>=4.50,<6", "safetensors>=0.5,<1", "numpy>=2.0,<3", "scipy>=1.13,<2", "nibabel>=5.3,<6",
    "isal>=1.7,<2", "pydicom>=3.0,<4  # scans as DICOM",
)  # fmt: skip


def _licences(run: Run) -> list[_Licence]:
    return [_LICENCES.get(source, _UNKNOWN) for source in run.sources or ("",)]


def licence_note(run: Run) -> str:
    """What the origin of the data means for the weights."""
    return "\n".join(dict.fromkeys(one.note for one in _licences(run)))


def write_licence(run: Run, folder: Path, requirements: Sequence[str] = REQUIREMENTS) -> None:
    """`LICENSE` and `requirements.txt`."""
    (folder / "LICENSE").write_text(f"{_CODE}\n\nThe weights:\n\n{licence_note(run)}\n")
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n")


def front_matter(run: Run, evaluated: Mapping[str, Any] | None) -> str:
    """YAML between two lines of dashes, as the Hugging Face hub reads it. JSON is YAML, so values are written as JSON.

    Args:
        evaluated: `evaluation.json` of the exported step, whose zero-shot and retrieval results it repeats.
    """
    names = list(dict.fromkeys(one.name for one in _licences(run)))
    links = [one.link for one in _licences(run) if one.name == names[0]]
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "zero-shot-image-classification",
        "license": "other",
        "license_name": "-and-".join(names),
        "license_link": links[0] if len(names) == 1 else "LICENSE",
        "language": ["en"],
        "tags": ["medical", "ct", "chest", "radiology", "vision-language", "image-feature-extraction"],
    }
    if datasets := [one.dataset for one in _licences(run) if one.dataset]:
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
