"""MG-3D in PyTorch with what a model was fine-tuned for: classes of voxels, or written reports.

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    classes = model.segment_scan(hu, affine)  # uint8 [i, j, k] on the voxels of the scan; model.config.segmentation_classes
    reports = model.write_reports(model.prepare_volume(hu, affine)[0][None])  # list of B texts

It stands beside `modeling_mg3d.py` and needs what that needs. Axes as there; K classes, L tokens of a text, f channels of the
segmentation decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mg3d_jax.prepare.cleaning import readable

from .configuration_mg3d import MG3DConfig
from .layers_mg3d import Mlp
from .modeling_mg3d import MG3DModel
from .volume_mg3d import AIR_HU, prepare_volume

SIGMA_SCALE, LEAST_WEIGHT = 0.125, 1e-3  # of the Gaussian that blends windows: as MONAI's sliding_window_inference
NORM_EPSILON, NEGATIVE_SLOPE = 1e-5, 0.01  # of the decoder's convolutions, as MONAI's


def halvings(patch: Sequence[int]) -> list[tuple[int, ...]]:
    """Strides from full resolution to a patch: 2 along each axis that can be halved; what is left is in the last one."""
    rest, levels = list(patch), []
    while any(side % 2 == 0 for side in rest):
        levels.append(tuple(2 if side % 2 == 0 else 1 for side in rest))
        rest = [side // step for side, step in zip(rest, levels[-1], strict=True)]
    if math.prod(rest) > 1:
        last = levels.pop() if levels else (1, 1, 1)
        levels.append(tuple(step * side for step, side in zip(last, rest, strict=True)))
    return levels or [(1, 1, 1)]


class ResidualConvolution(nn.Module):
    """Two 3x3x3 convolutions with instance norm and leaky ReLU around a shortcut: MONAI's `UnetResBlock`."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.conv_1 = nn.Conv3d(inputs, width, 3, padding=1, bias=False)
        self.conv_2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv3d(inputs, width, 1, bias=False) if inputs != width else None

    def forward(self, x: Tensor) -> Tensor:
        def norm(features: Tensor) -> Tensor:
            return F.instance_norm(features, eps=NORM_EPSILON)

        hidden = norm(self.conv_2(F.leaky_relu(norm(self.conv_1(x)), NEGATIVE_SLOPE)))
        return F.leaky_relu(hidden + (x if self.shortcut is None else norm(self.shortcut(x))), NEGATIVE_SLOPE)


class Merge(nn.Module):
    """Coarse features, brought up and joined with those of the finer level, convolved."""

    def __init__(self, inputs: int, width: int, stride: tuple[int, ...]):
        super().__init__()
        self.up = nn.ConvTranspose3d(inputs, width, stride, stride, bias=False)
        self.convolution = ResidualConvolution(2 * width, width)

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        return self.convolution(torch.cat([self.up(coarse), skip], dim=1))


class UnetrDecoder(nn.Module):
    """UNETR's decoder for any patch: windowed volume [B, C, X, Y, Z], tokens [B, N, d], hidden states -> [B, f, X, Y, Z]."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        self.patch = tuple(config.patch_size)
        strides, width, deep = halvings(self.patch), config.segmentation_width, config.volume_width
        self.levels = len(strides)
        self.skip_0 = ResidualConvolution(len(config.windows), width)
        for level in range(1, self.levels):
            name, channels = f"skip_{level}", width * 2**level
            self.add_module(f"{name}_up_0", nn.ConvTranspose3d(deep, channels, strides[-1], strides[-1], bias=False))
            for number, stride in enumerate(reversed(strides[level:-1]), start=1):
                up = nn.ConvTranspose3d(channels, channels, stride, stride, bias=False)
                self.add_module(f"{name}_up_{number}", up)
                self.add_module(f"{name}_convolution_{number}", ResidualConvolution(channels, channels))
        for level, stride in enumerate(strides):
            coarse = width * 2 ** (level + 1) if level + 1 < self.levels else deep
            self.add_module(f"merge_{level}", Merge(coarse, width * 2**level, stride))

    def forward(self, volume: Tensor, tokens: Tensor, hidden: Sequence[Tensor]) -> Tensor:
        grid = [side // patch for side, patch in zip(volume.shape[2:], self.patch, strict=True)]

        def on_grid(features: Tensor) -> Tensor:
            return features.transpose(1, 2).unflatten(2, grid)

        skips = [self.skip_0(volume)]
        for level in range(1, self.levels):
            features = on_grid(hidden[level * len(hidden) // self.levels])
            features = getattr(self, f"skip_{level}_up_0")(features)
            for number in range(1, self.levels - level):
                features = getattr(self, f"skip_{level}_up_{number}")(features)
                features = getattr(self, f"skip_{level}_convolution_{number}")(features)
            skips.append(features)
        features = on_grid(tokens)
        for level in reversed(range(self.levels)):
            features = getattr(self, f"merge_{level}")(features, skips[level])
        return features


class CachedAttention(nn.Module):
    """Attention whose keys and values are made apart from its queries."""

    def __init__(self, width: int, context: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context, width), nn.Linear(context, width)

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.key(tokens)), self._heads(self.value(tokens))

    def forward(self, tokens: Tensor, read: tuple[Tensor, Tensor], causal: bool = False) -> Tensor:
        mixed = F.scaled_dot_product_attention(self._heads(self.query(tokens)), *read, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-norm: attention to what was written, attention to the volume, MLP."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        width, heads = config.decoder_width, config.decoder_heads
        self.self_norm, self.cross_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.context_norm = nn.LayerNorm(config.volume_width, eps=1e-6)
        self.self_attention = CachedAttention(width, width, heads)
        self.cross_attention = CachedAttention(width, config.volume_width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, config.decoder_mlp_dim, exact_gelu=False)

    def read(self, volume_tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.cross_attention.keys_values(self.context_norm(volume_tokens))

    def forward(
        self, tokens: Tensor, volume: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens [B, L, d] with keys and values of the volume; `before`: those of tokens that stand before (L is then 1)."""
        entering = self.self_norm(tokens)
        written = self.self_attention.keys_values(entering)
        if before is not None:
            written = tuple(torch.cat(pair, dim=2) for pair in zip(before, written, strict=True))
        tokens = tokens + self.self_attention(entering, written, causal=before is None)
        tokens = tokens + self.cross_attention(self.cross_norm(tokens), volume)
        return tokens + self.mlp(self.mlp_norm(tokens)), written


class ReportDecoder(nn.Module):
    """Causal transformer over words that reads the tokens of the volume; the table of words gives the logits, too."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.decoder_width)
        self.position_embedding = nn.Embedding(config.max_tokens - 1, config.decoder_width)  # nothing follows the last
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(config.decoder_width, eps=1e-6)
        if config.decoder_findings:  # of the present ones, then of the absent ones
            self.finding_embedding = nn.Embedding(2 * config.decoder_findings, config.decoder_width)

    def forward(
        self,
        ids: Tensor,
        volumes: list,
        cache: list | None = None,
        start: int = 0,
        findings: Tensor | None = None,
    ) -> tuple[Tensor, list]:
        """ids [B, L] at positions from `start`, what `DecoderBlock.read` gave of each layer -> logits [B, L, V], cache.

        findings [B, F], of a decoder that reads them: 1 present, 0 absent, anything else unknown.
        """
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        tokens, written = self.word_embedding(ids) + self.position_embedding(places), []
        if findings is not None:
            states = torch.cat([findings == 1, findings == 0], dim=-1).to(tokens.dtype)
            tokens = tokens + (states @ self.finding_embedding.weight)[:, None]
        for number, layer in enumerate(self.layers):
            tokens, now = layer(tokens, volumes[number], None if cache is None else cache[number])
            written.append(now)
        return self.norm(tokens) @ self.word_embedding.weight.T, written


def gaussian(size: Sequence[int]) -> Tensor:
    """Weight of every voxel of a window, float32: 1 in its middle, at least `LEAST_WEIGHT`."""
    weights = torch.ones(1, 1, 1)
    for axis, side in enumerate(size):
        places = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        along = torch.exp(-(places**2) / (2 * (SIGMA_SCALE * side) ** 2))
        weights = weights * along.reshape([-1 if number == axis else 1 for number in range(3)])
    return weights.clamp(min=max(float(weights.min()), LEAST_WEIGHT))


def window_starts(shape: Sequence[int], size: Sequence[int], overlap: float) -> list[tuple[int, ...]]:
    """First voxels of the windows on a volume no smaller than one. The last window of an axis ends with the volume."""
    axes = []
    for side, window in zip(shape, size, strict=True):
        step = max(int(window * (1 - overlap)), 1)
        axes.append(sorted({min(start, side - window) for start in range(0, side - window + step, step)}))
    return list(product(*axes))


def sliding_window(
    network: Callable[[Tensor], Tensor], volumes: Tensor, size: Sequence[int], overlap: float = 0.5, per_call: int = 4
) -> Tensor:
    """HU [B, X, Y, Z] of any size -> float32 [B, K, X, Y, Z]: means of overlapping windows, weighted by a Gaussian.

    `network` takes HU [n, *size] and gives [n, K, *size]; `per_call`: windows of each volume that it takes together. A
    volume smaller than a window is laid into air.
    """
    lack = [max(window - side, 0) for side, window in zip(volumes.shape[1:], size, strict=True)]
    before = [missing // 2 for missing in lack]
    sides = [pad for axis in (2, 1, 0) for pad in (before[axis], lack[axis] - before[axis])]
    padded = F.pad(volumes.float(), sides, value=float(AIR_HU))
    weights, batch = gaussian(size).to(volumes.device), len(volumes)
    total, counts = None, torch.zeros(padded.shape[1:], device=volumes.device)
    starts = window_starts(padded.shape[1:], size, overlap)
    for first in range(0, len(starts), per_call):
        places = [
            tuple(slice(a, a + b) for a, b in zip(at, size, strict=True)) for at in starts[first : first + per_call]
        ]
        found = network(torch.cat([padded[:, x, y, z] for x, y, z in places])).float() * weights
        if total is None:
            total = found.new_zeros((batch, found.shape[1], *padded.shape[1:]))
        for (x, y, z), part in zip(places, found.split(batch), strict=True):
            total[:, :, x, y, z] += part
            counts[x, y, z] += weights
    x, y, z = (slice(a, a + side) for a, side in zip(before, volumes.shape[1:], strict=True))
    return (total / counts)[:, :, x, y, z]


def repetitions(written: list[Tensor], length: int, logits: Tensor) -> Tensor:
    """Which tokens, bool [B, V], would make the last `length` of those written ([B, 1] each) ones that stand earlier."""
    found = torch.zeros(logits.shape[0], logits.shape[-1], dtype=torch.bool, device=logits.device)
    if len(written) < length:
        return found
    rows = torch.cat(written, dim=1).unfold(1, length, 1)  # [B, places, length]
    last = torch.cat(written[len(written) - length + 1 :], dim=1)[:, None] if length > 1 else rows[:, :, :0]
    same = (rows[:, :, :-1] == last).all(-1)
    return found.scatter_reduce(1, rows[:, :, -1], same, "amax")


class MG3DTaskModel(MG3DModel):
    """`MG3DModel` with the decoders that it was fine-tuned with."""

    def __init__(self, config: MG3DConfig):
        super().__init__(config)
        if config.segmentation_classes:
            self.segmentation_decoder = UnetrDecoder(config)
            self.segmentation_head = nn.Conv3d(config.segmentation_width, len(config.segmentation_classes), 1)
        if config.decoder_depth:
            self.report_decoder = ReportDecoder(config)

    def segmentation_logits(self, hu: Tensor) -> Tensor:
        """HU [B, X, Y, Z] of the model's `volume_size`, RAS+ -> logits [B, K, X, Y, Z] of `config.segmentation_classes`.

        MONAI's `sliding_window_inference(hu[:, None], size, n, lambda x: model.segmentation_logits(x[:, 0]), overlap=0.5,
        mode="gaussian")` is `segment`.
        """
        if not self.config.segmentation_classes:
            raise ValueError("this model was not trained to segment")
        volume = self._checked(hu)
        tokens, hidden = self.volume_encoder.with_hidden(volume)
        return self.segmentation_head(self.segmentation_decoder(volume, tokens, hidden))

    @torch.no_grad()
    def segment(self, hu: Tensor, overlap: float = 0.5, per_call: int = 4) -> Tensor:
        """HU [B, X, Y, Z] of any size, RAS+, voxels of `config.spacing` mm -> logits [B, K, X, Y, Z], blended over windows."""
        return sliding_window(self.segmentation_logits, hu, self.config.volume_size, overlap, per_call)

    @torch.no_grad()
    def segment_scan(self, hu: np.ndarray, affine: np.ndarray, overlap: float = 0.5, per_call: int = 4) -> np.ndarray:
        """A whole CT scan in HU [i, j, k] with its NIfTI affine -> uint8 [i, j, k], the class of each of its voxels.

        Shares of the classes are interpolated to the scan's voxels (trilinear), then the largest counts. Axes are reordered
        and flipped, never turned.
        """
        scale = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(0))
        order = [int(np.abs(np.asarray(affine)[axis, :3] / scale).argmax()) for axis in range(3)]
        extent = [hu.shape[source] * scale[source] for source in order]
        size = [max(1, math.ceil(mm / step - 1e-6)) for mm, step in zip(extent, self.config.spacing, strict=True)]
        volume, grid = prepare_volume(hu, affine, size, self.config.spacing)
        shares = self.segment(volume[None].to(self.device), overlap, per_call).softmax(1)
        to_grid = np.linalg.inv(grid) @ affine
        voxels = (
            np.stack(np.meshgrid(*map(np.arange, hu.shape), indexing="ij"), -1) @ to_grid[:3, :3].T + to_grid[:3, 3]
        )
        places = voxels / np.maximum(np.array(size) - 1, 1) * 2 - 1  # -1 and 1: centres of the first and last voxel
        places = torch.as_tensor(places[..., ::-1].copy(), dtype=torch.float32, device=shares.device)  # z, y, x
        found = F.grid_sample(shares, places[None], padding_mode="border", align_corners=True)
        return found[0].argmax(0).to(torch.uint8).cpu().numpy()

    def report_logits(self, hu: Tensor, input_ids: Tensor, findings: Tensor | None = None) -> Tensor:
        """HU as for `encode_volume` and what was written [B, L], from [CLS] on -> logits [B, L, V] of what follows each.

        findings [B, F] for a decoder that reads them: 1 present, 0 absent, -1 unknown; None: those that the model finds.
        """
        self._needs_decoder()
        volumes, found = self._seen(hu)
        return self.report_decoder(input_ids, volumes, findings=found if findings is None else findings)[0].float()

    @torch.no_grad()
    def write_reports(
        self,
        hu: Tensor,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_tokens: int | None = None,
        findings: Tensor | None = None,
    ) -> list[str]:
        """HU as for `encode_volume` -> B reports; each token is the most likely one. `findings` as for `report_logits`;
        `config.decoder_no_repeat` tokens in a row never stand twice in a text (0: they may)."""
        self._needs_decoder()
        tokenizer = tokenizer or self.tokenizer
        volumes, found = self._seen(hu)
        findings, decoder, cache, device = found if findings is None else findings, self.report_decoder, None, hu.device
        never = [tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id]
        last = torch.full((len(hu), 1), tokenizer.cls_token_id, device=device)
        ended = torch.zeros(len(hu), dtype=torch.bool, device=device)
        written: list[Tensor] = []
        for position in range(min(max_tokens or self.config.max_tokens, self.config.max_tokens - 1)):
            logits, cache = decoder(last, volumes, cache, position, findings)
            logits[:, -1, [number for number in never if number is not None]] = -torch.inf
            if length := self.config.decoder_no_repeat:
                logits[:, -1][repetitions(written, length, logits)] = -torch.inf
            last = logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended[:, None], tokenizer.pad_token_id)
            ended = ended | (last[:, 0] == tokenizer.sep_token_id)
            written.append(last)
            if bool(ended.all()):
                break
        texts = tokenizer.batch_decode(torch.cat(written, dim=1), skip_special_tokens=True)
        return [readable(text) for text in texts]

    def _seen(self, hu: Tensor) -> tuple[list, Tensor | None]:
        """What the decoder reads: of each layer its keys and values of the volume, and what the head finds more likely than
        not."""
        tokens, pooled = self._encode(hu)
        found = self.classification_head(pooled) > 0 if self.config.decoder_findings else None
        return [layer.read(tokens) for layer in self.report_decoder.layers], found

    def _needs_decoder(self) -> None:
        if not self.config.decoder_depth:
            raise ValueError("this model was not trained to write reports")


MG3DTaskModel.register_for_auto_class("AutoModel")  # `save_pretrained` copies the code, too
