"""The two sides of an MG-3D model: volumes become embeddings, texts become embeddings. Axes as in `modeling_mg3d.py`."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import ModelOutput, cached_file

from .configuration_mg3d import MG3DConfig
from .layers_mg3d import AttentionPool, ReportEncoder, VolumeEncoder, sentence_means
from .text_mg3d import Text, one_sentence, sentences_of, tokenize, vocabulary_hash
from .volume_mg3d import prepare_volume

# Key of the weights' metadata: JSON of the arguments of `MG3DConfig` that belong to them.
SETTINGS = "mg3d_settings"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a folder has beside weights, settings and code, and a tuned model needs as well.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "zero_shot.json",
    "pipeline_mg3d.py", "processing_mg3d.py", "image_processing_mg3d.py", "LICENSE", "requirements.txt",
)  # fmt: skip


@dataclass
class MG3DVisionOutput(ModelOutput):
    """`image_embeds` [B, k] l2-normalised; `last_hidden_state` [B, N, d], row-major over the patch grid; `pooler_output`
    [B, d]; `hidden_states`: what every layer gave, before the last norm, where it was asked for."""

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MG3DTextOutput(ModelOutput):
    """`text_embeds` [B, k] l2-normalised; `last_hidden_state` [B, T, d]; `pooler_output` [B, d], over sentences;
    `hidden_states`: the embeddings and what every layer gave, where it was asked for."""

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MG3DPreTrainedModel(PreTrainedModel):
    """What the whole model and its sides have in common: how weights are loaded and drawn."""

    config_class = MG3DConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # the only attention that it has
    _no_split_modules = ("Block",)
    _folder = ""  # that it was loaded from: a folder, or a name on the hub

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, check_config: bool = True, **kwargs: Any
    ) -> Any:
        """As in transformers, but a missing, unknown or misshapen tensor is an error, not a layer of random numbers; so are
        numbers that are not finite, and settings other than those that the weights were exported with (windows, heads, ...),
        unless `check_config` is False."""
        kwargs["ignore_mismatched_sizes"] = True  # collected here, to name them all at once
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = {
            "missing": sorted(info["missing_keys"]),
            "unknown": sorted(info["unexpected_keys"]),
            "of the wrong shape (name, in the file, in the model)": sorted(map(str, info["mismatched_keys"])),
        }
        if any(problems.values()):
            lines = [f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in problems.items() if names]
            raise ValueError(
                f"the weights do not belong to this configuration: {'; '.join(lines)}. Export the model again."
            )
        if broken := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
            raise ValueError(
                f"weights that are not finite: {', '.join(broken[:8])}. The file is damaged: get it again."
            )
        model._folder = str(args[0] if args else kwargs["pretrained_model_name_or_path"])
        if check_config:
            _check_settings(model.config, model._folder)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with what the folder that the model was loaded from has beside it: tokenizer, preprocessing,
        prompts."""
        kind = type(self)
        before, kind._auto_class = kind._auto_class, "AutoModel"  # which may have loaded it by another `Auto` class
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            kind._auto_class = before
        for name in BESIDE if self._folder else ():
            file = cached_file(self._folder, name, _raise_exceptions_for_missing_entries=False)
            if file is not None and not (Path(save_directory) / name).exists():
                shutil.copyfile(file, Path(save_directory) / name)


def _check_settings(config: MG3DConfig, folder: str) -> None:
    """`ValueError` where `config` differs from the settings that the file of the weights carries, if it does."""
    file = cached_file(folder, WEIGHTS, _raise_exceptions_for_missing_entries=False)
    if file is None and (index := cached_file(folder, INDEX, _raise_exceptions_for_missing_entries=False)):
        with open(index) as text:
            file = cached_file(folder, min(json.load(text)["weight_map"].values()))
    if file is None:
        return
    with safe_open(file, framework="pt") as weights:
        told = json.loads((weights.metadata() or {}).get(SETTINGS, "{}"))
    ours = json.loads(json.dumps({key: getattr(config, key, None) for key in told}))
    if wrong := [f"{key} = {ours[key]!r}, not {value!r}" for key, value in told.items() if ours[key] != value]:
        raise ValueError(
            f"config.json says other settings than the weights were trained with: {'; '.join(wrong)}. Take config.json and "
            "weights of one export, or pass check_config=False if you mean it."
        )


class VisionSide:
    """HU -> embedding. Of a model with `volume_encoder`, `volume_projection` and what `_add_vision` adds beside them."""

    config: MG3DConfig
    volume_encoder: VolumeEncoder
    volume_projection: nn.Linear

    def _add_vision(self, config: MG3DConfig) -> None:
        self.volume_encoder = VolumeEncoder(config)
        self.volume_projection = nn.Linear(config.volume_width, config.projection_dim)
        if config.direction_bias:  # minus the mean direction of all volumes
            self.volume_direction_bias = nn.Parameter(torch.zeros(config.projection_dim))
        if config.probe_classes:
            self.probe = nn.Linear(config.projection_dim, len(config.probe_classes))
        if config.head_classes:
            self.classification_head = nn.Linear(config.volume_width, len(config.head_classes))

    def prepare_volume(self, hu: np.ndarray, affine: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """A CT volume in HU with its NIfTI affine -> int16 [X, Y, Z] on this model's grid, and the grid's affine.

        Without any package beside torch and numpy, and therefore only centred and for scans along the scanner's axes; the image
        processor of this folder (`AutoImageProcessor`) does all that the training did.
        """
        if self.config.policy != "center":
            raise ValueError(
                f"the training volumes were placed by policy {self.config.policy!r}: use this folder's AutoImageProcessor"
            )
        return prepare_volume(hu, affine, self.config.volume_size, self.config.spacing)

    def window(self, hu: Tensor) -> Tensor:
        """HU [B, X, Y, Z] -> [B, C, X, Y, Z] in [0, 1], one channel per window."""
        hu = hu.float()
        channels = [((hu - low) / (high - low)).clamp(0, 1) for low, high in self.config.windows]
        return torch.stack(channels, dim=1).to(self.volume_projection.weight.dtype)

    def encode_volume(self, hu: Tensor, *, return_tokens: bool = False) -> Any:
        """HU (int16 or float, not windowed) [B, X, Y, Z], RAS+, on the model's grid -> normalised embedding [B, k].

        With `return_tokens` also the patch features [B, N, d], row-major over the patch grid.
        """
        tokens, pooled = self._encode(hu)
        embedding = self._volume_embedding(pooled)
        return (embedding, tokens) if return_tokens else embedding

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """`encode_volume` under the name that image-text models have in transformers: normalised, [B, k]."""
        return self._volume_embedding(self._encode(pixel_values)[1])

    def probe_logits(self, hu: Tensor) -> Tensor:
        """HU as for `encode_volume` -> logits [B, L] of `config.probe_classes`, by the linear probe of the embeddings."""
        if not self.config.probe_classes:
            raise ValueError("this export has no probe: `mg3d export --probe FILE` adds one")
        return self.probe(self.encode_volume(hu).to(self.probe.weight.dtype)).float()

    def classification_logits(self, hu: Tensor) -> Tensor:
        """HU as for `encode_volume` -> logits [B, L] of `config.head_classes`, by the head that it was trained with."""
        if not self.config.head_classes:
            raise ValueError("this model was trained without a classification head")
        return self.classification_head(self._encode(hu)[1]).float()

    def _vision(self, pixel_values: Tensor, output_hidden_states: bool | None) -> MG3DVisionOutput:
        tokens, hidden = self.volume_encoder.with_hidden(self._checked(pixel_values, has_air=True))
        pooled = self.volume_encoder.pooled(tokens)
        return MG3DVisionOutput(
            self._volume_embedding(pooled), tokens, pooled, tuple(hidden) if output_hidden_states else None
        )

    def _volume_embedding(self, pooled: Tensor) -> Tensor:
        embedding = F.normalize(self.volume_projection(pooled).float(), dim=-1, eps=1e-6)
        if self.config.direction_bias:
            embedding = F.normalize(embedding + self.volume_direction_bias.float(), dim=-1, eps=1e-6)
        return embedding

    def _encode(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features [B, N, d] and pooled features [B, d]."""
        return self.volume_encoder(self._checked(hu, has_air=True))

    def _checked(self, hu: Tensor, *, has_air: bool = False) -> Tensor:
        """The windowed volume, of HU that have the model's grid. `has_air`: they are of a whole field of view."""
        size = tuple(self.config.volume_size)
        if tuple(hu.shape[1:]) != size:
            spacing = " x ".join(map(str, self.config.spacing))
            raise ValueError(
                f"encode_volume takes HU [B, {', '.join(map(str, size))}] at {spacing} mm in RAS+ order, not "
                f"{list(hu.shape)}; prepare_volume(array, affine) brings a CT volume to that grid"
            )
        if hu.numel() and not torch.compiler.is_compiling():  # in a graph no value is known
            _check_values(hu, has_air=has_air)
        return self.window(hu)


def _check_values(hu: Tensor, *, has_air: bool) -> None:
    """`ValueError` for what is not finite, warnings for what can hardly be HU. Voxels are read once for all of it."""
    volumes = hu.flatten(1)
    lows, highs = torch.stack([volumes.amin(1), volumes.amax(1)]).tolist()  # NaN where a volume has one
    if not all(map(math.isfinite, lows + highs)):
        raise ValueError("a volume has voxels that are not finite: its file is damaged, or was computed wrongly")
    if hu.is_floating_point() and min(lows) >= -1 and max(highs) <= 1:
        warnings.warn("all voxels are within -1..1: encode_volume takes HU and does the windowing itself", stacklevel=3)
    if has_air and max(highs) > 1 and max(lows) >= 0:
        warnings.warn(
            "a volume has no voxel below 0 HU, as air is: are its numbers HU + 1024? Subtract 1024, or give the file "
            "to the AutoImageProcessor of this folder, which decides that by evidence",
            stacklevel=3,
        )


class TextSide:
    """Text -> embedding. Of a model with `report_encoder`, `report_pool`, `report_projection` and what `_add_text` adds."""

    config: MG3DConfig
    device: torch.device
    report_encoder: ReportEncoder
    report_pool: AttentionPool
    report_projection: nn.Linear
    _folder: str
    _tokenizer: PreTrainedTokenizerBase | None = None
    _checked_tokenizer = 0  # id of the one that is known to be the model's

    def _add_text(self, config: MG3DConfig) -> None:
        self.report_encoder = ReportEncoder(config)
        self.report_pool = AttentionPool(config.report_width, config.report_heads)
        self.report_projection = nn.Linear(config.report_width, config.projection_dim)
        if config.direction_bias:  # minus the mean direction of all reports
            self.report_direction_bias = nn.Parameter(torch.zeros(config.projection_dim))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the folder which the model was loaded from."""
        if self._tokenizer is None:
            if not self._folder:
                raise ValueError(
                    "this model was not loaded from a folder that has a tokenizer: give tokenizer=, the one that it was "
                    "trained with"
                )
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(self._folder)
        return self._tokenizer

    def tokenize(self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Tensor]:
        """Texts, each a string or a list of sentences -> the inputs of `encode_report`, on the model's device."""
        if isinstance(texts, str):
            raise TypeError("a list of texts is needed, not one string: [text]")
        tokenizer = tokenizer or self.tokenizer
        if id(tokenizer) != self._checked_tokenizer:
            if self.config.vocabulary_hash not in ("", vocabulary_hash(tokenizer.get_vocab())):
                raise ValueError(
                    "the tokenizer has another vocabulary than the model's: take the one of the model's folder"
                )
            self._checked_tokenizer = id(tokenizer)
        length = self.config.report_tokens or self.config.max_tokens
        rows = [tokenize(tokenizer, text, length, self.config.max_sentences) for text in texts]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def encode_report(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sentence_index: Tensor | None = None,
        *,
        return_tokens: bool = False,
    ) -> Any:
        """The output of `tokenize`, each [B, T] -> normalised embedding [B, k]; with `return_tokens` also [B, T, d].

        Without `sentence_index` each row is taken for one sentence: what a tokenizer of transformers gives for a string.
        """
        direction, tokens = self._direction(input_ids, attention_mask, sentence_index)
        embedding = self._of_direction(direction)
        return (embedding, tokens) if return_tokens else embedding

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, sentence_index: Tensor | None = None
    ) -> Tensor:
        """`encode_report` under the name that image-text models have in transformers: normalised, [B, k]."""
        return self._of_direction(self._direction(input_ids, attention_mask, sentence_index)[0])

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None = None) -> Tensor:
        """Prompts or reports of any length, each a string or a list of sentences -> normalised embeddings [n, k].

        A model trained on views of a few sentences embeds a longer report as the mean over its groups of so many.
        """
        if isinstance(texts, str):
            raise TypeError("a list of texts is needed, not one string: [text]")
        size = self.config.report_sentences or self.config.max_sentences
        reports = [sentences_of(text) for text in texts]
        groups = [[report[i : i + size] for i in range(0, max(len(report), 1), size)] for report in reports]
        if not self.config.report_sentences:
            groups = [of_report[:1] for of_report in groups]
        rows = self.tokenize([group for of_report in groups for group in of_report], tokenizer)
        parts = self._direction(**rows)[0].split([len(of_report) for of_report in groups])
        return self._of_direction(torch.stack([part.mean(0) for part in parts]))

    def _text(
        self, input_ids: Tensor, attention_mask: Tensor | None, sentence_index: Tensor | None, hidden: bool | None
    ) -> MG3DTextOutput:
        tokens, states, pooled = self._read(input_ids, attention_mask, sentence_index)
        embedding = self._of_direction(F.normalize(self.report_projection(pooled).float(), dim=-1, eps=1e-6))
        return MG3DTextOutput(embedding, tokens, pooled, tuple(states) if hidden else None)

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor | None, sentence_index: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Token features [B, T, d], those of every layer, and pooled ones [B, d]."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if sentence_index is None:
            sentence_index = one_sentence(input_ids, attention_mask, self.config.special_token_ids)
        tokens, states = self.report_encoder.with_hidden(input_ids, attention_mask)
        return tokens, states, self.report_pool(*sentence_means(tokens, sentence_index, self.config.max_sentences))

    def _direction(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, sentence_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, k] of texts, which are averaged over the parts of a long one, and token features [B, T, d]."""
        tokens, _, pooled = self._read(input_ids, attention_mask, sentence_index)
        return F.normalize(self.report_projection(pooled).float(), dim=-1, eps=1e-6), tokens

    def _of_direction(self, direction: Tensor) -> Tensor:
        """The normalised embedding of a direction, or of the mean direction of a text's parts."""
        biased = direction + self.report_direction_bias.float() if self.config.direction_bias else direction
        return F.normalize(biased, dim=-1, eps=1e-6)
