"""Where the reasons of failed runs are read, and that they are read once."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_orchestrator.tracking import status
from labctl_orchestrator.tracking.run_status import RunStatus
from labctl_slurm import diagnose
from labctl_workers.record import Failure, ModelRef, read_json, utc_now

from .conftest import JobArray, Labctl, Records, Slurm, edit_json

LONG_AGO = "2026-01-01T00:00:00Z"
OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.20 GiB is free."
)


def looked_at(records: Records) -> list[RunStatus]:
    with closing(open_store(records.workspace)) as store:
        collect(records.workspace, store)
        return status.statuses(
            records.workspace, store, [row["run_id"] for row in store.rows("SELECT run_id FROM runs")]
        )


def write_log(batch: JobArray, slurm_id: str, *, err: str = "", out: str = "") -> Path:
    folder = batch.folder / "submitit"
    folder.mkdir(exist_ok=True)
    (folder / f"{slurm_id}_0_log.out").write_text(out, encoding="utf-8")
    (folder / f"{slurm_id}_0_log.err").write_text(err, encoding="utf-8")
    return folder


@contextmanager
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Which logs are opened."""
    counts: Counter[str] = Counter()
    real = os.open

    def counting(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith((".err", ".out")):
            counts[Path(path).name] += 1
        return real(path, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", counting)
        yield counts


def failed(records: Records, failure: Failure, **log: str) -> JobArray:
    batch = records.submit()
    attempt = records.attempt(batch)
    records._record(batch, attempt, batch.runs[0], "failed", failure=failure)
    records.states(batch, state="FAILED", exit_code="1:0", ended_at=LONG_AGO)
    write_log(batch, "1000", **log)
    return batch


def test_a_log_is_read_once_and_what_was_found_is_kept(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = records.submit(dtypes=("float16", "bfloat16"))
    records.states(batch, state="FAILED", exit_code="127:0", ended_at=LONG_AGO)
    for task in (0, 1):
        write_log(batch, f"1000_{task}", err="slurm_script: line 30: exec: /no/bin/python: not found\n")
    with opened(monkeypatch) as counts:
        first = looked_at(records)
        assert [run.kind for run in first] == ["python-missing"] * 2
        assert set(counts.values()) == {1}
        assert looked_at(records) == first
        assert set(counts.values()) == {1}
    assert first[0].detail == "Python of partition dgxh does not run on the node: /no/bin/python"


def test_no_log_of_a_run_that_did_not_fail_is_opened(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    done, running = records.submit("1"), records.submit("2", lengths=(8,))
    records.done(done, records.attempt(done, slurm_id="1"))
    records.states(running, state="RUNNING")
    write_log(done, "1", err=OOM)
    write_log(running, "2", err=OOM)
    with opened(monkeypatch) as counts:
        assert {run.state for run in looked_at(records)} == {"done", "running"}
    assert counts == {}


def test_a_log_that_has_not_reached_this_machine_yet_is_looked_for_again(records: Records) -> None:
    batch = records.submit()
    records.states(batch, state="FAILED", exit_code="1:0", ended_at=utc_now())
    (run,) = looked_at(records)
    assert (run.kind, run.last_lines) == (diagnose.UNKNOWN, ())
    write_log(batch, "1000", err="OSError: [Errno 28] No space left on device\n")
    (run,) = looked_at(records)
    assert run.kind == "disk-full"


@pytest.mark.parametrize(
    ("exit_code", "err"),
    [
        ("0:53", ""),
        ("1:0", "ModuleNotFoundError: No module named 'labctl_workers.kept_records'\n"),
        ("1:0", "FileNotFoundError: [Errno 2] No such file or directory: '/gone/lab/.labctl/arrays/a-1/attempts'\n"),
    ],
    ids=["before it began", "its code", "its files"],
)
def test_a_job_whose_workspace_was_moved_is_told_so(records: Records, exit_code: str, err: str) -> None:
    batch = records.submit()
    edit_json(batch.folder / "intent.json", folder=f"/gone/lab/.labctl/arrays/{batch.array_id}")
    records.states(batch, state="FAILED", exit_code=exit_code, ended_at=LONG_AGO)
    write_log(batch, "1000", err=err)
    (run,) = looked_at(records)
    assert (run.state, run.kind) == ("failed", "workspace-moved")
    assert run.detail == "workspace moved after the submission, from /gone/lab"


def test_a_node_that_does_not_see_a_workspace_that_was_not_moved_is_told_so(records: Records) -> None:
    batch = records.submit()
    edit_json(batch.folder / "intent.json", folder=str(batch.folder))
    records.states(batch, state="FAILED", exit_code="0:53", ended_at=LONG_AGO)
    (run,) = looked_at(records)
    assert run.kind == "workspace-not-shared"


def test_an_end_that_nothing_explains_comes_with_the_logs_last_lines(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    slurm.shows()
    batch = records.submit()
    records.states(batch, state="FAILED", exit_code="3:0", ended_at=LONG_AGO)
    write_log(batch, "1000", err="something odd\nKaboom: 42\n")
    (run,) = labctl("status", "--json").json
    assert (run["kind"], run["last_lines"]) == ("unknown", ["something odd", "Kaboom: 42"])
    assert "Kaboom: 42" in labctl("status").out
    shown = labctl("show", run["run_id"]).out
    assert "the log ends:\n    something odd\n    Kaboom: 42\n" in shown


def test_an_error_in_a_record_is_told_by_the_table(records: Records) -> None:
    failed(records, Failure("gpu-out-of-memory", OOM, "take less", f"Traceback ...\n{OOM}"))
    (run,) = looked_at(records)
    assert run.kind == "gpu-out-of-memory"
    assert run.detail == "CUDA out of memory on GPU 1: 2.00 GiB requested, 1.20 GiB of 79.11 GiB free"
    assert "--batch-size (it was 1)" in run.remedy


def test_an_engine_that_died_is_told_by_what_its_processes_wrote_into_the_log(records: Records) -> None:
    failed(records, Failure("engine-died", "vLLM's EngineCore ended", "labctl logs"), err=f"(EngineCore) ERROR {OOM}\n")
    (run,) = looked_at(records)
    assert run.kind == "gpu-out-of-memory"


@pytest.mark.parametrize(
    "answer", ["CUDA out of memory", "No space left on device", "labctl: setup failed (exit code 1): x"]
)
def test_an_answer_is_no_reason_of_a_failure(records: Records, answer: str) -> None:
    failed(
        records,
        Failure("engine-died", "vLLM's EngineCore ended", "labctl logs"),
        out=f"{answer}\nRun 1: 4 new tokens\n",
    )
    (run,) = looked_at(records)
    assert run.kind == "engine-died"


def test_an_answer_is_no_reason_of_a_job_that_was_killed(records: Records) -> None:
    batch = records.submit()
    records.states(batch, state="FAILED", exit_code="0:9", ended_at=LONG_AGO)
    write_log(batch, "1000", out="CUDA out of memory\n")
    (run,) = looked_at(records)
    assert run.kind == "killed"


def test_a_refusal_of_the_worker_speaks_for_itself(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    failed(records, Failure("fewer-gpus", "too few GPUs in the job: 1 of 2", "request them from Slurm"), err=OOM)
    with opened(monkeypatch) as counts:
        (run,) = looked_at(records)
    assert (run.kind, run.remedy, counts) == ("fewer-gpus", "request them from Slurm", {})


def test_an_exception_that_is_not_known_keeps_its_name_and_the_logs_end(records: Records) -> None:
    failed(
        records, Failure("ZeroDivisionError", "division by zero", "labctl logs", "Traceback ..."), err="last words\n"
    )
    (run,) = looked_at(records)
    assert run.kind == diagnose.UNKNOWN
    assert run.detail == "ZeroDivisionError: division by zero"
    assert run.last_lines == ("last words",)


def test_a_log_that_was_cleaned_away_leaves_what_was_found_and_what_the_record_says(records: Records) -> None:
    batch = failed(records, Failure("RuntimeError", "CUDA error: no kernel image is available", "labctl logs", "T ..."))
    for log in (batch.folder / "submitit").iterdir():
        log.unlink()
    (run,) = looked_at(records)
    assert run.kind == "no-kernel-image"


@pytest.mark.parametrize(
    ("state", "told", "kind"),
    [
        ("TIMEOUT", "timeout", "time-limit"),
        ("CANCELLED", "cancelled", "cancelled"),
        ("NODE_FAIL", "failed", "node-failure"),
    ],
)
def test_who_told_a_worker_to_end_is_slurms_to_say(records: Records, state: str, told: str, kind: str) -> None:
    """SIGTERM is all that the worker saw."""
    batch = failed(
        records,
        Failure("cancelled", "job cancelled before it measured the run", "run labctl retry to resubmit the run"),
    )
    records.states(batch, state=state, reason="by 4123456789", ended_at=LONG_AGO)
    (run,) = looked_at(records)
    assert (run.state, run.kind) == (told, kind)


OF_ANOTHER_TYPE = '{"kind": "odd", "happened": [null], "remedy": 1e999, "lines": []}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"edition": 1}',
        '{"edition": EDITION, "found": {"x": 1}}',
        '{"edition": EDITION, "found": {"KEY": ODD}}',
    ],
)
def test_what_was_kept_and_is_damaged_is_found_again(records: Records, content: str) -> None:
    batch = failed(records, Failure("RuntimeError", "No space left on device", "labctl logs"))
    (run,) = looked_at(records)
    kept = batch.folder / "diagnoses.json"
    (key,) = json.loads(kept.read_text())["found"]
    filled = content.replace("EDITION", str(diagnose.edition())).replace("KEY", key).replace("ODD", OF_ANOTHER_TYPE)
    kept.write_text(filled, encoding="utf-8")
    (run,) = looked_at(records)
    assert run.kind == "disk-full"
    assert json.loads((batch.folder / "diagnoses.json").read_text())["edition"] == diagnose.edition()


def test_logs_ends_with_the_reason_and_the_remedy(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows()
    batch = failed(records, Failure("RuntimeError", "No space left on device", "labctl logs"), err="x: No space left\n")
    ran = labctl("logs", batch.runs[0].run_id)
    assert ran.err.splitlines()[-2].endswith("failed: no space left on a file system")
    assert ran.err.splitlines()[-1].startswith("  -> find the full file system with df")


def test_a_job_that_waits_for_what_never_comes_is_told_with_a_way_out(
    labctl: Labctl, records: Records, slurm: Slurm
) -> None:
    slurm.shows()
    batch = records.submit()
    records.states(batch, state="PENDING", reason="PartitionTimeLimit")
    slurm.is_silent()
    (run,) = labctl("status", "--json").json
    assert (run["state"], run["kind"]) == ("pending", "pending-for-ever")
    assert run["detail"].startswith("PartitionTimeLimit: time limit above the partition")
    assert "labctl cancel" in run["remedy"]


def test_a_refusal_of_slurms_has_its_kind(records: Records) -> None:
    batch = records.prepare()
    records.intend(batch, records.request())
    records.refuse(batch, "Slurm refused the job: Invalid account or account/partition combination specified")
    (run,) = looked_at(records)
    assert (run.state, run.kind) == ("refused", "bad-account")


def llama(folder: Path) -> Path:
    """The dimensions of Llama-2-7B, and weights of that size in the headers alone."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("batch_size", "remedy"),
    [(4096, "by labctl fit: --batch-size "), (1, "labctl fit expects ")],
    ids=["too large", "not so"],
)
def test_a_gpu_that_ran_out_of_memory_is_told_what_would_have_fitted(
    records: Records, tmp_path: Path, batch_size: int, remedy: str
) -> None:
    model = ModelRef("llama", path=str(llama(tmp_path / "llama")), fingerprint="0" * 64)
    batch = records.submit(model=model, lengths=(1024,))
    edit_json(batch.spec(0), runs=[{**read_json(batch.spec(0))["runs"][0], "batch_size": batch_size}])
    attempt = records.attempt(batch)
    records._record(batch, attempt, batch.runs[0], "failed", failure=Failure("gpu-out-of-memory", OOM, "less", OOM))
    records.states(batch, state="FAILED", exit_code="1:0", ended_at=LONG_AGO)
    (run,) = looked_at(records)
    assert run.kind == "gpu-out-of-memory"
    assert run.remedy.startswith(remedy)
