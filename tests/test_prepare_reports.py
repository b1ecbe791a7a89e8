"""Reports: hard sentences, sections, ids."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from mg3d_jax.prepare.reports import clean, report_id, report_sentences, split_sentences
from mg3d_jax.prepare.sections import split_sections

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "reports"

CASES = {
    "decimals": ["The nodule is about 0.8 cm x 1.5 cm.", "Stable since 2.5 years."],
    "sizes": ["A lesion of 1.5 x 2 cm.", "A lesion of 9.8x6.5 mm."],
    "image references": ["Ground glass nodule (img117), about 0.8 x 1.0cm.", "A solid nodule (SE6, IM225) is seen."],
    "abbreviation before a number": ["No. 3 rib is fractured.", "See Fig. 2 and img. 14 for this."],
    "abbreviations": ["Nodule, approx. 4 mm, vs. scar.", "Cysts, e.g. in the liver, are seen."],
    "no as a word": ["Is there effusion? No.", "The heart is normal."],
    "dates": ["Compared with 12.03.2020 it is stable.", "CT dated 5.1.2021 is similar."],
    "ordinals of machine translation": [
        "Fracture of the 3. rib.",
        "The 5. and 6. ribs are normal.",
        "At L3. vertebra.",
    ],
    "question in parentheses": ["A focal area (infective? atelectasis?) is seen.", "Nodule (metastasis?)."],
    "stops in parentheses": ["Band (see image 3. It is old.) on the left.", "No effusion."],
    "ellipsis": ["Extending to the whole lung ..... posteriorly.", "No pneumothorax."],
    "titles": ["Assist. Prof.Dr. Rukiye KILIC, Radiology Specialist.", "Normal."],
    "stars that multiply": ["A shadow of about 10 * 25mm.", "It is 22 * 22cm in size."],
    "carcinoma": ["Followed up due to breast Ca.", "Significant effusion is observed."],
    "initials": ["Suspicion of S. aureus pneumonia.", "Normal."],
    "intravenous": ["It was evaluated without IV. contrast.", "Normal."],
    "window clause": ["When examined in the lung window; Aeration is normal.", "No nodule."],
    "lower case start": ["The heart is enlarged.", "no pleural effusion."],
    "several marks": ["Is it a cyst?", "There are degenerative changes!", "Follow up."],
}


@pytest.mark.parametrize("name", CASES)
def test_hard_sentences_survive(name):
    expected = CASES[name]
    if name == "no as a word":
        expected = ["Is there effusion?", "No.", "The heart is normal."]
    assert list(split_sentences(" ".join(expected))) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1. Emphysema. 2. Nodule of 3 mm. 3) Effusion", ["Emphysema.", "Nodule of 3 mm.", "Effusion"]),
        ("1- Emphysema\n2- Nodule of\n3 mm", ["Emphysema", "Nodule of", "3 mm"]),
        ("• Stable nodules. • Hepatosteatosis.", ["Stable nodules.", "Hepatosteatosis."]),
        (
            'No lesion. " Hiatal hernia " Emphysema in both lungs."',
            ["No lesion.", "Hiatal hernia", "Emphysema in both lungs."],
        ),
        ('A "crazy paving" pattern is seen.', ["A crazy paving pattern is seen."]),
        ("Heart is normal.Lungs are clear.", ["Heart is normal.", "Lungs are clear."]),
        ("A wrapped\nline goes on.\n\nNext item", ["A wrapped line goes on.", "Next item"]),
        ('. .. " Normal.', ["Normal."]),
        ("心 normal。Lungs clear", ["心 normal.", "Lungs clear"]),
        ("", []),
        (" \n\t ", []),
        ("...", []),
    ],
)
def test_layout_is_read_and_removed(text, expected):
    assert list(split_sentences(text)) == expected


@pytest.mark.parametrize(
    "text", ["Not given.", "not given", " NOT GIVEN. ", "None", "nan", "N/A", "-", "...", '""', None, float("nan")]
)
def test_sections_that_say_nothing_are_empty(text):
    assert clean(text) == ""


def test_none_of_these_is_empty():
    for text in ("No nodule.", "Normal", "None of the nodules grew."):
        assert clean(text) == text


def test_sections_by_heading():
    text = "FINDINGS: Heart is large. Lungs clear.\nIMPRESSION: Cardiomegaly."
    assert split_sections(text) == ("Heart is large. Lungs clear.", "Cardiomegaly.")
    assert split_sections("Heart is large. Conclusion: Cardiomegaly") == ("Heart is large.", "Cardiomegaly")
    assert split_sections("Heart is large.") == ("Heart is large.", "")
    assert split_sections("Impression: not given") == ("", "")


def test_report_id_ignores_layout_and_nothing_else():
    first = report_id("Nodule of 3.5 mm.  Stable.", "Not given.")
    assert first == report_id('nodule of 3.5 mm. "Stable."', "")
    assert first != report_id("Nodule of 35 mm. Stable.", "")
    assert first != report_id("Nodule of 3.5 mm. Stable.", "Nodule")


def real_reports():
    with open(SHARED / "ctrate_train_reports_120.csv", newline="") as file:
        for row in csv.DictReader(file):
            yield row["VolumeName"], row["Findings_EN"], row["Impressions_EN"]
    for rows in json.loads((SHARED / "ctrg_chest_sample.json").read_text()).values():
        for row in rows:
            yield row["id"], row["report"], row["result"]


def test_real_reports_keep_every_word_and_no_sentence_is_absurd():
    if not SHARED.exists():
        pytest.skip("the shared reports are not here")
    count, lengths = 0, []
    for name, findings, impression in real_reports():
        sentences = report_sentences(findings, impression)
        assert sentences, name
        before = re.findall(r"[A-Za-z]{2,}", clean(findings) + " " + clean(impression))
        assert re.findall(r"[A-Za-z]{2,}", " ".join(sentences)) == before, name
        for sentence in sentences:
            lengths.append(len(sentence))
            assert not re.search(r"[a-z]{3,}\. [A-Z][a-z]{2,} [a-z]+ [a-z]+", sentence), (name, sentence)
            assert not re.match(r"(mm|cm|x)\b", sentence), (name, sentence)
        count += 1
    assert count >= 240
    assert max(lengths) < 900
