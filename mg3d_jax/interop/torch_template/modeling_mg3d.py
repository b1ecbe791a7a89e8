"""MG-3D in PyTorch: a chest CT encoder and a report encoder that share one embedding space.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    model.zero_shot("scan.nii.gz")  # {"Emphysema": 0.12, ...}
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    inputs = processor(images="scan.nii.gz", text=["Emphysema is present.", "Emphysema is not present."])
    model(**inputs).logits_per_image.softmax(-1)

Axes: B volumes, X Y Z voxels in RAS+ order (x to the patient's right, y anterior, z superior), C windows, N patches,
T tokens, S sentences, d width of a tower, k width of the shared space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_mg3d import MG3DConfig
from .towers_mg3d import MG3DPreTrainedModel, MG3DTextOutput, MG3DVisionOutput, TextSide, VisionSide
from .zero_shot_mg3d import ZeroShot


@dataclass
class MG3DOutput(ModelOutput):
    """Embeddings [B, k] are l2-normalised; `logits_per_image` [B, M] is their scaled cosine similarity for M texts."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: MG3DTextOutput | None = None
    vision_model_output: MG3DVisionOutput | None = None

    def to_tuple(self) -> tuple:
        """Of tensors, those of the two sides as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


class MG3DModel(ZeroShot, MG3DPreTrainedModel):
    """Both towers, sentence pooling and the projections into the shared space."""

    main_input_name = "pixel_values"

    def __init__(self, config: MG3DConfig):
        super().__init__(config)
        self._add_vision(config)
        self._add_text(config)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.logit_bias else 0.0  # of the sigmoid (SigLIP) loss
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, tower: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, with what `MG3DPreTrainedModel.from_pretrained` checks.

        Args:
            tower: "vision" or "text": that side alone, an `MG3DVisionModel` or `MG3DTextModel`, and no weights of
                the other.
        """
        if tower is None:
            return super().from_pretrained(*args, **kwargs)
        if tower not in _SIDES:
            raise ValueError(f"tower={tower!r}: {' or '.join(map(repr, _SIDES))} is needed")
        return _SIDES[tower].from_pretrained(*args, **kwargs)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sentence_index: Tensor | None = None,
        return_loss: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MG3DOutput | tuple:
        """B volumes and M texts.

        Args:
            pixel_values: as for `encode_volume`: HU, which the model windows itself.
            input_ids, attention_mask, sentence_index: as for `encode_report`.
            return_loss: also the contrastive loss of volumes and texts of which the i-th belong together: cross entropy in
                both directions, or the sigmoid loss where the model was trained with that. All others are negatives: give
                no batch that has a report twice.
        """
        vision = self._vision(pixel_values, output_hidden_states)
        text = self._text(input_ids, attention_mask, sentence_index, output_hidden_states)
        logits = self.scale * vision.image_embeds @ text.text_embeds.T + self.logit_bias
        loss = contrastive_loss(logits, sigmoid=self.config.logit_bias) if return_loss else None
        output = MG3DOutput(loss, logits, logits.T, text.text_embeds, vision.image_embeds, text, vision)
        return output.to_tuple() if return_dict is False else output


def contrastive_loss(logits: Tensor, *, sigmoid: bool) -> Tensor:
    """Of logits [B, B] whose diagonal belongs together: the mean of both directions' cross entropy, or SigLIP's loss."""
    if sigmoid:
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(sign * logits).sum() / len(logits)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class MG3DVisionModel(VisionSide, MG3DPreTrainedModel):
    """The volume encoder with its projection alone: of the whole model's folder by `AutoModel.from_pretrained(FOLDER,
    trust_remote_code=True, tower="vision")`."""

    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(report_|logit_|segmentation_)"]  # of the whole model

    def __init__(self, config: MG3DConfig):
        super().__init__(config)
        self._add_vision(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> MG3DVisionOutput | tuple:
        """HU as for `encode_volume`."""
        output = self._vision(pixel_values, output_hidden_states)
        return output.to_tuple() if return_dict is False else output


class MG3DTextModel(TextSide, MG3DPreTrainedModel):
    """The report encoder with its projection alone: of the whole model's folder by `AutoModel.from_pretrained(FOLDER,
    trust_remote_code=True, tower="text")`."""

    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"^(volume_|logit_|segmentation_|report_decoder|probe\.|classification_head)"
    ]

    def __init__(self, config: MG3DConfig):
        super().__init__(config)
        self._add_text(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sentence_index: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MG3DTextOutput | tuple:
        """As for `encode_report`."""
        output = self._text(input_ids, attention_mask, sentence_index, output_hidden_states)
        return output.to_tuple() if return_dict is False else output


_SIDES = {"vision": MG3DVisionModel, "text": MG3DTextModel}
for _class in (MG3DModel, MG3DVisionModel, MG3DTextModel):
    _class.register_for_auto_class("AutoModel")  # `save_pretrained` copies the code, too
