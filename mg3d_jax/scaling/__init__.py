"""Scaling laws: declare a sweep, train it, count its cost, fit `L = E + A/N^alpha + B/D^beta`, say how sure that is.

What is in `fit` needs NumPy, SciPy and matplotlib only, so a table can be fitted on a laptop that has no JAX. `sweep`
counts parameters and operations of its runs as the trainer does (`training.cost`).
"""
