"""Change files of a workspace at random and run commands on it: no defect (exit 70), no hang, no more memory than a bound.

    python -m tests.fuzz --seed 1 --mutations 2000 --commands 5

Prints each mutation that a command did not bear, with what makes it again (`--only`), and ends with 1 where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import labctl_orchestrator
import labctl_slurm
from labctl_orchestrator.cli import run
from labctl_orchestrator.store.workspace import Workspace

from .conftest import Records

SECONDS_AT_MOST = 10.0  # of a processor
HUNG_AFTER_S = 45.0  # of the clock: other work may share the machine
MIB_AT_MOST = 500
ADDRESS_SPACE_BYTES = 6 * 2**30  # what a machine is spared of a command that has no bound
EXIT_DEFECT = 70
ENDED_AT = "2026-01-01T00:00:00Z"


# ---------------------------------------------------------------- the workspace


def make_workspace(root: Path) -> list[str]:
    """A workspace with a file of every kind; the ids of its runs."""
    root.mkdir()
    records = Records(Workspace(root))
    measured = records.submit("1000", name="measured", lengths=(16, 32), dtypes=("float16", "bfloat16"))
    for task, job in enumerate(measured.jobs):
        attempt = records.attempt(measured, task, slurm_id=f"1000_{task}")
        for cell in job.runs:
            records.done(measured, attempt, cell)
        records.heartbeat(measured, attempt, "ended", done=2)
    records.states(measured, state="COMPLETED", ended_at=ENDED_AT, started_at=ENDED_AT, exit_code="0:0")
    failed = records.submit("2000", name="failed", lengths=(64,))
    records.failed(failed, records.attempt(failed, slurm_id="2000"))
    records.states(failed, state="FAILED", ended_at=ENDED_AT, exit_code="1:0")
    running = records.submit("3000", name="running", lengths=(128,))
    records.heartbeat(running, records.attempt(running, slurm_id="3000"), "measuring", done=0)
    records.states(running, state="RUNNING", started_at=ENDED_AT)
    broken = records.submit("4000", name="broken", lengths=(256,))
    records.states(broken, state="FAILED", ended_at=ENDED_AT, exit_code="127:0")
    for batch, slurm_id in ((measured, "1000_0"), (failed, "2000"), (broken, "4000")):
        (batch.folder / "submitit").mkdir()
        for kind in ("out", "err"):
            (batch.folder / "submitit" / f"{slurm_id}_0_log.{kind}").write_text("a line\n" * 50, encoding="utf-8")
    (root / "labctl.toml").write_text('[defaults]\nbackend = ["hf"]\n', encoding="utf-8")
    bundle = root / "her.labctl.zip"
    for command in (
        ["bundle", "measured", "-o", str(bundle)],
        ["import", str(bundle), "--origin", "her"],
        ["status", "--all"],
    ):
        if (ran := _command(root, command)).code:
            raise SystemExit(f"labctl {' '.join(command)}: {ran}")
    return [cell.run_id for batch in (measured, failed, running, broken) for cell in batch.runs]


def commands(run_ids: Sequence[str]) -> list[list[str]]:
    """The command lines that are tried."""
    of_a_run = [[name, run_id] for run_id in (*run_ids[:2], *run_ids[-3:]) for name in ("show", "logs")]
    return [
        *of_a_run,
        ["show", run_ids[0], "--json"],
        ["status", "--all"], ["status", "--json"], ["status", "measured"], ["matrix"], ["du"],
        ["compare", "--all"], ["compare", "measured", "--by", "dtype", "--json"],
        ["compare", "--text", run_ids[0], run_ids[1]],
        ["report", "measured", "-o", "report.html"], ["export", "-o", "runs.csv"], ["export", "requests", "--json"],
        ["query", "SELECT * FROM measured_runs"], ["query", "SELECT * FROM measured_jobs", "--csv"],
        ["collect"], ["collect", "--rebuild"], ["clean", "--dry-run"], ["clean", "--failed", "--yes"],
        ["retry", "--dry-run"], ["cancel", "running", "--yes"], ["config"], ["list", "--all"],
        ["forget", run_ids[0], "--yes"], ["bundle", "measured", "-o", "out.zip"],
        ["render", "-p", "dgxh", "--model-id", "tiny-llama"],
    ]  # fmt: skip


# ---------------------------------------------------------------- what is changed

VALUES: list[Any] = [
    None, True, -1, 0, 10**30, -(2**63), 1.5, 1e308, float("nan"), float("inf"), "", "text", "\x00", "\x1b[31m", "é" * 5000,
    "../../etc/passwd", "2026-13-01T00:00:00Z", "2026-01-01T00:00:00", "9999-12-31T23:59:59Z", [], {}, [[]], [None], [-1],
    {"a": {"b": 1}}, ["x"] * 10_000, "{", "=1+1", 2**31,
]  # fmt: skip


def change_a_leaf(path: Path, draw: random.Random) -> str:
    """One value of a JSON document, at any depth, is another one, or is taken out."""
    document = json.loads(path.read_text(encoding="utf-8"))
    places = list(_places(document, ()))
    place = draw.choice(places)
    if place and draw.random() < 0.15:
        del _at(document, place[:-1])[place[-1]]
        what = "deleted"
    else:
        value = draw.choice(VALUES)
        what = repr(value)[:40]
        if not place:
            document = value
        else:
            _at(document, place[:-1])[place[-1]] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    return f"{'.'.join(map(str, place))} = {what}"


def _places(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield from _places(below, (*place, key))


def _at(document: Any, place: Sequence[Any]) -> Any:
    for key in place:
        document = document[key]
    return document


def newer(path: Path, draw: random.Random) -> str:
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**document, "schema": 99, "new": {}}), encoding="utf-8")
    return "schema 99"


def _instead(make: Callable[[Path], None]) -> Callable[[Path, random.Random], str]:
    def change(path: Path, draw: random.Random) -> str:
        path.unlink()
        make(path)
        return make.__name__

    return change


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def empty(path: Path) -> None:
    path.touch()


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def large_and_flat(path: Path) -> None:
    path.write_text("[" + "[]," * 4_000_000 + "[]]", encoding="utf-8")


def nested(path: Path) -> None:
    path.write_text("[" * 200_000, encoding="utf-8")


def gone(path: Path) -> None:
    pass


def cut(path: Path, draw: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])
    return "cut"


def flip(path: Path, draw: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 10, 100)) if content else 0):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)
    return "bytes flipped"


def no_rights(path: Path, draw: random.Random) -> str:
    path.chmod(0)
    return "no rights"


def parent_is_a_file(path: Path, draw: random.Random) -> str:
    parent = path.parent
    shutil.rmtree(parent)
    parent.write_text("a file", encoding="utf-8")
    return "its folder is a file"


Change = Callable[[Path, random.Random], str]
MAKES = (pipe, folder, loop, endless, terminal, dangling, empty, huge, large_and_flat, nested, gone)
OF_ANY_FILE: list[Change] = [*map(_instead, MAKES), cut, flip, no_rights, parent_is_a_file]
OF_JSON: list[Change] = [change_a_leaf] * 20 + [newer]


def mutate(root: Path, draw: random.Random) -> str:
    """Change one file; what was done."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".zip")
    path = draw.choice(files)
    own = [
        change
        for change in OF_ANY_FILE
        if change is not parent_is_a_file or path.parent.name not in (root.name, ".labctl")
    ]
    change = draw.choice([*own, *(OF_JSON if path.suffix == ".json" else [])])
    return f"{path.relative_to(root)}: {change(path, draw)}"


# ---------------------------------------------------------------- running


@dataclass(frozen=True)
class Ran:
    code: int
    seconds: float
    mib: int
    err: str

    @property
    def fault(self) -> str:
        if self.code in (EXIT_DEFECT, -signal.SIGKILL) or self.code < 0:
            return f"exit {self.code}"
        if self.seconds > SECONDS_AT_MOST:
            return f"{self.seconds:.0f} s"
        return f"{self.mib} MiB" if self.mib > MIB_AT_MOST else ""


def _command(root: Path, arguments: Sequence[str]) -> Ran:
    """Run a command in a forked process: a start of Python each would take most of the time."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as err:
        pid = os.fork()
        if pid == 0:
            _run_in_child(root, arguments, err.fileno())
        status, seconds = _wait(pid)
        err.seek(0)
        said = err.read()
    mib = int(said.rpartition("VmHWM:")[2].split()[0]) // 1024 if "VmHWM:" in said else 0
    return Ran(os.waitstatus_to_exitcode(status), seconds, mib, said)


def _wait(pid: int) -> tuple[int, float]:
    """How it ended, and the processor's seconds that it took."""
    deadline = time.monotonic() + HUNG_AFTER_S
    while time.monotonic() < deadline:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return status, used.ru_utime + used.ru_stime
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1], HUNG_AFTER_S


def _run_in_child(root: Path, arguments: Sequence[str], err: int) -> None:
    code = 99
    try:
        os.chdir(root)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number, handle in enumerate((nothing, nothing, err)):
            os.dup2(handle, number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", errors="replace") for n in range(3))  # noqa: SIM115, PTH123
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        os.environ.update(LABCTL_HOME=str(root), LABCTL_DEBUG="1")
        code = run(list(arguments))
        sys.stdout.flush()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:  # beyond what the command line turns into a message
        print(f"beyond: {type(error).__name__}: {error}", file=sys.stderr)
        code = EXIT_DEFECT
    finally:
        with contextlib.suppress(Exception):
            peak = next(line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if "VmHWM" in line)
            print(peak, file=sys.stderr, flush=True)
        os._exit(code)


def _environment(folder: Path) -> None:
    """Nothing of this machine: no settings, no hub, no Slurm."""
    for variable in [name for name in os.environ if name.startswith(("LABCTL_", "SLURM_"))]:
        del os.environ[variable]
    for variable in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR", "PATH"):
        (folder / variable).mkdir()
        os.environ[variable] = str(folder / variable)
    os.environ["HF_HUB_OFFLINE"] = os.environ["LABCTL_NO_PREFLIGHT"] = "1"
    tempfile.tempdir = None


# Root reads also what nobody may read, unless these rights are taken from it.
RIGHTS = "-dac_override,-dac_read_search"


def _without_roots_rights() -> None:
    """Start this again as a person like others."""
    setpriv = Path("/usr/bin/setpriv")
    if os.geteuid() == 0 and setpriv.exists() and "FUZZ_AS_A_PERSON" not in os.environ:
        os.environ["FUZZ_AS_A_PERSON"] = "1"
        taken = ["--bounding-set", RIGHTS, "--inh-caps", RIGHTS]
        os.execv(setpriv, [str(setpriv), *taken, sys.executable, "-m", "tests.fuzz", *sys.argv[1:]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--commands", type=int, default=5)
    parser.add_argument("--only", type=int, help="the number of one mutation")
    options = parser.parse_args()
    _without_roots_rights()
    print(f"seed {options.seed}", flush=True)
    _import_all()
    with tempfile.TemporaryDirectory(prefix="labctl-fuzz-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        _environment(Path(name))
        return _fuzz(Path(name), options)


def _import_all() -> None:
    """Import every module before the forks: an import in each command would take half of the time."""
    for package in (labctl_orchestrator, labctl_slurm):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def _fuzz(scratch: Path, options: argparse.Namespace) -> int:
    template = scratch / "HOME" / "template"
    run_ids = make_workspace(template)
    lines = commands(run_ids)
    for line in lines:
        if (ran := _command(template, line)).code not in (0, 1, 2, 3, 4) or ran.fault:
            print(f"labctl {' '.join(line)} does not work on a workspace that is whole: {ran}")
            return 1
    faults, ran_in_all, most_mib, most_s = 0, 0, 0, 0.0
    for number in range(options.mutations) if options.only is None else [options.only]:
        draw = random.Random(f"{options.seed} {number}")
        root = scratch / "HOME" / f"work-{number}"
        shutil.copytree(template, root, symlinks=True)
        what = mutate(root, draw)
        for line in draw.sample(lines, options.commands):
            ran = _command(root, line)
            ran_in_all, most_mib, most_s = ran_in_all + 1, max(most_mib, ran.mib), max(most_s, ran.seconds)
            if ran.fault:
                faults += 1
                said = " | ".join(text for text in ran.err.splitlines() if text.strip())[-600:]
                print(f"--only {number}: {what}\n  labctl {' '.join(line)}: {ran.fault}\n  {said}", flush=True)
        _remove(root)
    print(f"{ran_in_all} commands, {faults} faults; at most {most_mib} MiB, {most_s:.1f} s")
    return 1 if faults else 0


def _remove(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
