"""What a person sees: figures that read well, tables that fit a terminal, plain and whole text in a pipe."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from labctl_orchestrator.exchange.streams import cleaned_streams
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.terminal import tables as screen
from labctl_orchestrator.terminal.statuses import since
from labctl_orchestrator.terminal.tables import figure
from labctl_workers.record import read_json, write_json

from .conftest import Labctl, Records, ago, measured

PROGRAM = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "s", "-"),
        (0, "s", "0.0 ms"),
        (0.00012, "s", "0.1 ms"),
        (0.1234, "s", "123.4 ms"),
        (0.9999, "s", "999.9 ms"),
        (1, "s", "1 s"),
        (12.3456, "s", "12.35 s"),
        (-0.5, "s", "-500.0 ms"),
        (0, "B", "0.0 MiB"),
        (5, "B", "0.0 KiB"),
        (2000, "B", "2.0 KiB"),
        (-(2**21), "B", "-2.0 MiB"),
        (5 * 2**20, "B", "5.0 MiB"),
        (2**30, "B", "1.00 GiB"),
        (2.345 * 2**30, "B", "2.35 GiB"),
        (0, "tok/s", "0 tok/s"),
        (5.8684, "tok/s", "5.868 tok/s"),
        (1234.4, "tok/s", "1234 tok/s"),
        (9999, "tok/s", "9999 tok/s"),
        (10000, "tok/s", "10,000 tok/s"),
        (1234567.8, "tok/s", "1,234,568 tok/s"),
        (128, "tok", "128 tok"),
        (3, "", "3"),
        (12345, "", "12,345"),
    ],
)
def test_a_figure_is_shown_in_the_unit_that_reads_best(value: float | None, unit: str, shown: str) -> None:
    assert figure(value, unit) == shown


def test_control_characters_are_written_out_and_lines_stay_lines() -> None:
    assert screen.visible("a\x1b[31mb\x07\r\n\tc\x9b") == "a\\x1b[31mb\\x07\\r\n\tc\\x9b"
    assert screen.visible("naïve 模型 🙂") == "naïve 模型 🙂"


def test_columns_may_have_the_same_name(capsys: pytest.CaptureFixture[str]) -> None:
    screen.table(["a", "", ""], [["1", "2", "3"]], right=[""])
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "2", "3"]


def test_no_part_of_a_table_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (screen.table, screen.markdown):
        with cleaned_streams():
            show(["a\x1b[1m", "b"], [["\x1b[2mc", "d"]], right=["a\x1b[1m"], title="\x1b[3me\u202e")
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "\u202e" not in shown
        assert "a\\x1b[1m" in shown and "\\x1b[2mc" in shown and "\\x1b[3me\\u202e" in shown


def test_no_figure_is_shown_with_an_exponent() -> None:
    assert [figure(value, "tok/s") for value in (9999.5, 9999.9)] == ["10,000 tok/s", "10,000 tok/s"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0 s"),
        (59.5, "60 s"),
        (119, "119 s"),
        (121, "2 min"),
        (3600, "60 min"),
        (7300, "2 h"),
        (172000, "48 h"),
        (172900, "2 d"),
        (86400 * 30 + 60, "30 d"),
    ],
)
def test_how_long_ago_is_said_in_the_unit_that_reads_best(seconds: float, shown: str) -> None:
    assert since(ago(seconds)) == shown


def test_no_time_is_no_words_and_a_time_to_come_is_now() -> None:
    """The clock of a node may be ahead of the login node's."""
    assert since(None) == ""
    assert since("yesterday") == since("2026-01-01T10:00:00") == ""  # of a file that somebody changed
    assert since(ago(-300)) == "0 s"


# ---------------------------------------------------------------- in a pipe


LONG = "x" * 300


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    screen.table(["first", "second", "third"], [[LONG, LONG, f"{LONG} {LONG}"], ["a", "b", "c"]], title="a title")
    title, head, first, second = capsys.readouterr().out.splitlines()
    assert title.strip() == "a title"
    assert head.split() == ["first", "second", "third"]
    assert first.split() == [LONG] * 4
    assert second.split() == ["a", "b", "c"]


def test_a_table_shows_a_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """rich has a markup of its own, and words that it would colour."""
    texts = ["[bold]x[/bold]", "[/]", ":smile:", "http://x.y/z?a=1", "None 12 'a'", "ünï 🙂"]
    screen.table(["what", "why"], [[text, text] for text in texts])
    shown = capsys.readouterr().out
    assert all(shown.count(text) == 2 for text in texts)


def test_a_table_without_rows_is_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    screen.table(["first", "second"], [])
    assert capsys.readouterr().out.split() == ["first", "second"]


def test_numbers_are_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    screen.table(["name", "median", "run"], [["a", "1", "x"], ["b", "100", "y"]], right=["median"])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "name  median  run",
        "a          1  x",
        "b        100  y",
    ]


def test_notes_go_beside_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    screen.note("by the way")
    assert capsys.readouterr() == ("", "by the way\n")


def workspace_with_every_state(records: Records) -> None:
    failed = records.submit("1000", lengths=(8,))
    records.failed(failed, records.attempt(failed))
    records.states(failed, state="FAILED", exit_code="1:0", ended_at=ago(60))
    done = records.submit("2000", lengths=(16,))
    records.done(done, records.attempt(done, slurm_id="2000"))
    pending = records.submit("3000", lengths=(32,))
    records.states(pending, state="PENDING", reason="ReqNodeNotAvail, UnavailableNodes:dgxh-[1-4]")
    submission_id = records.request(lengths=(64,))
    refused_batch = records.prepare(lengths=(64,))
    records.intend(refused_batch, submission_id)
    records.refuse(refused_batch, "Slurm refused the job: Invalid account or account/partition combination specified")


def test_the_states_in_a_pipe_are_whole_and_without_colour(labctl: Labctl, records: Records) -> None:
    workspace_with_every_state(records)
    ran = labctl("status", "--all")
    assert "\x1b" not in ran.out + ran.err
    head, *lines = ran.out.splitlines()
    assert head.split() == ["run", "state", "where", "settings", "job", "since", "reason"]
    assert len(lines) == 4
    for state in ("failed", "done", "pending", "refused"):
        assert sum(f" {state} " in line for line in lines) == 1
    assert "combination specified" in ran.out
    assert ran.err.count("  -> ask otherwise\n") == 1


# ---------------------------------------------------------------- on a terminal


def on_a_terminal(arguments: list[str], width: int, **environment: str) -> tuple[int, str]:
    """Run labctl with a terminal of this width as standard output: (exit code, what it printed there)."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width), **environment},
    )
    os.close(slave)
    printed = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(master)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
    return process.returncode, printed.decode()


def lines_of(printed: str) -> list[str]:
    return ANSI.sub("", printed).replace("\r\n", "\n").splitlines()


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("command", ["status", "compare"])
def test_every_line_fits_the_terminal(records: Records, width: int, command: str) -> None:
    workspace_with_every_state(records)
    code, printed = on_a_terminal([command, "--all"], width)
    assert code == 0
    tables = [line for line in lines_of(printed) if not line.startswith("text, ")]  # a text wraps by itself
    assert tables
    assert [line for line in tables if len(line) > width] == []


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_ids_states_and_reasons_can_be_read_at_every_width(records: Records, width: int) -> None:
    """A reason may be folded; it may not be left out, and a word that is typed again must be whole."""
    workspace_with_every_state(records)
    _, printed = on_a_terminal(["status", "--all"], width)
    shown = "\n".join(lines_of(printed))
    assert len(re.findall(r"\b[0-9a-f]{12}\b", shown)) == 4
    for word in ("failed", "done", "pending", "refused"):
        assert re.search(rf"\b{word}\b", shown)
    for word in ("CUDA", "ReqNodeNotAvail,", "combination"):
        assert word in shown


def test_states_are_coloured_on_a_terminal_and_not_with_no_color(records: Records) -> None:
    workspace_with_every_state(records)
    coloured = on_a_terminal(["status", "--all"], 200)[1]
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m *failed", coloured)
    plain = on_a_terminal(["status", "--all"], 200, NO_COLOR="1")[1]
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)
    words = [re.sub(r"\d+ s ", "", line).split() for line in lines_of(plain)]  # a second may have passed
    assert words == [re.sub(r"\d+ s ", "", line).split() for line in lines_of(coloured)]


def test_a_terminal_that_can_do_nothing_gets_plain_text(records: Records) -> None:
    workspace_with_every_state(records)
    assert "\x1b" not in on_a_terminal(["status", "--all"], 80, TERM="dumb")[1]


@pytest.mark.parametrize("command", [[], ["submit"], ["status"], ["compare"]])
def test_help_fits_a_terminal_of_80_columns(workspace: Workspace, command: list[str]) -> None:
    """click folds at 50 and wider; examples are one line each."""
    code, printed = on_a_terminal([*command, "--help"], 80)
    assert code == 0
    kept = [line for line in lines_of(printed) if not line.lstrip().startswith("labctl ")]
    assert [line for line in kept if len(line) > 80] == []


FOREIGN = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202e"
SHOWN = "\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202e"


def with_foreign_text(records: Records) -> str:
    """A run whose record, failure and logs hold what would change a terminal; its id."""
    batch = records.submit("700", lengths=(8, 16), name=FOREIGN)
    done, failed = batch.runs
    attempt = records.attempt(batch, slurm_id="700")
    records.done(batch, attempt, done, repeats=[measured(0, text=FOREIGN)])
    record = records.failed(batch, attempt, failed)
    document = read_json(record)
    document["failure"] = {"kind": FOREIGN, "message": FOREIGN, "remedy": FOREIGN, "traceback": ""}
    write_json(record, document)
    logs = batch.folder / "submitit"
    logs.mkdir()
    for end in ("out", "err"):
        (logs / f"700_0_log.{end}").write_text(f"{FOREIGN}\n 10%\r 20%\n", encoding="utf-8")
    records.states(batch, state="COMPLETED")
    return failed.run_id


@pytest.mark.parametrize("command", ["show", "logs", "status", "export", "query", "json"])
def test_foreign_text_leaves_a_terminal_as_it_is(records: Records, command: str) -> None:
    run_id = with_foreign_text(records)
    arguments = {
        "show": ["show", run_id], "logs": ["logs", run_id], "status": ["status", "--all"],
        "export": ["export", "--table", "failures"], "query": ["query", "--csv", "SELECT text FROM texts"],
        "json": ["query", "--json", "SELECT text FROM texts"],
    }[command]  # fmt: skip
    code, printed = on_a_terminal(arguments, 200)
    assert code == 0
    foreign = re.sub(r"\x1b\[[0-9;]*m", "", printed.replace("\x1b[31mred", "FOREIGN"))
    assert not re.search("FOREIGN|\x1b|\x07|\x9b|\u202e|\r(?!\n)", foreign)
    assert "title" in printed


def test_a_pipe_gets_a_log_and_data_as_they_are_and_text_for_people_cleaned(labctl: Labctl, records: Records) -> None:
    run_id = with_foreign_text(records)
    assert f"{FOREIGN}\n 10%\r 20%\n" in labctl("logs", run_id).out
    assert FOREIGN in labctl("query", "--csv", "SELECT text FROM texts").out
    assert labctl("query", "--json", "SELECT text FROM texts").json == [{"text": FOREIGN}]
    shown = labctl("show", run_id).out
    assert SHOWN in shown and FOREIGN not in shown


def test_many_blank_lines_of_an_answer_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    screen.answer("one\n\ntwo" + "\n" * 81 + "three")
    assert capsys.readouterr().out == "one\n\ntwo\n[80 blank lines]\nthree\n"
