"""What a reader of the database sees: views with plain names, and what each of their columns means, in which unit.

The one home of these descriptions: the views, `labctl query`, the files of `labctl export` and Datasette's metadata are all
made from here, and the metrics' words come from METRICS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from labctl_orchestrator.store.workspace import DATABASE_SCHEMA
from labctl_workers.measure import METRICS

# Whose the runs of this workspace are; those of a bundle have the bundle's label.
HERE = "here"
TEXT, INTEGER, REAL = "text", "integer", "real"


@dataclass(frozen=True)
class Column:
    """One column of a view: the SQL that makes it, its kind (text, integer, real), its unit, and what it means."""

    name: str
    sql: str
    kind: str
    text: str
    unit: str = ""

    @property
    def told(self) -> str:
        """What it means, with the unit."""
        return f"{self.text} [{self.unit}]" if self.unit else self.text


OF_RUNS = "run_id IN (SELECT value FROM json_each(?1))"
JOBS_OF_RUNS = (
    f"job_id IN (SELECT job_id FROM job_runs WHERE {OF_RUNS} UNION SELECT job_id FROM results WHERE {OF_RUNS})"
)


@dataclass(frozen=True)
class View:
    """One view. `table` is its short name for `labctl export`; `chosen` the condition that takes the rows of some runs, with
    their ids as one JSON list."""

    name: str
    table: str
    text: str
    columns: tuple[Column, ...]
    source: str
    chosen: str = OF_RUNS

    @property
    def sql(self) -> str:
        """The statement that makes it."""
        columns = ",\n  ".join(f"{column.sql} AS {column.name}" for column in self.columns)
        return f"CREATE VIEW {self.name} AS SELECT\n  {columns}\n{self.source}"


def _plain(table: str, name: str, kind: str, text: str, unit: str = "") -> Column:
    return Column(name, f"{table}.{name}", kind, text, unit)


# ---------------------------------------------------------------- what was asked

AXES = (
    _plain("runs", "origin", TEXT, f"whose run it is: {HERE}, or the label of the bundle that it was imported with"),
    _plain("runs", "partition", TEXT, "the partition that was asked for, as labctl names it"),
    _plain("runs", "backend", TEXT, "the engine: hf (transformers' generate), staged (its modules in labctl's pipeline) or vllm"),
    _plain("runs", "model", TEXT, "the model's name"),
    _plain("runs", "model_content", TEXT, "what the model is: SHA-256 of a local checkpoint, revision of a hub's"),
    _plain("runs", "dtype", TEXT, "the type of weights and arithmetic that was asked for, resolved"),
    _plain("runs", "device", TEXT, "cuda or cpu"),
    _plain("runs", "gpus", INTEGER, "GPUs of the job"),
    _plain("runs", "parallel", TEXT, "how the model is spread: layers one after another, or tensor parallel"),
    Column("engine_options", "coalesce(runs.engine_options, '{}')", TEXT, "the engine's options, as JSON"),
    _plain("runs", "max_new_tokens", INTEGER, "longest answer", "tok"),
    _plain("runs", "batch_size", INTEGER, "requests in flight at once, at most"),
    _plain("runs", "request_rate", REAL, "mean rate at which requests came; none: as soon as there was room", "1/s"),
    _plain("runs", "requests", INTEGER, "requests of a pass, where it was asked for"),
    _plain("runs", "sampling", TEXT, "greedy, or temperature, top_p and seed"),
    _plain("runs", "ignore_eos", INTEGER, "1: always the full length was generated"),
    _plain("runs", "raw_prompt", INTEGER, "1: without the model's chat template"),
    _plain("runs", "prompt_set", TEXT, "which prompts: the beginning of their SHA-256"),
)  # fmt: skip
PROMPT = Column("first_prompt", "json_extract(runs.prompts, '$[0]')", TEXT, "the first prompt of the set")

RUN_ID = _plain("runs", "run_id", TEXT, "the run: the hash of what was asked; of an imported one with @ and its origin")
ATTEMPT_ID = _plain("results", "attempt_id", TEXT, "the execution that measured it")
_LATEST = (  # by the run, of which there are few results: the + keeps SQLite from the index over every done one
    "SELECT attempt_id FROM results AS other WHERE other.run_id = results.run_id AND +other.status = 'done'"
    " ORDER BY other.ended_at DESC, other.attempt_id DESC LIMIT 1"
)
IS_LATEST = Column(
    "latest", f"results.attempt_id = ({_LATEST})", INTEGER, "1: of the run's latest execution, which compare takes"
)

# ---------------------------------------------------------------- what came back


def _fact(name: str, path: str, text: str) -> Column:
    return Column(name, f"json_extract(results.facts, '$.{path}')", TEXT, text)


_GPUS = "(SELECT group_concat(json_extract(value, '$.name'), ' + ') FROM json_each(results.facts, '$.gpus'))"
FACTS = (
    Column("gpu", _GPUS, TEXT, "the GPUs that it ran on, by name"),
    _fact("effective_dtype", "effective_dtype", "the type that the weights really had"),
    _fact("attention", "attention", "the attention kernel"),
    _fact("torch", "packages.torch", "version of torch"),
    _fact("transformers", "packages.transformers", "version of transformers"),
    _fact("vllm", "packages.vllm", "version of vLLM"),
)


def _seconds_between(start: str, end: str) -> str:
    return f"round((julianday({end}) - julianday({start})) * 86400, 3)"


# What a job asked of Slurm, where its array says it. Runs on CPUs ask for GPUs where the partition has some.
JOB_GPUS = "coalesce(arrays.gpus, CASE WHEN runs.device = 'cuda' OR runs.gpus = 0 THEN runs.gpus END)"
# Seconds that the starts before the latest one held their nodes. Not known: of a job that was started again where no accounting
# told of it, of a script that several jobs of Slurm ran, and outside Slurm.
_HELD_BEFORE_S = (
    "(SELECT CASE WHEN count(DISTINCT slurm_job_id) > 1 OR count(slurm_job_id) < count(*) THEN NULL"
    " WHEN jobs.held_before_s IS NOT NULL THEN jobs.held_before_s"
    " WHEN count(*) < 2 AND coalesce(max(restarts), 0) = 0 THEN 0.0 END"
    " FROM executions WHERE executions.job_id = jobs.job_id)"
)
# A local job's times are no allocation's: it waits for its turn in them, and its end is when labctl saw it.
HELD_S = (
    "CASE WHEN arrays.executor IS NOT 'local' AND jobs.ended_at IS NOT NULL THEN"
    # Ended without a start, by the accounting's word: cancelled while it waited.
    f" round(coalesce({_seconds_between('jobs.started_at', 'jobs.ended_at')}, jobs.held_before_s * 0) + {_HELD_BEFORE_S}, 3) END"
)
QUEUE_S = Column(
    "queue_s", _seconds_between("jobs.queued_at", "jobs.started_at"), REAL,
    "wait in Slurm's queue, of the job; of one that was requeued, before its latest start", "s",
)  # fmt: skip
LOAD = (
    _plain("results", "load_s", REAL, "weights to the devices", "s"),
    _plain("results", "init_s", REAL, "imports, checks and whatever else until the engine was ready", "s"),
    _plain("results", "warmup_s", REAL, "passes before the measured ones", "s"),
    QUEUE_S,
    Column("gpu_s", f"{HELD_S} * {JOB_GPUS}", REAL, "GPUs x time that all starts of the whole job held them", "s"),
)
WHERE_AND_WHEN = (
    _plain("results", "node", TEXT, "the node that it ran on"),
    _plain("results", "started_at", TEXT, "when the run began, UTC"),
    _plain("results", "ended_at", TEXT, "when it ended, UTC"),
    _plain("jobs", "slurm_id", TEXT, "the job's id in Slurm"),
)


# The loads of a run that compare takes together: its latest, and those with the same facts.
_LIKE_THE_LATEST = (
    "SELECT attempt_id FROM results AS alike WHERE alike.run_id = results.run_id AND +alike.status = 'done'"
    " AND alike.facts IS results.facts"
)


def _mean(metric: str) -> str:
    """The mean of the load means, as `compare` has it (`comparison.mean_of`): geometric where one way is better and every value
    is above 0, else arithmetic."""
    of_loads = (
        f"(SELECT avg({metric}) AS of_load, avg(ln({metric})) AS of_log, min({metric}) AS low FROM repeats"
        f" WHERE repeats.run_id = results.run_id AND repeats.attempt_id IN ({_LIKE_THE_LATEST}) AND {metric} IS NOT NULL"
        " GROUP BY repeats.attempt_id)"
    )
    if not METRICS[metric].better:
        return f"(SELECT avg(of_load) FROM {of_loads})"
    return f"(SELECT CASE WHEN min(low) > 0 THEN exp(avg(of_log)) ELSE avg(of_load) END FROM {of_loads})"


def _metrics(sql: str, told: str) -> tuple[Column, ...]:
    return tuple(
        Column(name, _mean(name) if sql == "mean" else f"{sql}.{name}", REAL, f"{metric.title}: {metric.definition}{told}",
               metric.unit)
        for name, metric in METRICS.items()
    )  # fmt: skip


_OF_A_RUN = "FROM results JOIN runs USING (run_id) LEFT JOIN jobs USING (job_id)"
_REPEATS = (
    "(SELECT count(*) FROM repeats WHERE repeats.run_id = results.run_id AND repeats.attempt_id = results.attempt_id)"
)
_NAMES = (
    "(SELECT group_concat(name, ', ') FROM (SELECT coalesce(name, submission_id) AS name FROM submission_runs"
    " JOIN submissions USING (submission_id) WHERE submission_runs.run_id = runs.run_id ORDER BY created_at))"
)


def measured_runs() -> View:
    return View(
        "measured_runs",
        "runs",
        "One row a measured run, from its latest execution: what was asked, the mean of every metric over its engine loads, and"
        " what else may explain a difference.",
        (
            RUN_ID,
            Column("asked_by", _NAMES, TEXT, "the names of the requests that asked for it, oldest first"),
            *AXES,
            PROMPT,
            Column("repeats", _REPEATS, INTEGER, "measured passes"),
            *_metrics("mean", "; mean of the engine loads' means"),
            *LOAD,
            _plain("results", "tokens_generated", TEXT, "the numbers of tokens that its answers have", "tok"),
            _plain("results", "finish_reasons", TEXT, "how its answers ended: stop, length"),
            *FACTS,
            *WHERE_AND_WHEN,
            Column("text", "texts.text", TEXT, "the first answer"),
            ATTEMPT_ID,
            Column("record", "results.path", TEXT, "the record with every raw value, within .labctl"),
        ),
        f"{_OF_A_RUN} LEFT JOIN arrays USING (array_id) LEFT JOIN texts USING (text_id)\n"
        f"WHERE results.status = 'done' AND results.attempt_id = ({_LATEST})",
    )


def measured_repeats() -> View:
    return View(
        "measured_repeats",
        "repeats",
        "One row a measured pass of every execution, with every metric.",
        (
            RUN_ID,
            ATTEMPT_ID,
            _plain("repeats", "repeat", INTEGER, "which pass, from 0"),
            IS_LATEST,
            *AXES,
            _plain("repeats", "seed", INTEGER, "what it drew with, where it sampled"),
            _plain("repeats", "wall_s", REAL, "the measured window", "s"),
            _plain("repeats", "thrown_away", INTEGER, "passes before it that were thrown away: the job was suspended"),
            *_metrics("repeats", ""),
            *FACTS,
            *WHERE_AND_WHEN,
        ),
        f"{_OF_A_RUN} JOIN repeats USING (run_id, attempt_id)\nWHERE results.status = 'done'",
    )


def measured_requests() -> View:
    return View(
        "measured_requests",
        "requests",
        "One row a request of a measured pass: its times, how it ended, and its text.",
        (
            RUN_ID,
            ATTEMPT_ID,
            _plain("samples", "repeat", INTEGER, "which pass, from 0"),
            _plain("samples", "request", INTEGER, "which request of the pass, from 0"),
            IS_LATEST,
            *AXES,
            Column("prompt", "json_extract(runs.prompts, '$[' || samples.prompt || ']')", TEXT, "its prompt"),
            _plain("samples", "prompt_tokens", INTEGER, "tokens of the prompt, chat template included", "tok"),
            _plain("samples", "output_tokens", INTEGER, "tokens generated, an end token included", "tok"),
            *(_of_a_request(name, METRICS[name].definition, METRICS[name].unit) for name in OF_A_REQUEST),
            _plain("samples", "handed_s", REAL, "when it was handed over, after the window's start", "s"),
            _plain("samples", "engine_ttft_s", REAL, "time to the first token by the engine's own word", "s"),
            _plain("samples", "finish_reason", TEXT, "stop (the end token) or length"),
            Column("text", "texts.text", TEXT, "the answer"),
        ),
        f"{_OF_A_RUN} JOIN samples USING (run_id, attempt_id) LEFT JOIN texts ON texts.text_id = samples.text_id\n"
        "WHERE results.status = 'done'",
    )


OF_A_REQUEST = ("ttft_s", "tpot_s", "e2e_s", "queued_s", "mean_log_probability", "repeated_bigrams")


def _of_a_request(name: str, definition: str, unit: str) -> Column:
    return _plain("samples", name, REAL, definition.removesuffix(", median of requests"), unit)


def measured_devices() -> View:
    return View(
        "measured_devices",
        "devices",
        "One row a device of a measured pass: its memory, by kind.",
        (
            RUN_ID,
            ATTEMPT_ID,
            _plain("devices", "repeat", INTEGER, "which pass, from 0"),
            Column("device_id", "devices.device", TEXT, "the device, such as cuda:0"),
            IS_LATEST,
            Column("device_name", "devices.name", TEXT, "what it is"),
            *AXES,
            *(_of_a_device(name) for name in OF_A_DEVICE),
        ),
        f"{_OF_A_RUN} JOIN devices USING (run_id, attempt_id)\nWHERE results.status = 'done'",
    )


OF_A_DEVICE = (
    "weights_bytes", "kv_cache_used_bytes", "kv_cache_reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "device_used_bytes",
)  # fmt: skip


def _of_a_device(name: str) -> Column:
    metric = METRICS[name]
    return _plain("devices", name, INTEGER, metric.definition.removesuffix(", of the fullest GPU"), metric.unit)


def failed_runs() -> View:
    return View(
        "failed_runs",
        "failures",
        "One row an execution of a run that failed: why, and what to do about it.",
        (
            RUN_ID,
            ATTEMPT_ID,
            *AXES,
            _plain("results", "failure_kind", TEXT, "the kind of failure, a word"),
            _plain("results", "failure", TEXT, "what happened"),
            _plain("results", "remedy", TEXT, "what to do about it"),
            *WHERE_AND_WHEN,
        ),
        f"{_OF_A_RUN}\nWHERE results.status != 'done'",
    )


# What the runs of a job share.
AXES_OF_A_JOB = (
    "origin", "partition", "backend", "model", "model_content", "dtype", "device", "parallel", "engine_options",
)  # fmt: skip
_ITS_RESULTS = "FROM results WHERE results.job_id = jobs.job_id AND +results.status = 'done'"
# The runs of one start have its load: it is counted once.
_LOAD_S = (
    f"coalesce((SELECT sum(of_a_start) FROM (SELECT max(load_s) + max(init_s) AS of_a_start {_ITS_RESULTS}"
    " GROUP BY attempt_id)), 0.0)"
)
_WARMUP_S = f"coalesce((SELECT sum(warmup_s) {_ITS_RESULTS}), 0.0)"
_MEASURED_S = (
    "coalesce((SELECT sum(wall_s) FROM results JOIN repeats USING (run_id, attempt_id)"
    " WHERE results.job_id = jobs.job_id AND +results.status = 'done'), 0.0)"
)
_ITS_REQUESTS = (
    "(SELECT group_concat(name, ', ') FROM (SELECT DISTINCT coalesce(asking.name, asking.submission_id) AS name FROM job_runs"
    " JOIN submission_runs USING (run_id) JOIN submissions AS asking USING (submission_id) WHERE job_runs.job_id = jobs.job_id"
    " ORDER BY asking.created_at))"
)
_STARTS = "(SELECT max(count(*), coalesce(max(restarts) + 1, 0)) FROM executions WHERE executions.job_id = jobs.job_id)"
# An imported job has no list of what it was to do, but its records.
_ONE_OF_ITS_RUNS = (
    "coalesce((SELECT min(run_id) FROM job_runs WHERE job_runs.job_id = jobs.job_id),"
    " (SELECT min(run_id) FROM results WHERE results.job_id = jobs.job_id))"
)


def _gpu_s(name: str, seconds: str, text: str) -> Column:
    return Column(name, f"round({JOB_GPUS} * ({seconds}), 3)", REAL, f"GPUs x {text}", "s")


def measured_jobs() -> View:
    return View(
        "measured_jobs",
        "jobs",
        "One row a job that Slurm, or this machine, took: what it was to do, and where the time of its GPUs went.",
        (
            _plain("jobs", "job_id", TEXT, "the job, in labctl's files"),
            _plain("jobs", "slurm_id", TEXT, "its id in Slurm; of a local one its process"),
            Column("submitted_by", "coalesce(submissions.name, submissions.submission_id)", TEXT,
                   "the request that it was submitted for; none: its script was submitted by hand, or it was imported"),
            Column("asked_by", _ITS_REQUESTS, TEXT, "the names of all requests that asked for runs of it, oldest first"),
            *(column for column in AXES if column.name in AXES_OF_A_JOB),
            Column("gpus", JOB_GPUS, INTEGER, "GPUs that it asked for; 0 on a partition without"),
            _plain("jobs", "node", TEXT, "the node of its latest start"),
            _plain("jobs", "state", TEXT, "its last known state, in Slurm's word"),
            Column("starts", _STARTS, INTEGER, "how often it began: more than once where Slurm requeued it"),
            Column("runs_asked", "nullif((SELECT count(*) FROM job_runs WHERE job_runs.job_id = jobs.job_id), 0)", INTEGER,
                   "runs that it was to do; not known of an imported one"),
            _plain("jobs", "loads", INTEGER, "engine loads that it was to measure each run in"),
            Column("runs_done", f"(SELECT count(DISTINCT run_id) {_ITS_RESULTS})", INTEGER, "runs that it measured"),
            QUEUE_S,
            _plain("arrays", "time_s", INTEGER, "the time limit that its script asks Slurm for; none on this machine", "s"),
            Column("held_s", HELD_S, REAL, "time that all of its starts held a node; none before its end, and where Slurm did"
                   " not tell of every start; none on this machine", "s"),
            _gpu_s("asked_gpu_s", "arrays.time_s", "the time limit that Slurm was asked for"),
            _gpu_s("held_gpu_s", HELD_S, "time that all of its starts held a node"),
            _gpu_s("load_gpu_s", _LOAD_S, "load_s + init_s of each start that measured a run"),
            _gpu_s("warmup_gpu_s", _WARMUP_S, "warm-up of the runs that it measured"),
            _gpu_s("measured_gpu_s", _MEASURED_S, "the measured windows of all repeats"),
            _gpu_s("rest_gpu_s", f"{HELD_S} - {_LOAD_S} - {_WARMUP_S} - {_MEASURED_S}",
                   "time held for all else: starts that measured nothing, failed runs, log-probabilities, Slurm's and Python's"
                   " start and end"),
            _plain("jobs", "queued_at", TEXT, "when Slurm queued it, UTC; of one that was requeued, the last time"),
            _plain("jobs", "started_at", TEXT, "when its latest start began, UTC"),
            _plain("jobs", "ended_at", TEXT, "when it ended, UTC"),
        ),
        "FROM jobs LEFT JOIN arrays USING (array_id) LEFT JOIN submissions USING (submission_id)"
        f" LEFT JOIN runs ON runs.run_id = {_ONE_OF_ITS_RUNS}\n"
        "WHERE jobs.slurm_id IS NOT NULL OR jobs.job_id IN (SELECT job_id FROM executions)",
        JOBS_OF_RUNS,
    )  # fmt: skip


def views() -> list[View]:
    """Every view, as METRICS is now."""
    return [
        measured_runs(), measured_repeats(), measured_requests(), measured_devices(), failed_runs(), measured_jobs(),
    ]  # fmt: skip


def view_of(table: str) -> View:
    """The view with this short name. Raises KeyError."""
    return {view.table: view for view in views()}[table]


# ---------------------------------------------------------------- the tables under them

TABLES = {
    "runs": "Every cell that was asked for: one combination of all that can be asked. Its id is the hash of that.",
    "submissions": "One row a labctl submit: what was asked, as JSON.",
    "submission_runs": "Which runs a request asked for, in its order; skipped: measured already then.",
    "arrays": "One row a submission to Slurm: a job, or an array of jobs that share a script.",
    "jobs": "One row a job: its engine loads, its id in Slurm, its last known state, its times.",
    "job_runs": "Which runs a job was to do, in its order.",
    "given_runs": "Runs that labctl gave to another job, since theirs had left them unmeasured.",
    "executions": "One row a start of a job: on which node, as which process.",
    "results": "One row an execution of a run: done or failed, its load times, its fingerprint as JSON.",
    "repeats": "One row a measured pass, with every metric (measured_repeats has what was asked beside it).",
    "definitions": "With which version of its definition each metric of repeats was computed.",
    "devices": "One row a device of a measured pass, with its memory (measured_devices).",
    "samples": "One row a request of a measured pass (measured_requests).",
    "texts": "Every distinct answer, once.",
    "bundles": "What was imported: whose, and the SHA-256 of the bundle's file.",
    "folders": "Folders of records whose files are all in the index, as they were when that was seen.",
    "files": "Which files this index was made from, as they were when they were read.",
}  # fmt: skip


def metadata() -> dict[str, object]:
    """Datasette's metadata of the database: a description of every table and view, and of every column of the views; units
    where Datasette (before 1.0) can show them."""
    tables: dict[str, dict[str, object]] = {name: {"description": text} for name, text in TABLES.items()}
    tables["repeats"]["columns"] = _told(_metrics("repeats", ""))
    tables["repeats"]["units"] = _units(_metrics("repeats", ""))
    for view in views():
        tables[view.name] = {
            "description": view.text,
            "columns": _told(view.columns),
            "units": _units(view.columns),
        }
    return {
        "title": "What labctl measured",
        "description": "The views measured_runs, measured_repeats and measured_requests are where to begin.",
        "custom_units": ["tok = [token]", "nat = [information_in_nats]"],
        "databases": {f"labctl-{DATABASE_SCHEMA}": {"tables": tables}},
    }


def _told(columns: Iterable[Column]) -> dict[str, str]:
    return {column.name: column.told for column in columns}


# Datasette writes a number with its unit as Pint does; to Pint a B is a bel.
PINT = {"B": "byte"}


def _units(columns: Sequence[Column]) -> dict[str, str]:
    return {
        column.name: PINT.get(column.unit, column.unit) for column in columns if column.unit and column.kind != TEXT
    }
