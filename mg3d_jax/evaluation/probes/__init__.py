"""Probes of frozen embeddings: linear, nearest neighbours, few patients; and their heads on disk. Nothing here imports JAX."""

from mg3d_jax.evaluation.probes.few_patients import few_shot
from mg3d_jax.evaluation.probes.heads import HEAD_FILE, ProbeHead, head_of, load_head, save_head
from mg3d_jax.evaluation.probes.linear import ProbeResult, class_of, linear_probe
from mg3d_jax.evaluation.probes.neighbours import nearest_neighbours

__all__ = [
    "HEAD_FILE",
    "ProbeHead",
    "ProbeResult",
    "class_of",
    "few_shot",
    "head_of",
    "linear_probe",
    "load_head",
    "nearest_neighbours",
    "save_head",
]
