"""Options that several commands share, and the prepared submission made from them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from labctl_orchestrator.request import engine_options, settings
from labctl_orchestrator.request.request import FABLES, FLAGS, KEYS, SubmissionSpec, build
from labctl_orchestrator.request.sampling import GREEDY
from labctl_orchestrator.request.settings import TYPES
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.submission.submit import PreparedSubmission, prepare
from labctl_orchestrator.terminal import tables
from labctl_slurm.errors import WrongUseError
from labctl_workers.engines import ENGINES
from labctl_workers.record import DTYPES

F = TypeVar("F", bound=Callable[..., Any])


def _kind(key: str) -> type:
    """The type of one value of a key, as the command line takes it."""
    kinds = str(TYPES.get(key, str))
    return next(kind for kind in (str, int, float) if kind.__name__ in kinds)


def _axis(key: str, metavar: str, text: str, *names: str) -> Callable[[F], F]:
    """An option that can be repeated; the dots of its metavar show it. `names` are further ones."""
    own = sorted((f"--{key.replace('_', '-')}", *names), key=lambda name: name.startswith("--"))  # short ones first
    return click.option(*own, key, multiple=True, type=_kind(key), metavar=f"{metavar}...", help=text)


def _value(key: str, text: str, metavar: str | None = None) -> Callable[[F], F]:
    """An option with one value."""
    return click.option(f"--{key.replace('_', '-')}", key, type=_kind(key), metavar=metavar, help=text)


def _default(key: str) -> str:
    """The end of a help: the built-in default of a key. `labctl config` shows the one of this workspace."""
    value = getattr(SubmissionSpec(), key)
    return f"  [default: {value[0] if isinstance(value, tuple) else value}]"


# Without click's defaults: an absent flag leaves the choice to labctl.toml and the other settings (labctl config).
RUN_OPTIONS = (
    _axis("partition", "NAME", "Partition: dgx2, dgxh, local, or a name from labctl.toml.", "-p"),
    _axis("backend", "NAME", f"Backend: {', '.join(ENGINES)}.{_default('backend')}"),
    _axis("model_id", "ID", f"Hub model id, or folder.{_default('model_id')}"),
    _axis("revision", "NAME", f"Branch, tag or commit of a Hub model.{_default('revision')}"),
    _axis("dtype", "DTYPE", f"{', '.join(DTYPES)}, or auto: the partition's dtype.{_default('dtype')}"),
    _axis("gpus", "N", "GPUs per job.  [default: the partition's, usually 2]"),
    _axis("parallel", "HOW", "vLLM: tensor, pipeline, data, or sizes such as tensor=4,pipeline=2.  [default: tensor]"),
    _axis(
        "engine_option",
        "KEY=VALUE",
        "Option of a backend's engine, such as max_model_len=2048 for vllm (docs/backends.md).",
    ),
    _value("prompt", "Prompt text.  [default: a question about tensor parallelism]"),
    _value("prompts", "File with one prompt per line, or JSON, or CSV with a column named prompt.", "FILE"),
    click.option(
        "--raw-prompt/--chat",
        "raw_prompt",
        default=None,
        help="Send prompts unchanged, or in the model's chat template.  [default: chat]",
    ),
    _axis("max_new_tokens", "N", f"Maximum tokens per answer.{_default('max_new_tokens')}", "--max-tokens"),
    click.option("--serve", is_flag=True, help="Send the requests over HTTP to the engine's own server."),
    click.option("--without-server", is_flag=True, help="With --serve: also measure the same runs without a server."),
    _axis("lengths", "IN/OUT", "--input-len and --output-len as a pair, such as 1024/128."),
    _axis("input_len", "N", "Length of random prompts in tokens, or mean=1024,std=100,min=1,max=2048."),
    _axis("output_len", "N", "Exact length of answers in tokens; a number or mean=... as for --input-len."),
    _axis("prefix_len", "N", "Number of leading tokens that all random prompts share."),
    _axis("dataset", "FILE", "Requests: ShareGPT's JSON, JSON lines with prompts, or a trace (times and lengths)."),
    _axis(
        "batch_size",
        "N",
        "Maximum number of concurrent requests.  [default: 1; with --request-rate: unlimited]",
        "--concurrency",
    ),
    _axis("sampling", "HOW", f"greedy, or a list such as temperature=0.7,top_p=0.9,seed=1.{_default('sampling')}"),
    click.option("--greedy", is_flag=True, help="Same as --sampling greedy."),
    click.option("--temperature", type=float, help="Sampling temperature; short for --sampling temperature=..."),
    click.option("--top-p", type=float, help="Sample from the most likely tokens up to this total probability."),
    _value("seed", "Seed of random prompts, lengths and sampled tokens.  [default: 0]"),
    click.option(
        "--ignore-eos/--stop-at-eos",
        "ignore_eos",
        default=None,
        help="Continue after the model's end token, or stop there.  [default: stop]",
    ),
    _axis("request_rate", "R", "Mean requests per second, at random times.  [default: send the next after an answer]"),
    _value("burstiness", "Arrivals in bursts (below 1) or evenly (above 1).  [default: 1, Poisson]"),
    _axis("requests", "N", "Requests per repeat; labctl may reuse prompts.  [default: by concurrency or rate]"),
    click.option(
        "--score",
        is_flag=False,
        flag_value=FABLES,
        metavar="[FILE]",
        help="Measure the perplexity on a FILE of text or JSON lines. Without FILE: on a shipped text.",
    ),
    _value("score_window", f"Window size in tokens.{_default('score_window')}", "N"),
    _value("score_stride", f"Distance in tokens between the starts of two windows.{_default('score_stride')}", "N"),
    _axis(
        "quality",
        "TASK[:N]",
        "Task of lm-evaluation-harness, or FILE.yaml, for accuracy. With :N, its first N questions.",
    ),
    _axis("slo", "LEVEL", "Service level for goodput, such as 'ttft_p99<500ms'."),
    _value("runs_per_job", "Maximum number of runs that share a job.  [default: as many as fit its time limit]"),
    _value("jobs_at_once", "Maximum number of jobs of an array that run at once.  [default: no limit]"),
    _value("loads", f"Number of engine loads in which each run is measured.{_default('loads')}"),
    _value("repeats", f"Measured repeats of each run per engine load.{_default('repeats')}"),
    _value(
        "until",
        "Repeat until the 95% interval of the mean throughput is at most +-PERCENT, such as 1%.",
        "PERCENT",
    ),
    _value("max_repeats", f"Maximum number of repeats with --until.{_default('max_repeats')}"),
    _value("warmup", f"Unmeasured repeats before the measured ones.{_default('warmup')}"),
    _value("name", "Name of the submission."),
    _value("note", "Note on the submission, for labctl list and labctl show."),
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


def without(*names: str, dots: bool = True, **helps: str) -> Callable[[click.Command], click.Command]:
    """Remove submission options that mean nothing to a command. `dots`: keep the dots of options that submit takes several
    times. `helps`: the command's own help of an option."""

    def change(command: click.Command) -> click.Command:
        command.params = [parameter for parameter in command.params if parameter.name not in names]
        for parameter in command.params:
            if not dots and parameter.metavar and parameter.name != "slo":
                parameter.metavar = parameter.metavar.removesuffix("...")
            if isinstance(parameter, click.Option) and parameter.name in helps:
                parameter.help = helps[parameter.name]
        return command

    return change


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
    if flags.get("without_server") and not flags.get("serve"):
        raise WrongUseError("--without-server needs --serve", "omit it: without --serve no server starts")
    options: dict[str, list[Any]] = {}
    for key, value in map(engine_options.parse, flags.get("engine_option", ())):
        options.setdefault(key, []).append(value)
    layer = {
        **flags,
        "sampling": [*flags.get("sampling", ()), *_short_samplings(flags)],
        "serve": [False, True] if flags.get("without_server") else [True] if flags.get("serve") else [],
        "engine_options": options,
        "sbatch": dict(map(engine_options.parse_sbatch, flags.get("sbatch", ()))),
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
