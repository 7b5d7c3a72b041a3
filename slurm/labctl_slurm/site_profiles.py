"""The site profiles of sites/: the Slurm options of public GPU clusters, each key with its source."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from labctl_slurm.errors import WrongUseError, nearest
from labctl_slurm.partitions import KEYS


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The source of keys: "gpu_request" of every partition, "gpu.gpu_request" of one, "site.scratch"."""

    keys: list[str]
    url: str
    quote: str


class SiteFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Facts of a site beside its partitions; sites/README.md defines the keys."""

    account: str = ""
    account_required: bool = False
    gpu_vendor: str = ""
    containers: list[str] = []
    scratch: str = ""
    scratch_purge_days: int = 0
    modules: list[str] = []
    login_shell: bool = False
    max_jobs: int = 0
    max_array_size: int = 0


class Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The resources of one node; 0 and "" if unknown."""

    gpus: int = 0
    cpus: int = 0
    mem: str = ""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One site. `partitions` are tables as in labctl.toml with `node` and `max_jobs` beside; `remarks` are the comments at the
    top of its file."""

    name: str
    title: str
    checked: datetime.date
    partitions: dict[str, dict[str, Any]]
    sources: list[Source]
    site: SiteFacts = SiteFacts()
    remarks: list[str] = []

    def table(self, partition: str) -> dict[str, Any]:
        """The partition's keys of labctl.toml."""
        own = {key: value for key, value in self.partitions[partition].items() if key in KEYS}
        return {**own, "login_shell": True} if self.site.login_shell else own

    def node(self, partition: str) -> Node:
        return msgspec.convert(self.partitions[partition].get("node", {}), Node)

    @property
    def gpus(self) -> list[str]:
        """The GPUs of its partitions: "A100 40 GiB", or "?" if unknown."""
        names = (
            f"{table.get('gpu', '?')} {size} GiB"
            if (size := table.get("gpu_memory_gib"))
            else str(table.get("gpu", "?"))
            for table in self.partitions.values()
        )
        return list(dict.fromkeys(names))

    def sources_of(self, key: str) -> list[int]:
        """The numbers, from 1, of the sources of "PARTITION.KEY" or "site.KEY", an entry of a table included."""
        owner, _, rest = key.partition(".")
        names = {key} if owner == "site" else {key, rest}
        return [
            number
            for number, source in enumerate(self.sources, 1)
            if any(name == one or name.startswith(f"{one}.") for one in names for name in source.keys)
        ]


def names() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in files("labctl_slurm").joinpath("sites").iterdir()
                  if path.name.endswith(".toml"))  # fmt: skip


def load(name: str) -> Profile:
    """The shipped profile of this name, or the profile in a file NAME.toml. Raises WrongUseError."""
    if name.endswith(".toml"):
        try:
            return _parsed(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise WrongUseError(f"cannot read site profile {name}: {error}", "give a readable TOML file") from None
        except msgspec.ValidationError as error:
            raise WrongUseError(
                f"invalid site profile {name}: {error}", "correct that key (examples: labctl sites)"
            ) from None
        except msgspec.DecodeError as error:
            raise WrongUseError(f"site profile {name} is not TOML: {error}", "correct the line") from None
    if name not in names():
        raise WrongUseError(f"unknown site: {name}", nearest(name, names()))
    return _parsed(files("labctl_slurm").joinpath("sites", f"{name}.toml").read_text(encoding="utf-8"))


def _parsed(text: str) -> Profile:
    document: Mapping[str, Any] = msgspec.toml.decode(text)
    head = re.match(r"(?:#.*\n)*", text)
    remarks = [line.removeprefix("#").strip() for line in head[0].splitlines()] if head else []
    return msgspec.convert({**document, "remarks": remarks}, Profile)
