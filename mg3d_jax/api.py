"""The Python API: `run = mg3d_jax.load(FOLDER)`, then `run.embed_volume(...)`, `run.zero_shot(...)`, `run.attend(...)`.

The commands use it too. `prepare_data` does what `mg3d prepare` does. `Trainer` is the loop of `mg3d train`, which adds the
evaluations of `evaluation.hooks` to it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax import prepare
from mg3d_jax.config import Config
from mg3d_jax.data.abnormalities import ABNORMALITIES
from mg3d_jax.data.tokens import ReportTokenizer
from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import evaluate as evaluate_lib
from mg3d_jax.evaluation import prompts as prompts_lib
from mg3d_jax.evaluation import scoring
from mg3d_jax.evaluation.attend import Relevance, SentenceMaps
from mg3d_jax.evaluation.embed import Embedder, logit_scale
from mg3d_jax.evaluation.run_grid import run_grid
from mg3d_jax.evaluation.segmenter import Segmented, Segmenter
from mg3d_jax.prepare.reports import split_sentences
from mg3d_jax.prepare.scans import Scan, ScanSource, Spacing, read_scan
from mg3d_jax.trainer import Trainer
from mg3d_jax.training.restore import RestoredRun, restore_run

__all__ = ["Relevance", "Run", "Segmented", "Trainer", "load", "prepare_data"]

logger = logging.getLogger(__name__)
TEXTS_PER_CALL = 16


def load(
    folder: str | Path,
    step: int | None = None,
    *,
    ema: bool | None = None,
    spacing: Spacing | None = None,
    policy: str | None = None,
) -> Run:
    """Opens a run of `mg3d train`.

    Args:
        folder: its `--workdir`.
        step: which checkpoint; None takes the newest.
        ema: the averaged weights (True), the raw ones (False), or the averaged ones where the run keeps them (None).
        spacing: mm per voxel that the run was trained with, where neither the checkpoint nor the run's data folder says it.
        policy: how `mg3d prepare` laid the grid on a scan, e.g. "center"; None takes what the run's data says.

    Raises:
        UserError: there is no run, no such checkpoint, or no average and `ema` asks for it.
    """
    return Run(restore_run(Path(folder), step, ema=ema), spacing=spacing, policy=policy)


class Run:
    """A trained run. Made by `load`.

    A scan is a NIfTI file (`.nii`, `.nii.gz`), a folder with the slices of one DICOM series, or `(array [i, j, k], affine
    [4, 4])`; it is brought to the run's grid and to Hounsfield units as by `mg3d prepare`. What cannot be used is a
    `UserError`.

    Attributes:
        restored: the parameters, the model and the mesh, for code that needs more than the methods below.
    """

    def __init__(self, restored: RestoredRun, *, spacing: Spacing | None = None, policy: str | None = None):
        self.restored, self._spacing, self._policy = restored, spacing, policy
        self._embedder = Embedder.of_run(restored, TEXTS_PER_CALL)
        self._segmenters: dict[tuple[float, int], Segmenter] = {}  # by overlap and windows per call

    @property
    def config(self) -> Config:
        """The configuration that it was trained with."""
        return self.restored.config

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self.restored.step

    @functools.cached_property
    def tokenizer(self) -> ReportTokenizer:
        """Sentences -> the arrays that the report encoder reads, with the token limit of training."""
        return self.restored.view_tokenizer

    def read_scan(self, scan: ScanSource) -> Scan:
        """The scan on the run's grid: int16 HU and affines. The methods below call it."""
        return read_scan(scan, run_grid(self.restored, self._spacing, self._policy))

    def embed_volume(self, scan: ScanSource) -> np.ndarray:
        """The embedding of a scan: float32 `[k]` of length 1."""
        return self._embedder.volume(self.restored.params, self.read_scan(scan).volume)

    def embed_texts(self, texts: Sequence[str | Sequence[str]]) -> np.ndarray:
        """The embeddings of n texts: float32 `[n, k]`, each of length 1. Their products with a volume's are cosines.

        Args:
            texts: strings, which are split as reports are in `mg3d prepare`, or lists of sentences. A run that was trained on
                single sentences embeds a report as the mean direction of its sentences, as `mg3d evaluate` does.

        Raises:
            UserError: there are no texts, or one of them has no words.
        """
        if isinstance(texts, str) or not len(texts):
            raise UserError(f"embed_texts({texts!r}): give a list of at least one text")
        entries = []
        for number, text in enumerate(texts):
            sentences = (list(split_sentences(text)) or [text]) if isinstance(text, str) else list(text)
            if not sentences or not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
                raise UserError(f"embed_texts: text {number} is {text!r}: give a sentence, or a list of sentences")
            entries.append(self._embedder.report_texts(sentences))
        if cut := sum(self.tokenizer.is_cut(part) for entry in entries for part in entry):
            logger.warning("%d texts are longer than the %d tokens that the run reads", cut, self.tokenizer.max_tokens)
        return self._embedder.texts(self.restored.params, self._embedder.tokenize(entries))

    def zero_shot(
        self, scan: ScanSource, labels: Sequence[str] | None = None, *, prompts: str = "ct_clip"
    ) -> dict[str, float]:
        """The probability that each finding is present, by the protocol of `mg3d evaluate`: a softmax over the prompts
        "{label} is present." and "{label} is not present.".

        Args:
            labels: names of findings; None takes the 18 of CT-RATE.
            prompts: another way to ask, one of `evaluation.prompts.PROMPT_SETS`, or a file with prompts for the labels.
        """
        labels = ABNORMALITIES if labels is None else tuple(labels)
        asked = prompts_lib.prompts_of(prompts, labels)
        entries = [[[phrase] for phrase in asked[label][side]] for side in (0, 1) for label in labels]
        embedded = self._embedder.texts(self.restored.params, self._embedder.tokenize(entries))
        pairs = embedded.reshape(2, len(labels), -1)
        volume = self.embed_volume(scan)[None]
        found = scoring.probabilities(volume, pairs, logit_scale(self.restored.params))[0]
        return dict(zip(labels, map(float, found), strict=True))

    def attend(self, scan: ScanSource, text: str, method: str = "auto") -> Relevance:
        """Where in the scan the sentence `text` looks: `.patches` on the run's grid, `.map` in the scan's own space.

        Args:
            method: "attention" (runs with the matching or discrimination objective), "occlusion" (any run), or "auto",
                the first that the run has. `evaluation.attend` says what they measure.
        """
        return self._maps(self.read_scan(scan), text, method)

    @functools.cached_property
    def _maps(self) -> SentenceMaps:
        return SentenceMaps(self.restored)

    def segment(self, scan: ScanSource, *, overlap: float = 0.5, windows: int = 4, modality: str = "CT") -> Segmented:
        """The classes of the voxels of a scan, all of it: `.classes` in the scan's own space, `.save(FILE)` as NIfTI.

        Args:
            overlap: of the windows that are slid over the scan, a share of their size.
            windows: how many go through the network together.
            modality: "CT" or "MR".

        Raises:
            UserError: the run was not trained with `tasks.segmentation`, or the scan cannot be read.
        """
        key = (overlap, windows)
        if key not in self._segmenters:
            self._segmenters[key] = Segmenter(self.restored, *key)
        grid = run_grid(self.restored, self._spacing, self._policy)
        return self._segmenters[key](read_scan(scan, grid, whole=True, modality=modality))

    def evaluate(
        self,
        data: Sequence[str | Path],
        *,
        only: Iterable[str] | None = None,
        overrides: Mapping[str, str] | None = None,
        train: Sequence[str | Path] = (),
        batch_size: int = 16,
    ) -> Mapping[str, Any]:
        """The document that `mg3d evaluate` writes: every registered evaluation (or `only` these) on prepared folders.

        Args:
            overrides: options as on the command line, by `NAME.KEY`: `{"zero_shot.classes": "ct_rate_16"}`.
            train: prepared folders of other patients, for probes and thresholds.
        """
        evaluated = evaluate_lib.evaluate(
            self.restored,
            [str(folder) for folder in data],
            only=only,
            overrides=overrides,
            train_folders=[str(folder) for folder in train],
            batch_size=batch_size,
        )
        return evaluated.document


def prepare_data(**settings: Any) -> dict[str, Any] | None:
    """Prepares a data set like `mg3d prepare`: `source`, `root`, `split`, `out`, and the other fields of
    `prepare.folder.Settings`. Returns its manifest."""
    settings |= {name: Path(settings[name]) for name in ("root", "out") if name in settings}
    return prepare.prepare(prepare.Settings.of(**settings))
