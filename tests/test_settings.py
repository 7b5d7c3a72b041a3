"""Settings and where they come from: flags, the workspace's file, the user's file, what is shipped; and the workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.request import settings
from labctl_orchestrator.request.request import build
from labctl_orchestrator.request.settings import Settings
from labctl_orchestrator.store import workspace
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.errors import LabctlError, WrongUseError

from .conftest import Labctl, refused


def users_file(here: Workspace) -> Path:
    return here.root.parent / "config" / "labctl" / "labctl.toml"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def loaded(here: Workspace, text: str) -> Settings:
    write(here.settings_file, text)
    return settings.load(here)


# ---------------------------------------------------------------- which value wins


def test_without_any_file_there_are_the_shipped_partitions(workspace: Workspace) -> None:
    known = settings.load(workspace)
    assert known.names() == ["dgx2", "dgxh", "local"]
    assert (known.partition("dgx2").dtype, known.partition("dgxh").dtype) == ("float16", "bfloat16")
    assert known.partition("local").executor == "local"


def test_a_key_of_the_workspaces_file_wins_and_the_others_stay(workspace: Workspace) -> None:
    known = loaded(workspace, '[partitions.dgxh]\naccount = "mine"\n')
    assert (known.partition("dgxh").account, known.partition("dgxh").gpus) == ("mine", 2)
    assert known.partition("dgx2").account == "eecs"


def test_the_users_file_beats_what_is_shipped_and_the_workspaces_file_beats_both(workspace: Workspace) -> None:
    write(users_file(workspace), '[partitions.dgxh]\naccount = "users"\nmem = "1G"\n')
    known = loaded(workspace, '[partitions.dgxh]\naccount = "workspaces"\n')
    partition = known.partition("dgxh")
    assert (partition.account, partition.mem, partition.time) == ("workspaces", "1G", "0-01:00:00")


def test_variables_and_sbatch_options_are_merged_key_by_key(workspace: Workspace) -> None:
    write(users_file(workspace), '[partitions.dgxh]\nenv = {A = "user", B = "user"}\nsbatch = {qos = "low"}\n')
    known = loaded(workspace, '[partitions.dgxh]\nenv = {B = "workspace"}\nsbatch = {exclusive = true}\n')
    partition = known.partition("dgxh")
    assert partition.env == {"A": "user", "B": "workspace"}
    assert partition.sbatch == {"qos": "low", "exclusive": True}


def test_a_partition_of_ones_own_needs_only_what_differs(workspace: Workspace) -> None:
    partition = loaded(workspace, "[partitions.a100]\ncapability = 8.0\n").partition("a100")
    assert (partition.slurm_partition, partition.capability, partition.gpus) == ("a100", "8.0", 2)


def test_a_flag_beats_the_file(labctl: Labctl, workspace: Workspace, checkpoint: Path) -> None:
    write(workspace.settings_file, '[partitions.dgxh]\ngpus = 4\ndtype = "float32"\n')

    def planned(*flags: object) -> tuple[int, str]:
        (batch,) = labctl("submit", "-p", "dgxh", "--model-id", checkpoint, "--dry-run", "--json", *flags).json
        (job,) = batch["jobs"]
        return job["gpus"], job["dtype"]

    assert planned() == (4, "float32")
    assert planned("--gpus", 1, "--dtype", "float16") == (1, "float16")


def one_dtype(labctl: Labctl, model: Path, *flags: object) -> str:
    """The dtype that a submit here would ask for."""
    (batch,) = labctl("submit", "-p", "dgxh", "--model-id", model, "--dry-run", "--json", *flags).json
    (job,) = batch["jobs"]
    dtype: str = job["dtype"]
    return dtype


def test_flag_variable_workspace_and_user_win_in_this_order(
    labctl: Labctl, workspace: Workspace, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one_dtype(labctl, checkpoint) == "bfloat16"
    write(users_file(workspace), '[defaults]\ndtype = "float16"\n')
    assert one_dtype(labctl, checkpoint) == "float16"
    write(workspace.settings_file, '[defaults]\ndtype = "float32"\n')
    assert one_dtype(labctl, checkpoint) == "float32"
    monkeypatch.setenv("LABCTL_DTYPE", "float16")
    assert one_dtype(labctl, checkpoint) == "float16"
    assert one_dtype(labctl, checkpoint, "--dtype", "bfloat16") == "bfloat16"


@pytest.mark.parametrize("named", [True, False])
def test_the_sites_file_is_below_the_users_and_config_names_it(
    labctl: Labctl, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: bool
) -> None:
    """Named by LABCTL_SITE, or at the usual place, which a test may not write and moves."""
    site = tmp_path / "site.toml"
    write(site, '[partitions.dgxh]\naccount = "lab"\n[defaults]\nrepeats = 7\n')
    monkeypatch.setenv("LABCTL_SITE", str(site)) if named else monkeypatch.setattr(settings, "SITE_FILE", site)
    explained = {row["key"]: row for row in labctl("config", "--json").json}
    assert explained["repeats"] == {"key": "repeats", "value": 7, "source": f"{site} [defaults]"}
    account = {row["key"]: row for row in labctl("config", "-p", "dgxh", "--json").json}["account"]
    assert (account["value"], account["source"]) == ("lab", str(site))
    write(users_file(workspace), '[partitions.dgxh]\naccount = "mine"\n')
    assert settings.load(workspace).partition("dgxh").account == "mine"


def test_config_prints_what_happens_without_a_value(labctl: Labctl) -> None:
    rows = {line.split()[0]: line for line in labctl("config").out.splitlines()}
    assert "the partition's, usually 2" in rows["gpus"]
    assert rows["batch_size"].split()[1:] == ["1;", "with", "--request-rate:", "unlimited", "default"]
    assert rows["jobs_at_once"].split()[1:] == ["no", "limit", "default"]
    assert not any(word in row.split() for row in rows.values() for word in ("[]", "null", "{}"))


def test_a_missing_file_of_the_site_is_an_error(
    labctl: Labctl, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LABCTL_SITE", str(tmp_path / "gone.toml"))
    ran = labctl("config")
    assert (ran.code, ran.out) == (2, "")
    assert f"LABCTL_SITE names no file: {tmp_path / 'gone.toml'}" in ran.err


def test_the_variables_name_may_be_wrong_and_is_then_named_with_the_nearest(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABCTL_DTYP", "float16")
    error = refused(lambda: settings.load(workspace), WrongUseError)
    assert "LABCTL_DTYP" in error.message
    assert "'LABCTL_DTYPE'" in error.remedy


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("LABCTL_LOADS", "3", 3),
        ("LABCTL_REQUEST_RATE", "2.5", (2.5,)),
        ("LABCTL_SERVE", "true", (True,)),
        ("LABCTL_GPUS", "2", (2,)),
        ("LABCTL_IGNORE_EOS", "true", True),
        ("LABCTL_DTYPE", "float16", ("float16",)),
    ],
)
def test_a_variable_is_read_as_its_keys_type(
    monkeypatch: pytest.MonkeyPatch, variable: str, text: str, value: object
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(build(settings.load(None).defaults), variable.removeprefix("LABCTL_").lower()) == value


@pytest.mark.parametrize(("variable", "value"), [("LABCTL_REVISION", "20260101"), ("LABCTL_MODEL_ID", "1234")])
def test_a_variable_for_a_text_may_be_digits(
    labctl: Labctl, workspace: Workspace, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    checkpoint.rename(workspace.root / "1234")
    monkeypatch.setenv("LABCTL_MODEL_ID", "./1234")
    monkeypatch.setenv(variable, value)
    assert labctl("submit", "-p", "dgxh", "--dry-run", "--json").err == ""


# ---------------------------------------------------------------- files that cannot be right


def told(error: LabctlError, where: str, named: str, remedy: str) -> None:
    """It tells the place, the word that is wrong, and what to write instead."""
    assert where in error.message
    assert named in error.message
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("text", "named", "remedy"),
    [
        ("[partition.dgxh]\n", "[partition]", "'partitions'"),
        ("nonsense = 1\n", "[nonsense]", "known: defaults, partitions"),
        ('[partitions.dgxh]\nacount = "x"\n', "'acount'", "'account'"),
        ("[partitions.dgxh]\ncpus = 4\n", "'cpus'", "'gpus'"),
        ("[partitions.dgxh]\nqqqqq = 4\n", "'qqqqq'", "known: account, "),
        ("partitions = 3\n", "partitions", "[partitions"),
        ("defaults = 3\n", "defaults", "[defaults]"),
        ("[defaults]\ndtyp = 3\n", "'dtyp'", "'dtype'"),
        ("[partitions]\ndgxh = 3\n", "[partitions.dgxh]", "[partitions.dgxh]"),
        ("[partitions.dgxh\n", "line 1", "correct the line"),
        ("[partitions.dgxh]\ngpus = 1\ngpus = 2\n", "line 3", "correct the line"),
    ],
)
def test_what_a_settings_file_has_wrong_is_named_with_the_file_and_the_nearest_word(
    workspace: Workspace, text: str, named: str, remedy: str
) -> None:
    told(refused(lambda: loaded(workspace, text), WrongUseError), f"{workspace.settings_file}", named, remedy)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gpus = 0", "gpus"),
        ('gpus = "two"', "gpus"),
        ("cpus_per_task = -1", "cpus_per_task"),
        ('executor = "pbs"', "executor"),
        ('device = "tpu"', "device"),
        ('dtype = "float8"', "dtype"),
        ('time = "soon"', "time"),
        ('time = "0"', "time"),
        ('mem = "lots"', "mem"),
        ("gpu_memory_gib = 0", "gpu_memory_gib"),
        ('capability = "nine"', "capability"),
        ('account = "two\\nlines"', "account"),
        ("setup = 'module load'", "setup"),
        ("env = {A = 1}", "env"),
        ('env = {"A B" = "1"}', "env"),
        ('env = {HF_TOKEN = "hf_x"}', "env"),
        ('sbatch = {gres = "gpu:1"}', "sbatch"),
        ('sbatch = {"--qos" = "low"}', "sbatch"),
        ("sbatch = {qos = false}", "sbatch"),
        ('sbatch = {comment = "a\\nb"}', "sbatch"),
    ],
)
def test_a_value_that_cannot_be_right_is_named_with_its_file_and_key(
    workspace: Workspace, text: str, named: str
) -> None:
    known = loaded(workspace, f"[partitions.dgxh]\n{text}\n")
    error = refused(lambda: known.partition("dgxh"), WrongUseError)
    assert f"{workspace.settings_file}: [partitions.dgxh] {named}" in error.message


def test_a_time_that_is_none_is_named_for_a_local_partition_too(workspace: Workspace) -> None:
    known = loaded(workspace, '[partitions.local]\ntime = "soon"\n')
    refused(lambda: known.partition("local"), WrongUseError)


def test_a_wrong_value_in_a_partition_that_is_not_used_does_no_harm(workspace: Workspace) -> None:
    assert loaded(workspace, "[partitions.dgx2]\ngpus = 0\n").partition("dgxh").gpus == 2


def test_a_wrong_value_is_blamed_on_the_file_that_it_is_in(workspace: Workspace) -> None:
    write(users_file(workspace), '[partitions.dgxh]\nmem = "lots"\n')
    known = loaded(workspace, '[partitions.dgxh]\naccount = "mine"\n')
    assert str(users_file(workspace)) in refused(lambda: known.partition("dgxh"), WrongUseError).message


def test_a_token_in_a_settings_file_is_not_repeated_in_the_message(workspace: Workspace) -> None:
    known = loaded(workspace, '[partitions.dgxh]\nenv = {HF_TOKEN = "hf_secret"}\n')
    error = refused(lambda: known.partition("dgxh"), WrongUseError)
    assert "hf_secret" not in error.message + error.remedy


def test_an_unknown_partition_is_named_with_the_nearest(workspace: Workspace) -> None:
    error = refused(lambda: settings.load(workspace).partition("dgxx"), WrongUseError)
    assert "'dgxx'" in error.message
    assert "did you mean 'dgx" in error.remedy


def test_a_settings_file_that_is_not_utf_8_is_named(workspace: Workspace) -> None:
    workspace.settings_file.write_bytes(b'[partitions.dgxh]\naccount = "\xff"\n')
    error = refused(lambda: settings.load(workspace), WrongUseError)
    assert str(workspace.settings_file) in error.message
    assert "UTF-8" in error.remedy


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read from its start"
)
def test_a_settings_file_that_cannot_be_read_is_named(workspace: Workspace) -> None:
    workspace.settings_file.symlink_to("/proc/self/mem")
    assert str(workspace.settings_file) in refused(lambda: settings.load(workspace), WrongUseError).message


def test_an_empty_settings_file_changes_nothing(workspace: Workspace) -> None:
    assert loaded(workspace, "").partition("dgxh") == settings.load(None).partition("dgxh")


# ---------------------------------------------------------------- where the workspace is


@pytest.mark.parametrize("mark", ["labctl.toml", ".labctl"])
def test_a_workspace_is_found_from_a_folder_below(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    if mark == ".labctl":
        workspace.create()
    else:
        write(workspace.settings_file, "")
    below = workspace.root / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find() == workspace


def test_the_nearest_workspace_is_the_one(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.create()
    inner = Workspace(workspace.root / "inner")
    write(inner.settings_file, "")
    monkeypatch.chdir(inner.root)
    assert find() == inner


def test_labctl_home_beats_the_folder_one_is_in(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace.create()
    other = workspace.root.parent / "other"
    monkeypatch.setenv("LABCTL_HOME", str(other))
    assert find() == Workspace(other)
    monkeypatch.setenv("LABCTL_HOME", "~/lab")
    assert find() == Workspace(workspace.root.parent / "home" / "lab")
    monkeypatch.setenv("LABCTL_HOME", "")
    assert find() == workspace


def test_a_folder_that_nobody_submitted_from_is_no_workspace(workspace: Workspace) -> None:
    assert find() is None
    write(workspace.settings_file, "")
    error = refused(existing, WrongUseError)
    assert str(workspace.root) in error.message
    assert "LABCTL_HOME" in error.remedy
    assert "labctl init" in error.remedy


def test_what_labctl_keeps_stays_out_of_git(workspace: Workspace) -> None:
    workspace.create()
    assert (workspace.data / ".gitignore").read_text(encoding="utf-8") == "*\n"


def find() -> Workspace | None:
    return workspace.find()


def existing() -> Any:
    return workspace.existing()


def test_a_mark_at_the_files_beginning_is_passed_over(workspace: Workspace) -> None:
    """Notepad and others write one."""
    workspace.settings_file.write_bytes(b"\xef\xbb\xbf[partitions.dgxh]\ngpus = 4\n")
    assert settings.load(workspace).partition("dgxh").gpus == 4


def test_a_folder_in_the_place_of_the_settings_is_told(workspace: Workspace) -> None:
    workspace.settings_file.mkdir()
    assert "not a regular file" in refused(lambda: settings.load(workspace), WrongUseError).message


@pytest.mark.parametrize(
    ("line", "named", "remedy"),
    [
        ("executor = 'ssh'", "executor: invalid value 'ssh'", "known: local, slurm"),
        ("price_per_gpu_hour = 2.5", "expected a text in quotes, got a number", 'price_per_gpu_hour = "2.50 EUR"'),
        ("gpus = 'two'", "gpus: expected a whole number, got a text in quotes", "write gpus = 2"),
    ],
)
def test_a_value_of_a_wrong_kind_is_told_in_words_with_an_example(
    workspace: Workspace, line: str, named: str, remedy: str
) -> None:
    error = refused(lambda: loaded(workspace, f"[partitions.dgxh]\n{line}\n").partition("dgxh"), WrongUseError)
    told(error, f"{workspace.settings_file}: [partitions.dgxh]", named, remedy)
