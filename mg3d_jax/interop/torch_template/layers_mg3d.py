"""Layers and both encoders of MG-3D. Axes as in `modeling_mg3d.py`."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_mg3d import MG3DConfig


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
        pooled = self.attention(self.query.expand(tokens.shape[0], -1, -1), tokens, mask)[:, 0]
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


def _through(encoder: nn.Module, block: nn.Module, *inputs: Tensor) -> Tensor:
    """A layer, whose activations are computed again in the backward pass after `model.gradient_checkpointing_enable()`."""
    if encoder.gradient_checkpointing and encoder.training:
        return encoder._gradient_checkpointing_func(block.__call__, *inputs)
    return block(*inputs)


class VolumeEncoder(nn.Module):
    """3D ViT: windowed volume [B, C, X, Y, Z] -> tokens [B, N, d] (row-major over the patch grid) and pooled [B, d]."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        self.gradient_checkpointing = False  # transformers sets it
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
        return tokens, self.pooled(tokens)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, d] -> [B, d]."""
        if self.pooling == "attention":
            return self.pool(tokens)
        return self.flatten(tokens.flatten(1)) if self.pooling == "flatten" else tokens.mean(1)

    def with_hidden(self, volume: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, N, d], and what every layer gave, before the last norm, without registers."""
        tokens = self.patch_embedding(volume)
        if tokens.ndim == 5:  # [B, d, gx, gy, gz] of the linear patch embedding
            tokens = tokens.flatten(2).transpose(1, 2)
        tokens, hidden = tokens + self.positions, []
        if self.num_registers:
            tokens = torch.cat([self.registers.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = _through(self, block, tokens)
            hidden.append(tokens[:, self.num_registers :])
        return self.norm(tokens[:, self.num_registers :]), hidden


class ReportEncoder(nn.Module):
    """BERT-type encoder: input_ids, attention_mask [B, T] -> token features [B, T, d]."""

    def __init__(self, config: MG3DConfig):
        super().__init__()
        self.gradient_checkpointing = False  # transformers sets it
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
        return self.with_hidden(input_ids, attention_mask)[0]

    def with_hidden(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Token features [B, T, d], and the embeddings and what every layer gave."""
        length = input_ids.shape[1]
        tokens = (
            self.word_embedding(input_ids) + self.position_embedding.weight[:length] + self.type_embedding.weight[0]
        )
        tokens = self.embedding_norm(tokens)
        hidden = [tokens]
        for block in self.blocks:
            tokens = _through(self, block, tokens, attention_mask.bool())
            hidden.append(tokens)
        return tokens, hidden


def sentence_means(tokens: Tensor, sentence_index: Tensor, max_sentences: int) -> tuple[Tensor, Tensor]:
    """Token features [B, T, d] and index [B, T] (1..S, 0: none) -> mean of each sentence [B, S, d], mask [B, S]."""
    numbers = torch.arange(1, max_sentences + 1, device=tokens.device)
    member = sentence_index[:, None, :] == numbers[None, :, None]  # [B, S, T]
    count = member.sum(-1)
    means = member.to(tokens.dtype) @ tokens / count.clamp(min=1)[..., None].to(tokens.dtype)
    return means, count > 0
