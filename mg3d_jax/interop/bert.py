"""BERT and RoBERTa checkpoints (local folder or Hugging Face name) -> parameters of `models.ReportEncoder`.

Reads `config.json` through transformers and the weights from `.safetensors` or `.bin`. Heads that an encoder has no
place for (pooler, masked-language head, CXR-BERT's projection) are dropped and reported; anything else that does not
fit is an error.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.interop.state_dict import StrictWeights, dense_params, norm_params, read_state_dict, stack_layers

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# model_type of config.json -> rows at the start of the position table that no token uses (RoBERTa counts from pad + 1).
POSITION_OFFSETS = {"bert": 0, "roberta": 2, "xlm-roberta": 2, "cxr-bert": 0}
UNUSED = (r"pooler\.", r"cls\.", r"lm_head\.", r"cls_projection_head\.", r"embeddings\.(position_ids|token_type_ids)$")


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT-type encoder, under the names of `ReportEncoder`'s fields."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    max_positions: int
    type_vocab: int = 2
    norm_epsilon: float = 1e-12

    def encoder_fields(self) -> dict[str, Any]:
        """Keyword arguments for `ReportEncoder`."""
        return asdict(self)


@dataclass(frozen=True)
class LoadedBert:
    """Parameters ready for `ReportEncoder(**config.encoder_fields())`, and the keys of the file without use."""

    config: BertConfig
    params: dict
    unused: list[str]


# Where the vocabulary may lie in a checkpoint's folder, and what `AutoTokenizer` reads beside it.
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json",
)  # fmt: skip


def copy_tokenizer(path_or_name: str, out: Path) -> list[str]:
    """Copies the files of the checkpoint's own tokenizer; returns their names."""
    folder = resolve(path_or_name)
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, out / name)
    return found


def resolve(path_or_name: str) -> Path:
    """A local folder as it is; any other name is fetched from the Hugging Face hub (or its cache)."""
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path_or_name.startswith((".", "~")) or path_or_name.count("/") != 1:
        raise UserError(
            f"report_encoder.pretrained={path_or_name!r}: no such folder (hub names look like 'owner/name')."
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.bin", "*.txt"]
        return Path(snapshot_download(path_or_name, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"report_encoder.pretrained={path_or_name!r} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Download it where there is a network and give its folder."
        ) from error


def read_config(path_or_name: str) -> BertConfig:
    """Sizes from `config.json`; `UserError` for an architecture whose numerics `ReportEncoder` does not have."""
    return _parse_config(resolve(path_or_name))[0]


def _parse_config(folder: Path) -> tuple[BertConfig, int]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; give the folder that transformers' save_pretrained wrote.")
    raw = read_json(path, remedy="download or save it again")
    model_type = raw.get("model_type", "bert")
    if model_type not in POSITION_OFFSETS:
        raise UserError(f"{path}: model_type {model_type!r}; loadable are {', '.join(POSITION_OFFSETS)}.")
    for key, supported in {"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)}.items():
        if raw.get(key, supported[0]) not in supported:
            raise UserError(f"{path}: {key} is {raw[key]!r}; the report encoder has {supported[0]!r} only.")
    if raw.get("is_decoder") or raw.get("add_cross_attention"):
        raise UserError(f"{path}: describes a decoder; the report encoder needs an encoder.")
    try:
        from transformers import AutoConfig

        # CXR-BERT names its own class but is BERT in every size; its repository's code is never run.
        parsed = AutoConfig.for_model("bert" if model_type == "cxr-bert" else model_type, **_sizes(raw))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: transformers cannot read it ({error}).") from error
    offset = POSITION_OFFSETS[model_type]
    config = BertConfig(
        vocab_size=parsed.vocab_size,
        width=parsed.hidden_size,
        depth=parsed.num_hidden_layers,
        num_heads=parsed.num_attention_heads,
        mlp_dim=parsed.intermediate_size,
        max_positions=parsed.max_position_embeddings - offset,
        type_vocab=parsed.type_vocab_size,
        norm_epsilon=parsed.layer_norm_eps,
    )
    return config, offset


def _sizes(raw: dict) -> dict:
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings"
    return {name: raw[name] for name in (*names.split(), "type_vocab_size", "layer_norm_eps") if name in raw}


def load_bert(
    path_or_name: str,
    expected: BertConfig | None = None,
    vocabulary: dict[str, int] | None = None,
) -> LoadedBert:
    """Loads a BERT-type checkpoint.

    Args:
        path_or_name: folder with `config.json` and weights, or a hub name "owner/name".
        expected: the sizes the model was built with; any difference is an error.
        vocabulary: token -> id of the tokenizer that made the batches; it must be the checkpoint's.

    Raises:
        UserError: missing or unknown keys, other shapes, another vocabulary: all of them named.
    """
    folder = resolve(path_or_name)
    config, offset = _parse_config(folder)
    if expected is not None:
        _check_expected(path_or_name, config, expected)
    if vocabulary is not None:
        check_vocabulary(folder, config.vocab_size, vocabulary)
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    raw = _strip_prefix(read_state_dict(files[0]))
    weights = StrictWeights(raw, str(files[0]))
    params = _convert(weights, config, offset)
    unused = weights.ignore(*UNUSED)
    weights.finish()
    return LoadedBert(config, params, unused)


def _strip_prefix(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checkpoints with a head keep the encoder under "bert." or "roberta."; the heads have no prefix."""
    for prefix in ("bert.", "roberta."):
        if any(key.startswith(prefix + "embeddings.") for key in raw):
            return {key.removeprefix(prefix): array for key, array in raw.items()}
    return raw


def _convert(weights: StrictWeights, config: BertConfig, offset: int) -> dict:
    def table(name: str, rows: int) -> np.ndarray:
        return weights.take(f"embeddings.{name}_embeddings.weight", (rows, config.width))

    layers = [_layer(weights, f"encoder.layer.{index}", config) for index in range(config.depth)]
    return {
        "word_embedding": table("word", config.vocab_size),
        "position_embedding": table("position", config.max_positions + offset)[offset:],
        "type_embedding": table("token_type", config.type_vocab),
        "embedding_norm": norm_params(weights, "embeddings.LayerNorm", config.width),
        "stack": stack_layers(layers),
    }


def _layer(weights: StrictWeights, prefix: str, config: BertConfig) -> dict:
    width = config.width
    attention = {
        name: dense_params(weights, f"{prefix}.attention.self.{name}", width, width)
        for name in ("query", "key", "value")
    }
    return {
        "attention": attention | {"out": dense_params(weights, f"{prefix}.attention.output.dense", width, width)},
        "attention_layer_norm": norm_params(weights, f"{prefix}.attention.output.LayerNorm", width),
        "mlp": {
            "up": dense_params(weights, f"{prefix}.intermediate.dense", width, config.mlp_dim),
            "down": dense_params(weights, f"{prefix}.output.dense", config.mlp_dim, width),
        },
        "mlp_layer_norm": norm_params(weights, f"{prefix}.output.LayerNorm", width),
    }


def _check_expected(name: str, found: BertConfig, expected: BertConfig) -> None:
    pairs = {key: (value, asdict(expected)[key]) for key, value in asdict(found).items()}
    wrong = [f"{key}: {a} in the checkpoint, {b} in the model" for key, (a, b) in pairs.items() if a != b]
    if wrong:
        raise UserError(f"report_encoder.pretrained={name!r} has other sizes:\n  " + "\n  ".join(wrong))


def check_vocabulary(folder: Path, vocab_size: int, vocabulary: dict[str, int]) -> None:
    """`UserError` unless the tokenizer's token -> id table is the checkpoint's own.

    Where the checkpoint's folder has no tokenizer, only the size can be compared: ids must not run past the table.
    """
    own = _own_vocabulary(folder)
    if own is None:
        highest = max(vocabulary.values(), default=-1)
        if highest >= vocab_size:
            raise UserError(f"the tokenizer's largest id is {highest}, but {folder} has {vocab_size} word embeddings.")
        return
    differing = [token for token in vocabulary if own.get(token) != vocabulary[token]]
    if differing or len(own) != len(vocabulary):
        shown = [f"{token!r}: {own.get(token, 'absent')} / {vocabulary[token]}" for token in differing[:5]]
        raise UserError(
            f"the run's tokenizer ({len(vocabulary)} tokens) is not the one of {folder} ({len(own)} tokens); "
            f"{len(differing)} tokens have another id (checkpoint / run): {', '.join(shown) or 'none'}. "
            f"Set data.tokenizer to the checkpoint's folder or name."
        )


def _own_vocabulary(folder: Path) -> dict[str, int] | None:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    if (folder / "vocab.txt").is_file():
        tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        return {token: index for index, token in enumerate(tokens)}
    if (folder / "vocab.json").is_file():  # RoBERTa's
        added = folder / "added_tokens.json"
        more = json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
        return json.loads((folder / "vocab.json").read_text(encoding="utf-8")) | more
    return None
