"""Tables and texts that fit the terminal; colour on a terminal only, plain text in a pipe."""

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

__all__ = ["figure", "visible"]  # re-exported
# Functions import rich themselves: it takes 50 ms to load, and output in a pipe hardly needs it.
STYLES = {
    "done": "green", "running": "cyan", "pending": "yellow", "suspended": "yellow", "submitting": "yellow", "unknown": "magenta",
    "failed": "bold red", "refused": "bold red", "interrupted": "bold red", "missing": "bold red",
    "timeout": "red", "cancelled": "yellow",
}  # fmt: skip
PIPE_WIDTH = 4000


def console(stream: TextIO | None = None) -> Console:
    """A rich console on this stream; in a pipe so wide that nothing is cut."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return _cleaning_console()(file=raw(stream), width=width, highlight=False, soft_wrap=False)


@functools.cache
def _cleaning_console() -> type[Console]:
    """A rich console that removes control characters from text before rich adds its own escape sequences."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class CleaningConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(visible(segment.text), segment.style)

    return CleaningConsole


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), title: str = "") -> None:
    """Print a table: columns of `right` aligned right, states coloured, the last column wrapped into the remaining width.

    On a terminal that is too narrow, print each row as a paragraph that names its columns. Nothing is cut.
    """
    # The widths depend on the cleaned text.
    rows = [[visible(cell) for cell in row] for row in rows]
    columns, right, title = [*map(visible, columns)], [*map(visible, right)], visible(title)
    if not sys.stdout.isatty():
        _plain_table(columns, rows, right, title)
        return
    from rich.table import Table
    from rich.text import Text

    out = console()
    kept = [place for place, column in enumerate(zip(*rows, strict=True)) if any(column)]  # leave empty columns out
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
    out.print(grid)


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether `table` would print a table here, not paragraphs."""
    return _width(columns, rows) <= console().width


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], title: str) -> None:
    """The same layout as rich's, without rich, which needs a second for some thousand rows."""
    padded = [_padded(column, column[0] in right) for column in zip(columns, *rows, strict=True)]
    if title:
        print(title)
    print("\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True)))


def _padded(cells: Sequence[str], to_the_right: bool) -> list[str]:
    """The cells of one column, padded to its width."""
    if all(map(str.isascii, cells)):
        width = max(map(len, cells))
        return [cell.rjust(width) if to_the_right else cell.ljust(width) for cell in cells]
    from rich.cells import cell_len

    width = max(map(cell_len, cells))
    spaces = [" " * (width - cell_len(cell)) for cell in cells]
    return [space + cell if to_the_right else cell + space for cell, space in zip(cells, spaces, strict=True)]


LEAST_LAST_COLUMN = 24


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """The least width for a readable table: all columns whole, the last one wrapped."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    longest_word = max(map(len, " ".join(row[-1] for row in rows).split()), default=0)
    last = max(min(widths[-1], LEAST_LAST_COLUMN), longest_word)
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
    """The parts on as few lines as possible; a part is broken only if it is wider than a line."""
    from rich.text import Text

    lines: list[Text] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] = Text.assemble(lines[-1], "  ", part)
        else:
            lines.append(part)
    return lines


def field(name: str, value: object, *, width: int = 15) -> None:
    """Print "  name   value"; on a terminal, wrap a long value in its own column."""
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
    """Print running text: wrapped on a terminal, unchanged in a pipe."""
    if sys.stdout.isatty():
        from rich.text import Text

        console().print(Text(words))
    else:
        print(words)


LEAST_COLUMN = 35
MARKS = ("[[", "]]")


def side_by_side(sides: Sequence[tuple[str, str, tuple[int, int] | None]]) -> None:
    """Print (title, text, marked range) side by side on a wide terminal, else one below the other."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    shown = [(title, _marked(words, part)) for title, words, part in sides]
    if not out.is_terminal or out.width < LEAST_COLUMN * len(sides):
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
    """Print a line to standard error; standard output holds the answer only."""
    with suppress(BrokenPipeError):  # a closed stderr must not stop the answer
        print(folded(text), file=sys.stderr, flush=True)


def answer(words: str) -> None:
    """Print a model's answer; four or more blank lines become their number."""
    text(re.sub(r"\n(?:[ \t]*\n){4,}", lambda found: f"\n[{found[0].count(chr(10)) - 1} blank lines]\n", words))


def counted(count: int, what: str) -> str:
    """ "1 run", "1,000 runs"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def note_new(workspace: Workspace) -> None:
    """Announce a new workspace before it is made."""
    if not workspace.data.is_dir():
        note(f"new workspace: {workspace.data}")


def note_shared(workspace: Workspace) -> None:
    """Warn about other users who can change files that this workspace runs as you."""
    from labctl_orchestrator.preflight import trust

    if others := trust.others_who_write(workspace):
        note(f"shared workspace: {', '.join(others)} can change files that run as you (docs/security.md)")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on a terminal after a second; print nothing in a pipe."""
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
        timer.join()  # else it might start the spinner after the stop
        spinner.stop()


@contextmanager
def bytes_read(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) bytes that draws a progress bar on a terminal after a second."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console(sys.stderr), transient=True)
    task = bar.add_task(what)
    started = monotonic()

    def update(done: int, total: int) -> None:
        if monotonic() - started > 1.0:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        bar.stop()
