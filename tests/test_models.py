"""Which model is meant: a folder is known by its content, a hub id by its commit."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.models import resolve
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import WrongUseError

from .conftest import refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# ---------------------------------------------------------------- folders


def fingerprint(folder: Path) -> str | None:
    return resolve.of_folder(folder).fingerprint


def test_a_folder_is_named_by_its_last_part_and_known_by_its_content(checkpoint: Path) -> None:
    model, warning = resolve.resolve(str(checkpoint))
    assert warning is None
    assert (model.name, model.path, model.revision) == (checkpoint.name, str(checkpoint), None)
    assert model.fingerprint == fingerprint(checkpoint)


def test_a_folder_may_be_given_from_here_or_from_home(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    found = {
        resolve.resolve(name)[0].path for name in (checkpoint.name, f"./{checkpoint.name}", f"~/{checkpoint.name}")
    }
    assert found == {str(checkpoint)}


def test_a_copied_folder_has_the_same_fingerprint(checkpoint: Path) -> None:
    copy = shutil.copytree(checkpoint, checkpoint.parent / "copy", copy_function=shutil.copyfile)
    assert fingerprint(copy) == fingerprint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_any_byte_of_any_small_file_changes_the_fingerprint(checkpoint: Path, name: str) -> None:
    seen = {fingerprint(checkpoint)}
    content = (checkpoint / name).read_bytes()
    for place in range(len(content)):
        other = bytearray(content)
        other[place] ^= 1
        (checkpoint / name).write_bytes(other)
        seen.add(fingerprint(checkpoint))
    assert len(seen) == len(content) + 1
    (checkpoint / name).write_bytes(content)
    assert fingerprint(checkpoint) in seen


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "tokenizer.model", "merges.txt"])
def test_another_file_that_the_engine_reads_changes_the_fingerprint(checkpoint: Path, name: str) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / name).write_text("x", encoding="utf-8")
    assert fingerprint(checkpoint) != before


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "picture.png"])
def test_a_file_that_no_engine_reads_does_not(checkpoint: Path, name: str) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / name).write_text("x", encoding="utf-8")
    assert fingerprint(checkpoint) == before


def test_a_renamed_file_changes_the_fingerprint(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    assert fingerprint(checkpoint) != before


@pytest.mark.parametrize(
    "name", ["modeling.py", "original/params.json", "additional_chat_templates/tool.jinja", "vocab.tiktoken"]
)
def test_a_file_of_any_kind_or_subfolder_that_an_engine_may_load_changes_it(checkpoint: Path, name: str) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("x", encoding="utf-8")
    assert fingerprint(checkpoint) != before


@pytest.mark.parametrize("name", [".git/config", ".cache/huggingface/a.metadata", "LICENSE.txt", "optimizer.pt"])
def test_what_belongs_to_git_the_hub_or_a_trainer_does_not(checkpoint: Path, name: str) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_text("x", encoding="utf-8")
    assert fingerprint(checkpoint) == before


def test_content_that_moves_from_one_file_to_another_changes_it(checkpoint: Path) -> None:
    (checkpoint / "a.json").write_text("12", encoding="utf-8")
    (checkpoint / "b.json").write_text("3", encoding="utf-8")
    before = fingerprint(checkpoint)
    (checkpoint / "a.json").write_text("1", encoding="utf-8")
    (checkpoint / "b.json").write_text("23", encoding="utf-8")
    assert fingerprint(checkpoint) != before


def test_a_snapshot_of_links_into_blobs_is_known_by_what_they_lead_to(checkpoint: Path) -> None:
    """As the hub's cache lays a model out."""
    before = fingerprint(checkpoint)
    snapshot, blobs = checkpoint.parent / "snapshot", checkpoint.parent / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    assert fingerprint(snapshot) == before


@pytest.mark.parametrize("kind", ["config.json", "adapter_config.json"])
def test_a_trainers_checkpoint_in_a_subfolder_is_another_model(checkpoint: Path, kind: str) -> None:
    before = fingerprint(checkpoint)
    other = checkpoint / "checkpoint-500"
    other.mkdir()
    (other / kind).write_text("{}", encoding="utf-8")
    (other / "model.safetensors").write_text("x", encoding="utf-8")
    assert fingerprint(checkpoint) == before


def test_folders_that_lead_back_to_themselves_end(checkpoint: Path) -> None:
    before = fingerprint(checkpoint)
    (checkpoint / "again").symlink_to(checkpoint)
    assert fingerprint(checkpoint) == before


def test_a_link_to_nothing_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model-2.safetensors").symlink_to(checkpoint / "gone")
    assert "model-2.safetensors" in refused(lambda: fingerprint(checkpoint), WrongUseError).message


def test_a_folder_without_configuration_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "config.json" in refused(lambda: resolve.resolve(str(checkpoint)), WrongUseError).message


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "no weights" in refused(lambda: resolve.resolve(str(checkpoint)), WrongUseError).message


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "../missing", "~/missing"])
def test_a_folder_that_is_not_there_is_refused_as_a_folder(workspace: Workspace, name: str) -> None:
    assert "no such folder" in refused(lambda: resolve.resolve(name), WrongUseError).message


@pytest.mark.parametrize("name", ["a/b/c", "gpt 2", "org/", "/", "-x", "org/na..me", "ünïcode/ä", "x\ny"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(workspace: Workspace, name: str) -> None:
    refused(lambda: resolve.resolve(name), WrongUseError)


def test_the_home_of_a_user_who_does_not_exist_is_refused(workspace: Workspace) -> None:
    refused(lambda: resolve.resolve("~nobody-of-this-name/model"), WrongUseError)


def test_a_name_longer_than_a_file_may_have_is_refused(workspace: Workspace) -> None:
    refused(lambda: resolve.resolve("x" * 300), WrongUseError)


# ---------------------------------------------------------------- the hub
#
# huggingface_hub reads its environment when it is imported, so each of these is a process of its own.

ASK = (
    "import json, sys\n"
    "from labctl_orchestrator.models import resolve\n"
    "from labctl_slurm.errors import LabctlError\n"
    "resolve.HUB_ANSWER_WITHIN_S = 1.0\n"
    "try:\n"
    "    model, why_not = resolve.resolve(*sys.argv[1:])\n"
    "    print(json.dumps({'revision': model.revision, 'path': model.path, 'why_not': why_not}))\n"
    "except LabctlError as error:\n"
    "    print(json.dumps({'error': type(error).__name__, 'message': error.message, 'remedy': error.remedy}))\n"
)
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(workspace: Workspace) -> Ask:
    """Resolve a model in a process that has the environment given."""

    def ask(*arguments: str, **environment: str) -> dict[str, Any]:
        own = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        own.pop("HF_HUB_OFFLINE")
        done = subprocess.run(
            [sys.executable, "-c", ASK, *arguments],
            env={**own, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return ask


def closed_port() -> str:
    """An address on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def hub(status: int, body: dict[str, Any], **headers: str) -> Iterator[str]:
    """A hub on the loopback that gives this one answer."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_the_cache(workspace: Workspace, model: str, revision: str = "main") -> None:
    """What the hub's own tools leave when they have downloaded a model."""
    reference = workspace.root.parent / "hub" / "hub" / f"models--{model.replace('/', '--')}" / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT, encoding="utf-8")


def test_a_hub_model_is_pinned_to_the_commit_that_the_hub_names(ask: Ask) -> None:
    with hub(200, {"id": "org/name", "sha": COMMIT}) as address:
        assert ask("org/name", HF_ENDPOINT=address) == {"revision": COMMIT, "path": None, "why_not": None}


def test_a_model_that_the_hub_does_not_know_is_refused(ask: Ask) -> None:
    with hub(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound") as address:
        answer = ask("org/name", HF_ENDPOINT=address)
    assert (answer["error"], "HF_TOKEN" in answer["remedy"]) == ("PreflightError", True)


def test_a_revision_that_the_hub_does_not_know_is_refused(ask: Ask) -> None:
    with hub(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound") as address:
        answer = ask("org/name", "v9", HF_ENDPOINT=address)
    assert (answer["error"], "v9" in answer["message"]) == ("PreflightError", True)


def test_a_broken_hub_leaves_the_model_unpinned_and_says_why(ask: Ask) -> None:
    with hub(500, {}) as address:
        answer = ask("org/name", HF_ENDPOINT=address)
    assert answer["revision"] == "main"
    assert "is not pinned to a commit" in answer["why_not"]


def test_an_unreachable_hub_leaves_the_model_unpinned_and_says_why(ask: Ask) -> None:
    answer = ask("org/name", HF_ENDPOINT=closed_port())
    assert answer["revision"] == "main"
    assert "the Hub did not answer" in answer["why_not"]


def test_a_hub_that_never_answers_is_not_waited_for(ask: Ask) -> None:
    """The time to wait is shortened from 5 s to 1 s, so as not to wait here either."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        answer = ask("org/name", HF_ENDPOINT=f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - started < 30
    assert "the Hub did not answer" in answer["why_not"]


def test_offline_the_model_is_unpinned_and_the_reason_names_the_switch(ask: Ask) -> None:
    answer = ask("org/name", HF_HUB_OFFLINE="1", HF_ENDPOINT=closed_port())
    assert answer["revision"] == "main"
    assert "HF_HUB_OFFLINE" in answer["why_not"]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "closed"}])
def test_without_the_hub_a_model_is_pinned_to_the_commit_in_the_cache(
    ask: Ask, workspace: Workspace, environment: dict[str, str]
) -> None:
    in_the_cache(workspace, "org/name")
    address = {"HF_ENDPOINT": closed_port()}
    assert ask("org/name", **{**environment, **address}) == {"revision": COMMIT, "path": None, "why_not": None}


def test_the_cache_of_one_revision_says_nothing_of_another(ask: Ask, workspace: Workspace) -> None:
    in_the_cache(workspace, "org/name", "v1")
    assert ask("org/name", "v1", HF_HUB_OFFLINE="1")["revision"] == COMMIT
    assert ask("org/name", "v2", HF_HUB_OFFLINE="1")["revision"] == "v2"


def test_a_full_commit_is_taken_at_its_word(ask: Ask) -> None:
    assert ask("org/name", COMMIT, HF_ENDPOINT=closed_port()) == {"revision": COMMIT, "path": None, "why_not": None}
