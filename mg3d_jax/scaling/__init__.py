"""Scaling laws: declare a sweep, train it, count its cost, fit `L = E + A/N^alpha + B/D^beta`, say how sure that is.

`laws`, `solver`, `fit`, `bootstrap`, `table`, `plots` and `report` need NumPy, SciPy and matplotlib only, so a table
can be fitted on a laptop that has no JAX. `flops` counts parameters and operations from the configuration.
"""
