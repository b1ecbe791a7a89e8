"""How the results of `evaluation.generation` are shown. Without JAX and without the libraries that scored them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mg3d_jax.html import Section, Table, number

METHODS: Mapping[str, str] = {
    "greedy": "written greedily, the most likely token each time",
    "nucleus": "nucleus sampling, one text per volume",
    "beam": "beam search",
}
WORDING = {
    "bleu_1": "BLEU-1",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "meteor_without_synonyms": "METEOR*",
    "cider": "CIDEr",
}
CLINICAL = {"precision_micro": "precision", "recall_micro": "recall", "f1_micro": "F1", "f1_macro": "F1, classes"}
TITLES = {"written": "written", "report": "true report (the labeller)"}
LABELLER_ERRORS, CUT = 0.9, 0.1  # below and above which the reader is warned


def sections(result: Mapping[str, Any]) -> Sequence[Section]:
    """A row per kind of text, and a row per label."""
    texts = result["texts"]
    shown = {name: title for name, title in WORDING.items() if any(name in one for one in texts.values())} | CLINICAL
    rows = [(TITLES.get(name, name), *(number(one.get(key)) for key in shown)) for name, one in texts.items()]
    ends = texts["written"]["f1_macro_95"]
    more = [f"95 % interval of the written F1, mean of classes: {ends[0]:.3f} to {ends[1]:.3f}."]
    if "meteor_without_synonyms" in shown:
        more.append("METEOR*: words and stems only, as WordNet is not here (evaluations.generation.wordnet).")
    more += [f"{name}: left out, it {why}." for name, why in result["left_out"].items()]
    table = Table(
        ("text", *shown.values()), rows, numbers=range(1, len(shown) + 1), more=" ".join(more),
        classes=["total" if name == "written" else "" for name in texts],
    )  # fmt: skip
    headline = [
        (title, number(texts["written"][key]))
        for key, title in (("f1_macro", "F1 of stated findings"), ("bleu_4", "BLEU-4"))
    ]
    summary = Section("Written reports", result["protocol"], table, headline=headline, warnings=_warnings(result))
    return [summary, _classes(result)]


def _warnings(result: Mapping[str, Any]) -> list[str]:
    texts, found = result["texts"], []
    written = texts["written"]["f1_macro"]
    for name in ("most frequent report", "template of probed labels"):
        if name in texts and texts[name]["f1_macro"] >= written:
            found.append(
                f"The written reports state findings no better (F1 {written:.3f}) than the {name} "
                f"({texts[name]['f1_macro']:.3f})."
            )
    if texts["report"]["f1_macro"] < LABELLER_ERRORS:
        found.append(
            f"The labeller reads the true reports with an F1 of {texts['report']['f1_macro']:.3f} only: no text can be judged "
            "better than that."
        )
    if 1 - result["ended"] > CUT:
        found.append(f"{1 - result['ended']:.0%} of the texts were cut by the limit of tokens before they ended.")
    return found


def _classes(result: Mapping[str, Any]) -> Section:
    rows, ends = [], []
    for name, one in sorted(result["by_class"].items(), key=lambda item: -_or_zero(item[1]["f1"])):
        rows.append((name, one["present"], one["stated"], *(number(one[key]) for key in ("precision", "recall", "f1"))))
        ends.append((one["f1"],) * 3)
    table = Table(
        ("finding", "present", "stated", "precision", "recall", "F1", "0 to 1"),
        rows,
        numbers=range(1, 6),
        intervals=ends,
    )
    protocol = (
        f"what the labeller {result['labeller']!r} reads in the written reports, against the labels of the records"
    )
    return Section("Findings in written reports", protocol, table)


def _or_zero(value: float) -> float:
    return value if value == value else 0.0
