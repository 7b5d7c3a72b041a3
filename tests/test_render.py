"""The script: each value is one argument, for Slurm and for the shell, whatever is in it; and a template may be wrong."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import labctl_templates
from labctl_orchestrator.submission import reserve
from labctl_slurm.diagnose import of_texts
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition, build, shipped
from labctl_slurm.render import Script, time_limit_of_script_s

COMMAND = "/env/bin/python -u -m submitit.core._submit /lab/.labctl/arrays/b-1/submitit"
SPECIAL = [
    "two words",
    "$HOME",
    "$(touch /tmp/x)",
    "`id`",
    'a"b',
    "a;b&c|d",
    "a # no comment",
    "#",
    "*?[a-z]",
    "~",
    "{a,b}",
    "!history",
    "<in>out",
    "--partition=other",
    "tab\there",
    "größe",
    "{{ command }}",
    "{% raw %}",
    "%j",
    "100%used",
    "o'brien",
    "'",
    "DOMAIN\\user",
    "ends\\",
    "\\'\\\"",
    "a\\\\b",
]


def script(
    name: str = "dgxh",
    *,
    tasks: int | None = None,
    gpus: int = 2,
    folder: str = "/lab/.labctl",
    own: Path | str = "/none",
    job_name: str = "labctl-b-1",
    odd: dict[str, Any] | None = None,
    **values: Any,
) -> Script:
    partition: Partition = build(name, [("shipped", shipped().get(name, {})), ("labctl.toml", values)])
    if odd is not None:  # what settings refuse, a script still quotes
        partition = msgspec.structs.replace(partition, **odd)
    logs, code = Path(folder) / "arrays" / "b-1" / "submitit", Path(folder) / "code" / "0123456789ab"
    return Script(partition, job_name, gpus, tasks, logs, code, Path(own))


def argument(line: str, at: int) -> tuple[str | None, int]:
    """The next argument of an #SBATCH line, as Slurm's `_get_argument` (sbatch/opt.c) reads it: quotes of both kinds,
    a backslash before any character even within them, and a comment from an unquoted #."""
    while at < len(line) and line[at].isspace():
        at += 1
    if at == len(line) or line[at] == "#":
        return None, len(line)
    read, quote = "", ""
    while at < len(line) and (quote or not line[at].isspace()):
        letter = line[at]
        at += 1
        if letter == "\\":
            read += line[at : at + 1]
            at += 1
        elif quote:
            read, quote = (read, "") if letter == quote else (read + letter, quote)
        elif letter in "\"'":
            quote = letter
        elif letter == "#":
            return read, len(line)
        else:
            read += letter
    assert not quote, f"sbatch would refuse the line: Unmatched {quote} in {line}"
    return read, at


def options(text: str) -> dict[str, str | None]:
    """What sbatch reads from a script: its #SBATCH lines up to the first line that is a command."""
    found: dict[str, str | None] = {}
    for line in text.split("\n"):
        if line and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        at = len("#SBATCH")
        while True:
            read, at = argument(line, at)
            if read is None:
                break
            assert read.startswith("--"), f"sbatch would take {read!r} for the name of a script: {line}"
            name, equals, value = read[2:].partition("=")
            assert name not in found, f"--{name} is written twice"
            found[name] = value if equals else None
    return found


def shell(text: str, **environment: str) -> dict[str, str]:
    """The environment that the script's command gets from bash."""
    path = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash"], input=text.encode(), env={**path, **environment}, capture_output=True, check=True)
    entries = [entry.decode().partition("=") for entry in done.stdout.split(b"\0") if entry]
    return {name: value for name, _, value in entries}


def is_shell(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def log_file(name: str | None) -> str:
    """The file that Slurm writes for the name of a log: job 77 of the user called me."""
    assert name is not None
    return re.sub("%(.)", lambda found: {"%": "%", "j": "77", "u": "me"}[found[1]], name)


def wrong(action: Callable[[], object]) -> WrongUseError:
    with pytest.raises(WrongUseError) as caught:
        action()
    assert caught.value.remedy
    return caught.value


# ---------------------------------------------------------------- the shipped templates


@pytest.mark.parametrize("tasks", [None, 7], ids=["single", "array"])
@pytest.mark.parametrize(("name", "account"), [("dgx2", "eecs"), ("dgxh", "eecs"), ("a40", "")])
def test_a_shipped_template_asks_slurm_for_what_the_partition_says(name: str, account: str, tasks: int | None) -> None:
    text = script(name, tasks=tasks).text(COMMAND)
    log = "/lab/.labctl/arrays/b-1/submitit/" + ("%j" if tasks is None else "%A_%a") + "_0_log"
    expected: dict[str, str | None] = {
        "job-name": "labctl-b-1",
        "partition": name,
        "time": "0-01:00:00",
        "nodes": "1",
        "ntasks-per-node": "1",
        "cpus-per-task": "8",
        "mem": "64G",
        "gres": "gpu:2",
        "output": f"{log}.out",
        "error": f"{log}.err",
        "open-mode": "append",
        "export": "ALL",
        "signal": "B:USR2@90",
    }
    if account:
        expected["account"] = account
    if tasks:
        expected["array"] = "0-6"
    assert options(text) == expected
    assert text.startswith("#!/bin/bash\n")
    is_shell(text)


def test_a_script_ends_with_the_command_and_a_line_break() -> None:
    text = script().text(COMMAND)
    assert text.endswith(f"\nexec {COMMAND}\n")
    assert shlex.split(text.splitlines()[-1])[1:] == shlex.split(COMMAND)


def test_no_line_of_a_script_has_anything_of_the_template_in_it() -> None:
    text = script("dgx2", tasks=3, sbatch={"qos": "high", "exclusive": True}, env={"A": "1"}, setup=["true"]).text(
        "true"
    )
    assert not re.search(r"\{[{%#]|[}%#]\}", text)
    assert not re.search(r"[ \t]$", text, re.MULTILINE)


def test_a_single_job_and_an_array_differ_only_where_they_must() -> None:
    one = script().text(COMMAND).splitlines()
    many = script(tasks=3).text(COMMAND).splitlines()
    extra = [line for line in many if line not in one]
    lost = [line for line in one if line not in many]
    folder = "/lab/.labctl/arrays/b-1/submitit"
    assert lost == [f"#SBATCH --output={folder}/%j_0_log.out", f"#SBATCH --error={folder}/%j_0_log.err"]
    assert sorted(extra) == sorted([
        f"#SBATCH --output={folder}/%A_%a_0_log.out",
        f"#SBATCH --error={folder}/%A_%a_0_log.err",
        "#SBATCH --array=0-2",
    ])  # fmt: skip


def test_only_the_command_differs_between_two_commands() -> None:
    one, other = script().text("true").splitlines(), script().text("false").splitlines()
    assert [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]] == [("exec true", "exec false")]


def test_a_node_without_gpus_is_asked_for_none() -> None:
    assert "gres" not in options(script(device="cpu", gpu="").text(COMMAND))
    assert options(script(gpus=1, gpu_type="h100").text(COMMAND))["gres"] == "gpu:h100:1"


def test_memory_is_asked_for_in_one_form_or_not_at_all() -> None:
    assert "mem" not in options(script(mem="none").text(COMMAND))
    read = options(script(mem="2G per-cpu").text(COMMAND))
    assert (read.get("mem"), read["mem-per-cpu"]) == (None, "2G")


def test_cpus_that_the_site_derives_are_told_to_nobody() -> None:
    text = script(cpus_per_task="none").text(COMMAND)
    assert "cpus" not in text.lower()
    assert "export SRUN_CPUS_PER_TASK=32\n" in script(gpus=2, cpus_per_task="16 per-gpu").text(COMMAND)


def test_export_has_the_value_of_the_key_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/my hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert options(script(export="NONE").text(COMMAND))["export"] == "NONE"
    assert "export" not in options(script(export="none").text(COMMAND))
    assert shell(script(export="NONE").text("env -0"))["HF_HOME"] == "/shared/my hub"
    assert shell(script(export="NONE", env={"HF_HOME": "/own"}).text("env -0"))["HF_HOME"] == "/own"
    assert "HF_HOME" not in script(export="ALL").text(COMMAND)
    assert "hf_secret" not in script(export="NONE").text(COMMAND)


def test_the_script_and_the_srun_of_a_reservation_ask_for_the_same() -> None:
    values = {"gpu_request": "gpus-per-node", "mem": "60G per-gpu", "cpus_per_task": "4 per-gpu", "account": "a b"}
    made = script(**values)
    words = reserve.command(made.partition, 2, ["true"])
    asked = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    written = options(made.text(COMMAND))
    assert {name: written[name] for name in asked if name != "job-name"} == {
        name: value for name, value in asked.items() if name != "job-name"
    }
    assert asked["gpus-per-node"] == "2"


def test_further_options_follow_with_and_without_a_value() -> None:
    read = options(script(sbatch={"qos": "high", "exclusive": True, "nice": 100}).text(COMMAND))
    assert (read["qos"], read["exclusive"], read["nice"]) == ("high", None, "100")


def test_the_command_finds_the_kept_code_after_what_the_node_has() -> None:
    text = script().text("env -0")
    assert shell(text)["PYTHONPATH"] == "/lab/.labctl/code/0123456789ab"
    assert shell(text, PYTHONPATH="/mine")["PYTHONPATH"] == "/mine:/lab/.labctl/code/0123456789ab"
    assert shell(text)["SUBMITIT_EXECUTOR"] == "slurm"
    assert shell(text)["SRUN_CPUS_PER_TASK"] == "8"
    assert shell(text)["PYTHONUNBUFFERED"] == "1"


def test_setup_lines_come_before_the_variables_and_the_command_as_they_are() -> None:
    text = script(setup=["export FROM_SETUP='a b'", "OTHER=$FROM_SETUP"], odd={"env": {"A": "$FROM_SETUP"}}).text(
        "env -0"
    )
    environment = shell(text)
    assert environment["FROM_SETUP"] == "a b"
    assert environment["A"] == "$FROM_SETUP"


@pytest.mark.parametrize(
    "line", ["conda_that_is_not_there activate v100", "cd /nonexistent", "false", "source /nonexistent"]
)
@pytest.mark.parametrize("where", ["slurm", "local"])
def test_a_setup_line_that_fails_ends_the_job_with_its_text(line: str, where: str) -> None:
    made = script(setup=["export BEFORE=1", line, "touch /never"])
    text = made.text("echo measured") if where == "slurm" else made.without_slurm("echo measured")[0]
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"labctl: setup failed (exit code {done.returncode}): {line}" in done.stderr
    found = of_texts([done.stderr], {"partition": "dgxh"})
    assert found is not None
    assert found.kind == "setup-failed"
    assert found.happened.endswith(line)


def test_what_a_setup_line_tolerates_does_not_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("false\ntrue\n", encoding="utf-8")
    lines = [
        "false || true",
        "[ -d /nonexistent ] && echo no",
        "f() { false; true; }",
        "f",
        f"source {tmp_path}/profile",
    ]
    for text in (script(setup=lines).text("echo measured"), script(setup=lines).without_slurm("echo measured")[0]):
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
        assert done.stdout == "measured\n"


def test_an_own_variable_of_the_shell_cannot_undo_what_labctl_sets() -> None:
    environment = shell(script(env={"PYTHONPATH": "/mine", "PYTHONUNBUFFERED": ""}).text("env -0"))
    assert environment["PYTHONPATH"] == "/mine:/lab/.labctl/code/0123456789ab"
    assert environment["PYTHONUNBUFFERED"] == "1"


def test_the_job_is_the_command_itself_so_that_signals_reach_it() -> None:
    done = subprocess.run(
        ["bash", "-c", 'echo $$; exec bash -s <<< "$0"', script().text("sh -c 'echo $$'")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    outer, inner = done.stdout.split()
    assert outer == inner


# ---------------------------------------------------------------- whatever is in a value


@pytest.mark.parametrize("value", SPECIAL)
def test_a_special_character_in_any_value_leaves_it_one_argument(value: str) -> None:
    made = script(
        job_name=value,
        folder=f"/lab/{value}/.labctl",
        odd={
            "slurm_partition": value,
            "account": value,
            "gpu_type": value,
            "sbatch": {"comment": value},
            "env": {"LABCTL_A": value, "LABCTL_B": f"{value}\n{value}"},
        },
    )
    text = made.text("env -0")
    is_shell(text)
    read = options(text)
    for option in ("job-name", "partition", "account", "comment"):
        assert read[option] == value, option
    assert read["gres"] == f"gpu:{value}:2"
    for option, ending in (("output", "out"), ("error", "err")):
        assert log_file(read[option]) == f"{made.logs}/77_0_log.{ending}"
    environment = shell(text)
    assert environment["LABCTL_A"] == value
    assert environment["LABCTL_B"] == f"{value}\n{value}"
    assert environment["PYTHONPATH"] == str(made.code)
    for line in text.splitlines():
        if line.startswith("export LABCTL_A="):
            assert shlex.split(line) == ["export", f"LABCTL_A={value}"]


any_value = st.text(
    st.characters(exclude_characters="\n\0", exclude_categories=["Cs"])
    | st.sampled_from(list("'\"\\$` #;&|*~!<>=%{}()")),
    min_size=1,
    max_size=12,
)
a_few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@a_few
@given(account=any_value, comment=any_value)
def test_sbatch_reads_every_value_as_it_was_meant(account: str, comment: str) -> None:
    read = options(
        script(odd={"account": account, "sbatch": {"comment": comment}, "env": {"A": account}}).text(COMMAND)
    )
    assert (read["account"], read["comment"]) == (account, comment)
    assert len(read) == 15


@a_few
@given(
    values=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=3, max_size=3)
)
def test_bash_gives_every_variable_as_it_was_meant(values: list[str]) -> None:
    named = {f"LABCTL_{number}": value for number, value in enumerate(values)}
    environment = shell(script(odd={"env": named}).text("env -0"))
    assert {name: environment[name] for name in named} == named


@pytest.mark.parametrize("value", ["DOMAIN\\user", "ends\\", "\\n"])
def test_a_backslash_reaches_sbatch(value: str) -> None:
    assert options(script(sbatch={"comment": value}).text(COMMAND))["comment"] == value


@pytest.mark.parametrize("folder", ["/lab/100%used/.labctl", "/lab/a%%b/.labctl"])
def test_a_percent_sign_in_the_workspaces_path_is_no_pattern_of_slurm(folder: str) -> None:
    made = script(folder=folder)
    assert log_file(options(made.text(COMMAND))["output"]) == f"{made.logs}/77_0_log.out"


def test_a_workspace_whose_path_has_an_apostrophe_renders() -> None:
    made = script(folder="/home/o'brien/.labctl")
    text = made.text("env -0")
    assert shell(text)["PYTHONPATH"] == str(made.code)
    assert options(text)["output"] == f"{made.logs}/%j_0_log.out"


# ---------------------------------------------------------------- templates of one's own


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}{labctl_templates.SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_every_shipped_template_is_one_that_a_partition_may_name() -> None:
    names = {path.name.removesuffix(labctl_templates.SUFFIX) for path in labctl_templates.FOLDER.glob("*.j2")}
    assert names == {"base", "dgx2", "dgxh"}
    for name in names:
        assert options(script("a40", template=name).text(COMMAND))["partition"] == "a40"


def test_a_template_of_the_workspace_wins_over_the_shipped_one(tmp_path: Path) -> None:
    write(
        tmp_path,
        "dgxh",
        '{% extends "base.sbatch.j2" %}\n{% block setup %}{{ super() }}export MINE=1\n{% endblock %}\n',
    )
    text = script(own=tmp_path).text("env -0")
    assert shell(text)["MINE"] == "1"
    assert options(text) == options(script().text("env -0"))
    assert "MINE" not in script("dgx2", own=tmp_path).text(COMMAND)


def test_a_template_may_be_named_by_the_partition(tmp_path: Path) -> None:
    write(tmp_path, "short", '{% extends "dgxh.sbatch.j2" %}{% block options %}#SBATCH --qos=short\n{% endblock %}')
    assert options(script(own=tmp_path, template="short").text(COMMAND))["qos"] == "short"


def test_a_partition_without_a_template_of_its_name_takes_the_base(tmp_path: Path) -> None:
    assert options(script("a40", own=tmp_path).text(COMMAND))["partition"] == "a40"


def test_a_template_that_stands_alone_may_say_everything_itself(tmp_path: Path) -> None:
    write(
        tmp_path,
        "dgxh",
        "#!/bin/bash\n#SBATCH --output={{ output|slurm }}\n{% if array %}\n#SBATCH --array={{ array }}\n{% endif %}\n"
        "export PYTHONPATH={{ code|q }}\n{{ command }}\n",
    )
    assert options(script(own=tmp_path, tasks=2).text(COMMAND))["array"] == "0-1"
    assert script(own=tmp_path).text(COMMAND).endswith(f"{COMMAND}\n")


def test_a_template_with_dos_line_breaks_gives_a_script_without(tmp_path: Path) -> None:
    path = write(tmp_path, "mine", "")
    path.write_bytes(b'{% extends "base.sbatch.j2" %}\r\n{% block options %}\r\n#SBATCH --qos=a\r\n{% endblock %}\r\n')
    assert "\r" not in script(own=tmp_path, template="mine").text(COMMAND)


def test_a_template_that_does_not_exist_is_told_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "nightly", "")
    error = wrong(lambda: script(own=tmp_path, template="nightlyy").text(COMMAND))
    assert "unknown template of partition dgxh: nightlyy" in error.message
    assert error.remedy == "did you mean 'nightly'?"
    assert "base, dgx2, dgxh, nightly" in wrong(lambda: script(own=tmp_path, template="zzzz").text(COMMAND)).remedy


@pytest.mark.parametrize(
    "text",
    ["{% if %}", "line\n{% block setup %}", "line\n{{ command", "line\n{{ command|nofilter }}", "{% nosuchtag %}"],
)
def test_a_template_with_a_wrong_line_is_told_with_its_file_and_its_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "dgxh", text)
    error = wrong(lambda: script(own=tmp_path).text(COMMAND))
    assert error.message.startswith(f"template {path}, line {text.count(chr(10)) + 1}: ")


@pytest.mark.parametrize("name", ["nonsense", "partition.nonsense", "partition.env.NONE.more", "gpus.nonsense"])
def test_a_template_that_uses_what_is_not_there_is_told_with_its_file(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path, "dgxh", f'{{% extends "base.sbatch.j2" %}}{{% block options %}}{{{{ {name} }}}}{{% endblock %}}'
    )
    error = wrong(lambda: script(own=tmp_path).text(COMMAND))
    assert str(path) in error.message
    assert "undefined" in error.message or "no attribute" in error.message


LINES = {
    "{{ command }}": "exec {{ command }}\n",
    "{{ code|q }}": "export PYTHONPATH={{ code|q }}\n",
    "{{ output|slurm }}": "#SBATCH --output={{ output|slurm }}\n",
    "#SBATCH --array={{ array }}": "{% if array %}\n#SBATCH --array={{ array }}\n{% endif %}\n",
}


@pytest.mark.parametrize("left_out", LINES)
def test_a_template_that_leaves_out_what_a_job_needs_is_told_what(tmp_path: Path, left_out: str) -> None:
    path = write(tmp_path, "dgxh", "".join(line for what, line in LINES.items() if what != left_out))
    error = wrong(lambda: script(own=tmp_path, tasks=2).text(COMMAND))
    assert error.message == f"template {path} lacks {left_out}"


def test_a_single_job_needs_no_array_in_its_template(tmp_path: Path) -> None:
    write(tmp_path, "dgxh", "".join(line for what, line in LINES.items() if "array" not in what))
    assert COMMAND in script(own=tmp_path).text(COMMAND)


def test_a_template_that_is_empty_is_told_what_it_lacks(tmp_path: Path) -> None:
    write(tmp_path, "dgxh", "")
    assert "lacks {{ command }}" in wrong(lambda: script(own=tmp_path).text(COMMAND)).message


BROKEN = {
    "extends one that does not exist": b'{% extends "missing.sbatch.j2" %}',
    "includes one that does not exist": b'{% include "missing.sbatch.j2" %}',
    "is not UTF-8": b"#!/bin/bash\n# gr\xf6\xdfe\n",
    "divides by zero": b"{{ gpus / 0 }}",
    "adds a number to a text": b"{{ gpus + partition.mem }}",
    "calls what is no function": b"{{ gpus() }}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_template_that_breaks_while_it_is_rendered_is_told_with_its_file(tmp_path: Path, text: bytes) -> None:
    path = write(tmp_path, "dgxh", "")
    path.write_bytes(text)
    assert str(path) in wrong(lambda: script(own=tmp_path).text(COMMAND)).message


HOSTILE = (
    "{{ cycler.__init__.__globals__.os.popen('touch FILE').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('FILE', 'w') }}",
    "{{ partition.__class__.__mro__[-1].__subclasses__() }}",
    "{{ partition.gres.__globals__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(partition) }}",
    "{{ command|attr('__class__') }}",
    "{{ partition.env.update({'A': 'B'}) }}",
    "{{ range(10000000000)|list }}",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_template_of_somebody_else_runs_nothing_in_this_process(tmp_path: Path, text: str) -> None:
    """A file of a shared workspace is rendered by whoever looks at the script."""
    made = tmp_path / "made"
    path = write(
        tmp_path,
        "dgxh",
        '{% extends "base.sbatch.j2" %}{% block setup %}' + text.replace("FILE", str(made)) + "{% endblock %}",
    )
    error = wrong(lambda: script(own=tmp_path).text(COMMAND))
    assert str(path) in error.message
    assert not made.exists()


def test_a_template_that_looks_for_what_is_not_there_is_told_with_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "dgxh", '{{ partition.mem.index("z") }}')
    assert str(path) in wrong(lambda: script(own=tmp_path).text(COMMAND)).message


def test_a_base_of_ones_own_may_extend_the_shipped_base(tmp_path: Path) -> None:
    write(tmp_path, "base", '{% extends "base.sbatch.j2" %}{% block options %}#SBATCH --qos=a\n{% endblock %}')
    assert options(script("a40", own=tmp_path).text(COMMAND))["qos"] == "a"


def test_a_wrong_line_of_the_parent_is_told_with_the_parents_file(tmp_path: Path) -> None:
    write(tmp_path, "dgxh", '{% extends "mine.sbatch.j2" %}')
    parent = write(tmp_path, "mine", "line\n{% if %}")
    assert wrong(lambda: script(own=tmp_path).text(COMMAND)).message.startswith(f"template {parent}, line 2: ")


# ---------------------------------------------------------------- what a script asks for


def test_the_time_that_a_script_asks_for_is_read_from_it_whoever_wrote_it(tmp_path: Path) -> None:
    assert time_limit_of_script_s(script(time="2-00:30:00").text(COMMAND)) == 2 * 86400 + 1800
    own = '{% extends "base.sbatch.j2" %}\n{% block options %}\n#SBATCH -t 90\n{% endblock %}\n'
    (tmp_path / "mine.sbatch.j2").write_text(own, encoding="utf-8")
    assert time_limit_of_script_s(script(own=tmp_path, template="mine").text(COMMAND)) == 90 * 60


@pytest.mark.parametrize("text", ["", "#SBATCH --time=UNLIMITED\n", "#SBATCH --time-min=5\n", "# SBATCH --time=5\n"])
def test_a_time_that_is_not_asked_for_is_not_known(text: str) -> None:
    assert time_limit_of_script_s(text) is None
