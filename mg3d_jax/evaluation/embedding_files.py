"""Files of embeddings, of any model: what `mg3d embed` writes and `mg3d evaluate --embeddings` reads. Without JAX.

Arrays by name, in an `.npz`, or as the rows of a `.parquet` table whose column `kind` says what a row is. n volumes, m
reports, s sentences, L classes, embeddings of k numbers, ids as text:

    volume_embeddings [n, k]    volume_ids [n]          patient_ids [n]         needed
    scan_ids [n]                labels [n, L]           label_names [L]         1 present, 0 absent, -1 unknown
    report_embeddings [m, k]    report_ids [m]          volume_report_ids [n]   for retrieval; "" where a volume has none
    report_texts [m]            sentences, one a line
    sentence_embeddings [s, k]  sentence_report_ids [s] sentence_texts [s]
    prompt_embeddings [2, L, k] classes [L]             prompt_set              for zero-shot: present, then absent
    prompt_embeddings@NAME      classes@NAME            further sets of prompts
    logit_scale                 1 / temperature, not its logarithm
    about                       JSON: where it comes from
"""

from __future__ import annotations

import json
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation.base import Embedded, Prompts
from mg3d_jax.files import partial_path

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
FORMATS = (".npz", ".parquet")
OWN_PROMPTS = "file"  # name of a set of prompts that has none
UNIT = 1e-3  # how far a length may be from 1 before it is said
IDS = ("volume_ids", "patient_ids", "scan_ids", "volume_report_ids")
KNOWN = (
    "volume_embeddings", *IDS, "labels", "label_names", "report_embeddings", "report_ids", "report_texts",
    "sentence_embeddings", "sentence_report_ids", "sentence_texts", "prompt_embeddings", "classes", "prompt_set",
    "logit_scale", "about",
)  # fmt: skip


def check_format(path: Path) -> None:
    """`UserError` for a name that is neither `.npz` nor `.parquet`."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a file of embeddings ends in {' or '.join(FORMATS)}")


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, whole or not at all. The same arrays give the same bytes."""
    check_format(path)
    if path.suffix == ".npz":
        save_npz(path, arrays)
    else:
        from mg3d_jax.evaluation.embedding_tables import write_parquet

        _whole(path, lambda partial: write_parquet(partial, arrays))


def save_npz(path: Path, arrays: Mapping[str, np.ndarray], *, compressed: bool = False) -> None:
    """Writes the arrays by name, whole or not at all. The same arrays give the same bytes."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            savez: Any = np.savez_compressed if compressed else np.savez
            savez(file, **{name: arrays[name] for name in sorted(arrays)})

    _whole(path, write)


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    partial = partial_path(path)
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load(path: Path) -> Arrays:
    """The arrays of a file as they are. `UserError` where it cannot be read."""
    check_format(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a file of `mg3d embed`, or one that has its arrays")
    if path.suffix == ".parquet":
        from mg3d_jax.evaluation.embedding_tables import read_parquet

        return read_parquet(path)
    return load_npz(path, ".npz", "texts are saved as np.array(list, dtype=str), not as objects")


def load_npz(path: Path, kind: str, remedy: str) -> Arrays:
    """The arrays of an `.npz`. `UserError` that it cannot be read as `kind`, with `remedy`."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is one array without a name, as np.save writes it")
        with loaded as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as {kind} ({error}); {remedy}") from error


def read(path: Path) -> Embedded:
    """A file as evaluations see it: embeddings normalised, ids as strings, labels where the file has them.

    Raises:
        UserError: an array is missing, has another shape than it should or NaN; ids that are twice or belong to nothing.
    """
    return _Reader(path).embedded()


def read_reports(path: Path, width: int) -> dict[str, Any]:
    """The reports of a file as the fields of `Embedded`; it needs nothing else.

    Args:
        width: numbers of an embedding.
    """
    reader = _Reader(path)
    reports = reader.embeddings("report_embeddings", width=width, needed=True)
    ids = reader.strings("report_ids", len(reports), needed=True)
    reader.distinct("report_ids", ids)
    return {"reports": reports, "report_ids": ids, "report_texts": reader.texts(len(reports))}


class _Reader:
    """The checks of one file; every message names it and the array."""

    def __init__(self, path: Path):
        self.path, self.arrays = path, load(path)
        self.lengthened: list[str] = []
        if unknown := sorted(name for name in self.arrays if name.partition("@")[0] not in KNOWN):
            logger.warning("%s: not read, no array has these names here: %s", path, ", ".join(unknown))

    def embedded(self) -> Embedded:
        volumes = self.embeddings("volume_embeddings", needed=True)
        count, width = volumes.shape
        if not count:
            raise self.error("volume_embeddings", "holds no volume", "embed at least one")
        ids = {name: self.strings(name, count, needed=name in ("volume_ids", "patient_ids")) for name in IDS}
        self.distinct("volume_ids", ids["volume_ids"])
        if empty := int((ids["patient_ids"] == "").sum()):
            raise self.error(
                "patient_ids", f"is empty for {empty} of {count} volumes", "each needs one; intervals rest on it"
            )
        if count > 1 and len(np.unique(ids["patient_ids"])) == 1:
            logger.warning("%s: all volumes are of one patient: there are no intervals", self.path)
        reports = self.embeddings("report_embeddings", width=width)
        report_ids = self.strings("report_ids", len(reports), needed=bool(len(reports)))
        self.distinct("report_ids", report_ids)
        self.belong("volume_report_ids", ids["volume_report_ids"], report_ids)
        labels, label_names = self.labels(count)
        facts = {"embeddings": str(self.path), "about": self.about()}
        prompts = self.prompts(width)
        if self.lengthened:
            logger.warning("%s: not of length 1, normalised now: %s", self.path, ", ".join(self.lengthened))
        return Embedded(
            volumes=volumes,
            volume_ids=ids["volume_ids"],
            scans=ids["scan_ids"] if "scan_ids" in self.arrays else ids["volume_ids"],
            patients=ids["patient_ids"],
            volume_reports=ids["volume_report_ids"],
            labels=labels,
            label_names=label_names,
            reports=reports,
            report_ids=report_ids,
            report_texts=self.texts(len(reports)),
            prompts=prompts,
            texts=np.zeros((0, width), np.float32),
            logit_scale=self.logit_scale(),
            facts=facts | {"normalised": list(self.lengthened)},
        )

    def error(self, name: str, problem: str, remedy: str) -> UserError:
        return UserError(f"{self.path}: {name} {problem}: {remedy}")

    def embeddings(self, name: str, *, width: int | None = None, needed: bool = False, axes: int = 2) -> np.ndarray:
        """float32 of length 1 along the last axis; no rows where there is no such array."""
        if name not in self.arrays:
            if needed:
                raise UserError(f"{self.path} has no {name}; it has {', '.join(self.arrays) or 'nothing'}")
            return np.zeros((0, width or 0), np.float32)
        array = self.arrays[name]
        wanted = "[2, classes, numbers]" if axes == 3 else "[rows, numbers]"
        if array.ndim != axes or array.dtype.kind not in "fiu" or (axes == 3 and array.shape[0] != 2):
            raise self.error(name, f"has shape {array.shape} and type {array.dtype}", f"numbers of shape {wanted}")
        if width is not None and array.shape[-1] != width:
            raise self.error(
                name, f"has {array.shape[-1]} numbers each, volume_embeddings {width}", "take both from one model"
            )
        with np.errstate(over="ignore"):  # infinite, which is said below
            array = array.astype(np.float32)
        length = np.linalg.norm(array.astype(np.float64), axis=-1, keepdims=True)
        for bad, what in ((~np.isfinite(length), "NaN or infinite"), (length == 0, "0 everywhere")):
            if bad.any():
                rows = np.flatnonzero(bad.reshape(-1))
                raise self.error(
                    name, f"is {what} in {len(rows)} of {bad.size} rows, first in row {rows[0]}", "embed them again"
                )
        if np.abs(length - 1).max(initial=0) > UNIT:
            self.lengthened.append(name)
            array = (array / length).astype(np.float32)
        return array

    def strings(self, name: str, count: int, *, needed: bool = False) -> np.ndarray:
        """`[count]` texts; empty ones where there is no such array."""
        if name not in self.arrays:
            if needed:
                raise UserError(f"{self.path} has no {name}; it has {', '.join(self.arrays)}")
            return np.full(count, "", str)
        array = self.arrays[name]
        if array.shape != (count,) or array.dtype.kind not in "USiu":
            raise self.error(name, f"has shape {array.shape} and type {array.dtype}", f"{count} texts are needed")
        try:
            return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.astype(str)
        except UnicodeDecodeError as error:
            raise self.error(name, f"is not UTF-8 ({error})", "save it as np.array(list, dtype=str)") from error

    def texts(self, count: int) -> tuple[tuple[str, ...], ...]:
        """Sentences of every report; nothing where they are not known."""
        texts = self.strings("report_texts", count)
        return tuple(tuple(text.split("\n")) for text in texts.tolist()) if "report_texts" in self.arrays else ()

    def distinct(self, name: str, ids: np.ndarray) -> None:
        found, count = np.unique(ids, return_counts=True)
        if (count > 1).any():
            raise self.error(
                name,
                f"has {int((count > 1).sum())} ids more than once, e.g. {str(found[count > 1][0])!r}",
                "each needs its own",
            )

    def belong(self, name: str, ids: np.ndarray, to: np.ndarray) -> None:
        lost = sorted(set(ids[ids != ""].tolist()) - set(to.tolist()))
        if lost and len(to):
            raise self.error(
                name, f"names {len(lost)} reports that report_ids lacks, e.g. {lost[0]!r}", 'use "" for none'
            )

    def labels(self, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
        if "labels" not in self.arrays:
            return np.zeros((count, 0), np.int8), ()
        array = self.arrays["labels"]
        names = self.strings("label_names", array.shape[-1] if array.ndim else 0, needed=True)
        self.distinct("label_names", names)
        if array.shape != (count, len(names)):
            raise self.error("labels", f"has shape {array.shape}", f"({count}, {len(names)}) is needed")
        if len(wrong := np.setdiff1d(array, [-1, 0, 1])):
            raise self.error("labels", f"holds {wrong[0]}", "1 present, 0 absent, -1 unknown")
        return array.astype(np.int8), tuple(names.tolist())

    def prompts(self, width: int) -> dict[str, Prompts]:
        found = {}
        for name in [name for name in self.arrays if name.partition("@")[0] == "prompt_embeddings"]:
            of = name.partition("@")[2]
            embeddings = self.embeddings(name, width=width, axes=3)
            classes = self.strings(f"classes@{of}" if of else "classes", embeddings.shape[1], needed=True)
            self.distinct(f"classes@{of}" if of else "classes", classes)
            title = of or self.prompt_set()
            if title in found:
                raise self.error(name, f"is a second set of prompts by the name of {title!r}", "give it another name")
            found[title] = Prompts(tuple(classes.tolist()), embeddings)
        if found and "logit_scale" not in self.arrays:
            logger.warning(
                "%s: has no logit_scale, 1 is taken: ranks are not touched by it, probabilities and calibration are",
                self.path,
            )
        return found

    def prompt_set(self) -> str:
        """The name of the set without one in the names of its arrays."""
        if "prompt_set" not in self.arrays:
            return OWN_PROMPTS
        if self.arrays["prompt_set"].size != 1:
            raise self.error("prompt_set", f"has shape {self.arrays['prompt_set'].shape}", "one text is needed")
        return str(self.arrays["prompt_set"].item())

    def logit_scale(self) -> float:
        array = self.arrays.get("logit_scale", np.ones(()))
        if array.size != 1 or array.dtype.kind not in "fiu" or not np.isfinite(array).all() or array.min() <= 0:
            raise self.error(
                "logit_scale", f"is {array.tolist()}", "one positive number, exp(temperature) in CT-CLIP's words"
            )
        return float(array.reshape(()))

    def about(self) -> Any:
        try:
            return json.loads(str(self.arrays["about"])) if "about" in self.arrays else {}
        except ValueError:
            return str(self.arrays["about"])


def prompt_arrays(prompts: Mapping[str, Prompts]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of sets of prompts; the first is that of `prompt_embeddings`."""
    for number, (title, one) in enumerate(prompts.items()):
        suffix = f"@{title}" if number else ""
        yield f"prompt_embeddings{suffix}", one.embeddings
        yield f"classes{suffix}", np.array(one.classes, str)
        if not number:
            yield "prompt_set", np.array(title, str)
