"""Engine options: their form on the command line, and the options of a backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from labctl_slurm.errors import WrongUseError, nearest
from labctl_slurm.partitions import OPTIONS_WITHOUT_VALUE
from labctl_workers.engines import engine_class, normalised_options
from labctl_workers.record import Scalar

# Engines' options that labctl sets by its own.
MANAGED = {
    **dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
        "use --gpus and --parallel",
    ),
    "device_map": "use --gpus",
    "dtype": "use --dtype",
    "torch_dtype": "use --dtype",
    "model": "use --model-id",
    "revision": "use --revision",
    "seed": "use --seed with --temperature",
    "temperature": "use --temperature",
    "top_p": "use --top-p",
    "max_tokens": "use --max-new-tokens",
}
TYPE_NAMES = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "Json": "a JSON object"
}  # fmt: skip


def parse(text: str) -> tuple[str, Scalar]:
    """ "key=value", the value as true, false, a number or a text. Raises WrongUseError for any other form."""
    key, value = _key_and_value(text, "compile=false")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for number in (int, float):
        try:
            return key, number(value)
        except ValueError:
            continue
    return key, value


def parse_sbatch(text: str) -> tuple[str, str | bool]:
    """ "key=value" of sbatch, or the name of an option without a value. Raises WrongUseError for any other form."""
    key, equals, value = (word.strip() for word in text.partition("="))
    if key in OPTIONS_WITHOUT_VALUE and (not equals or value.lower() == "true"):
        return key, True
    return _key_and_value(text, "comment=mine")


def _key_and_value(text: str, example: str) -> tuple[str, str]:
    key, equals, value = (word.strip() for word in text.partition("="))
    if not (key and equals):
        raise WrongUseError(f"not of the form key=value: {text!r}", f"write it like {example}")
    return key, value


def of_backend(backend: str, options: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The options that the backend has, in their canonical form, without the backend's defaults: an option with its default gives
    the same run."""
    known, defaults = engine_class(backend).OPTIONS, engine_class(backend).DEFAULTS
    given = normalised_options(backend, {name: value for name, value in options.items() if name in known})
    return {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}


def check(options: Mapping[str, Sequence[Scalar]], backends: Sequence[str], where: str) -> None:
    """Raises WrongUseError, beginning with `where`, for an option that no backend has, and for an invalid value."""
    known = {backend: engine_class(backend).OPTIONS for backend in backends}
    for name, values in options.items():
        if not values:
            raise WrongUseError(f"{where}engine option {name} is an empty list", "give it a value")
        wanted = next((of_backend[name] for of_backend in known.values() if name in of_backend), None)
        if name == "lora" and set(values) != {"none"} and (without := [b for b in known if name not in known[b]]):
            remedy = "use --backend vllm alone, or merge the adapter into the model"
            raise WrongUseError(f"{where}backend {' or '.join(without)} runs no LoRA adapters", remedy)
        if wanted is None:
            remedy = MANAGED.get(name) or nearest(name, sorted(set().union(*known.values())))
            raise WrongUseError(f"{where}backend {' or '.join(known)} has no engine option {name!r}", remedy)
        choices = next(
            (found for backend in known if (found := engine_class(backend).CHOICES.get(name)) is not None), None
        )
        for value in values:
            if not _fits(value, wanted):
                type_name = TYPE_NAMES.get(wanted.__name__, wanted.__name__)
                raise WrongUseError(f"{where}invalid engine option: {name}={value}", f"give {name} {type_name}")
            if choices is not None and value not in choices:
                raise WrongUseError(f"{where}invalid engine option: {name}={value}", nearest(str(value), choices))


def _fits(value: Scalar, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not issubclass(wanted, str):
        return type(value) is wanted
    if not isinstance(value, str) or wanted is str:
        return isinstance(value, str)
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False
