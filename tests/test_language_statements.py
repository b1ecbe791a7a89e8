"""Statements of presence and absence in sentences of reports, and their opposites."""

from __future__ import annotations

from pathlib import Path

import pytest

from mg3d_jax.errors import UserError
from mg3d_jax.language.statements import Statements, statements

# Sentences as reports have them -> (what they say, a wording of the same, a wording of the opposite).
UNDERSTOOD = [
    (
        "Pericardial effusion-thickening was not observed.", False,
        "There is no pericardial effusion-thickening.", "Pericardial effusion-thickening is present.",
    ),
    ("No pleural effusion was detected.", False, "Pleural effusion is not present.", "There is pleural effusion."),
    (
        "No lytic-destructive lesions were detected in bone structures.", False,
        "Lytic-destructive lesions in bone structures was not observed.",
        "Lytic-destructive lesions in bone structures is observed.",
    ),
    ("There is no focal lesion in the spleen.", False, "No focal lesion in the spleen.", "Focal lesion in the spleen."),
    (
        "Bilateral adrenal glands were normal and no space-occupying lesion was detected.", False,
        "No space-occupying lesion.", "Space-occupying lesion was detected.",
    ),
    (
        "When examined in the lung parenchyma window; no mass nodule-infiltration was detected in both lung parenchyma.",
        False, "There is no mass nodule-infiltration in both lung parenchyma.",
        "Mass nodule-infiltration in both lung parenchyma is present.",
    ),
    ("Hiatal hernia", True, "Hiatal hernia is present.", "No hiatal hernia was detected."),
    ("There are emphysematous changes in both lungs.", True, "Emphysematous changes in both lungs is observed.",
     "There is no emphysematous changes in both lungs."),
    ("A drainage catheter is observed in the stomach.", True, "There is a drainage catheter in the stomach.",
     "Drainage catheter in the stomach is not present."),
    ("A mosaic attenuation pattern was observed in both lungs (small airway disease).", True,
     "A mosaic attenuation pattern in both lungs is present.", "No mosaic attenuation pattern in both lungs."),
    ("MNG.", True, "MNG was observed.", "There is no MNG."),
    ("Heart contour and size are normal.", None, "Heart contour and size are normal.",
     "Heart contour and size are abnormal."),
    ("Trachea, both main bronchi are open.", None, "Trachea, both main bronchi are open.",
     "Trachea, both main bronchi are not open."),
    ("Heart size increased.", None, "Heart size increased.", "Heart size is normal."),
    ("Vertebral corpus heights are preserved.", None, "Vertebral corpus heights are preserved.",
     "Vertebral corpus heights are reduced."),
]  # fmt: skip
LEFT_ALONE = [
    "Clinical and laboratory correlation is recommended.",
    "Compared to the previous examination, the effusion regressed.",
    "The mediastinum could not be evaluated optimally in the non-contrast examination.",
    "Hypodensity (cortical cyst?) in the right kidney, not excluded?",
    "The ascending aorta is wider than normal at 42 mm.",
    "The outlook is nonspecific.",
    "There is a nodule in the right lung that was not detected in the previous examination.",
    "Thorax CT examination within normal limits except for hiatal hernia.",
    "Neither effusion nor thickening was noted.",
    "Neither lung shows a mass, nor is the pleura thickened.",
    "",
    " . ",
]


@pytest.mark.parametrize(("sentence", "present", "said", "opposite"), UNDERSTOOD, ids=lambda value: str(value)[:30])
def test_a_sentence_is_said_again_and_turned_round(
    sentence: str, present: bool | None, said: str, opposite: str
) -> None:
    found = statements().parse(sentence)
    assert found is not None and found.present is present
    assert said in found.said and opposite in found.opposite
    assert not set(found.said) & set(found.opposite)


@pytest.mark.parametrize("sentence", LEFT_ALONE)
def test_what_is_no_plain_statement_is_left_alone(sentence: str) -> None:
    assert statements().parse(sentence) is None


@pytest.mark.parametrize("sentence", [row[0] for row in UNDERSTOOD if row[1] is not None])
def test_what_is_said_again_means_the_same_to_the_rules(sentence: str) -> None:
    """Every wording is itself understood as what it stands for, but where it is a bare name ("X.")."""
    found = statements().parse(sentence)
    assert found is not None
    for wording, present in (
        (w, side) for side, ws in ((found.present, found.said), (not found.present, found.opposite)) for w in ws
    ):
        again = statements().parse(wording)
        assert again is not None and again.present is present, wording


def test_real_reports_are_understood(shared_data: Path) -> None:
    """In CT-RATE's reports at least half of the sentences are statements, presence and absence among them."""
    import csv
    import gzip

    from mg3d_jax.prepare.reports import split_sentences

    path = shared_data.parent / "real_text" / "reports_valid.csv.gz"
    if not path.is_file():
        pytest.skip("the folder with real report texts is not here")
    with gzip.open(path, "rt") as file:
        sentences = [one for row in csv.DictReader(file) for one in split_sentences(row["report_text"])]
    found = [statements().parse(one) for one in sentences]
    kinds = [one.present for one in found if one]
    assert len(kinds) > len(sentences) / 2
    assert kinds.count(True) > len(sentences) / 6 and kinds.count(False) > len(sentences) / 6


def test_rules_of_ones_own_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    own = tmp_path / "de.toml"
    own.write_text(
        """
        be = "ist|sind"
        seen = "nachweisbar|erkennbar"
        lead_ins = []
        skip = ["\\\\?"]
        absent = ['kein(?:e|en)? (?P<subject>.+?)(?P<rest>)', '(?P<subject>.+?) (?:{be}) nicht (?:{seen})(?P<rest>.*)']
        present = ['(?P<subject>.+?) (?:{be}) (?:{seen})(?P<rest>.*)']
        not_a_subject = '\\b(nicht|kein)\\b'
        articles = 'ein|eine'
        states = []
        [wordings]
        present = ["{} ist nachweisbar."]
        absent = ["Kein Nachweis: {}."]
        """
    )
    found = Statements(str(own)).parse("Pleuraerguss ist nicht nachweisbar.")
    assert found is not None and found.present is False and found.opposite == ("Pleuraerguss ist nachweisbar.",)
    with pytest.raises(UserError, match=r"'xx'.*en"):
        Statements("xx")
    own.write_text('be = "is"')
    with pytest.raises(UserError, match=r"de\.toml: lacks seen, lead_ins"):
        Statements(str(own))
    own.write_text("be = ")
    with pytest.raises(UserError, match="no TOML"):
        Statements(str(own))
