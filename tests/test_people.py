"""Several people in one workspace: real accounts, folder modes and umasks. Needs root, as CI is."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from labctl_orchestrator.preflight import trust
from labctl_orchestrator.store.workspace import DATA_FOLDER, Workspace
from labctl_workers import job
from tests.conftest import Labctl, write_checkpoint

PROGRAM = "import sys; from labctl_orchestrator.cli import main; sys.argv[0] = 'labctl'; main()"
PACKAGES = os.pathsep.join(filter(None, sys.path))


def _python_for_all() -> str | None:
    """A Python that any user can run: this one may lie in root's home."""
    if os.geteuid() != 0:
        return None
    for python in (sys.executable, f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"):
        try:
            subprocess.run(
                [python, "-c", "import labctl_orchestrator.cli, msgspec"], user=65534, group=65534, extra_groups=[], check=True,
                env={"PYTHONPATH": PACKAGES}, capture_output=True,
            )  # fmt: skip
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    return None


NUMBERS = itertools.count()
PYTHON = _python_for_all() or ""
needs_root = pytest.mark.skipif(
    not PYTHON or shutil.which("useradd") is None,
    reason="making accounts needs root, useradd, and a Python that every user can run",
)


@dataclass(frozen=True)
class Person:
    name: str
    umask: int
    lab: Path

    def labctl(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        account = pwd.getpwnam(self.name)
        home = self.lab.parent / f"home-{self.name}"
        return subprocess.run(
            [PYTHON, "-c", PROGRAM, *map(str, arguments)],
            cwd=self.lab, user=account.pw_uid, group=account.pw_gid, extra_groups=os.getgrouplist(self.name, account.pw_gid),
            umask=self.umask, capture_output=True, text=True, check=False, timeout=120,
            env={"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(home), "LABCTL_NO_PREFLIGHT": "1",
                 "HF_HUB_OFFLINE": "1", "PYTHONPATH": PACKAGES},
        )  # fmt: skip


@pytest.fixture
def names() -> Iterator[tuple[str, str, str]]:
    """A group and two accounts that are in it, for the time of the test."""
    end = f"{os.getpid() % 100_000}-{next(NUMBERS)}"
    group, *people = (f"labctlg{end}", f"labctla{end}", f"labctlb{end}")
    subprocess.run(["groupadd", group], check=True)
    try:
        for name in people:
            subprocess.run(["useradd", "--no-create-home", "--user-group", "--groups", group, name], check=True)
        yield group, people[0], people[1]
    finally:
        for name in people:
            # Its last worker may be about to end.
            subprocess.run(["userdel", "--force", name], check=False, capture_output=True)
        subprocess.run(["groupdel", group], check=False, capture_output=True)


@pytest.fixture
def lab(names: tuple[str, str, str]) -> Iterator[Path]:
    """A folder 2775 of the group, beside homes of both; not below pytest's own, which root alone may enter."""
    group, *people = names
    with tempfile.TemporaryDirectory(prefix="labctl-people-") as made:
        top = Path(made)
        top.chmod(0o755)
        lab = top / "lab"
        lab.mkdir()
        shutil.chown(lab, people[0], group)
        lab.chmod(0o2775)
        for name in people:
            home = top / f"home-{name}"
            home.mkdir(mode=0o700)
            shutil.chown(home, name, name)
        model = write_checkpoint(top / "tiny")
        settings = f'[defaults]\nmodel_id = "{model}"\n[partitions.local]\ndevice = "cpu"\npython = "{PYTHON}"\n'
        (lab / "labctl.toml").write_text(settings, encoding="utf-8")
        shutil.chown(lab / "labctl.toml", people[0], group)
        yield lab


@needs_root
@pytest.mark.model
@pytest.mark.parametrize(
    ("umask_a", "umask_b"),
    [
        pytest.param(0o002, 0o002, marks=pytest.mark.nightly, id="002-002"),
        pytest.param(0o022, 0o022, marks=pytest.mark.nightly, id="022-022"),
        pytest.param(0o077, 0o022, id="077-022"),
        pytest.param(0o002, 0o077, id="002-077"),
    ],
)
def test_two_people_work_in_one_workspace_whatever_their_umasks(
    names: tuple[str, str, str], lab: Path, umask_a: int, umask_b: int
) -> None:
    group, *_ = names
    ada, bob = Person(names[1], umask_a, lab), Person(names[2], umask_b, lab)
    first = ada.labctl("submit", "-p", "local", "--repeats", "1", "--wait", "--name", "one")
    assert "run" in first.stdout, first.stderr
    second = bob.labctl("submit", "-p", "local", "--repeats", "1", "--wait", "--again", "--name", "one")
    assert f"shared workspace: user {ada.name}, group {group} can change" in " ".join(second.stderr.split())
    for person in (bob, ada, bob):
        rebuilt = person.labctl("collect", "--rebuild")
        assert rebuilt.returncode == 0, rebuilt.stderr
        for other in (ada, bob):
            seen = other.labctl("status", "--all")
            assert "cannot be" not in seen.stderr, seen.stderr
            assert "ermission" not in seen.stderr, seen.stderr
    third = ada.labctl("submit", "-p", "local", "--repeats", "1", "--wait", "--again", "--name", "one")
    assert "ermission" not in third.stdout + third.stderr
    data = lab / DATA_FOLDER
    records = list(data.glob("results/*/*.json"))
    assert len(records) == 3, "each of the three submissions has written its record"
    assert {file.parent for file in records} == {records[0].parent}
    folders = (path for path in data.rglob("*") if path.is_dir() and path.parent.name != "code")  # never changed
    shared = [data / "workspace.lock", *data.glob("labctl-*.db"), *folders]
    assert [path for path in shared if not path.stat().st_mode & stat.S_IWGRP] == []
    assert {path.stat().st_gid for path in shared} == {lab.stat().st_gid}


# ---------------------------------------------------------------- who may change a workspace


def test_a_workspace_that_others_can_write_is_called_so(workspace: Workspace) -> None:
    """Root's own group counts as trusted, so the folders get another."""
    workspace.data.mkdir(exist_ok=True)
    assert trust.others_who_write(workspace) == []
    workspace.data.chmod(0o777)
    assert trust.others_who_write(workspace)[-1] == "everyone"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_template_of_somebody_else_makes_the_workspace_theirs_too(workspace: Workspace, labctl: Labctl) -> None:
    templates = workspace.root / "templates"
    templates.mkdir()
    os.chown(templates, 54321, 54321)
    templates.chmod(0o775)
    assert trust.others_who_write(workspace) == ["user 54321", "group 54321"]
    ran = labctl("render", "-p", "dgxh")
    assert "shared workspace: user 54321, group 54321 can change files that run as you" in " ".join(ran.err.split())


def test_what_a_process_makes_follows_a_folder_that_a_group_may_write(tmp_path: Path) -> None:
    made = tmp_path / "shared"
    made.mkdir()
    made.chmod(0o2770)
    program = (
        "import os; from pathlib import Path; from labctl_orchestrator.store.workspace import find; os.umask(0o077);"
        "from labctl_workers.record import write_json, follow_mode; find();"
        "Path('.labctl').mkdir(); write_json(Path('.labctl/a/b.json'), {});"
        "print(*(oct(os.stat(path).st_mode) for path in ('.labctl/a/b.json', '.labctl/a')))"
    )
    (made / "labctl.toml").touch()
    shown = subprocess.run(
        [sys.executable, "-c", "import os; os.umask(0o077)\n" + program], cwd=made, capture_output=True, text=True, check=True,
        env={**os.environ, "LABCTL_HOME": ""},
    )  # fmt: skip
    assert shown.stdout.split() == ["0o100660", "0o42770"]


# ---------------------------------------------------------------- the lock of local jobs


def test_the_lock_of_local_jobs_follows_no_link_and_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("keep", encoding="utf-8")
    (tmp_path / "link.lock").symlink_to(target)
    os.mkfifo(tmp_path / "pipe.lock")
    for name in ("link.lock", "pipe.lock"):
        with pytest.raises(OSError, match=r"link|regular file"):
            job._open_lock(tmp_path / name)
    assert target.read_text(encoding="utf-8") == "keep"
    os.close(job._open_lock(target))
    assert target.read_text(encoding="utf-8") == "keep"
