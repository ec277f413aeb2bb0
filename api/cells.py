"""Tables and the text in them, as all views of the command line have them."""

from rich import box
from rich.table import Column, Table
from rich.text import Text

from .words import plain


def text(content: str, style: str = "") -> Text:
    """Return text that came from elsewhere: never markup, and without control characters."""
    return Text(plain(content), style)


def table(*columns: Column) -> Table:
    made = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    made.show_edge = made.pad_edge = False
    return made


def right(heading: str) -> Column:
    """Return a column of figures."""
    return Column(text(heading), no_wrap=True, justify="right")
