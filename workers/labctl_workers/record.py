"""The one contract between the login node and the compute node: what a job is asked, and what it answers.

Everything here is a plain dataclass with a JSON form. A document written by a newer labctl keeps its unknown fields
when an older one reads it and writes it again. Units are in the names: `_s` seconds, `_bytes` bytes.
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
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, TypeVar

SCHEMA = 1

DTYPES = ("float16", "bfloat16", "float32")

# Exit status of a worker: what Slurm and a shell see.
EXIT_ALL_RUNS_DONE = 0
EXIT_A_RUN_FAILED = 1
# A file of the job's failed. Where its log is on the same file system, this alone tells why.
EXIT_OF_ERRNO = {
    errno.ENOSPC: 73, errno.EDQUOT: 73, errno.EROFS: 74, errno.ESTALE: 75, errno.ENOTCONN: 75, errno.EACCES: 77,
}  # fmt: skip

D = TypeVar("D", bound="Document")


class Refusal(Exception):
    """The worker will not, or cannot, run what was asked; `remedy` is what a person can do about it."""

    def __init__(self, kind: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.remedy = remedy


@dataclass
class Document:
    """A JSON object with known fields; those it does not know are kept in `extra` and written back."""

    extra: dict[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    @classmethod
    def from_json(cls: type[D], data: Mapping[str, Any]) -> D:
        """Build from a JSON object. Raises TypeError for what is no object, and where a field without default is missing."""
        if not isinstance(data, Mapping):
            raise TypeError(f"{cls.__name__} is a JSON object, not {type(data).__name__}")
        known = {f.name: f for f in fields(cls) if f.name != "extra"}
        values = {name: _decoded(known[name].metadata, value) for name, value in data.items() if name in known}
        return cls(**values, extra={name: value for name, value in data.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        """The JSON object, unknown fields included."""
        own = {f.name: _encoded(getattr(self, f.name)) for f in fields(self) if f.name != "extra"}
        return {**self.extra, **own}


def _decoded(metadata: Mapping[str, Any], value: Any) -> Any:
    decode: Callable[[Any], Any] | None = metadata.get("decode")
    return value if decode is None else decode(value)


def _encoded(value: Any) -> Any:
    if isinstance(value, Document):
        return value.to_json()
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    return value


def _one(document: type[Document]) -> dict[str, Any]:
    return {"decode": document.from_json}


def _one_or_none(document: type[Document]) -> dict[str, Any]:
    return {"decode": lambda value: None if value is None else document.from_json(value)}


def _many(document: type[Document]) -> dict[str, Any]:
    return {"decode": lambda items: [document.from_json(item) for item in items]}


# ---------------------------------------------------------------- what is asked


@dataclass
class ModelRef(Document):
    """A model, pinned: a hub id at a revision, or a local folder known by its content.

    `name` is what people call it; `path` is where the node finds it (None: the hub's cache); `fingerprint` is the
    content's SHA-256 for a local folder (None for a hub model, whose revision is its fingerprint), and `stamp` a hash of its
    files' names, sizes and times when that was taken.
    """

    name: str
    revision: str | None = None
    path: str | None = None
    fingerprint: str | None = None
    stamp: str | None = None

    @property
    def source(self) -> str:
        """What to load it from: its folder, else its id on the hub."""
        return self.path or self.name


@dataclass
class Sampling(Document):
    """How the next token is chosen: greedy where `temperature` is 0, else sampled with `top_p` and `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass
class RunSpec(Document):
    """One cell. `run_id` is the hash of `asked`, all that was asked for, resolved; `prompt_set` names one of the
    job's prompt sets. At most `batch_size` requests are in flight at once; with a `request_rate` they come at that mean
    rate (requests/s, Poisson), else as soon as there is room. `requests` is how many a pass sends (None: the prompts, filled
    up to whole batches). `repeats` and `warmup` are counts of whole passes and are no part of the identity."""

    run_id: str
    asked: dict[str, Any]
    prompt_set: str
    max_new_tokens: int
    batch_size: int = 1
    sampling: Sampling = field(default_factory=Sampling, metadata=_one(Sampling))
    ignore_eos: bool = False
    repeats: int = 3
    warmup: int = 1
    request_rate: float | None = None
    requests: int | None = None


def requests_of_a_pass(asked: int | None, prompts: int, batch_size: int) -> int:
    """How many requests a pass sends: as many as were asked for, else each prompt once, filled up to whole batches."""
    return asked or -(-prompts // batch_size) * batch_size


@dataclass
class ScriptSettings(Document):
    """What a job's script sets around the worker, without secrets: `env`, variables by name; `setup`, shell lines. Of Slurm's
    scripts also CPUs, memory (Slurm's form), further `sbatch` options that may change a figure, and the template with the
    SHA-256 of its source; None and "" where no Slurm gives them."""

    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    cpus_per_task: int | None = None
    mem: str = ""
    sbatch: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    template_sha256: str = ""


@dataclass
class JobSpec(Document):
    """The runs that share an engine load, and how often that is: each run is measured in `loads` engine loads, one after another.

    `capability` is the partition's CUDA compute capability, such as "9.0" (None: any); `device` is "cuda" or "cpu";
    `time_limit_s` is enforced by the worker only where no Slurm does (executor "local"). `defaults` are the dtype and the number
    of GPUs that the partition gives where nobody names one: what is compared with what rests on them, no run's id does. `script`
    is no part of it either; it is in the record.
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
    prompt_sets: dict[str, list[str]]
    gpu: str = ""
    capability: str | None = None
    parallel: str = "layers"
    engine_options: dict[str, Any] = field(default_factory=dict)
    raw_prompt: bool = False
    time_limit_s: int = 3600
    defaults: dict[str, Any] = field(default_factory=dict)
    script: ScriptSettings | None = field(default=None, metadata=_one_or_none(ScriptSettings))
    loads: int = 1
    schema: int = SCHEMA


# ---------------------------------------------------------------- what is answered


@dataclass
class DeviceMemory(Document):
    """Memory of one device, in bytes; None where this engine or device cannot tell.

    `weights_bytes`: parameters and buffers. `kv_cache_used_bytes`: keys and values at the end of the last batch;
    `kv_cache_reserved_bytes`: what the engine holds for them. `peak_allocated_bytes` and `peak_reserved_bytes`: torch's
    allocator, over the measured window. `device_used_bytes`: NVML's figure for the whole GPU, every process included.
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
    """One request of one repeat.

    `token_times_s[i]` is when token i was known to the host, in seconds since the
    request was handed to the engine (or came, at a request rate), which was `handed_s` after the window's start;
    `finish_reason` is "stop" (the end token) or "length". `queued_s` is how long it waited before work on it began, in seconds:
    for a free place, where requests come at a rate, then in the engine's own queue, where the engine tells that (None: no
    wait is known). `engine_ttft_s` and `engine_tpot_s` are the engine's own figures, where it gives some, for the time to the
    first token (until its core has it) and for each token after it. `log_probabilities` are natural, of each token after those
    before it, from a pass of their own outside the window (None: the engine cannot tell).
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


@dataclass
class Repeat(Document):
    """One measured pass over the run's requests: raw values alone, of which `measure.METRICS` makes the metrics.

    `wall_s` is the time in which the engine was generating, seconds; nothing else is in it. `energy_j` is what all GPUs of
    the job took in it. `seed` is what the pass drew with (`measure.draw_seed`). `read_bytes_per_step` is what one decode step
    must read at the mean context; `memory_bandwidth_bytes_s` is that of the GPUs that work at once. `thrown_away` counts the
    passes before this one in which the job was suspended: each was measured again.
    """

    repeat: int
    wall_s: float
    samples: list[Sample] = field(metadata=_many(Sample))
    devices: list[DeviceMemory] = field(default_factory=list, metadata=_many(DeviceMemory))
    seed: int | None = None
    energy_j: float | None = None
    read_bytes_per_step: float | None = None
    memory_bandwidth_bytes_s: float | None = None
    thrown_away: int = 0


@dataclass
class Failure(Document):
    """Why a run has no result: `kind` for programs, `message` and `remedy` for people."""

    kind: str
    message: str
    remedy: str = ""
    traceback: str = ""


@dataclass
class Attempt(Document):
    """One execution of a job, written when it starts: what ran, where.

    `execution` stays the same when Slurm starts the job again (`restarts`, its SLURM_RESTART_COUNT): what one of them has
    finished, the next need not do. `load` is the job's engine load that a record was measured in, from 1.
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
        """The same execution in another of its engine loads: its records have an id of their own."""
        return self if load == self.load else replace(self, attempt_id=f"{self.attempt_id}.load{load}", load=load)


@dataclass
class RunResult(Document):
    """One execution of one run: the record. `status` is "done" or "failed"; times are ISO 8601, UTC.

    `load_s` (weights to the devices), `init_s` (all else until the engine is ready: imports, checks, and what it prepares)
    and `warmup_s` are apart from the measured window. `fingerprint` holds versions, hardware and effective settings; `tokens`
    the text of each token id that an answer has.
    """

    run_id: str
    attempt: Attempt = field(metadata=_one(Attempt))
    status: str
    asked: dict[str, Any]
    started_at: str
    ended_at: str
    load_s: float | None = None
    init_s: float | None = None
    warmup_s: float | None = None
    repeats: list[Repeat] = field(default_factory=list, metadata=_many(Repeat))
    fingerprint: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = field(default=None, metadata=_one_or_none(Failure))
    schema: int = SCHEMA


@dataclass
class Heartbeat(Document):
    """What a worker is doing: `phase` (waiting, loading, warm-up, measuring, ended), in which of the job's engine loads, and
    `done` of `total` measurements: runs times engine loads. `at` is by the node's clock, `slurm_started_at` by Slurm's: when it
    began the start of the job that this is a sign of."""

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

# What labctl brings along for the worker lies in this folder, beside the package labctl_workers.
NODE_PACKAGES_FOLDER = "labctl_node_packages"


def run_id_of(asked: Mapping[str, Any]) -> str:
    """The run's id: the first 12 hexadecimal digits of the SHA-256 of `asked` as canonical JSON."""
    return sha256_of_json(asked)[:12]


def sha256_of_json(value: Any) -> str:
    """SHA-256 of the canonical JSON form (sorted keys, no spaces), as hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def utc_now() -> str:
    """The time now as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def write_json(path: Path, value: Any, *, durable: bool = True, parents: bool = True) -> None:
    """Write atomically: a reader sees the old file or the new one, never a part.

    `durable` also forces file and folder to disk, so that a record survives the node; a heartbeat needs no such care. Without
    `parents`, only the file's own folder is made: a workspace that has been moved is not made again.
    Raises OSError, with no file left behind, where the disk is full or the folder cannot be written.
    """
    # In one piece: json.dump goes through Python for every value, which takes several times as long.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
    write_bytes(path, text.encode(), durable=durable, parents=parents)


def write_bytes(path: Path, content: bytes, *, durable: bool = True, parents: bool = True) -> None:
    """`write_json` for what is bytes already."""
    path.parent.mkdir(parents=parents, exist_ok=True)
    with taking_the_place_of(path) as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        _sync_folder(path.parent)


@contextlib.contextmanager
def taking_the_place_of(
    path: Path, kind: str = "wb", *, permissions: int | None = None, **opened: Any
) -> Iterator[IO[Any]]:
    """A new file beside `path`, which takes its place when it is whole; nothing is left of one that is not. `opened` is for
    open()."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, kind, **opened) as file:
            yield file
        # mkstemp makes 0600; a workspace may be shared, so give what open() would have given.
        temporary.chmod(0o666 & ~_MASK[0] if permissions is None else permissions)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_umask() -> int:
    # It can only be read by setting it: once, before there are threads.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_MASK = [_read_umask()]


def follow_mode(folder: Path) -> None:
    """Where a group may write the folder, what this process and its children make may be written by the group too: a member's
    umask of 022 would lock the others out of what all of them write. Other bits stay the umask's."""
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
    """A file that is there and is no document: no plain file, or too large for one."""


@contextlib.contextmanager
def open_plain(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a plain file to read. Raises UnreadableError for what is none (a pipe, a folder, a device), and OSError.

    A shared folder may hold anything: opening a pipe waits for its writer, and reading /dev/zero has no end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnreadableError("it is not a plain file")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def read_bytes(path: str | Path, at_most: int = FILE_BYTES_AT_MOST) -> bytes:
    """Read a plain file of `at_most` bytes. Raises UnreadableError and OSError."""
    with open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > at_most:
            raise UnreadableError(f"it is larger than {at_most / 2**20:.0f} MiB")
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise UnreadableError(f"it is larger than {at_most / 2**20:.0f} MiB")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError or ValueError (json.JSONDecodeError, UnreadableError)."""
    return from_text(read_bytes(path))


def from_text(text: bytes) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        raise UnreadableError("its lists and objects are nested too deep") from None


# ---------------------------------------------------------------- where things lie
#
# .labctl/batches/<batch>/<index>.json            a JobSpec: what the worker reads
# .labctl/batches/<batch>/attempts/<id>.json      an Attempt
# .labctl/batches/<batch>/heartbeats/<index>.json a Heartbeat
# .labctl/batches/<batch>/given.json              runs that labctl gave to another job: {job: {run: {"job": ..., "state": ...}}}
# .labctl/results/<run>/<attempt>.json            a RunResult
# .labctl/cache/<partition>/                      what engines compiled there


@dataclass(frozen=True)
class JobFolder:
    """Where one job's files lie, from the path of its JobSpec; the workspace may be moved, the layout may not."""

    spec: Path

    @property
    def attempts(self) -> Path:
        return self.spec.parent / "attempts"

    @property
    def given(self) -> Path:
        """Which runs of the batch's jobs labctl has given to other jobs."""
        return self.spec.parent / "given.json"

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
        """Where engines keep what they compiled for the GPUs of a partition."""
        return self.spec.parent.parent.parent / "cache" / partition

    def record(self, run_id: str, attempt_id: str) -> Path:
        return self.results / run_id / f"{attempt_id}.json"

    def records(self, run_id: str) -> Iterator[Path]:
        """The records of a run, those of other jobs included."""
        return (self.results / run_id).glob("[!.]*.json")
