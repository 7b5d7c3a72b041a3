"""Partitions: Slurm options, GPU, time limits, Python and template of one kind of node."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import msgspec

from labctl_slurm import containers
from labctl_slurm.containers import Container
from labctl_slurm.errors import WrongUseError, in_words, nearest
from labctl_slurm.resources import NONE, GpuRequest, Resources, cpus_of, is_memory
from labctl_workers.environment import SECRET_NAME, TOKEN, is_secret
from labctl_workers.record import DTYPES

# Options that labctl writes into every script, and the key of a partition for each ("": none). An override would make the records
# wrong.
MANAGED_OPTIONS = {
    "account": "account", "array": "", "chdir": "", "cpus-per-task": "cpus_per_task", "error": "", "export": "export",
    "gpus": "gpu_request", "gpus-per-node": "gpu_request", "gpus-per-task": "gpu_request", "gres": "gpu_request",
    "job-name": "", "mem": "mem", "mem-per-cpu": "mem", "mem-per-gpu": "mem", "nodes": "", "ntasks": "",
    "ntasks-per-node": "", "open-mode": "", "output": "", "parsable": "", "partition": "slurm_partition", "signal": "",
    "tasks-per-node": "", "time": "time", "wrap": "",
    # With these, sbatch would not queue this job here and return.
    "clusters": "cluster", "cpus-per-gpu": "cpus_per_task", "gpus-per-socket": "gpu_request", "ntasks-per-gpu": "",
    "test-only": "", "wait": "",
}  # fmt: skip
# The value of the key that makes labctl write the option.
FORM_OF_OPTION = {
    "cpus-per-gpu": '"8 per-gpu"', "gpus": '"gpus"', "gpus-per-node": '"gpus-per-node"', "gres": '"gres"',
    "mem-per-cpu": '"8G per-cpu"', "mem-per-gpu": '"64G per-gpu"',
}  # fmt: skip
# Options of sbatch without a value, or with an optional one (exclusive).
OPTIONS_WITHOUT_VALUE = frozenset((
    "contiguous", "disable-stdout-job-summary", "exclusive", "hold", "ignore-pbs", "no-requeue", "overcommit", "oversubscribe",
    "quiet", "reboot", "requeue", "spread-job", "use-min-nodes", "verbose",
))  # fmt: skip
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\}|[({])")
# A shell expands ~ at the beginning of a word, and in an assignment after each colon.
_HOME = re.compile(r"(?:^|(?<=:))~[A-Za-z0-9_.-]*(?=[/:]|$)")
# A setup line that sets a secret to a literal value, not to a path, a command's output or another variable.
_SECRET_IN_SETUP = re.compile(
    rf"(?:^|[;&|]\s*|\bexport\s+)({SECRET_NAME}(?<!_FILE)(?<!_PATH)(?<!_DIR))=(?![^\s;]*[$`])[^\s;]", re.IGNORECASE
)
_TIME = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<a>[0-9]+)(?::(?P<b>[0-9]+))?(?::(?P<c>[0-9]+))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PRICE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s+(\S(?:.*\S)?)\s*")


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of node. `time` and `max_time` are the least and the largest time limit of a job in Slurm's form (`max_time` "":
    Slurm's limit). `cluster` is for sites with several ("": that of the shell). `mem` and `cpus_per_task` have the forms of
    `resources`; a value "none" omits the option. `gpu_memory_gib` is of one GPU, `gpu_bandwidth_gb_s` of its memory in 10^9
    bytes per second, `capability` CUDA's compute capability ("9.0"), `price_per_gpu_hour` a number and a currency ("2.50 EUR").
    `setup` are shell lines before the worker, `env` its variables, `sbatch` further options; `python` runs it, in the
    `container` ("": none), which sees the folders of `container_binds`. `offline`: nodes cannot reach the Hub. `poll_s`: the
    least time between two queries of a command that waits for Slurm."""

    name: str
    executor: Literal["slurm", "local"] = "slurm"
    slurm_partition: str = ""
    cluster: str = ""
    account: str = ""
    time: str = "0-01:00:00"
    max_time: str = ""
    mem: str = "64G"
    cpus_per_task: Annotated[int, msgspec.Meta(ge=1)] | str = 8
    tasks: Literal["one", "none"] = "one"
    export: Literal["ALL", "NONE", "none"] = "ALL"
    arrays: bool = True
    poll_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] | None = None
    login_shell: bool = False
    gpus: Annotated[int, msgspec.Meta(ge=1)] = 2
    gpu_request: GpuRequest = "gres"
    gpu_type: str = ""
    gpu: str = ""
    gpu_memory_gib: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    gpu_bandwidth_gb_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    capability: str | None = None
    dtype: str = "auto"
    device: Literal["cuda", "cpu", "auto"] = "cuda"
    python: str = ""
    container: str = ""
    container_binds: list[str] = []
    setup: list[str] = []
    env: dict[str, str] = {}
    offline: bool = False
    template: str = ""
    sbatch: dict[str, str | int | bool] = {}
    price_per_gpu_hour: str = ""

    @property
    def time_limit_s(self) -> int:
        return seconds(self.time)

    @property
    def slurm_names(self) -> list[str]:
        """Slurm's partitions that may start the job; none where Slurm chooses by other options."""
        return [] if self.slurm_partition == NONE else [name.strip() for name in self.slurm_partition.split(",")]

    @property
    def image(self) -> Container | None:
        """The container of the worker; None without one."""
        return containers.parsed(self.container)

    @property
    def python_name(self) -> str:
        """The Python and its container, in words."""
        return f"{self.python} in {self.image.image}" if self.image else self.python

    def command(self, arguments: Sequence[str], folders: Iterable[Path], variables: Mapping[str, str]) -> list[str]:
        """The words that run the partition's Python with these arguments. In a container it sees these folders, and the
        variables and those of `env` have these values: an image may set others."""
        words = [self.python, *arguments]
        if self.image is None:
            return words
        values = [f"{name}={value}" for name, value in {**self.env, **variables}.items()]
        program = ["env", *values, *words]
        return self.image.words(program, folders, self.container_binds, gpus=self.device != "cpu")

    def resources(self, gpus: int) -> Resources:
        """The resources that a job with this number of GPUs requests."""
        return Resources(
            partition="" if self.slurm_partition == NONE else self.slurm_partition,
            account=self.account,
            time=self.time,
            gpus=0 if self.device == "cpu" and not self.gpu else gpus,
            gpu_request=self.gpu_request,
            gpu_type=self.gpu_type,
            memory=self.mem,
            cpus=cpus_of(self.cpus_per_task, gpus),
            one_task=self.tasks == "one",
            cluster=self.cluster,
        )


KEYS = tuple(name for name in Partition.__struct_fields__ if name != "name")


@cache
def shipped() -> Mapping[str, Mapping[str, object]]:
    """The tables of partitions.toml, by name."""
    text = files("labctl_slurm").joinpath("partitions.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text)["partitions"], dict[str, dict[str, object]])


def check_table(name: str, table: object, source: Path) -> Mapping[str, object]:
    """A [partitions.NAME] table of a settings file. Raises WrongUseError for an unknown key."""
    where = f"{source}: [partitions.{name}]"
    if not isinstance(table, dict):
        raise WrongUseError(f"{where} must be a table", f"write [partitions.{name}], and below it one key per line")
    for key in table:
        if key not in KEYS:
            raise WrongUseError(f"{where} has no key {key!r}", nearest(key, KEYS))
    return table


@dataclass
class _Sources:
    """The source of each key and of each entry ("env.HF_HOME") of a partition, for errors."""

    partition: str
    of: dict[str, str] = field(default_factory=dict)

    def error(self, key: str, problem: str, remedy: str, entry: str = "") -> WrongUseError:
        source = self.of.get(f"{key}.{entry}", self.of.get(key, "partitions"))
        if source == "flags":
            return WrongUseError(
                f"--{key.replace('_', '-')}: {problem}", remedy.replace(f"{key} = ", f"--{key} ").replace('"', "")
            )
        return WrongUseError(f"{source}: [partitions.{self.partition}] {key}: {problem}", remedy)


def build(name: str, tables: Iterable[tuple[str, Mapping[str, object]]]) -> Partition:
    """The partition of these (source, table) pairs: later tables override earlier ones key by key, `env` and `sbatch` entry by
    entry. Raises WrongUseError with the source of an invalid value."""
    merged: dict[str, object] = {}
    sources = _Sources(name)
    for source, table in tables:
        for key, value in table.items():
            earlier = merged.get(key)
            both = key in ("env", "sbatch") and isinstance(value, dict) and isinstance(earlier, dict)
            merged[key] = {**earlier, **value} if both else value  # type: ignore[dict-item]
            sources.of[key] = source
            if isinstance(value, dict):
                sources.of.update({f"{key}.{entry}": source for entry in value})
    capability = merged.get("capability")
    if isinstance(capability, int | float) and not isinstance(capability, bool):
        merged["capability"] = f"{float(capability):.1f}"
    own_python = "python3" if merged.get("container") else sys.executable
    for key, default in (("slurm_partition", name), ("python", own_python)):
        if merged.get(key, "") == "":
            merged[key] = default
    _set_offline(merged)
    _expand(merged, sources)
    try:
        partition = msgspec.convert({**merged, "name": name}, Partition)
    except msgspec.ValidationError as error:
        raise _type_error(error, merged, sources) from None
    _check_values(partition, sources)
    return partition


def _set_offline(merged: dict[str, object]) -> None:
    """Set `offline` and HF_HUB_OFFLINE of `env` from each other."""
    env = merged.get("env", {})
    if not isinstance(env, dict):
        return  # a type error, which `build` reports
    if "offline" not in merged and str(env.get(OFFLINE, "")).upper() in _TRUE:
        merged["offline"] = True
    if merged.get("offline") is True:
        merged["env"] = {**env, OFFLINE: "1"}


OFFLINE = "HF_HUB_OFFLINE"
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it


def _expand(merged: dict[str, object], sources: _Sources) -> None:
    """Expand ~ and variables of `python` and the container, and ~ in `env`, as a shell does. Raises WrongUseError for those that
    only the node, or nothing, can expand."""
    binds, env, sbatch = (merged.get(key) for key in ("container_binds", "env", "sbatch"))
    for key in ("python", "container"):
        if isinstance(path := merged.get(key), str):
            merged[key] = _path(key, path, sources)
    if isinstance(binds, list):
        merged["container_binds"] = [_path("container_binds", b, sources) if isinstance(b, str) else b for b in binds]
    if isinstance(env, dict):
        expanded = merged["env"] = dict(env)
        for variable, value in env.items():
            if not isinstance(value, str):
                continue  # a type error, which `build` reports
            if _VARIABLE.search(value):
                problem = f"only the node can expand the variable in {variable}={value}"
                raise sources.error("env", problem, f"add to setup: 'export {variable}=\"{value}\"'", variable)
            try:
                expanded[variable] = _with_homes(value)
            except LookupError as error:
                problem = f"not defined on this machine: {error.args[0]}"
                raise sources.error("env", problem, "write the full path", variable) from None
    for option, value in sbatch.items() if isinstance(sbatch, dict) else ():
        if isinstance(value, str) and (_VARIABLE.search(value) or _HOME.search(value)):
            problem = f"sbatch does not expand ~ and variables in a script: --{option}={value}"
            raise sources.error("sbatch", problem, "write the expanded value", option)
    for key in ("slurm_partition", "cluster", "account", "gpu_type"):
        name = merged.get(key)
        if isinstance(name, str) and _VARIABLE.search(name):
            raise sources.error(key, f"sbatch does not expand variables in a script: {name}", "write the name")


def _path(key: str, text: str, sources: _Sources) -> str:
    try:
        return _with_homes(_with_variables(text))
    except LookupError as error:
        raise sources.error(key, f"not defined on this machine: {error.args[0]}", "write the full path") from None


def _with_variables(text: str) -> str:
    """Raises LookupError for a command, and for a variable that is not set here."""

    def value(found: re.Match[str]) -> str:
        variable = found[1] or found[2]
        if variable is None or variable not in os.environ:
            raise LookupError(found[0] if variable else text)
        return os.environ[variable]

    return _VARIABLE.sub(value, text)


def _with_homes(text: str) -> str:
    """Raises LookupError for a user that does not exist."""

    def home(found: re.Match[str]) -> str:
        try:
            return str(Path(found[0]).expanduser())
        except RuntimeError:
            raise LookupError(f"the home folder {found[0]}") from None

    return _HOME.sub(home, text)


EXAMPLES = {
    "time": '"0-01:00:00"', "max_time": '"0-12:00:00"', "mem": '"64G"', "price_per_gpu_hour": '"2.50 EUR"', "gpus": "2",
    "cpus_per_task": "8", "gpu_memory_gib": "80", "setup": '["module load cuda"]',
}  # fmt: skip
ENTRY_TYPES: dict[str, tuple[type, ...]] = {"env": (str,), "sbatch": (str, int, bool)}


def _type_error(error: msgspec.ValidationError, merged: Mapping[str, object], sources: _Sources) -> WrongUseError:
    problem, _, path = str(error).partition(" - at `$.")
    key = re.split(r"[.\[`]", path)[0]
    value, kind = merged[key], get_type_hints(Partition).get(key)
    if get_origin(kind) is Literal:
        return sources.error(key, f"invalid value {value!r}", nearest(str(value), get_args(kind)))
    # msgspec does not name the entry of a table ("env[...]").
    entries = value.items() if key in ENTRY_TYPES and isinstance(value, dict) else ()
    entry = next((entry for entry, item in entries if not isinstance(item, ENTRY_TYPES[key])), "")
    example = f"write {key} = {EXAMPLES[key]}" if key in EXAMPLES else f"correct {key}"
    return sources.error(key, in_words(problem), example, entry)


def _check_values(partition: Partition, sources: _Sources) -> None:
    paths = ("python", "container", "template")
    for key in ("slurm_partition", "cluster", "account", "gpu_type", *paths, "time", "max_time", "mem"):
        if set("\n\0").intersection(getattr(partition, key)):
            raise sources.error(key, "a Slurm option cannot contain a line break or NUL", "write it on one line")
    for key, texts in (("env", partition.env.values()), ("setup", partition.setup)):
        if any("\0" in text for text in texts):
            raise sources.error(key, "a script cannot contain NUL", "remove it")
    _check_times(partition, sources)
    _check_container(partition, sources)
    if not is_memory(partition.mem):
        problem = "has no unit" if partition.mem.isdecimal() else "is not a size"
        remedy = 'write a number and K, M, G or T ("64G", "64G per-gpu", "8G per-cpu"), or "none" for no option'
        raise sources.error("mem", f"{partition.mem!r} {problem}", remedy)
    try:
        cpus_of(partition.cpus_per_task, partition.gpus)
    except ValueError as error:
        remedy = 'write 8, "16 per-gpu", or "none" where the site derives the number'
        raise sources.error("cpus_per_task", str(error), remedy) from None
    if partition.price_per_gpu_hour and not _PRICE.fullmatch(partition.price_per_gpu_hour):
        problem = f"{partition.price_per_gpu_hour!r} is not a price"
        raise sources.error("price_per_gpu_hour", problem, 'write a number and a currency, such as "2.50 EUR"')
    if partition.dtype not in ("auto", *DTYPES):
        problem = f"{partition.dtype!r} is not a dtype"
        raise sources.error("dtype", problem, nearest(partition.dtype, ("auto", *DTYPES)))
    if partition.capability is not None and not re.fullmatch(r"[0-9]{1,3}\.[0-9]", partition.capability):
        problem = f"{partition.capability!r} is not a compute capability"
        raise sources.error("capability", problem, 'write it as "7.0" or "9.0"')
    _check_secrets(partition, sources)
    for option, value in partition.sbatch.items():
        _check_option(option, value, sources)


def _check_times(partition: Partition, sources: _Sources) -> None:
    for key in ("time", "max_time"):
        try:
            if key == "time" or partition.max_time:
                seconds(getattr(partition, key))
        except ValueError as error:
            raise sources.error(key, str(error), 'write days-hours:minutes:seconds, such as "0-01:00:00"') from None
    if partition.max_time and seconds(partition.max_time) < partition.time_limit_s:
        problem = f"{partition.max_time} is below time, {partition.time}"
        raise sources.error("max_time", problem, "raise max_time, or lower time")


def _check_container(partition: Partition, sources: _Sources) -> None:
    if partition.container and partition.image is None:
        raise sources.error("container", f"{partition.container!r} is not a container", f"write {containers.FORM}")
    if partition.image is not None and partition.image.kind == "pyxis" and partition.executor == "local":
        raise sources.error(
            "container", "pyxis starts containers in Slurm jobs only", 'write "apptainer:/path/image.sif"'
        )
    for bind in partition.container_binds:
        if not containers.is_bind(bind):
            raise sources.error("container_binds", f"{bind!r} is not a bind", f"write {containers.BIND_FORM}")


def _check_secrets(partition: Partition, sources: _Sources) -> None:
    """Scripts are kept, and other users can read them: refuse a secret in one."""
    for variable, value in partition.env.items():
        if not _NAME.fullmatch(variable):
            problem = f"invalid variable name {variable!r}"
            raise sources.error("env", problem, "use letters, digits and underscores", variable)
        if (is_secret(variable) and not variable.endswith(_PATHS)) or TOKEN.search(value):
            problem = f"the secret {variable} would be readable in every script"
            raise sources.error(
                "env", problem, f"remove it, and export {variable} in your shell: jobs inherit it", variable
            )
    for line in partition.setup:
        if (found := _SECRET_IN_SETUP.search(line)) or TOKEN.search(line):
            variable = found[1] if found else "the token"
            problem = f"the secret {variable} would be readable in every script"
            raise sources.error("setup", problem, f"remove it, and export {variable} in your shell: jobs inherit it")


# Ends of names of variables that contain the path of a secret.
_PATHS = ("_FILE", "_PATH", "_DIR")


def _check_option(option: str, value: str | int | bool, sources: _Sources) -> None:
    """Refuse an sbatch option that labctl sets itself, and one that cannot be written on one line."""

    def error(problem: str, remedy: str) -> WrongUseError:
        return sources.error("sbatch", problem, remedy, option)

    if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
        plain = re.sub(r"[^a-z0-9]+", "-", option.lower()).strip("-")
        raise error(f"{option!r} is not the long name of an sbatch option", f"write {plain!r}, as in man sbatch")
    # sbatch accepts an unambiguous beginning of a name.
    managed = [name for name in MANAGED_OPTIONS if name.startswith(option)]
    if managed:
        raise error(f"labctl sets --{option}", _instead_of(option if option in managed else managed[0]))
    may_have_value = option not in OPTIONS_WITHOUT_VALUE or (option == "exclusive" and value not in ("", "true", False))
    if value is not True and not may_have_value:
        raise error(f"--{option} takes no value", f"write {option} = true, or remove it")
    if value is False or set("\n\0").intersection(str(value)):
        raise error(f"invalid value of --{option}", "write a text on one line, or true for an option without a value")


def _instead_of(option: str) -> str:
    key = MANAGED_OPTIONS[option]
    if not key:
        return "remove it"
    form = f" = {FORM_OF_OPTION[option]}" if option in FORM_OF_OPTION else ""
    return f"set {key}{form}" + (", and the number by --gpus" if key == "gpu_request" else "")


def price_of(text: str) -> tuple[float, str]:
    """ "2.50 EUR" -> (2.5, "EUR"). Raises ValueError for any other form."""
    match = _PRICE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a price")
    return float(match[1]), match[2]


def slurm_time(seconds_: int) -> str:
    """3660 -> "0-01:01:00"."""
    minutes, rest = divmod(seconds_, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}"


def seconds(time: str) -> int:
    """Slurm's time in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises ValueError for any other form and for zero.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is not a time")
    a, b, c = (int(match[part]) if match[part] else 0 for part in "abc")
    if match["days"] is not None:
        total = int(match["days"]) * 86400 + a * 3600 + b * 60 + c
    elif match["c"] is not None:
        total = a * 3600 + b * 60 + c
    else:
        total = a * 60 + b
    if total == 0:
        raise ValueError(f"the time {time!r} is zero")
    return total
