"""What was asked for: settings that do not multiply, axes whose values do, hand-picked cells, and what is left out.

The same keys are flags of `labctl submit`, keys of a request file, of [defaults] in labctl.toml, and LABCTL_* variables.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from labctl_orchestrator.request.paths import expand_home
from labctl_slurm.errors import WrongUseError, in_words, nearest
from labctl_slurm.partitions import OPTIONS_WITHOUT_VALUE
from labctl_workers.engines import ENGINES, choices_of, normalised_options, options_of
from labctl_workers.record import DTYPES, Sampling

DEFAULT_MODEL = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
DEFAULT_PROMPT = "Explain tensor parallelism in 5 bullet points."
DTYPE_CHOICES = ("auto", *DTYPES)
GREEDY = "greedy"

# The keys whose lists multiply, in the order in which they do.
AXES = ("partition", "backend", "model_id", "revision", "dtype", "gpus", "batch_size", "sampling", "max_new_tokens")

Scalar = str | int | float | bool


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One question asked. Counts are whole numbers; `gpus` empty is the partition's number; a `sampling` is "greedy" or
    "temperature=0.7,top_p=0.9,seed=1"; `prompts` is a file, which wins over the same source's `prompt`; `request_rate` is in
    requests a second; an engine option is for the backends that have it; `runs_per_job` and `jobs_at_once` bound how runs are
    packed and how many jobs of an array run at the same time; each run is measured in `loads` engine loads."""

    partition: tuple[str, ...] = ()
    backend: tuple[str, ...] = ("hf",)
    model_id: tuple[str, ...] = (DEFAULT_MODEL,)
    revision: tuple[str, ...] = ("main",)
    dtype: tuple[str, ...] = ("auto",)
    gpus: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = (1,)
    sampling: tuple[str, ...] = (GREEDY,)
    max_new_tokens: tuple[int, ...] = (128,)
    engine_options: dict[str, tuple[Scalar, ...]] = {}
    prompt: str = DEFAULT_PROMPT
    prompts: str | None = None
    raw_prompt: bool = False
    ignore_eos: bool = False
    request_rate: float | None = None
    requests: int | None = None
    runs_per_job: int | None = None
    jobs_at_once: int | None = None
    loads: int = 1
    repeats: int = 3
    warmup: int = 1
    name: str | None = None
    account: str | None = None
    time: str | None = None
    mem: str | None = None
    qos: str | None = None
    constraint: str | None = None
    sbatch: dict[str, str | int | bool] = {}
    cells: tuple[dict[str, Any], ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()


KEYS = tuple(Request.__struct_fields__)
NOT_IN_A_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # line ends and other control characters
# What a labctl.toml may set for every request: not what makes one request this one.
DEFAULT_KEYS = tuple(key for key in KEYS if key not in ("name", "cells", "exclude"))


@dataclass(frozen=True)
class Cell:
    """One combination of the axes; `gpus` None is the partition's number."""

    partition: str
    backend: str
    model_id: str
    revision: str
    dtype: str
    gpus: int | None
    batch_size: int
    sampling: str
    max_new_tokens: int
    engine_options: tuple[tuple[str, Scalar], ...] = ()


# ---------------------------------------------------------------- make


def build(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Request:
    """The request that these (source, values) layers make together, later ones winning key by key; one value for an axis
    is a list of one. Raises WrongUseError, naming the source, for a key or a value that cannot be right."""
    merged: dict[str, Any] = {}
    source_of: dict[str, str] = {}
    for source, values in layers:
        if source == FLAGS and "prompt" in values and "prompts" in values:
            raise WrongUseError("--prompt and --prompts are both given", "give one of them")
        if "prompt" in values:  # it beats the file of a weaker source
            merged.pop("prompts", None)
        for key, value in values.items():
            if key not in KEYS:
                raise WrongUseError(f"{source}: there is no key {key!r}", nearest(key, KEYS))
            merged[key] = _listed(key, value)
            source_of[key] = source
    try:
        request = msgspec.convert(merged, Request)
    except msgspec.ValidationError as error:
        raise _wrong_value(error, source_of) from None
    _check(request, source_of)
    return request


def _listed(key: str, value: Any) -> Any:
    if key in AXES and not isinstance(value, list | tuple):
        return [value]
    if key == "engine_options" and isinstance(value, dict):
        return {name: choice if isinstance(choice, list) else [choice] for name, choice in value.items()}
    return value


def _wrong_value(error: msgspec.ValidationError, source_of: Mapping[str, str]) -> WrongUseError:
    reason, _, path = str(error).partition(" - at `$.")
    key = re.split(r"[.\[`]", path)[0]
    return WrongUseError(f"{source_of.get(key, 'request')}: {key}: {in_words(reason)}", f"correct {key}")


def _check(request: Request, source_of: Mapping[str, str]) -> None:
    def at(key: str) -> str:
        return _at(source_of.get(key, ""))

    for key in AXES:
        if key in source_of and not getattr(request, key) and key != "gpus":
            raise WrongUseError(f"{at(key)}{key} is an empty list, so there is nothing to run", "give it a value")
    _check_names(request, at)
    for key, least, most in LIMITS:
        values = getattr(request, key)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not least <= value <= most:
                kind = "number" if isinstance(least, float) else "whole number"
                remedy = f"give a {kind} from {least} to {most}"
                raise WrongUseError(f"{at(key)}--{key.replace('_', '-')} {value} makes no sense", remedy)
    for key in KEYS:
        _check_text(at(key), key, getattr(request, key))
    for value in request.sampling:
        sampling_of(value)
    if request.prompts is None and not request.prompt.strip():
        raise WrongUseError(f"{at('prompt')}the prompt is empty", "give --prompt a text")
    if request.name is not None and (not request.name.strip() or NOT_IN_A_NAME.search(request.name)):
        raise WrongUseError(f"{request.name!r} cannot be a name", "give --name a short text on one line")
    _check_engine_options(request, at("engine_options"))


def _at(source: str) -> str:
    return f"{source}: " if source and source != FLAGS else ""


def _check_names(request: Request, at: Callable[[str], str]) -> None:
    for key in ("partition", "model_id", "revision"):
        if any(not value.strip() for value in getattr(request, key)):
            raise WrongUseError(f"{at(key)}--{key.replace('_', '-')} is empty", "give it a name, or leave it out")
    for key, known in (("backend", tuple(ENGINES)), ("dtype", DTYPE_CHOICES)):
        for value in getattr(request, key):
            if value not in known:
                raise WrongUseError(f"{at(key)}no {key} is called {value!r}", nearest(value, known))


LIMITS = (
    ("max_new_tokens", 1, 10_000_000),
    ("batch_size", 1, 1_000_000),
    ("gpus", 1, 1024),
    ("loads", 1, 1000),
    ("repeats", 1, 100_000),
    ("warmup", 0, 100_000),
    ("requests", 1, 10_000_000),
    ("runs_per_job", 1, 1_000_000),
    ("jobs_at_once", 1, 1_000_000),
    ("request_rate", 1e-6, 1e6),
)


def _check_text(source: str, key: str, value: Any) -> None:
    """Bytes of the command line that are no UTF-8 reach Python as lone surrogates, which no file can hold."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and _is_no_text(text):
            raise WrongUseError(f"{source}--{key.replace('_', '-')} {text!a} is no UTF-8 text", "write it in UTF-8")


def _is_no_text(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_engine_options(request: Request, source: str) -> None:
    """Each option must be one of some backend that is asked for, with a value of the type that it wants."""
    known = {backend: options_of(backend) for backend in request.backend}
    for name, values in request.engine_options.items():
        if not values:
            raise WrongUseError(
                f"{source}engine option {name} is an empty list, so there is nothing to run", "give it a value"
            )
        wanted = next((options[name] for options in known.values() if name in options), None)
        if wanted is None:
            backends = " or ".join(known)
            remedy = MANAGED_ENGINE_OPTIONS.get(name) or nearest(name, sorted(set().union(*known.values())))
            raise WrongUseError(f"{source}backend {backends} has no option {name!r}", remedy)
        for value in values:
            _check_engine_option(f"{source}engine option {name}={value}", value, wanted)
            choices = next((found for backend in known if (found := choices_of(backend, name)) is not None), None)
            if choices is not None and value not in choices:
                remedy = nearest(str(value), choices)
                raise WrongUseError(f"{source}engine option {name} has no value {value!r}", remedy)


# What people try to set by an engine's own name for it, and labctl has a name of its own for.
MANAGED_ENGINE_OPTIONS = {
    "tensor_parallel_size": "--gpus says how many GPUs the model is spread over",
    "pipeline_parallel_size": "--gpus says how many GPUs the model is spread over",
    "device_map": "--gpus says how many GPUs the model is spread over",
    "dtype": "--dtype sets it",
    "torch_dtype": "--dtype sets it",
    "model": "--model-id sets it",
    "revision": "--revision sets it",
    "seed": "--seed sets it, with --temperature",
    "temperature": "--temperature sets it",
    "top_p": "--top-p sets it",
    "max_tokens": "--max-new-tokens sets it",
}


def _check_engine_option(what: str, value: Scalar, wanted: type) -> None:
    if wanted is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif issubclass(wanted, str):
        fits = isinstance(value, str) and (wanted is str or _is_json_object(value))
    else:
        fits = type(value) is wanted
    if not fits:
        name = TYPE_NAMES.get(wanted.__name__, wanted.__name__)
        raise WrongUseError(f"{what} is not {name}", "correct its value")


TYPE_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "Json": "a JSON object",
}


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


FLAGS = "flags"


def sampling_of(text: str) -> Sampling:
    """ "greedy", or settings such as "temperature=0.7,top_p=0.9,seed=1". Raises WrongUseError for anything else."""
    if text == GREEDY:
        return Sampling()
    settings: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in ("temperature", "top_p", "seed"):
            raise WrongUseError(
                f"sampling {text!r}: there is no {key!r}", nearest(key, (GREEDY, "temperature", "top_p", "seed"))
            )
        try:
            settings[key] = int(value) if key == "seed" else float(value)
        except ValueError:
            raise WrongUseError(f"sampling {text!r}: {value!r} is no number for {key}", "such as seed=1") from None
    temperature, top_p, seed = settings.get("temperature", 1.0), settings.get("top_p", 1.0), settings.get("seed", 0)
    if not 0 < temperature <= 100:
        raise WrongUseError(
            f"sampling {text!r}: temperature must be above 0 (0 is greedy)", "write greedy, or a temperature"
        )
    if not 0 < top_p <= 1:
        raise WrongUseError(f"sampling {text!r}: top_p must be above 0 and at most 1", "such as top_p=0.9")
    if not 0 <= seed < 2**32:
        raise WrongUseError(f"sampling {text!r}: seed must be a whole number from 0 to 2^32 - 1", "such as seed=1")
    return Sampling(temperature=temperature, top_p=top_p, seed=int(seed))


def option_of(text: str, *, plain: bool = False) -> tuple[str, Scalar]:
    """ "key=value": true, false and numbers are read as such, unless the value is to stay a `plain` text. An option of sbatch
    that takes no value is its name alone, or true.

    Raises WrongUseError for any other form.
    """
    key, equals, value = (word.strip() for word in text.partition("="))
    if plain and key in OPTIONS_WITHOUT_VALUE and (not equals or value.lower() == "true"):
        return key, True
    if not (key and equals):
        raise WrongUseError(
            f"{text!r} is not of the form key=value", f"such as {'comment=mine' if plain else 'compile=false'}"
        )
    if plain:
        return key, value
    lowered = value.lower()
    if lowered in ("true", "false"):
        return key, lowered == "true"
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value


# ---------------------------------------------------------------- cells


def cells(request: Request) -> list[Cell]:
    """The combinations of the axes and the hand-picked cells, less those that an exclude rule matches.

    Where [[cells]] are given, the product is made only if some axis holds several values. What a cell leaves out is the
    request's (first) value. Raises WrongUseError for an unknown key, or where nothing is left.
    """
    axes: dict[str, Sequence[Any]] = {key: getattr(request, key) for key in AXES}
    axes["gpus"] = request.gpus or (None,)
    product = _product(axes, request.engine_options)
    if request.cells and len(product) == 1:
        product = []
    picked = [cell for number, values in enumerate(request.cells, 1) for cell in _picked(request, axes, values, number)]
    found = list(dict.fromkeys(cell for cell in [*product, *picked] if not is_excluded(request, cell)))
    if not found:
        raise NOTHING_LEFT
    return found


NOTHING_LEFT = WrongUseError("the exclude rules leave nothing to run", "remove a rule, or add a value to an axis")


def is_excluded(request: Request, cell: Cell) -> bool:
    """Whether a rule of the request leaves the cell out. Raises WrongUseError for a rule that cannot be right."""
    return bool(rules_for(request, cell))


def rules_for(request: Request, cell: Cell) -> set[int]:
    """The exclude rules that leave the cell out, counted from 1. Raises WrongUseError for a rule that cannot be right."""
    return {number for number, values in enumerate(request.exclude, 1) if _matches(cell, _rule(values, number))}


def _product(axes: Mapping[str, Sequence[Any]], options: Mapping[str, Sequence[Scalar]]) -> list[Cell]:
    chosen = [tuple(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    return [
        Cell(**dict(zip(AXES, values, strict=True)), engine_options=tuple(sorted(option)))
        for option in chosen
        for values in itertools.product(*(axes[axis] for axis in AXES))
    ]


def _picked(request: Request, axes: Mapping[str, Sequence[Any]], values: Mapping[str, Any], number: int) -> list[Cell]:
    where = f"[[cells]] number {number}"
    for key in values:
        if key not in (*AXES, "engine_options"):
            raise WrongUseError(f"{where} has no key {key!r}", nearest(key, (*AXES, "engine_options")))
    own = build([(where, {"backend": request.backend[:1], **values})])
    chosen = {axis: getattr(own, axis) if axis in values else axes[axis][:1] for axis in AXES}
    shared = {name: choices[:1] for name, choices in request.engine_options.items()}
    return _product(chosen, {**shared, **own.engine_options})


def _rule(values: Mapping[str, Any], number: int) -> dict[str, list[Any]]:
    for key in values:
        if key not in (*AXES, "engine_options"):
            raise WrongUseError(f"[[exclude]] number {number} has no key {key!r}", nearest(key, AXES))
    if not values:
        raise WrongUseError(f"[[exclude]] number {number} is empty and would leave nothing", "name an axis and a value")
    return {key: value if isinstance(value, list) else [value] for key, value in values.items()}


def _matches(cell: Cell, rule: Mapping[str, list[Any]]) -> bool:
    for key, values in rule.items():
        if key == "engine_options":
            has = normalised_options(cell.backend, dict(cell.engine_options)).items()
            wanted = [normalised_options(cell.backend, option) for option in values if isinstance(option, dict)]
            if not any(option.items() <= has for option in wanted):
                return False
        elif getattr(cell, key) not in values:
            return False
    return True


# ---------------------------------------------------------------- prompts and overrides


PROMPTS_BYTES_AT_MOST = 256 * 2**20
# Structured formats that labctl does not read: their lines are no prompts.
_OTHER_FORMATS = (".yaml", ".yml", ".toml", ".xml", ".html", ".parquet", ".xlsx")
ONE_OF_THE_FORMATS = (
    'give a line each, JSON lines or an array of texts or {"prompt": "..."}, or a CSV with a column prompt'
)


def prompts_of(request: Request) -> list[str]:
    """The prompts of the file, else the one prompt. The content says the format: JSON lines or a JSON array of texts or objects
    with "prompt", a CSV (.tsv: tabs) with a column of that name, else a prompt on each line.

    Raises WrongUseError, with the line, for a file that cannot be read, is structured otherwise, or holds no prompt.
    """
    if request.prompts is None:
        return [request.prompt]
    file = expand_home(request.prompts)
    try:
        with file.open("rb") as opened:
            content = opened.read(PROMPTS_BYTES_AT_MOST + 1)
        text = content.decode("utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUseError(f"prompts file {file} cannot be read: {error}", "give a UTF-8 file") from None
    if len(content) > PROMPTS_BYTES_AT_MOST:
        raise WrongUseError(f"prompts file {file} is larger than 256 MiB", "give a smaller file")
    if file.suffix.lower() in _OTHER_FORMATS or "\0" in text:
        raise WrongUseError(f"prompts file {file} is in a format that labctl does not read", ONE_OF_THE_FORMATS)
    prompts = _prompts_in(text, file)
    if not prompts:
        raise WrongUseError(f"prompts file {file} holds no prompt", "write one on each line")
    return prompts


def _prompts_in(text: str, file: Path) -> list[str]:
    suffix, begins = file.suffix.lower(), text.lstrip()
    # Only line feeds end a line: JSON may hold other separators.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".jsonl":
        return [_json_prompt(line, f"{file}, line {number}") for number, line in lines]
    if suffix == ".json" or _LIKE_AN_ARRAY.match(begins):
        return _json_prompts(text, file)
    if _LIKE_AN_OBJECT.match(begins):
        return [_json_prompt(line, f"{file}, line {number}") for number, line in lines]
    delimiter = "\t" if suffix == ".tsv" else ","
    if suffix in (".csv", ".tsv") or (lines and _is_header(lines[0][1])):
        return _csv_prompts(text, file, delimiter)
    return [line.rstrip("\r") for _, line in lines]


# "[INST] ..." and "{name}" are texts.
_LIKE_AN_ARRAY = re.compile(r"\[\s*[\"{\[\]]")
_LIKE_AN_OBJECT = re.compile(r"\{\s*\"")


def _is_header(line: str) -> bool:
    columns = [column.strip().strip('"') for column in line.split(",")]
    return "prompt" in columns and all(column.isidentifier() for column in columns)


def _json_prompts(text: str, file: Path) -> list[str]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"prompts file {file} is not JSON: {error}", ONE_OF_THE_FORMATS) from None
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list):
        raise WrongUseError(f"prompts file {file} is no JSON array", ONE_OF_THE_FORMATS)
    return [_prompt_of(value, f"{file}, entry {number}") for number, value in enumerate(document, 1)]


def _csv_prompts(text: str, file: Path, delimiter: str) -> list[str]:
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # the limit is the whole process's
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    prompts = []
    try:
        if "prompt" not in (rows.fieldnames or ()):
            raise WrongUseError(f"prompts file {file} has no column prompt", "call the prompts' column prompt")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if None in row:
                raise WrongUseError(f"{where} has more cells than the header", "put a prompt with commas in quotes")
            prompts.append(_prompt_of(row["prompt"], where))
    except csv.Error as error:
        raise WrongUseError(f"{file}, line {rows.line_num} is not CSV: {error}", "correct its quotes") from None
    return prompts


def _json_prompt(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongUseError(f"{where} is not JSON: {error}", "write one JSON object on each line") from None
    return _prompt_of(value, where)


def _prompt_of(value: object, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        raise WrongUseError(f"{where} has no prompt", 'write {"prompt": "..."}, or a text in quotes')
    if _is_no_text(prompt):
        raise WrongUseError(f"{where} has half of a character (a lone surrogate)", "write the whole character")
    return prompt


def overrides_of(request: Request) -> dict[str, Any]:
    """What the request changes in a partition's table: its account, time, memory and further sbatch options."""
    table: dict[str, Any] = {
        key: value for key in ("account", "time", "mem") if (value := getattr(request, key)) is not None
    }
    if request.time is not None:
        table["max_time"] = request.time  # who names a time means it, whatever a job may need
    options = {key: value for key in ("qos", "constraint") if (value := getattr(request, key)) is not None}
    if options or request.sbatch:
        table["sbatch"] = {**request.sbatch, **options}
    return table
