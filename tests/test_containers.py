"""The words that start a container, the key, and container.sh with a fake scontrol. Real containers: tests/slurm."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from labctl_orchestrator.submission import reserve
from labctl_slurm import containers
from labctl_slurm.containers import Container
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition, build, shipped
from labctl_slurm.render import Script

CONTAINER_SH = Path("workers/labctl_workers/container.sh").resolve()


def partition(**keys: object) -> Partition:
    return build("dgxh", [("shipped", shipped()["dgxh"]), ("labctl.toml", keys)])


def script(of: Partition) -> Script:
    return Script(of, "labctl", 2, None, Path("/lab/logs"), Path("/lab/code"), Path("/none"), folders=(Path("/lab"),))


# ---------------------------------------------------------------- the key


def test_the_python_in_an_image_is_python3() -> None:
    assert partition(container="apptainer:/images/vllm.sif").python == "python3"
    assert partition(container="apptainer:/images/vllm.sif", python="/opt/python").python == "/opt/python"


def test_home_and_variables_are_those_of_the_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("IMAGES", "/shared/images")
    assert partition(container="apptainer:~/vllm.sif").container == "apptainer:/home/ada/vllm.sif"
    assert partition(container="pyxis:$IMAGES/vllm.sqsh").container == "pyxis:/shared/images/vllm.sqsh"
    assert partition(container_binds=["~/hf:/hf", "$IMAGES"]).container_binds == ["/home/ada/hf:/hf", "/shared/images"]


@pytest.mark.parametrize(
    "key",
    [
        "vllm.sif",
        "apptainer:",
        "apptainer:vllm.sif",
        "apptainer:docker://vllm",
        "docker:vllm",
        "pyxis:./x",
        "pyxis:a b",
    ],
)
def test_another_form_of_the_key_is_refused(key: str) -> None:
    with pytest.raises(WrongUseError) as raised:
        partition(container=key)
    assert "[partitions.dgxh] container" in raised.value.message
    assert "apptainer:/path/image.sif" in raised.value.remedy


@pytest.mark.parametrize("bind", ["scratch", "/a,/b", "/a:b", "/a:ro", "/a:/b:rx", "/a:/b:ro:x", ""])
def test_another_form_of_a_bind_is_refused(bind: str) -> None:
    with pytest.raises(WrongUseError, match="is not a bind"):
        partition(container_binds=[bind])


def test_pyxis_needs_slurm() -> None:
    with pytest.raises(WrongUseError, match="in Slurm jobs only"):
        partition(container="pyxis:ubuntu", executor="local")


# ---------------------------------------------------------------- the words


def test_a_script_starts_apptainer_with_the_folders_and_gpus() -> None:
    of = partition(
        container="apptainer:/images/v.sif", container_binds=["/scratch", "/hf:/in:ro"], env={"HF_HOME": "/in"}
    )
    text = script(of).text(script(of).worker_command("-m", "labctl_workers.job", "x y"))
    assert text.splitlines()[-1] == (
        "exec bash /lab/code/labctl_workers/container.sh /images/v.sif apptainer exec --nv --bind=/scratch,/hf:/in:ro,/lab "
        "/images/v.sif env HF_HOME=/in PYTHONPATH=/lab/code PYTHONUNBUFFERED=1 python3 -m labctl_workers.job 'x y'"
    )


def test_a_script_starts_srun_with_the_options_of_pyxis() -> None:
    of = partition(container="pyxis:nvcr.io#nvidia/pytorch:25.10-py3", container_binds=["/scratch", "/hf:/in:ro"])
    words = shlex.split(script(of).worker_command("-c", "pass"))
    assert words[2:] == [
        "nvcr.io#nvidia/pytorch:25.10-py3", "srun", "--ntasks=1", "--overlap", "--cpu-bind=none",
        "--container-image=nvcr.io#nvidia/pytorch:25.10-py3",
        "--container-mounts=/scratch:/scratch,/hf:/in:ro,/lab:/lab", "--no-container-entrypoint",
        "env", "PYTHONPATH=/lab/code", "PYTHONUNBUFFERED=1", "python3", "-c", "pass",
    ]  # fmt: skip


def test_a_partition_without_gpus_takes_none_of_the_driver() -> None:
    of = partition(container="apptainer:/images/v.sif", device="cpu")
    assert "--nv" not in script(of).worker_command("-c", "pass")


def test_a_folder_below_another_one_is_bound_once() -> None:
    words = Container("apptainer", "/v.sif").words(
        ["true"], [Path("/a"), Path("/a/b"), Path("/ab"), Path("/a")], [], gpus=False
    )
    assert words == ["apptainer", "exec", "--bind=/a,/ab", "/v.sif", "true"]
    assert containers.parsed("apptainer:/v.sif") == Container("apptainer", "/v.sif")


def test_a_reserved_shell_is_outside_and_names_the_image() -> None:
    of = partition(container="apptainer:/images/v.sif", python="/opt/env/bin/python")
    text = reserve.shell(of, 2)
    assert "python is /opt/env/bin/python in /images/v.sif" in text
    assert 'export PATH="$PATH":' in text


# ---------------------------------------------------------------- container.sh


def start(tmp_path: Path, *command: str, image: str = "image", **variables: str) -> subprocess.Popen[str]:
    """container.sh on a machine whose scontrol is a fake: it prints its arguments and fails with 3."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text('#!/bin/sh\necho "outside: $*"\nexit 3\n')
    scontrol.chmod(0o755)
    environment = {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        **variables,
    }
    return subprocess.Popen(
        ["bash", str(CONTAINER_SH), image, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_worker_calls_scontrol_outside(tmp_path: Path) -> None:
    program = '"$LABCTL_SCONTROL/scontrol" show job 7; echo "status $?"; exit 5'
    process = start(tmp_path, "sh", "-c", program)
    assert process.communicate(timeout=20)[0] == "outside: show job 7\nstatus 3\n"
    assert process.returncode == 5
    deadline = time.monotonic() + 10
    while list(tmp_path.glob("labctl-scontrol.*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_container_sees_the_folder_of_scontrol(tmp_path: Path) -> None:
    program = 'echo "$LABCTL_SCONTROL"; echo "$1"; echo "$2"'
    words = ("sh", "-c", program, "sh", "--bind=/a,/b", "--container-mounts=/a:/a")
    folder, bind, mounts = start(tmp_path, *words).communicate(timeout=20)[0].splitlines()
    assert folder.startswith(f"{tmp_path}/labctl-scontrol.")
    assert (bind, mounts) == (f"--bind={folder},/a,/b", f"--container-mounts={folder}:{folder},/a:/a")


def test_outside_of_slurm_nothing_is_added(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", 'echo "<$LABCTL_SCONTROL>"', SLURM_JOB_ID="")
    assert process.communicate(timeout=20)[0] == "<>\n"


def test_two_builds_of_an_image_have_two_names(tmp_path: Path) -> None:
    image = tmp_path / "v.sif"

    def name() -> str:
        return start(tmp_path, "printenv", "LABCTL_CONTAINER", image=str(image), SLURM_JOB_ID="").communicate(
            timeout=20
        )[0]

    assert name() == f"{image}\n"  # a folder, or an image of a registry
    image.write_bytes(b"one")
    first = name()
    assert first == name()
    assert first.split()[0] == str(image)
    assert len(first.split()[1]) == 12
    image.write_bytes(b"two")
    assert name() != first


@pytest.mark.parametrize("kind", ["apptainer", "srun"])
def test_signals_and_the_exit_status_pass_through(tmp_path: Path, kind: str) -> None:
    """The runtime is a fake: a shell that notes USR2. Under srun, scontrol listpids names it."""
    runtime, scontrol = tmp_path / "bin" / kind, tmp_path / "bin" / "scontrol"
    runtime.parent.mkdir()
    runtime.write_text("#!/bin/bash\ntrap 'echo USR2; exit 6' USR2\necho $$\nwhile :; do sleep 0.1; done\n")
    runtime.chmod(0o755)
    process = start(tmp_path, kind, "exec")
    assert process.stdout is not None
    pid = process.stdout.readline().strip()
    # As Slurm prints it: the batch script is a first process too, of another step.
    table = f"PID JOBID STEPID LOCALID GLOBALID\n{process.pid} 7 batch 0 0\n{pid} 7 0 0 0\n1 7 0 - -\n"
    scontrol.write_text("#!/bin/sh\ncat <<'E'\n" + table + "E\n")
    if kind == "srun":
        process.send_signal(signal.SIGTERM)  # the shell outlives it
        time.sleep(0.3)
    process.send_signal(signal.SIGUSR2)
    assert process.communicate(timeout=20)[0] == "USR2\n"
    assert process.returncode == 6
