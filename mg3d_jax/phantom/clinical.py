"""Reports of phantom scans in the language of real ones: mostly normal structures and absence, in translated wordings.

The wordings, and how often they come up, are in `clinical.toml`; here is how a report is put together of them. Every
finding of the scan is stated; an absent abnormality is denied or, most of them as a rule, not spoken of.
"""

from __future__ import annotations

import functools
import re
import tomllib
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.phantom.finding import Finding
from mg3d_jax.phantom.wording import CLINICAL, TECHNIQUE, Report, fill, upper_first, words_of

_MORE_SHARE = 0.35  # of findings that have further sentences, how many get one
_LOBE = re.compile(r"\b(?P<side>right|left) (?P<lobe>upper|middle|lower) lobe\b")
_BOTH_LOBES = re.compile(r"\bboth (?P<lobe>upper|lower) lobes\b")
_ASKS_FOR_ADVICE = ("Lung nodule", "Lung opacity", "Consolidation", "Lymphadenopathy")


@dataclass(frozen=True)
class _Item:
    """What the report states: its sentences, where they go, and how the impression names it."""

    section: str
    sentences: tuple[str, ...]
    summary: str


@functools.cache
def _language() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "clinical.toml").read_text(encoding="utf-8"))


def _one(rng: np.random.Generator, wordings: Sequence[str]) -> str:
    return wordings[int(rng.integers(len(wordings)))]


class _Writer:
    """One report's random numbers and its style."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.language = _language()
        self.style = bisect(list(accumulate(self.language["styles"][:-1])), rng.random())

    def happens(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def in_style(self, wordings: Sequence[str]) -> str:
        """The style's own wording, mostly; else any."""
        own = self.happens(self.language["habit"]) and self.style < len(wordings)
        return wordings[self.style] if own else _one(self.rng, wordings)

    def words(self, finding: Finding) -> dict[str, str]:
        """What placeholders stand for, with lobes named as the style does."""
        pattern = self.language["lobe"][self.style]
        words = words_of(finding, self.rng)
        lobe = functools.partial(_LOBE.sub, lambda found: pattern.format(**found.groupdict()))
        for key in ("where", "largest_where"):
            words[key] = lobe(_BOTH_LOBES.sub(r"\g<lobe> lobes of both lungs", words[key]))
        plural = finding.kind == "sternal wires" or (finding.name == "Lung nodule" and len(finding.blobs) > 1)
        return words | {
            "is": "are" if plural else "is",
            "degreely": {"moderate": "moderately", "severe": "markedly"}[finding.severity],
            "cm": f"{finding.sizes_mm[0] / 10:g}" if finding.sizes_mm else "",
        }

    def sentence(self, template: str, words: Mapping[str, str]) -> str:
        return upper_first(fill(template, words))

    # ---- findings
    def items(self, findings: Mapping[str, Finding]) -> list[_Item]:
        """Everything that is present, each once: alone, or two in one sentence."""
        left = dict(findings)
        items = []
        for pair in self.language["joined"]:
            first, second = pair["of"]
            if first in left and second in left and self.happens(pair["share"]):
                words = self.words(left.pop(first))
                words |= {f"b_{key}": value for key, value in self.words(left.pop(second)).items()}
                items.append(self._item(pair, self.language["findings"][first]["section"], words))
        for name, finding in left.items():
            rules = self.language["findings"][name]
            items.append(self._item(rules, rules["section"], self.words(finding)))
        self.rng.shuffle(items)
        return items

    def _item(self, rules: Mapping[str, Any], section: str, words: Mapping[str, str]) -> _Item:
        sentences = [self.sentence(_one(self.rng, rules["stated"]), words)]
        if "hedges" in rules and self.happens(self.language["impression"]["hedged"]):
            sentences[0] = f"{sentences[0].rstrip('.')} {_one(self.rng, rules['hedges'])}."
        if "more" in rules and self.happens(_MORE_SHARE):
            sentences.append(self.sentence(_one(self.rng, rules["more"]), words))
        return _Item(section, tuple(sentences), self.sentence(_one(self.rng, rules["summary"]), words))

    def incidental(self) -> tuple[list[_Item], set[str]]:
        """Findings outside the 18, and the names of the topics that they take the place of."""
        items, replaced = [], set()
        for rules in self.language["incidental"]:
            if self.happens(rules["share"]):
                low, high = rules.get("mm", (1, 1))
                words = {"mm": str(self.rng.integers(low, high + 1)), "side": _one(self.rng, ("right", "left"))}
                items.append(self._item(rules, rules["section"], words))
                replaced |= set(rules.get("instead_of", ()))
        return items, replaced

    def topics(self, present: set[str], replaced: set[str], contrast: bool) -> dict[str, list[str]]:
        """Sentences on normal structures and absence by section, none of which speaks against what is present."""
        sentences: dict[str, list[str]] = {section: [] for section in self.language["order"]}
        denied: set[str] = set()
        for topic in self.language["topics"]:
            denies = set(topic.get("denies", ()))
            if not self.happens(topic["share"][self.style]) or denies & present or topic.get("name") in replaced:
                continue
            if topic.get("contrast", contrast) != contrast or (denies and denies <= denied and "again" not in topic):
                continue
            denied |= denies
            sentences[topic["section"]].append(self.in_style(topic["wordings"]))
        return sentences

    def findings_text(self, items: Sequence[_Item], topics: dict[str, list[str]]) -> str:
        """Section by section; what is present stands between the topics, which keep their order."""
        text: list[str] = []
        for section, sentences in topics.items():
            blocks = [(sentence,) for sentence in sentences]
            for item in items:
                if item.section == section:
                    blocks.insert(int(self.rng.integers(len(blocks) + 1)), item.sentences)
            if section == "lungs" and blocks and self.happens(self.language["lead_ins"]["share"][self.style]):
                lead_in = self.in_style(self.language["lead_ins"]["wordings"])
                blocks[0] = (f"{lead_in} {blocks[0][0]}", *blocks[0][1:])  # type: ignore[assignment]
            text += [sentence for block in blocks for sentence in block]
        return " ".join(text)

    # ---- impression
    def impression(self, items: Sequence[_Item], incidental: Sequence[_Item], present: set[str]) -> str:
        """What the findings amount to, as a list of names; with bullets, as the style has it."""
        rules = self.language["impression"]
        if self.happens(rules["missing"]):
            return "Not given."
        kept = [item.summary for item in items if self.happens(rules["kept"])]
        kept += [item.summary for item in incidental if self.happens(rules["incidental_kept"])]
        if not kept and present:
            kept = [items[0].summary]
        lines: list[str] = []
        for summary in kept or [self.in_style(rules["normal"])]:
            if lines and self.happens(rules["merged"]):
                lines[-1] = f"{lines[-1]}, {summary[0].lower() if summary[1:2].islower() else summary[0]}{summary[1:]}"
            else:
                lines.append(summary)
        if not present & {"Lung opacity", "Consolidation"} and kept and self.happens(rules["nothing_acute_share"]):
            lines.append(self.in_style(rules["nothing_acute"]))
        if present & set(_ASKS_FOR_ADVICE) and self.happens(rules["advised"]):
            lines.append(_one(self.rng, rules["advice"]))
        if self.happens(rules["bullets"][self.style]):
            bullet = '"' if self.style != 1 else "•"
            return " ".join(f"{bullet} {line}." for line in lines)
        return " ".join(f"{line}." for line in lines)


def write_report(rng: np.random.Generator, findings: Mapping[str, Finding], *, contrast: bool) -> Report:
    """The report of a scan with these findings; `contrast` is whether it shows contrast medium."""
    writer = _Writer(rng)
    present = set(findings)
    items = writer.items(findings)
    incidental, replaced = writer.incidental()
    topics = writer.topics(present, replaced, contrast)
    return Report(
        clinical=_one(rng, CLINICAL),
        technique=_one(rng, TECHNIQUE).format(contrast="Contrast-enhanced" if contrast else "Non-contrast"),
        findings=writer.findings_text([*items, *incidental], topics),
        impression=writer.impression(items, incidental, present),
    )
