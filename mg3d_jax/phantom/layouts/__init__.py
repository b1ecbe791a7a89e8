"""Miniatures of public data sets, a module and a line each: few small procedural scans in the published layout.

A recipe runs end to end on one before anything is downloaded, and `mg3d prepare --source NAME` reads it as it reads the real
data set. What a model learns from one says nothing about the real data. One of your own: a `Layout` in a module of yours that
ends with `LAYOUTS.register(NAME, LAYOUT)`, named in `mg3d --plugins MODULE phantom OUT --layout NAME`.
"""

from mg3d_jax.phantom.layouts.acdc import ACDC
from mg3d_jax.phantom.layouts.cc_ccii import CC_CCII
from mg3d_jax.phantom.layouts.covid_19_20 import COVID_19_20
from mg3d_jax.phantom.layouts.ctrg import CTRG
from mg3d_jax.phantom.layouts.decathlon import COLON, LUNG
from mg3d_jax.phantom.layouts.luna16 import LUNA16
from mg3d_jax.phantom.layouts.stoic import STOIC
from mg3d_jax.phantom.layouts.with_reports import INSPECT, MERLIN, RAD_CHESTCT, ZIP
from mg3d_jax.registry import LAYOUTS

LAYOUTS.register("cc-ccii", CC_CCII)
LAYOUTS.register("luna16", LUNA16)
LAYOUTS.register("stoic", STOIC)
LAYOUTS.register("msd-lung", LUNG)
LAYOUTS.register("msd-colon", COLON)
LAYOUTS.register("covid-19-20", COVID_19_20)
LAYOUTS.register("acdc", ACDC)
LAYOUTS.register("ctrg", CTRG)
LAYOUTS.register("rad-chestct", RAD_CHESTCT)
LAYOUTS.register("merlin", MERLIN)
LAYOUTS.register("inspect", INSPECT)
LAYOUTS.register("zip", ZIP)
