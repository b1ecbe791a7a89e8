"""Scaling laws: declare a sweep, train it, count its cost, fit `L = E + A/N^alpha + B/D^beta`, and say how sure that is.

`laws`, `solver`, `fit`, `bootstrap`, `table` and `plots` need NumPy, SciPy and matplotlib only, so a table can be fitted
on a laptop that has no JAX. `flops` counts parameters and operations from the configuration.
"""
