"""Sentences of a report -> token ids with the sentence and the whole word of every token.

A run keeps its tokenizer as `tokenizer.json` (Hugging Face's fast format), whether it was trained here on the run's own
reports or came from the hub, so that training, evaluation and the exported PyTorch model read the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mg3d_jax.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
    """A fast tokenizer from a folder with `tokenizer.json`, or by Hugging Face name."""
    file = Path(name_or_folder) / "tokenizer.json"
    if file.is_file():
        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer  # slow import, needed only here

    try:
        return AutoTokenizer.from_pretrained(name_or_folder, use_fast=True).backend_tokenizer
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.tokenizer = {name_or_folder!r} is neither a folder with a tokenizer nor a name on the hub: {error}"
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that makes `AutoTokenizer.from_pretrained(folder)` work."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL_TOKENS, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


class ReportTokenizer:
    """Turns the sentences of a report into the text fields of a batch.

    Args:
        tokenizer: any BERT-type fast tokenizer with [PAD], [CLS], [SEP] and [MASK].
        max_tokens: T, special tokens included; later tokens are cut.
        max_sentences: S; later sentences are cut.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, max_sentences: int):
        self.tokenizer, self.max_tokens, self.max_sentences = tokenizer, max_tokens, max_sentences
        self.special = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
        if missing := [name for name, i in self.special.items() if i is None]:
            raise UserError(f"the tokenizer lacks {missing}: a BERT-type tokenizer is needed")
        self.vocab_size = tokenizer.get_vocab_size()

    def __call__(self, sentences: Sequence[str]) -> dict[str, np.ndarray]:
        """`token_ids`, `token_mask`, `sentence_index`, `word_index`, each `[T]` (see `mg3d_jax.batch`)."""
        ids, sentence_of, word_of, words = [self.special["[CLS]"]], [0], [0], 0
        encodings = self.tokenizer.encode_batch(list(sentences[: self.max_sentences]), add_special_tokens=False)
        for number, encoding in enumerate(encodings, start=1):
            ids += encoding.ids
            sentence_of += [number] * len(encoding.ids)
            word_of += [words + 1 + w for w in encoding.word_ids]
            words = max(words, word_of[-1])
        keep = self.max_tokens - 1
        ids, sentence_of, word_of = [*ids[:keep], self.special["[SEP]"]], [*sentence_of[:keep], 0], [*word_of[:keep], 0]
        return {
            "token_ids": self._padded(ids, np.int32, self.special["[PAD]"]),
            "token_mask": self._padded([True] * len(ids), np.bool_, False),
            "sentence_index": self._padded(sentence_of, np.int32, 0),
            "word_index": self._padded(word_of, np.int32, 0),
        }

    def _padded(self, values: list, dtype: type, fill: int) -> np.ndarray:
        array = np.full(self.max_tokens, fill, dtype)
        array[: len(values)] = values
        return array

    def is_cut(self, sentences: Sequence[str]) -> bool:
        """Does this report lose tokens or sentences to the limits?"""
        lengths = [len(e.ids) for e in self.tokenizer.encode_batch(list(sentences), add_special_tokens=False)]
        return len(lengths) > self.max_sentences or sum(lengths) + 2 > self.max_tokens
