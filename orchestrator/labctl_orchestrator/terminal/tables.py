"""What a person sees: tables that fit the terminal, colour on a terminal alone, plain text in a pipe."""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.exchange.streams import raw, visible
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal.messages import folded

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["figure", "visible"]  # beside what is defined here
# rich is imported where something is drawn with it: in a pipe hardly anything is, and loading it takes 50 ms.
STYLES = {
    "done": "green", "running": "cyan", "pending": "yellow", "suspended": "yellow", "submitting": "yellow", "unknown": "magenta",
    "failed": "bold red", "refused": "bold red", "interrupted": "bold red", "missing": "bold red",
    "timeout": "red", "cancelled": "yellow",
}  # fmt: skip
WIDE_ENOUGH_FOR_A_PIPE = 4000


def console(stream: TextIO | None = None) -> Console:
    """rich on this stream; in a pipe nothing is cut to a width that no terminal has."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else WIDE_ENOUGH_FOR_A_PIPE
    return _cleaning_console()(file=raw(stream), width=width, highlight=False, soft_wrap=False)


@functools.cache
def _cleaning_console() -> type[Console]:
    """rich writes escape sequences of its own: its text is cleaned before they are added, and it has the stream itself."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class CleaningConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return CleaningConsole


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), title: str = "") -> None:
    """Print a table: numbers to the right, states in their colour; the last column is folded into what is left of the width.

    Where the terminal is too narrow for it, each row becomes a paragraph that names its columns: nothing is cut.
    """
    # Before the stream cleans it, for the widths.
    rows = [[visible(cell) for cell in row] for row in rows]
    columns, right, title = [*map(visible, columns)], [*map(visible, right)], visible(title)
    if not sys.stdout.isatty() and _width(columns, rows) <= WIDE_ENOUGH_FOR_A_PIPE:
        _plain_table(columns, rows, right, title)
        return
    from rich.table import Table
    from rich.text import Text

    out = console()
    if out.is_terminal:  # a column that says nothing only takes room
        kept = [place for place, column in enumerate(zip(*rows, strict=True)) if any(column)]
        columns, rows = [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]
    cells = [[Text(cell, style=STYLES.get(cell, "")) for cell in row] for row in rows]
    if _width(columns, rows) > out.width:
        _paragraphs(out, columns, cells, title)
        return
    grid = Table(
        box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left", title_style="bold"
    )
    for column in columns:
        last = column == columns[-1]
        grid.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=not last)
    for row in cells:
        grid.add_row(*row)
    if out.is_terminal:
        out.print(grid)
        return
    with out.capture() as captured:
        out.print(grid)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether `table` shows these as a table here, and not as paragraphs."""
    return _width(columns, rows) <= console().width


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], title: str) -> None:
    """As rich sets it where there is room for all; by hand, for rich needs a second for some thousand rows."""
    placed = [_placed(column, column[0] in right) for column in zip(columns, *rows, strict=True)]
    if title:
        print(title)
    print("\n".join("  ".join(line).rstrip() for line in zip(*placed, strict=True)))


def _placed(cells: Sequence[str], to_the_right: bool) -> list[str]:
    """The cells of one column, filled up to its width."""
    if all(map(str.isascii, cells)):
        width = max(map(len, cells))
        return [cell.rjust(width) if to_the_right else cell.ljust(width) for cell in cells]
    from rich.cells import cell_len

    width = max(map(cell_len, cells))
    spaces = [" " * (width - cell_len(cell)) for cell in cells]
    return [space + cell if to_the_right else cell + space for cell, space in zip(cells, spaces, strict=True)]


SPACE_FOR_THE_LAST = 24


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The least width that the table reads well in: every column whole, the last at least in part."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    longest_word = max(map(len, " ".join(row[-1] for row in rows).split()), default=0)
    last = max(min(widths[-1], SPACE_FOR_THE_LAST), longest_word)
    return sum(widths[:-1]) + 2 * (len(columns) - 1) + last


def _paragraphs(out: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]], title: str) -> None:
    from rich.padding import Padding
    from rich.text import Text

    if title:
        out.print(Text(title, style="bold"))
    for row in rows:
        first, *others = [
            Text.assemble((column, "dim"), " ", cell) for column, cell in zip(columns, row, strict=True) if cell.plain
        ]
        out.print(first)
        for line in _filled(others, out.width - 2):
            out.print(Padding(line, (0, 0, 0, 2)))


def _filled(parts: Sequence[Text], width: int) -> list[Text]:
    """The parts on as few lines as hold them, none broken that fits on a line of its own."""
    from rich.text import Text

    lines: list[Text] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] = Text.assemble(lines[-1], "  ", part)
        else:
            lines.append(part)
    return lines


def field(name: str, value: object, *, width: int = 15) -> None:
    """Print "  name   value"; on a terminal a long value is folded beside its name."""
    out = console()
    lead = f"  {name:<{width}} "
    value = str(value)
    lines = [value]
    if out.is_terminal:
        from rich.text import Text

        lines = [line.plain for line in Text(value).wrap(out, max(20, out.width - len(lead)))] or [""]
    print(lead + lines[0])
    for line in lines[1:]:
        print(" " * len(lead) + line)


def text(words: str) -> None:
    """Print running text, broken between words on a terminal, as it is in a pipe."""
    if sys.stdout.isatty():
        from rich.text import Text

        console().print(Text(words))
    else:
        print(words)


LEAST_FOR_A_COLUMN = 35
MARKS = ("[[", "]]")


def side_by_side(sides: Sequence[tuple[str, str, tuple[int, int] | None]]) -> None:
    """Print (title, text, marked part) beside one another on a terminal that is wide enough, else below one another."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    shown = [(title, _marked(words, part)) for title, words, part in sides]
    if not out.is_terminal or out.width < LEAST_FOR_A_COLUMN * len(sides):
        for title, words in shown:
            out.print(Text(title, style="bold"))
            out.print(words)
            print()
        return
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True, header_style="bold")
    for title, _ in shown:
        grid.add_column(Text(title), ratio=1, overflow="fold")
    grid.add_row(*(words for _, words in shown))
    out.print(grid)


def _marked(words: str, part: tuple[int, int] | None) -> Text:
    from rich.text import Text

    if part is None:
        return Text(words)
    begin, end = part
    opening, closing = MARKS
    marked = (f"{opening}{words[begin:end]}{closing}", "bold red")
    return Text.assemble(words[:begin], marked, words[end:])


def markdown(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), title: str = ""
) -> None:
    """Print a Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    if title:
        print(f"**{title}**\n")
    print(line(columns))
    print(line(["---:" if column in right else "---" for column in columns]))
    for row in rows:
        print(line(row))


def note(text: str) -> None:
    """A line beside the answer, on the error stream: standard output is the answer alone."""
    with suppress(BrokenPipeError):  # whoever reads them left: the answer goes on
        print(folded(text), file=sys.stderr, flush=True)


def answer(words: str) -> None:
    """Print what a model has answered; of many blank lines, how many there are."""
    text(re.sub(r"\n(?:[ \t]*\n){4,}", lambda found: f"\n[{found[0].count(chr(10)) - 1} blank lines]\n", words))


def counted(count: int, what: str) -> str:
    """ "1 run", "1,000 runs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def note_new(workspace: Workspace) -> None:
    """Say that a workspace is about to be made, where there is none."""
    if not workspace.data.is_dir():
        note(f"a new workspace: {workspace.data} keeps what is submitted from here")


def note_shared(workspace: Workspace) -> None:
    """Say who else can change what the workspace runs as you."""
    from labctl_orchestrator.preflight import trust

    if others := trust.others_who_write(workspace):
        note(f"shared workspace: {', '.join(others)} can change what runs here as you (docs/security.md)")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is going on, on a terminal, once it has taken a second; say nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    spinner = console(sys.stderr).status(what)
    timer = threading.Timer(1.0, spinner.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # or it might start the spinner after its end
        spinner.stop()


@contextmanager
def bytes_read(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to tell how many bytes of how many are done: a bar on a terminal, once it has taken a second."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console(sys.stderr), transient=True)
    task = bar.add_task(what)
    started = monotonic()

    def tell(done: int, total: int) -> None:
        if monotonic() - started > 1.0:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        bar.stop()
