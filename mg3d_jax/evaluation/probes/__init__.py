"""Probes of frozen embeddings: linear, nearest neighbours, few patients; and their heads on disk. Nothing here imports JAX."""

from mg3d_jax.evaluation.probes.linear import ProbeResult, class_of, linear_probe

__all__ = ["ProbeResult", "class_of", "linear_probe"]
