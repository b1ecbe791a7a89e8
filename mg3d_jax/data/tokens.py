"""Sentences of a report -> token ids with the sentence and the whole word of every token.

A run keeps its tokenizer as `tokenizer.json` (Hugging Face's fast format), whether it was trained here on the run's own
reports or came from the hub, so that training, evaluation and the exported PyTorch model read the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mg3d_jax.errors import UserError
from mg3d_jax.files import write_json, write_text

# Roles of special tokens. They have BERT's names here, however the tokenizer calls them ("<s>", "<pad>", ...).
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_UNKNOWN = "a \u2695 \u4e00"  # with what few vocabularies have
MAX_LENGTH = 512  # tokens; written into `tokenizer_config.json`, where transformers looks for it


def _blank_wordpiece(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_wordpiece(sentences: Iterable[str], vocab_size: int) -> Tokenizer:
    """Lower-case BERT-type WordPiece tokenizer. The same sentences in any order give the same vocabulary.

    The library numbers the pieces of single characters in the order of a randomly seeded hash map, and breaks ties of the
    merges by those numbers. Announcing the pieces in sorted order first makes the result repeatable.
    """
    texts = sorted(sentences)
    draft = _blank_wordpiece(models.WordPiece(unk_token="[UNK]"))
    alphabet = sorted({c for text in texts for c in draft.normalizer.normalize_str(text) if not c.isspace()})
    pieces = [*SPECIAL_TOKENS, *alphabet, *(f"##{c}" for c in alphabet)]
    draft.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=pieces, show_progress=False),
    )
    tokenizer = _blank_wordpiece(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def load_tokenizer(name_or_folder: str) -> Tokenizer:
    """A fast tokenizer from a folder with `tokenizer.json`, or of any other kind that transformers reads, or by hub name.

    Many published files carry the padding and truncation of some application. They are dropped: texts are padded and cut to
    the limits of the configuration, and what is cut is counted.
    """
    with _named(name_or_folder):
        tokenizer = _read_tokenizer(name_or_folder)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode(
            _UNKNOWN
        )  # a vocabulary without the parts that the file refers to fails at the first text only
    return tokenizer


@contextmanager
def _named(name_or_folder: str) -> Iterator[None]:
    """What the library raises becomes a `UserError` with the file. It raises bare `Exception`s, and for what its Rust code
    does not expect a `PanicException`, which is none."""
    path = Path(name_or_folder) / "tokenizer.json"
    where = str(path) if path.is_file() else f"data.tokenizer = {name_or_folder!r}"
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{where} is no tokenizer that this version of `tokenizers` can use: {error}. Copy its files "
            "again, or name another one in data.tokenizer"
        ) from error


def _read_tokenizer(name_or_folder: str) -> Tokenizer:
    folder = Path(name_or_folder)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer, BertTokenizerFast  # slow import, needed only here

    # CXR-BERT names a class of its own, which is BERT's; its repository's code is never run.
    plain = (folder / "vocab.txt").is_file()
    kind = BertTokenizerFast if plain else AutoTokenizer
    try:
        return kind.from_pretrained(name_or_folder, **({} if plain else {"use_fast": True})).backend_tokenizer
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer = {name_or_folder!r} is neither a folder with a tokenizer nor a name on the hub: {error}"
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that makes `AutoTokenizer.from_pretrained(folder)` work.

    The first one not by the library, whose errors do not say what the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    names = {f"{role.strip('[]').lower()}_token": token for role, token in special_tokens(tokenizer).items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH} | names
    write_json(folder / "tokenizer_config.json", config)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokenizer's own names of the special tokens, by role: `{"[PAD]": "<pad>", ...}`.

    What begins and ends a text it shows by encoding an empty one; the others are the special tokens that have their role
    in their name, as those of every BERT and RoBERTa do. `UserError` naming the roles that are missing.
    """
    ends = tokenizer.encode("").tokens
    found = {"[CLS]": ends[0], "[SEP]": ends[-1]} if len(ends) == 2 else {}
    special = [str(token.content) for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    for role in ("[PAD]", "[UNK]", "[MASK]", *(("[CLS]", "[SEP]") if not found else ())):
        named = [token for token in special if role.strip("[]").lower() in token.lower()]
        if role == "[UNK]" and not named:
            named = [name for name in [getattr(tokenizer.model, "unk_token", None)] if name]
        if len(named) == 1:
            found[role] = named[0]
    if missing := [role for role in SPECIAL_TOKENS if role not in found]:
        raise UserError(
            f"the tokenizer lacks {missing} among its special tokens {special}: one of a BERT or RoBERTa is needed"
        )
    return {role: found[role] for role in SPECIAL_TOKENS}


class ReportTokenizer:
    """Turns the sentences of a report into the text fields of a batch.

    Sentences are encoded with a space before them: a byte-level tokenizer (RoBERTa's) knows a word by it, and a sentence
    has the same tokens inside a report as by itself. WordPiece does not see it.

    Args:
        tokenizer: any fast tokenizer of a BERT or RoBERTa, see `special_tokens`.
        max_tokens: T, special tokens included; later tokens are cut.
        max_sentences: S; later sentences are cut.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, max_sentences: int):
        self.tokenizer, self.max_tokens, self.max_sentences = tokenizer, max_tokens, max_sentences
        self.special: dict[str, Any] = {
            role: tokenizer.token_to_id(token) for role, token in special_tokens(tokenizer).items()
        }
        self.vocab_size = tokenizer.get_vocab_size()

    def _encode(self, sentences: Sequence[str]) -> list[Encoding]:
        return self.tokenizer.encode_batch([f" {text.strip()}" for text in sentences], add_special_tokens=False)

    def __call__(self, sentences: Sequence[str]) -> dict[str, np.ndarray]:
        """`token_ids`, `token_mask`, `sentence_index`, `word_index`, each `[T]` (see `mg3d_jax.batch`)."""
        ids, sentence_of, word_of, words = [self.special["[CLS]"]], [0], [0], 0
        for number, encoding in enumerate(self._encode(sentences[: self.max_sentences]), start=1):
            ids += encoding.ids
            sentence_of += [number] * len(encoding.ids)
            word_of += [words + 1 + w for w in encoding.word_ids]  # type: ignore[operator]  # None: special tokens
            words = max(words, word_of[-1])
        keep = self.max_tokens - 1
        ids, sentence_of, word_of = [*ids[:keep], self.special["[SEP]"]], [*sentence_of[:keep], 0], [*word_of[:keep], 0]
        return {
            "token_ids": self._padded(ids, np.int32, self.special["[PAD]"]),
            "token_mask": self._padded([True] * len(ids), np.bool_, False),
            "sentence_index": self._padded(sentence_of, np.int32, 0),
            "word_index": self._padded(word_of, np.int32, 0),
        }

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as one by itself, [CLS] first and [SEP] last; of any length."""
        ends = self.special["[CLS]"], self.special["[SEP]"]
        return [[ends[0], *encoding.ids, ends[1]] for encoding in self._encode(texts)]

    def _padded(self, values: list, dtype: type, fill: int) -> np.ndarray:
        array: np.ndarray = np.full(self.max_tokens, fill, dtype)
        array[: len(values)] = values
        return array

    def lengths(self, sentences: Sequence[str]) -> list[int]:
        """Tokens of each sentence, without special ones."""
        return [len(encoding.ids) for encoding in self._encode(sentences)]

    def is_cut(self, sentences: Sequence[str]) -> bool:
        """Does this report lose tokens or sentences to the limits?"""
        lengths = self.lengths(sentences)
        return len(lengths) > self.max_sentences or sum(lengths) + 2 > self.max_tokens
