"""Token, sentence and word indices, against transformers' own tokenizer on the same file."""

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordPiece
from transformers import AutoTokenizer

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


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder as RadBERT-RoBERTa's: byte-level BPE in `vocab.json` and `merges.txt`, and no `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [f" {sentence}" for sentence in SENTENCES * 3]
    tokenizer.train_from_iterator(texts, 330, 2, show_progress=False, special_tokens=special)
    tokenizer.save_model(str(folder))
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return folder


def test_robertas_tokenizer_by_roles_and_words(roberta, tmp_path):
    """Special tokens by their role; the sentences of a report as RoBERTa reads them, one text with spaces between them."""
    theirs = AutoTokenizer.from_pretrained(str(roberta))
    save_tokenizer(load_tokenizer(str(roberta)), tmp_path)
    for folder in (str(roberta), str(tmp_path)):
        tokenizer = ReportTokenizer(load_tokenizer(folder), 64, 8)
        assert tokenizer.special == {"[PAD]": 1, "[UNK]": 3, "[CLS]": 0, "[SEP]": 2, "[MASK]": 4}
        ours = tokenizer(SENTENCES)
        length = int(ours["token_mask"].sum())
        assert ours["token_ids"][:length].tolist() == theirs(" " + " ".join(SENTENCES))["input_ids"]
        assert (ours["token_ids"][length:] == 1).all()
    assert AutoTokenizer.from_pretrained(str(tmp_path)).mask_token_id == 4

    # Words begin where the text has a space or changes to punctuation, and nowhere else.
    pieces = theirs.convert_ids_to_tokens(ours["token_ids"][1 : length - 1].tolist())
    starts = np.flatnonzero(np.diff(ours["word_index"][: length - 1])).tolist()
    assert len(pieces) > len(starts)
    assert starts == [i for i, piece in enumerate(pieces) if piece.startswith("\u0120") or piece == "."]


def test_a_sentence_by_itself_has_its_tokens_of_the_report(roberta):
    tokenizer = ReportTokenizer(load_tokenizer(str(roberta)), 64, 8)
    report, alone = tokenizer(SENTENCES), tokenizer(SENTENCES[1:2])
    inside, own = (fields["token_ids"][fields["sentence_index"] == n] for fields, n in ((report, 2), (alone, 1)))
    np.testing.assert_array_equal(inside, own)


def test_a_class_of_its_own_over_a_vocab_txt(tmp_path):
    """CXR-BERT's tokenizer_config.json names a Python class; its vocabulary is BERT's."""
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "nodule", "##s", "."])
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CXRBertTokenizer", "do_lower_case": true}')
    fields = ReportTokenizer(load_tokenizer(str(tmp_path)), 8, 2)(["No nodules."])
    assert fields["token_ids"].tolist() == [2, 5, 6, 7, 8, 3, 0, 0]
    assert fields["word_index"].tolist() == [0, 1, 2, 2, 3, 0, 0, 0]


def test_another_kind_of_tokenizer_is_an_error():
    tokenizer = Tokenizer(WordPiece({"[UNK]": 0, "lung": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<start>", "[UNK]"])
    with pytest.raises(UserError, match=r"lacks .*PAD.*CLS.*SEP.*MASK"):
        ReportTokenizer(tokenizer, 8, 2)


def test_padding_and_truncation_of_a_published_file_are_dropped(tokenizer, tmp_path):
    """As in the files of sentence encoders: every text padded to one length, and cut without a word."""
    sentence = "nodule in the right upper lobe and an effusion at the base of the left lung"
    plain = ReportTokenizer(tokenizer, 64, 4)
    saved = Tokenizer.from_str(tokenizer.to_str())
    saved.enable_padding(length=32, pad_token="[PAD]", pad_id=saved.token_to_id("[PAD]"))
    saved.enable_truncation(max_length=6)
    saved.save(str(tmp_path / "tokenizer.json"))
    loaded = ReportTokenizer(load_tokenizer(str(tmp_path)), 64, 4)
    for name, expected in plain([sentence, "heart"]).items():
        np.testing.assert_array_equal(loaded([sentence, "heart"])[name], expected, err_msg=name)
    assert loaded.lengths([sentence]) == plain.lengths([sentence]) > [6]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(str(tmp_path))
