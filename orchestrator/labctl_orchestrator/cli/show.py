"""labctl show"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec

from labctl_orchestrator.analysis import accuracy, doubts, goodput, perplexity
from labctl_orchestrator.analysis.comparison import QuestionScores, mean_of
from labctl_orchestrator.analysis.facts import Setup
from labctl_orchestrator.analysis.metrics import ALL_METRICS
from labctl_orchestrator.cli.as_json import json_option, print_json
from labctl_orchestrator.store import job_rows, select_runs, workspace
from labctl_orchestrator.store.database import Store, open_store
from labctl_orchestrator.store.job_rows import ResultDetails
from labctl_orchestrator.store.views import HERE
from labctl_orchestrator.store.window import Window
from labctl_orchestrator.store.workspace import Workspace, document_at
from labctl_orchestrator.terminal import statuses, tables
from labctl_orchestrator.terminal.tables import figure
from labctl_orchestrator.tracking import run_status, status
from labctl_workers.measure import METRICS

ERRORS_SHOWN = 3
PROMPTS_SHOWN = 5
RATES = (
    "SELECT output_tok_s FROM repeats WHERE run_id = ? AND attempt_id = ? AND output_tok_s IS NOT NULL ORDER BY repeat"
)
NOTES = (
    "SELECT coalesce(name, submission_id), json_extract(request, '$.note') FROM submissions JOIN submission_runs"
    " USING (submission_id) WHERE run_id = ? AND json_extract(request, '$.note') IS NOT NULL ORDER BY created_at"
)


@click.command("show")
@click.argument("run")
@click.option(
    "--slo",
    multiple=True,
    metavar="LEVEL...",
    help="Service level for goodput, such as 'ttft_p99<500ms'.  [default: the submission's]",
)
@json_option
def command(run: str, slo: tuple[str, ...], as_json: bool) -> None:
    """Show the settings and results of one run.

    Prints each attempt: one execution of the run in one engine load. With --json: the records of all attempts, with raw values.

    \b
    labctl show 3f9a12
    """
    here = workspace.existing()
    store = open_store(here)
    statuses.refresh_chosen(here, store, [run])
    run_id = select_runs.one_run(store, run)
    (found,) = status.statuses(here, store, [run_id])
    results = job_rows.result_details(store, run_id)
    if as_json:
        records = [document_at(here.data / result.path) for result in results]
        print_json({"status": found.to_json(), "records": records})
        return
    _print_run(store, found)
    levels = goodput.levels_of(here, store, [run_id], slo)
    good = goodput.of_runs_and_attempts(store, [run_id], levels)
    for result in results:
        _print_result(here, store, found, result, good.get((run_id, result.attempt_id), {}))


def _print_run(store: Store, found: run_status.RunStatus) -> None:
    (run,) = store.rows("SELECT * FROM runs WHERE run_id = ?", (found.run_id,))
    click.echo(f"run {found.run_id}: {found.sentence}")
    if found.remedy:
        click.echo(f"  -> {found.remedy}")
    if found.last_lines:
        click.echo("  the log ends:")
        for line in found.last_lines:
            click.echo(f"    {line}")
    if run["origin"] != HERE:
        tables.field("origin", f"{run['origin']}, as given by the bundle or by labctl import --origin")
    columns = (
        "partition",
        "backend",
        "model",
        "revision",
        "dtype",
        "gpus",
        "parallel",
        "engine_options",
        "max_new_tokens",
        "input_len",
        "output_len",
        "prefix_len",
        "dataset",
        "workload_seed",
        "batch_size",
        "request_rate",
        "burstiness",
        "requests",
        "sampling",
        "score",
        "quality",
    )
    for column in columns:
        if run[column] not in (None, "", "{}"):
            tables.field(column, run[column])
    for column in ("served", "ignore_eos", "raw_prompt"):
        if run[column]:
            tables.field(column, "yes")
    prompts = json.loads(run["prompts"])
    for prompt in prompts[:PROMPTS_SHOWN]:
        tables.field("prompt", prompt)
    if len(prompts) > PROMPTS_SHOWN:
        tables.field("", f"and {len(prompts) - PROMPTS_SHOWN:,} more prompts (labctl show {found.run_id} --json)")
    for name, note in store.tuples(NOTES, (found.run_id,)):
        tables.field("note", f"{note} ({name})")
    if found.slurm_id:
        tables.field("job", f"{found.slurm_id} on {found.node or 'no node yet'}")


def _print_result(
    here: Workspace,
    store: Store,
    found: run_status.RunStatus,
    result: ResultDetails,
    good: Mapping[str, Sequence[float]],
) -> None:
    click.echo()
    state = run_status.FAILURE_STATES.get(result.failure_kind or "", result.status)
    tables.text(f"attempt {result.attempt_id}: {state} on {result.node}, ended {result.ended_at}")
    tables.field("record", here.data / result.path)
    if result.status != "done":
        if state != found.state or state == run_status.FAILED:  # else the first line has the reason
            tables.field(result.failure_kind or "failure", result.failure)
        if not found.remedy:
            tables.text(f"  -> {result.remedy}")
        return
    for column in ("load_s", "init_s", "warmup_s"):
        tables.field(column, figure(getattr(result, column), "s"))
    key = (result.run_id, result.attempt_id)
    _print_metrics(store, key, good)
    _print_scores(store, result)
    _print_answers(store, result)
    _print_window(msgspec.json.decode(result.window or "{}", type=Window))
    _print_doubts(store, result)
    _print_devices(store, key)
    texts = store.rows(
        "SELECT DISTINCT text, finish_reason FROM samples JOIN texts USING (text_id)"
        " WHERE run_id = ? AND attempt_id = ? AND error IS NULL ORDER BY repeat, request",
        key,
    )
    for text in texts:
        click.echo(f"  text ({text['finish_reason']}):")
        tables.answer(text["text"])
    fingerprint = json.loads(result.fingerprint)
    setup = msgspec.convert(fingerprint, Setup)
    if setup.idle_gpus:
        tables.note(f"warning: this attempt {setup.idle_gpus}")
    _print_fingerprint(fingerprint, setup)


def _print_metrics(store: Store, key: tuple[str, str], good: Mapping[str, Sequence[float]]) -> None:
    """Print each metric over the repeats; percentiles only for several requests. `good` are the metrics of service levels."""
    repeats = store.rows("SELECT * FROM repeats WHERE run_id = ? AND attempt_id = ? ORDER BY repeat", key)
    (count,) = store.rows("SELECT count(DISTINCT request) AS n FROM samples WHERE run_id = ? AND attempt_id = ?", key)
    rows = []
    measured = {name: [repeat[name] for repeat in repeats if repeat[name] is not None] for name in METRICS}
    for name, values in {**measured, **good}.items():
        metric = ALL_METRICS[name]
        of_requests = name.startswith(("ttft_p", "tpot_p", "e2e_p"))
        if values and not (of_requests and count["n"] == 1):
            figures = (mean_of(name, [values]), min(values), max(values))
            rows.append([f"  {metric.title}", *(figure(value, metric.unit) for value in figures), name])
    click.echo(f"  {tables.counted(len(repeats), 'repeat')}:")
    columns = ("  metric", "mean", "lowest", "highest", "name")
    tables.table(columns, rows, right=columns[1:4])


def _print_scores(store: Store, result: ResultDetails) -> None:
    """Print the perplexity of the run's text, with its interval over documents."""
    if result.score_error:
        tables.field("perplexity", f"not computed: {result.score_error}")
    text = perplexity.documents_of(store, [result.run_id]).get((result.run_id, result.attempt_id))
    if text is None or not sum(text.tokens):
        return
    found = perplexity.interval_of(text)
    span = "" if found.low is None else f" (95% CI {figure(found.low, '')}-{figure(found.high, '')})"
    counted = f"{tables.counted(len(text.tokens), 'document')}, {sum(text.tokens):,} tokens"
    tables.field("perplexity", f"{figure(found.difference, '')}{span}, {counted}")


def _print_answers(store: Store, result: ResultDetails) -> None:
    """Print the accuracy in each task, with its interval over questions."""
    if result.task_error:
        tables.field("tasks", f"not answered: {result.task_error}")
    questions = accuracy.questions_of(store, [result.run_id]).get((result.run_id, result.attempt_id))
    by_task: dict[str, list[float]] = {}
    for name, correct in zip(questions.names, questions.correct, strict=True) if questions else ():
        by_task.setdefault(name.partition(" ")[0], []).append(correct)
    for task, of_task in by_task.items():
        found = accuracy.interval_of(QuestionScores(("",) * len(of_task), tuple(of_task)))
        span = f"95% CI {figure(found.low, '')}-{figure(found.high, '')}"
        tables.field(
            "accuracy", f"{figure(found.difference, '')} ({span}), {task}, {tables.counted(len(of_task), 'question')}"
        )


def _print_window(window: Window) -> None:
    """Print the state of the GPUs and processes in the measured windows."""
    shown = (
        ("power", window.power_w, "W"), ("SM clock", window.sm_mhz, "MHz"), ("temperature", window.temperature_c, "C"),
        ("CPUs used", window.cpus_used, ""),
    )  # fmt: skip
    words = [f"{name} {value:.4g} {unit}".strip() for name, value, unit in shown if value is not None]
    if window.throttled_share:
        words.append(f"clocks reduced {window.throttled_share:.0%} of it ({', '.join(window.throttle_reasons)})")
    if words:
        tables.field("window", ", ".join(words))
    if window.until is not None and window.until.half_width is not None:
        until = window.until
        why = "" if until.reached else f", ended by the limit of {until.stopped_by}"
        tables.field("until", f"target {until.target:.2%}, reached +-{until.half_width:.2%}{why}")


def _print_doubts(store: Store, result: ResultDetails) -> None:
    key = (result.run_id, result.attempt_id)
    columns = ", ".join(f"max({name}) AS {name}" for name in doubts.Serving._fields)
    (repeats,) = store.rows(
        f"SELECT min(wall_s) AS wall_s, {columns} FROM repeats WHERE run_id = ? AND attempt_id = ?",  # noqa: S608
        key,
    )
    ((backend, served),) = store.tuples("SELECT backend, served FROM runs WHERE run_id = ?", key[:1])
    seen = (result.prompt_tokens, result.empty_answers, result.answers_without_tokens, result.finish_reasons)
    serving = doubts.Serving(*(repeats[name] for name in doubts.Serving._fields))
    window = msgspec.json.decode(result.window or "{}", type=Window)
    rates = [repeat for (repeat,) in store.tuples(RATES, key)]
    for doubt in [*doubts.of_windows([window]), *doubts.of_rates([rates])]:
        tables.text(f"  * {doubts.of_validity([doubt])}")
    of_cache = doubts.of_cache(backend, served=served, prompt_tokens=result.prompt_tokens)
    for doubt in [*doubts.of_run(repeats["wall_s"], *seen), *doubts.of_serving(serving), *of_cache]:
        tables.text(f"  * {doubts.sentence(doubt.kind, [doubt.value])}")
    errors = store.tuples(
        "SELECT error, count(*) FROM samples WHERE run_id = ? AND attempt_id = ? AND error IS NOT NULL"
        " GROUP BY error ORDER BY min(repeat), min(request)",
        key,
    )
    for error, count in errors[:ERRORS_SHOWN]:
        tables.field("failed", f"{tables.counted(count, 'request')}: {error}")


def _print_devices(store: Store, key: tuple[str, str]) -> None:
    rows = store.rows(
        "SELECT device, name, max(weights_bytes) AS weights, max(peak_allocated_bytes) AS peak FROM devices"
        " WHERE run_id = ? AND attempt_id = ? GROUP BY device, name ORDER BY device",
        key,
    )
    for row in rows:
        shown = f"weights {figure(row['weights'], 'B')}, peak allocated {figure(row['peak'], 'B')}"
        tables.field(row["device"], f"{shown} {row['name']}".rstrip())


def _print_fingerprint(fingerprint: Mapping[str, Any], setup: Setup) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in fingerprint.get("packages", {}).items())
    tables.field("versions", packages)
    for key in ("effective_dtype", "attention", "driver", "cuda", "devices_in_use"):
        if fingerprint.get(key):
            tables.field(key, fingerprint[key])
    for name, value in (setup.of_the_job() | setup.of_the_input()).items():
        tables.field(name, value)
