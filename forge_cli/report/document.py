"""A page as one HTML file: what is put in is escaped here, and a policy in the page lets it load nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence

from forge_cli.redaction import printable_lines
from forge_cli.report.figures import Figure
from forge_cli.report.look import SCRIPT, STYLE
from forge_cli.version import __version__

MOST_CHARACTERS = 4000
_SHORT = 28  # characters of a cell that is not broken over lines


def escape(value: object) -> str:
    """Makes a text of a run, a model or data fit for HTML: masked, escaped, cut at :data:`MOST_CHARACTERS`."""
    text = printable_lines(str(value))
    left = len(text) - MOST_CHARACTERS
    return html.escape(text if left <= 0 else f"{text[:MOST_CHARACTERS]} ... ({left} more characters)")


def render_table(
    rows: Iterable[Sequence[object]], header: Sequence[str] = (), *, numbers: bool = False, name: str = ""
) -> str:
    """Renders a table in a box of its own that scrolls sideways; the first cell of a row is its heading.

    Args:
        rows: Cells, escaped here.
        header: Column titles.
        numbers: Set all cells but the first flush right.
        name: Id of the table.
    """
    kind = ' class="number"' if numbers else ""

    def render_cell(cell: object) -> str:
        return f"<td{kind or (' class=short' if len(str(cell)) <= _SHORT else '')}>{escape(cell)}</td>"

    body = [f'<tr><th scope="row">{escape(first)}</th>{"".join(map(render_cell, rest))}</tr>' for first, *rest in rows]
    if not body:
        return ""
    titles = [f'<th scope="col"{kind if place else ""}>{escape(title)}</th>' for place, title in enumerate(header)]
    head = f"<thead><tr>{''.join(titles)}</tr></thead>" if titles else ""
    mark = f' id="{name}"' if name else ""
    return f'<div class="box"><table{mark}>{head}<tbody>{"".join(body)}</tbody></table></div>'


def render_list(lines: Iterable[object], kind: str = "") -> str:
    """Renders lines as a list."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>' if kind else f"<ul>{items}</ul>"


def render_document(
    title: str, subtitle: str, verdict: Sequence[str], figures: Sequence[Figure], sections: Mapping[str, str]
) -> str:
    """Puts a page together.

    Args:
        title: Heading.
        subtitle: The line below it; may be empty.
        verdict: What to read first, a line each.
        figures: Plots, in order; each stands at the end of its section.
        sections: Heading to HTML; empty ones are left out.
    """
    drawn = {
        heading: _render_plots([(place, one) for place, one in enumerate(figures) if one.section == heading])
        for heading in sections
    }
    parts = {heading: body + drawn[heading] for heading, body in sections.items() if body or drawn[heading]}
    anchors = {heading: heading.lower().replace(" ", "-") for heading in parts}
    links = "".join(f'<a href="#{anchors[one]}">{one}</a>' for one in parts)
    body = "".join(f'<section id="{anchors[one]}"><h2>{one}</h2>{part}</section>' for one, part in parts.items())
    data = json.dumps([{"traces": one.traces, "layout": one.layout} for one in figures], allow_nan=False)
    scripts = _read_scripts() if figures else []
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_write_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{STYLE}</style></head>\n<body><header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>'
        f"{render_list(verdict, 'verdict')}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f'<footer><p class="soft">Written by Forge {__version__}. It loads nothing from elsewhere.</p></footer>\n'
        # Inside a script only `<` could end it.
        + f'<script type="application/json" id="figure-data">{data.replace("<", chr(92) + "u003c")}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def _render_plots(figures: Sequence[tuple[int, Figure]]) -> str:
    """Sets plots in two columns; one that would be alone in its row gets all of it."""
    parts, column = [], 0
    for (number, figure), (_, following) in zip(figures, [*figures, (0, None)][1:], strict=True):
        is_wide = figure.is_wide or (column == 0 and (following is None or following.is_wide))
        column = 0 if is_wide else 1 - column
        text = f"<p>{escape(figure.text)}</p>" if figure.text else ""
        parts.append(
            f"<figure{' class=wide' if is_wide else ''}><figcaption><h3>{escape(figure.title)}</h3>{text}</figcaption>"
            f'<div id="plot{number}" role="img" aria-label="Plot: {escape(figure.title)}"></div>'
            "<noscript>Plots need JavaScript.</noscript></figure>"
        )
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def _read_scripts() -> list[str]:
    from plotly.offline import get_plotlyjs

    return [get_plotlyjs().replace("</script", "<\\/script"), SCRIPT]


def _write_policy(scripts: Sequence[str]) -> str:
    """Writes what the page may do: run these scripts and no others, load nothing."""
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
