"""MG-3D in PyTorch: a chest CT encoder and a report encoder that share one embedding space.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    volume = model.encode_volume(processor("scan.nii.gz")["volume"])  # [1, k]
    prompts = model.encode_texts(tokenizer, [["Emphysema is present."], ["Emphysema is not present."]])  # [2, k]
    probability = (model.logit_scale.exp() * volume @ prompts.T).softmax(-1)

This file stands alone: it needs torch, transformers, numpy and safetensors, nothing of the program that trained it.
Axes: B volumes, X Y Z voxels in RAS+ order (x to the patient's right, y anterior, z superior), C windows, N patches,
T tokens, S sentences, d width of a tower, k width of the shared space.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, cached_file

AIR_HU, HIGHEST_HU = -1024, 3071
STRAIGHTEN_DEGREES = 10.0  # as the preparation of the training data
MAX_LOGIT_SCALE = 100.0
SETTINGS = (
    "mg3d_settings"  # key of the file's metadata: JSON of the arguments of `MG3DConfig` that belong to the weights
)


class MG3DConfig(PretrainedConfig):
    """Geometry and sizes of the model.

    volume_size (voxels), spacing (mm) and orientation "RAS" say which grid `encode_volume` takes; windows (HU) what it
    does to the voxels. report_sentences > 0: the model was trained on views of so many sentences, cut at report_tokens,
    and embeds a longer report as the mean over such groups; 0: it embeds reports whole.

    probe_classes: what `probe_logits` scores, a linear head that was fitted to embeddings; head_classes: what
    `classification_logits` scores, the head that the encoder was trained with. Without classes there is no such head.
    Kinds: "multi_label", a sigmoid for each class, or "multi_class", a softmax over them.

    vocabulary_hash: of the tokenizer that the model was trained with (`vocabulary_hash`); "": not known.

    segmentation_classes (background first) and decoder_depth > 0: decoders of `modeling_mg3d_tasks.py`, which the export
    of a model that was trained to segment or to write reports has beside this file.
    """

    model_type = "mg3d"

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
        segmentation_classes: Sequence[str] = (),
        segmentation_width: int = 16,
        decoder_width: int = 512,
        decoder_depth: int = 0,
        decoder_heads: int = 8,
        decoder_mlp_dim: int = 2048,
        **kwargs,
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
        self.vocabulary_hash = vocabulary_hash
        self.segmentation_classes, self.segmentation_width = list(segmentation_classes), segmentation_width
        self.decoder_width, self.decoder_depth = decoder_width, decoder_depth
        self.decoder_heads, self.decoder_mlp_dim = decoder_heads, decoder_mlp_dim
        super().__init__(**{key: value for key, value in kwargs.items() if key != "orientation"})


class Attention(nn.Module):
    """Multi-head attention: x [B, T, d] reads context [B, Tk, d] where mask [B, Tk] is True (None: everywhere)."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        head_dim = width // num_heads
        self.query_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head_dim, eps=1e-6, bias=False) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            layer(inputs).unflatten(-1, (self.num_heads, -1))
            for layer, inputs in ((self.query, x), (self.key, context), (self.value, context))
        )
        query, key = self.query_norm(query).transpose(1, 2), self.key_norm(key).transpose(1, 2)
        bias = None
        if mask is not None:  # a finite number: a row without any valid key must not become NaN
            lowest = torch.finfo(query.dtype).min
            bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value.transpose(1, 2), attn_mask=bias)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, exact_gelu: bool):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = nn.GELU(approximate="none" if exact_gelu else "tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class LayerScale(nn.Module):
    """One learned factor per channel of a residual branch."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """Transformer layer: pre-norm (ViT: x + f(norm(x))) or post-norm (BERT: norm(x + f(x)))."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int, *, pre_norm: bool, eps: float, exact_gelu: bool,
                 qk_norm: bool = False, layer_scale: bool = False):  # fmt: skip
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = Attention(width, num_heads, qk_norm)
        self.mlp = Mlp(width, mlp_dim, exact_gelu)
        self.attention_layer_norm, self.mlp_layer_norm = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attention_scale = LayerScale(width) if layer_scale else nn.Identity()
        self.mlp_scale = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.pre_norm:
            normed = self.attention_layer_norm(x)
            x = x + self.attention_scale(self.attention(normed, normed, mask))
            return x + self.mlp_scale(self.mlp(self.mlp_layer_norm(x)))
        x = self.attention_layer_norm(x + self.attention_scale(self.attention(x, x, mask)))
        return self.mlp_layer_norm(x + self.mlp_scale(self.mlp(x)))


class AttentionPool(nn.Module):
    """One learned query reads the tokens [B, N, d] -> [B, d]; zeros where the mask [B, N] is empty."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = Attention(width, num_heads)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        pooled = self.attention(self.query.expand(len(tokens), -1, -1), tokens, mask)[:, 0]
        return pooled if mask is None else pooled * mask.any(1, keepdim=True)


class ConvStem(nn.Module):
    """Strided convolutions with LayerNorm over channels and GELU, then linear: [B, C, X, Y, Z] -> [B, N, d]."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        channels = [len(config.windows), *config.stem_channels]
        levels = list(zip(channels[:-1], channels[1:], config.stem_strides, strict=True))
        self.convs = nn.ModuleList(nn.Conv3d(i, o, tuple(stride), tuple(stride)) for i, o, stride in levels)
        self.norms = nn.ModuleList(nn.LayerNorm(o, eps=1e-6) for _, o, _ in levels)
        self.out = nn.Linear(channels[-1], config.volume_width)

    def forward(self, volume: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            channels_last = norm(conv(volume).movedim(1, -1))
            volume = F.gelu(channels_last, approximate="tanh").movedim(-1, 1)
        return self.out(volume.flatten(2).transpose(1, 2))


class VolumeEncoder(nn.Module):
    """3D ViT: windowed volume [B, C, X, Y, Z] -> tokens [B, N, d] (row-major over the patch grid) and pooled [B, d]."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        width, patch = config.volume_width, tuple(config.patch_size)
        self.pooling, self.num_registers = config.pooling, config.num_registers
        if config.stem == "conv":
            self.patch_embedding = ConvStem(config)
        else:
            self.patch_embedding = nn.Conv3d(len(config.windows), width, patch, patch)
        patches = prod(side // p for side, p in zip(config.volume_size, patch, strict=True))
        # Learned, or a fixed sine-cosine table; either way it is stored with the weights.
        self.positions = nn.Parameter(torch.zeros(patches, width), requires_grad=config.positions == "learned")
        if self.num_registers:
            self.registers = nn.Parameter(torch.zeros(self.num_registers, width))
        self.blocks = nn.ModuleList(
            Block(width, config.volume_heads, config.volume_mlp_dim, pre_norm=True, eps=config.volume_norm_eps,
                  exact_gelu=config.exact_gelu, qk_norm=config.qk_norm, layer_scale=config.layer_scale)
            for _ in range(config.volume_depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, eps=config.volume_norm_eps)
        if self.pooling == "attention":
            self.pool = AttentionPool(width, config.volume_heads)
        elif self.pooling == "flatten":
            self.flatten = nn.Linear(patches * width, width)

    def forward(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        tokens, _ = self.with_hidden(volume)
        if self.pooling == "attention":
            return tokens, self.pool(tokens)
        return tokens, self.flatten(tokens.flatten(1)) if self.pooling == "flatten" else tokens.mean(1)

    def with_hidden(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, N, d], and what every layer gave, before the last norm, without registers."""
        tokens = self.patch_embedding(volume)
        if tokens.ndim == 5:  # [B, d, gx, gy, gz] of the linear patch embedding
            tokens = tokens.flatten(2).transpose(1, 2)
        tokens, hidden = tokens + self.positions, []
        if self.num_registers:
            tokens = torch.cat([self.registers.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
            hidden.append(tokens[:, self.num_registers :])
        return self.norm(tokens[:, self.num_registers :]), hidden


class ReportEncoder(nn.Module):
    """BERT-type encoder: input_ids, attention_mask [B, T] -> token features [B, T, d]."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        width = config.report_width
        self.word_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        self.type_embedding = nn.Embedding(config.type_vocab, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.report_norm_eps)
        self.blocks = nn.ModuleList(
            Block(width, config.report_heads, config.report_mlp_dim, pre_norm=False, eps=config.report_norm_eps,
                  exact_gelu=True)
            for _ in range(config.report_depth)
        )  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        tokens = (
            self.word_embedding(input_ids) + self.position_embedding.weight[:length] + self.type_embedding.weight[0]
        )
        tokens = self.embedding_norm(tokens)
        for block in self.blocks:
            tokens = block(tokens, attention_mask.bool())
        return tokens


def sentence_means(tokens: Tensor, sentence_index: Tensor, max_sentences: int) -> tuple[Tensor, Tensor]:
    """Token features [B, T, d] and index [B, T] (1..S, 0: none) -> mean of each sentence [B, S, d], mask [B, S]."""
    numbers = torch.arange(1, max_sentences + 1, device=tokens.device)
    member = sentence_index[:, None, :] == numbers[None, :, None]  # [B, S, T]
    count = member.sum(-1)
    means = member.to(tokens.dtype) @ tokens / count.clamp(min=1)[..., None].to(tokens.dtype)
    return means, count > 0


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """The first 16 hex digits of the SHA-256 of token -> id."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def _check_settings(config: MG3DConfig, folder: str) -> None:
    """`ValueError` where `config` differs from the settings that the file of the weights carries, if it does."""
    file = cached_file(folder, "model.safetensors", _raise_exceptions_for_missing_entries=False)
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


def tokenize(tokenizer, sentences: Sequence[str], max_tokens: int, max_sentences: int = 32) -> dict[str, Tensor]:
    """The sentences of ONE report -> `input_ids, attention_mask, sentence_index`, each [1, max_tokens].

    [CLS], the tokens of all sentences one after the other, [SEP], padding; what does not fit is cut. `sentence_index`
    is 1 for the tokens of the first sentence and so on, 0 for special tokens and padding.
    """
    if isinstance(sentences, str):
        raise TypeError("tokenize takes a list of sentences, not one string: [text], or the text split into sentences")
    ids, index = [tokenizer.cls_token_id], [0]
    for number, sentence in enumerate(sentences[:max_sentences], start=1):
        # The space is how byte-level tokenizers know the beginning of a word.
        of_sentence = tokenizer(f" {sentence.strip()}", add_special_tokens=False)["input_ids"]
        ids, index = ids + of_sentence, index + [number] * len(of_sentence)
    ids, index = [*ids[: max_tokens - 1], tokenizer.sep_token_id], [*index[: max_tokens - 1], 0]
    padding = max_tokens - len(ids)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * padding]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * padding]),
        "sentence_index": torch.tensor([index + [0] * padding]),
    }


def prepare_volume(
    hu: np.ndarray, affine: np.ndarray, size: Sequence[int], spacing: Sequence[float]
) -> tuple[Tensor, np.ndarray]:
    """A CT volume in HU [i, j, k] with its NIfTI affine (voxel -> RAS+ mm) -> int16 [X, Y, Z] on the model's grid.

    Reorders and flips the axes to RAS+, then resamples each axis about the volume's centre: area average where the axis
    shrinks, linear where it grows; outside is air. The array must hold HU: apply a DICOM slope and intercept before,
    once. Returns the volume and its affine.
    """
    affine = np.asarray(affine, np.float64)
    scale = np.sqrt((affine[:3, :3] ** 2).sum(0))
    cosines = affine[:3, :3] / scale
    order = [int(np.abs(cosines[axis]).argmax()) for axis in range(3)]  # source axis of each RAS+ axis
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"the affine does not give each axis a direction of its own: {affine[:3].tolist()}")
    askew = np.degrees(np.arccos(np.clip(np.abs(cosines).max(1).min(), 0, 1)))
    if askew > STRAIGHTEN_DEGREES:
        raise ValueError(
            f"the scan is askew by {askew:.0f} degrees and must be turned: use this folder's AutoImageProcessor"
        )
    if not np.isfinite(hu).all():
        raise ValueError("the volume has voxels that are not finite")
    volume = torch.as_tensor(np.asarray(hu, np.float32)).clamp(AIR_HU, HIGHEST_HU)
    inside = torch.ones((), dtype=torch.float32)
    to_source = np.zeros((4, 4))
    to_source[3, 3] = 1
    for target, source in enumerate(order):
        step = spacing[target] / scale[source] * np.sign(cosines[target, source])
        start = (volume.shape[source] - 1) / 2 - step * (size[target] - 1) / 2
        to_source[source, target], to_source[source, 3] = step, start
        weights = torch.as_tensor(_axis_weights(volume.shape[source], size[target], start, step))
        volume = torch.movedim(torch.tensordot(weights, volume, dims=([1], [source])), 0, source)
        shape = [1, 1, 1]
        shape[source] = size[target]
        inside = inside * weights.any(1).float().reshape(shape)
    volume = torch.where(inside > 0, volume, torch.tensor(float(AIR_HU)))
    return volume.round().to(torch.int16).permute(order).contiguous(), affine @ to_source


def _axis_weights(old: int, new: int, start: float, step: float) -> np.ndarray:
    """float32 [new, old]: how much of each input voxel goes into the output voxel centred at `start + i * step`."""
    centres, edges = start + np.arange(new) * step, np.arange(old)
    if abs(step) > 1:
        low, high = centres - abs(step) / 2, centres + abs(step) / 2
        weights = np.minimum(high[:, None], edges + 0.5) - np.maximum(low[:, None], edges - 0.5)
    else:
        weights = 1 - np.abs(np.clip(centres, 0, old - 1)[:, None] - edges)
    weights = np.where(
        (weights > 1e-7) & (centres[:, None] >= -0.5 - 1e-6) & (centres[:, None] <= old - 0.5 + 1e-6), weights, 0
    )
    return (weights / np.maximum(weights.sum(1, keepdims=True), 1e-9)).astype(np.float32)


@dataclass
class MG3DOutput(ModelOutput):
    """Embeddings [B, k] are l2-normalised; `logits_per_volume` [B, B] is their scaled cosine similarity."""

    logits_per_volume: Tensor | None = None
    volume_embedding: Tensor | None = None
    report_embedding: Tensor | None = None
    volume_tokens: Tensor | None = None
    report_tokens: Tensor | None = None


class MG3DModel(PreTrainedModel):
    """Both towers, sentence pooling and the projections into the shared space."""

    config_class = MG3DConfig
    main_input_name = "hu"
    base_model_prefix = ""
    _no_split_modules = ("Block",)
    _checked_tokenizer = 0  # id of the one that `tokenize` knows to be the model's

    def __init__(self, config: MG3DConfig):
        super().__init__(config)
        self.volume_encoder, self.report_encoder = VolumeEncoder(config), ReportEncoder(config)
        self.report_pool = AttentionPool(config.report_width, config.report_heads)
        self.volume_projection = nn.Linear(config.volume_width, config.projection_dim)
        self.report_projection = nn.Linear(config.report_width, config.projection_dim)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.logit_bias else 0.0  # of the sigmoid (SigLIP) loss
        if config.direction_bias:  # minus the mean directions of all volumes and all reports
            self.volume_direction_bias = nn.Parameter(torch.zeros(config.projection_dim))
            self.report_direction_bias = nn.Parameter(torch.zeros(config.projection_dim))
        if config.probe_classes:
            self.probe = nn.Linear(config.projection_dim, len(config.probe_classes))
        if config.head_classes:
            self.classification_head = nn.Linear(config.volume_width, len(config.head_classes))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv3d):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, check_config: bool = True, **kwargs):
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
        if check_config:
            _check_settings(model.config, args[0] if args else kwargs["pretrained_model_name_or_path"])
        return (model, info) if output_loading_info else model

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

    def encode_volume(self, hu: Tensor, *, return_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """HU (int16 or float, not windowed) [B, X, Y, Z], RAS+, on the model's grid -> normalised embedding [B, k].

        With `return_tokens` also the patch features [B, N, d], row-major over the patch grid.
        """
        tokens, pooled = self._encode(hu)
        embedding = F.normalize(self.volume_projection(pooled).float(), dim=-1, eps=1e-6)
        if self.config.direction_bias:
            embedding = F.normalize(embedding + self.volume_direction_bias.float(), dim=-1, eps=1e-6)
        return (embedding, tokens) if return_tokens else embedding

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

    def _encode(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features [B, N, d] and pooled features [B, d]."""
        size = tuple(self.config.volume_size)
        if tuple(hu.shape[1:]) != size:
            spacing = " x ".join(map(str, self.config.spacing))
            raise ValueError(
                f"encode_volume takes HU [B, {', '.join(map(str, size))}] at {spacing} mm in RAS+ order, not "
                f"{list(hu.shape)}; prepare_volume(array, affine) brings a CT volume to that grid"
            )
        if hu.numel() and hu.is_floating_point() and hu.abs().amax() <= 1:
            warnings.warn(
                "all voxels are within -1..1: encode_volume takes HU and does the windowing itself", stacklevel=2
            )
        return self.volume_encoder(self.window(hu))

    def encode_report(
        self, input_ids: Tensor, attention_mask: Tensor, sentence_index: Tensor, *, return_tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output of `tokenize`, each [B, T] -> normalised embedding [B, k]; with `return_tokens` also [B, T, d]."""
        direction, tokens = self._direction(input_ids, attention_mask, sentence_index)
        embedding = self._of_direction(direction)
        return (embedding, tokens) if return_tokens else embedding

    def _direction(self, input_ids: Tensor, attention_mask: Tensor, sentence_index: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [B, k] of texts, which are averaged over the parts of a long one, and token features [B, T, d]."""
        tokens = self.report_encoder(input_ids, attention_mask)
        pooled = self.report_pool(*sentence_means(tokens, sentence_index, self.config.max_sentences))
        return F.normalize(self.report_projection(pooled).float(), dim=-1, eps=1e-6), tokens

    def _of_direction(self, direction: Tensor) -> Tensor:
        """The normalised embedding of a direction, or of the mean direction of a text's parts."""
        biased = direction + self.report_direction_bias.float() if self.config.direction_bias else direction
        return F.normalize(biased, dim=-1, eps=1e-6)

    def tokenize(self, tokenizer, reports: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Reports, each a list of sentences -> the inputs of `encode_report`, on the model's device."""
        if id(tokenizer) != self._checked_tokenizer:
            if self.config.vocabulary_hash not in ("", vocabulary_hash(tokenizer.get_vocab())):
                raise ValueError(
                    "the tokenizer has another vocabulary than the model's: take the one of the model's folder"
                )
            self._checked_tokenizer = id(tokenizer)
        length = self.config.report_tokens or self.config.max_tokens
        rows = [tokenize(tokenizer, report, length, self.config.max_sentences) for report in reports]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    @torch.no_grad()
    def encode_texts(self, tokenizer, reports: Sequence[Sequence[str]]) -> Tensor:
        """Prompts or reports of any length, each a list of sentences -> normalised embeddings [n, k].

        A model trained on views of a few sentences embeds a longer report as the mean over its groups of so many.
        """
        size = self.config.report_sentences or self.config.max_sentences
        groups = [[report[i : i + size] for i in range(0, max(len(report), 1), size)] for report in reports]
        if not self.config.report_sentences:
            groups = [of_report[:1] for of_report in groups]
        means = [self._direction(**self.tokenize(tokenizer, of_report))[0].mean(0) for of_report in groups]
        return self._of_direction(torch.stack(means))

    def forward(
        self, hu: Tensor, input_ids: Tensor, attention_mask: Tensor, sentence_index: Tensor, return_dict: bool = True
    ) -> MG3DOutput | tuple:
        """Volumes and their reports, B of each. The diagonal of `logits_per_volume` belongs to the matching pairs."""
        volume, volume_tokens = self.encode_volume(hu, return_tokens=True)
        report, report_tokens = self.encode_report(input_ids, attention_mask, sentence_index, return_tokens=True)
        scale = self.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
        output = MG3DOutput(scale * volume @ report.T + self.logit_bias, volume, report, volume_tokens, report_tokens)
        return output if return_dict else output.to_tuple()
