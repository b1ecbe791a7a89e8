"""Layouts of data sets on disk, a module and a line each: where every volume is, what its report says, labels, patient, scan.

A source is a function from `SourceOptions` to a `Listing`. It opens no volume, and lists as bad, with path and reason, what
does not fit together (a report without a volume, a volume without a report, an empty report): nothing is dropped silently.
A `Source` adds settings of its own.
One of your own: write the function in a module of yours, end it with `SOURCES.register(NAME, FUNCTION)`, and name the module
in `mg3d prepare --plugins MODULE --source NAME`.
"""

from mg3d_jax.prepare.sources.acdc import ACDC
from mg3d_jax.prepare.sources.cc_ccii import CC_CCII
from mg3d_jax.prepare.sources.covid_19_20 import COVID_19_20
from mg3d_jax.prepare.sources.ctrate import list_ctrate
from mg3d_jax.prepare.sources.ctrg import list_ctrg
from mg3d_jax.prepare.sources.decathlon import MSD_COLON, MSD_LUNG, list_decathlon
from mg3d_jax.prepare.sources.inspect import list_inspect
from mg3d_jax.prepare.sources.luna16 import LUNA16
from mg3d_jax.prepare.sources.merlin import list_merlin
from mg3d_jax.prepare.sources.rad_chestct import list_rad_chestct
from mg3d_jax.prepare.sources.stoic import STOIC
from mg3d_jax.prepare.sources.table import list_table, list_zip
from mg3d_jax.registry import SOURCES

SOURCES.register("ctrate", list_ctrate)
SOURCES.register("ctrg", list_ctrg)
SOURCES.register("csv", list_table)
SOURCES.register("zip", list_zip)
SOURCES.register("cc-ccii", CC_CCII)
SOURCES.register("luna16", LUNA16)
SOURCES.register("stoic", STOIC)
SOURCES.register("decathlon", list_decathlon)
SOURCES.register("msd-lung", MSD_LUNG)
SOURCES.register("msd-colon", MSD_COLON)
SOURCES.register("covid-19-20", COVID_19_20)
SOURCES.register("acdc", ACDC)
SOURCES.register("rad-chestct", list_rad_chestct)
SOURCES.register("merlin", list_merlin)
SOURCES.register("inspect", list_inspect)
