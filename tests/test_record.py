"""What crosses between the login node and the compute node: no field is lost, and no reader sees half a file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labctl_workers.record import (
    Attempt,
    DeviceMemory,
    Document,
    Failure,
    JobFolder,
    JobSpec,
    ModelRef,
    Refusal,
    Repeat,
    RunResult,
    RunSpec,
    Sample,
    Sampling,
    read_json,
    run_id_of,
    sha256_of_json,
    utc_now,
    write_json,
)

DOCUMENTS = sorted(Document.__subclasses__(), key=lambda document: document.__name__)
MISSING_FIELDS = [
    (document, field.name)
    for document in DOCUMENTS
    for field in fields(document)
    if field.default is MISSING and field.default_factory is MISSING
]
a_few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ---------------------------------------------------------------- any document, made from its type hints

numbers = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    Any: json_values,
    bool: st.booleans(),
    int: st.integers(-(2**53), 2**53),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=12),
    type(None): st.none(),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type hint, as far as record.py uses them: a field of a kind not known here fails loudly."""
    if hint in PLAIN:
        return PLAIN[hint]
    if isinstance(hint, type) and issubclass(hint, Document):
        return documents(hint)
    inner = typing.get_args(hint)
    match typing.get_origin(hint):
        case types.UnionType:
            return st.one_of(*map(values_of, inner))
        case origin if origin is list:
            return st.lists(values_of(inner[0]), max_size=2)
        case origin if origin is dict:
            return st.dictionaries(values_of(inner[0]), values_of(inner[1]), max_size=2)
    raise NotImplementedError(f"no strategy for {hint}")


def documents(kind: type[Document]) -> st.SearchStrategy[Document]:
    hints = typing.get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    unknown = st.dictionaries(st.text(max_size=8).filter(lambda key: key not in known), json_values, max_size=2)
    own = {name: values_of(hint) for name, hint in hints.items() if name in known and name != "extra"}
    return st.builds(kind, **own, extra=unknown)


# ---------------------------------------------------------------- documents


@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
@a_few
@given(data=st.data())
def test_any_document_is_the_same_after_a_trip_through_json(kind: type[Document], data: st.DataObject) -> None:
    document = data.draw(documents(kind))
    assert kind.from_json(json.loads(json.dumps(document.to_json(), ensure_ascii=False))) == document


@given(text=st.text())
@a_few
def test_any_text_comes_back_from_a_file_as_it_was_written(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "record.json"
    write_json(path, {"text": text}, durable=False)
    assert read_json(path) == {"text": text}


def a_result() -> RunResult:
    """A record with something in every field."""
    return RunResult(
        run_id="0123456789ab",
        attempt=Attempt("j.1", "j", "1000_2", utc_now(), "h", "dgxh-1", 7, "1000_2", "dgxh", 1, "3.11.7"),
        status="done",
        definition={"prompts": "abc", "sampling": {"seed": None}},
        started_at=utc_now(),
        ended_at=utc_now(),
        load_s=1.5,
        init_s=0.25,
        warmup_s=2.0,
        repeats=[
            Repeat(
                0,
                1.0,
                [Sample(0, 0, 3, [5, 2], [0.25, 0.5], "stop", "two tökens\n\u2028")],
                [DeviceMemory("cuda:0", "NVIDIA H100", 1, 2, 3, 4)],
                7,
                {"ttft_s": 0.25, "tpot_s": None},
            )
        ],
        fingerprint={"gpus": [{"name": "NVIDIA H100"}]},
        failure=Failure("kind", "message", "remedy", "Traceback"),
    )


def test_a_whole_record_comes_back_from_its_file_with_every_nested_part(tmp_path: Path) -> None:
    written = a_result()
    write_json(tmp_path / "record.json", written.to_json())
    read = RunResult.from_json(read_json(tmp_path / "record.json"))
    assert read == written
    assert isinstance(read.repeats[0].samples[0], Sample)
    assert isinstance(read.failure, Failure)


def test_fields_of_a_newer_labctl_survive_a_read_and_a_write_at_every_depth() -> None:
    newer = a_result().to_json()
    newer["mbu"] = 0.4
    newer["attempt"]["rack"] = "r7"
    newer["repeats"][0]["energy_j"] = 12.5
    newer["repeats"][0]["samples"][0]["mean_logprob"] = -1.25
    newer["repeats"][0]["devices"][0]["kv_cache_bytes"] = 9
    assert RunResult.from_json(newer).to_json() == newer


def test_an_unknown_field_that_is_called_extra_survives_too() -> None:
    document = {"name": "tiny", "extra": {"extra": 1}}
    assert ModelRef.from_json(document).to_json()["extra"] == {"extra": 1}


def test_an_unknown_field_never_hides_a_known_one() -> None:
    model = ModelRef("mine", extra={"name": "theirs"})
    assert model.to_json()["name"] == "mine"


def test_a_job_written_by_an_older_labctl_gets_the_defaults_of_the_fields_it_lacks() -> None:
    runs = [RunSpec("0123456789ab", {}, "p", 8)]
    job = JobSpec("j", "local", "local", "hf", ModelRef("m"), "float32", "cpu", 1, runs, {"p": ["hello"]})
    old = job.to_json()
    for name in ("gpu", "capability", "parallel", "engine_options", "raw_prompt", "time_limit_s", "schema"):
        del old[name]
    del old["runs"][0]["sampling"]
    assert JobSpec.from_json(old) == job


@pytest.mark.parametrize(
    ("kind", "name"), MISSING_FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in MISSING_FIELDS]
)
def test_a_document_without_a_field_that_has_no_default_is_a_type_error(kind: type[Document], name: str) -> None:
    @settings(max_examples=1, deadline=None, database=None)
    @given(document=documents(kind))
    def without(document: Document) -> None:
        data = document.to_json()
        del data[name]
        with pytest.raises(TypeError, match=name):
            kind.from_json(data)

    without()


@pytest.mark.parametrize("value", [None, [], "text", 3, True])
@pytest.mark.parametrize("kind", DOCUMENTS, ids=lambda kind: kind.__name__)
def test_what_is_no_json_object_is_a_type_error(kind: type[Document], value: Any) -> None:
    with pytest.raises(TypeError):
        kind.from_json(value)


@pytest.mark.parametrize("value", ["text", 3, {"attempt_id": "a"}, [1]])
def test_a_part_that_is_no_document_of_its_kind_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        RunResult.from_json({**a_result().to_json(), "attempt": value})
    with pytest.raises(TypeError):
        RunResult.from_json({**a_result().to_json(), "repeats": [value]})


def test_greedy_is_a_temperature_of_zero_and_nothing_else() -> None:
    assert Sampling().greedy
    assert Sampling(seed=7, top_p=0.5).greedy
    assert not Sampling(temperature=0.01).greedy


def test_a_refusal_carries_its_kind_its_message_and_its_remedy() -> None:
    error = Refusal("fewer-gpus", "sees 1 of 2", "ask for 2")
    assert (error.kind, error.message, error.remedy, str(error)) == (
        "fewer-gpus", "sees 1 of 2", "ask for 2", "sees 1 of 2",
    )  # fmt: skip


def test_the_time_now_is_utc_to_the_millisecond() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", utc_now())


# ---------------------------------------------------------------- ids


def turned_round(value: Any) -> Any:
    """The same JSON value with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: turned_round(item) for key, item in reversed(value.items())}
    return [turned_round(item) for item in value] if isinstance(value, list) else value


@given(asked=st.dictionaries(st.text(max_size=8), json_values, max_size=4))
@a_few
def test_a_run_id_does_not_depend_on_the_order_of_keys_nor_on_a_trip_through_json(asked: dict[str, Any]) -> None:
    assert run_id_of(turned_round(asked)) == run_id_of(asked)
    assert run_id_of(json.loads(json.dumps(asked))) == run_id_of(asked)


@given(one=json_values, other=json_values)
@a_few
def test_two_values_have_one_hash_only_if_they_are_the_same_json(one: Any, other: Any) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_of_json(one) == sha256_of_json(other)) == same


def test_a_run_id_is_the_first_twelve_digits_of_the_hash_of_the_canonical_json() -> None:
    canonical = '{"a":[1,"ö"],"b":{"c":null}}'.encode()
    assert run_id_of({"b": {"c": None}, "a": [1, "ö"]}) == hashlib.sha256(canonical).hexdigest()[:12]


def test_a_run_id_changes_with_every_value_that_was_asked() -> None:
    asked = {"gpus": 2, "dtype": "float16", "sampling": {"temperature": 0.0, "seed": None}}
    others = [
        {**asked, "gpus": 1},
        {**asked, "dtype": "bfloat16"},
        {**asked, "sampling": {"temperature": 0.0, "seed": 0}},
        {**asked, "more": None},
    ]
    assert len({run_id_of(each) for each in [asked, *others]}) == 5


# ---------------------------------------------------------------- files

either_way = pytest.mark.parametrize("durable", [True, False], ids=["durable", "not durable"])


@either_way
def test_a_reader_in_a_loop_never_sees_a_part_of_a_file(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "heartbeat.json"
    versions = [{"n": n, "text": "x" * (200_000 if n % 2 else 1), "end": n} for n in range(60)]
    write_json(path, versions[0], durable=durable)

    def write_all() -> None:
        for version in versions:
            write_json(path, version, durable=durable)

    writer = threading.Thread(target=write_all)
    writer.start()
    seen: list[int] = []
    while writer.is_alive():
        document = read_json(path)
        assert document["n"] == document["end"]
        seen.append(document["n"])
    writer.join()
    assert seen == sorted(seen)
    assert [file.name for file in tmp_path.iterdir()] == ["heartbeat.json"]


@either_way
@pytest.mark.parametrize("value", [{"a": object()}, {"a": {1, 2}}, ["x" * 100_000, b"bytes"], {"a": "\ud800"}])
def test_a_value_that_is_no_json_leaves_the_old_file_and_no_other(tmp_path: Path, value: Any, durable: bool) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"old": True})
    with pytest.raises((TypeError, ValueError)):
        write_json(path, value, durable=durable)
    assert read_json(path) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


A_FULL_DISK = """
import resource, sys
from pathlib import Path
from labctl_workers.record import write_json
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_json(Path(sys.argv[1]), {"text": "x" * 100_000}, durable=sys.argv[2] == "True")
except OSError as error:
    print(error.errno)
"""


@either_way
def test_a_disk_that_takes_no_more_leaves_the_old_file_and_no_other(tmp_path: Path, durable: bool) -> None:
    """The fault is real: the process may not write files beyond 4096 bytes."""
    path = tmp_path / "record.json"
    write_json(path, {"old": True})
    command = [sys.executable, "-c", A_FULL_DISK, str(path), str(durable)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(errno.EFBIG)
    assert read_json(path) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_sync_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: os.fsync says that the disk is full, as network file systems do at the very end."""

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "record.json"
    write_json(path, {"old": True})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_only_a_durable_file_is_forced_to_the_disk_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    real = os.fsync

    def counted(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr(os, "fsync", counted)
    write_json(tmp_path / "heartbeat.json", {}, durable=False)
    assert synced == []
    write_json(tmp_path / "record.json", {})
    assert synced == [False, True]  # the file first, then the folder


def test_a_file_s_own_folder_is_made_and_none_above_it(tmp_path: Path) -> None:
    write_json(tmp_path / "0123" / "a.json", [1])
    assert read_json(tmp_path / "0123" / "a.json") == [1]
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "moved" / "0123" / "a.json", [1])
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_of_a_file_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "record.json"
    code = "import sys; from pathlib import Path; from labctl_workers.record import write_json as w; w(Path(sys.argv[1]), 1)"
    subprocess.run([sys.executable, "-c", code, str(path)], umask=umask, check=True)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_reading_the_umask_leaves_it_as_it_was() -> None:
    code = "import os; os.umask(0o027); import labctl_workers.record; print(oct(os.umask(0)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0o27"


def test_a_file_that_is_no_json_is_a_value_error_and_a_missing_one_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"run_id": "01', encoding="utf-8")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("half.json", "binary.json"):
        with pytest.raises(ValueError):
            read_json(tmp_path / name)
    with pytest.raises(OSError):
        read_json(tmp_path / "missing.json")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
def test_many_writes_leave_no_file_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for n in range(100):
        write_json(tmp_path / "record.json", n)
        with pytest.raises(TypeError):
            write_json(tmp_path / "record.json", object(), durable=False)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


# ---------------------------------------------------------------- where things lie


def test_the_files_of_a_job_lie_beside_its_spec_and_its_records_in_the_workspace(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / ".labctl" / "arrays" / "b-1" / "3.json")
    assert folder.attempts == tmp_path / ".labctl" / "arrays" / "b-1" / "attempts"
    assert folder.heartbeat == tmp_path / ".labctl" / "arrays" / "b-1" / "heartbeats" / "3.json"
    assert folder.record("run", "a.1") == tmp_path / ".labctl" / "results" / "run" / "a.1.json"


def test_a_record_that_is_just_being_written_is_not_among_the_records(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path / ".labctl" / "arrays" / "b-1" / "0.json")
    assert list(folder.records("run")) == []
    folder.results.mkdir(parents=True)
    write_json(folder.record("run", "a.1"), {})
    (folder.results / "run" / ".a.2.json.x7z").write_text('{"run', encoding="utf-8")
    (folder.results / "run" / ".a.3.json").write_text('{"run', encoding="utf-8")
    assert [path.name for path in folder.records("run")] == ["a.1.json"]
