"""Site profiles: each file has the known keys alone, and an address and a short quote for every one of them."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from labctl_slurm.partitions import KEYS, build, shipped

SITES = Path(__file__).parent.parent / "slurm" / "labctl_slurm" / "sites"
FILES = sorted(SITES.glob("*.toml"))
CONTAINERS = {"apptainer", "singularity", "podman-hpc", "shifter", "pyxis", "container-engine"}
SITE_KEYS: dict[str, type] = {
    "account": str, "account_required": bool, "gpu_vendor": str, "containers": list, "scratch": str,
    "scratch_purge_days": int, "modules": list, "login_shell": bool, "max_jobs": int, "max_array_size": int,
}  # fmt: skip
NODE_KEYS = {"gpus", "cpus", "mem"}
SIZE = "[0-9]+[KMGT]"
# The forms of the keys that sites differ in; max_jobs is none of a partition in labctl.toml.
FORMS = {
    "gpu_request": "gres|gpus-per-node|gpus|none",
    "mem": f"0|none|{SIZE}( per-gpu| per-cpu)?",
    "cpus_per_task": "none|[1-9][0-9]*( per-gpu)?",
    "tasks": "none",
    "export": "ALL|NONE|none",
    "arrays": "True|False",
    "max_jobs": "[1-9][0-9]*",
}
PARTITION_KEYS = {*KEYS, *FORMS, "node"}
LONGEST_QUOTE = 25  # words


def profile(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def leaves(table: dict[str, Any]) -> set[str]:
    """ "sbatch.qos" for a table in the table."""
    return {
        f"{key}.{inner}" if inner else key
        for key, value in table.items()
        for inner in (value if isinstance(value, dict) else [""])
    }


def keys_of(site: dict[str, Any]) -> set[str]:
    """Every key that needs a source, as "site.KEY" and "PARTITION.KEY"."""
    partitions = site["partitions"].items()
    return {f"site.{key}" for key in site.get("site", {})} | {
        f"{name}.{key}" for name, table in partitions for key in leaves(table)
    }


def sourced(site: dict[str, Any]) -> set[str]:
    """The keys that the sources name; KEY alone stands for that key of every partition that has it."""
    named = {key for source in site["sources"] for key in source["keys"]}
    every = {key for key in named if "." not in key or key.partition(".")[0] not in {"site", *site["partitions"]}}
    return (named - every) | {f"{name}.{key}" for key in every for name in site["partitions"]}


def problems(site: dict[str, Any]) -> list[str]:
    found = [
        f"unknown key {key}" for key in site.keys() - {"name", "title", "checked", "site", "partitions", "sources"}
    ]
    if not isinstance(site["checked"], datetime.date):
        found.append("checked is no date")
    for key, value in site.get("site", {}).items():
        if type(value) is not SITE_KEYS.get(key):
            found.append(f"site.{key} is unknown or of another type")
    found += [f"unknown container {kind}" for kind in set(site.get("site", {}).get("containers", [])) - CONTAINERS]
    found += [
        f"no partition can be named {name}" for name in {"site", "sbatch", "env", "node"} & site["partitions"].keys()
    ]
    for name, table in site["partitions"].items():
        found += [f"{name}: unknown key {key}" for key in table.keys() - PARTITION_KEYS]
        found += [f"{name}.node: unknown key {key}" for key in table.get("node", {}).keys() - NODE_KEYS]
        found += [
            f"{name}.{key}: {table[key]!r}"
            for key in FORMS.keys() & table.keys()
            if not re.fullmatch(FORMS[key], str(table[key]))
        ]
    for source in site["sources"]:
        if source.keys() != {"keys", "url", "quote"} or not source["keys"]:
            found.append(f"a source with {sorted(source)}")
        elif not re.fullmatch(r"https://[^\s]+", source["url"]):
            found.append(f"no https address: {source['url']}")
        elif not 0 < len(source["quote"].split()) <= LONGEST_QUOTE or "\n" in source["quote"]:
            found.append(f"a quote of {len(source['quote'].split())} words: {source['quote']}")
    found += [f"no source for {key}" for key in keys_of(site) - sourced(site)]
    held = {key.partition(".")[2] for key in keys_of(site)} | keys_of(site)
    found += [f"a source for {key}" for source in site["sources"] for key in source["keys"] if key not in held]
    return sorted(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_known_and_has_a_source(path: Path) -> None:
    assert problems(profile(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_labctl_knows_of_a_partition_it_takes(path: Path) -> None:
    for name, table in profile(path)["partitions"].items():
        known = {key: value for key, value in table.items() if key in KEYS}
        build(name, [(path.name, {**known, "python": "/usr/bin/python3"})])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_job_of_the_profile_fits_a_node(path: Path) -> None:
    for name, table in profile(path)["partitions"].items():
        node = table.get("node", {})
        per_gpu = re.fullmatch("([0-9]+) per-gpu", str(table.get("cpus_per_task", "")))
        assert table.get("gpus", 1) <= node.get("gpus", 99), name
        if per_gpu and node.keys() >= {"gpus", "cpus"}:
            assert int(per_gpu[1]) * node["gpus"] <= node["cpus"], name
        elif isinstance(table.get("cpus_per_task"), int):
            assert table["cpus_per_task"] <= node.get("cpus", 999), name


def test_there_are_more_than_ten_sites_with_names_and_titles_of_their_own() -> None:
    sites = [profile(path) for path in FILES]
    assert [site["name"] for site in sites] == [path.stem for path in FILES]
    assert len({site["title"] for site in sites}) == len(sites) > 10


def test_the_shipped_partitions_are_those_of_their_site() -> None:
    partitions = profile(SITES / "osu-dgx.toml")["partitions"]
    for name in ("dgx2", "dgxh"):
        for key in partitions[name].keys() & shipped()[name].keys():
            assert partitions[name][key] == shipped()[name][key], key


def test_the_keys_are_explained() -> None:
    text = (SITES / "README.md").read_text(encoding="utf-8")
    assert [
        key for key in (*FORMS, *SITE_KEYS, *NODE_KEYS, *CONTAINERS) if f"`{key}`" not in text.replace('"', "")
    ] == []


GOOD: dict[str, Any] = {
    "name": "a", "title": "A", "checked": datetime.date(2026, 11, 30), "site": {"scratch": "/scratch"},
    "partitions": {"gpu": {"gpu_request": "gres", "sbatch": {"qos": "q"}}},
    "sources": [
        {"keys": ["gpu_request", "gpu.sbatch.qos"], "url": "https://a.b/c", "quote": "--gres=gpu:1"},
        {"keys": ["site.scratch"], "url": "https://a.b/c", "quote": "/scratch"},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, []),
        ({"partitions": {"gpu": {"gpu_request": "gpu", "sbatch": {"qos": "q"}}}}, ["gpu.gpu_request: 'gpu'"]),
        (
            {"partitions": {"node": {}}},
            ["a source for gpu.sbatch.qos", "a source for gpu_request", "no partition can be named node"],
        ),
        ({"partitions": {"gpu": {"gpu_request": "gres"}}}, ["a source for gpu.sbatch.qos"]),
        ({"site": {"scratch": "/s", "disk": "/d"}}, ["no source for site.disk", "site.disk is unknown or of another type"]),
        ({"sources": GOOD["sources"][:1]}, ["no source for site.scratch"]),
        ({"sources": [*GOOD["sources"], {"keys": ["gpu_request"], "url": "http://a.b", "quote": "q"}]}, ["no https address: http://a.b"]),
    ],
)  # fmt: skip
def test_a_profile_with_a_fault_is_told(wrong: dict[str, Any], told: list[str]) -> None:
    assert problems({**GOOD, **wrong}) == told


def test_a_long_quote_is_told() -> None:
    long = {"keys": ["gpu_request"], "url": "https://a.b", "quote": "word " * 26}
    assert problems({**GOOD, "sources": [*GOOD["sources"], long]})[0].startswith("a quote of 26 words")
