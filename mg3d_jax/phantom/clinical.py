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
from mg3d_jax.phantom.wording import CLINICAL, TECHNIQUE, Report, fill, lower_first_word, upper_first, words_of

_LOBE = re.compile(r"\b(?P<side>right|left) (?P<lobe>upper|middle|lower) lobe\b")
_BOTH_LOBES = re.compile(r"\bboth (?P<lobe>upper|lower) lobes\b")


@dataclass(frozen=True)
class _Item:
    """What the report states: its sentences, where they go, and how the impression names it."""

    section: str
    sentences: tuple[str, ...]
    summary: str


@functools.cache
def _language() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "clinical.toml").read_text(encoding="utf-8"))


@functools.cache
def _variants() -> list[tuple[re.Pattern[str], list[str]]]:
    return [(re.compile(rf"\b(?:{'|'.join(words)})\b"), words) for words in _language()["variants"]]


def _one(rng: np.random.Generator, wordings: Sequence[str]) -> str:
    return wordings[int(rng.integers(len(wordings)))]


class Writer:
    """One report's random numbers, and the department in whose habits it is written."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.language = _language()
        self.department = bisect(list(accumulate(self.language["departments"][:-1])), rng.random())

    def happens(self, share: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < share)

    def in_habit(self, wordings: Sequence[str]) -> str:
        """The department's own wording, mostly; else any, in words that stand for its own."""
        own = self.happens(self.language["habit"])
        return wordings[self.department] if own else self.varied(_one(self.rng, wordings))

    def normal(self, wordings: Sequence[str]) -> str:
        """A sentence on normal structures or absence."""
        sentence = self.in_habit(wordings)
        if sentence != wordings[self.department] and self.happens(self.language["prefix_share"]):
            return f"{_one(self.rng, self.language['prefixes'])} {lower_first_word(sentence)}"
        return sentence

    def varied(self, sentence: str) -> str:
        """The sentence with words replaced by others that stand for the same."""
        for pattern, variants in _variants():
            sentence = pattern.sub(functools.partial(self._any_of, variants), sentence)
        return sentence

    def _any_of(self, variants: Sequence[str], _: re.Match[str]) -> str:
        return _one(self.rng, variants)

    def words(self, finding: Finding) -> dict[str, str]:
        """What placeholders stand for, with lobes named as the department does."""
        pattern = self.language["lobe"][self.department]
        words = words_of(finding, self.rng)
        lobe = functools.partial(_LOBE.sub, lambda found: pattern.format(**found.groupdict()))
        for key in ("where", "largest_where"):
            words[key] = lobe(_BOTH_LOBES.sub(r"\g<lobe> lobes of both lungs", words[key]))
        plural = finding.kind == "sternal wires" or (finding.name == "Lung nodule" and len(finding.blobs) > 1)
        return words | {
            "is": "are" if plural else "is",
            "the_kind": finding.kind if finding.kind.startswith("all ") else f"the {finding.kind}",
            "degreely": {"moderate": "moderately", "severe": "markedly"}[finding.severity],
            "cm": f"{finding.sizes_mm[0] / 10:g}" if finding.sizes_mm else "",
        }

    def sentence(self, template: str, words: Mapping[str, str]) -> str:
        """A wording with its placeholders replaced, beginning with a capital."""
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
        """One finding by its table of wordings, or two of `joined`."""
        sentences = [self.stated(rules, words)]
        if "more" in rules and self.happens(self.language["more_share"]):
            sentences.append(self.sentence(_one(self.rng, rules["more"]), words))
        if self.happens(self.language["impression"]["stated"]):
            summary = self.stated(rules, words).rstrip(".")
        else:
            summary = self.hedged(rules, self.sentence(_one(self.rng, rules["summary"]), words))
        return _Item(section, tuple(sentences), summary)

    def stated(self, rules: Mapping[str, Any], words: Mapping[str, str]) -> str:
        """A sentence that says that the finding is there."""
        sentence = self.sentence(self.varied(_one(self.rng, rules["stated"])), words)
        return f"{self.hedged(rules, sentence.rstrip('.'))}."

    def hedged(self, rules: Mapping[str, Any], text: str) -> str:
        """The text, now and then with a question of what it may be."""
        asks = "hedges" in rules and not text.endswith(")") and self.happens(self.language["impression"]["hedged"])
        return f"{text} {_one(self.rng, rules['hedges'])}" if asks else text

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
            if not self.happens(topic["share"][self.department]) or denies & present or topic.get("name") in replaced:
                continue
            if topic.get("contrast", contrast) != contrast or (denies and denies <= denied and "again" not in topic):
                continue
            denied |= denies
            sentences[topic["section"]].append(self.normal(topic["wordings"]))
        return sentences

    def findings(self, items: Sequence[_Item], topics: dict[str, list[str]]) -> list[str]:
        """Section by section; what is present stands between the topics, which keep their order."""
        text: list[str] = []
        for section, sentences in topics.items():
            blocks: list[tuple[str, ...]] = [(sentence,) for sentence in sentences]
            for block in self.run_on([item.sentences for item in items if item.section == section]):
                blocks.insert(int(self.rng.integers(len(blocks) + 1)), block)
            if section == "lungs" and blocks and self.happens(self.language["lead_ins"]["share"][self.department]):
                lead_in = self.in_habit(self.language["lead_ins"]["wordings"])
                blocks[0] = (f"{lead_in} {blocks[0][0]}", *blocks[0][1:])
            text += [sentence for block in blocks for sentence in block]
        return text

    def run_on(self, blocks: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Some of the findings in one sentence with the one before."""
        joined: list[tuple[str, ...]] = []
        for block in blocks:
            if joined and len(joined[-1]) == 1 and self.happens(self.language["run_on_share"]):
                head = f"{joined[-1][-1].rstrip('.')}{_one(self.rng, self.language['run_ons'])}"
                joined[-1] = (*joined[-1][:-1], head + lower_first_word(block[0]), *block[1:])
            else:
                joined.append(block)
        return joined

    # ---- impression
    def impression(self, items: Sequence[_Item], incidental: Sequence[_Item], present: set[str]) -> list[str]:
        """What the findings amount to: names, sentences and advice; empty in a report without an impression."""
        rules = self.language["impression"]
        if self.happens(rules["missing"]):
            return []
        kept = [item.summary for item in items if self.happens(rules["kept"])]
        kept += [item.summary for item in incidental if self.happens(rules["incidental_kept"])]
        if not kept and items:
            kept = [items[0].summary]
        lines: list[str] = []
        for summary in kept or [self.in_habit(rules["normal"])]:
            if lines and self.happens(rules["merged"]):
                lines[-1] = f"{lines[-1]}, {lower_first_word(summary)}"
            else:
                lines.append(summary)
        if kept and not present & set(rules["acute"]) and self.happens(rules["nothing_acute_share"]):
            lines.append(_one(self.rng, rules["nothing_acute"]))
        if present & set(rules["asks_for_advice"]) and self.happens(rules["advised"]):
            lines.append(_one(self.rng, rules["advice"]))
        return [f"{line}." for line in lines]

    def listed(self, lines: Sequence[str]) -> str:
        """The impression's text, with bullets as the department has it."""
        rules = self.language["impression"]
        if not lines:
            return "Not given."
        bullet = f"{rules['bullet'][self.department]} " if self.happens(rules["bullets"][self.department]) else ""
        return " ".join(f"{bullet}{line}" for line in lines)


@dataclass(frozen=True)
class Written:
    """A report as sentences: what `write_report` puts into a text, and what cutting that text up again should give."""

    findings: tuple[str, ...]
    impression: tuple[str, ...]
    report: Report


def write(rng: np.random.Generator, findings: Mapping[str, Finding], *, contrast: bool) -> Written:
    """The report of a scan with these findings; `contrast` is whether it shows contrast medium."""
    writer = Writer(rng)
    present = set(findings)
    items = writer.items(findings)
    incidental, replaced = writer.incidental()
    sentences = writer.findings([*items, *incidental], writer.topics(present, replaced, contrast))
    lines = writer.impression(items, incidental, present)
    report = Report(
        clinical=_one(rng, CLINICAL),
        technique=_one(rng, TECHNIQUE).format(contrast="Contrast-enhanced" if contrast else "Non-contrast"),
        findings=" ".join(sentences),
        impression=writer.listed(lines),
    )
    return Written(tuple(sentences), tuple(lines), report)


def write_report(rng: np.random.Generator, findings: Mapping[str, Finding], *, contrast: bool) -> Report:
    """The four texts of `write`."""
    return write(rng, findings, contrast=contrast).report
