"""What a partition is: the two that are shipped are as documented, and a wrong value is one message that says where."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labctl_slurm.errors import EXIT_WRONG_USE, WrongUseError, nearest
from labctl_slurm.partitions import (
    FORM_OF_OPTION,
    KEYS,
    MANAGED_OPTIONS,
    Partition,
    build,
    check_table,
    seconds,
    shipped,
)
from labctl_workers.record import DTYPES

FILE = "/lab/labctl.toml"
a_few = settings(max_examples=60, deadline=None)


def partition(name: str = "dgxh", **values: Any) -> Partition:
    """A shipped partition with some keys of a settings file over it."""
    return build(name, [("shipped", shipped()[name]), (FILE, values)])


def wrong(name: str = "dgxh", **values: Any) -> WrongUseError:
    """The one error of a settings file with these keys; it says where and which, and what to do."""
    with pytest.raises(WrongUseError) as caught:
        partition(name, **values)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == EXIT_WRONG_USE
    return caught.value


# ---------------------------------------------------------------- what is shipped


@pytest.mark.parametrize(
    ("name", "gpu", "memory", "capability", "dtype"),
    [("dgx2", "V100", 32, "7.0", "float16"), ("dgxh", "H100", 80, "9.0", "bfloat16")],
)
def test_the_shipped_partitions_are_as_documented(
    name: str, gpu: str, memory: int, capability: str, dtype: str
) -> None:
    made = build(name, [("shipped", shipped()[name])])
    assert (made.gpu, made.gpu_memory_gib, made.capability, made.dtype) == (gpu, memory, capability, dtype)
    assert (made.slurm_partition, made.account, made.executor, made.device) == (name, "eecs", "slurm", "cuda")
    assert (made.time, made.mem, made.cpus_per_task, made.gpus) == ("0-01:00:00", "64G", 8, 2)
    assert made.time_limit_s == 3600
    assert made.resources(made.gpus).gpu_words == "--gres=gpu:2"
    assert made.python == sys.executable


def test_local_is_a_partition_without_slurm_on_whatever_this_machine_has() -> None:
    local = build("local", [("shipped", shipped()["local"])])
    assert (local.executor, local.device, local.dtype) == ("local", "auto", "auto")
    assert local.capability is None


def test_the_shipped_tables_hold_only_known_keys() -> None:
    for name, table in shipped().items():
        assert check_table(name, table, Path("partitions.toml")) == table


def test_building_a_partition_leaves_the_shipped_tables_as_they_were() -> None:
    before = {name: dict(table) for name, table in shipped().items()}
    partition(account="other", env={"A": "b"}, sbatch={"qos": "high"}, setup=["module load cuda"])
    assert shipped() == before


# ---------------------------------------------------------------- tables over one another


def test_a_later_table_wins_key_by_key() -> None:
    made = build("dgxh", [("a", {"account": "one", "mem": "32G"}), ("b", {"account": "two"})])
    assert (made.account, made.mem) == ("two", "32G")


def test_variables_and_options_of_several_files_are_merged() -> None:
    made = build(
        "dgxh",
        [
            ("a", {"env": {"A": "1", "B": "1"}, "sbatch": {"qos": "low", "exclusive": True}}),
            ("b", {"env": {"B": "2"}, "sbatch": {"qos": "high"}}),
        ],
    )
    assert made.env == {"A": "1", "B": "2"}
    assert made.sbatch == {"qos": "high", "exclusive": True}


def test_a_partition_of_ones_own_is_called_in_slurm_as_it_is_here() -> None:
    made = build("a40", [(FILE, {"gpu": "A40"})])
    assert (made.slurm_partition, made.account, made.time_limit_s) == ("a40", "", 3600)


def test_several_slurm_partitions_may_be_named_with_commas() -> None:
    assert partition(slurm_partition="gpu,dgxh").slurm_partition == "gpu,dgxh"


@pytest.mark.parametrize(
    ("written", "text"), [("9.0", "9.0"), (9.0, "9.0"), (9, "9.0"), (7.5, "7.5"), ("12.1", "12.1")]
)
def test_a_capability_may_be_written_as_a_number(written: Any, text: str) -> None:
    assert partition(capability=written).capability == text


# ---------------------------------------------------------------- wrong keys


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("acount", "account"),
        ("memory", "mem"),
        ("cpus", "gpus"),
        ("gpu_memory", "gpu_memory_gib"),
        ("partition", "slurm_partition"),
        ("envs", "env"),
        ("Time", "time"),
    ],
)
def test_an_unknown_key_is_told_with_its_file_and_the_nearest_known_one(key: str, meant: str) -> None:
    with pytest.raises(WrongUseError) as caught:
        check_table("dgxh", {"account": "eecs", key: "x"}, Path(FILE))
    assert caught.value.message == f"{FILE}: [partitions.dgxh] has no key {key!r}"
    assert caught.value.remedy == f"did you mean {meant!r}?"


def test_a_key_like_no_other_is_told_all_that_there_are() -> None:
    with pytest.raises(WrongUseError) as caught:
        check_table("dgxh", {"zzzzzzzzzz": 1}, Path(FILE))
    for key in KEYS:
        assert key in caught.value.remedy


def test_the_name_is_no_key() -> None:
    with pytest.raises(WrongUseError):
        check_table("dgxh", {"name": "other"}, Path(FILE))


@pytest.mark.parametrize("table", ["dgxh", 3, ["a"], None])
def test_a_partition_that_is_no_table_is_told(table: object) -> None:
    with pytest.raises(WrongUseError) as caught:
        check_table("dgxh", table, Path(FILE))
    assert caught.value.message == f"{FILE}: [partitions.dgxh] must be a table"
    assert "[partitions.dgxh]" in caught.value.remedy


def test_the_nearest_word_is_told_or_else_all_of_them() -> None:
    assert nearest("dgxhh", ["dgx2", "dgxh"]) == "did you mean 'dgxh'?"
    assert nearest("qqqq", ["b", "a"]) == "known: a, b"


# ---------------------------------------------------------------- wrong values

WRONG_VALUES: list[tuple[str, Any]] = [
    ("executor", "condor"),
    ("slurm_partition", 3),
    ("slurm_partition", "dgxh\n#SBATCH --account=other"),
    ("account", ["eecs"]),
    ("account", "eecs\nother"),
    ("time", 60),
    ("time", "an hour"),
    ("time", "0-00:00:00"),
    ("time", "1:2:3:4"),
    ("time", "60\n"),
    ("time", ""),
    ("mem", 64),
    ("mem", "64 G"),
    ("mem", "64GB"),
    ("mem", "lots"),
    ("mem", "-1G"),
    ("mem", ""),
    ("mem", "0 per-gpu"),
    ("mem", "8G per-node"),
    ("mem", "8G  per-cpu"),
    ("mem", "None"),
    ("mem", "64G\n"),
    ("cpus_per_task", 0),
    ("cpus_per_task", "8"),
    ("cpus_per_task", 2.5),
    ("cpus_per_task", "0 per-gpu"),
    ("cpus_per_task", "8 per-cpu"),
    ("cpus_per_task", ""),
    ("tasks", 1),
    ("tasks", "two"),
    ("export", "all"),
    ("export", "HF_HOME"),
    ("arrays", "no"),
    ("gpu_request", "gpu"),
    ("gpu_request", ""),
    ("gpus", 0),
    ("gpus", -2),
    ("gpu_type", "v100\n"),
    ("gpu_memory_gib", 0),
    ("gpu_memory_gib", "80GB"),
    ("capability", "nine"),
    ("capability", "9"),
    ("capability", "90"),
    ("capability", [9, 0]),
    ("dtype", "bf16"),
    ("dtype", "int8"),
    ("device", "tpu"),
    ("python", "/env/bin/python\n"),
    ("python", 3),
    ("setup", "module load cuda"),
    ("setup", [1]),
    ("env", ["A=1"]),
    ("env", {"A": 1}),
    ("env", {"A": True}),
    ("env", {"A-B": "1"}),
    ("env", {"1A": "1"}),
    ("env", {"A B": "1"}),
    ("env", {"": "1"}),
    ("env", {"A;touch /tmp/x;B": "1"}),
    ("template", 5),
    ("template", "mine\n"),
    ("sbatch", "--qos=high"),
    ("sbatch", {"qos": 1.5}),
    ("sbatch", {"qos": ["high"]}),
    ("sbatch", {"qos": "high\n#SBATCH --account=other"}),
    ("sbatch", {"exclusive": False}),
    ("sbatch", {"--qos": "high"}),
    ("sbatch", {"mail_user": "me"}),
    ("sbatch", {"qos high": "x"}),
    ("sbatch", {"": "x"}),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES, ids=[f"{key}={value!r}" for key, value in WRONG_VALUES])
def test_a_wrong_value_is_one_error_that_names_its_file_its_partition_and_its_key(key: str, value: Any) -> None:
    error = wrong(**{key: value})
    assert error.message.startswith(f"{FILE}: [partitions.dgxh] {key}: "), error.message


@pytest.mark.parametrize(("key", "value"), [("account", 3), ("dtype", "bf16"), ("mem", "x"), ("sbatch", {"mem": "1G"})])
def test_the_file_that_is_named_is_the_one_that_has_the_value(key: str, value: Any) -> None:
    with pytest.raises(WrongUseError, match=r"^/home/me/labctl\.toml: "):
        build("dgxh", [("shipped", shipped()["dgxh"]), ("/home/me/labctl.toml", {key: value}), (FILE, {"gpus": 1})])


@pytest.mark.parametrize(("key", "value"), [("env", {"A-B": "1"}), ("env", {"A": 1}), ("sbatch", {"mem": "1G"})])
def test_the_file_that_is_named_for_a_merged_table_is_the_one_that_has_the_entry(key: str, value: Any) -> None:
    with pytest.raises(WrongUseError, match=r"^/home/me/labctl\.toml: "):
        build("dgxh", [("/home/me/labctl.toml", {key: value}), (FILE, {key: {"good": "1"}})])


def test_a_dtype_is_told_the_nearest_one() -> None:
    assert wrong(dtype="bfloat61").remedy == "did you mean 'bfloat16'?"
    for dtype in ("auto", *DTYPES):
        assert partition(dtype=dtype).dtype == dtype


@pytest.mark.parametrize("value", [False, 0, []])
def test_a_python_that_is_no_text_is_refused(value: Any) -> None:
    wrong(python=value)


def test_a_capability_of_true_is_refused() -> None:
    wrong(capability=True)


@pytest.mark.parametrize(("key", "value"), [("mem", "٦٤G"), ("time", "٦٠"), ("capability", "٩.٣")])
def test_digits_of_other_scripts_are_refused(key: str, value: str) -> None:
    wrong(**{key: value})


@pytest.mark.parametrize("time", [" 60", "60 ", "\t1:00:00"])
def test_a_time_with_blanks_around_it_is_refused(time: str) -> None:
    wrong(time=time)


def test_a_wrong_time_of_a_local_partition_is_told_too() -> None:
    with pytest.raises(WrongUseError, match=r"^/lab/labctl\.toml: \[partitions\.local\] time: "):
        assert partition("local", time="an hour").time_limit_s


def test_an_empty_slurm_partition_is_refused_or_the_partitions_own_name() -> None:
    try:
        made = partition(slurm_partition="")
    except WrongUseError:
        return
    assert made.slurm_partition == "dgxh"


@pytest.mark.parametrize("line_break", ["\n", "a\nb", "\n\n"])
@pytest.mark.parametrize("key", ["slurm_partition", "account", "gpu_type", "python", "template", "time", "mem"])
def test_a_line_break_is_refused_wherever_it_would_end_a_line_of_the_script(key: str, line_break: str) -> None:
    error = wrong(**{key: f"x{line_break}"})
    assert error.message.startswith(f"{FILE}: [partitions.dgxh] {key}: ")
    assert "line" in error.message


def test_a_partition_whose_name_has_a_line_break_is_refused() -> None:
    with pytest.raises(WrongUseError, match="line break"):
        build("dgx\nh", [(FILE, {"gpu": "H100"})])


def test_a_variables_value_may_have_several_lines() -> None:
    assert partition(env={"A": "one\ntwo"}).env == {"A": "one\ntwo"}


# ---------------------------------------------------------------- secrets and options that labctl writes itself


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")


@pytest.mark.parametrize("variable", SECRETS)
def test_a_secret_is_refused_with_how_to_give_it(variable: str) -> None:
    error = wrong(env={variable: "hf_abc"})
    assert variable in error.message
    assert "hf_abc" not in error.message + error.remedy
    assert f"export {variable}" in error.remedy


@pytest.mark.parametrize("value", ["hf_" + "a" * 20, "sk-" + "a" * 24])
def test_a_value_that_is_a_token_is_refused_under_any_name(value: str) -> None:
    for table in ({"env": {"ABC": value}}, {"setup": [f"login {value}"]}):
        error = wrong(**table)
        assert value not in error.message + error.remedy


@pytest.mark.parametrize("variable", SECRETS)
@pytest.mark.parametrize("line", ["export {}=s3cr", "{}='s3cr'", "module load cuda; export {}=s3cr && true"])
def test_a_secret_in_a_line_of_setup_is_refused(variable: str, line: str) -> None:
    error = wrong(setup=["true", line.format(variable)])
    assert variable in error.message
    assert "s3cr" not in error.message + error.remedy


@pytest.mark.parametrize("line", ["export HF_TOKEN=$(cat ~/.token)", "export HF_TOKEN=$TOKEN", 'export A_KEY="$K"',
                                  "export HF_TOKEN_PATH=~/t", "sort --key=2 x", "TOKENIZERS_PARALLELISM=0"])  # fmt: skip
def test_a_line_of_setup_that_holds_no_secret_is_taken(line: str) -> None:
    assert partition(setup=[line]).setup == [line]


@pytest.mark.parametrize(
    "variable", ["HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "TOKENIZERS_PARALLELISM", "MAX_TOKENS"]
)
def test_a_variable_that_says_where_a_secret_lies_is_taken(variable: str) -> None:
    assert partition(env={variable: "/x"}).env == {variable: "/x"}


# ---------------------------------------------------------------- ~ and variables


def test_a_python_is_expanded_as_a_shell_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("VENV", "/opt/venv")
    assert partition(python="~/env/bin/python").python == "/home/ada/env/bin/python"
    assert partition(python="$VENV/bin/python").python == "/opt/venv/bin/python"
    assert partition(python="${VENV}/bin/python").python == "/opt/venv/bin/python"


@pytest.mark.parametrize("python", ["$NO_SUCH_VARIABLE/bin/python", "~no-such-user/bin/python", "$(which python)"])
def test_a_python_that_cannot_be_expanded_is_refused_where_it_is_written(python: str) -> None:
    error = wrong(python=python)
    assert error.message.startswith(f"{FILE}: [partitions.dgxh] python: ")
    assert "write the full path" in error.remedy


def test_a_home_in_a_variable_is_expanded_as_in_an_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    env = {"TMPDIR": "~/tmp", "PATH": "/bin:~/bin", "B": "a~b", "C": "http://x/~ada", "D": "5$"}
    made = partition(env=env).env
    assert made == env | {"TMPDIR": "/home/ada/tmp", "PATH": "/bin:/home/ada/bin"}


@pytest.mark.parametrize("value", ["/opt/bin:$PATH", "${SCRATCH}/x", "$(hostname)"])
def test_a_variable_in_env_is_refused_with_the_line_of_setup_that_does_it(value: str) -> None:
    error = wrong(env={"PATH": value})
    assert error.message.startswith(f"{FILE}: [partitions.dgxh] env: only the node can expand")
    assert f'export PATH="{value}"' in error.remedy


@pytest.mark.parametrize(
    "table", [{"sbatch": {"mail-user": "$USER"}}, {"sbatch": {"licenses": "~/x"}}, {"account": "$ACCOUNT"}]
)
def test_what_sbatch_does_not_replace_is_refused(table: dict[str, Any]) -> None:
    assert "sbatch" in wrong(**table).message


# ---------------------------------------------------------------- options without a value


@pytest.mark.parametrize("option", ["hold", "no-requeue", "exclusive"])
@pytest.mark.parametrize("value", ["true", "", False])
def test_an_option_without_a_value_takes_true_alone(option: str, value: str | bool) -> None:
    assert f"--{option} takes no value" in wrong(sbatch={option: value}).message
    assert partition(sbatch={option: True}).sbatch == {option: True}


def test_exclusive_may_have_a_value() -> None:
    assert partition(sbatch={"exclusive": "user"}).sbatch == {"exclusive": "user"}


def test_memory_without_a_unit_is_refused() -> None:
    assert "'64' has no unit" in wrong(mem="64").message
    assert partition(mem="0").mem == "0"


@pytest.mark.parametrize("option", MANAGED_OPTIONS)
def test_an_option_that_labctl_writes_itself_is_refused_with_what_to_set(option: str) -> None:
    error = wrong(sbatch={option: "x"})
    assert f"--{option}" in error.message
    instead = MANAGED_OPTIONS[option]
    assert (instead or "remove it") in error.remedy
    assert not instead or instead in KEYS


@pytest.mark.parametrize("option", FORM_OF_OPTION)
def test_the_form_that_a_managed_option_stands_for_is_named_as_a_value_that_writes_it(option: str) -> None:
    remedy = wrong(sbatch={option: "2"}).remedy
    key, _, form = remedy.removeprefix("set ").removesuffix(", and the number by --gpus").partition(" = ")
    table = {key: form.strip('"')}
    assert table[key] in remedy
    assert option in partition(**table).resources(2).options() or table == {"cpus_per_task": "8 per-gpu"}


def test_every_option_that_the_shipped_script_writes_is_managed() -> None:
    written = {
        "account", "array", "cpus-per-task", "error", "export", "gres", "job-name", "mem", "nodes", "ntasks-per-node",
        "open-mode", "output", "partition", "signal", "time",
    }  # fmt: skip
    assert written <= set(MANAGED_OPTIONS)


@pytest.mark.parametrize("option", ["partitio", "acc", "cpus-per-t", "outp", "job-n", "tasks-per-node"])
def test_another_name_of_a_managed_option_is_refused_too(option: str) -> None:
    assert f"--{option}" in wrong(sbatch={option: "x"}).message


@pytest.mark.parametrize("option", ["--qos", "-qos", "mail_user", "qos "])
def test_an_option_that_is_not_its_long_name_is_refused(option: str) -> None:
    assert repr(option) in wrong(sbatch={option: "x"}).message


@pytest.mark.parametrize("option", ["Mail-Type", "qos high"])
def test_an_option_is_never_told_to_be_written_as_it_was(option: str) -> None:
    assert repr(option) not in wrong(sbatch={option: "x"}).remedy


@pytest.mark.parametrize(
    "option", ["wait", "test-only", "clusters", "ntasks-per-gpu", "cpus-per-gpu", "gpus-per-socket"]
)
def test_an_option_that_makes_sbatch_do_otherwise_than_queue_this_job_here_is_refused(option: str) -> None:
    """`wait` makes labctl submit wait for the job's end, `test-only` queues nothing, `clusters` queues it out of sight."""
    wrong(sbatch={option: True})


@pytest.mark.parametrize(
    ("key", "value"), [("account", "a\0b"), ("env", {"A": "a\0b"}), ("sbatch", {"comment": "a\0b"}), ("setup", ["\0"])]
)
def test_a_nul_is_refused(key: str, value: Any) -> None:
    wrong(**{key: value})


def test_clusters_is_refused_with_the_key_for_it() -> None:
    assert "set cluster" in wrong(sbatch={"clusters": "gpuc"}).remedy


def test_other_options_of_sbatch_are_taken() -> None:
    options: dict[str, Any] = {"qos": "high", "exclusive": True, "nice": 100, "mail-user": "me@lab", "constraint": ""}
    assert partition(sbatch=options).sbatch == options


def test_a_settings_file_as_toml_gives_the_partition_that_it_says() -> None:
    text = """
        [partitions.dgxh]
        slurm_partition = "gpu,dgxh"
        time = "2-00:00"
        setup = ["module load cuda", "source ~/env/bin/activate"]
        env = { HF_HOME = "/scratch/hf" }
        sbatch = { qos = "high", exclusive = true }
        capability = 9.0
    """
    made = partition(**tomllib.loads(text)["partitions"]["dgxh"])
    assert made.time_limit_s == 2 * 86400
    assert made.setup == ["module load cuda", "source ~/env/bin/activate"]
    assert made.sbatch == {"qos": "high", "exclusive": True}


# ---------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("60", 3600),
        ("1", 60),
        ("90:30", 90 * 60 + 30),
        ("0:30", 30),
        ("1:00:00", 3600),
        ("00:00:30", 30),
        ("12:34:56", 45296),
        ("100:00:00", 360000),
        ("1-0", 86400),
        ("0-1", 3600),
        ("0-01:00", 3600),
        ("0-01:00:00", 3600),
        ("2-03:04:05", 183845),
        ("7-00:00:00", 604800),
    ],
)
def test_a_time_is_read_as_slurm_reads_it(time: str, expected: int) -> None:
    assert seconds(time) == expected
    assert partition(time=time).time_limit_s == expected


@pytest.mark.parametrize(
    "time", ["", "0", "0:00", "0-0", "-1", "1-", "-", "1-2-3", "1:2:3:4", "1:", ":30", "1h", "1.5", "1d", "UNLIMITED"]
)
def test_what_is_no_time_is_a_value_error(time: str) -> None:
    with pytest.raises(ValueError, match="time"):
        seconds(time)


@a_few
@given(days=st.integers(0, 30), hours=st.integers(0, 23), minutes=st.integers(0, 59), rest=st.integers(0, 59))
def test_every_form_of_a_time_gives_the_same_seconds(days: int, hours: int, minutes: int, rest: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    forms = [
        f"{days}-{hours:02}:{minutes:02}:{rest:02}",
        f"{days}-{hours}:{minutes}:{rest}",
        f"{days * 24 + hours}:{minutes:02}:{rest:02}",
        f"{(days * 24 + hours) * 60 + minutes}:{rest:02}",
    ]
    if rest == 0:
        forms += [f"{days}-{hours}:{minutes}", str((days * 24 + hours) * 60 + minutes)]
    if rest == minutes == 0:
        forms.append(f"{days}-{hours}")
    for form in forms:
        if total:
            assert seconds(form) == total, form
        else:
            with pytest.raises(ValueError, match="is zero"):
                seconds(form)


@a_few
@given(text=st.text(alphabet="0123456789-: dhms.", max_size=12))
def test_any_text_is_a_positive_time_or_a_value_error(text: str) -> None:
    try:
        total = seconds(text)
    except ValueError:
        return
    assert total > 0


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("values", "gpus", "words"),
    [
        ({}, 2, "--gres=gpu:2"),
        ({}, 1, "--gres=gpu:1"),
        ({"gpu_type": "h100"}, 2, "--gres=gpu:h100:2"),
        ({"gpu_request": "gpus"}, 2, "--gpus=2"),
        ({"gpu_request": "gpus-per-node", "gpu_type": "a100"}, 4, "--gpus-per-node=a100:4"),
        ({"gpu_request": "none", "gpu_type": "a100"}, 4, ""),
        ({"device": "cpu"}, 2, "--gres=gpu:2"),  # the GPUs are asked for where the node has them, used or not
        ({"device": "cpu", "gpu": ""}, 2, ""),
    ],
)
def test_gpus_are_asked_of_slurm_in_the_form_of_the_partition(values: Mapping[str, Any], gpus: int, words: str) -> None:
    assert partition(**values).resources(gpus).gpu_words == words


@pytest.mark.parametrize(
    ("mem", "option", "memory_mib"),
    [
        ("64G", "--mem=64G", 64 * 1024),
        ("0", "--mem=0", None),
        ("none", "", None),
        ("64G per-gpu", "--mem-per-gpu=64G", 2 * 64 * 1024),
        ("8000M per-cpu", "--mem-per-cpu=8000M", 6 * 8000),
    ],
)
def test_memory_is_asked_for_in_one_form_and_known_as_that_of_the_node(
    mem: str, option: str, memory_mib: float | None
) -> None:
    resources = partition(mem=mem, cpus_per_task=6).resources(2)
    assert [word for word in resources.words() if word.startswith("--mem")] == [option] * bool(option)
    assert resources.memory_mib == memory_mib


@pytest.mark.parametrize(("cpus", "gpus", "asked"), [(6, 2, 6), ("16 per-gpu", 3, 48), ("none", 2, None)])
def test_cpus_are_a_number_or_follow_from_the_gpus_or_are_left_to_the_site(
    cpus: int | str, gpus: int, asked: int | None
) -> None:
    resources = partition(cpus_per_task=cpus).resources(gpus)
    assert resources.cpus == asked
    assert resources.options().get("cpus-per-task") == (None if asked is None else str(asked))


def test_what_a_site_refuses_or_chooses_itself_is_left_out() -> None:
    made = partition(
        slurm_partition="none", account="", mem="none", cpus_per_task="none", tasks="none", gpu_request="none"
    )
    assert made.resources(2).words() == ["--time=0-01:00:00", "--nodes=1"]
    assert made.slurm_names == []
    assert partition(slurm_partition="gpu, dgxh").slurm_names == ["gpu", "dgxh"]


# ---------------------------------------------------------------- anything at all

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=10), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(KEYS), value=anything)
def test_any_value_makes_a_partition_or_one_wrong_use_error_with_its_file_and_key(key: str, value: Any) -> None:
    try:
        partition(**{key: value})
    except WrongUseError as error:
        assert error.message.startswith(f"{FILE}: [partitions.dgxh] {key}: ")
        assert error.remedy
