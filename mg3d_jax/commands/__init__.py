"""`mg3d <command>`: a module per command, with `main(argv) -> int` and its own `--help`; wiring and printing only.

A module is imported when its command runs, so that `mg3d --help` and `mg3d phantom` never import JAX. A command of your
own is registered in the same way, `COMMANDS.register("name", Command("my_module", "what it does"))` in a module that is
named in front: `mg3d --plugins MODULE name ...`.
"""

from __future__ import annotations

from typing import NamedTuple

from mg3d_jax.registry import COMMANDS


class Command(NamedTuple):
    """`module` has `main(argv) -> int`; `summary` is its line in `mg3d --help`."""

    module: str
    summary: str


for _name, _module, _summary in (
    ("phantom", "mg3d_jax.commands.phantom", "make procedural chest CT with reports, in CT-RATE's layout"),
    ("prepare", "mg3d_jax.commands.prepare", "volumes and reports on disk -> checked, sharded training records"),
    ("train", "mg3d_jax.commands.train", "train from a config; the same command resumes"),
    ("finetune", "mg3d_jax.commands.finetune", "train a downstream task from a run, a tower or nothing"),
    (
        "benchmark",
        "mg3d_jax.commands.benchmark",
        "downstream tasks from scratch and pre-trained, with paired intervals",
    ),
    ("report", "mg3d_jax.commands.report", "one HTML page of a run: curves, slices, evaluations, configuration"),
    (
        "evaluate",
        "mg3d_jax.commands.evaluate",
        "zero-shot, retrieval and probes: of a run, or of any model's embeddings",
    ),
    ("embed", "mg3d_jax.commands.embed", "volumes, reports and prompts of a run to .npz or .parquet"),
    ("probe", "mg3d_jax.commands.probe", "linear probe, nearest neighbours, few patients; heads to keep"),
    ("compare", "mg3d_jax.commands.compare", "two evaluated models: differences with paired intervals"),
    ("attend", "mg3d_jax.commands.attend", "where in a scan a sentence looks: NIfTI map and overlay"),
    ("segment", "mg3d_jax.commands.segment", "classes of a scan's voxels, as NIfTI in the scan's own space"),
    ("sweep", "mg3d_jax.commands.sweep", "scaling-law sweeps: plan, run, status, fit, advise, predict, compare"),
    ("import", "mg3d_jax.commands.import_", "read published weights: BERT types, MONAI's ViT and Swin"),
    ("export", "mg3d_jax.commands.export", "write a run's weights for PyTorch and Hugging Face users"),
    ("bench", "mg3d_jax.commands.bench", "measure data, model and objectives on this machine"),
):
    COMMANDS.register(_name, Command(_module, _summary))
