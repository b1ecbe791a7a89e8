"""Clinical phantom reports and labels: true to the scan, like CT-RATE's in figures, cut right, understood by the rules."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from mg3d_jax.benchmarks.reports import Corpus, figures, kinds, main, phantom_corpus, read_corpus
from mg3d_jax.data.abnormalities import ABNORMALITIES, prompt_pair
from mg3d_jax.errors import UserError
from mg3d_jax.language.statements import statements
from mg3d_jax.phantom import clinical
from mg3d_jax.phantom import patients as phantoms
from mg3d_jax.phantom.anatomy import lobe_of
from mg3d_jax.phantom.presence import CT_RATE, OLDEST, YOUNGEST, sample_evenly, sample_like_ct_rate
from mg3d_jax.prepare.reports import split_sentences

SCANS = 300

# Counted on 800 reports of CT-RATE (see `presence.CT_RATE`) with `mg3d bench reports`.
REAL = {
    "findings": {"sentences": 18.7, "words": 12.6, "absence": 0.31, "how it is": 0.23, "presence": 0.21},
    "impression": {"sentences": 3.6, "words": 11.8, "absence": 0.03, "how it is": 0.02, "presence": 0.55},
}
REAL_PAIRS = {
    ("Arterial wall calcification", "Coronary artery wall calcification"): 0.69,
    ("Bronchiectasis", "Peribronchial thickening"): 0.35,
    ("Cardiomegaly", "Arterial wall calcification"): 0.31,
    ("Pleural effusion", "Pericardial effusion"): 0.31,
    ("Pleural effusion", "Interlobular septal thickening"): 0.31,
    ("Pleural effusion", "Atelectasis"): 0.30,
    ("Consolidation", "Lung opacity"): 0.30,
    ("Cardiomegaly", "Mosaic attenuation pattern"): 0.28,
    ("Emphysema", "Arterial wall calcification"): 0.26,
    ("Bronchiectasis", "Pleural effusion"): -0.05,
    ("Lung nodule", "Consolidation"): -0.11,
}
# What a reader would look for, and what a denial of it would name.
KEYWORDS = {
    "Medical material": r"medical material|pacemaker|port catheter|sternal wires",
    "Arterial wall calcification": r"\baort(a|ic)\b[^.;]*(plaque|calcif|athero)|(plaque|calcif|athero)[^.;]*\baort(a|ic)\b",
    "Cardiomegaly": r"cardiomegaly|index has increased|increase of the cardiothoracic|heart (is|was) larger"
    r"|heart (is|was) enlarged|cardiothoracic ratio has changed|enlargement of the heart|heart size increased"
    r"|heart are \w+ increased|look enlarged|enlarged heart",
    "Pericardial effusion": r"pericardi",
    "Coronary artery wall calcification": r"coronary|anterior descending",
    "Hiatal hernia": r"\bhiat",
    "Lymphadenopathy": r"lymph ?node|\bLAPs?\b|lymphadeno",
    "Emphysema": r"emphysema",
    "Atelectasis": r"atelecta",
    "Lung nodule": r"\bnodules?\b|nodular lesion",
    "Lung opacity": r"ground.glass|opacit",
    "Pulmonary fibrotic sequela": r"fibro",
    "Pleural effusion": r"pleural? (effusion|space|leaves)|effusion of the pleura|effusion[^.;]* pleura",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronchial|bronchial walls|walls of the bronchi look",
    "Consolidation": r"consolidat",
    "Bronchiectasis": r"bronchiecta",
    "Interlobular septal thickening": r"interlobular",
}
ALSO_DENIED_AS = {"Lung opacity": r"infiltrat", "Consolidation": r"infiltrat"}
DENIAL = re.compile(r"\b(no|not|neither|nor|without|nothing)\b", re.IGNORECASE)
NORMAL_HEART = re.compile(r"\b(heart|cardiac|CTR|cardiothoracic)\b.*\b(normal|natural|unremarkable)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def scans() -> list[phantoms.PhantomScan]:
    return [phantoms.make_patient(11, index, "train").scans[0] for index in range(SCANS)]


@pytest.fixture(scope="module")
def corpus(scans: list[phantoms.PhantomScan]) -> Corpus:
    findings = [split_sentences(scan.report.findings) for scan in scans]
    impressions = [split_sentences(scan.report.impression) for scan in scans]
    few = phantom_corpus(5, "clinical", seed=11)
    assert few.findings == findings[:5] and few.labels.tolist() == [list(map(bool, scan.labels)) for scan in scans[:5]]
    return Corpus(findings, [one for one in impressions if one], None)


# ---- true to the scan
def mentions(sentences: tuple[str, ...], name: str) -> tuple[bool, bool]:
    """(stated, denied)."""
    stated = denied = False
    for sentence in sentences:
        if not DENIAL.search(sentence):
            stated |= bool(re.search(KEYWORDS[name], sentence, re.IGNORECASE))
            denied |= name == "Cardiomegaly" and bool(NORMAL_HEART.search(sentence))
        else:
            denied |= bool(re.search(KEYWORDS[name], sentence, re.IGNORECASE))
            denied |= bool(name in ALSO_DENIED_AS and re.search(ALSO_DENIED_AS[name], sentence, re.IGNORECASE))
    return stated, denied


def test_what_is_present_is_stated_and_what_is_absent_never(scans: list[phantoms.PhantomScan]) -> None:
    for scan in scans:
        findings, impression = split_sentences(scan.report.findings), split_sentences(scan.report.impression)
        for name, label in zip(ABNORMALITIES, scan.labels, strict=True):
            stated, denied = mentions(findings, name)
            assert stated == bool(label), (name, label, scan.report.findings)
            assert not (label and denied), (name, scan.report.findings)
            stated, denied = mentions(impression, name)
            assert not (stated and not label) and not (label and denied), (name, label, scan.report.impression)


def test_the_rules_of_the_language_find_no_contradiction(scans: list[phantoms.PhantomScan]) -> None:
    """A sentence that the rules take for absence names nothing that is there; for presence, nothing that is not."""
    used = Counter()
    for scan in scans:
        labels = dict(zip(ABNORMALITIES, scan.labels, strict=True))
        for sentence in split_sentences(scan.report.findings) + split_sentences(scan.report.impression):
            found = statements().parse(sentence)
            if found is None or found.present is None:
                continue
            for name, pattern in KEYWORDS.items():
                if re.search(pattern, sentence, re.IGNORECASE):
                    assert labels[name] == found.present, (name, labels[name], sentence)
                    used[found.present] += 1
    assert used[True] > 1000 and used[False] > 500


def test_absence_is_stated_of_what_reports_deny_and_left_open_of_the_rest(scans: list[phantoms.PhantomScan]) -> None:
    """Real reports deny effusions, nodes, infiltrates and a large heart, and hardly ever speak of other absent findings."""
    denied = {name: [] for name in ABNORMALITIES}
    for scan in scans:
        sentences = split_sentences(scan.report.findings)
        for name, label in zip(ABNORMALITIES, scan.labels, strict=True):
            if not label:
                denied[name].append(mentions(sentences, name)[1])
    share = {name: float(np.mean(values)) for name, values in denied.items()}
    for name in ("Cardiomegaly", "Pericardial effusion", "Lymphadenopathy", "Pleural effusion"):
        assert share[name] > 0.7, share
    for name in ("Lung opacity", "Consolidation"):
        assert 0.5 < share[name] < 0.85, share
    assert 0.25 < share["Lung nodule"] < 0.6, share
    often = {"Cardiomegaly", "Pericardial effusion", "Lymphadenopathy", "Pleural effusion", "Lung opacity"}
    rest = [value for name, value in share.items() if name not in often | {"Consolidation", "Lung nodule"}]
    assert max(rest) < 0.1 and np.mean(rest) < 0.03, share


def test_sides_and_sizes_are_those_that_are_drawn(scans: list[phantoms.PhantomScan]) -> None:
    """One finding at a time, its incidental neighbours away: every "mm" and every side belongs to it."""
    sides = sizes = 0
    for seed, scan in enumerate(scans):
        for finding in scan.findings.values():
            writer = clinical.Writer(np.random.default_rng(seed))
            (item,) = writer.items({finding.name: finding})
            for text in (*item.sentences, item.summary):
                named = set(re.findall(r"\b(right|left)\b(?! (?:hilar|para|coronary|anterior d|lower para))", text))
                if finding.side in ("right", "left"):
                    assert named <= {finding.side}, text
                    sides += bool(named)
                stated = {int(mm) for mm in re.findall(r"\b(\d+)(?=(?:, \d+)* (?:and \d+ )?mm)", text)}
                stated |= {round(10 * float(cm)) for cm in re.findall(r"([\d.]+) cm", text)}
                assert stated <= set(finding.sizes_mm), text
                sizes += bool(stated)
                if re.search(r"mm (is|was|has been) \w+ in the", text) and finding.name == "Lung nodule":
                    largest = lobe_of(np.array(max(finding.blobs, key=lambda blob: max(blob.radii)).centre))
                    assert set(largest.split()) - {"lobe"} <= set(text.split()) | {"lobe"}, text
    assert sides > 100 and sizes > 200


def test_no_contrast_is_spoken_of_where_there_is_none() -> None:
    for contrast in (True, False):
        texts = [clinical.write_report(np.random.default_rng(seed), {}, contrast=contrast) for seed in range(200)]
        spoken = [bool(re.search(r"contrast|unenhanced", text.findings)) for text in texts]
        assert not any(spoken) if contrast else np.mean(spoken) > 0.15
        assert all(("Non-contrast" in text.technique) <= (not contrast) for text in texts)


# ---- like real ones
def test_length_and_kinds_of_sentences_are_those_of_real_reports(corpus: Corpus) -> None:
    for name, sections in (("findings", corpus.findings), ("impression", corpus.impressions)):
        sentences = [sentence for section in sections for sentence in section]
        real = REAL[name]
        assert np.mean([len(section) for section in sections]) == pytest.approx(real["sentences"], rel=0.15)
        assert np.mean([len(sentence.split()) for sentence in sentences]) == pytest.approx(real["words"], rel=0.15)
        found = kinds(sentences)
        assert sum(found.values()) == pytest.approx(1)
        for kind in ("absence", "how it is", "presence"):
            assert found[kind] == pytest.approx(real[kind], abs=0.05 if kind == "absence" else 0.12), (name, kind)
    lengths = [len(section) for section in corpus.findings]
    assert np.percentile(lengths, 5) < 12 and np.percentile(lengths, 95) > 28


def test_most_sentences_are_on_normal_structures_and_boilerplate_returns(corpus: Corpus) -> None:
    every = [sentence for section in corpus.findings for sentence in section]
    found = kinds(every)
    assert found["absence"] + found["how it is"] > 0.5
    counts = Counter(every)
    assert 0.15 < counts.most_common(1)[0][1] / SCANS < 0.4
    assert len(counts) > 1200  # and there is a long tail
    assert any("(" in sentence and "?)" in sentence for sentence in every)
    prompts = {prompt for name in ABNORMALITIES for prompt in prompt_pair(name)}
    assert sum(counts[prompt] for prompt in prompts) / len(every) < 0.001


@pytest.mark.parametrize("name", ABNORMALITIES)
def test_every_finding_has_many_wordings(name: str, scans: list[phantoms.PhantomScan]) -> None:
    finding = next(scan.findings[name] for scan in scans if name in scan.findings)
    items = [clinical.Writer(np.random.default_rng(seed)).items({name: finding})[0] for seed in range(200)]
    assert len({item.sentences[0] for item in items}) >= 8
    assert len({item.summary for item in items}) >= 10


def test_several_findings_share_a_sentence(scans: list[phantoms.PhantomScan]) -> None:
    def named(sentence: str) -> int:
        return sum(bool(re.search(pattern, sentence, re.IGNORECASE)) for pattern in KEYWORDS.values())

    stated = [
        named(sentence)
        for scan in scans
        for sentence in split_sentences(scan.report.findings)
        if not DENIAL.search(sentence) and named(sentence)
    ]
    assert 0.1 < np.mean([count > 1 for count in stated]) < 0.5


def test_the_wordings_are_complete() -> None:
    language = clinical._language()
    assert set(language["findings"]) == set(ABNORMALITIES)
    departments = len(language["departments"])
    assert sum(language["departments"]) == pytest.approx(1)
    names = {topic["name"] for topic in language["topics"] if "name" in topic}
    for topic in language["topics"]:
        assert len(topic["share"]) == departments <= len(topic["wordings"]) and topic["section"] in language["order"]
        assert set(topic.get("denies", ())) <= set(ABNORMALITIES)
    for pair in language["joined"]:
        assert set(pair["of"]) <= set(ABNORMALITIES)
    for incidental in language["incidental"]:
        assert set(incidental.get("instead_of", ())) <= names and incidental["section"] in language["order"]


# ---- cut and understood
def test_sentences_are_cut_where_they_end(scans: list[phantoms.PhantomScan]) -> None:
    bullets = 0
    for seed, scan in enumerate(scans):
        written = clinical.write(np.random.default_rng(seed), scan.findings, contrast=bool(seed % 2))
        assert split_sentences(written.report.findings) == written.findings
        assert split_sentences(written.report.impression) == written.impression
        bullets += '"' in written.report.impression or "•" in written.report.impression
        texts = written.report.findings + written.report.impression
        assert not re.search(r"[{}]|  | [.,]|\.\.", texts), texts
    assert 0.3 < bullets / SCANS < 0.9


def test_the_rules_have_an_opposite_for_most_sentences(corpus: Corpus) -> None:
    found = [statements().parse(sentence) for section in corpus.findings for sentence in section]
    assert np.mean([bool(one and one.opposite) for one in found]) > 0.65


# ---- the same again
def test_a_seed_gives_the_same_report() -> None:
    for style in phantoms.STYLES:
        one, again = (phantoms.make_patient(3, 1, "valid", style) for _ in range(2))
        assert one.scans[0].report == again.scans[0].report and one.scans[0].labels == again.scans[0].labels
    assert phantoms.make_patient(3, 1, "valid") != phantoms.make_patient(3, 1, "valid", "plain")


@pytest.mark.parametrize(("style", "digest"), [("plain", "cae359971a7ebd15"), ("clinical", "557601f1087f02bb")])
def test_a_generator_keeps_its_number_only_as_long_as_it_writes_the_same(style: str, digest: str) -> None:
    """Where this fails because wordings or labels were changed: raise `generator` of the style, and write the digest anew."""
    scans = [scan for index in range(20) for scan in phantoms.make_patient(0, index, "train", style).scans]
    content = [[scan.labels, vars(scan.report), [one.metadata for one in scan.reconstructions]] for scan in scans]
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    assert (phantoms.STYLES[style].generator, found) == ({"plain": 1, "clinical": 2}[style], digest)


# ---- labels
@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Ages [n] and labels [n, 18] of many scans."""
    rng = np.random.default_rng(0)
    ages = rng.integers(YOUNGEST, OLDEST + 1, 20_000)
    return ages, np.array([list(sample_like_ct_rate(rng, int(age)).values()) for age in ages])


def test_labels_are_as_frequent_as_in_ct_rate(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    ages, labels = drawn
    assert set(CT_RATE) == set(ABNORMALITIES)
    np.testing.assert_allclose(labels.mean(0), [CT_RATE[name][0] for name in ABNORMALITIES], atol=0.015)
    assert labels.sum(1).mean() == pytest.approx(3.5, abs=0.15)  # CT-RATE: 3.53
    assert 0.05 < (labels.sum(1) == 0).mean() < 0.13  # 0.12
    for name in ("Arterial wall calcification", "Coronary artery wall calcification"):
        assert np.corrcoef(ages, labels[:, ABNORMALITIES.index(name)])[0, 1] > 0.4


def test_correlations_are_those_of_the_copula(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    """Against the bivariate normal integral, for every pair."""
    labels = drawn[1]
    counted = np.corrcoef(labels.T)
    share = np.array([CT_RATE[name][0] for name in ABNORMALITIES])
    loadings = np.array([CT_RATE[name][1] for name in ABNORMALITIES])
    limits = norm.ppf(share)
    for i in range(len(ABNORMALITIES)):
        for j in range(i):
            latent = float(loadings[i] @ loadings[j])
            both = multivariate_normal.cdf([limits[i], limits[j]], cov=[[1, latent], [latent, 1]])
            spread = np.sqrt(share[i] * (1 - share[i]) * share[j] * (1 - share[j]))
            assert counted[i, j] == pytest.approx((both - share[i] * share[j]) / spread, abs=0.04)


def test_correlations_are_near_those_counted_in_ct_rate(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    counted = np.corrcoef(drawn[1].T)
    for (first, second), real in REAL_PAIRS.items():
        found = counted[ABNORMALITIES.index(first), ABNORMALITIES.index(second)]
        assert found == pytest.approx(real, abs=0.12), (first, second, found)


def test_all_labels_and_correlations_beside_real_ones(
    drawn: tuple[np.ndarray, np.ndarray], corpus: Corpus, shared_data: Path
) -> None:
    files = [shared_data.parent / "real_text" / f"reports_{split}.csv.gz" for split in ("train", "valid")]
    if not all(file.is_file() for file in files):
        pytest.skip("the folder with real report texts is not here")
    found = [read_corpus(file) for file in files]
    labels = np.concatenate([one.labels for one in found if one.labels is not None])
    np.testing.assert_allclose(drawn[1].mean(0), labels.mean(0), atol=0.02)
    pairs = np.triu_indices(len(ABNORMALITIES), 1)
    off = (np.corrcoef(drawn[1].T) - np.corrcoef(labels.T))[pairs]
    assert np.sqrt(np.mean(np.square(off))) < 0.055 and np.abs(off).max() < 0.22
    # And no sentence of more than a name's length is one of theirs.
    real = {text.rstrip(".").lower() for one in found for section in one.findings + one.impressions for text in section}
    ours = {text for section in corpus.findings + corpus.impressions for text in section if len(text.split()) > 7}
    assert sum(text.rstrip(".").lower() in real for text in ours) / len(ours) < 0.002


def test_chronic_findings_stay_and_others_do_not() -> None:
    for draw in (sample_like_ct_rate, sample_evenly):
        rng = np.random.default_rng(1)
        first = [draw(rng, 60) for _ in range(300)]
        second = [draw(rng, 60, one) for one in first]
        assert all(a["Emphysema"] == b["Emphysema"] for a, b in zip(first, second, strict=True))
        assert any(a["Consolidation"] != b["Consolidation"] for a, b in zip(first, second, strict=True))


# ---- the table
def test_the_table_of_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.csv"
    labels = ",".join("1" if name == "Emphysema" else "0" for name in ABNORMALITIES)
    file.write_text(
        f"report_text,{','.join(ABNORMALITIES)}\n"
        f'"No mass was seen. Lungs are normal. "" Emphysema was seen. "" Cyst?",{labels}\n'
    )
    found = read_corpus(file)
    assert found.findings == [("No mass was seen.", "Lungs are normal.")]
    assert found.impressions == [("Emphysema was seen.", "Cyst?")]
    rows = figures(found)
    assert rows["findings: absence"] == rows["findings: how it is"] == "0.50" and rows["impression: neither"] == "0.50"
    assert (
        rows["findings: words per sentence"] == "3.5 (3, 4, 4)"
        and rows["labels: positive per report"] == "1.0 (1, 1, 1)"
    )
    assert main([str(file), "--patients", "4"]) == 0
    text = capsys.readouterr().out
    assert "| | phantoms, plain | phantoms, clinical | own.csv |" in text and "| Emphysema |" in text
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    for wrong in (["x.csv"], [str(tmp_path / "none.csv")], ["--patients", "0"]):
        with pytest.raises(UserError):
            main(wrong)
