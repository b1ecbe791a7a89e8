"""Written reports of a run (`tasks.generation`) against the true ones: wording, and the findings that they state."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d_jax.evaluation import clinical_efficacy, report_baselines, report_metrics, report_tables
from mg3d_jax.evaluation.base import Embedded, Evaluation, EvaluationOptions, Model, Text
from mg3d_jax.evaluation.bootstrap import PatientDraws, interval
from mg3d_jax.evaluation.report_writer import DECODER, ReportWriter, WrittenReports, sampling_of
from mg3d_jax.html import Section
from mg3d_jax.options import choice, key
from mg3d_jax.registry import LABELLERS

logger = logging.getLogger(__name__)
METHODS = ("greedy", "nucleus", "beam")
WRITTEN, TRUE = "written", "report"  # by whom a text is: the run, and the radiologist
EXAMPLES = 4
ONLINE_SCORES = ("bleu_4", "rouge_l")


@dataclass(frozen=True)
class GenerationEvaluationOptions(EvaluationOptions):
    """Written reports."""

    method: str = key("greedy", f"how they are written: {', '.join(METHODS)}", neutral="greedy")
    max_tokens: int = key(0, "longest text; 0: as long as the reports of training", neutral=0)
    beams: int = key(4, "texts that a beam search follows", neutral=4)
    length_penalty: float = key(1.0, "of a beam search: exponent of ((5 + length) / 6); 0: none", neutral=1.0)
    top_p: float = key(0.9, "probability of the tokens that nucleus sampling draws from", neutral=0.9)
    temperature: float = key(1.0, "of nucleus sampling", neutral=1.0)
    seed: int = key(0, "of nucleus sampling", neutral=0)
    no_repeat: int = key(0, "so many tokens in a row never stand twice in a text; 0: they may", neutral=0)
    online_volumes: int = key(64, "volumes of a measurement while training, the first ones; 0: all", neutral=64)
    labeller: str = key("rules", "what reads findings in texts, by name (registry.LABELLERS)", neutral="rules")
    probe_volumes: int = key(
        2000, "training volumes of the probes whose findings fill a template to compare with; 0: all", neutral=2000
    )
    wordnet: str = key(
        "", "folder of WordNet's files for METEOR's synonyms; empty: NLTK's data where it is installed", neutral=""
    )
    draws: int = key(1000, "resamplings of the patients for the intervals", neutral=1000)


@dataclass(frozen=True)
class _Judged:
    """Everything that is known of the evaluated volumes, n of them."""

    written: WrittenReports
    reports: list[Text]  # the true ones
    ids: np.ndarray
    patients: np.ndarray
    names: tuple[str, ...]  # of the labels
    texts: dict[str, list[Text]]  # by whom -> n texts, `WRITTEN` first
    left_out: dict[str, str]  # texts that are missing, and why


class Generation(Evaluation):
    """BLEU, ROUGE-L, METEOR, CIDEr and clinical efficacy. Nothing where the run has no decoder of reports."""

    options = GenerationEvaluationOptions
    needs = ("model",)

    def __init__(self, settings: Any = None):
        super().__init__(settings)
        self._writer: tuple[Any, ReportWriter] | None = None  # of which embedder
        self._last: tuple[Any, _Judged, dict[str, dict[str, np.ndarray]]] | None = None  # of which parameters

    @staticmethod
    def problems(options: GenerationEvaluationOptions, config: Any) -> list[str]:
        found = choice("evaluations.generation.method", options.method, METHODS)
        found += choice("evaluations.generation.labeller", options.labeller, tuple(LABELLERS))
        for name, least in (
            ("beams", 1),
            ("max_tokens", 0),
            ("online_volumes", 0),
            ("probe_volumes", 0),
            ("no_repeat", 0),
        ):
            if getattr(options, name) < least:
                found.append(f"evaluations.generation.{name} = {getattr(options, name)}: must be at least {least}")
        if not 0 < options.top_p <= 1:
            found.append(f"evaluations.generation.top_p = {options.top_p}: above 0, at most 1")
        if options.temperature <= 0:
            found.append(f"evaluations.generation.temperature = {options.temperature}: must be positive")
        return found

    def metrics(self, found: Embedded) -> dict[str, float]:
        """`generation/f1_micro`, `generation/f1_macro` of the findings, `generation/bleu_4`, `generation/rouge_l` and
        `generation/tokens`, of the first volumes."""
        if (model := _writing(found)) is None:
            return {}
        limit = model.embedder.config.data.max_bad_records
        written = self._write(model, most=self.settings.online_volumes, max_bad_records=limit)
        reports = [model.data.text(row).sentences for row in written.rows]
        once = np.ones((1, len(reports)), np.uint8)
        stated = self._labeller(model.data.label_names)(written.sentences) == 1
        clinical = clinical_efficacy.scores(clinical_efficacy.outcomes(stated, written.labels), once)
        result = {name: float(clinical[name][0]) for name in ("f1_micro", "f1_macro")}
        scored = report_metrics.once(report_metrics.score(written.texts, _joined(reports), self.settings.wordnet))
        result |= {name: scored[name] for name in ONLINE_SCORES} | {"tokens": float(written.tokens.mean())}
        return {f"generation/{name}": value for name, value in result.items()}

    def full(self, found: Embedded) -> dict[str, Any]:
        if (model := _writing(found)) is None:
            return {}
        judged, arrays = self._judge(model)
        weights = PatientDraws(judged.patients, self.settings.draws).weights(judged.patients)
        by_text = {name: _scored(one, weights) for name, one in arrays.items()}
        known = {name: {n: v for n, v in one.items() if n != "by_class"} for name, one in by_text.items()}
        return {
            "protocol": self._protocol(),
            "method": self.settings.method,
            "labeller": self.settings.labeller,
            "volumes": len(judged.ids),
            "ended": float(judged.written.ended.mean()),
            "tokens": float(judged.written.tokens.mean()),
            "texts": known,
            "by_class": _by_class(judged.names, by_text[WRITTEN]["by_class"], arrays[WRITTEN]),
            "examples": _examples(judged, arrays[WRITTEN]),
            "left_out": judged.left_out,
        }

    def flat(self, result: Mapping[str, Any]) -> dict[str, float | list[float]]:
        return {
            f"{_protocol_of(name, result['method'], result['labeller'], number)}/{number}": value
            for name, numbers in result.get("texts", {}).items()
            for number, value in numbers.items()
        }

    def arrays(self, found: Embedded) -> dict[str, np.ndarray]:
        if (model := _writing(found)) is None:
            return {}
        judged, arrays = self._judge(model)
        about = {"method": np.array(self.settings.method, str), "labeller": np.array(self.settings.labeller, str)}
        return {"ids": judged.ids, "patients": judged.patients} | about | arrays[WRITTEN]

    @staticmethod
    def resampled(arrays: Mapping[str, np.ndarray], draws: PatientDraws) -> dict[str, np.ndarray]:
        if "lengths" not in arrays:
            return {}
        drawn, _ = _drawn(arrays, draws.weights(arrays["patients"]))
        method, labeller = str(arrays["method"]), str(arrays["labeller"])
        return {f"{_protocol_of(WRITTEN, method, labeller, name)}/{name}": values for name, values in drawn.items()}

    def files(self, found: Embedded) -> Mapping[str, str]:
        """`reports.csv`: every volume with its true report and the written one, for other scores (RadEval)."""
        if (model := _writing(found)) is None:
            return {}
        judged, file = self._judge(model)[0], io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("volume", "patient", *judged.texts))
        texts = [_joined(one) for one in judged.texts.values()]
        writer.writerows(zip(judged.ids, judged.patients, *texts, strict=True))
        return {"reports.csv": file.getvalue()}

    def sections(self, result: Mapping[str, Any]) -> Sequence[Section]:
        return report_tables.sections(result)

    def _protocol(self) -> str:
        return (
            f"{report_tables.METHODS[self.settings.method]}; BLEU: {report_metrics.signature()}; METEOR: NLTK; CIDEr: "
            f"CIDEr-D; findings: the labeller {self.settings.labeller!r} against the labels of the records; intervals by "
            "resampling patients"
        )

    def _labeller(self, names: Sequence[str]) -> clinical_efficacy.Labeller:
        return LABELLERS[self.settings.labeller](tuple(names))

    def _write(self, model: Model, **options: Any) -> WrittenReports:
        embedder = model.embedder
        if self._writer is None or self._writer[0] is not embedder:
            self._writer = (embedder, ReportWriter(embedder, sampling_of(embedder, self.settings), self.settings.seed))
        with model.progress("write reports", len(model.data)) as progress:
            return self._writer[1](model.params, model.data, progress=progress, **options)

    def _judge(self, model: Model) -> tuple[_Judged, dict[str, dict[str, np.ndarray]]]:
        """Of the same parameters once: the document, its arrays, its files and its page ask one after another."""
        if self._last is None or self._last[0] is not model.params:
            judged = self._judged(model)
            self._last = (model.params, judged, self._arrays_of(judged))
        return self._last[1:]

    def _judged(self, model: Model) -> _Judged:
        written = self._write(model)
        about = [model.data.text(row) for row in written.rows]
        names, count = tuple(model.data.label_names), len(about)
        texts: dict[str, list[Text]] = {WRITTEN: written.sentences}
        left_out: dict[str, str] = {}
        texts["template of the labels"] = [report_baselines.template(row == 1, names) for row in written.labels]
        if model.train is None:
            why = "needs training data: give them with --train-data"
            left_out |= {"most frequent report": why, "template of probed labels": why}
        else:
            texts["most frequent report"] = [report_baselines.most_frequent(model.train)] * count
            found = self._probed(model, written, np.array([one.patient for one in about], str))
            texts["template of probed labels"] = [report_baselines.template(row, names) for row in found]
        texts[TRUE] = [one.sentences for one in about]
        ids, patients = (np.array([getattr(one, name) for one in about], str) for name in ("name", "patient"))
        return _Judged(written, texts[TRUE], ids, patients, names, texts, left_out)

    def _probed(self, model: Model, written: WrittenReports, patients: np.ndarray) -> np.ndarray:
        """What linear probes of the run's own volume tokens find; training volumes of evaluated patients are left out."""
        assert self._writer is not None and model.train is not None
        most = self.settings.probe_volumes
        with model.progress("probe", min(most or len(model.train), len(model.train))) as progress:
            train = self._writer[1].pooled(model.params, model.train, most, progress)
        of = np.array([model.train.text(row).patient for row in train["record_index"]], str)
        others = ~np.isin(of, patients)
        features, labels = train["pooled"][others], train["labels"][others]
        return report_baselines.probed(features, labels, of[others], written.pooled)

    def _arrays_of(self, judged: _Judged) -> dict[str, dict[str, np.ndarray]]:
        """Of each kind of text what its reports give to the scores. The true reports have findings only: how far the labeller
        can be trusted."""
        label, reports = self._labeller(judged.names), _joined(judged.reports)
        found = {}
        for name, texts in judged.texts.items():
            outcomes = clinical_efficacy.outcomes(label(texts) == 1, judged.written.labels)
            wording = {} if name == TRUE else report_metrics.score(_joined(texts), reports, self.settings.wordnet)
            found[name] = outcomes | wording
        return found


def _writing(found: Embedded) -> Model | None:
    """The model, where it can write."""
    return found.model if found.model is not None and DECODER in found.model.params else None


def _joined(texts: Sequence[Text]) -> list[str]:
    return [" ".join(sentences) for sentences in texts]


def _protocol_of(text: str, method: str, labeller: str, number: str) -> str:
    of = f"generation/text={method if text == WRITTEN else text.replace(' ', '_')}"
    return f"{of}/labeller={labeller}" if number.removesuffix("_95") in clinical_efficacy.MEANINGS else of


def _drawn(
    arrays: Mapping[str, np.ndarray], weights: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The scores in every draw `[D]`, and those of the classes `[D, L]`."""
    clinical = clinical_efficacy.scores(arrays, weights)
    drawn = report_metrics.corpus_scores(dict(arrays), weights) if "lengths" in arrays else {}
    by_class = {name: values for name, values in clinical.items() if name not in clinical_efficacy.MEANINGS}
    return drawn | {name: clinical[name] for name in clinical_efficacy.MEANINGS}, by_class


def _scored(arrays: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, Any]:
    drawn, by_class = _drawn(arrays, weights)
    result: dict[str, Any] = {"by_class": {name: values[0] for name, values in by_class.items()}}
    for name, values in drawn.items():
        result |= {name: float(values[0]), f"{name}_95": interval(values)}
    return result


def _by_class(
    names: Sequence[str], scores: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Of each label: precision, recall, F1 of what is written, and in how many volumes it is there and stated."""
    hit, false, missed = (arrays[name].sum(axis=0) for name in ("hit", "false", "missed"))
    return {
        name: {kind: float(scores[kind][place]) for kind in ("precision", "recall", "f1")}
        | {"present": int(hit[place] + missed[place]), "stated": int(hit[place] + false[place])}
        for place, name in enumerate(names)
    }


def _examples(judged: _Judged, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Volumes from the best F1 of their findings to the worst, evenly."""
    hit, false, missed = (arrays[name].sum(axis=1) for name in ("hit", "false", "missed"))
    f1 = 2 * hit / np.maximum(2 * hit + false + missed, 1)
    order = np.argsort(-f1, kind="stable")
    chosen = [int(order[place]) for place in np.unique(np.linspace(0, len(order) - 1, EXAMPLES).round().astype(int))]
    return [
        {
            "volume": str(judged.ids[row]),
            "row": int(judged.written.rows[row]),
            "f1": float(f1[row]),
            "written": list(judged.texts[WRITTEN][row]),
            "report": list(judged.reports[row]),
        }
        | {kind: [judged.names[i] for i in np.flatnonzero(arrays[kind][row])] for kind in ("hit", "false", "missed")}
        for row in chosen
    ]
