"""labctl fetch: huggingface_hub's own client against a hub on the loopback that can be told to fail (tests/hub.py).

The client reads its environment when it is imported, so each fetch is a process of its own, as a user's is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.models import fetch, hub_cache
from labctl_orchestrator.models.fetch import HubFile
from labctl_orchestrator.store.workspace import Workspace

from .conftest import refused, write_checkpoint
from .hub import Hub, Repository

MODEL = "org/tiny-llama"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"
LABCTL = Path(sys.executable).parent / "labctl"


@dataclass
class Desk:
    """A user's shell: labctl with HF_ENDPOINT set to the hub of the test."""

    workspace: Workspace
    hub: Hub
    source: Path

    @property
    def cache(self) -> Path:
        return self.workspace.root.parent / "hub" / "hub"

    @property
    def home(self) -> Path:
        return hub_cache.repository(self.cache, MODEL)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        for name in ("HF_HUB_OFFLINE", "LABCTL_NO_PREFLIGHT"):
            kept.pop(name, None)
        return subprocess.Popen(
            [str(LABCTL), *arguments],
            env={**kept, "HF_ENDPOINT": self.hub.address, "HF_HUB_DISABLE_XET": "1", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def fetched(self, *arguments: str, **variables: str) -> dict[str, Any]:
        done = self.run("fetch", MODEL, *arguments, "--json", **variables)
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@pytest.fixture
def desk(workspace: Workspace) -> Iterator[Desk]:
    source = write_checkpoint(workspace.root.parent / "source", range(50_000))
    with Hub() as hub:
        hub.add(MODEL, source)
        yield Desk(workspace, hub, source)


@pytest.fixture
def repository(desk: Desk) -> Repository:
    return desk.hub.repositories[MODEL]


def large(desk: Desk, megabytes: int) -> Path:
    """Weights large enough that the client, which takes 10 MB at a time, has something to go on from."""
    weights = desk.source / "model.safetensors"
    weights.write_bytes(os.urandom(megabytes * 1_000_000))
    return weights


# ---------------------------------------------------------------- what comes


def test_a_model_comes_whole_with_its_commit_kept_and_nothing_that_no_engine_loads(desk: Desk) -> None:
    for name in ("README.md", "original/consolidated.00.pth", "onnx/model.onnx", "tf_model.h5", "pytorch_model.bin"):
        (desk.source / name).parent.mkdir(exist_ok=True)
        (desk.source / name).write_bytes(b"x")
    answer = desk.fetched()
    commit = desk.hub.repositories[MODEL].commit
    assert (answer["revision"], answer["downloaded_bytes"]) == (commit, answer["total_bytes"])
    assert {path.name for path in Path(answer["path"]).iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert (desk.home / "refs" / "main").read_text(encoding="utf-8") == commit
    assert hub_cache.find(desk.cache, MODEL, "main") == hub_cache.Cached(commit, Path(answer["path"]))
    assert (Path(answer["path"]) / "model.safetensors").read_bytes() == (desk.source / "model.safetensors").read_bytes()


def test_what_is_there_is_not_downloaded_again(desk: Desk) -> None:
    desk.fetched()
    asked = dict(desk.hub.asked)
    assert desk.fetched()["downloaded_bytes"] == 0
    assert dict(desk.hub.asked) == asked


def test_a_new_commit_brings_only_what_has_changed(desk: Desk, repository: Repository) -> None:
    desk.fetched()
    (desk.source / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}', encoding="utf-8")
    repository.commit = OTHER
    assert desk.fetched()["revision"] == OTHER
    assert desk.hub.asked == {"config.json": 2, "tokenizer.json": 1, "model.safetensors": 1}


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["model-00001-of-00002.safetensors", "consolidated.safetensors"], ["model-00001-of-00002.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["original/model.safetensors", "onnx/model.onnx"], []),
    ],
)
def test_one_form_of_the_weights_is_chosen(names: list[str], weights: list[str]) -> None:
    files = [HubFile(name, 1) for name in [*names, "config.json"]]
    chosen = [file.path for file in fetch.needed(files)]
    assert chosen == (["config.json", *weights] if weights else [])


# ---------------------------------------------------------------- what breaks


def test_a_cut_connection_goes_on_where_it_was(desk: Desk, repository: Repository) -> None:
    weights = large(desk, 24)
    repository.cuts["model.safetensors"], repository.cut_after = 1, 15_000_000
    path = Path(desk.fetched()["path"])
    assert (path / "model.safetensors").read_bytes() == weights.read_bytes()
    assert len(desk.hub.ranges) == 1
    assert desk.hub.sent["model.safetensors"] < 31_000_000  # 24, and what was on its way when it was cut


def test_a_hub_that_cuts_every_connection_is_told_and_the_rest_is_kept(desk: Desk, repository: Repository) -> None:
    repository.cuts["model.safetensors"], repository.cut_after = 1000, 1000
    # A process whose waits are short: else it tries for a minute.
    short = "import time; time.sleep = lambda s: None; from labctl_orchestrator.cli import main; main()"
    process = subprocess.run(
        [sys.executable, "-c", short, "fetch", MODEL],
        env={**os.environ, "HF_ENDPOINT": desk.hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 5
    assert "labctl fetch again to download the missing files" in process.stderr
    assert "Traceback" not in process.stderr
    snapshot = next((desk.home / "snapshots").iterdir())
    assert (snapshot / "config.json").exists()
    assert not (snapshot / "model.safetensors").exists()
    assert hub_cache.missing(snapshot) == ["weights"]
    repository.cuts.clear()
    assert desk.fetched()["downloaded_bytes"] == (desk.source / "model.safetensors").stat().st_size


def test_a_killed_fetch_leaves_nothing_that_the_next_one_trips_over(desk: Desk, repository: Repository) -> None:
    large(desk, 12)
    repository.slow_s = 0.05
    process = desk.start("fetch", MODEL)
    while not desk.hub.sent["model.safetensors"]:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    repository.slow_s = 0.0
    path = Path(desk.fetched()["path"])
    assert (path / "model.safetensors").read_bytes() == (desk.source / "model.safetensors").read_bytes()


def test_ctrl_c_ends_a_fetch_at_once_and_leaves_no_half_file(desk: Desk, repository: Repository) -> None:
    large(desk, 12)
    repository.slow_s = 0.2  # half a minute
    process = desk.start("fetch", MODEL)
    while not list(desk.home.glob("blobs/*.incomplete")) or not desk.hub.sent["model.safetensors"]:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert desk.hub.sent["model.safetensors"] < 12_000_000
    assert "complete files are kept" in err
    assert not list(desk.home.glob("blobs/*.incomplete"))


def test_what_killed_fetches_left_is_removed_when_it_is_old(desk: Desk) -> None:
    blobs = desk.home / "blobs"
    blobs.mkdir(parents=True)
    old, young, other = (blobs / f"{'0' * 40}.{name}incomplete" for name in ("aaaaaaaa.", "bbbbbbbb.", ""))
    for part in (old, young, other):
        part.write_bytes(b"x")
    os.utime(old, (0, 0))
    desk.fetched()
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)


def test_two_fetches_at_once_download_once(desk: Desk, repository: Repository) -> None:
    weights = large(desk, 3)
    repository.slow_s = 0.03  # a second and a half
    both = [desk.start("fetch", MODEL, "--json") for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert sorted(json.loads(out)["downloaded_bytes"] > 0 for out, _ in answers) == [False, True]
    assert any("another labctl fetch downloads this model" in err for _, err in answers)
    assert desk.hub.asked["model.safetensors"] == 1
    assert desk.hub.sent["model.safetensors"] == weights.stat().st_size


def test_bytes_that_are_not_the_announced_ones_are_downloaded_again(desk: Desk, repository: Repository) -> None:
    """The client looks at the size alone: labctl reads the checksum."""
    repository.other_bytes["model.safetensors"] = 1
    repository.other_bytes["tokenizer.json"] = 1  # named by git's SHA-1
    path = Path(desk.fetched()["path"])
    for name in ("model.safetensors", "tokenizer.json"):
        assert (path / name).read_bytes() == (desk.source / name).read_bytes()
        assert desk.hub.asked[name] == 2


def test_bytes_that_are_wrong_twice_are_refused_and_removed(desk: Desk, repository: Repository) -> None:
    repository.other_bytes["model.safetensors"] = 2
    done = desk.run("fetch", MODEL)
    assert done.returncode == 5
    assert "checksum mismatch after two downloads" in done.stderr
    assert not list(desk.home.glob("snapshots/*/model.safetensors"))
    assert not any(blob.stat().st_size > 1000 for blob in (desk.home / "blobs").iterdir())
    assert not (desk.home / "refs" / "main").exists()


def test_a_file_that_was_damaged_on_the_disk_is_found_by_verify_and_mended(desk: Desk) -> None:
    weights = (Path(desk.fetched()["path"]) / "model.safetensors").resolve()
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    desk.fetched()
    assert weights.read_bytes() == content  # it was verified once, and looks as it did then
    desk.fetched("--verify")
    assert weights.read_bytes() == (desk.source / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_tells_where_to_accept_its_terms(desk: Desk, repository: Repository, status: int) -> None:
    repository.gated, repository.let_in = status, ("hf_let_in",)
    without = desk.run("fetch", MODEL)
    assert without.returncode == 3
    assert f"accept its terms at {desk.hub.address}/{MODEL}" in without.stderr
    assert "export HF_TOKEN" in without.stderr
    other = desk.run("fetch", MODEL, HF_TOKEN="hf_somebody_else")
    assert other.returncode == 3
    assert "has no access" in other.stderr
    assert "hf_somebody_else" not in other.stdout + other.stderr
    assert desk.fetched(HF_TOKEN="hf_let_in")["downloaded_bytes"] > 0
    written = [path.read_bytes() for path in desk.workspace.root.parent.rglob("*") if path.is_file()]
    assert not any(b"hf_let_in" in content for content in written)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["org/other"], 3, "model not found on the Hub: org/other"),
        ([MODEL, "--revision", "v9"], 3, "has no revision 'v9'"),
        (["a/b/c"], 2, "neither a folder nor a Hub id"),
        (["."], 2, "but a folder"),
        ([MODEL, "-p", "nowhere"], 2, "unknown partition"),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_one_line(desk: Desk, arguments: list[str], code: int, said: str) -> None:
    done = desk.run("fetch", *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "  -> " in done.stderr


def test_an_offline_shell_is_told_so(desk: Desk) -> None:
    done = desk.run("fetch", MODEL, HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "unset HF_HUB_OFFLINE" in done.stderr


def test_a_hub_that_is_down_is_told_and_what_was_fetched_stays_usable(desk: Desk) -> None:
    desk.hub.status = 503
    assert desk.run("fetch", MODEL).returncode == 5
    desk.hub.status = 0
    desk.fetched()
    desk.hub.status = 503
    done = desk.run("fetch", MODEL)
    assert done.returncode == 0
    assert "cannot check whether 'main' has a newer commit" in done.stderr


def test_a_repository_without_weights_is_refused(desk: Desk) -> None:
    (desk.source / "model.safetensors").unlink()
    done = desk.run("fetch", MODEL)
    assert done.returncode == 3
    assert "no weights" in done.stderr


def test_a_full_disk_is_told_before_the_download(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that says it is full stands in for one."""
    monkeypatch.setattr(fetch, "left_bytes", lambda _: 10**6)
    error = refused(lambda: fetch.check_space(desk.cache, 14 * 2**30))
    assert "14.0 GiB" in error.message
    assert "HF_HOME" in error.remedy


# ---------------------------------------------------------------- what jobs get


OFFLINE = '[partitions.dgxh]\noffline = true\nenv = {{ HF_HOME = "{home}" }}\n'


def test_jobs_of_an_offline_partition_get_the_snapshot_and_the_commit_that_was_fetched(
    desk: Desk, repository: Repository
) -> None:
    home = desk.workspace.root.parent / "shared"
    desk.workspace.settings_file.write_text(OFFLINE.format(home=home), encoding="utf-8")
    fetched = desk.fetched("-p", "dgxh")
    assert fetched["path"].startswith(str(home))
    repository.commit = OTHER  # the hub goes on; what was fetched is what is meant
    dry = desk.run("submit", "-p", "dgxh", "--model-id", MODEL, "--dry-run", "--json", "--no-preflight")
    assert dry.returncode == 0, dry.stderr
    (batch,) = json.loads(dry.stdout)
    (job,) = batch["jobs"]
    assert (job["model"]["path"], job["model"]["revision"]) == (fetched["path"], fetched["revision"])
    assert "export HF_HUB_OFFLINE=1" in batch["script"]
    assert f"export HF_HOME={home}" in batch["script"]


def test_a_run_is_the_same_whether_its_nodes_are_offline(desk: Desk) -> None:
    desk.fetched()
    ask = ("submit", "-p", "dgxh", "--model-id", MODEL, "--dry-run", "--json", "--no-preflight")
    ids = []
    for text in ("", "[partitions.dgxh]\noffline = true\n"):
        desk.workspace.settings_file.write_text(text, encoding="utf-8")
        (batch,) = json.loads(desk.run(*ask).stdout)
        ids.append(batch["jobs"][0]["runs"][0]["run_id"])
    assert ids[0] == ids[1]


def test_submit_refuses_a_gated_model_to_who_is_not_let_in(desk: Desk, repository: Repository) -> None:
    repository.gated, repository.let_in = 403, ("hf_let_in",)
    desk.workspace.settings_file.write_text('[partitions.dgxh]\ndevice = "cpu"\n', encoding="utf-8")
    ask = ("submit", "-p", "dgxh", "--model-id", MODEL)
    refused_ = desk.run(*ask)
    assert refused_.returncode == 3
    assert f"accept its terms at {desk.hub.address}/{MODEL}" in refused_.stderr
    assert not desk.workspace.data.exists()
    let_in = desk.run(*ask, "--dry-run", HF_TOKEN="hf_let_in")
    assert "gated" not in let_in.stderr
    assert "hf_let_in" not in let_in.stdout + let_in.stderr


def test_submit_refuses_what_offline_nodes_will_not_find_and_says_what_brings_it(
    desk: Desk, repository: Repository
) -> None:
    desk.workspace.settings_file.write_text('[partitions.dgxh]\noffline = true\ndevice = "cpu"\n', encoding="utf-8")
    ask = ("submit", "-p", "dgxh", "--model-id", MODEL, "--dry-run")
    before = desk.run(*ask)
    assert before.returncode == 3
    assert "nodes of dgxh cannot reach the Hub" in before.stderr
    assert f"labctl fetch {MODEL} --revision {repository.commit} -p dgxh" in before.stderr
    (Path(desk.fetched("-p", "dgxh")["path"]) / "model.safetensors").unlink()
    assert "(weights missing)" in desk.run(*ask).stderr
    desk.fetched("-p", "dgxh")
    assert "cannot reach the Hub" not in desk.run(*ask).stderr
