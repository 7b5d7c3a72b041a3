"""The contract between the login node and the compute node: the specification of a job, its records, and where files lie.

Each document is a dataclass with a JSON form. An older labctl that rewrites a newer document keeps its unknown fields.
Units are in the names: `_s` seconds, `_bytes` bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, TypeVar

SCHEMA = 1

DTYPES = ("float16", "bfloat16", "float32")

# Exit status of a worker: what Slurm and a shell see.
EXIT_ALL_RUNS_DONE = 0
EXIT_A_RUN_FAILED = 1
# A file operation failed. If the job's log is on the same file system, only the exit status shows the reason.
EXIT_OF_ERRNO = {
    errno.ENOSPC: 73, errno.EDQUOT: 73, errno.EROFS: 74, errno.ESTALE: 75, errno.ENOTCONN: 75, errno.EACCES: 77,
}  # fmt: skip

D = TypeVar("D", bound="Document")
Scalar = str | int | float | bool  # the value of an engine option
S = TypeVar("S", str, int, float, bool)


class Refusal(Exception):
    """The worker cannot run the job as specified; `remedy` says what a person can do about it."""

    def __init__(self, kind: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.remedy = remedy


@dataclass
class Document:
    """A JSON object with known fields; `extra` keeps unknown ones for `to_json`."""

    extra: dict[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    @classmethod
    def from_json(cls: type[D], data: Mapping[str, Any]) -> D:
        """Build from a JSON object. Raises TypeError for any other value, and for a missing field that has no default."""
        if not isinstance(data, Mapping):
            raise TypeError(f"{cls.__name__} is a JSON object, not {type(data).__name__}")
        known = {f.name: f for f in fields(cls) if f.name != "extra"}
        values = {name: known[name].metadata.get("decode", _same)(data[name]) for name in data if name in known}
        return cls(**values, extra={name: value for name, value in data.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        """The JSON object, unknown fields included."""
        own = {f.name: json_form(getattr(self, f.name)) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **own}


def _same(value: Any) -> Any:
    return value


PLAIN = (str, int, float, bool)


def json_form(value: Any) -> Any:
    """The value with documents and other dataclasses, at any depth, as JSON objects."""
    if value is None or type(value) in PLAIN:  # most values
        return value
    if isinstance(value, Document):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: json_form(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (list, tuple)):
        return [json_form(item) for item in value]
    if isinstance(value, dict):
        return {key: json_form(item) for key, item in value.items()}
    return value


Decoder = dict[str, Callable[[Any], Any]]  # metadata of a field that holds documents


def _one(document: type[Document]) -> Decoder:
    return {"decode": document.from_json}


def _one_or_none(document: type[Document]) -> Decoder:
    return {"decode": lambda value: None if value is None else document.from_json(value)}


def _many(document: type[Document]) -> Decoder:
    return {"decode": lambda items: [document.from_json(item) for item in items]}


def _by_name(document: type[Document]) -> Decoder:
    return {"decode": lambda items: {name: document.from_json(item) for name, item in items.items()}}


# ---------------------------------------------------------------- the specification of a job

Prompt = str | list[dict[str, str]]  # a text, or messages with "role" and "content"


@dataclass
class ModelRef(Document):
    """A pinned model: a Hub id at a revision, or a local folder with a hash of its content.

    `path` is the folder on the node (None: the Hub's cache). Of a local folder, `fingerprint` is the content's SHA-256, and
    `stamp` hashes the names, sizes and times that its files had then; both are None for a Hub model.
    """

    name: str
    revision: str | None = None
    path: str | None = None
    fingerprint: str | None = None
    stamp: str | None = None

    @property
    def source(self) -> str:
        """The folder to load from, else the Hub id."""
        return self.path or self.name


@dataclass
class Sampling(Document):
    """Greedy decoding where `temperature` is 0, else sampling with `top_p` and `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass
class Workload(Document):
    """How the requests of a run are made (workload.py). A length is a text such as "1024" or "mean=1024,std=100,min=1,max=2048".

    `input_len`: prompts of random tokens, exactly so many (None: the run's prompts). `output_len`: tokens of each answer, exactly
    (None: the dataset's, else the run's `max_new_tokens`). `prefix_len`: first tokens that all random prompts share. `dataset`:
    the name of the file whose entries are the prompts, or the lengths, with the file's SHA-256. `seed`: of all that is drawn.
    """

    input_len: str | None = None
    output_len: str | None = None
    prefix_len: int = 0
    dataset: str | None = None
    sha256: str | None = None
    seed: int = 0


@dataclass
class Dataset(Document):
    """The sampled entries of a dataset: lists with a value for each prompt of the prompt set of the same id, or None.

    `output_tokens`: length of each answer. `answers`: texts whose lengths in tokens are those of the answers. A trace has no
    prompts: `input_tokens` are the lengths of random ones, `times_s` the arrivals, in seconds after the first.
    """

    output_tokens: list[int] | None = None
    answers: list[str] | None = None
    input_tokens: list[int] | None = None
    times_s: list[float] | None = None


@dataclass
class ScoredText(Document):
    """A text whose perplexity a run computes, by the SHA-256 of its documents. Its windows have at most `window` tokens, and each
    begins `stride` tokens after the one before it."""

    name: str
    sha256: str
    window: int
    stride: int


@dataclass
class QualityTask(Document):
    """A task of lm-evaluation-harness. `limit`: its first questions, of a group those of each of its tasks (None: all).
    `file`: a local task, with the SHA-256 of this file and of the files that it names."""

    name: str
    limit: int | None = None
    file: str | None = None
    sha256: str | None = None


@dataclass
class RunSpec(Document):
    """One run. `run_id` is the hash of `definition`, the resolved configuration; `prompt_set` names one of the job's prompt sets.

    `max_new_tokens` is None where each request has its own output length. `workload` None: the prompts in turn.

    At most `batch_size` requests are in flight at once. With a `request_rate` they arrive at that mean rate (requests/s) with
    the `burstiness` of `measure.arrivals_of`, else as soon as there is room. `requests` is the number of requests of a repeat
    (None: one for each prompt, filled up to whole batches). `repeats` and `warmup` count whole repeats. With
    `until`, at least `repeats` and at most `max_repeats` are measured, until the 95% interval of the mean throughput is that
    narrow: its half-width as a share of the mean. None of these four is part of the identity. `score` is a text of the job's
    `texts`, scored after the repeats. `tasks` are those that a served run answers after them.
    """

    run_id: str
    definition: dict[str, Any]
    prompt_set: str
    max_new_tokens: int | None
    batch_size: int = 1
    sampling: Sampling = field(default_factory=Sampling, metadata=_one(Sampling))
    ignore_eos: bool = False
    repeats: int = 3
    warmup: int = 1
    request_rate: float | None = None
    burstiness: float = 1.0
    requests: int | None = None
    until: float | None = None
    max_repeats: int = 100
    workload: Workload | None = field(default=None, metadata=_one_or_none(Workload))
    score: ScoredText | None = field(default=None, metadata=_one_or_none(ScoredText))
    tasks: list[QualityTask] = field(default_factory=list, metadata=_many(QualityTask))


# Of a repeat.
REQUESTS_AT_MOST = 10_000_000


def requests_per_repeat(asked: int | None, prompts: int, batch_size: int) -> int:
    """The number that the run asks for, else one request for each prompt, filled up to whole batches."""
    return asked or -(-prompts // batch_size) * batch_size


@dataclass
class ScriptSettings(Document):
    """The settings of a job's script, without secrets: `env`, variables by name; `setup`, shell lines.

    A Slurm script also has CPUs, memory (in Slurm's form), the option that requests GPUs ("--gres=gpu:2"), the value of --export,
    further `sbatch` options that may change a measurement, and the template with the SHA-256 of its source. Without Slurm they
    are None or empty.
    """

    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    cpus_per_task: int | None = None
    mem: str = ""
    gpu_option: str = ""
    export: str = ""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    template: str = ""
    template_sha256: str = ""


@dataclass
class LatencyLimit(Document):
    """At most `most_s` seconds of a latency ("ttft_s", "tpot_s", "e2e_s"): of this percentile of a repeat's requests; 100: of
    each request."""

    latency: str
    most_s: float
    percent: float = 100.0


@dataclass
class LoadSearch(Document):
    """Of the job's runs, which differ in their load alone, measure those that bisection needs to find the highest load that meets
    all limits. Runs with other settings are searches of their own."""

    limits: list[LatencyLimit] = field(metadata=_many(LatencyLimit))


@dataclass
class JobSpec(Document):
    """Runs that share engine loads. The job loads its engine `loads` times, one after another, and measures each run in each.

    `prompt_sets` and, for those of a dataset, `datasets` have the same ids. A prompt is a text, or the messages of a chat.

    `capability` is the partition's CUDA compute capability, such as "9.0" (None: any); `device` is "cuda" or "cpu". The worker
    enforces `time_limit_s` only for executor "local"; Slurm does otherwise. `parallel`: see engines.parallel. `defaults` are the
    partition's default dtype and number of GPUs: comparisons use them. Neither `defaults` nor `script` is part of a run's id.
    `served`: the engine runs behind its own server. `texts`: the documents of each scored text, by its SHA-256. `adapter`: the
    LoRA adapter of every request; the engine option `lora` then names it with the first digits of its fingerprint.
    """

    job_id: str
    partition: str
    executor: str
    backend: str
    model: ModelRef = field(metadata=_one(ModelRef))
    dtype: str
    device: str
    gpus: int
    runs: list[RunSpec] = field(metadata=_many(RunSpec))
    prompt_sets: dict[str, list[Prompt]]
    gpu: str = ""
    capability: str | None = None
    parallel: str = "layers"
    engine_options: dict[str, Scalar] = field(default_factory=dict)
    raw_prompt: bool = False
    time_limit_s: int = 3600
    defaults: dict[str, Any] = field(default_factory=dict)
    script: ScriptSettings | None = field(default=None, metadata=_one_or_none(ScriptSettings))
    loads: int = 1
    served: bool = False
    datasets: dict[str, Dataset] = field(default_factory=dict, metadata=_by_name(Dataset))
    search: LoadSearch | None = field(default=None, metadata=_one_or_none(LoadSearch))
    texts: dict[str, list[str]] = field(default_factory=dict)
    adapter: ModelRef | None = field(default=None, metadata=_one_or_none(ModelRef))
    schema: int = SCHEMA

    def option(self, name: str, kind: type[S]) -> S | None:
        """The value of an engine option; None where it is not set, or of another type."""
        value = self.engine_options.get(name)
        return value if isinstance(value, kind) else None


# ---------------------------------------------------------------- the record of a run


@dataclass
class EngineFingerprint(Document):
    """Versions and effective settings of an engine that may explain a difference between two records; None where unknown.

    `attention`: the implementation. `model_revision`: the loaded commit, or what was asked for. `devices_in_use`: one for each
    part of the model, such as "cuda:0". `host_peak_rss_bytes`: of the worker's process.
    """

    packages: dict[str, str] = field(default_factory=dict)
    effective_dtype: str | None = None
    cuda: str | None = None
    attention: str | None = None
    model_revision: str | None = None
    model_type: str | None = None
    devices_in_use: list[str] | None = None
    host_peak_rss_bytes: int | None = None


@dataclass
class InputFingerprint(Document):
    """`prompt_tokens`: the hash of the token ids of each prompt, in order; of random prompts, of the first request's. `left_out`:
    the number of a dataset's entries that were too long."""

    prompt_tokens: str
    left_out: int = 0


@dataclass
class DeviceMemory(Document):
    """Memory of one device, in bytes; None where the engine or the device does not report it.

    `weights_bytes`: parameters and buffers. `kv_cache_used_bytes`: keys and values at the end of the last batch;
    `kv_cache_reserved_bytes`: the engine's allocation for them. `peak_allocated_bytes` and `peak_reserved_bytes`: torch's
    allocator, over the measured window. `device_used_bytes`: NVML, the whole GPU with all processes.
    """

    device: str
    name: str = ""
    weights_bytes: int | None = None
    kv_cache_used_bytes: int | None = None
    kv_cache_reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None


@dataclass
class Sample(Document):
    """One request of one repeat. Times are in seconds.

    `handed_s`: from the start of the window until the engine gets the request (at a request rate: until it arrives).
    `token_times_s[i]`: from then until the host has token i. `finish_reason`: "stop" (the end token) or "length".
    `queued_s`: the wait before work on the request begins, at a request rate for a free place, then in the engine's queue
    (None: unknown). `engine_ttft_s` and `engine_tpot_s`: the engine's own times, to the first token in its core and for each
    further token (None: not reported). `log_probabilities`: natural, of each token given those before it, computed outside
    the window (None: unknown). `error`: why a served request failed; it has no tokens then. A served answer may have times
    and no token ids: the ids are unknown.
    """

    request: int
    prompt: int
    prompt_tokens: int
    token_ids: list[int]
    token_times_s: list[float]
    finish_reason: str
    text: str
    handed_s: float = 0.0
    queued_s: float | None = None
    engine_ttft_s: float | None = None
    engine_tpot_s: float | None = None
    log_probabilities: list[float] | None = None
    error: str | None = None


@dataclass
class ClientReport(Document):
    """The load generator of a served run: `busy_s`, how long its thread worked or waited for a CPU in the window; at a request
    rate `lag_s`, how long after the arrival of each request it turned to it."""

    name: str
    busy_s: float
    lag_s: list[float] | None = None


@dataclass
class GpuTelemetry(Document):
    """Samples of one GPU, a value for each of `Telemetry.times_s`; an empty list where the GPU or its driver has no such value.

    `index` is NVML's on the node. `utilisation_percent`: time in which a kernel ran. `throttle_reasons`: NVML's bit mask.
    `other_processes`: compute processes on the GPU that do not belong to the job; None where labctl cannot tell.
    """

    index: int
    power_w: list[float | None] = field(default_factory=list)
    sm_mhz: list[int | None] = field(default_factory=list)
    memory_mhz: list[int | None] = field(default_factory=list)
    temperature_c: list[int | None] = field(default_factory=list)
    utilisation_percent: list[int | None] = field(default_factory=list)
    memory_used_bytes: list[int | None] = field(default_factory=list)
    throttle_reasons: list[int | None] = field(default_factory=list)
    other_processes: list[int | None] = field(default_factory=list)


@dataclass
class Phase(Document):
    """A phase of a run ("loading", "warm-up", "measuring", "scoring", "answering tasks"), which lasts until the next one."""

    name: str
    start_s: float


@dataclass
class Telemetry(Document):
    """Samples of the run's GPUs and processes. All times are seconds on one clock; the first run of an engine load has the load
    too. `cpus_used`: CPU seconds a second of the worker and its processes. `rss_bytes`: their resident memory."""

    times_s: list[float] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list, metadata=_many(Phase))
    cpus_used: list[float | None] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    gpus: list[GpuTelemetry] = field(default_factory=list, metadata=_many(GpuTelemetry))


@dataclass
class EngineCounts(Document):
    """What an engine counts in a repeat; None where it does not.

    Speculative decoding: `drafts`, steps of a request with drafted tokens; `draft_tokens`, drafted; `accepted_tokens`, those that
    the model accepts. Prefix caching: `queried_tokens`, prompt tokens that are looked up; `cached_tokens`, those that are found.
    """

    drafts: int | None = None
    draft_tokens: int | None = None
    accepted_tokens: int | None = None
    queried_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass
class Repeat(Document):
    """One repeat of a run's requests: raw values, from which `measure.METRICS` computes the metrics.

    `wall_s`: seconds of generation alone. `started_s`: its start on the clock of the run's telemetry. `energy_j`: energy of all
    GPUs of the job in that time, from their counters; `sampled_energy_j`: the same from power samples. `seed`: of the repeat's
    random numbers (`measure.draw_seed`). `read_bytes_per_step`: bytes that a decode step must read at the mean context length.
    `memory_bandwidth_bytes_s`: of the GPUs that work at the same time. `discarded`: how often the repeat was measured
    again because the job was suspended. `client`: the load generator of a served run, whose window it is.
    """

    repeat: int
    wall_s: float
    samples: list[Sample] = field(metadata=_many(Sample))
    devices: list[DeviceMemory] = field(default_factory=list, metadata=_many(DeviceMemory))
    seed: int | None = None
    energy_j: float | None = None
    sampled_energy_j: float | None = None
    started_s: float | None = None
    read_bytes_per_step: float | None = None
    memory_bandwidth_bytes_s: float | None = None
    discarded: int = 0
    client: ClientReport | None = field(default=None, metadata=_one_or_none(ClientReport))
    counts: EngineCounts = field(default_factory=EngineCounts, metadata=_one(EngineCounts))


@dataclass
class Until(Document):
    """How `RunSpec.until` ended: the `target`, and the half-width of the 95% interval of the mean throughput, as a share of it
    (None: fewer than two repeats). `stopped_by`: "target", or the limit that came first: "repeats" or "time"."""

    target: float
    half_width: float | None
    stopped_by: str

    @property
    def reached(self) -> bool:
        return self.stopped_by == "target"


@dataclass
class TextScores(Document):
    """The scored text of a run, a value for each document: `nll`, the sum of the negative log-likelihoods of its scored tokens
    (nats), and `tokens`, their number. `error`: why the text was not scored; the lists are empty then."""

    nll: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: str | None = None


@dataclass
class TaskAnswers(Document):
    """The questions of a task, in order: a hash of each, and how right its answer is (0 to 1), by `metric` and `filter` of the
    harness. `error`: why the task has no answers; the lists are empty then."""

    task: str
    metric: str = ""
    filter: str = ""
    questions: list[str] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)
    error: str | None = None


@dataclass
class Failure(Document):
    """Why a run failed: `kind` for programs, `message` and `remedy` for people."""

    kind: str
    message: str
    remedy: str = ""
    traceback: str = ""


@dataclass
class Attempt(Document):
    """One start of a job, written at once: what runs where.

    `execution` stays the same when Slurm restarts the job (`restarts` is SLURM_RESTART_COUNT): a restart skips finished runs.
    `load` is the number of the engine load that measured the record, from 1.
    """

    attempt_id: str
    job_id: str
    execution: str
    started_at: str
    host: str
    node: str
    pid: int
    slurm_job_id: str | None = None
    slurm_partition: str | None = None
    restarts: int = 0
    python: str = ""
    load: int = 1

    def in_load(self, load: int) -> Attempt:
        """The same attempt in another engine load, with an id of its own for its records."""
        return self if load == self.load else replace(self, attempt_id=f"{self.attempt_id}.load{load}", load=load)


@dataclass
class RunResult(Document):
    """The record: one attempt at one run. `status` is "done" or "failed"; times are ISO 8601, UTC.

    `load_s` (weights to the devices), `init_s` (imports, checks and preparation until the engine is ready) and `warmup_s` are
    outside the measured window. `fingerprint` holds versions, hardware and effective settings. `tokens` is the text of each
    generated token id. `telemetry` covers the run, and of the first run the engine load.
    `until`: how repeats up to an interval ended. `scores`: of the run's scored text.
    `answers`: to the questions of its tasks.
    """

    run_id: str
    attempt: Attempt = field(metadata=_one(Attempt))
    status: str
    definition: dict[str, Any]
    started_at: str
    ended_at: str
    load_s: float | None = None
    init_s: float | None = None
    warmup_s: float | None = None
    repeats: list[Repeat] = field(default_factory=list, metadata=_many(Repeat))
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    until: Until | None = field(default=None, metadata=_one_or_none(Until))
    scores: TextScores | None = field(default=None, metadata=_one_or_none(TextScores))
    answers: list[TaskAnswers] = field(default_factory=list, metadata=_many(TaskAnswers))
    telemetry: Telemetry | None = field(default=None, metadata=_one_or_none(Telemetry))
    failure: Failure | None = field(default=None, metadata=_one_or_none(Failure))
    schema: int = SCHEMA


@dataclass
class Heartbeat(Document):
    """A worker's progress: its `phase` (waiting, loading, warm-up, measuring, ended), the engine load, and `done` of `total`
    measurements (runs times engine loads). `at` is a time of the node's clock. `slurm_started_at` is when Slurm started this
    attempt, by Slurm's clock."""

    attempt_id: str
    phase: str
    done: int
    total: int
    at: str
    host: str
    pid: int
    run_id: str | None = None
    slurm_job_id: str | None = None
    load: int = 1
    slurm_started_at: str | None = None


# ---------------------------------------------------------------- files

# The folder beside the package labctl_workers for packages that labctl copies to the node.
NODE_PACKAGES_FOLDER = "labctl_node_packages"


def run_id_of(definition: Mapping[str, Any]) -> str:
    """The run's id: the first 12 hexadecimal digits of the SHA-256 of `definition` as canonical JSON."""
    return sha256_of_json(definition)[:12]


def sha256_of_json(value: Any) -> str:
    """SHA-256 of the canonical JSON form (sorted keys, no spaces), as hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def utc_now() -> str:
    """The current time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part.

    `durable` also syncs file and folder to disk: a record survives a crash of the node. Only the file's own folder is created:
    a workspace that was moved is not created again. Raises OSError, and leaves no file behind, where the disk is full or the
    folder is gone or not writable.
    """
    # json.dumps encodes in C; json.dump calls Python for every value and takes several times as long.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    write_bytes(path, text.encode(), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """`write_json` for bytes."""
    path.parent.mkdir(exist_ok=True)
    with atomic_replace(path) as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_replace(
    path: Path, mode: str = "wb", *, permissions: int | None = None, **open_options: Any
) -> Iterator[IO[Any]]:
    """A temporary file that replaces `path` at the end of the block; it is deleted if the block fails."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, mode, **open_options) as file:
            yield file
        # mkstemp creates 0600; a workspace may be shared, so set the mode that open() would set.
        temporary.chmod(0o666 & ~_MASK[0] if permissions is None else permissions)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_umask() -> int:
    # Reading the umask requires setting it: once, before there are threads.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_MASK = [_read_umask()]


def follow_mode(folder: Path) -> None:
    """If the group can write the folder, let the group also write the files of this process and its children.

    Otherwise a member's umask of 022 locks the other members out of shared files. Other bits of the umask stay.
    """
    try:
        mode = folder.stat().st_mode
    except OSError:
        return
    if mode & stat.S_IWGRP:
        _MASK[0] &= ~(mode & stat.S_IRWXG)
        os.umask(_MASK[0])


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# A record of 500 requests of 4,000 tokens is 100 MB.
FILE_BYTES_AT_MOST = 256 * 2**20


class UnreadableError(ValueError):
    """A path that is not a document: not a regular file, or too large."""


@contextlib.contextmanager
def open_regular(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a regular file for reading. Raises UnreadableError for a pipe, a folder or a device, and OSError.

    In a shared folder, opening a pipe waits for a writer, and reading /dev/zero never ends.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnreadableError("not a regular file")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_bytes(path: str | Path, at_most: int = FILE_BYTES_AT_MOST) -> bytes:
    """Read a regular file of `at_most` bytes. Raises UnreadableError and OSError."""
    with open_regular(path) as file:
        too_large = os.fstat(file.fileno()).st_size > at_most
        content = b"" if too_large else file.read(at_most + 1)
    if too_large or len(content) > at_most:
        raise UnreadableError(f"larger than {at_most / 2**20:.0f} MiB")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError or ValueError (json.JSONDecodeError, UnreadableError)."""
    return parse_json(read_bytes(path))


def parse_json(text: bytes) -> Any:
    """Parse UTF-8 JSON. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise UnreadableError("lists or objects nested too deep") from None


# ---------------------------------------------------------------- where files lie
#
# .labctl/arrays/<array>/<index>.json            a JobSpec, which the worker reads
# .labctl/arrays/<array>/attempts/<id>.json      an Attempt
# .labctl/arrays/<array>/heartbeats/<index>.json a Heartbeat
# .labctl/arrays/<array>/moved.json              runs that labctl moved to other jobs: {job: {run: {"job": ..., "state": ...}}}
# .labctl/results/<run>/<attempt>.json            a RunResult
# .labctl/cache/<partition>/                      what engines compiled there


@dataclass(frozen=True)
class JobFolder:
    """Paths of one job's files, from the path of its JobSpec."""

    spec: Path

    @property
    def attempts(self) -> Path:
        return self.spec.parent / "attempts"

    @property
    def moved(self) -> Path:
        """The runs that labctl moved to other jobs."""
        return self.spec.parent / "moved.json"

    @property
    def heartbeat(self) -> Path:
        return self.spec.parent / "heartbeats" / self.spec.name

    @property
    def data(self) -> Path:
        """The workspace's folder .labctl."""
        return self.spec.parent.parent.parent

    @property
    def results(self) -> Path:
        return self.data / "results"

    def cache(self, partition: str) -> Path:
        """Code that engines compiled for the GPUs of a partition."""
        return self.data / "cache" / partition

    def record(self, run_id: str, attempt_id: str) -> Path:
        return self.results / run_id / f"{attempt_id}.json"

    def records(self, run_id: str) -> Iterator[Path]:
        """All records of a run, also those of other jobs."""
        return (self.results / run_id).glob("[!.]*.json")
