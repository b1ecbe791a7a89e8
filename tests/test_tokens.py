"""Token, sentence and word indices, against transformers' own tokenizer on the same file."""

import numpy as np
import pytest

from mg3d_jax.data.tokens import ReportTokenizer, load_tokenizer, save_tokenizer, train_wordpiece
from mg3d_jax.errors import UserError

SENTENCES = [
    "No pleural effusion is seen.",
    "A 12 mm nodule in the right upper lobe.",
    "Cardiomegaly is present.",
    "The bones are unremarkable.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(SENTENCES * 3, 120)


def test_training_does_not_depend_on_the_order(tokenizer):
    assert train_wordpiece(reversed(SENTENCES * 3), 120).get_vocab() == tokenizer.get_vocab()


def test_fields_match_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    ours = ReportTokenizer(load_tokenizer(str(tmp_path)), 64, 8)(SENTENCES)
    expected = theirs(" ".join(SENTENCES))
    length = int(ours["token_mask"].sum())
    assert ours["token_ids"][:length].tolist() == expected["input_ids"]
    words = [0 if w is None else w + 1 for w in expected.word_ids()]
    assert ours["word_index"][:length].tolist() == words
    assert (ours["token_ids"][length:] == theirs.pad_token_id).all()


def test_every_sentence_is_where_its_tokens_are(tokenizer):
    fields = ReportTokenizer(tokenizer, 64, 8)(SENTENCES)
    for number, sentence in enumerate(SENTENCES, start=1):
        ids = fields["token_ids"][fields["sentence_index"] == number]
        assert tokenizer.decode(ids.tolist()).replace(" ", "") == sentence.lower().replace(" ", "")
    assert fields["sentence_index"][0] == 0 and fields["word_index"][0] == 0


def test_long_reports_are_cut_but_end_with_sep(tokenizer):
    cut = ReportTokenizer(tokenizer, 10, 2)
    fields = cut(SENTENCES)
    assert fields["token_mask"].all() and fields["token_ids"][-1] == cut.special["[SEP]"]
    assert fields["sentence_index"].max() <= 2
    assert cut.is_cut(SENTENCES) and not ReportTokenizer(tokenizer, 64, 8).is_cut(SENTENCES)


def test_an_empty_report_is_cls_sep(tokenizer):
    fields = ReportTokenizer(tokenizer, 10, 2)([])
    assert fields["token_mask"].sum() == 2 and not np.any(fields["sentence_index"])


def test_a_tokenizer_that_is_nowhere_is_an_error(tmp_path):
    with pytest.raises(UserError, match="neither a folder"):
        load_tokenizer(str(tmp_path / "nothing"))
