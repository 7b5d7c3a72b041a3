"""Options that several commands share, and how they become a prepared submission."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from labctl_orchestrator.request import engine_options, settings
from labctl_orchestrator.request.request import FLAGS, KEYS, build
from labctl_orchestrator.request.sampling import GREEDY
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.submit import Prepared, prepare
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError
from labctl_workers.engines import ENGINES

F = TypeVar("F", bound=Callable[..., Any])


def _axis(*names: str, text: str, kind: Any = str) -> Callable[[F], F]:
    return click.option(*names, multiple=True, type=kind, help=f"{text} May be repeated.")


# No default is written here: where a flag is not given, labctl.toml and the other settings count (labctl config).
WHAT = (
    _axis("-p", "--partition", "partition", text="Where to run: dgx2, dgxh, local, or one of yours."),
    _axis("--backend", "backend", text=f"The engine: {', '.join(ENGINES)}."),
    _axis("--model-id", "model_id", text="A hub id, or the folder of a checkpoint."),
    _axis("--revision", "revision", text="A hub model's branch, tag or commit."),
    _axis("--dtype", "dtype", text="auto, float16, bfloat16 or float32; auto is the partition's."),
    _axis("--gpus", "gpus", kind=int, text="GPUs of a job: two, as shipped."),
    _axis("--engine-option", "engine_option", text="KEY=VALUE for the engine."),
    click.option("--prompt", help="The text to answer."),
    click.option("--prompts", metavar="FILE", help="A prompt on each line; or JSON, or a CSV with a column prompt."),
    click.option("--raw-prompt/--chat", "raw_prompt", default=None, help="Leave the model's chat template out."),
    _axis("--max-new-tokens", "--max-tokens", "max_new_tokens", kind=int, text="Longest answer, in tokens."),
    _axis("--batch-size", "batch_size", kind=int, text="Requests in flight at once."),
    _axis("--sampling", "sampling", text="greedy, or such as temperature=0.7,top_p=0.9,seed=1."),
    click.option("--greedy", is_flag=True, help="Short for --sampling greedy."),
    click.option("--temperature", type=float, help="With --top-p and --seed, short for --sampling."),
    click.option("--top-p", type=float, help="Share of the probability to sample from."),
    click.option("--seed", type=int, help="Each repeat draws with a hash of seed and repeat [0]."),
    click.option("--ignore-eos/--stop-at-eos", "ignore_eos", default=None, help="Generate the full length, always."),
    click.option("--request-rate", type=float, help="Requests come at this mean rate a second, at random (Poisson)."),
    click.option("--requests", type=int, help="Requests of a pass: the prompts, again and again."),
    click.option("--runs-per-job", type=int, help="Most runs that share a job and its engine load."),
    click.option("--jobs-at-once", type=int, help="Most jobs of one array (of a partition) that run at the same time."),
    click.option("--loads", type=int, help="Engine loads in which each run is measured [1]."),
    click.option("--repeats", type=int, help="Measured passes of each run, in each engine load."),
    click.option("--warmup", type=int, help="Passes before them, not measured."),
    click.option("--name", help="A name for this request, to find it by."),
)
HOW = (
    click.option("-A", "--account", help="The Slurm account."),
    click.option("-t", "--time", help="The time limit, such as 0-01:00:00."),
    click.option("--mem", help="Memory of the node, such as 64G."),
    click.option("--qos", help="The quality of service."),
    click.option("--constraint", help="Features that the node must have."),
    click.option("--sbatch", multiple=True, metavar="KEY[=VALUE]", help="Any further sbatch option. May be repeated."),
)


def request_options(command: F) -> F:
    """The options that make a request, and a request file."""
    for option in reversed((*WHAT, *HOW)):
        command = option(command)
    return click.argument("file", required=False, metavar="[REQUEST.toml]")(command)


def how_options(command: F) -> F:
    """The options that say how Slurm is asked: account, time, memory ..."""
    for option in reversed(HOW):
        command = option(command)
    return command


def overrides(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of `how_options` as keys of a partition. Raises WrongUseError for what is no KEY=VALUE."""
    return build([(FLAGS, _given(flags))]).overrides


def here() -> Workspace:
    """The workspace to submit from; a new one in the current folder where there is none."""
    found = workspace.find() or Workspace(Path.cwd())
    tables.note_shared(found)
    return found


def prepared(file: str | None, flags: dict[str, Any], *, again: bool = False, check: bool = True) -> Prepared:
    """What is asked for, resolved, packed into jobs and checked. Raises LabctlError; writes nothing."""
    layers = [settings.request_file(file)] if file else []
    found = prepare(here(), [*layers, (FLAGS, _given(flags))], again=again, check=check, reading=tables.bytes_read)
    for warning in found.warnings:
        tables.note(f"warning: {warning}")
    return found


@contextlib.contextmanager
def ctrl_c(handler: Any) -> Iterator[None]:
    """What Ctrl-C does meanwhile: signal.SIG_IGN leaves it to the child process."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as keys of a request."""
    options: dict[str, list[Any]] = {}
    for key, value in map(engine_options.parse, flags.get("engine_option", ())):
        options.setdefault(key, []).append(value)
    layer = {
        **flags,
        "sampling": [*flags.get("sampling", ()), *_short_samplings(flags)],
        "engine_options": options,
        "sbatch": dict(map(engine_options.parse_sbatch, flags["sbatch"])),
    }
    return {key: value for key, value in layer.items() if key in KEYS and value not in (None, (), [], {})}


def _short_samplings(flags: dict[str, Any]) -> list[str]:
    greedy = [GREEDY] if flags.get("greedy") else []
    given = {key: value for key in ("temperature", "top_p", "seed") if (value := flags.get(key)) is not None}
    if not given:
        return greedy
    if "temperature" not in given:
        flag = next(iter(given)).replace("_", "-")
        raise WrongUseError(f"--{flag} without --temperature samples nothing", "add --temperature, such as 0.7")
    return [*greedy, ",".join(f"{key}={value}" for key, value in given.items())]
