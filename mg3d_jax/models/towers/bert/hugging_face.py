"""Weights of BERT and RoBERTa checkpoints as Hugging Face's transformers saves them -> parameters of `ReportEncoder`.

Heads that an encoder has no place for (pooler, masked-language head, CXR-BERT's projection) are dropped and reported;
anything else that does not fit is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.models.towers.base import Imported, Weights
from mg3d_jax.models.towers.weights import StrictWeights, dense_params, norm_params, stack_layers

# model_type of config.json -> rows at the start of the position table that no token uses (RoBERTa counts from pad + 1).
POSITION_OFFSETS = {"bert": 0, "roberta": 2, "xlm-roberta": 2, "cxr-bert": 0}
UNUSED = (r"pooler\.", r"cls\.", r"lm_head\.", r"cls_projection_head\.", r"embeddings\.(position_ids|token_type_ids)$")


def from_hugging_face(weights: Weights, source: str, config: dict[str, Any]) -> Imported:
    """A BERT-type encoder.

    Args:
        config: what the checkpoint's `config.json` holds.

    Raises:
        UserError: an architecture whose numerics `ReportEncoder` does not have; missing, unknown or misshapen keys: all of
            them named.
    """
    sizes, offset = _parse_config(config, source)
    strict = StrictWeights(_strip_prefix(weights), source)
    params = _convert(strict, sizes, offset)
    unused = strict.ignore(*UNUSED)
    strict.finish()
    return Imported(sizes, params, unused)


def _parse_config(config: dict[str, Any], source: str) -> tuple[dict[str, Any], int]:
    """Fields of `ReportEncoder`, and the unused rows of the position table."""
    model_type = config.get("model_type", "bert")
    if model_type not in POSITION_OFFSETS:
        raise UserError(f"{source}: model_type {model_type!r}; loadable are {', '.join(POSITION_OFFSETS)}.")
    for key, supported in {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}.items():
        if config.get(key, supported[0]) not in supported:
            raise UserError(f"{source}: {key} is {config[key]!r}; the report encoder has {supported[0]!r} only.")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UserError(f"{source}: describes a decoder; the report encoder needs an encoder.")
    try:
        from transformers import AutoConfig

        # CXR-BERT names its own class but is BERT in every size; its repository's code is never run.
        parsed = AutoConfig.for_model("bert" if model_type == "cxr-bert" else model_type, **_sizes(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: transformers cannot read it ({error}).") from error
    offset = POSITION_OFFSETS[model_type]
    return {
        "vocab_size": parsed.vocab_size,
        "width": parsed.hidden_size,
        "depth": parsed.num_hidden_layers,
        "num_heads": parsed.num_attention_heads,
        "mlp_dim": parsed.intermediate_size,
        "max_positions": parsed.max_position_embeddings - offset,
        "type_vocab": parsed.type_vocab_size,
        "norm_epsilon": parsed.layer_norm_eps,
    }, offset


def _sizes(raw: dict) -> dict:
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
    return {name: raw[name] for name in (*names.split(), "type_vocab_size", "layer_norm_eps") if name in raw}


def _strip_prefix(raw: Weights) -> Weights:
    """Checkpoints with a head keep the encoder under "bert." or "roberta."; the heads have no prefix."""
    for prefix in ("bert.", "roberta."):
        if any(key.startswith(prefix + "embeddings.") for key in raw):
            return {key.removeprefix(prefix): array for key, array in raw.items()}
    return raw


def _convert(weights: StrictWeights, sizes: dict[str, int], offset: int) -> dict:
    def table(name: str, rows: int) -> np.ndarray:
        return weights.take(f"embeddings.{name}_embeddings.weight", (rows, sizes["width"]))

    layers = [_layer(weights, f"encoder.layer.{index}", sizes) for index in range(sizes["depth"])]
    return {
        "word_embedding": table("word", sizes["vocab_size"]),
        "position_embedding": table("position", sizes["max_positions"] + offset)[offset:],
        "type_embedding": table("token_type", sizes["type_vocab"]),
        "embedding_norm": norm_params(weights, "embeddings.LayerNorm", sizes["width"]),
        "stack": stack_layers(layers),
    }


def _layer(weights: StrictWeights, prefix: str, sizes: dict[str, int]) -> dict:
    width = sizes["width"]
    attention = {
        name: dense_params(weights, f"{prefix}.attention.self.{name}", width, width)
        for name in ("query", "key", "value")
    }
    return {
        "attention": attention | {"out": dense_params(weights, f"{prefix}.attention.output.dense", width, width)},
        "attention_layer_norm": norm_params(weights, f"{prefix}.attention.output.LayerNorm", width),
        "mlp": {
            "up": dense_params(weights, f"{prefix}.intermediate.dense", width, sizes["mlp_dim"]),
            "down": dense_params(weights, f"{prefix}.output.dense", sizes["mlp_dim"], width),
        },
        "mlp_layer_norm": norm_params(weights, f"{prefix}.output.LayerNorm", width),
    }


def to_hugging_face(params: dict[str, Any], model: Any) -> tuple[dict[str, Any], Weights]:
    """The encoder as transformers' `BertModel` without its pooler: `config.json` and state dict. A RoBERTa, too: its position
    table begins at the first position that a token uses."""
    from mg3d_jax.models.towers.weights import torch_state

    sizes = model.report_encoder.sizes
    names = {
        "word_embedding": "embeddings.word_embeddings",
        "position_embedding": "embeddings.position_embeddings",
        "type_embedding": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
    }
    layer = {
        **{f"attention.{name}": f"attention.self.{name}" for name in ("query", "key", "value")},
        "attention.out": "attention.output.dense",
        "attention_layer_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "mlp_layer_norm": "output.LayerNorm",
    }
    names |= {
        f"blocks.{number}.{ours}": f"encoder.layer.{number}.{theirs}"
        for number in range(sizes.depth)
        for ours, theirs in layer.items()
    }
    state = {}
    for key, array in torch_state(params).items():
        ours, _, kind = key.rpartition(".")
        state[f"{names[ours]}.{kind}"] = array
    vocabulary, positions = len(params["word_embedding"]), len(params["position_embedding"])
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
        "intermediate_size": sizes.mlp_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "type_vocab_size": sizes.type_vocab,
        "layer_norm_eps": sizes.norm_epsilon,
    }
    return config, state
