"""Scans and texts -> what the model takes: `AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class MG3DProcessor(ProcessorMixin):
    """`processor(images="scan.nii.gz", text=["Pleural effusion is present."])`."""

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """`volume`, int16 HU [B, X, Y, Z], of what `image_processor` takes, `input_ids` and `attention_mask` [B, T]."""
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        found: dict[str, Any] = {}
        if images is not None:
            found |= self.image_processor(images, **kwargs)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            found |= self.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        return BatchFeature(found)
