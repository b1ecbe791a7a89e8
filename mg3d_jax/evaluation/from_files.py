"""Evaluations of embeddings from files, of any model: the same code as for a run, without a model, and without JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d_jax.errors import UserError
from mg3d_jax.evaluation import document as document_lib
from mg3d_jax.evaluation import embedding_files, label_tables
from mg3d_jax.evaluation.base import Embedded, Evaluation
from mg3d_jax.evaluation.document import Evaluated
from mg3d_jax.evaluation.label_tables import bare


def read(
    embeddings: Path, *, labels: Sequence[Path] = (), label_mapping: str = "", reports: Path | None = None
) -> Embedded:
    """A file of embeddings with labels and reports from further files.

    Args:
        labels: tables of `label_tables`; without them the labels of the file, if it has some.
        reports: a file of embeddings whose reports are taken, or a csv with the texts.
    """
    found = embedding_files.read(embeddings)
    if label_mapping and not labels:
        raise UserError("--label-mapping says how the table of --labels is read: give that, too")
    if labels:
        table = label_tables.read_labels(labels, mapping=label_mapping)
        found = dataclasses.replace(found, labels=table.of(found.volume_ids), label_names=table.names)
        found = dataclasses.replace(
            found, facts=dict(found.facts) | {"labels": table.where, "label_mapping": label_mapping}
        )
    return found if reports is None else _with_reports(found, reports)


def _with_reports(found: Embedded, path: Path) -> Embedded:
    if path.suffix in embedding_files.FORMATS:
        other = embedding_files.read_reports(path, found.volumes.shape[1])
        found = dataclasses.replace(found, **other)
        if unknown := set(found.volume_reports.tolist()) - set(found.report_ids.tolist()) - {""}:
            raise UserError(
                f"{path}: lacks {len(unknown)} reports that volume_report_ids names, e.g. {min(unknown)!r}: embed them, too"
            )
        return found
    texts = label_tables.read_reports(path)
    if not len(found.report_ids):
        raise UserError(
            f"{path}: texts of reports are shown beside their embeddings, and {found.facts['embeddings']} has no "
            "report_embeddings and report_ids: embed the reports, too"
        )
    by_report = {bare(name): bare(name) for name in found.report_ids.tolist()}
    if not by_report.keys() & texts.keys():  # a table by volume, as CT-RATE's
        for volume, report in zip(found.volume_ids.tolist(), found.volume_reports.tolist(), strict=True):
            if bare(volume) in texts:
                by_report[bare(report)] = bare(volume)
    lost = [name for name, key in by_report.items() if key not in texts]
    if lost:
        raise UserError(
            f"{path}: has no text for {len(lost)} of {len(by_report)} reports, e.g. {lost[0]!r}; its ids are like "
            f"{next(iter(texts))!r}: give the ids of report_ids or volume_ids"
        )
    ordered = tuple(texts[by_report[bare(name)]] for name in found.report_ids.tolist())
    return dataclasses.replace(found, report_texts=ordered)


def evaluate(
    found: Embedded,
    evaluations: Mapping[str, Evaluation],
    *,
    train: Embedded | None = None,
    named: Iterable[str] = (),
) -> Evaluated:
    """All evaluations that the file has enough for; the document lists the others, with what they lack, under `left_out`.

    Args:
        train: labelled volumes of other patients, embedded by the same model.
        named: evaluations that the user asked for: to leave one of them out is an error.
    """
    if train is not None:
        if train.volumes.shape[1] != found.volumes.shape[1]:
            raise UserError(
                f"{train.facts['embeddings']}: its embeddings have {train.volumes.shape[1]} numbers each, those of "
                f"{found.facts['embeddings']} {found.volumes.shape[1]}: take both from one model"
            )
        if not train.label_names:
            raise UserError(
                f"{train.facts['embeddings']}: has no labels, and training volumes are for probes and thresholds: give a table "
                "with --train-labels"
            )
        found = dataclasses.replace(found, train=train)
    lacking = {name: words for name, one in evaluations.items() if (words := _lacks(one, found))}
    if wanted := lacking.keys() & set(named):
        raise UserError("; ".join(f"the evaluation {name!r} {lacking[name]}" for name in sorted(wanted)))
    kept = {name: one for name, one in evaluations.items() if name not in lacking}
    if not kept:
        raise UserError("nothing can be evaluated: " + "; ".join(f"{name} {words}" for name, words in lacking.items()))
    _check_prompts(found, kept)
    facts = {name: value for name, value in found.facts.items() if value}
    about: dict[str, Any] = facts | {
        "volumes": len(found.volumes),
        "patients": len(np.unique(found.patients)),
        "left_out": lacking,
    }
    if train is not None:
        about["train"] = {"embeddings": train.facts["embeddings"], "volumes": len(train.volumes)}
    return document_lib.measure(dict.fromkeys(kept, found), kept, about)


def _lacks(one: Evaluation, found: Embedded) -> str:
    """What an evaluation needs that is not here, in words; "" where it has all."""
    by_prompts = type(one).prompts is not Evaluation.prompts
    if "model" in one.needs or type(one).texts is not Evaluation.texts:
        return "needs the model itself: evaluate the run, with --workdir"
    if "reports" in one.needs and not len(found.reports):
        return "needs report_embeddings, report_ids and volume_report_ids in the file"
    if "reports" in one.needs and not np.isin(found.volume_reports, found.report_ids).any():
        return "needs volume_report_ids that name reports of the file"
    if by_prompts and not found.label_names:
        return "needs labels: give a table with --labels"
    if by_prompts and not found.prompts:
        return "needs prompt_embeddings and classes in the file"
    return one.lacks(found)


def _check_prompts(found: Embedded, evaluations: Mapping[str, Evaluation]) -> None:
    """Prompts of classes without labels are a mistake, unless the user says which classes are meant."""
    for one in evaluations.values():
        if type(one).prompts is Evaluation.prompts or getattr(one.settings, "classes", "all") != "all":
            continue
        for title, prompts in found.prompts.items():
            if unknown := [name for name in prompts.classes if name not in found.label_names]:
                raise UserError(
                    f"the prompts {title!r} are for {len(unknown)} classes without labels: {', '.join(unknown)}. The labels "
                    f"are {', '.join(found.label_names)}. Rename them, or say which count with --classes NAME,NAME"
                )
