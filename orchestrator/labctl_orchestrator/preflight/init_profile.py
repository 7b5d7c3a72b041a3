"""A site profile -> the labctl.toml to begin with, each key with the numbers of its sources."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from labctl_orchestrator.preflight.init_proposal import HEAD, PYTHON_COMMENT, Account, account_lines
from labctl_slurm.site_profiles import Profile

WIDTH = 48  # columns before the numbers of the sources


def text(profile: Profile, account: Account) -> str:
    """The labctl.toml. An account that Slurm knows, or that was chosen, takes the place of the profile's."""
    only = next(iter(profile.partitions)) if len(profile.partitions) == 1 else None
    choices = " or ".join(json.dumps(name) for name in profile.partitions)
    lines = [
        HEAD,
        f"# {profile.title}, from its documentation of {profile.checked}. [1] is the first source below.",
        *(f"# {remark}" for remark in profile.remarks),
        "",
        "[defaults]                           # of every request; the keys are the flags of `labctl submit`",
        f"partition = {json.dumps(only)}" if only else f"# partition = ...                    # {choices}",
        '# model_id = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"',
    ]
    for name in profile.partitions:
        lines += ["", *_partition(profile, name, account)]
    lines += ["", *(f"# {fact}" for fact in _facts(profile)), "# Sources:"]
    for number, source in enumerate(profile.sources, 1):
        lines += [f"# [{number}] {source.url}", f"#     {source.quote}"]
    return "\n".join(lines) + "\n"


def _partition(profile: Profile, name: str, account: Account) -> Iterator[str]:
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    node = profile.node(name)
    has = (
        [f"{node.gpus} GPUs"] * bool(node.gpus) + [f"{node.cpus} CPUs"] * bool(node.cpus) + [node.mem] * bool(node.mem)
    )
    of_node = f"a node has {', '.join(has)}" if has else ""
    yield _with_sources(f"[partitions.{key}]", profile, [f"{name}.node"], of_node) if has else f"[partitions.{key}]"
    if most := profile.partitions[name].get("max_jobs"):
        yield _with_sources(f"# at most {most} jobs of yours, waiting and running", profile, [f"{name}.max_jobs"])
    table = profile.table(name)
    if account.names or account.chosen is not None:
        table.pop("account", None)
        yield from account_lines(account)
    elif "account" not in table and profile.site.account:
        required = "" if profile.site.account_required else ", where you have several"
        keys = ["site.account", "site.account_required"]
        yield _with_sources(f"# account = {json.dumps(profile.site.account)}", profile, keys, f"yours{required}")
    for one, value in table.items():
        where = "site.login_shell" if one == "login_shell" else f"{name}.{one}"
        yield _with_sources(f"{one} = {_toml(value)}", profile, [where])
    yield PYTHON_COMMENT
    if profile.site.modules:
        yield _with_sources(f"# setup = {_toml(profile.site.modules)}", profile, ["site.modules"])


def _facts(profile: Profile) -> Iterator[str]:
    site = profile.site
    purge = f", where files unused for {site.scratch_purge_days} days are deleted" if site.scratch_purge_days else ""
    facts = {
        "gpu_vendor": f"GPUs: {site.gpu_vendor.upper()}'s; labctl's engines need NVIDIA's" if site.gpu_vendor else "",
        "scratch": f"Large files: {site.scratch}{purge}" if site.scratch else "",
        "containers": f"Containers: {', '.join(site.containers)}" if site.containers else "",
        "max_jobs": f"Jobs of a user: {site.max_jobs} at most" if site.max_jobs else "",
        "max_array_size": f"Tasks of an array: {site.max_array_size} at most" if site.max_array_size else "",
    }
    for key, fact in facts.items():
        keys = [f"site.{key}"] + (["site.scratch_purge_days"] if key == "scratch" else [])
        if fact:
            yield f"{fact} {_numbers(profile, keys)}"


def warnings(profile: Profile) -> list[str]:
    """What a person has to know before the first submit."""
    if profile.site.gpu_vendor:
        return [f"GPUs of another vendor: {profile.site.gpu_vendor}; labctl's engines need NVIDIA GPUs"]
    return []


def _with_sources(line: str, profile: Profile, keys: Iterable[str], remark: str = "") -> str:
    comment = " ".join(filter(None, (remark, _numbers(profile, keys))))
    return f"{line.ljust(WIDTH)} # {comment}"


def _numbers(profile: Profile, keys: Iterable[str]) -> str:
    found = sorted({number for key in keys for number in profile.sources_of(key)})
    return " ".join(f"[{number}]" for number in found)


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
