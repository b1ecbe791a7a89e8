"""Self-contained HTML pages from the templates in `templates/`.

`base.html` has the skeleton and the style, `parts.html` tables, figures and sections, and each page a template of its own.
Everything is escaped. Pages load nothing: no scripts, no fonts, no network; pictures lie in the page as data addresses.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from mg3d_jax.charts import Chart, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float, float]  # value, lower and upper end


@dataclass(frozen=True)
class Table:
    """What the macro `table` draws.

    Args:
        numbers: columns that are aligned at the right.
        classes: a CSS class for each row: "changed", "total" or "".
        intervals: drawn between 0 and 1 in a last column, whose heading is in `head`; one for each row.
        more: said below the table, e.g. how many rows are left out.
    """

    head: Sequence[object]
    rows: Sequence[Sequence[object]]
    numbers: Sequence[int] = ()
    classes: Sequence[str] = ()
    intervals: Sequence[Interval] = ()
    more: str = ""


@dataclass(frozen=True)
class Section:
    """How the result of an evaluation is shown.

    Args:
        protocol: how the numbers were measured.
        table: on the terminal and on every page.
        plot: draws into matplotlib axes: the panel of `evaluation.png`; without it there is none.
        warnings: sentences for whoever reads the numbers.
        charts: on the page of the evaluation.
        headline: the numbers that come first on that page: name -> value as text.
        on_terminal: False keeps a long table off the terminal and the page of a run.
    """

    title: str
    protocol: str
    table: Table
    plot: Callable[[Axes], None] | None = None
    warnings: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    headline: Sequence[tuple[str, str]] = ()
    on_terminal: bool = True


def render(template: str, title: str, **values: object) -> str:
    """A whole document. Sections that `template` opens are listed at its top."""
    return _environment().get_template(template).render(title=title, sections=[], **values)


def number(value: float | None, digits: int = 3) -> str:
    """A number of a table; "" where there is none, or NaN."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def anchor(title: str) -> str:
    """The name by which a section can be linked to."""
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def data_uri(content: bytes | str, kind: str) -> str:
    """The address of a picture that lies in the page. `kind`: "png", "jpeg" or "svg+xml"."""
    content = content.encode() if isinstance(content, str) else content
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mg3d_jax"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,  # a name that is misspelt in a template is an error, not an empty place
        extensions=["jinja2.ext.do"],
    )
    environment.filters |= {"anchor": anchor, "data_uri": data_uri, "svg": svg}
    return environment
