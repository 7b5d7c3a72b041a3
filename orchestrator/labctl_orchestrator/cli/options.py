"""Options that several commands share, and how they become a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.models import hub_cache, resolve
from labctl_orchestrator.request import plan, request, settings
from labctl_orchestrator.request.paths import expand_home
from labctl_orchestrator.request.plan import Plan
from labctl_orchestrator.request.request import FLAGS, KEYS, Request
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.launch import Shape
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import ENGINES
from labctl_workers.record import ModelRef

__all__ = [
    "HOW", "WHAT", "Asked", "asked", "how_options", "json_option", "overrides", "print_json", "request_options",
]  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


def _axis(*names: str, text: str, kind: Any = str) -> Callable[[F], F]:
    return click.option(*names, multiple=True, type=kind, help=f"{text} May be repeated.")


# No default is written here: a flag that is not given leaves the key to labctl.toml and the rest (labctl config tells).
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
    further: dict[str, Any] = dict(request.option_of(text, plain=True) for text in flags.pop("sbatch"))
    given = {key: value for key, value in flags.items() if value is not None}
    return request.overrides_of(Request(**given, sbatch=further))


@dataclass(frozen=True)
class Asked:
    """A request with all that it resolves to."""

    workspace: Workspace
    request: Request
    partitions: dict[str, Partition]
    plan: Plan

    @property
    def shape(self) -> Shape:
        return Shape(self.partitions, self.request.runs_per_job, self.request.jobs_at_once)


def asked(file: str | None, **flags: Any) -> Asked:
    """Check the request, resolve its partitions and models, and plan it. Raises LabctlError; writes nothing."""
    here = workspace.find() or Workspace(Path.cwd())
    tables.note_shared(here)
    known = settings.load(here)
    wanted = request.build([*known.defaults, *_file_layer(file), (FLAGS, _given(flags))])
    if not wanted.partition and not any("partition" in cell for cell in wanted.cells):
        raise WrongUseError("no partition was given", f"give --partition: {', '.join(known.names())}")
    cells = request.cells(wanted)
    overrides = request.overrides_of(wanted)
    partitions = {name: known.partition(name, overrides) for name in dict.fromkeys(cell.partition for cell in cells)}
    offline = [hub_cache.folder(partition) for partition in partitions.values() if partition.offline]
    resolved = _resolved(dict.fromkeys((cell.model_id, cell.revision) for cell in cells), offline)
    planned = plan.make_plan(wanted, partitions, resolved, plan.device_of)
    jobs = [replace(job, model=hub_cache.on_node(job.model, partitions[job.partition])) for job in planned.jobs]
    return Asked(here, wanted, partitions, Plan(jobs, planned.idle_rules))


def _file_layer(file: str | None) -> list[tuple[str, dict[str, Any]]]:
    if file is None:
        return []
    if not Path(file).is_file():
        remedy = "give a .toml file; several values of a flag are written --dtype float16 --dtype float32"
        raise WrongUseError(f"there is no request file {file}", remedy)
    values = settings.read_toml(Path(file), pipe=True)
    if isinstance(values.get("prompts"), str):  # beside the request file, wherever that is called from
        values["prompts"] = str(Path(file).parent / expand_home(values["prompts"]))
    return [(file, values)]


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as keys of a request."""
    samplings = [*flags.pop("sampling"), *_short_samplings(flags)]
    engine_options: dict[str, list[Any]] = {}
    for text in flags.pop("engine_option"):
        key, value = request.option_of(text)
        engine_options.setdefault(key, []).append(value)
    sbatch = dict(request.option_of(text, plain=True) for text in flags.pop("sbatch"))
    layer = {**flags, "sampling": samplings, "engine_options": engine_options, "sbatch": sbatch}
    return {key: value for key, value in layer.items() if key in KEYS and value not in (None, (), [], {})}


def _short_samplings(flags: dict[str, Any]) -> list[str]:
    greedy = [request.GREEDY] if flags.pop("greedy") else []
    chosen = {key: flags.pop(key) for key in ("temperature", "top_p", "seed")}
    given = {key: value for key, value in chosen.items() if value is not None}
    if not given:
        return greedy
    if "temperature" not in given:
        flag = next(iter(given)).replace("_", "-")
        raise WrongUseError(f"--{flag} without --temperature samples nothing", "add --temperature, such as 0.7")
    return [*greedy, ",".join(f"{key}={value}" for key, value in given.items())]


def _resolved(wanted: dict[tuple[str, str], None], offline_caches: Sequence[Path]) -> dict[tuple[str, str], ModelRef]:
    found = {}
    for model, revision in wanted:
        if resolve.is_folder(model):
            with tables.bytes_read(f"reading {model}") as progress:
                found[model, revision], _ = resolve.resolve(model, progress=progress)
            continue
        with tables.working(f"looking for {model}"):
            found[model, revision], warning = resolve.resolve(model, revision, offline_caches)
        if warning:
            tables.note(f"warning: {warning}")
    return found
