"""The command line: imports a command when it is called, and turns every error into a message."""

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
from typing import TYPE_CHECKING, Any, TextIO

import click

from labctl_orchestrator.exchange.streams import cleaned_streams
from labctl_orchestrator.terminal.messages import folded

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Section of the help -> command -> (module, first line of its help). `labctl --help` prints this and imports no command.
SECTIONS = {
    "First steps": {
        "init": ("init", "Make a workspace: a folder to submit from."),
        "sites": ("sites", "List the clusters for which labctl has a profile."),
        "doctor": ("doctor", "Check Slurm, partitions, Python, disks and the Hub."),
        "env": ("env", "Show or build the Python environment of a partition."),
        "fetch": ("fetch", "Download a model from the Hub (Hugging Face)."),
        "fit": ("fit", "Check whether a model fits the GPUs of a partition."),
        "exercise": ("exercise", "Run one of six exercises, and print its answer."),
    },
    "Measure": {
        "submit": ("submit", "Submit runs to Slurm."),
        "tune": ("tune", "Find the highest request load that meets service levels."),
        "run": ("run_here", "Run one configuration here, in the foreground."),
        "render": ("render", "Print the Slurm script of a submission."),
        "reserve": ("reserve", "Reserve a node and open a shell on it."),
        "status": ("status", "Show the state of each run, and why it waits or failed."),
        "matrix": ("matrix", "Show the states of a sweep as a grid."),
        "logs": ("logs", "Print the log of a run's job."),
        "retry": ("retry", "Resubmit missing and failed runs."),
        "cancel": ("cancel", "Cancel the jobs of unfinished runs."),
    },
    "Look at results": {
        "list": ("list_", "List the submissions, newest first."),
        "show": ("show", "Show the settings and results of one run."),
        "compare": ("compare", "Compare the results of runs."),
        "report": ("report", "Write the results as one HTML page."),
        "query": ("query", "Run a read-only SQL query."),
    },
    "Share": {
        "export": ("export", "Export results as CSV, JSON, JSON lines or Parquet."),
        "bundle": ("bundle", "Pack the records of runs into one file."),
        "import": ("import_", "Import the records of other people's bundles."),
    },
    "Workspace": {
        "config": ("config", "Show each setting and its source."),
        "du": ("du", "Show disk usage by kind of file and by submission."),
        "clean": ("clean", "Remove logs and scripts of finished jobs."),
        "forget": ("forget", "Remove runs and their records for good."),
        "collect": ("collect", "Update or rebuild the database from the records."),
        "completion": ("completion", "Print the completion script of a shell."),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}
# The shell sets this variable when it calls labctl to complete a line.
COMPLETION_VARIABLE = "_LABCTL_COMPLETE"
EXIT_INTERRUPTED = 130
EXIT_DEFECT = 70
EXIT_STDOUT_CLOSED = 141  # 128 + SIGPIPE, as shells report it
OBJECTS_BETWEEN_COLLECTIONS = 2_000_000


class StdoutClosedError(Exception):
    """The reader of standard output (head, less) closed it. `code` is the command's exit code if its output was complete."""

    def __init__(self, code: int = EXIT_STDOUT_CLOSED) -> None:
        super().__init__(code)
        self.code = code


@contextlib.contextmanager
def _broken_pipe_named() -> Iterator[None]:
    """Turn a BrokenPipeError into an error with a message: click would exit with 1, as for a failure, and print nothing."""
    try:
        yield
    except BrokenPipeError as error:
        if _is_closed(sys.stdout):
            raise StdoutClosedError from error
        raise ConnectionError("output pipe closed early") from error


def _is_closed(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream, select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file, or a closed one
        return False


class LazyGroup(click.Group):
    """A group that imports a command when it is called."""

    def make_context(self, *arguments: Any, **named: Any) -> click.Context:
        with _broken_pipe_named():  # --help is printed here
            return super().make_context(*arguments, **named)

    def invoke(self, ctx: click.Context) -> Any:
        with _broken_pipe_named():
            result = super().invoke(ctx)
        try:
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise StdoutClosedError(result if isinstance(result, int) else 0) from error
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

            complete.add_candidates(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, (_, text) in commands.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False)
@click.version_option(package_name="labctl-slurm", prog_name="labctl")
def labctl() -> None:
    """Measure the speed, memory and answers of Llama-family models on a Slurm cluster, and compare the results.

    \b
    labctl submit --partition dgxh --backend hf --backend vllm
    labctl status
    labctl compare

    Without a cluster: labctl submit --partition local --wait.

    \b
    Exit codes:
      0 done                            4 Slurm unreachable or job refused
      1 a run or a doctor check failed  5 I/O error (file, database or Hub)
      2 wrong use                       6 no results yet: runs are unfinished
      3 a check before submit failed    70 defect in labctl, 130 Ctrl-C
    """


def main(arguments: list[str] | None = None) -> None:
    """The entry point. Prints one message with its remedy for every error, and exits with its code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
    # A command makes many rows and few cycles: the default threshold of 700 objects takes a third of its time.
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code. The streams remove control characters from all text."""
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
        return fail(*_usage_error(error, arguments), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("labctl: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except StdoutClosedError as error:
        # Python flushes standard output at exit and would print the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.code
    except OSError as error:
        if _cwd_is_deleted():
            return fail("the current folder was deleted", "cd to a folder that exists", EXIT_WRONG_USE)
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            from pathlib import Path  # here, so that --help starts faster

            from labctl_orchestrator.store.workspace import mount_of

            on = f" (file system {mount_of(Path(error.filename))})" if error.filename else ""
            return fail(
                f"{where}{error.strerror}{on}",
                "free space (labctl du, labctl clean), then repeat the command",
                EXIT_HINDERED,
            )
        return fail(
            f"{where}{error.strerror or error}",
            "correct this and repeat the command; all records are kept",
            EXIT_HINDERED,
        )
    except UnicodeEncodeError as error:
        return fail(
            f"not valid UTF-8: {error.object[:80]!r}",
            "use a UTF-8 locale, such as LC_ALL=C.UTF-8",
            EXIT_WRONG_USE,
        )
    except Exception as error:
        if type(error).__module__ == "sqlite3":  # most commands do not import it
            from labctl_orchestrator.store.database import cannot_be_written

            rebuild = "labctl collect --rebuild rebuilds it from the workspace's files"
            remedy = "free space (labctl du, labctl clean)" if cannot_be_written(error) else rebuild
            return fail(f"database error: {error}", remedy, EXIT_HINDERED)
        return _report_defect(error)


def _cwd_is_deleted() -> bool:
    try:
        os.getcwd()  # noqa: PTH109  Path.cwd() loads more
    except OSError:
        return True
    return False


def _usage_error(error: click.ClickException, arguments: list[str]) -> tuple[str, str]:
    """(message, remedy) for a wrong command line; the remedy names the nearest known word, or the help."""
    from labctl_slurm.errors import nearest

    context = error.ctx if isinstance(error, click.UsageError) else None
    # Of an option without its value click does not know the command.
    named = f"labctl {arguments[0]}" if arguments and arguments[0] in COMMANDS else "labctl"
    help_of = f"{context.command_path if context else named} --help"
    message = " ".join(error.format_message().split())
    unknown = re.match(r"No such command '(.*)'", message)
    if unknown:
        return f"unknown command: {unknown[1]!r}", nearest(unknown[1], COMMANDS)
    if isinstance(error, click.NoSuchOption):
        likely = _nearest_option(error.option_name, context)
        guess = f"did you mean {likely!r}? " if likely else ""
        return f"unknown option: {error.option_name}", f"{guess}{help_of} lists the options"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name = error.param.human_readable_name.upper()
        kind = name.split("|")[0].rstrip(".")
        return f"no {name} given", f"give {ARGUMENTS.get(kind, name)}: {help_of} has examples"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return _bad_value(error, error.param, help_of)
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", message)
    if extra:
        return f"too many arguments: {extra[1]}", f"see {help_of}"
    needs_value = re.fullmatch(r"Option '(.*)' requires an argument\.", message)
    if needs_value:
        return f"{needs_value[1]} needs a value", f"give it after the option; {help_of} shows its form"
    return message, f"see {help_of}"


# What a missing argument is.
ARGUMENTS = {
    "RUN": "a run id, such as 3f9a12 (labctl status lists them)", "MODEL": "a Hub id or a folder",
    "SQL": "a query in quotes", "FILE": "a file",
}  # fmt: skip


def _bad_value(error: click.BadParameter, parameter: click.Parameter, help_of: str) -> tuple[str, str]:
    """(message, remedy) for a value that click refuses."""
    name = parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name.upper()
    name = next((option for option in parameter.opts if option.startswith("--")), name)
    value = re.match(r"'(.*?)' is not ", error.message)
    wrong = f": {value[1]!r}" if value else f": {error.message}"
    kind = parameter.type
    beyond = re.match(r"(\S+) is not in the range ", error.message)
    if beyond and isinstance(kind, click.types._NumberRangeBase):
        least = f"of at least {kind.min}" if kind.max is None else f"from {kind.min} to {kind.max}"
        return f"{name} out of range: {beyond[1]}", f"give a number {least}{' (not included)' * kind.min_open}"
    if isinstance(kind, click.Choice):
        return (
            f"unknown {name}{wrong}",
            f"{'give one of' if len(kind.choices) > 1 else 'the only value is'} {', '.join(map(str, kind.choices))}",
        )
    if isinstance(kind, click.types.IntParamType | click.types.FloatParamType) and value:
        whole = isinstance(kind, click.types.IntParamType)
        return (
            f"{name} is not a {'whole ' * whole}number{wrong}",
            f"give a number, such as {name} {2 if whole else 0.5}",
        )
    return f"invalid {name}{wrong}", f"see {help_of}"


def _nearest_option(name: str, context: click.Context | None) -> str | None:
    import difflib

    parameters = context.command.params if context else []
    known = [option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)]
    words = [option.removeprefix("--") for option in known if option.startswith("--")]
    close = difflib.get_close_matches(name.removeprefix("--").replace("_", "-"), words, n=1)
    return f"--{close[0]}" if close else None


def fail(message: str, remedy: str, exit_code: int) -> int:
    """Print the message and its remedy, a line each; returns the exit code."""
    print(folded(f"labctl: {message}"), file=sys.stderr)
    if remedy:
        print(folded(f"  -> {remedy}"), file=sys.stderr)
    return exit_code


def _report_defect(error: Exception) -> int:
    import tempfile
    import traceback

    if os.environ.get("LABCTL_DEBUG"):
        traceback.print_exc()
    with tempfile.NamedTemporaryFile(
        "w", prefix="labctl-", suffix=".traceback", delete=False, encoding="utf-8"
    ) as file:
        traceback.print_exc(file=file)
    text = " ".join(str(error).split()) or "no message"
    return fail(
        f"defect in labctl: {type(error).__name__}: {text}",
        f"report it with {file.name}",
        EXIT_DEFECT,
    )
