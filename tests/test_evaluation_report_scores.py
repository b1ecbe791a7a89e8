"""Scores of written reports: wording as the field's libraries have it, findings as scikit-learn counts them."""

import numpy as np
import pandas as pd
import pytest
from nltk.translate.meteor_score import meteor_score
from pycocoevalcap.cider.cider import Cider
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sklearn.metrics import precision_recall_fscore_support

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import clinical_efficacy, report_baselines, report_metrics
from mg3d_jax.evaluation.report_writer import readable
from mg3d_jax.language.labels import RuleLabeller
from mg3d_jax.prepare.reports import split_sentences

WORDS = ["the", "heart", "is", "large", "no", "effusion", "nodule", "of", "3.5", "mm", "in", "lung", "seen"]


@pytest.fixture(scope="module")
def texts():
    """12 random texts and 12 others, one pair equal and one text empty."""
    rng = np.random.default_rng(0)
    written, reports = ([" ".join(rng.choice(WORDS, rng.integers(4, 20))) for _ in range(12)] for _ in range(2))
    written[3], written[5] = reports[3], ""
    return [text.capitalize() for text in written], reports


@pytest.fixture(scope="module")
def arrays(texts):
    return report_metrics.score(*texts)


def lowered(texts):
    return [text.lower() for text in texts]


def test_wording_scores_are_those_of_the_libraries(texts, arrays):
    written, reports = map(lowered, texts)
    found = report_metrics.once(arrays)
    for order in range(1, 5):
        expected = BLEU(max_ngram_order=order, tokenize="13a").corpus_score(written, [reports]).score
        assert found[f"bleu_{order}"] == pytest.approx(expected / 100)
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(true, one)["rougeL"].fmeasure for one, true in zip(written, reports, strict=True)]
    assert found["rouge_l"] == pytest.approx(np.mean(rouge))
    expected, _ = Cider().compute_score(*({i: [one] for i, one in enumerate(side)} for side in (reports, written)))
    assert found["cider"] == pytest.approx(expected) and found["cider"] > 0.1


def test_a_draw_that_takes_a_report_twice_scores_it_twice(texts, arrays):
    weights = np.array([[1] * 12, [0, 2, 1, 3] + [0] * 8], np.uint8)
    rows = [1, 1, 2, 3, 3, 3]
    written, reports = ([lowered(side)[row] for row in rows] for side in texts)
    found = report_metrics.corpus_scores(arrays, weights)
    assert found["bleu_4"][1] == pytest.approx(BLEU(tokenize="13a").corpus_score(written, [reports]).score / 100)
    assert found["rouge_l"][1] == pytest.approx(arrays["rouge_l"][rows].mean())


def test_meteor_has_synonyms_where_wordnet_is(tmp_path):
    """A WordNet of one synset, in the files of the real one. Without it the score has another name."""
    offset = "00000000"
    (tmp_path / "data.adj").write_text(f"{offset} 00 a 02 big 0 vast 0 000 | of great size  \n")
    (tmp_path / "index.adj").write_text("".join(f"{word} a 1 0 1 1 {offset}  \n" for word in ("big", "vast")))
    for kind in ("noun", "verb", "adv"):
        (tmp_path / f"data.{kind}").write_text("")
        (tmp_path / f"index.{kind}").write_text("")
    for kind in ("noun", "verb", "adv", "adj"):
        (tmp_path / f"{kind}.exc").write_text("")
    pair = ["The heart is big"], ["the heart is vast"]
    with_synonyms = report_metrics.score(*pair, wordnet=str(tmp_path))
    reader = report_metrics.synonyms(str(tmp_path))
    expected = meteor_score([pair[1][0].split()], pair[0][0].lower().split(), wordnet=reader)
    assert with_synonyms["meteor"][0] == pytest.approx(expected)
    if report_metrics.synonyms("") is None:
        without = report_metrics.score(*pair)
        assert "meteor" not in without and without["meteor_without_synonyms"][0] < expected
    with pytest.raises(UserError, match=r"no files of WordNet, e.g. data\.noun"):
        report_metrics.synonyms(str(tmp_path / "nowhere"))


def test_findings_are_counted_as_scikit_learn_does():
    rng = np.random.default_rng(1)
    labels, stated = rng.integers(0, 2, (30, 4)), rng.integers(0, 2, (30, 4)).astype(bool)
    stated[:, 2] = False  # a class that is never stated
    once = np.ones((1, 30), np.uint8)
    found = clinical_efficacy.scores(clinical_efficacy.outcomes(stated, labels), once)
    precision, recall, f1, _ = precision_recall_fscore_support(labels, stated, zero_division=np.nan)
    np.testing.assert_allclose(found["f1"][0], f1)
    np.testing.assert_allclose(found["recall"][0], recall)
    np.testing.assert_allclose(found["precision"][0], precision)
    assert found["f1_macro"][0] == pytest.approx(np.mean(f1))
    micro = precision_recall_fscore_support(labels, stated, average="micro")[:3]
    assert [found[f"{name}_micro"][0] for name in ("precision", "recall", "f1")] == pytest.approx(micro)


def test_what_is_not_known_counts_neither_way():
    stated = np.array([[True, False], [True, True], [False, True]])
    labels = np.array([[1, -1], [-1, 0], [1, -1]])
    found = clinical_efficacy.scores(clinical_efficacy.outcomes(stated, labels), np.ones((1, 3), np.uint8))
    assert (found["precision_micro"][0], found["recall_micro"][0]) == (0.5, 0.5)
    assert found["f1"][0].tolist() == [pytest.approx(2 / 3), 0.0]
    nothing = clinical_efficacy.outcomes(stated & False, np.zeros((3, 2), int))
    assert np.isnan(clinical_efficacy.scores(nothing, np.ones((1, 3), np.uint8))["f1_macro"][0])


@pytest.mark.parametrize(
    ("sentence", "present", "absent"),
    [
        ("No pleural effusion or pneumothorax was detected.", set(), {"Pleural effusion"}),
        ("Bilateral pleural effusion is observed, pericardial effusion was not observed.", {"Pleural effusion"},
         {"Pericardial effusion"}),
        ("Ground-glass opacities are seen in both lungs; no consolidation.", {"Lung opacity"}, {"Consolidation"}),
        ("There are calcified plaques in the coronary arteries.", {"Coronary artery wall calcification"}, set()),
        ("Lymph nodes that did not reach pathological dimensions were observed.", {"Lymphadenopathy"}, set()),
        ("No lymph node in pathological size was observed.", set(), {"Lymphadenopathy"}),
        ("A nodule of 4 mm is seen (sequela?).", {"Lung nodule"}, set()),
        ("The heart is not enlarged.", set(), {"Cardiomegaly"}),
        ("Heart size is normal.", set(), set()),
    ],
)  # fmt: skip
def test_the_rules_read_statements(sentence, present, absent):
    found = RuleLabeller(ABNORMALITIES)([sentence])
    assert {name for name, value in found.items() if value} == present
    assert {name for name, value in found.items() if value is False} == absent


def test_a_finding_that_is_stated_anywhere_is_there_and_other_labels_are_their_own_words():
    labeller = RuleLabeller(["Lung nodule", "Rib fracture"])
    report = ["No nodule in the left lung.", "A nodule in the right lung.", "Rib fractures are seen."]
    assert labeller(report) == {"Lung nodule": True, "Rib fracture": True}
    assert labeller(["No rib fracture."])["Rib fracture"] is False
    with pytest.raises(UserError, match="no words of labels"):
        RuleLabeller(["Lung nodule"], "nowhere.toml")


def test_a_template_says_the_labels_that_it_was_made_from():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, (20, 18)).astype(bool)
    reports = [report_baselines.template(row, ABNORMALITIES) for row in labels]
    np.testing.assert_array_equal(clinical_efficacy.rules(ABNORMALITIES)(reports) == 1, labels)


def test_the_rules_agree_with_the_labels_of_real_reports(shared_data):
    """160 reports of CT-RATE, which the rules were not made after, against the labels that it publishes."""
    table = pd.read_csv(shared_data.parent / "real_text" / "reports_valid.csv.gz")
    reports = [split_sentences(text) for text in table["report_text"]]
    labels = table[list(ABNORMALITIES)].to_numpy()
    stated = clinical_efficacy.rules(ABNORMALITIES)(reports) == 1
    found = clinical_efficacy.scores(clinical_efficacy.outcomes(stated, labels), np.ones((1, len(labels)), np.uint8))
    assert found["f1_macro"][0] > 0.9 and found["f1_micro"][0] > 0.9


class Reports:
    def __init__(self, reports):
        self.reports = reports

    def __len__(self):
        return len(self.reports)

    def text(self, row):
        return type("Record", (), {"sentences": self.reports[row]})


def test_the_most_frequent_report_is_the_most_usual_one():
    a, b, c = ("One.", "Two."), ("Three.",), ("One.", "Four.")
    assert report_baselines.most_frequent(Reports([a, b, b, c])) == b
    assert report_baselines.most_frequent(Reports([a, b, c])) == a  # of equals: its sentences return more often


def test_probes_find_what_the_features_show():
    """Two findings are in the features, a third is not there at all in training."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, (120, 3)).astype(np.int8)
    labels[:, 2] = 0
    features = (labels[:, :2] * 3.0 + rng.normal(0, 0.3, (120, 2))).astype(np.float32)
    patients = np.array([f"p{row // 2}" for row in range(80)])
    found = report_baselines.probed(features[:80], labels[:80], patients, features[80:])
    assert (found[:, :2] == labels[80:, :2]).mean() > 0.95 and not found[:, 2].any()


def test_decoded_texts_are_written_as_one_does():
    assert readable("a nodule of 0. 9 x 1, 5 cm in the ground - glass ( right / left ) . 3 cysts ; 5 %") == (
        "a nodule of 0.9 x 1,5 cm in the ground-glass (right/left) . 3 cysts; 5%"
    )
