"""BERT-type report encoders, RoBERTa's included, as a tower: presets, options, freezing, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mg3d_jax.models.towers.base import Form, Params, Sizes, Tower, Weights, frozen_stack
from mg3d_jax.models.towers.bert.encoder import ReportEncoder
from mg3d_jax.models.towers.bert.hugging_face import from_hugging_face, to_hugging_face
from mg3d_jax.models.towers.weights import torch_state


@dataclass(frozen=True)
class BertSizes(Sizes):
    """RoBERTa has one token type and another epsilon in its norms."""

    type_vocab: int = 2
    norm_epsilon: float = 1e-12


# `roberta-base` has the sizes of RadBERT-RoBERTa and BiomedRoBERTa; `pico` and `nano` are for CPU tests and the quickstart.
PRESETS: dict[str, BertSizes] = {
    "pico": BertSizes(64, 2, 4, 256),
    "nano": BertSizes(128, 2, 4, 512),
    "mini": BertSizes(384, 6, 12, 1536),
    "base": BertSizes(768, 12, 12, 3072),
    "roberta-base": BertSizes(768, 12, 12, 3072, type_vocab=1, norm_epsilon=1e-5),
}


@dataclass(frozen=True)
class BertOptions:
    """Nothing beyond what every report tower has."""


def _build(model: Any, vocab_size: int, attention_backend: str = "xla", **fields: Any) -> ReportEncoder:
    encoder = model.report_encoder
    preset = PRESETS[encoder.preset]
    given = {
        "vocab_size": vocab_size,
        "width": preset.width,
        "depth": preset.depth,
        "num_heads": preset.num_heads,
        "mlp_dim": preset.mlp_dim,
        "max_positions": encoder.max_positions,
        "type_vocab": preset.type_vocab,
        "norm_epsilon": preset.norm_epsilon,
        "dropout": encoder.dropout,
        "dtype": model.dtype,
        "remat": model.remat,
        "attention_backend": attention_backend,
        "frozen_layers": encoder.frozen_layers,
    }
    return ReportEncoder(**given | fields)


def _to_torch(params: Params, model: Any) -> Weights:
    return torch_state(params)


def _torch_arguments(params: Params, model: Any) -> dict[str, Any]:
    report = model.report_encoder.sizes
    return {
        "vocab_size": int(params["word_embedding"].shape[0]),
        "report_width": report.width,
        "report_depth": report.depth,
        "report_heads": report.num_heads,
        "report_mlp_dim": report.mlp_dim,
        "max_positions": model.report_encoder.max_positions,
        "type_vocab": report.type_vocab,
        "report_norm_eps": report.norm_epsilon,
    }


BERT = Tower(
    options=BertOptions,
    presets=PRESETS,
    build=_build,
    frozen=lambda preset, layers: frozen_stack(preset.depth, layers),
    module=ReportEncoder,
    forms={
        "bert": Form(
            help="a BERT or RoBERTa encoder: a folder, or a Hugging Face name",
            convert=from_hugging_face,
            folder=True,
            root="embeddings.word_embeddings.weight",
        )
    },
    to_torch=_to_torch,
    torch_arguments=_torch_arguments,
    to_hugging_face=to_hugging_face,
)
