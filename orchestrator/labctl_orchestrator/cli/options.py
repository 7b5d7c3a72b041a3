"""Options that several commands share, and the prepared submission made from them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from labctl_orchestrator.request import engine_options, settings
from labctl_orchestrator.request.request import FLAGS, KEYS, SubmissionSpec, build
from labctl_orchestrator.request.sampling import GREEDY
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.submit import PreparedSubmission, prepare
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError
from labctl_workers.engines import ENGINES
from labctl_workers.record import DTYPES

F = TypeVar("F", bound=Callable[..., Any])


def _axis(*names: str, metavar: str, text: str, kind: Any = str) -> Callable[[F], F]:
    """An option that can be repeated; the dots of its metavar show it."""
    return click.option(*names, multiple=True, type=kind, metavar=f"{metavar}...", help=text)


def _default(key: str) -> str:
    """The end of a help: the built-in default of a key. `labctl config` shows the one of this workspace."""
    value = getattr(SubmissionSpec(), key)
    return f"  [default: {value[0] if isinstance(value, tuple) else value}]"


# Without click's defaults: an absent flag leaves the choice to labctl.toml and the other settings (labctl config).
RUN_OPTIONS = (
    _axis(
        "-p",
        "--partition",
        "partition",
        metavar="NAME",
        text="Partition: dgx2, dgxh, local, or a name from labctl.toml.",
    ),
    _axis("--backend", "backend", metavar="NAME", text=f"Backend: {', '.join(ENGINES)}.{_default('backend')}"),
    _axis(
        "--model-id", "model_id", metavar="ID", text="Hub model id, or folder of a checkpoint.  [default: TinyLlama]"
    ),
    _axis(
        "--revision",
        "revision",
        metavar="NAME",
        text=f"Branch, tag or commit of a Hub model.{_default('revision')}",
    ),
    _axis(
        "--dtype",
        "dtype",
        metavar="DTYPE",
        text=f"{', '.join(DTYPES)}, or auto: the partition's dtype.{_default('dtype')}",
    ),
    _axis("--gpus", "gpus", kind=int, metavar="N", text="GPUs per job.  [default: the partition's, usually 2]"),
    _axis(
        "--parallel",
        "parallel",
        metavar="HOW",
        text="vLLM: tensor, pipeline, data, or sizes such as tensor=4,pipeline=2.  [default: tensor]",
    ),
    _axis(
        "--engine-option",
        "engine_option",
        metavar="KEY=VALUE",
        text="Option of the engine, such as compile=false (docs/backends.md).",
    ),
    click.option("--prompt", help="Prompt text.  [default: a question about tensor parallelism]"),
    click.option("--prompts", metavar="FILE", help="Prompt file: one per line, JSON, or CSV with a column prompt."),
    click.option(
        "--raw-prompt/--chat",
        "raw_prompt",
        default=None,
        help="Send prompts unchanged, or in the model's chat template.  [default: chat]",
    ),
    _axis(
        "--max-new-tokens",
        "--max-tokens",
        "max_new_tokens",
        kind=int,
        metavar="N",
        text=f"Maximum tokens per answer.{_default('max_new_tokens')}",
    ),
    click.option("--serve", is_flag=True, help="Send the requests over HTTP to the engine's own server."),
    click.option("--offline", is_flag=True, help="With --serve: measure the same runs without a server too."),
    _axis("--lengths", "lengths", metavar="IN/OUT", text="Exact --input-len and --output-len as a pair: 1024/128."),
    _axis(
        "--input-len",
        "input_len",
        metavar="N",
        text="Exact tokens per prompt, which is random; or mean=1024,std=100,min=1,max=2048.",
    ),
    _axis("--output-len", "output_len", metavar="N", text="Exact tokens per answer, as for --input-len."),
    _axis("--prefix-len", "prefix_len", kind=int, metavar="N", text="First tokens that all random prompts share."),
    _axis(
        "--dataset",
        "dataset",
        metavar="FILE",
        text="Dataset: ShareGPT's JSON, JSON lines with prompts or messages, or a trace.",
    ),
    _axis(
        "--batch-size",
        "--concurrency",
        "batch_size",
        kind=int,
        metavar="N",
        text="Maximum number of concurrent requests.  [default: 1]",
    ),
    _axis(
        "--sampling",
        "sampling",
        metavar="HOW",
        text=f"greedy, or a list such as temperature=0.7,top_p=0.9,seed=1.{_default('sampling')}",
    ),
    click.option("--greedy", is_flag=True, help="Same as --sampling greedy."),
    click.option("--temperature", type=float, help="Sampling temperature; short for --sampling temperature=..."),
    click.option("--top-p", type=float, help="Sample from the most likely tokens up to this total probability."),
    click.option(
        "--seed",
        type=int,
        help="Random seed of prompts, lengths and tokens; repeats derive theirs from it.  [default: 0]",
    ),
    click.option(
        "--ignore-eos/--stop-at-eos",
        "ignore_eos",
        default=None,
        help="Continue after the model's end token, or stop there.  [default: stop]",
    ),
    _axis(
        "--request-rate",
        "request_rate",
        kind=float,
        metavar="R",
        text="Mean number of requests per second, at random times.  [default: all at once]",
    ),
    click.option(
        "--burstiness", type=float, help="Arrivals in bursts (below 1) or evenly (above 1).  [default: 1, Poisson]"
    ),
    click.option(
        "--requests",
        type=int,
        help="Requests per repeat; prompts are reused in turn.  [default: one per prompt]",
    ),
    _axis("--slo", "slo", metavar="LEVEL", text="Service level for goodput, such as 'ttft_p99<500ms'."),
    click.option(
        "--runs-per-job", type=int, help="Maximum number of runs that share a job.  [default: as many as fit its time]"
    ),
    click.option(
        "--jobs-at-once", type=int, help="Maximum number of jobs of an array that run at once.  [default: no limit]"
    ),
    click.option("--loads", type=int, help=f"Number of engine loads in which each run is measured.{_default('loads')}"),
    click.option("--repeats", type=int, help=f"Measured repeats of each run per engine load.{_default('repeats')}"),
    click.option(
        "--until",
        metavar="PERCENT",
        help="Repeat until the 95% interval of the mean throughput is within this, such as 1%.",
    ),
    click.option("--max-repeats", type=int, help=f"Maximum number of repeats with --until.{_default('max_repeats')}"),
    click.option("--warmup", type=int, help=f"Unmeasured repeats before the measured ones.{_default('warmup')}"),
    click.option("--name", help="Name of the submission."),
    click.option("--note", help="Note on the submission, for labctl list and labctl show."),
)
SLURM_OPTIONS = (
    click.option("-A", "--account", help="Slurm account."),
    click.option("-t", "--time", help="Time limit, such as 0-01:00:00."),
    click.option("--mem", help="Memory per node, such as 64G."),
    click.option("--qos", help="Quality of service."),
    click.option("--constraint", help="Required node features."),
    click.option("--sbatch", multiple=True, metavar="KEY[=VALUE]...", help="Any other sbatch option."),
)


def submission_options(command: F) -> F:
    """The options of a submission, and a submission file."""
    for option in reversed((*RUN_OPTIONS, *SLURM_OPTIONS)):
        command = option(command)
    return click.argument("file", required=False, metavar="[SUBMISSION.toml]")(command)


def slurm_options(command: F) -> F:
    """The options of a Slurm job: account, time, memory ..."""
    for option in reversed(SLURM_OPTIONS):
        command = option(command)
    return command


def overrides(flags: dict[str, Any]) -> Mapping[str, object]:
    """The flags of `slurm_options` as keys of a partition. Raises WrongUseError for a malformed KEY=VALUE."""
    return build([(FLAGS, _given(flags))]).overrides


def here() -> Workspace:
    """The workspace to submit from; by default a new one in the current folder."""
    found = workspace.find() or Workspace(Path.cwd())
    tables.note_shared(found)
    return found


def prepared(
    file: str | None,
    flags: dict[str, Any],
    *,
    again: bool = False,
    check: bool = True,
    search: bool = False,
) -> PreparedSubmission:
    """The submission of a file and flags: resolved, packed into jobs, checked. Raises LabctlError; writes nothing."""
    layers = [settings.request_file(file)] if file else []
    found = prepare(
        here(), [*layers, (FLAGS, _given(flags))], again=again, check=check, reading=tables.bytes_read, search=search
    )
    for warning in found.warnings:
        tables.note(f"warning: {warning}")
    return found


@contextlib.contextmanager
def ctrl_c(handler: Any) -> Iterator[None]:
    """Handle SIGINT with `handler` in this block; signal.SIG_IGN leaves Ctrl-C to the child process."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The given flags as keys of a submission file."""
    options: dict[str, list[Any]] = {}
    for key, value in map(engine_options.parse, flags.get("engine_option", ())):
        options.setdefault(key, []).append(value)
    layer = {
        **flags,
        "sampling": [*flags.get("sampling", ()), *_short_samplings(flags)],
        "serve": [served for served, given in ((False, flags.get("offline")), (True, flags.get("serve"))) if given],
        "engine_options": options,
        "sbatch": dict(map(engine_options.parse_sbatch, flags["sbatch"])),
    }
    return {key: value for key, value in layer.items() if key in KEYS and value not in (None, (), [], {})}


def _short_samplings(flags: dict[str, Any]) -> list[str]:
    greedy = [GREEDY] if flags.get("greedy") else []
    given = {key: value for key in ("temperature", "top_p", "seed") if (value := flags.get(key)) is not None}
    if not given:
        return greedy
    if set(given) == {"seed"}:  # of the workload
        return greedy
    if "temperature" not in given:
        flag = next(iter(given)).replace("_", "-")
        raise WrongUseError(f"--{flag} needs --temperature", "add --temperature, such as 0.7")
    return [*greedy, ",".join(f"{key}={value}" for key, value in given.items())]
