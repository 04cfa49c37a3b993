"""HTML and SVG whose text is always escaped.

Only `tag` makes markup, and it escapes whatever is not markup already: a name out of a run cannot become an element.
"""

import html
import re
from collections.abc import Iterable, Sequence

_EMPTY = {"meta", "link", "img", "wbr"}  # HTML elements without an end tag


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children, **attributes) -> Markup:
    """An element.

    Args:
      name: of the element.
      children: texts, which are escaped; `Markup`; None, which is left out; or iterables of these.
      attributes: None and False are left out, True stands without a value. `class_` is written class, and
        `stroke_width` stroke-width.
    """
    written = "".join(
        f" {key.strip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{written}>" + ("" if name in _EMPTY else f"{_content(children)}</{name}>"))


def join(*children) -> Markup:
    """Children of an element without the element."""
    return Markup(_content(children))


def breakable(name: str) -> Markup:
    """A dotted or underscored name, which a narrow page may break after these."""
    *parts, last = re.split(r"(?<=[._/])(?=.)", name)
    return join([[part, tag("wbr")] for part in parts], last)


def _content(children: Iterable) -> str:
    return "".join(map(_one, children))


def _one(child) -> str:
    if isinstance(child, Markup):
        return child
    if child is None:
        return ""
    if isinstance(child, Iterable) and not isinstance(child, str):
        return _content(child)
    return html.escape(str(child))


def table(label: str, head: Sequence, rows: Iterable[Markup], class_: str | None = None) -> Markup:
    """A table in a box of its own that scrolls where the page is narrower.

    Args:
      label: what is in it, for those who do not see it.
      head: the titles of the columns.
      rows: `tr` elements.
      class_: of the table.
    """
    titles = tag("tr", [tag("th", title, scope="col") for title in head])
    body = tag("table", tag("thead", titles), tag("tbody", rows), class_=class_)
    return tag("div", body, class_="scroll", tabindex=0, role="region", aria_label=label)


def row(title, cells: Iterable, class_: str | None = None) -> Markup:
    """A row of a table: its title, and cells that are texts or `td` elements."""
    made = [cell if isinstance(cell, Markup) and cell.startswith("<td") else tag("td", cell) for cell in cells]
    return tag("tr", tag("th", title, scope="row"), made, class_=class_)


def details(summary: str, *children) -> Markup:
    """What is shown on demand."""
    return tag("details", tag("summary", summary), *children)
