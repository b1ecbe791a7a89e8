"""`mg3d bench reports`: the language and the labels of phantoms beside those of real reports, in figures.

A file of real reports is a csv (also .csv.gz) in CT-RATE's form (`Findings_EN`, `Impressions_EN`) or in that of the MG-3D
repository (`report_text`: the findings, then the impression from the first bullet on). Labels are counted where the csv has
the 18 columns. Runs without JAX.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.errors import UserError
from mg3d_jax.language.statements import Statement, statements
from mg3d_jax.phantom.patients import STYLES, make_patient
from mg3d_jax.prepare.reports import split_sentences

OFTEN = 0.01  # a sentence that this share of reports holds word for word is boilerplate
_BULLET = re.compile(r"\s[\"“”•]|[\"“”•]\s")


@dataclass(frozen=True)
class Corpus:
    """Reports as sentences, and their labels.

    Attributes:
        findings: sentences of each report's findings.
        impressions: sentences of the impressions, of the reports that have one.
        labels: bool [n, 18] in the order of `ABNORMALITIES`, or None where they are not known.
    """

    findings: list[tuple[str, ...]]
    impressions: list[tuple[str, ...]]
    labels: np.ndarray | None


def phantom_corpus(count: int, style: str, seed: int = 0) -> Corpus:
    """The first scans of `count` phantom patients; their voxels are never drawn."""
    scans = [make_patient(seed, index, "train", style).scans[0] for index in range(count)]
    texts = [(scan.report.findings, scan.report.impression) for scan in scans]
    return _corpus(texts, np.array([scan.labels for scan in scans], bool))


def read_corpus(path: Path) -> Corpus:
    """The reports of a csv.

    Raises:
        UserError: the file cannot be read, or lacks the columns.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not rows or not ({"report_text"} <= rows[0].keys() or {"Findings_EN", "Impressions_EN"} <= rows[0].keys()):
        raise UserError(f"{path}: has no reports: give a csv with Findings_EN and Impressions_EN, or with report_text")
    texts = [
        _at_first_bullet(row["report_text"]) if "report_text" in row else (row["Findings_EN"], row["Impressions_EN"])
        for row in rows
    ]
    has_labels = set(ABNORMALITIES) <= rows[0].keys()
    labels = [[float(row[name]) > 0 for name in ABNORMALITIES] for row in rows] if has_labels else None
    return _corpus(texts, None if labels is None else np.array(labels, bool))


def _at_first_bullet(text: str) -> tuple[str, str]:
    bullet = _BULLET.search(text.strip())
    return (text.strip()[: bullet.start()], text.strip()[bullet.start() :]) if bullet else (text, "")


def _corpus(texts: Iterable[tuple[str, str]], labels: np.ndarray | None) -> Corpus:
    found = [(split_sentences(findings), split_sentences(impression)) for findings, impression in texts]
    return Corpus([one for one, _ in found], [one for _, one in found if one], labels)


def figures(corpus: Corpus) -> dict[str, str]:
    """Name of a statistic -> its value in words: one column of the table."""
    rows = {"reports": f"{len(corpus.findings)}"}
    for name, sections in (("findings", corpus.findings), ("impression", corpus.impressions)):
        sentences = [sentence for section in sections for sentence in section]
        rows[f"{name}: sentences per report"] = _spread([len(section) for section in sections])
        rows[f"{name}: words per sentence"] = _spread([len(sentence.split()) for sentence in sentences])
        rows |= {f"{name}: {kind}": f"{share:.2f}" for kind, share in kinds(sentences).items()}
    counts = Counter(sentence for section in corpus.findings for sentence in set(section))
    often = {sentence for sentence, count in counts.items() if count >= OFTEN * len(corpus.findings)}
    every = [sentence for section in corpus.findings for sentence in section]
    rows["findings: sentences that 1 % of the reports hold"] = f"{np.mean([one in often for one in every]):.2f}"
    rows["findings: the most frequent one, share of reports"] = f"{max(counts.values()) / len(corpus.findings):.2f}"
    if corpus.labels is not None:
        positives = corpus.labels.sum(1)
        rows["labels: positive per report"] = _spread(positives)
        rows["labels: reports without any"] = f"{(positives == 0).mean():.2f}"
    return rows


def kinds(sentences: Sequence[str]) -> dict[str, float]:
    """Shares of sentences by what the rules of `language` make of them; they add up to 1."""
    found = Counter(_kind(statements().parse(sentence)) for sentence in sentences)
    return {kind: found[kind] / max(len(sentences), 1) for kind in ("absence", "how it is", "presence", "neither")}


def _kind(statement: Statement | None) -> str:
    return (
        "neither" if statement is None else {False: "absence", True: "presence", None: "how it is"}[statement.present]
    )


def _spread(values: Sequence[int] | np.ndarray) -> str:
    """`"18.7 (9, 16, 39)"`: mean and the 5th, 50th and 95th percentile."""
    low, middle, high = np.percentile(values, [5, 50, 95]) if len(values) else (0, 0, 0)
    return f"{np.mean(values) if len(values) else 0:.1f} ({low:.0f}, {middle:.0f}, {high:.0f})"


def label_lines(columns: dict[str, np.ndarray]) -> list[str]:
    """Prevalence of each label in each column, and how far the correlations of pairs are from the last column's."""
    names = list(columns)
    lines = [f"| prevalence | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for index, label in enumerate(ABNORMALITIES):
        lines.append(f"| {label} | {' | '.join(f'{labels[:, index].mean():.2f}' for labels in columns.values())} |")
    upper = np.triu_indices(len(ABNORMALITIES), 1)
    pairs = [_correlations(labels)[upper] for labels in columns.values()]
    off = " | ".join(f"{np.sqrt(np.mean(np.square(one - pairs[-1]))):.3f}" for one in pairs)
    return [*lines, f"| correlations of pairs: root mean square off {names[-1]} | {off} |"]


def _correlations(labels: np.ndarray) -> np.ndarray:
    """[18, 18]; 0 where a label is the same in all reports."""
    centred = labels - labels.mean(0)
    spread = np.maximum(centred.std(0), 1e-12)
    return centred.T @ centred / (len(labels) * np.outer(spread, spread))


def main(argv: list[str]) -> int:
    """The command: two tables in Markdown."""
    parser = argparse.ArgumentParser(prog="mg3d bench reports", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("files", nargs="*", type=Path, help="csv files of real reports, one column of the table each")
    parser.add_argument(
        "--patients", type=int, default=800, help="phantom patients of each style (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the phantoms (default %(default)s)")
    args = parser.parse_args(argv)
    if args.patients < 1:
        raise UserError(f"--patients {args.patients}: must be positive.")
    real = {path.name: read_corpus(path) for path in args.files}
    drawn = {f"phantoms, {style}": phantom_corpus(args.patients, style, args.seed) for style in reversed(STYLES)}
    corpora = drawn | real
    columns = {name: figures(corpus) for name, corpus in corpora.items()}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        print(f"| {row} | {' | '.join(column.get(row, '') for column in columns.values())} |")
    labels = {name: corpus.labels for name, corpus in corpora.items() if corpus.labels is not None}
    print("", *label_lines(labels), sep="\n")
    return 0
