"""Scans and texts -> what the model takes: `AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .text_mg3d import Text, tokenize


class MG3DProcessor(ProcessorMixin):
    """`processor(images="scan.nii.gz", text=["Pleural effusion is present."])`.

    Args:
        max_tokens, max_sentences: at which texts were cut in training.
    """

    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer"]
    valid_kwargs: ClassVar[list[str]] = ["max_tokens", "max_sentences"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_tokens: int = 250,
        max_sentences: int = 32,
        **kwargs: Any,
    ):
        self.max_tokens, self.max_sentences = max_tokens, max_sentences
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | Sequence[Text] | None = None, **kwargs: Any) -> BatchFeature:
        """`pixel_values`, int16 HU [B, X, Y, Z], of what `image_processor` takes; `input_ids`, `attention_mask` and
        `sentence_index` [M, T] of texts, each a string or a list of sentences. `model(**processor(...))` takes all of it."""
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        found: dict[str, Any] = {}
        if images is not None:
            found |= self.image_processor(images, **kwargs)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            rows = [tokenize(self.tokenizer, one, self.max_tokens, self.max_sentences) for one in texts]
            found |= {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return BatchFeature(found)
