"""Geometry, sizes and settings of an MG-3D model: `config.json` of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig


class MG3DConfig(PretrainedConfig):
    """Geometry and sizes of the model.

    volume_size (voxels), spacing (mm) and orientation "RAS" say which grid `encode_volume` takes; windows (HU) what it
    does to the voxels. report_sentences > 0: the model was trained on views of so many sentences, cut at report_tokens,
    and embeds a longer report as the mean over such groups; 0: it embeds reports whole.

    probe_classes: what `probe_logits` scores, a linear head that was fitted to embeddings; head_classes: what
    `classification_logits` scores, the head that the encoder was trained with. Without classes there is no such head.
    Kinds: "multi_label", a sigmoid for each class, or "multi_class", a softmax over them.

    vocabulary_hash: of the tokenizer that the model was trained with (`vocabulary_hash`); "": not known.

    special_token_ids: of tokens that belong to no sentence: what begins and ends a text, and padding.

    segmentation_classes (background first) and decoder_depth > 0: decoders of `modeling_mg3d_tasks.py`, which the export
    of a model that was trained to segment or to write reports has beside this file.
    """

    model_type = "mg3d"
    attribute_map: ClassVar[dict[str, str]] = {  # the names that transformers' own models have
        "hidden_size": "volume_width",
        "num_hidden_layers": "volume_depth",
        "num_attention_heads": "volume_heads",
        "intermediate_size": "volume_mlp_dim",
    }

    def __init__(
        self,
        volume_size: Sequence[int] = (128, 128, 96),
        spacing: Sequence[float] = (2.8, 2.8, 3.5),
        policy: str = "center",
        windows: Sequence[Sequence[float]] = ((-1000.0, 1000.0),),
        patch_size: Sequence[int] = (16, 16, 16),
        stem: str = "linear",
        stem_strides: Sequence[Sequence[int]] = (),
        stem_channels: Sequence[int] = (),
        positions: str = "sincos",
        pooling: str = "attention",
        num_registers: int = 0,
        qk_norm: bool = False,
        layer_scale: bool = False,
        exact_gelu: bool = False,
        volume_norm_eps: float = 1e-6,
        volume_width: int = 768,
        volume_depth: int = 12,
        volume_heads: int = 12,
        volume_mlp_dim: int = 3072,
        vocab_size: int = 4096,
        report_width: int = 768,
        report_depth: int = 12,
        report_heads: int = 12,
        report_mlp_dim: int = 3072,
        max_positions: int = 512,
        type_vocab: int = 2,
        report_norm_eps: float = 1e-12,
        max_tokens: int = 250,
        max_sentences: int = 32,
        report_sentences: int = 0,
        report_tokens: int = 0,
        projection_dim: int = 512,
        logit_bias: bool = False,
        direction_bias: bool = False,
        probe_classes: Sequence[str] = (),
        probe_kind: str = "multi_label",
        head_classes: Sequence[str] = (),
        head_kind: str = "multi_label",
        vocabulary_hash: str = "",
        special_token_ids: Sequence[int] = (),
        segmentation_classes: Sequence[str] = (),
        segmentation_width: int = 16,
        decoder_width: int = 512,
        decoder_depth: int = 0,
        decoder_heads: int = 8,
        decoder_mlp_dim: int = 2048,
        decoder_findings: int = 0,
        decoder_no_repeat: int = 0,
        **kwargs: Any,
    ):
        self.orientation, self.policy = "RAS", policy
        self.volume_size, self.spacing, self.windows = list(volume_size), list(spacing), [list(w) for w in windows]
        self.patch_size, self.stem = list(patch_size), stem
        self.stem_strides, self.stem_channels = [list(s) for s in stem_strides], list(stem_channels)
        self.positions, self.pooling, self.num_registers = positions, pooling, num_registers
        self.qk_norm, self.layer_scale, self.exact_gelu = qk_norm, layer_scale, exact_gelu
        self.volume_norm_eps = volume_norm_eps
        self.volume_width, self.volume_depth = volume_width, volume_depth
        self.volume_heads, self.volume_mlp_dim = volume_heads, volume_mlp_dim
        self.vocab_size, self.max_positions = vocab_size, max_positions
        self.report_width, self.report_depth = report_width, report_depth
        self.report_heads, self.report_mlp_dim = report_heads, report_mlp_dim
        self.type_vocab, self.report_norm_eps = type_vocab, report_norm_eps
        self.max_tokens, self.max_sentences = max_tokens, max_sentences
        self.report_sentences, self.report_tokens = report_sentences, report_tokens
        self.projection_dim, self.logit_bias, self.direction_bias = projection_dim, logit_bias, direction_bias
        self.probe_classes, self.probe_kind = list(probe_classes), probe_kind
        self.head_classes, self.head_kind = list(head_classes), head_kind
        self.vocabulary_hash, self.special_token_ids = vocabulary_hash, list(special_token_ids)
        self.segmentation_classes, self.segmentation_width = list(segmentation_classes), segmentation_width
        self.decoder_width, self.decoder_depth = decoder_width, decoder_depth
        self.decoder_heads, self.decoder_mlp_dim = decoder_heads, decoder_mlp_dim
        self.decoder_findings, self.decoder_no_repeat = decoder_findings, decoder_no_repeat
        super().__init__(**{key: value for key, value in kwargs.items() if key != "orientation"})


MG3DConfig.register_for_auto_class()  # `save_pretrained` copies the code, too
