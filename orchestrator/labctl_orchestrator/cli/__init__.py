"""The command line: commands loaded when they are called, and the one place where an error becomes a message."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import os
import re
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from labctl_orchestrator.exchange.streams import cleaned_streams
from labctl_orchestrator.terminal.messages import folded

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Command -> (module, what it does). The help of `labctl` itself is written from this table, so that it imports no command.
COMMANDS = {
    "submit": ("submit", "Ask a question: plan its runs and submit their jobs."),
    "fit": ("fit", "Tell whether a model fits a partition's GPUs, before it is queued."),
    "status": ("status", "Tell where each run stands, and why."),
    "matrix": ("matrix", "Show a sweep as a grid: which cells are done, run, wait, failed or are missing."),
    "retry": ("retry", "Resubmit missing and failed runs."),
    "cancel": ("cancel", "Cancel the jobs of runs that have not ended."),
    "compare": ("compare", "Compare what was measured."),
    "report": ("report", "Write what was measured as one HTML page, to be looked at and shown."),
    "show": ("show", "Show one run: what was asked, what came back."),
    "exercise": ("exercise", "Run one of the handout's five exercises, and answer it."),
    "query": ("query", "Ask the database in SQL; it can be read in no other way here, so nothing can be spoilt."),
    "export": ("export", "Write what was measured as CSV, JSON, JSON lines or Parquet."),
    "bundle": ("bundle", "Put a sweep's records in one file, for somebody else's labctl."),
    "import": ("import_", "Take in somebody's bundle, to compare it with your own."),
    "logs": ("logs", "Print the log of a run's job."),
    "run": ("run_here", "Run one cell here and now, inside an allocation."),
    "render": ("render", "Print the Slurm script of a request, without submitting it."),
    "init": ("init", "Make a workspace: a folder to submit from, with what Slurm says of the site."),
    "doctor": ("doctor", "Check what a job will need: Slurm, the partition, its Python, disks, the hub."),
    "reserve": ("reserve", "Reserve a node and open a shell on it."),
    "fetch": ("fetch", "Download a hub model on the login node, for nodes that have no way out."),
    "env": ("env", "Tell which environment fits a partition's GPU, and why; build it with --create."),
    "config": ("config", "Show each setting and where it came from."),
    "du": ("du", "Tell what takes a workspace's space, by kind and by request: bytes on disk."),
    "clean": ("clean", "Remove logs, pickles and scripts of finished work; never a record."),
    "collect": ("collect", "Take new records into the database, or make it again."),
    "completion": (
        "completion",
        "Print what a shell needs to complete labctl's commands, options and values with the Tab key.",
    ),
}
# A shell sets it and calls labctl to ask what may follow.
COMPLETION_VARIABLE = "_LABCTL_COMPLETE"
EXIT_INTERRUPTED = 130
EXIT_UNFORESEEN = 70
EXIT_READER_GONE = 141  # as a shell says it of a program that SIGPIPE ended
OBJECTS_BETWEEN_COLLECTIONS = 2_000_000


class ReaderIsGoneError(Exception):
    """Whoever read standard output (head, less) has enough of it. `code` is the command's own where it had told all."""

    def __init__(self, code: int = EXIT_READER_GONE) -> None:
        super().__init__(code)
        self.code = code


@contextlib.contextmanager
def _telling_a_gone_reader() -> Iterator[None]:
    """Click would end with 1 without a word, as for a failure; a pipe that is not standard output is for others to tell."""
    try:
        yield
    except BrokenPipeError as error:
        if _is_gone(sys.stdout):
            raise ReaderIsGoneError from error
        raise ConnectionError("the reader of a pipe left before it had all") from error


def _is_gone(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file, or a closed one
        return False


class LazyGroup(click.Group):
    """A group whose commands are imported when one of them is called."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        with _telling_a_gone_reader():  # --help is printed here
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: click.Context) -> Any:
        with _telling_a_gone_reader():
            result = super().invoke(ctx)
        try:
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise ReaderIsGoneError(result if isinstance(result, int) else 0) from error
        return result

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"labctl_orchestrator.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        if COMPLETION_VARIABLE in os.environ:
            from labctl_orchestrator.cli import complete

            complete.offer(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False)
@click.version_option(package_name="labctl-slurm", prog_name="labctl")
def labctl() -> None:
    """Run Llama-family models on two GPUs of a Slurm cluster, with transformers or vLLM, and compare.

    \b
    labctl submit --partition dgxh --backend hf --backend vllm
    labctl status
    labctl compare

    Without a cluster: labctl submit --partition local --wait.

    \b
    Exit codes: 0 done                      4 Slurm unreachable, or it refused the job
                1 a run failed (--wait)     5 I/O error (file, database or Hub)
                2 wrong use                 70 defect in labctl
                3 refused by preflight      130 Ctrl-C
    """


def main(arguments: list[str] | None = None) -> None:
    """The entry point: every error leaves as one message with its remedy and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it; what takes its place is open as long as the process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    # A command makes many rows and hardly a cycle: looking for cycles at every 700 objects takes a third of its time.
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code. Foreign text is cleaned here, at the streams, and nowhere else."""
    with cleaned_streams():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    from labctl_slurm.errors import EXIT_HINDERED, EXIT_WRONG_USE, LabctlError

    try:
        result: Any = labctl(arguments or ["--help"], prog_name="labctl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LabctlError as error:
        return fail(error.message, error.remedy, error.exit_code)
    except click.ClickException as error:
        return fail(*_told(error, arguments), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("labctl: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ReaderIsGoneError as error:
        # Python would complain of it again when it flushes at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.code
    except OSError as error:
        if _folder_is_gone():
            return fail("the current folder was deleted", "cd to a folder that exists", EXIT_WRONG_USE)
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            from labctl_orchestrator.store.workspace import mount_of

            on = f" (file system {mount_of(Path(error.filename))})" if error.filename else ""
            return fail(
                f"{where}{error.strerror}{on}", "free space (labctl du, labctl clean) and try again", EXIT_HINDERED
            )
        return fail(
            f"{where}{error.strerror or error}",
            "mend that and try again; nothing that was recorded is lost",
            EXIT_HINDERED,
        )
    except UnicodeEncodeError as error:
        return fail(
            f"{error.object[:80]!r} has bytes that are no UTF-8",
            "type it in UTF-8, in a locale like C.UTF-8",
            EXIT_WRONG_USE,
        )
    except Exception as error:
        if type(error).__module__ == "sqlite3":  # not imported for a command that needs none
            from labctl_orchestrator.store.database import cannot_be_written

            if cannot_be_written(error):
                return fail(f"the database: {error}", "free space (labctl du, labctl clean)", EXIT_HINDERED)
            return fail(
                f"the database: {error}",
                "labctl collect --rebuild makes it again from the workspace's files",
                EXIT_HINDERED,
            )
        return _unforeseen(error)


def _folder_is_gone() -> bool:
    try:
        os.getcwd()  # noqa: PTH109  Path.cwd() loads more
    except OSError:
        return True
    return False


def _told(error: click.ClickException, arguments: list[str]) -> tuple[str, str]:
    """What is wrong with a command line, and the nearest right word, else where the right ones are listed."""
    from labctl_slurm.errors import nearest

    context = error.ctx if isinstance(error, click.UsageError) else None
    # An option that wants a value complains before click knows whose it is.
    named = f"labctl {arguments[0]}" if arguments and arguments[0] in COMMANDS else "labctl"
    help_of = f"{context.command_path if context else named} --help"
    message = " ".join(error.format_message().split())
    unknown = re.match(r"No such command '(.*)'", message)
    if unknown:
        return f"there is no command {unknown[1]!r}", nearest(unknown[1], COMMANDS)
    if isinstance(error, click.NoSuchOption):
        likely = _nearest_option(error.option_name, context)
        remedy = f"did you mean {likely!r}? {help_of} lists them" if likely else f"{help_of} lists them"
        return f"there is no option {error.option_name}", remedy
    return message, f"{help_of} shows how"


def _nearest_option(name: str, context: click.Context | None) -> str | None:
    import difflib

    parameters = context.command.params if context else []
    known = [option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)]
    close = difflib.get_close_matches(
        name.replace("_", "-"), [option for option in known if option.startswith("--")], n=1
    )
    return close[0] if close else None


def fail(message: str, remedy: str, exit_code: int) -> int:
    """Say what is wrong, and what to do, on one line each."""
    print(folded(f"labctl: {message}"), file=sys.stderr)
    if remedy:
        print(folded(f"  -> {remedy}"), file=sys.stderr)
    return exit_code


def _unforeseen(error: Exception) -> int:
    import tempfile
    import traceback

    if os.environ.get("LABCTL_DEBUG"):
        traceback.print_exc()
    with tempfile.NamedTemporaryFile(
        "w", prefix="labctl-", suffix=".traceback", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exc(file=file)
    said = " ".join(str(error).split()) or "no message"
    return fail(
        f"an error in labctl itself: {type(error).__name__}: {said}",
        f"please report it with {file.name}",
        EXIT_UNFORESEEN,
    )
