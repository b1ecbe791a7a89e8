"""Layouts of data sets on disk, a module and a line each: where every volume is, what its report says, labels, patient, scan.

A source is a function from `SourceOptions` to a `Listing`. It opens no volume, and lists as bad, with path and reason, what
does not fit together (a report without a volume, a volume without a report, an empty report): nothing is dropped silently.
One of your own: write the function in a module of yours, end it with `SOURCES.register(NAME, FUNCTION)`, and name the module
in `mg3d prepare --plugins MODULE --source NAME`.
"""

from mg3d_jax.prepare.sources.ctrate import list_ctrate
from mg3d_jax.prepare.sources.ctrg import list_ctrg
from mg3d_jax.prepare.sources.decathlon import list_decathlon
from mg3d_jax.prepare.sources.table import list_table
from mg3d_jax.registry import SOURCES

SOURCES.register("ctrate", list_ctrate)
SOURCES.register("ctrg", list_ctrg)
SOURCES.register("csv", list_table)
SOURCES.register("decathlon", list_decathlon)
