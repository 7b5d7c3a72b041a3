"""The database's public views: SQL, description and unit of each column.

`labctl query`, `labctl export` and Datasette's metadata all read them here. METRICS defines the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from labctl_orchestrator.store.workspace import DATABASE_SCHEMA
from labctl_workers.measure import METRICS

# Origin of this workspace's own runs. Imported runs have their bundle's label.
HERE = "here"
TEXT, INTEGER, REAL = "text", "integer", "real"


@dataclass(frozen=True)
class Column:
    """One column of a view: its SQL, kind (text, integer, real), description and unit."""

    name: str
    sql: str
    kind: str
    text: str
    unit: str = ""

    @property
    def described(self) -> str:
        """The description with the unit."""
        return f"{self.text} [{self.unit}]" if self.unit else self.text


OF_RUNS = "run_id IN (SELECT value FROM json_each(?1))"
JOBS_OF_RUNS = (
    f"job_id IN (SELECT job_id FROM job_runs WHERE {OF_RUNS} UNION SELECT job_id FROM results WHERE {OF_RUNS})"
)


@dataclass(frozen=True)
class View:
    """One view. `table` is its short name in `labctl export`. `chosen` is the condition that selects the rows of some runs; its
    parameter is a JSON list of run ids."""

    name: str
    table: str
    text: str
    columns: tuple[Column, ...]
    source: str
    chosen: str = OF_RUNS

    @property
    def sql(self) -> str:
        """The CREATE VIEW statement."""
        columns = ",\n  ".join(f"{column.sql} AS {column.name}" for column in self.columns)
        return f"CREATE VIEW {self.name} AS SELECT\n  {columns}\n{self.source}"


def _column(table: str, name: str, kind: str, text: str, unit: str = "") -> Column:
    return Column(name, f"{table}.{name}", kind, text, unit)


# ---------------------------------------------------------------- run definition

AXES = (
    _column("runs", "origin", TEXT, f"{HERE} for this workspace, else the label of the imported bundle"),
    _column("runs", "partition", TEXT, "labctl partition"),
    _column("runs", "backend", TEXT, "engine: hf (transformers' generate), staged (labctl's pipeline of its modules) or vllm"),
    _column("runs", "model", TEXT, "model name"),
    _column("runs", "model_content", TEXT, "SHA-256 of a local checkpoint, or commit of a Hub model"),
    _column("runs", "dtype", TEXT, "dtype of weights and arithmetic; auto is resolved"),
    _column("runs", "device", TEXT, "cuda or cpu"),
    _column("runs", "gpus", INTEGER, "GPUs of the job"),
    _column("runs", "parallel", TEXT, "split of the model over GPUs: layers or tensor parallel"),
    Column("engine_options", "coalesce(runs.engine_options, '{}')", TEXT, "engine options, as JSON"),
    _column("runs", "max_new_tokens", INTEGER, "maximum answer length; NULL: each request has its own", "tok"),
    _column("runs", "input_len", TEXT, "tokens of each random prompt, or their distribution; NULL: prompts are texts", "tok"),
    _column("runs", "output_len", TEXT, "tokens of each answer, or their distribution; NULL: not asked", "tok"),
    _column("runs", "prefix_len", INTEGER, "first tokens that all random prompts share", "tok"),
    _column("runs", "dataset", TEXT, "file of prompts or of a trace, with digits of its SHA-256"),
    _column("runs", "workload_seed", INTEGER, "seed of random prompts, drawn lengths and sampled entries"),
    _column("runs", "served", INTEGER, "1: behind the engine's own server"),
    _column("runs", "batch_size", INTEGER, "maximum number of concurrent requests; NULL: no limit"),
    _column("runs", "request_rate", REAL, "mean arrival rate of requests; NULL: batch_size requests at a time", "1/s"),
    _column("runs", "burstiness", REAL, "shape of the gamma distribution of the arrivals; 1: Poisson"),
    _column("runs", "requests", INTEGER, "requests per repeat; NULL: the default"),
    _column("runs", "sampling", TEXT, "greedy, or temperature, top_p and seed"),
    _column("runs", "ignore_eos", INTEGER, "1: no answer ends before its full length"),
    _column("runs", "raw_prompt", INTEGER, "1: no chat template"),
    _column("runs", "score", TEXT, "scored text, with digits of its SHA-256, tokens of a window and its stride; NULL: none"),
    _column("runs", "quality", TEXT, "tasks of lm-evaluation-harness, with their number of questions; NULL: none"),
    _column("runs", "prompt_set", TEXT, "id of the prompts: first digits of their SHA-256"),
)  # fmt: skip
PROMPT = Column("first_prompt", "json_extract(runs.prompts, '$[0]')", TEXT, "first prompt of the set")

RUN_ID = _column("runs", "run_id", TEXT, "run id: hash of the run definition; imported runs add @ and their origin")
ATTEMPT_ID = _column("results", "attempt_id", TEXT, "attempt that measured the run")
# The + keeps SQLite from the index over all measured runs: a run has few results, so the search by run is faster.
_LATEST = (
    "SELECT attempt_id FROM results AS other WHERE other.run_id = results.run_id AND +other.status = 'done'"
    " ORDER BY other.ended_at DESC, other.attempt_id DESC LIMIT 1"
)
IS_LATEST = Column(
    "latest", f"results.attempt_id = ({_LATEST})", INTEGER, "1: latest attempt of the run, as compare uses it"
)

# ---------------------------------------------------------------- results


def _fact(name: str, path: str, text: str) -> Column:
    return Column(name, f"json_extract(results.facts, '$.{path}')", TEXT, text)


_GPUS = "(SELECT group_concat(json_extract(value, '$.name'), ' + ') FROM json_each(results.facts, '$.gpus'))"
FACTS = (
    Column("gpu", _GPUS, TEXT, "names of the GPUs"),
    _fact("effective_dtype", "effective_dtype", "dtype of the loaded weights"),
    _fact("attention", "attention", "attention kernel"),
    _fact("torch", "packages.torch", "torch version"),
    _fact("transformers", "packages.transformers", "transformers version"),
    _fact("vllm", "packages.vllm", "vLLM version"),
)


def _window(name: str, kind: str, text: str, unit: str = "") -> Column:
    return Column(name, f"json_extract(results.window, '$.{name}')", kind, text, unit)


WINDOW = (
    _column("results", "invalid", TEXT, "why the result is invalid: throttled, shared GPU; NULL: valid"),
    _window(
        "throttled_share", REAL, "share of the measured windows in which heat or a fault held the GPU's clocks back"
    ),
    _window("other_processes", INTEGER, "most processes of others on the GPUs in the windows"),
    _window("sm_mhz", REAL, "mean SM clock of the GPUs in the windows", "MHz"),
    _window("power_w", REAL, "mean power of all GPUs in the windows", "W"),
    _window("temperature_c", INTEGER, "highest temperature of the GPUs in the windows", "C"),
    _window("cpus_used", REAL, "mean CPUs that the worker and its processes used in the windows"),
)


def _seconds_between(start: str, end: str) -> str:
    return f"round((julianday({end}) - julianday({start})) * 86400, 3)"


# GPUs in the job's script. Records of older scripts lack it: then the run's, except for CPU runs, which may allocate GPUs too.
JOB_GPUS = "coalesce(arrays.gpus, CASE WHEN runs.device = 'cuda' OR runs.gpus = 0 THEN runs.gpus END)"
# Seconds that all starts before the latest one held their nodes. NULL for a restarted job without accounting, for a script that
# several Slurm jobs ran, and outside Slurm.
_HELD_BEFORE_S = (
    "(SELECT CASE WHEN count(DISTINCT slurm_job_id) > 1 OR count(slurm_job_id) < count(*) THEN NULL"
    " WHEN jobs.held_before_s IS NOT NULL THEN jobs.held_before_s"
    " WHEN count(*) < 2 AND coalesce(max(restarts), 0) = 0 THEN 0.0 END"
    " FROM job_starts WHERE job_starts.job_id = jobs.job_id)"
)
# NULL for a local job: its times include the wait for its turn, and end when labctl saw it end.
HELD_S = (
    "CASE WHEN arrays.executor IS NOT 'local' AND jobs.ended_at IS NOT NULL THEN"
    # A job that accounting reports as ended without a start was cancelled in the queue: 0 seconds.
    f" round(coalesce({_seconds_between('jobs.started_at', 'jobs.ended_at')}, jobs.held_before_s * 0) + {_HELD_BEFORE_S}, 3) END"
)
QUEUE_S = Column(
    "queue_s", _seconds_between("jobs.queued_at", "jobs.started_at"), REAL,
    "wait of the job in Slurm's queue; of a requeued job, before its latest start", "s",
)  # fmt: skip
LOAD = (
    _column("results", "load_s", REAL, "time to load the weights onto the devices", "s"),
    _column("results", "init_s", REAL, "engine start without load_s: imports, compilation, checks", "s"),
    _column("results", "warmup_s", REAL, "warm-up before the measured repeats", "s"),
    QUEUE_S,
    Column("gpu_s", f"{HELD_S} * {JOB_GPUS}", REAL, "GPUs x time that the job held them, over all its starts", "s"),
)
WHERE_AND_WHEN = (
    _column("results", "node", TEXT, "node"),
    _column("results", "started_at", TEXT, "start of the run, UTC"),
    _column("results", "ended_at", TEXT, "end of the run, UTC"),
    _column("jobs", "slurm_id", TEXT, "Slurm job id"),
)


# compare averages the latest engine load of a run and the earlier ones with the same facts; valid ones, if there are any.
_ALIKE = "{0}.run_id = results.run_id AND +{0}.status = 'done' AND {0}.facts IS results.facts"
_LIKE_THE_LATEST = (
    f"SELECT attempt_id FROM results AS alike WHERE {_ALIKE.format('alike')} AND (alike.invalid IS NULL"
    f" OR NOT EXISTS (SELECT 1 FROM results AS valid WHERE {_ALIKE.format('valid')} AND valid.invalid IS NULL))"
)


def _mean(metric: str) -> str:
    """The mean over engine loads, as `compare` computes it (`comparison.mean_of`): geometric if the metric has a better
    direction and all values are positive, else arithmetic."""
    of_loads = (
        f"(SELECT avg({metric}) AS of_load, avg(ln({metric})) AS of_log, min({metric}) AS low FROM repeats"
        f" WHERE repeats.run_id = results.run_id AND repeats.attempt_id IN ({_LIKE_THE_LATEST}) AND {metric} IS NOT NULL"
        " GROUP BY repeats.attempt_id)"
    )
    if not METRICS[metric].better:
        return f"(SELECT avg(of_load) FROM {of_loads})"
    return f"(SELECT CASE WHEN min(low) > 0 THEN exp(avg(of_log)) ELSE avg(of_load) END FROM {of_loads})"


def _metric_columns(sql: Callable[[str], str], suffix: str = "") -> tuple[Column, ...]:
    return tuple(
        Column(name, sql(name), REAL, f"{metric.title}: {metric.definition}{suffix}", metric.unit)
        for name, metric in METRICS.items()
    )


# Every load has the same documents, so a mean over all of them is the mean of the loads.
_NLL_PER_TOKEN = (
    "(SELECT sum(nll) / sum(tokens) FROM documents WHERE documents.run_id = results.run_id"
    f" AND documents.attempt_id IN ({_LIKE_THE_LATEST}))"
)
SCORES = (
    Column("perplexity", f"exp({_NLL_PER_TOKEN})", REAL, "perplexity of the scored text; mean over engine loads"),
    Column(
        "accuracy",
        "(SELECT avg(correct) FROM questions WHERE questions.run_id = results.run_id"
        f" AND questions.attempt_id IN ({_LIKE_THE_LATEST}))",
        REAL,
        "share of right answers to the questions of the tasks; mean over engine loads",
    ),
    Column(
        "mean_log_likelihood",
        f"-{_NLL_PER_TOKEN}",
        REAL,
        "mean log-likelihood of a token of the scored text",
        "nat/tok",
    ),
)

_RUN_RESULTS = "FROM results JOIN runs USING (run_id) LEFT JOIN jobs USING (job_id)"
_REPEATS = (
    "(SELECT count(*) FROM repeats WHERE repeats.run_id = results.run_id AND repeats.attempt_id = results.attempt_id)"
)
_SUBMISSIONS = (
    "(SELECT group_concat(name, ', ') FROM (SELECT coalesce(name, submission_id) AS name FROM submission_runs"
    " JOIN submissions USING (submission_id) WHERE submission_runs.run_id = runs.run_id ORDER BY created_at))"
)


def measured_runs() -> View:
    return View(
        "measured_runs",
        "runs",
        "One row per measured run, from its latest attempt: configuration, mean of each metric over loads, versions, hardware.",
        (
            RUN_ID,
            Column("submissions", _SUBMISSIONS, TEXT, "names of the submissions that contain the run, oldest first"),
            *AXES,
            PROMPT,
            Column("repeats", _REPEATS, INTEGER, "number of repeats"),
            *_metric_columns(_mean, "; mean over engine loads"),
            *SCORES,
            *LOAD,
            _column("results", "tokens_generated", TEXT, "distinct answer lengths, separated by /", "tok"),
            _column("results", "finish_reasons", TEXT, "distinct finish reasons, separated by /: stop, length"),
            *FACTS,
            *WINDOW,
            *WHERE_AND_WHEN,
            Column("text", "texts.text", TEXT, "first answer"),
            ATTEMPT_ID,
            Column("record", "results.path", TEXT, "path of the record with all raw values, relative to .labctl"),
        ),
        f"{_RUN_RESULTS} LEFT JOIN arrays USING (array_id) LEFT JOIN texts USING (text_id)\n"
        f"WHERE results.status = 'done' AND results.attempt_id = ({_LATEST})",
    )


def measured_repeats() -> View:
    return View(
        "measured_repeats",
        "repeats",
        "One row per repeat of every attempt, with every metric.",
        (
            RUN_ID,
            ATTEMPT_ID,
            _column("repeats", "repeat", INTEGER, "number of the repeat, from 0"),
            IS_LATEST,
            *AXES,
            _column("repeats", "seed", INTEGER, "random seed; NULL: greedy"),
            _column("repeats", "wall_s", REAL, "wall time of the repeat", "s"),
            _column(
                "repeats",
                "discarded",
                INTEGER,
                "repeats that labctl discarded before this one because Slurm suspended the job",
            ),
            *_metric_columns("repeats.{}".format),
            *FACTS,
            *WHERE_AND_WHEN,
        ),
        f"{_RUN_RESULTS} JOIN repeats USING (run_id, attempt_id)\nWHERE results.status = 'done'",
    )


def measured_requests() -> View:
    names = ("ttft_s", "tpot_s", "e2e_s", "queued_s", "mean_log_probability", "repeated_bigrams")
    figures = (
        _column(
            "samples", name, REAL, METRICS[name].definition.removesuffix(", median of requests"), METRICS[name].unit
        )
        for name in names
    )
    return View(
        "measured_requests",
        "requests",
        "One row per request of a repeat: times, finish reason, text.",
        (
            RUN_ID,
            ATTEMPT_ID,
            _column("samples", "repeat", INTEGER, "number of the repeat, from 0"),
            _column("samples", "request", INTEGER, "number of the request in its repeat, from 0"),
            IS_LATEST,
            *AXES,
            Column("prompt", "json_extract(runs.prompts, '$[' || samples.prompt || ']')", TEXT, "prompt"),
            _column("samples", "prompt_tokens", INTEGER, "prompt length with chat template", "tok"),
            _column("samples", "output_tokens", INTEGER, "answer length with end token", "tok"),
            *figures,
            _column(
                "samples", "handed_s", REAL, "time from the repeat's start until the engine received the request", "s"
            ),
            _column("samples", "engine_ttft_s", REAL, "time to first token as the engine reports it", "s"),
            _column("samples", "finish_reason", TEXT, "stop (end token), length, or error"),
            _column("samples", "error", TEXT, "why a served request failed; NULL: it did not"),
            Column("text", "texts.text", TEXT, "answer"),
        ),
        f"{_RUN_RESULTS} JOIN samples USING (run_id, attempt_id) LEFT JOIN texts ON texts.text_id = samples.text_id\n"
        "WHERE results.status = 'done'",
    )


def measured_devices() -> View:
    names = (
        "weights_bytes", "kv_cache_used_bytes", "kv_cache_reserved_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
        "device_used_bytes",
    )  # fmt: skip
    memory = (
        _column("devices", name, INTEGER, METRICS[name].definition.removesuffix(", fullest GPU"), METRICS[name].unit)
        for name in names
    )
    return View(
        "measured_devices",
        "devices",
        "One row per device of a repeat: its memory by kind.",
        (
            RUN_ID,
            ATTEMPT_ID,
            _column("devices", "repeat", INTEGER, "number of the repeat, from 0"),
            Column("device_id", "devices.device", TEXT, "device id, such as cuda:0"),
            IS_LATEST,
            Column("device_name", "devices.name", TEXT, "product name of the device"),
            *AXES,
            *memory,
        ),
        f"{_RUN_RESULTS} JOIN devices USING (run_id, attempt_id)\nWHERE results.status = 'done'",
    )


def failed_runs() -> View:
    return View(
        "failed_runs",
        "failures",
        "One row per failed attempt of a run: reason and remedy.",
        (
            RUN_ID,
            ATTEMPT_ID,
            *AXES,
            _column("results", "failure_kind", TEXT, "kind of failure, one word"),
            _column("results", "failure", TEXT, "error message"),
            _column("results", "remedy", TEXT, "remedy"),
            *WHERE_AND_WHEN,
        ),
        f"{_RUN_RESULTS}\nWHERE results.status != 'done'",
    )


# Axes that all runs of a job share.
JOB_AXES = ("origin", "partition", "backend", "model", "model_content", "dtype", "device", "parallel", "engine_options")
_JOB_RESULTS = "FROM results WHERE results.job_id = jobs.job_id AND +results.status = 'done'"
# The runs of one start share its engine load, so it counts once.
_LOAD_S = (
    f"coalesce((SELECT sum(of_a_start) FROM (SELECT max(load_s) + max(init_s) AS of_a_start {_JOB_RESULTS}"
    " GROUP BY attempt_id)), 0.0)"
)
_WARMUP_S = f"coalesce((SELECT sum(warmup_s) {_JOB_RESULTS}), 0.0)"
_MEASURED_S = (
    "coalesce((SELECT sum(wall_s) FROM results JOIN repeats USING (run_id, attempt_id)"
    " WHERE results.job_id = jobs.job_id AND +results.status = 'done'), 0.0)"
)
_JOB_SUBMISSIONS = (
    "(SELECT group_concat(name, ', ') FROM (SELECT DISTINCT coalesce(planned.name, planned.submission_id) AS name FROM job_runs"
    " JOIN submission_runs USING (run_id) JOIN submissions AS planned USING (submission_id) WHERE job_runs.job_id = jobs.job_id"
    " ORDER BY planned.created_at))"
)
_STARTS = "(SELECT max(count(*), coalesce(max(restarts) + 1, 0)) FROM job_starts WHERE job_starts.job_id = jobs.job_id)"
# Imported jobs have records, but no list of planned runs.
_ANY_RUN = (
    "coalesce((SELECT min(run_id) FROM job_runs WHERE job_runs.job_id = jobs.job_id),"
    " (SELECT min(run_id) FROM results WHERE results.job_id = jobs.job_id))"
)


def _gpu_s(name: str, seconds: str, text: str) -> Column:
    return Column(name, f"round({JOB_GPUS} * ({seconds}), 3)", REAL, f"GPUs x {text}", "s")


def measured_jobs() -> View:
    return View(
        "measured_jobs",
        "jobs",
        "One row per job that Slurm or this machine accepted: its runs, and the use of its GPU time.",
        (
            _column("jobs", "job_id", TEXT, "labctl job id"),
            _column("jobs", "slurm_id", TEXT, "Slurm job id; of a local job its process id"),
            Column("submission", "coalesce(submissions.name, submissions.submission_id)", TEXT,
                   "submission that queued the job; NULL: an imported job, or a script submitted by hand"),
            Column("submissions", _JOB_SUBMISSIONS, TEXT, "names of all submissions that contain runs of the job, oldest first"),
            *(column for column in AXES if column.name in JOB_AXES),
            Column("gpus", JOB_GPUS, INTEGER, "GPUs that the script requests; 0 on a partition without GPUs"),
            _column("jobs", "node", TEXT, "node of the latest start"),
            _column("jobs", "state", TEXT, "last known Slurm state"),
            Column("starts", _STARTS, INTEGER, "starts of the job; Slurm requeued it if there are several"),
            Column("runs_planned", "nullif((SELECT count(*) FROM job_runs WHERE job_runs.job_id = jobs.job_id), 0)", INTEGER,
                   "runs in the job; NULL: an imported job"),
            _column("jobs", "loads", INTEGER, "planned engine loads per run"),
            Column("runs_done", f"(SELECT count(DISTINCT run_id) {_JOB_RESULTS})", INTEGER, "runs that the job measured"),
            QUEUE_S,
            _column("arrays", "time_s", INTEGER, "time limit in the script; NULL: a local job", "s"),
            Column("held_s", HELD_S, REAL, "time that the job held its node, over all its starts; NULL: not ended, a local job,"
                   " or no accounting of a restart", "s"),
            _gpu_s("limit_gpu_s", "arrays.time_s", "time limit in the script"),
            _gpu_s("held_gpu_s", HELD_S, "held_s"),
            _gpu_s("load_gpu_s", _LOAD_S, "(load_s + init_s) of each start that measured a run"),
            _gpu_s("warmup_gpu_s", _WARMUP_S, "warm-up of the measured runs"),
            _gpu_s("measured_gpu_s", _MEASURED_S, "wall time of all repeats"),
            _gpu_s("rest_gpu_s", f"{HELD_S} - {_LOAD_S} - {_WARMUP_S} - {_MEASURED_S}",
                   "rest of held_s: starts without a result, failed runs, scoring of answers, start and end of Slurm and Python"),
            _column("jobs", "queued_at", TEXT, "Slurm's submit time, UTC; of a requeued job, of the last requeue"),
            _column("jobs", "started_at", TEXT, "latest start, UTC"),
            _column("jobs", "ended_at", TEXT, "end, UTC"),
        ),
        "FROM jobs LEFT JOIN arrays USING (array_id) LEFT JOIN submissions USING (submission_id)"
        f" LEFT JOIN runs ON runs.run_id = {_ANY_RUN}\n"
        "WHERE jobs.slurm_id IS NOT NULL OR jobs.job_id IN (SELECT job_id FROM job_starts)",
        JOBS_OF_RUNS,
    )  # fmt: skip


def views() -> list[View]:
    """All views, for the metrics that METRICS now defines."""
    return [
        measured_runs(), measured_repeats(), measured_requests(), measured_devices(), failed_runs(), measured_jobs(),
    ]  # fmt: skip


def view_of(table: str) -> View:
    """The view with this short name. Raises KeyError."""
    return {view.table: view for view in views()}[table]


# ---------------------------------------------------------------- tables

TABLES = {
    "runs": "One row per run: one configuration to measure. Its id is the hash of its definition.",
    "submissions": "One row per labctl submit, with its settings as JSON.",
    "submission_runs": "Runs of each submission, in order. skipped = 1: the run was measured already.",
    "arrays": "One row per sbatch call: a job array, or a single job.",
    "jobs": "One row per job: planned engine loads, Slurm id, last known state, times.",
    "job_runs": "Runs of each job, in order.",
    "moved_runs": "Runs that labctl moved to another job, because their first job left them unmeasured.",
    "job_starts": "One row per start of a job: node, process, restart count.",
    "results": "One row per record, which is one attempt of a run: status, load times, fingerprint as JSON.",
    "repeats": "One row per repeat, with every metric. measured_repeats adds the run's configuration.",
    "metric_versions": "Version of each metric's definition that computed the rows of repeats.",
    "devices": "One row per device of a repeat, with its memory. measured_devices adds the run's configuration.",
    "samples": "One row per request of a repeat. measured_requests adds configuration and texts.",
    "documents": "One row per document of a run's scored text: its negative log-likelihood in nats, and its scored tokens.",
    "questions": "One row per question of a run's tasks: a hash of the question, and how right the answer is (0 to 1).",
    "texts": "Answers, each distinct text once.",
    "bundles": "Imported bundles: author and SHA-256 of the file.",
    "folders": "Folders of indexed files, with their modification time when all files were indexed; 0: to list again.",
    "files": "Files that this database indexes, with modification time and size when labctl read them.",
}  # fmt: skip


def metadata() -> dict[str, object]:
    """Datasette's metadata: descriptions of all tables, views and view columns, and units, which Datasette shows before 1.0."""
    tables: dict[str, dict[str, object]] = {name: {"description": text} for name, text in TABLES.items()}
    tables["repeats"] |= _columns_metadata(_metric_columns("repeats.{}".format))
    for view in views():
        tables[view.name] = {"description": view.text} | _columns_metadata(view.columns)
    return {
        "title": "labctl measurements",
        "description": "Start with the views measured_runs, measured_repeats and measured_requests.",
        "custom_units": ["tok = [token]", "req = [request]", "nat = [information_in_nats]"],
        "databases": {f"labctl-{DATABASE_SCHEMA}": {"tables": tables}},
    }


# Datasette formats numbers with Pint, which reads B as bel.
PINT = {"B": "byte"}


def _columns_metadata(columns: Iterable[Column]) -> dict[str, object]:
    described = {column.name: column.described for column in columns}
    units = {
        column.name: PINT.get(column.unit, column.unit) for column in columns if column.unit and column.kind != TEXT
    }
    return {"columns": described, "units": units}
