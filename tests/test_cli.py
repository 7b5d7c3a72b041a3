"""The command line: what it says when something is wrong, what it prints for programs, and what it leaves alone."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from labctl_orchestrator import cli
from labctl_orchestrator.cli import COMMANDS, logs, run_here
from labctl_orchestrator.store.workspace import Workspace
from labctl_orchestrator.tracking import refresh, wait
from labctl_slurm import poll

from .conftest import Labctl, Ran, Records, Slurm, files_below, sacct_line, squeue_line, write_checkpoint

PROGRAM = "import sys; from labctl_orchestrator.cli import main; main(sys.argv[1:])"
WRONG_USE, SLURM = 2, 4


def one_clear_message(ran: Ran, code: int) -> None:
    """One line that says what is wrong, one that says what to do, nothing else anywhere."""
    assert ran.code == code, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    lines = ran.err.splitlines()
    assert len(lines) == 2, ran.err
    assert re.fullmatch(r"labctl: \S.*", lines[0])
    assert re.fullmatch(r"  -> \S.*", lines[1])
    assert len(lines[0]) < 400


def test_labctl_alone_is_its_help(labctl: Labctl) -> None:
    assert labctl() == labctl("--help")


@pytest.mark.parametrize("command", ["cancel", "clean", "init"])
def test_a_yes_may_be_one_letter(labctl: Labctl, command: str) -> None:
    assert "-y, --yes" in labctl(command, "--help").out


def test_render_says_that_it_makes_a_workspace(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path
) -> None:
    for said in (True, False):
        ran = labctl("render", "-p", "dgxh", "--model-id", checkpoint)
        assert (f"new workspace: {workspace.data}" in ran.err) == said
        assert ran.out.startswith("#!/bin/bash")


def test_every_axis_is_shown(labctl: Labctl, records: Records, slurm: Slurm, checkpoint: Path) -> None:
    slurm.accepts()
    submit = ["submit", "-p", "dgxh", "--model-id", checkpoint, "--no-preflight", "--json"]
    shown = []
    for given in ([], ["--ignore-eos"], ["--raw-prompt"]):
        (run,) = labctl(*submit, *given).json["runs"]
        shown.append({line.strip() for line in labctl("show", run["run_id"]).out.splitlines()[1:]})
    assert any(line.startswith("ignore_eos") for line in shown[1] - shown[0])
    assert any(line.startswith("raw_prompt") for line in shown[2] - shown[0])


@pytest.mark.parametrize(
    ("asked", "told", "node"),
    [
        ("gpu,dgxh", "dgxh", ""),  # gpu is none of labctl's
        ("dgx2,dgxh", "dgxh", "gpu*\ndgxh\n"),
        ("dgx2,dgxh", "dgx2", "gpu*\ndgx2\n"),
        ("dgx2", "dgx2", ""),
    ],
)
def test_run_takes_the_partition_of_the_node_where_several_were_asked_for(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, asked: str, told: str, node: str
) -> None:
    slurm.answers("sinfo", node)
    monkeypatch.setenv("SLURM_JOB_PARTITION", asked)
    assert run_here._partition_here() == told


def test_the_log_is_followed_and_slurm_is_asked_ever_less_often(
    labctl: Labctl, records: Records, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that a fake sleep moves: for ten minutes the job runs, and squeue counts how often it is asked."""
    batch = records.submit()
    log = batch.folder / "submitit" / "1000_0_log.out"
    log.parent.mkdir()
    log.write_text("loading\n", encoding="utf-8")
    now, asked = [0.0], []
    squeue = squeue_line("1000", "RUNNING", f"labctl-{batch.array_id}")

    def counted_refresh(*arguments: Any, **options: bool) -> Any:
        asked.extend([now[0]] if options.get("slurm", True) else [])
        slurm.shows(squeue if now[0] < 600 else squeue.replace("RUNNING", "FAILED"))
        return real_refresh(*arguments, **options)

    real_refresh = refresh.refresh
    monkeypatch.setattr(refresh, "refresh", counted_refresh)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s))
    monkeypatch.setattr(logs, "time", clock)
    monkeypatch.setattr(poll, "time", clock)
    slurm.shows(squeue)
    ran = labctl("logs", batch.runs[0].run_id, "-f")
    assert "loading" in ran.out
    assert len(asked) < 60  # of 600 with one a second
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert max(gaps) <= wait.LOOK_AT_LAST_EVERY_S + 1


# ---------------------------------------------------------------- wrong use (more of it: test_wrong_input.py)

SUBMIT = "submit -p dgxh --model-id MODEL"


def arguments_of(line: str | list[str], model: Path) -> list[str]:
    words = line.split() if isinstance(line, str) else line
    return [str(model) if word == "MODEL" else word for word in words]


def write_template(workspace: Workspace, text: str | bytes) -> None:
    workspace.templates.mkdir()
    (workspace.templates / "dgxh.sbatch.j2").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_submission_that_cannot_be_rendered_makes_no_workspace(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path
) -> None:
    slurm.accepts()
    write_template(workspace, "{% if %}")
    one_clear_message(labctl(*arguments_of(SUBMIT, checkpoint)), WRONG_USE)
    assert not workspace.data.exists()


UNKNOWN_HERE = ("status nonsense", "show nonsense", "logs nonsense", "compare nonsense", "show 2", "status ffff 1000")


@pytest.mark.parametrize("line", UNKNOWN_HERE)
def test_a_run_that_is_not_here_is_one_clear_message_and_changes_nothing(
    labctl: Labctl, records: Records, slurm: Slurm, line: str
) -> None:
    slurm.shows()
    records.submit()
    assert labctl("status").code == 0
    before = files_below(records.workspace.root)
    one_clear_message(labctl(*line.split()), WRONG_USE)
    assert files_below(records.workspace.root) == before


def test_the_log_of_a_run_without_a_job_is_one_clear_message(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.shows()
    submission_id = records.request()
    batch = records.prepare()
    records.intend(batch, submission_id)
    records.refuse(batch)
    one_clear_message(labctl("logs", batch.runs[0].run_id), WRONG_USE)


def test_an_error_of_the_system_is_one_clear_message(labctl: Labctl, workspace: Workspace, checkpoint: Path) -> None:
    """A file stands where labctl's folder is to be made."""
    workspace.data.write_text("", encoding="utf-8")
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint)
    assert ran.code == 5
    assert str(workspace.data) in ran.err
    assert len(ran.err.splitlines()) <= 3
    assert "Traceback" not in ran.err


def test_an_error_in_labctl_itself_says_where_its_traceback_is(labctl: Labctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: a command that cannot be made."""
    monkeypatch.setitem(COMMANDS, "status", ("no_such_module", "Show."))
    ran = labctl("status")
    assert (ran.code, ran.out) == (70, "")
    assert "Traceback" not in ran.err
    path = Path(ran.err.split("report it with ")[1].strip())
    assert "Traceback" in path.read_text(encoding="utf-8")


def test_an_interruption_is_one_word(labctl: Labctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: Ctrl-C while a command is looked up."""

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.LazyGroup, "get_command", interrupted)
    ran = labctl("status")
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "labctl: interrupted")


# ---------------------------------------------------------------- submit, and Slurm that is not there


def test_submit_without_slurm_is_refused_and_status_tells_it(
    labctl: Labctl, workspace: Workspace, checkpoint: Path
) -> None:
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--json")
    assert ran.code == SLURM
    assert [line for line in ran.err.splitlines() if line.startswith("labctl: ")] == [
        "labctl: command not found on this machine: sbatch"
    ]
    assert "--partition local" in ran.err
    assert [run["state"] for run in ran.json["runs"]] == ["refused"]
    (run,) = labctl("status", "--json").json
    assert (run["state"], run["slurm_id"]) == ("refused", None)
    assert "not found on this machine" in run["detail"]
    assert "--partition local" in run["remedy"]


def test_what_sbatch_refuses_is_told_in_its_own_words_with_what_to_change(
    labctl: Labctl, slurm: Slurm, checkpoint: Path
) -> None:
    slurm.accepts()
    slurm.answers("sbatch", status=1, errors="sbatch: error: Batch job submission failed: Invalid account\n")
    ran = labctl("submit", "-p", "dgxh", "-p", "dgx2", "--model-id", checkpoint)
    assert ran.code == SLURM
    assert ran.err.count("Batch job submission failed: Invalid account") == 2  # each of two submissions
    assert [run["state"] for run in labctl("status", "--json").json] == ["refused", "refused"]


def test_a_refused_run_may_be_submitted_again(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    line = ("submit", "-p", "dgxh", "--model-id", checkpoint, "--json")
    assert labctl(*line).code == SLURM
    slurm.accepts(77)
    (run,) = labctl(*line).json["runs"]
    assert run["slurm_id"] == "77"


def test_a_submission_is_written_down_collected_and_made_again(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path
) -> None:
    """sbatch, squeue and sacct are programs that only say so; labctl's files are its own."""
    slurm.accepts(500)
    flags = ["--model-id", checkpoint, "--max-new-tokens", 8, "--max-new-tokens", 16, "--name", "mine"]
    ran = labctl("submit", "-p", "dgxh", "-p", "dgx2", *flags, "--json")
    assert ran.code == 0, ran.err
    runs = ran.json["runs"]
    assert [(run["partition"], run["max_new_tokens"], run["slurm_id"]) for run in runs] == [
        ("dgxh", 8, "500"),
        ("dgxh", 16, "500"),
        ("dgx2", 8, "501"),
        ("dgx2", 16, "501"),
    ]
    assert labctl("status", "mine", "--json").json == labctl("status", "500", "501", "--json").json
    before = labctl("status", "--json").json
    assert labctl("collect", "--rebuild", "--json").json == {"records": 0, "damaged": []}
    assert labctl("status", "--json").json == before


def test_the_same_question_asked_again_is_not_run_again_unless_it_is_to_be(
    labctl: Labctl, records: Records, slurm: Slurm, checkpoint: Path
) -> None:
    slurm.accepts(500)
    line = ("submit", "-p", "dgxh", "--model-id", checkpoint, "--json")
    (first,) = labctl(*line).json["runs"]
    worker_is_done(records, first["job_id"])
    ran = labctl(*line)
    assert [(run["state"], run["slurm_id"]) for run in ran.json["runs"]] == [("done", "500")]
    assert "already measured" in ran.err
    assert [run["slurm_id"] for run in labctl(*line, "--again").json["runs"]] == ["501"]


def worker_is_done(records: Records, job_id: str) -> None:
    """Write the records of a job that labctl itself submitted."""
    from labctl_workers.record import JobSpec, read_json

    from .conftest import JobArray

    array_id, _, task = job_id.rpartition(".")
    folder = records.workspace.arrays / array_id
    spec = JobSpec.from_json(read_json(folder / f"{task}.json"))
    batch = JobArray(array_id, folder, spec.executor, [spec])
    attempt = records.attempt(batch)
    for run in spec.runs:
        records.done(batch, attempt, run)


def test_wait_returns_one_where_a_run_failed(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    slurm.accepts(600)
    line = ("submit", "-p", "dgxh", "--model-id", checkpoint, "--json")
    (batch,) = labctl(*line, "--dry-run").json
    name = re.search(r"--job-name=(\S+)", batch["script"])
    assert name is not None
    slurm.answers("sacct", sacct_line("600", "TIMEOUT", name[1]))
    ran = labctl(*line, "--wait")
    assert ran.code == 1, ran.err
    assert [run["state"] for run in ran.json["runs"]] == ["timeout"]


# ---------------------------------------------------------------- nothing is written that need not be


def test_an_sbatch_option_is_written_as_it_was_given(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    ran = labctl(*arguments_of(f"{SUBMIT} --sbatch comment=007 --dry-run --json", checkpoint))
    assert "#SBATCH --comment=007\n" in ran.json[0]["script"]


@pytest.mark.parametrize("more", [[], ["--json"], ["-p", "dgx2", "--dtype", "float16", "--dtype", "float32"]])
@pytest.mark.parametrize("partition", ["dgxh", "local"])
def test_a_dry_run_writes_nothing_at_all(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path, partition: str, more: list[str]
) -> None:
    slurm.accepts()
    before = files_below(workspace.root.parent)
    ran = labctl("submit", "-p", partition, "--model-id", checkpoint, "--dry-run", *more)
    assert ran.code == 0, ran.err
    assert ran.out
    assert files_below(workspace.root.parent) == before
    assert not workspace.data.exists()


def test_an_exclude_rule_that_leaves_nothing_out_is_warned_of(labctl: Labctl, checkpoint: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.toml"
    rules = '[[exclude]]\ndtype = "bfloat61"\n[[exclude]]\ndtype = "float16"\nmax_new_tokens = 4\n'
    axes = 'partition = ["local"]\ndtype = ["float32", "float16"]\nmax_new_tokens = [4, 8]\n'
    sweep.write_text(axes + f'model_id = "{checkpoint}"\n' + rules, encoding="utf-8")
    ran = labctl("submit", sweep, "--dry-run")
    assert ran.code == 0
    assert "warning: [[exclude]] number 1 matches no run: dtype = 'bfloat61'" in ran.err
    assert "number 2" not in ran.err
    assert "3 runs" in ran.out


def test_a_dry_run_tells_its_runs_apart(labctl: Labctl, checkpoint: Path) -> None:
    axes = [
        "--batch-size",
        "1",
        "--batch-size",
        "4",
        "--sampling",
        "greedy",
        "--sampling",
        "temperature=0.5",
        "--sampling",
        "seed=1",
    ]
    out = labctl("submit", "-p", "local", "--model-id", checkpoint, *axes, "--dry-run").out
    told = [line.split(maxsplit=2)[2] for line in out.splitlines() if line.startswith("#   ")]
    assert len(set(told)) == len(told) == 6, out


def test_a_dry_run_shows_the_scripts_that_render_prints(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    line = ["-p", "dgxh", "--model-id", str(checkpoint), "--dtype", "float16", "--dtype", "float32"]
    (batch,) = labctl("submit", *line, "--dry-run", "--json").json
    rendered = labctl("render", *line, "--json").json
    assert rendered["script"] == batch["script"] == labctl("render", *line).out
    assert rendered["runs"] == [run["run_id"] for job in batch["jobs"] for run in job["runs"]]


def test_looking_writes_no_file_but_the_database(labctl: Labctl, records: Records, slurm: Slurm) -> None:
    slurm.is_silent()  # or what it says would be kept
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    before = files_below(records.workspace.root)
    for line in ("status", "compare", f"show {batch.runs[0].run_id}", f"logs {batch.runs[0].run_id}", "collect"):
        assert labctl(*line.split()).code == 0
    after = files_below(records.workspace.root)
    assert set(after) - set(before) == {".labctl/labctl-11.db", ".labctl/metadata.json"}
    assert {name: after[name] for name in before} == before


def test_the_first_submission_says_that_it_makes_a_workspace(
    labctl: Labctl, workspace: Workspace, slurm: Slurm
) -> None:
    slurm.accepts()
    model = write_checkpoint(workspace.root / "model")
    ran = labctl("submit", "-p", "dgxh", "--model-id", model)
    assert f"new workspace: {workspace.data}" in ran.err
    assert "new workspace" not in labctl("submit", "-p", "dgxh", "--model-id", model).err


def test_no_token_reaches_any_file(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sentinel_0123456789")
    slurm.accepts()
    ran = labctl("submit", "-p", "dgxh", "--model-id", checkpoint)
    labctl("render", "-p", "dgx2", "--model-id", checkpoint)
    assert "hf_sentinel" not in ran.out + ran.err
    holders = [name for name, text in files_below(workspace.root.parent).items() if b"hf_sentinel" in text]
    assert holders == []


# ---------------------------------------------------------------- for programs


def test_with_json_standard_output_is_json_and_nothing_else(
    labctl: Labctl, records: Records, slurm: Slurm, checkpoint: Path
) -> None:
    slurm.accepts()
    batch = records.submit("1", name="mine")
    records.done(batch, records.attempt(batch, slurm_id="1"))
    run = batch.runs[0].run_id
    model = ("--model-id", str(checkpoint))
    lines: dict[str, list[str]] = {
        "submit": ["submit", "-p", "dgxh", *model],
        "dry-run": ["submit", "-p", "local", *model, "--dry-run"],
        "status": ["status", "--all"],
        "compare": ["compare", "mine"],
        "show": ["show", run],
        "render": ["render", "-p", "dgx2", *model],
        "collect": ["collect"],
        "rebuild": ["collect", "--rebuild"],
        "config": ["config"],
        "init": ["init", "another"],
    }
    given = {name: labctl(*line, "--json") for name, line in lines.items()}
    assert {name: ran.err for name, ran in given.items() if ran.code} == {}
    for name, ran in given.items():
        value = json.loads(ran.out)
        assert value is not None, name
        assert not re.search(r"\x1b|NaN|Infinity", ran.out)
    assert given["show"].json["records"][0]["run_id"] == run
    assert given["show"].json["status"]["state"] == "done"


def test_every_command_that_answers_has_json() -> None:
    """And so the test above leaves none out."""
    with_json = {name for name, command in commands().items() if "as_json" in {p.name for p in command.params}}
    assert set(COMMANDS) - with_json <= {
        "logs",
        "run",
        "completion",
        "reserve",
    }  # what they print is text by its nature


def test_warnings_are_beside_the_json(labctl: Labctl, records: Records) -> None:
    """Without squeue on PATH."""
    records.submit()
    ran = labctl("status", "--json")
    assert len(ran.json) == 1
    assert (
        "warning: Slurm did not answer; the states are the last known ones (command not found on this machine: squeue)"
        in ran.err
    )


# ---------------------------------------------------------------- help


def commands() -> dict[str, click.Command]:
    context = click.Context(cli.labctl)
    found = {name: cli.labctl.get_command(context, name) for name in COMMANDS}
    return {name: command for name, command in found.items() if command is not None}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_labctl_says_of_a_command_is_what_the_command_says(name: str) -> None:
    callback = commands()[name].callback
    assert callback is not None
    assert inspect.getdoc(callback).splitlines()[0] == COMMANDS[name][1]  # type: ignore[union-attr]


def has_an_example(name: str) -> Callable[[str], bool]:
    return lambda shown: any(re.match(rf"\s+labctl {name}\b", line) for line in shown.splitlines())


@pytest.mark.parametrize(
    "name",
    list(COMMANDS),
)
def test_the_help_of_every_command_has_an_example(labctl: Labctl, name: str) -> None:
    ran = labctl(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert has_an_example(name)(ran.out)
    assert labctl(name, "-h") == ran


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name: str) -> None:
    options = [parameter for parameter in commands()[name].params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_help_lists_every_command_and_the_exit_codes(labctl: Labctl) -> None:
    ran = labctl("--help")
    assert all(
        re.search(rf"^  {name} +{re.escape(text[:20])}", ran.out, re.MULTILINE) for name, (_, text) in COMMANDS.items()
    )
    text = " ".join(ran.out.split())
    assert all(re.search(rf"\b{code} [A-Za-z]", text) for code in range(6))


def test_the_examples_of_the_help_are_commands_that_work(
    labctl: Labctl, slurm: Slurm, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of submit and render: parsed, planned, not sent."""
    for name in ("submit", "render"):
        for line in labctl(name, "--help").out.splitlines():
            match = re.match(rf"\s+labctl {name} ([^>|&#]*?)(?:\s{{2,}}|\s*>|$)", line)
            if match is None or ".toml" in match[1]:
                continue
            more = ["--dry-run"] if name == "submit" else []
            ran = labctl(name, *match[1].split(), "--model-id", checkpoint, *more)
            assert ran.code == 0, (line, ran.err)


def test_the_version_is_the_packages(labctl: Labctl) -> None:
    from importlib.metadata import version

    assert labctl("--version").out == f"labctl, version {version('labctl-slurm')}\n"


# ---------------------------------------------------------------- as a process


@pytest.mark.parametrize(
    "command", ["status", "show", "compare", "logs", "cancel", "retry", "clean", "matrix", "report"]
)
def test_an_argument_that_is_no_utf_8_is_one_clear_message(labctl: Labctl, records: Records, command: str) -> None:
    records.submit()
    ran = labctl(command, "\udcff")
    assert ran.code == WRONG_USE
    assert ran.err.splitlines()[-2:] == [
        "labctl: not valid UTF-8: '\\udcff'",
        "  -> use a UTF-8 locale, such as LC_ALL=C.UTF-8",
    ]


def test_a_closed_standard_output_is_no_traceback(labctl: Labctl, records: Records) -> None:
    records.submit()
    done = subprocess.run(
        f'"{sys.executable}" -c "{PROGRAM}" status >&-',
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "defect in labctl" not in done.stderr


def started(arguments: list[str], **streams: Any) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], text=True, timeout=60, check=False, **streams)


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["status", "--all"], ["export"]])
def test_a_reader_that_has_enough_ends_labctl_without_a_word(records: Records, arguments: list[str]) -> None:
    """`labctl --help | head -1`: here the pipe is closed before labctl begins, so that it surely meets it."""
    batch = records.submit(lengths=range(1, 200))
    records.states(batch, state="TIMEOUT", ended_at="2026-01-01T00:00:00Z")
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = started(arguments, stdout=writing)
    finally:
        os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in {0, 141}  # as any program says it, or its own where it had told all


def test_what_a_command_found_out_is_not_lost_with_its_reader(records: Records) -> None:
    """All of the answer fits into what Python keeps back until the end."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        codes = [started(["doctor", "-p", "dgxh", "--json"], stdout=stdout).returncode for stdout in (writing, None)]
    finally:
        os.close(writing)
    assert codes[0] in {codes[1], 141}
    assert codes[0] != 0


def test_notes_without_a_reader_stop_no_answer(records: Records) -> None:
    batch = records.submit()
    records.done(batch, records.attempt(batch))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = started(["status"], stderr=writing)
    finally:
        os.close(writing)
    assert (done.returncode, batch.runs[0].run_id in done.stdout) == (0, True)


def test_a_shell_pipe_to_head_is_silent(workspace: Workspace) -> None:
    line = f'"{sys.executable}" -c "{PROGRAM}" submit --help | head -n 1'
    environment = {**os.environ, "PATH": os.defpath}
    done = subprocess.run(
        ["/bin/sh", "-c", line], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.split()[:3], done.stderr, done.returncode) == (["Usage:", "labctl", "submit"], "", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_standard_output_is_one_clear_message(workspace: Workspace) -> None:
    with Path("/dev/full").open("w") as full:
        done = started(["--help"], stdout=full)
    assert done.returncode == 5
    assert done.stderr.startswith("labctl: ")
    assert "Traceback" not in done.stderr


def test_no_command_loads_what_only_engines_and_submission_need(workspace: Workspace) -> None:
    """`--help` of a command imports its whole module. sqlite-utils loads numpy where there is one; labctl --help must not."""
    code = (
        "import sys\n"
        "from labctl_orchestrator.cli import COMMANDS, run\n"
        "heavy = {'torch', 'transformers', 'vllm', 'submitit', 'pandas', 'matplotlib'}\n"
        "run(['--help'])\n"
        "found = (heavy | {'numpy', 'rich', 'sqlite_utils', 'jinja2', 'huggingface_hub'}) & set(sys.modules)\n"
        "for name in COMMANDS: run([name, '--help'])\n"
        "print(sorted(found | (heavy & set(sys.modules))), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"


def test_a_process_may_run_several_command_lines(workspace: Workspace) -> None:
    code = "from labctl_orchestrator import cli; print([cli.run([name, '--help']) for name in (*cli.COMMANDS, 'status')][-1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.splitlines()[-1:], done.stderr) == (["0"], "")


def test_a_worker_loads_nothing_of_the_login_node(workspace: Workspace) -> None:
    code = (
        "import sys, labctl_workers.job\n"
        "own = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(own & {'click', 'rich', 'jinja2', 'msgspec', 'sqlite_utils', 'labctl_orchestrator', 'labctl_slurm',\n"
        "                    'labctl_templates', 'torch', 'transformers', 'submitit', 'huggingface_hub'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_what_is_made_may_be_shared(labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path) -> None:
    """A workspace of a group: files have the mode that the umask gives, not the 0600 of temporary files."""
    slurm.accepts()
    labctl("submit", "-p", "dgxh", "--model-id", checkpoint)
    umask = os.umask(0)
    os.umask(umask)
    own = [path for path in workspace.data.rglob("*.json") if "code" not in path.parts]
    assert len(own) >= 4
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in own} == {oct(0o666 & ~umask)}


@pytest.mark.parametrize("command", [("status",), ("init",), ("submit", "-p", "local"), ("import", "x.zip")])
def test_a_deleted_working_folder_is_named(labctl: Labctl, tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        ran = labctl(*command)
    finally:
        os.chdir(tmp_path)
    assert ran.code == 2
    assert "labctl: the current folder was deleted\n  -> cd to a folder that exists\n" in ran.err
