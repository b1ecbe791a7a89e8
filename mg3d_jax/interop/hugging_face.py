"""Checkpoints as Hugging Face's transformers saves them: a local folder, or a name on the hub, with config and tokenizer."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from mg3d_jax.errors import UserError
from mg3d_jax.files import read_json
from mg3d_jax.interop.state_dict import read_weights
from mg3d_jax.models.towers.base import Form, Imported

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
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
        raise UserError(f"{path_or_name!r}: no such folder (hub names look like 'owner/name').")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors", "*.bin", "*.txt"]
        return Path(snapshot_download(path_or_name, allow_patterns=patterns))
    except Exception as error:
        raise UserError(
            f"{path_or_name!r} is no local folder and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Download it where there is a network and give its folder."
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """What of `WEIGHT_FILES` is there; `UserError` where nothing is."""
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not files:
        raise UserError(f"{folder}: no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    return files


def load_checkpoint(path_or_name: str, form: Form, vocabulary: dict[str, int] | None = None) -> Imported:
    """Loads a checkpoint.

    Args:
        path_or_name: folder with `config.json` and weights, or a hub name "owner/name".
        form: of a tower, one that comes as a folder.
        vocabulary: token -> id of the tokenizer that made the batches; it must be the checkpoint's.

    Raises:
        UserError: missing or unknown keys, other shapes, another vocabulary: all of them named.
    """
    folder = resolve(path_or_name)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; give the folder that transformers' save_pretrained wrote.")
    config = read_json(path, remedy="download or save it again")
    weights, left_out = read_weights(weight_files(folder)[0], form.root)
    imported = form.convert(weights, str(folder), config=config)
    imported = replace(imported, unused=[*imported.unused, *left_out])
    if vocabulary is not None:
        check_vocabulary(folder, imported.fields["vocab_size"], vocabulary)
    return imported


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
