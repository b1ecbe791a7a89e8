"""What is in a scan, by the prompts that the model was evaluated with (`zero_shot.json` of this folder)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from .text_mg3d import Text
from .towers_mg3d import TextSide, VisionSide

FILE = "zero_shot.json"
MAX_LOGIT_SCALE = 100.0
Prompts = Mapping[str, tuple[Sequence[str], Sequence[str]]]  # label -> sentences: present, absent


class ZeroShot(VisionSide, TextSide):
    """`zero_shot` of a model that embeds volumes and texts."""

    logit_scale: nn.Parameter
    _processor: Any = None

    @property
    def scale(self) -> Tensor:
        """1 / temperature, cut as in training."""
        return self.logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)

    @property
    def image_processor(self) -> Any:
        """That of the folder which the model was loaded from."""
        if self._processor is None:
            from .image_processing_mg3d import MG3DImageProcessor  # needs nibabel and scipy, which the model does not

            self._processor = MG3DImageProcessor.from_pretrained(self._folder)
        return self._processor

    def zero_shot_settings(self) -> dict[str, Any]:
        """`zero_shot.json`: `classes` (label -> sentences that say `present` and `absent`), `scoring`, `protocol`."""
        file = cached_file(self._folder, FILE, _raise_exceptions_for_missing_entries=False) if self._folder else None
        if file is None:
            raise ValueError(f"the model was not loaded from a folder with {FILE}: give labels with their sentences")
        with open(file, encoding="utf-8") as text:
            return json.load(text)

    def zero_shot(
        self, images: Any, labels: Sequence[str] | Mapping[str, Sequence[Text]] | None = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """Label -> probability that it is present, as `mg3d evaluate` scores it.

        Args:
            images: what this folder's `AutoImageProcessor` takes (a file, a folder of DICOM slices, `(array, affine)`), a
                tensor of HU as `encode_volume` takes it, or a list of scans, of which a list of results comes back; of a
                tensor, too.
            labels: some of those in `zero_shot.json`, or any label with what says that it is present and absent:
                `{"Cyst": ("There is a cyst.", "There is no cyst.")}`; each may be several sentences, whose mean direction
                counts. Default: all of the file.
        """
        prompts, scoring = self._prompts(labels)
        embedded = self._embedded(prompts)  # [2, L, k]
        several = isinstance(images, list | Tensor)
        found = []
        for one in images if several else [images]:
            hu = one[None] if isinstance(one, Tensor) else self.image_processor(one)["pixel_values"]
            with torch.no_grad():
                volume = self.encode_volume(hu.to(self.device)).cpu().double().numpy()[0]
            values = self._scores(embedded @ volume, scoring)
            found.append(dict(zip(prompts, map(float, values), strict=True)))
        return found if several else found[0]

    def _prompts(self, labels: Sequence[str] | Mapping[str, Sequence[Text]] | None) -> tuple[Prompts, str]:
        if isinstance(labels, Mapping):
            return {label: (_listed(pair[0]), _listed(pair[1])) for label, pair in labels.items()}, "softmax"
        told = self.zero_shot_settings()
        known = {label: (pair["present"], pair["absent"]) for label, pair in told["classes"].items()}
        wanted = list(known) if labels is None else list(labels)
        if unknown := [label for label in wanted if label not in known]:
            raise ValueError(
                f"{FILE} has no prompts for {', '.join(unknown)}; it has {', '.join(known)}. Give {{label: (sentence that says "
                "present, sentence that says absent)}"
            )
        return {label: known[label] for label in wanted}, told["scoring"]

    def _embedded(self, prompts: Prompts) -> np.ndarray:
        """float64 [2, L, k], present before absent: mean directions of the sentences, each one embedded by itself."""
        entries = [pair[side] for side in (0, 1) for pair in prompts.values()]
        with torch.no_grad():
            rows = self.tokenize([[sentence] for entry in entries for sentence in entry])
            parts = self._direction(**rows)[0].split([len(entry) for entry in entries])
            vectors = self._of_direction(torch.stack([part.mean(0) for part in parts]))
        return vectors.cpu().double().numpy().reshape(2, len(prompts), -1)

    def _scores(self, similarity: np.ndarray, scoring: str) -> np.ndarray:
        """From cosines [2, L], present before absent. In float64: near certainty float32 would make ties."""
        present, absent = similarity
        if scoring == "positive":
            return present
        if scoring == "difference":
            return present - absent
        return 1 / (1 + np.exp(-float(self.scale.detach()) * (present - absent)))


def _listed(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else list(text)
