"""Self-contained HTML pages: one skeleton with one style, tables, and pictures that lie in the page itself.

Everything that is not `Markup` is escaped. Pages load nothing: no scripts, no fonts, no network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#667079;--line:#dfe3e8;--back:#fff;--panel:#f6f7f9;--mark:#b4540a;
--accent:#3b78c2;--good:#3a9d6e}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--soft:#98a2ab;--line:#343a41;--back:#16191d;--panel:#1e2227;
--mark:#f0a35c;--accent:#6ea3e6;--good:#5cc091}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:2.2rem 1.5rem 4rem;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1{font-size:1.75rem;font-weight:650;margin:0;letter-spacing:-.01em}
h2{font-size:1.15rem;font-weight:650;margin:2.6rem 0 .8rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
h3{font-size:.95rem;font-weight:600;margin:1.4rem 0 .5rem}
p,figcaption,summary{color:var(--soft)}p{margin:.4rem 0 .9rem}
a{color:var(--accent)}nav{margin:1rem 0 0;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.9rem}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
code{font:.87em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:1px;margin:1.4rem 0 0;
background:var(--line);border:1px solid var(--line);border-radius:8px;overflow:hidden}
.facts div{background:var(--panel);padding:.6rem .85rem}
.facts dt{font-size:.76rem;color:var(--soft)}.facts dd{margin:0;font-size:1.06rem;font-weight:600;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:1rem}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:.8rem}
figure{margin:0;min-width:0}figcaption{font-size:.83rem;margin:.25rem 0 0}
figure svg,figure img{display:block;width:100%;height:auto}figure img{border-radius:4px}
.chart{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.55rem .6rem .3rem}
.chart figcaption{color:var(--ink);font-weight:600;margin:0 .2rem .1rem}
.chart svg text{font-family:inherit!important}
table{border-collapse:collapse;font-size:.9rem;margin:.3rem 0 1rem;min-width:min(100%,460px)}
th,td{padding:.22rem .9rem .22rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:.82rem}td{overflow-wrap:anywhere}td.number,th.number{text-align:right}
tr.changed td{background:color-mix(in srgb,var(--mark) 11%,transparent)}tr.changed td:first-child{color:var(--mark)}
tr.total td{font-weight:650}
.bar{position:relative;width:240px;height:.95rem;background:linear-gradient(var(--line),var(--line)) 50%/1px 100% no-repeat}
.bar i{position:absolute;top:.4rem;height:.15rem;border-radius:1px;background:var(--accent);opacity:.55}
.bar b{position:absolute;top:.2rem;width:.55rem;height:.55rem;margin-left:-.27rem;border-radius:50%;background:var(--accent)}
.note{border-left:3px solid var(--mark);padding:.4rem .9rem;background:var(--panel);color:var(--ink)}
details{margin:.6rem 0}summary{cursor:pointer}.scroll{overflow-x:auto}
footer{margin-top:3rem;padding-top:.7rem;border-top:1px solid var(--line);color:var(--soft);font-size:.83rem}
@media print{body{max-width:none;padding:0}details{break-inside:avoid}.chart{break-inside:avoid}}
"""


class Markup(str):
    """Text that is HTML already: it is not escaped again."""

    __slots__ = ()


def text(value: object) -> Markup:
    """`value` as HTML: escaped, unless it is `Markup`."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def join(parts: Iterable[object]) -> Markup:
    return Markup("\n".join(text(part) for part in parts))


def page(title: str, body: Iterable[object]) -> str:
    """A whole document."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n{join(body)}\n</body></html>\n"
    )


def section(title: str, *content: object) -> Markup:
    """A heading that can be linked to by `anchor(title)`, with what follows it."""
    return Markup(f"<section><h2 id='{anchor(title)}'>{text(title)}</h2>\n{join(content)}</section>")


def anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numbers: Sequence[int] = (),
    classes: Sequence[str] = (),
) -> Markup:
    """Args:
    numbers: columns to align at the right.
    classes: a CSS class for each row: "changed", "total" or "".
    """

    def line(cells: Sequence[object], tag: str, css: str = "") -> str:
        inside = "".join(
            f"<{tag} class='number'>{text(cell)}</{tag}>" if i in numbers else f"<{tag}>{text(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr class='{css}'>{inside}</tr>" if css else f"<tr>{inside}</tr>"

    rows = list(rows)
    css = list(classes) or [""] * len(rows)
    body = "\n".join(line(row, "td", one) for row, one in zip(rows, css, strict=True))
    heading = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return Markup(f"<div class='scroll'><table>{heading}<tbody>{body}</tbody></table></div>")


def facts(items: Iterable[tuple[str, object]]) -> Markup:
    """A strip of names with their values."""
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in items)
    return Markup(f"<dl class='facts'>{cells}</dl>")


def paragraph(content: object, css: str = "") -> Markup:
    return Markup(f"<p class='{css}'>{text(content)}</p>" if css else f"<p>{text(content)}</p>")


def details(summary: object, *content: object, shown: bool = False) -> Markup:
    """What opens on a click."""
    return Markup(f"<details{' open' if shown else ''}><summary>{text(summary)}</summary>\n{join(content)}</details>")


def picture(data: bytes, caption: object, kind: str = "png") -> Markup:
    """A figure with its image inside the page; the caption is its alternative text too."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Markup(
        f"<figure><img loading='lazy' alt='{html.escape(str(caption))}' src='{source}'>"
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def chart(svg: str, caption: object) -> Markup:
    """A figure drawn as SVG (without XML prolog) that takes the colours of the page."""
    return Markup(f"<figure class='chart'><figcaption>{text(caption)}</figcaption>{svg}</figure>")


def grid(figures: Iterable[object], *, small: bool = False) -> Markup:
    return Markup(f"<div class='grid{' small' if small else ''}'>{join(figures)}</div>")
