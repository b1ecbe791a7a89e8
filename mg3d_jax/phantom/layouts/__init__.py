"""Miniatures of public data sets, a module and a line each: few small procedural scans in the published layout.

A recipe runs end to end on one before anything is downloaded, and `mg3d prepare --source NAME` reads it as it reads the real
data set. What a model learns from one says nothing about the real data. One of your own: a `Layout` in a module of yours that
ends with `LAYOUTS.register(NAME, LAYOUT)`, named in `mg3d --plugins MODULE phantom OUT --layout NAME`.
"""

from mg3d_jax.phantom.layouts.decathlon import LUNG
from mg3d_jax.registry import LAYOUTS

LAYOUTS.register("msd-lung", LUNG)
