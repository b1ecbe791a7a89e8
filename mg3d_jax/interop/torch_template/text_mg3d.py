"""Texts -> tokens with the sentence of each, as the model read them in training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mg3d_jax.prepare.reports import split_sentences

logger = logging.getLogger(__name__)
Text = str | Sequence[str]  # as one writes it, or sentence by sentence


def sentences_of(text: Text) -> list[str]:
    """The sentences of a text; a string is split by the rules that split the reports of the training data."""
    if isinstance(text, str):
        return list(split_sentences(text)) or [text]
    return list(text)


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """The first 16 hex digits of the SHA-256 of token -> id."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: Text, max_tokens: int, max_sentences: int = 32
) -> dict[str, Tensor]:
    """ONE text -> `input_ids, attention_mask, sentence_index`, each [1, max_tokens].

    [CLS], the tokens of all sentences one after the other, [SEP], padding; what does not fit is cut, and said.
    `sentence_index` is 1 for the tokens of the first sentence and so on, 0 for special tokens and padding.
    """
    sentences = sentences_of(text)
    ids, index = [tokenizer.cls_token_id], [0]
    for number, sentence in enumerate(sentences[:max_sentences], start=1):
        # The space is how byte-level tokenizers know the beginning of a word.
        of_sentence = tokenizer(f" {sentence.strip()}", add_special_tokens=False)["input_ids"]
        ids, index = ids + of_sentence, index + [number] * len(of_sentence)
    if len(ids) >= max_tokens or len(sentences) > max_sentences:
        logger.warning(
            "a text of %d sentences and %d tokens is cut to %d sentences and %d tokens: %.60s...",
            len(sentences), len(ids) + 1, max_sentences, max_tokens, " ".join(sentences),
        )  # fmt: skip
    ids, index = [*ids[: max_tokens - 1], tokenizer.sep_token_id], [*index[: max_tokens - 1], 0]
    padding = max_tokens - len(ids)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * padding]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * padding]),
        "sentence_index": torch.tensor([index + [0] * padding]),
    }


def one_sentence(input_ids: Tensor, attention_mask: Tensor, special: Sequence[int]) -> Tensor:
    """`sentence_index` [B, T] of texts that are one sentence each: 1, and 0 for tokens of the ids `special` and padding."""
    if not special:
        raise ValueError(
            "config.json has no special_token_ids, which say what belongs to no sentence: give sentence_index, or export the "
            "model again"
        )
    ends = torch.tensor(list(special), device=input_ids.device)
    return (attention_mask.bool() & ~torch.isin(input_ids, ends)).long()
