"""`pipeline("zero-shot-image-classification", FOLDER, trust_remote_code=True)("scan.nii.gz")`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Pipeline

ABSENT = "{} is not present."


class MG3DZeroShotPipeline(Pipeline):
    """Scans -> the probability of each label. Each label is asked for by itself, present against absent: a chest has several
    findings, so the scores do not sum to 1."""

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False  # the model reads its own

    def _sanitize_parameters(
        self,
        candidate_labels: Sequence[str] | None = None,
        hypothesis_template: str | None = None,
        absent_template: str = ABSENT,
        **_: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        labels: Any = candidate_labels
        if hypothesis_template is not None:
            if candidate_labels is None:
                raise ValueError("hypothesis_template needs candidate_labels to fill in")
            labels = {
                name: (hypothesis_template.format(name), absent_template.format(name)) for name in candidate_labels
            }
        return {}, {"labels": labels}, {}

    def preprocess(self, inputs: Any, **_: Any) -> dict[str, Any]:
        """A file, a folder of DICOM slices or `(array, affine)` -> HU on the model's grid."""
        return dict(self.model.image_processor(inputs))

    def _forward(self, model_inputs: dict[str, Any], labels: Any = None, **_: Any) -> dict[str, Any]:
        return {"scores": self.model.zero_shot(model_inputs["pixel_values"], labels)[0]}

    def postprocess(self, model_outputs: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
        """`[{"score": 0.9, "label": "Emphysema"}, ...]`, the highest first."""
        found = model_outputs["scores"].items()
        return [{"score": score, "label": label} for label, score in sorted(found, key=lambda pair: -pair[1])]
