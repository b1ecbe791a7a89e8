"""How close written reports are to the true ones, by the libraries that the field uses; texts are split into words once.

BLEU-1 to 4 by sacrebleu, ROUGE-L by rouge-score, METEOR by NLTK, CIDEr(-D) by pycocoevalcap: the extra `generation` installs
them. All see the same words: lower case, punctuation apart, as sacrebleu's tokenizer "13a" cuts them.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.bootstrap import weighted_mean, weighted_sum

ORDERS = 4
MEANS = ("rouge_l", "meteor", "meteor_without_synonyms", "cider")  # means over the reports
MEANINGS: dict[str, str] = {
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, ORDERS + 1)},
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "meteor_without_synonyms": "METEOR without its synonyms",
    "cider": "CIDEr",
}
Arrays = dict[str, np.ndarray]


def needed(module: str) -> Any:
    """A library of the extra. `UserError` where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'the scores of written reports need {module.partition(".")[0]} ({error}): pip install "mg3d_jax[generation]"'
        ) from error


def words(text: str) -> list[str]:
    """The words that all scores count."""
    return _tokenizer()(text.lower()).split()


@functools.cache
def _tokenizer() -> Callable[[str], str]:
    return needed("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()


def signature() -> str:
    """sacrebleu's own note of what was computed, BLEU-4."""
    bleu = _bleu(ORDERS)
    bleu.corpus_score(["a"], [["a"]])
    return f"{bleu.get_signature()}, of words in lower case as 13a cuts them"


def _bleu(order: int) -> Any:
    return needed("sacrebleu.metrics").BLEU(max_ngram_order=order, tokenize="none", force=True)


def score(written: Sequence[str], reports: Sequence[str], wordnet: str = "") -> Arrays:
    """What each report gives to the scores, for `corpus_scores`: arrays of n reports, none of them an object.

    Args:
        written, reports: n texts, and the true ones.
        wordnet: as for `synonyms`.
    """
    pairs = [(words(one), words(true)) for one, true in zip(written, reports, strict=True)]
    found = _bleu_counts(pairs)
    found["rouge_l"] = np.array(_rouge(pairs))
    reader = synonyms(wordnet)
    found["meteor_without_synonyms" if reader is None else "meteor"] = np.array(_meteor(pairs, reader))
    found["cider"] = _cider(pairs)
    return found


def _bleu_counts(pairs: Sequence[tuple[list[str], list[str]]]) -> Arrays:
    bleu = _bleu(ORDERS)
    scores = [bleu.corpus_score([" ".join(one)], [[" ".join(true)]]) for one, true in pairs]
    return {
        "ngrams_right": np.array([one.counts for one in scores], np.int64).reshape(-1, ORDERS),
        "ngrams": np.array([one.totals for one in scores], np.int64).reshape(-1, ORDERS),
        "lengths": np.array([(one.sys_len, one.ref_len) for one in scores], np.int64).reshape(-1, 2),
    }


def _rouge(pairs: Sequence[tuple[list[str], list[str]]]) -> list[float]:
    scorer = needed("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    return [scorer.score(" ".join(true), " ".join(one))["rougeL"].fmeasure for one, true in pairs]


class _NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        return []


def _meteor(pairs: Sequence[tuple[list[str], list[str]]], reader: Any) -> list[float]:
    meteor = needed("nltk.translate.meteor_score").meteor_score
    return [meteor([true], one, wordnet=_NoSynonyms() if reader is None else reader) for one, true in pairs]


def _cider(pairs: Sequence[tuple[list[str], list[str]]]) -> np.ndarray:
    """Words that every report has weigh nothing, so that it depends on the reports that are scored together."""
    cider = needed("pycocoevalcap.cider.cider").Cider()
    reports = {row: [" ".join(true)] for row, (_, true) in enumerate(pairs)}
    return np.asarray(cider.compute_score(reports, {row: [" ".join(one)] for row, (one, _) in enumerate(pairs)})[1])


@functools.cache
def synonyms(folder: str = "") -> Any:
    """WordNet for METEOR: of a folder with its files ("data.noun", ...), or NLTK's own data where they are installed.

    None where `folder` is "" and NLTK has none: METEOR then matches words and stems only, which is another number.
    Debian's package wordnet-base has the files in /usr/share/wordnet. `UserError` for a folder without them.
    """
    nltk = needed("nltk")
    if not folder:
        try:
            nltk.data.find("corpora/wordnet")
        except LookupError:
            try:
                nltk.data.find("corpora/wordnet.zip")
            except LookupError:
                return None
        return needed("nltk.corpus").wordnet
    if not (Path(folder) / "data.noun").is_file():
        raise UserError(f"evaluations.generation.wordnet = {folder!r}: there are no files of WordNet, e.g. data.noun")
    nltk.data.path.append(folder)  # NLTK reads nothing outside of its own folders
    return _reader(folder)


def _reader(folder: str) -> Any:
    """NLTK's reader of a folder that holds WordNet's database alone, as Debian has it."""
    import warnings

    class Reader(needed("nltk.corpus.reader.wordnet").WordNetCorpusReader):  # type: ignore[misc]
        def open(self, file: str) -> Any:
            """Names of lexicographers' files are not in it: synonyms need none of them."""
            if file == "lexnames":
                return io.StringIO("".join(f"{number:02d} file{number} 1\n" for number in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Other versions of WordNet are not there."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other languages
        return Reader(folder, None)


def corpus_scores(arrays: Arrays, weights: np.ndarray) -> Arrays:
    """The scores of all reports together, by the names of `MEANINGS`, in every draw `[D]`.

    Args:
        arrays: those of `score`. weights: `[D, n]`, how often each report counts.
    """
    right, ngrams, lengths = (weighted_sum(arrays[name], weights) for name in ("ngrams_right", "ngrams", "lengths"))
    found = {}
    for order in range(1, ORDERS + 1):
        compute = functools.partial(
            needed("sacrebleu.metrics").BLEU.compute_bleu, smooth_method="exp", max_ngram_order=order
        )
        found[f"bleu_{order}"] = np.array([
            compute(list(r[:order]), list(n[:order]), int(one), int(true)).score / 100
            for r, n, (one, true) in zip(right.astype(int).tolist(), ngrams.astype(int).tolist(), lengths, strict=True)
        ])  # fmt: skip
    return found | {name: weighted_mean(arrays[name], weights) for name in MEANS if name in arrays}


def once(arrays: Arrays) -> dict[str, float]:
    """The scores of the reports as they are."""
    count = len(arrays["lengths"])
    return {name: float(values[0]) for name, values in corpus_scores(arrays, np.ones((1, count), np.uint8)).items()}
