"""What a partition is: its Slurm names, its GPU, its limits, its Python and its template."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from labctl_slurm.errors import WrongUseError, in_words, nearest
from labctl_slurm.resources import NONE, GpuRequest, Resources, cpus_of, is_memory
from labctl_workers.environment import SECRET_NAME, TOKEN, is_secret
from labctl_workers.record import DTYPES

# What labctl writes in every script itself, and the key of a partition that says it ("": none does); overriding one behind
# its back would make its records untrue.
MANAGED_OPTIONS = {
    "account": "account", "array": "", "chdir": "", "cpus-per-task": "cpus_per_task", "error": "", "export": "export",
    "gpus": "gpu_request", "gpus-per-node": "gpu_request", "gpus-per-task": "gpu_request", "gres": "gpu_request",
    "job-name": "", "mem": "mem", "mem-per-cpu": "mem", "mem-per-gpu": "mem", "nodes": "", "ntasks": "",
    "ntasks-per-node": "", "open-mode": "", "output": "", "parsable": "", "partition": "slurm_partition", "signal": "",
    "tasks-per-node": "", "time": "time", "wrap": "",
    # These would make sbatch do otherwise than queue this job here, and return.
    "clusters": "", "cpus-per-gpu": "cpus_per_task", "gpus-per-socket": "gpu_request", "ntasks-per-gpu": "",
    "test-only": "", "wait": "",
}  # fmt: skip
# The value of that key that makes labctl write the option.
FORM_OF_OPTION = {
    "cpus-per-gpu": '"8 per-gpu"', "gpus": '"gpus"', "gpus-per-node": '"gpus-per-node"', "gres": '"gres"',
    "mem-per-cpu": '"8G per-cpu"', "mem-per-gpu": '"64G per-gpu"',
}  # fmt: skip
# Options of sbatch that take no value, or whose value may be left out (exclusive).
OPTIONS_WITHOUT_VALUE = frozenset((
    "contiguous", "disable-stdout-job-summary", "exclusive", "hold", "ignore-pbs", "no-requeue", "overcommit", "oversubscribe",
    "quiet", "reboot", "requeue", "spread-job", "use-min-nodes", "verbose",
))  # fmt: skip
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\}|[({])")
# A shell replaces a ~ at the beginning of a word, and in an assignment behind each colon.
_HOME = re.compile(r"(?:^|(?<=:))~[A-Za-z0-9_.-]*(?=[/:]|$)")
# A setup line that sets a secret to a value that stands there: not to a file's name, nor to what a command or variable gives.
_SECRET_IN_SETUP = re.compile(
    rf"(?:^|[;&|]\s*|\bexport\s+)({SECRET_NAME}(?<!_FILE)(?<!_PATH)(?<!_DIR))=(?![^\s;]*[$`])[^\s;]", re.IGNORECASE
)
_TIME = re.compile(r"(?:(?P<days>[0-9]+)-)?(?P<a>[0-9]+)(?::(?P<b>[0-9]+))?(?::(?P<c>[0-9]+))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PRICE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s+(\S(?:.*\S)?)\s*")


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of node. `time` is what a job asks for at least, `max_time` at most ("": what Slurm allows), both in Slurm's
    form; `mem` and `cpus_per_task` have the forms of `resources`; `capability` is CUDA's, such as "9.0"; `price_per_gpu_hour` is
    such as "2.50 EUR"; `setup` are shell lines before the worker, `env` variables for it, `sbatch` further options; `python`
    runs the worker; `offline` says that nodes cannot reach the hub. A value "none" leaves the option out of the script."""

    name: str
    executor: Literal["slurm", "local"] = "slurm"
    slurm_partition: str = ""
    account: str = ""
    time: str = "0-01:00:00"
    max_time: str = ""
    mem: str = "64G"
    cpus_per_task: Annotated[int, msgspec.Meta(ge=1)] | str = 8
    tasks: Literal["one", "none"] = "one"
    export: Literal["ALL", "NONE", "none"] = "ALL"
    arrays: bool = True
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
        """Slurm's partitions of which the job may start in any; none where Slurm chooses by other options."""
        return [] if self.slurm_partition == NONE else [name.strip() for name in self.slurm_partition.split(",")]

    def resources(self, gpus: int) -> Resources:
        """What a job with that many GPUs asks of Slurm."""
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
        )


KEYS = tuple(name for name in Partition.__struct_fields__ if name != "name")


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """The tables of partitions.toml."""
    text = files("labctl_slurm").joinpath("partitions.toml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = tomllib.loads(text)["partitions"]
    return tables


def check_table(name: str, table: object, source: Path) -> Mapping[str, Any]:
    """A [partitions.NAME] table of a settings file. Raises WrongUseError, naming the file and the nearest known key."""
    where = f"{source}: [partitions.{name}]"
    if not isinstance(table, dict):
        raise WrongUseError(f"{where} must be a table", f"write [partitions.{name}] and a key a line below it")
    for key in table:
        if key not in KEYS:
            raise WrongUseError(f"{where} has no key {key!r}", nearest(key, KEYS))
    return table


def build(name: str, tables: Iterable[tuple[str, Mapping[str, Any]]]) -> Partition:
    """The partition that these (source, table) pairs make together, later ones winning key by key; `env` and `sbatch`
    are merged. Raises WrongUseError naming the source of a value that cannot be right."""
    merged: dict[str, Any] = {}
    source_of: dict[str, str] = {}
    for source, table in tables:
        for key, value in table.items():
            merge = key in ("env", "sbatch") and isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if merge else value
            source_of[key] = source
            if isinstance(value, dict):
                source_of.update({f"{key}.{entry}": source for entry in value})
    capability = merged.get("capability")
    if isinstance(capability, int | float) and not isinstance(capability, bool):
        merged["capability"] = f"{float(capability):.1f}"
    if merged.get("slurm_partition", "") == "":
        merged["slurm_partition"] = name
    if merged.get("python", "") == "":
        merged["python"] = sys.executable
    _agree_on_offline(merged)
    _expand(name, merged, source_of)
    try:
        partition = msgspec.convert({**merged, "name": name}, Partition)
    except msgspec.ValidationError as error:
        raise _wrong_value(name, error, source_of, merged) from None
    _check_values(partition, source_of)
    return partition


def _expand(name: str, merged: dict[str, Any], source_of: Mapping[str, str]) -> None:
    """Replace ~ and variables as a shell would where the login node can; raise WrongUseError where only the node can."""

    def wrong(key: str, entry: str, reason: str, remedy: str) -> WrongUseError:
        source = source_of.get(f"{key}.{entry}", source_of.get(key, "partitions"))
        return WrongUseError(f"{source}: [partitions.{name}] {key}: {reason}", remedy)

    python, env, sbatch = (merged.get(key) for key in ("python", "env", "sbatch"))
    if isinstance(python, str):
        try:
            merged["python"] = _with_homes(_with_variables(python))
        except LookupError as error:
            raise wrong("python", "", f"{error.args[0]} is not known on this machine", "write the whole path") from None
    if isinstance(env, dict):
        merged["env"] = dict(env)
        for variable, value in env.items():
            if not isinstance(value, str):
                continue  # refused as what it is
            if _VARIABLE.search(value):
                raise wrong("env", variable, f"{variable}={value} has a variable, which only the node can replace",
                            f"write it as a line of setup: 'export {variable}=\"{value}\"'")  # fmt: skip
            try:
                merged["env"][variable] = _with_homes(value)
            except LookupError as error:
                raise wrong(
                    "env", variable, f"{error.args[0]} is not known on this machine", "write the whole path"
                ) from None
    for option, value in sbatch.items() if isinstance(sbatch, dict) else ():
        if isinstance(value, str) and (_VARIABLE.search(value) or _HOME.search(value)):
            raise wrong("sbatch", option, f"--{option}={value}: sbatch replaces neither ~ nor variables in a script",
                        "write the value itself")  # fmt: skip
    for key in ("slurm_partition", "account", "gpu_type"):
        if isinstance(merged.get(key), str) and _VARIABLE.search(merged[key]):
            raise wrong(
                key, "", f"{merged[key]!r} has a variable, which sbatch does not replace", "write the name itself"
            )


def _with_variables(text: str) -> str:
    """Raises LookupError for a variable that is not set here, and for a command."""

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


def _agree_on_offline(merged: dict[str, Any]) -> None:
    """`offline = true` and HF_HUB_OFFLINE in `env` say the same: each brings the other along."""
    env = merged.get("env", {})
    if not isinstance(env, dict):
        return  # told as what it is
    if "offline" not in merged and str(env.get(OFFLINE, "")).upper() in _TRUE:
        merged["offline"] = True
    if merged.get("offline") is True:
        merged["env"] = {**env, OFFLINE: "1"}


OFFLINE = "HF_HUB_OFFLINE"
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads it


def _check_times(partition: Partition, wrong: Callable[[str, str, str], WrongUseError]) -> None:
    for key in ("time", "max_time"):
        try:
            if key == "time" or partition.max_time:
                seconds(getattr(partition, key))
        except ValueError as error:
            raise wrong(key, str(error), 'write days-hours:minutes:seconds, such as "0-01:00:00"') from None
    if partition.max_time and seconds(partition.max_time) < partition.time_limit_s:
        raise wrong("max_time", f"{partition.max_time} is below time, {partition.time}", "raise it, or lower time")


EXAMPLES = {
    "time": '"0-01:00:00"', "max_time": '"0-12:00:00"', "mem": '"64G"', "price_per_gpu_hour": '"2.50 EUR"', "gpus": "2",
    "cpus_per_task": "8", "gpu_memory_gib": "80", "setup": '["module load cuda"]',
}  # fmt: skip
ENTRY_TYPES: dict[str, tuple[type, ...]] = {"env": (str,), "sbatch": (str, int, bool)}


def _wrong_value(
    name: str, error: msgspec.ValidationError, source_of: Mapping[str, str], merged: Mapping[str, Any]
) -> WrongUseError:
    reason, _, path = str(error).partition(" - at `$.")
    key = re.split(r"[.\[`]", path)[0]
    # msgspec names no key of a table ("env[...]"): the last source whose entry is of a wrong type is meant.
    source = source_of.get(key, "partitions")
    if key in ENTRY_TYPES and isinstance(merged[key], dict):
        wrong = next((entry for entry, value in merged[key].items() if not isinstance(value, ENTRY_TYPES[key])), "")
        source = source_of.get(f"{key}.{wrong}", source)
    where = f"{source}: [partitions.{name}] {key}"
    kind = get_type_hints(Partition).get(key)
    if get_origin(kind) is Literal:
        return WrongUseError(f"{where}: {merged[key]!r} is no {key}", nearest(str(merged[key]), get_args(kind)))
    example = f"write {key} = {EXAMPLES[key]}" if key in EXAMPLES else f"correct {key}"
    return WrongUseError(f"{where}: {in_words(reason)}", example)


def _check_values(partition: Partition, source_of: Mapping[str, str]) -> None:
    def wrong(key: str, reason: str, remedy: str, entry: str = "") -> WrongUseError:
        source = source_of.get(f"{key}.{entry}", source_of.get(key, "partitions"))
        return WrongUseError(f"{source}: [partitions.{partition.name}] {key}: {reason}", remedy)

    for key in ("slurm_partition", "account", "gpu_type", "python", "template", "time", "max_time", "mem"):
        if set("\n\0").intersection(getattr(partition, key)):
            raise wrong(key, "a line break or NUL cannot be in a Slurm option", "write it on one line")
    for key, texts in (("env", partition.env.values()), ("setup", partition.setup)):
        if any("\0" in text for text in texts):
            raise wrong(key, "a NUL cannot be in a script", "remove it")
    _check_times(partition, wrong)
    _check_forms(partition, wrong)
    if partition.price_per_gpu_hour and not _PRICE.fullmatch(partition.price_per_gpu_hour):
        raise wrong("price_per_gpu_hour", f"{partition.price_per_gpu_hour!r} is no price",
                    'write a number and a word, such as "2.50 EUR"')  # fmt: skip
    if partition.dtype not in ("auto", *DTYPES):
        raise wrong("dtype", f"{partition.dtype!r} is not a dtype", nearest(partition.dtype, ("auto", *DTYPES)))
    if partition.capability is not None and not re.fullmatch(r"[0-9]{1,3}\.[0-9]", partition.capability):
        raise wrong("capability", f"{partition.capability!r} is not a compute capability", 'write it as "7.0" or "9.0"')
    _check_secrets(partition, wrong)
    for option, value in partition.sbatch.items():
        check_option(option, value, lambda reason, remedy, option=option: wrong("sbatch", reason, remedy, option))


def _check_forms(partition: Partition, wrong: Callable[[str, str, str], WrongUseError]) -> None:
    if not is_memory(partition.mem):
        unit = " without a unit is megabytes to Slurm" if partition.mem.isdecimal() else " is not a size"
        forms = 'a number and K, M, G or T, such as "64G", "64G per-gpu" or "8G per-cpu"'
        raise wrong("mem", f"{partition.mem!r}{unit}", f'write {forms}; "none" asks for no memory')
    try:
        cpus_of(partition.cpus_per_task, partition.gpus)
    except ValueError as error:
        raise wrong(
            "cpus_per_task", str(error), 'write 8, "16 per-gpu", or "none" where the site derives them'
        ) from None


def _check_secrets(partition: Partition, wrong: Callable[..., WrongUseError]) -> None:
    """Scripts can be read by others, and are kept: no secret may stand in one."""
    for variable in partition.env:
        if not _NAME.fullmatch(variable):
            raise wrong(
                "env", f"{variable!r} cannot be a variable's name", "use letters, digits and underscores", variable
            )
        if (is_secret(variable) and not variable.endswith(_PLACES)) or TOKEN.search(partition.env[variable]):
            raise wrong("env", f"{variable} is a secret and would be written into every script",
                        f"remove it here and export {variable} in your shell: jobs inherit it", variable)  # fmt: skip
    for line in partition.setup:
        if (found := _SECRET_IN_SETUP.search(line)) or TOKEN.search(line):
            variable = found[1] if found else "the token"
            raise wrong("setup", f"{variable} is a secret and would be written into every script",
                        f"remove it here and export {found[1] if found else 'it'} in your shell: jobs inherit it")  # fmt: skip


# Ends of the names of variables that say where a secret is kept.
_PLACES = ("_FILE", "_PATH", "_DIR")


def check_option(option: str, value: object, wrong: Any) -> None:
    """Refuse an extra sbatch option that labctl manages itself, or that cannot be written on one line."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
        plain = re.sub(r"[^a-z0-9]+", "-", option.lower()).strip("-")
        raise wrong(
            f"{option!r} is not the long name of an sbatch option", f"write it as {plain!r}, as `man sbatch` does"
        )
    # sbatch takes an unambiguous beginning for the whole name.
    managed = [name for name in MANAGED_OPTIONS if name.startswith(option)]
    if managed:
        if managed[0] == "clusters":
            raise wrong(
                f"labctl goes by SLURM_CLUSTERS, not by --{option}",
                "leave it out, and in the shell: export SLURM_CLUSTERS=NAME",
            )
        raise wrong(f"labctl writes --{option} itself", _instead_of(option if option in managed else managed[0]))
    if (
        option in OPTIONS_WITHOUT_VALUE
        and value is not True
        and (option != "exclusive" or value in ("", "true", False))
    ):
        raise wrong(f"--{option} takes no value", f"write {option} = true, or leave it out")
    if value is False or set("\n\0").intersection(str(value)):
        raise wrong(f"--{option} cannot have this value", "give a text on one line, or true for an option without one")


def _instead_of(option: str) -> str:
    key = MANAGED_OPTIONS[option]
    if not key:
        return "leave it out"
    form = f" = {FORM_OF_OPTION[option]}" if option in FORM_OF_OPTION else ""
    number = ", and the number by --gpus" if key == "gpu_request" else ""
    return f"set {key}{form} instead{number}"


def price_of(text: str) -> tuple[float, str]:
    """ "2.50 EUR" -> (2.5, "EUR"). Raises ValueError for what is no number and a word."""
    match = _PRICE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no price")
    return float(match[1]), match[2]


def in_slurms_form(seconds_: int) -> str:
    """3660 -> "0-01:01:00", which `seconds` reads."""
    minutes, rest = divmod(seconds_, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{rest:02}"


def seconds(time: str) -> int:
    """Slurm's time in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises ValueError for any other form and for no time at all.
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
        raise ValueError(f"{time!r} is no time at all")
    return total
