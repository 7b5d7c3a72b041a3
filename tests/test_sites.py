"""Site profiles: each file has the known keys alone, and an address and a short quote for every one of them."""

from __future__ import annotations

import datetime
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import site_profiles
from labctl_slurm.partitions import KEYS, build, shipped
from labctl_slurm.render import Script

from .conftest import Labctl
from .test_render import options

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


# ---------------------------------------------------------------- the scripts that the profiles make


# The options that say a key; which one a site wants is what its documents are quoted for.
OPTIONS_OF_KEY = {
    "slurm_partition": ("partition",),
    "gpu_request": ("gres", "gpus-per-node", "gpus"),
    "mem": ("mem", "mem-per-gpu", "mem-per-cpu"),
    "cpus_per_task": ("cpus-per-task",),
    "tasks": ("ntasks", "ntasks-per-node"),
    "export": ("export",),
    "sbatch.qos": ("qos",),
    "sbatch.constraint": ("constraint",),
}
SHORT = {"p": "partition", "G": "gpus", "c": "cpus-per-task", "C": "constraint", "n": "ntasks"}
WHOLE_NODES = {"clariden", "daint", "lonestar6", "vista"}
# Values of these are the site's; a number of GPUs, or of memory, is that of the example.
NAMES = ("partition", "qos", "constraint", "cpus-per-task")


def quoted(quote: str) -> dict[str, str]:
    """The options of sbatch in a quote, with their values ("" for none)."""
    long = re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?:=([\w&:.<>]+))?", quote)
    short = re.findall(r"(?<![\w-])-([pGcCn]) ([\w&]+)?", quote)
    return dict(long) | {SHORT[letter]: value for letter, value in short}


def script_options(path: Path, name: str, gpus: int) -> dict[str, str | None]:
    made = site_profiles.load(path.stem)
    partition = build(name, [(path.name, made.table(name))])
    script = Script(partition, "labctl", gpus, None, Path("logs"), Path("code"), Path("templates"))
    return options(script.text("true"))


CASES = [(path, name) for path in FILES for name in profile(path)["partitions"]]


@pytest.mark.parametrize(("path", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES])
def test_each_line_of_the_script_is_what_the_site_is_quoted_to_demand(path: Path, name: str) -> None:
    site, written = profile(path), script_options(path, name, gpus=1)
    table = site["partitions"][name]
    for source in site["sources"]:
        told = quoted(source["quote"])
        for key in (one.removeprefix(f"{name}.") for one in source["keys"]):
            family = OPTIONS_OF_KEY.get(key, ())
            wanted, found = told.keys() & set(family), written.keys() & set(family)
            refused = wanted and re.search(r"\bnot\b", source["quote"], re.IGNORECASE)
            if table.get(key) == "none" or refused:
                assert not found, f"{key}: {found} for {source['quote']}"
            elif wanted and key in leaves(table) | set(table):
                assert found <= wanted, f"{key}: {found} for {source['quote']}"
                assert found, f"{key}: none of {wanted}"
                for option in found & set(NAMES):
                    assert written[option] == told[option] or not told[option], source["quote"]


# The words with which documents say that a job needs no such option: a refusal, a default, or a whole command without it.
NEEDS_NONE = r"\bnot\b|\bunless\b|\bwill allocate\b|^sbatch |Quality of Service"


def said(number: int, table: dict[str, Any], quotes: str) -> bool:
    """Whether the quotes have the number of CPUs, or its product with the GPUs of a node; or it is a share of the node's CPUs."""
    node = table.get("node", {})
    all_gpus = number * node.get("gpus", 1)
    return bool(re.search(rf"\b({number}|{all_gpus})\b", quotes)) or all_gpus == node.get("cpus")


@pytest.mark.parametrize(("path", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES])
def test_each_value_of_an_option_is_in_a_quote_of_its_key(path: Path, name: str) -> None:
    site = profile(path)
    table = site["partitions"][name]
    values = {**table, **{f"sbatch.{option}": value for option, value in table.get("sbatch", {}).items()}}
    for key in (OPTIONS_OF_KEY.keys() & values.keys()) - {"gpu_request", "export"}:
        value = str(values[key])
        keys = {key, f"{name}.{key}"}
        quotes = "\n".join(source["quote"] for source in site["sources"] if keys.intersection(source["keys"]))
        named = quoted(quotes).keys() & set(OPTIONS_OF_KEY[key])
        if value == "none":
            assert re.search(NEEDS_NONE, quotes, re.IGNORECASE | re.MULTILINE), f"{key}: {quotes}"
        elif key == "mem":  # where a site names the option alone, the size is labctl's
            assert named or re.search(rf"\b{re.findall('[0-9]+', value)[0]}G?\b", quotes), f"{key} = {value}: {quotes}"
        elif key == "cpus_per_task":
            assert (named and value == "8") or said(int(value.split(maxsplit=1)[0]), table, quotes), (
                f"{key} = {value}: {quotes}"
            )
        else:
            assert all(re.search(rf"\b{word}\b", quotes) for word in re.findall(r"[\w-]+", value)), (
                f"{key} = {value}: {quotes}"
            )


@pytest.mark.parametrize(("path", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES])
def test_a_line_that_no_source_demands_is_what_labctl_asks_for_everywhere(path: Path, name: str) -> None:
    table, written = profile(path)["partitions"][name], script_options(path, name, gpus=2)
    gres = ":".join(filter(None, ("gpu", table.get("gpu_type"), "2")))
    usual = {"nodes": "1", "ntasks-per-node": "1", "gres": gres, "mem": "64G", "cpus-per-task": "8", "export": "ALL"}
    usual |= {"time": "0-01:00:00", "open-mode": "append", "signal": "B:USR2@90", "job-name": "labctl"}
    key_of = {option: key for key, family in OPTIONS_OF_KEY.items() for option in family} | {"account": "account"}
    for option, value in written.items():
        if option in ("output", "error") or option in table.get("sbatch", {}):
            continue
        if key_of.get(option, option) not in table:
            assert value == usual.get(option), option


def test_the_sites_that_give_whole_nodes_are_asked_for_no_gpu() -> None:
    gpus = set(OPTIONS_OF_KEY["gpu_request"])
    none = {path.stem for path, name in CASES if not script_options(path, name, 2).keys() & gpus}
    assert none == WHOLE_NODES


def test_a_site_of_login_shells_has_them() -> None:
    made = site_profiles.load("iris")
    script = Script(build("gpu", [("iris", made.table("gpu"))]), "x", 1, None, Path("l"), Path("c"), Path("t"))
    assert script.text("true").startswith("#!/bin/bash -l\n#SBATCH ")


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_init_writes_the_profile_as_settings_with_a_source_for_each_key(labctl: Labctl, path: Path) -> None:
    ran = labctl("init", "--site", path.stem, "--print")
    assert ran.code == 0, ran.err
    made, site = tomllib.loads(ran.out)["partitions"], profile(path)
    for name, table in site["partitions"].items():
        known = {key: value for key, value in table.items() if key in KEYS}
        assert {key: made[name][key] for key in made[name] if key != "login_shell"} == known
        build(name, [("labctl.toml", made[name])])
    sources = len(site["sources"])
    assert [f"# [{number}] {source['url']}" in ran.out for number, source in enumerate(site["sources"], 1)] == [
        True
    ] * sources
    settings = ran.out.partition("[partitions.")[2].partition("# Sources:")[0]
    keys = [line for line in settings.splitlines() if re.match(r"[a-z_]+ = ", line)]
    assert [line for line in keys if not re.search(r"# .*\[\d+\]$", line)] == []


def test_init_makes_the_workspace_of_a_site(labctl: Labctl, workspace: Workspace) -> None:
    ran = labctl("init", "--site", "narval", "--account", "def-ada-gpu")
    assert ran.code == 0, ran.err
    told = {row["key"]: row["value"] for row in labctl("config", "-p", "a100", "--json").json}
    assert (told["account"], told["slurm_partition"], told["cpus_per_task"]) == ("def-ada-gpu", "none", "12 per-gpu")
    again = labctl("init", "--site", "mila")
    assert (again.code, "labctl.toml" in again.err) == (2, True)


def test_an_unknown_site_is_told_the_nearest_and_a_file_of_ones_own_is_taken(
    labctl: Labctl, workspace: Workspace
) -> None:
    assert "did you mean 'narval'?" in labctl("init", "--site", "narwal").err
    own = workspace.root / "mine.toml"
    own.write_bytes((SITES / "mila.toml").read_bytes())
    assert "[partitions.main-a100]" in labctl("init", "--site", own, "--print").out
    for wrong in ("name = 3", "name =", (SITES / "mila.toml").read_text().replace('"48G"', '"48GB"')):
        own.write_text(wrong, encoding="utf-8")
        ran = labctl("init", "--site", own, "--print")
        assert (ran.code, ran.out, "->" in ran.err) == (2, "", True)


def test_sites_lists_each_profile_with_its_gpus_and_its_date(labctl: Labctl) -> None:
    listed = labctl("sites", "--json").json
    assert [site["name"] for site in listed] == [path.stem for path in FILES]
    assert next(site for site in listed if site["name"] == "osu-dgx")["gpus"] == ["V100 32 GiB", "H100 80 GiB"]
    assert "NERSC Perlmutter" in labctl("sites").out


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
