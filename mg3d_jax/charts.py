"""Charts of the pages as SVG: one style, drawn dark on no ground; the style of a page inverts them where it is dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b78c2", "#d9772b", "#3a9d6e", "#b0508f", "#8a72d6", "#c9a227", "#4aa3a8", "#8b8f94")
INK, LINE = "#1d2126", "#cdd3da"


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Args:
        draw: fills the axes, or the whole figure where `whole` is True.
        size: inches; a column of a page is about 4.7 wide.
        wide: it takes a row of its own.
    """

    title: str
    draw: Callable[[Axes], None] | Callable[[Figure], None]
    size: tuple[float, float] = (4.7, 2.9)
    wide: bool = False
    whole: bool = False


@contextmanager
def plain_text() -> Iterator[None]:
    """What is drawn in here shows a "$" as it is, not as the beginning of a formula: names of runs, labels and files of users
    may have some. Also a decorator. Ticks of log axes need a formatter of their own, as matplotlib writes formulas there."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


@plain_text()
def svg(chart: Chart) -> str:
    """The chart as an SVG document without a background. The same input gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": chart.title, "font.size": 9, "axes.edgecolor": LINE,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": LINE,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=chart.size, layout="constrained")
        chart.draw(figure if chart.whole else figure.add_subplot())  # type: ignore[arg-type]
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def plain_axes(axes: Axes, grid: Literal["both", "x", "y"] = "y") -> None:
    """No frame but the base line, thin grid lines along `grid`."""
    axes.grid(axis=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=8)
