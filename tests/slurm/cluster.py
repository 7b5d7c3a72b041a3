"""A real, private Slurm cluster on one Debian 12 machine, for end-to-end tests.

munged, MariaDB, slurmdbd, slurmctld and one slurmd per node run under one directory, on loopback
ports of their own, without systemd. The nodes' GPUs are stand-ins: Slurm schedules, binds and
accounts for them, but no job can compute on them (``real_gpus`` is the exception).

For a person::

    python -m tests.slurm.cluster start DIR     # prints the line that points a shell at the cluster
    python -m tests.slurm.cluster stop DIR
"""

from __future__ import annotations

import atexit
import json
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.debian import SYSTEM_PATH, install
from tests.parts import PartMissing

CLUSTER_NAME: Final = "labctl"
ACCOUNT: Final = "eecs"
PROGRAMS: Final = ("slurmctld", "slurmd", "sbatch", "sacct", "slurmdbd", "munged", "mariadbd")
PACKAGES: Final = ("slurmctld", "slurmd", "slurm-client", "slurmdbd", "munge", "mariadb-server-core")
# A folder that root.sh made: its Slurm is used instead of this machine's.
ROOT_VARIABLE: Final = "LABCTL_TEST_SLURM_ROOT"
DEFAULT_DIRECTORY: Final = Path(tempfile.gettempdir()) / "labctl-slurm"

# Marks slurmd, and by inheritance its slurmstepds, with the node they play: all nodes share one hostname.
NODE_VARIABLE: Final = "LABCTL_SLURM_TEST_NODE"
V100_PER_NODE: Final = 16
H100_PER_NODE: Final = 8
FIRST_NODE_PORT: Final = 10
# Below the kernel's ephemeral ports, so that no outgoing connection sits on a port that was free when probed.
PORT_BLOCKS: Final = range(20000, 32000, 50)
# The address of a UNIX socket holds 108 bytes, its closing zero included.
SOCKET_PATH_LIMIT: Final = 107
MAX_JOB_ID: Final = 10_001_000  # of _first_job_id
BATCH_STEP_ID: Final = 0xFFFFFFFB
POLL_INTERVAL_S: Final = 0.05
LOG_TAIL_LINES: Final = 15

SACCT_FIELDS: Final = (
    "JobID",
    "JobIDRaw",
    "JobName",
    "User",
    "Account",
    "Partition",
    "State",
    "ExitCode",
    "Reason",
    "NodeList",
    "ReqTRES",
    "AllocTRES",
    "Submit",
    "Start",
    "End",
    "Elapsed",
    "Timelimit",
    "Restarts",  # newer than Debian 12's Slurm
)


class ClusterFailure(RuntimeError):
    """The cluster did not reach a state in time; the message ends with the tails of its logs."""


def install_slurm() -> None:
    """Install Debian's Slurm packages if a program is missing.

    Raises PartMissing when this user cannot install them, or apt-get fails.
    """
    install(PACKAGES, _missing_programs)


def _missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]


def slurm_root() -> Path | None:
    """The folder of the Slurm to test; None for this machine's own."""
    root = os.environ.get(ROOT_VARIABLE)
    return Path(root) if root else None


def _search_path() -> str:
    root = slurm_root()
    return SYSTEM_PATH if root is None else f"{root / 'programs'}:{SYSTEM_PATH}"


def _plugins() -> dict[str, object]:
    root = slurm_root()
    return {} if root is None else {"PluginDir": next(root.glob("usr/lib/*/slurm-wlm"))}


@dataclass(frozen=True)
class Process:
    """One process, told apart from a later one with the same pid by when it started."""

    pid: int
    started_ticks: int  # clock ticks since boot

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with this pid, or None. A zombie is dead: PID 1 may reap late."""
        try:
            # The second field, the program's name in parentheses, may itself hold spaces and parentheses.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in {"Z", "X"} else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, signal_number: int) -> None:
        """Send a signal, unless the process is gone (its pid may belong to another by now)."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)

    def name(self) -> str:
        """Of its program, cut to 15 characters; empty when it is gone."""
        try:
            return Path(f"/proc/{self.pid}/comm").read_text().strip()
        except OSError:
            return ""

    def environment(self) -> dict[str, str]:
        """What it was started with; empty when it is gone or belongs to another user."""
        try:
            entries = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return {}
        return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)

    def descendants(self) -> set[Process]:
        found: set[Process] = set()
        unvisited = [self]
        while unvisited:
            for child in unvisited.pop().children():
                if child not in found:
                    found.add(child)
                    unvisited.append(child)
        return found

    def parent(self) -> Process | None:
        try:
            return Process.of(int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1]))
        except OSError:
            return None

    def children(self) -> set[Process]:
        pids: list[str] = []
        for listing in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(OSError):
                pids += listing.read_text().split()
        return {child for pid in pids if (child := Process.of(int(pid))) is not None}


def _living_processes() -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (process := Process.of(int(entry.name))) is not None:
            yield process


@dataclass
class SlurmCluster:
    """A Slurm cluster under ``directory``; nothing runs before ``start``.

    ``base_port`` None finds a free block of loopback ports. ``kill_wait_s`` is Slurm's KillWait, the
    seconds between SIGTERM and SIGKILL. ``cred_expire_s`` is how long a requeued job waits before it may
    start again. ``accounting`` False leaves out slurmdbd and MariaDB, as some sites do.
    ``job_requeue`` False is a site whose jobs are not requeued unless they ask for it (JobRequeue=0).
    ``grace_s`` makes a partition ``urgent`` on the dgxh nodes, whose jobs preempt those of dgxh after that many seconds of grace.
    ``accounting_of`` is the directory of a running cluster whose munged and slurmdbd this one shares, under another ``name``.
    ``dgxh_gpu`` is the type of the GPUs of the dgxh nodes in Slurm, such as that of a MIG slice.
    ``job_submit`` is the Lua of a job_submit plugin. ``max_job_count`` is Slurm's MaxJobCount, the length of its queue.
    ``real_gpus`` N > 0 makes one node, dgxh-1, of this machine and its /dev/nvidia0 to N-1.

    Used as a context manager it starts and stops. If this process ends without ``stop``, even by
    SIGKILL, a guard process stops the cluster.
    """

    directory: Path
    base_port: int | None = None
    dgx2_nodes: int = 2
    dgxh_nodes: int = 2
    kill_wait_s: int = 3
    max_array_size: int = 1001
    accounting: bool = True
    accounting_of: str = ""
    name: str = CLUSTER_NAME
    real_gpus: int = 0
    cred_expire_s: int = 10
    job_requeue: bool = True
    grace_s: int | None = None
    dgxh_gpu: str = "h100"
    job_submit: str = ""
    max_job_count: int = 20000
    _daemons: dict[str, Process] = field(default_factory=dict, init=False, repr=False)
    # Our own children stay zombies until they are waited for, and only a Popen can wait for them.
    _children: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict, init=False, repr=False)
    _guard: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)
    _owner_pid: int = field(default=0, init=False, repr=False)
    _claim: socket.socket | None = field(default=None, init=False, repr=False)  # of its ports
    _sacct_fields: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self.directory = Path(self.directory).resolve()
        if self.real_gpus > 0:
            self.dgx2_nodes, self.dgxh_nodes = 0, 1
        if not self.nodes:
            raise ValueError("a cluster needs at least one node")
        longest = max(self._sockets(), key=lambda path: len(os.fsencode(path)))
        if len(os.fsencode(longest)) > SOCKET_PATH_LIMIT:
            raise ValueError(f"the directory's path is too long for a UNIX socket: {longest}")

    @classmethod
    def recorded(cls, directory: Path) -> SlurmCluster:
        """The cluster that another process started under ``directory``.

        Raises FileNotFoundError when none was started there.
        """
        record = json.loads(_record_path(directory).read_text())
        settings: dict[str, Any] = record["settings"]
        cluster = cls(directory, **settings)
        cluster._daemons = {name: Process(**identity) for name, identity in record["daemons"].items()}
        return cluster

    # What a test asks

    @property
    def nodes(self) -> list[str]:
        return _numbered("dgx2", self.dgx2_nodes) + _numbered("dgxh", self.dgxh_nodes)

    @property
    def running_daemons(self) -> list[str]:
        """munged, mariadbd, slurmdbd, slurmctld and slurmd-<node>, those of them that run now."""
        return [name for name in self._daemons if self._running(name)]

    @property
    def env(self) -> dict[str, str]:
        """This process's environment, pointed at the cluster.

        Every other SLURM_*, SBATCH_* and similar variable is left out: they override scripts in silence.
        """
        overriding = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SACCT_", "SQUEUE_", "SINFO_", "SCANCEL_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(overriding)}
        root = slurm_root()
        path = {} if root is None else {"PATH": f"{root / 'programs'}:{kept.get('PATH', SYSTEM_PATH)}"}
        return kept | path | {"SLURM_CONF": str(self._slurm_conf)}

    def release(self, job_id: str, *, limit_s: float = 15) -> None:
        """Let a held job go. Until a job has its place in the accounting, Slurm wants to be asked again in a bit."""
        deadline = time.monotonic() + limit_s
        while self.run("scontrol", "release", job_id, check=time.monotonic() > deadline).returncode != 0:
            time.sleep(0.2)

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment; ``timeout`` in seconds.

        Raises subprocess.CalledProcessError, its output added as a note, when ``check`` and the command fails.
        """
        try:
            return subprocess.run(
                argv,
                env=self.env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=check,
            )
        except subprocess.CalledProcessError as error:
            error.add_note(f"{error.stdout}{error.stderr}".strip())
            raise

    def job(self, slurm_id: int | str) -> dict[str, str]:
        """What the accounting database knows of a job: sacct's columns by name.

        {} while it knows nothing: up to a second after sbatch, several for an array's tasks.
        Raises ValueError on a cluster without accounting.
        """
        if not self.accounting:
            raise ValueError("this cluster keeps no accounting")
        # A job's name may hold sacct's usual delimiter.
        delimiter = "\x1f"
        listing = self.run(
            "sacct", "-X", "-P", f"--delimiter={delimiter}", "-j", str(slurm_id), "-o", self._known_sacct_fields()
        )
        header, *rows = listing.stdout.splitlines()
        return dict(zip(header.split(delimiter), rows[0].split(delimiter), strict=False)) if rows else {}

    def add_account(self, name: str) -> None:
        """Let this user charge a second account."""
        self._check_accounting()
        named = (f"Cluster={self.name}", f"Description={name}", f"Organization={name}")
        self.run("sacctmgr", "-i", "-Q", "add", "account", name, *named)
        self.run("sacctmgr", "-i", "-Q", "add", "user", _user_name(), f"Account={name}", f"Cluster={self.name}")

    def remove_account(self, name: str) -> None:
        """Take it back, with what this user had to do with it."""
        self.run("sacctmgr", "-i", "-Q", "remove", "user", _user_name(), f"Account={name}", f"Cluster={self.name}")
        self.run("sacctmgr", "-i", "-Q", "remove", "account", name)

    def wait_idle(self, timeout_s: float = 30) -> None:
        """Wait until every node answers and runs nothing. Raises ClusterFailure after ``timeout_s``."""
        expected = {f"{node} idle" for node in self.nodes}

        def all_idle() -> bool:
            return set(self._output("sinfo", "-h", "-N", "-o", "%N %T").splitlines()) == expected

        launched = [_slurmd(node) for node in self.nodes if _slurmd(node) in self._daemons]
        self._wait_for("every node to be idle", all_idle, timeout_s, *launched)

    # The whole cluster

    def start(self, *, keep: bool = False) -> None:
        """Start every daemon and wait until all nodes are idle.

        ``keep`` leaves the cluster running when this process ends. Raises PartMissing when this machine
        cannot run it, ClusterFailure when a daemon does not come up.
        """
        self._check_machine()
        self._refuse_second_start()
        if self.base_port is None:
            self.base_port, self._claim = _free_port_block(FIRST_NODE_PORT + len(self.nodes))
        self._write_configuration()
        self._record()
        if not keep:
            self._stop_when_this_process_ends()
        try:
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the cluster, jobs included, by recorded pid. Harmless when nothing runs."""
        # It takes a second to save its state, which is time enough to end the nodes.
        if controller := self._daemons.get("slurmctld"):
            controller.send(signal.SIGTERM)
        for node in self.nodes:
            self.kill_node(node)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(name, signal.SIGTERM)
        self._dismiss_guard()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # Its parts, which tests take away and give back

    def kill_node(self, name: str) -> None:
        """SIGKILL all that runs on a node at once, as a power cut would: slurmd, slurmstepds, jobs.

        The controller gives up the node, and requeues or fails its jobs, after about half a minute. If the node
        is back before that, the controller believes in its jobs for a minute or more: it goes by the machine's
        boot time, which a restarted slurmd does not change.
        """
        self._check_node(name)
        # First slurmd, so that nothing new starts; then slurmstepd, or it tells the controller that its job has ended; then
        # rounds, for what forked while we looked.
        self._end(_slurmd(name), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while remaining := self._processes_on(name):
            if time.monotonic() > deadline:
                raise self._failure(f"processes on {name} outlived SIGKILL: {sorted(p.pid for p in remaining)}")
            for process in sorted(remaining, key=lambda process: process.name() != "slurmstepd"):
                process.send(signal.SIGKILL)
            time.sleep(POLL_INTERVAL_S)

    def start_node(self, name: str) -> None:
        """Start a node's slurmd and wait until it has registered with the controller, if that runs."""
        self._check_node(name)
        # scontrol shows whole seconds.
        launched_at = datetime.now().replace(microsecond=0)
        self._launch_node(name)
        self._wait_for_port(_slurmd(name), self._node_port(name))
        if self._running("slurmctld"):
            self._wait_for(f"{name} to register", lambda: self._registered_since(name, launched_at), 20, _slurmd(name))

    def stop_controller(self, signal: int = signal.SIGTERM) -> None:
        """End slurmctld and wait until it is gone; SIGKILL loses the last seconds of its state, job ids too."""
        self._end("slurmctld", signal)

    def start_controller(self) -> None:
        """Start slurmctld with the state it left, and wait until it answers."""
        self._launch_controller()
        self._wait_for_controller()

    def stop_database_daemon(self) -> None:
        """End slurmdbd: sacct fails at once, the queue goes on."""
        self._check_accounting()
        self._end("slurmdbd", signal.SIGTERM)

    def start_database_daemon(self) -> None:
        """Start slurmdbd and wait until it answers; records that slurmctld held back follow seconds later."""
        self._check_accounting()
        self._launch("slurmdbd", "slurmdbd", "-D")
        self._wait_for_port("slurmdbd", self._port(1))
        self._wait_for("slurmdbd to answer", lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"), 20)

    def stop_munge(self, signal: int = signal.SIGTERM) -> None:
        """End munged: every Slurm command now takes most of a minute to fail."""
        self._end("munged", signal)

    def start_munge(self) -> None:
        """Start munged and wait until it takes connections."""
        self._launch(
            "munged",
            "munged",
            "--foreground",
            # Without it munged refuses a directory that is closed to other users, as pytest's are, and a socket
            # that a killed munged left behind.
            "--force",
            "--num-threads=4",
            f"--key-file={self._munge_key}",
            f"--socket={self._munge_socket}",
            f"--pid-file={self.directory / 'run' / 'munged.pid'}",
            f"--seed-file={self.directory / 'munge' / 'seed'}",
            f"--log-file={self._log('munged')}",
        )
        self._wait_for("munged to take connections", lambda: _unix_socket_open(self._munge_socket), 10, "munged")

    # Start-up

    def _check_machine(self) -> None:
        if missing := _missing_programs():
            raise PartMissing(f"{', '.join(missing)} not installed; call install_slurm() as root")
        try:
            _user_name()
        except KeyError as error:
            raise PartMissing(f"user {os.geteuid()} has no name, and Slurm knows users by name") from error
        for device in _real_gpu_devices(self.real_gpus):
            if not device.is_char_device():
                raise PartMissing(f"{device} is no device; real_gpus={self.real_gpus} needs the driver's devices")

    def _refuse_second_start(self) -> None:
        with suppress(FileNotFoundError):
            if running := SlurmCluster.recorded(self.directory).running_daemons:
                raise ClusterFailure(f"a cluster already runs under {self.directory}: {', '.join(running)}")

    def _start_daemons(self) -> None:
        if self.accounting_of:
            self._create_associations()
        else:
            self.start_munge()
        if self.accounting and not self.accounting_of:
            self._start_database()
            self.start_database_daemon()
            self._create_associations()
        # -c: jobs of a former cluster in the same directory must not come back to life.
        self._launch_controller("-c")
        for node in self.nodes:
            self._launch_node(node)
        self._wait_for_controller()
        self.wait_idle()

    def _start_database(self) -> None:
        if not (self._database / "slurm_acct_db").is_dir():
            self._create_database()
        self._launch(
            "mariadbd",
            "mariadbd",
            *self._database_options(),
            f"--socket={self._database_socket}",
            f"--pid-file={self.directory / 'run' / 'mariadbd.pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self._port(2)}",
            "--skip-name-resolve",
            "--innodb-buffer-pool-size=64M",
            # slurmdbd's own requirement; it warns below 900 s.
            "--innodb-lock-wait-timeout=900",
            "--max-allowed-packet=16M",
            f"--init-file={self._etc / 'accounts.sql'}",
        )
        self._wait_for_port("mariadbd", self._port(2))

    def _create_database(self) -> None:
        """Create the system tables; Debian's script for that needs a package that Slurm does not."""
        sources = [Path("/usr/share/mysql"), Path("/usr/share/mariadb")]
        tables = next((path for path in sources if (path / "mysql_system_tables.sql").exists()), None)
        if tables is None:
            raise PartMissing("mysql_system_tables.sql not found; as root: apt-get install mariadb-server-core")
        # Bootstrap mode reads one statement a line.
        script = "CREATE DATABASE IF NOT EXISTS mysql;\nUSE mysql;\n"
        script += (tables / "mysql_system_tables.sql").read_text()
        script += (tables / "mysql_system_tables_data.sql").read_text()
        script += "\nCREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
        with self._log("mariadbd").open("ab") as log:
            done = subprocess.run(
                [_program("mariadbd"), *self._database_options(), "--bootstrap"],
                input=script.encode(),
                stdout=log,
                stderr=log,
                timeout=60,
                check=False,
            )
        if done.returncode != 0:
            raise self._failure(f"creating the database failed with exit status {done.returncode}")

    def _database_options(self) -> list[str]:
        options = [
            "--no-defaults",
            f"--datadir={self._database}",
            f"--tmpdir={self.directory / 'db-tmp'}",
            "--innodb-log-file-size=8M",
            "--innodb-data-file-path=ibdata1:4M:autoextend",
            "--innodb-flush-log-at-trx-commit=0",
            "--skip-log-bin",
        ]
        # As root it refuses to run unless told that root is meant.
        return [*options, "--user=root"] if os.geteuid() == 0 else options

    def _create_associations(self) -> None:
        """Create cluster, account and user: with enforcement slurmctld refuses to start before its cluster exists."""
        user = _user_name()
        for arguments in (
            ("cluster", self.name),
            ("account", ACCOUNT, f"Cluster={self.name}", f"Description={ACCOUNT}", f"Organization={ACCOUNT}"),
            ("user", user, f"Account={ACCOUNT}", f"DefaultAccount={ACCOUNT}", f"Cluster={self.name}"),
        ):
            # Fails when it exists already, in a directory used before; the listing below decides.
            self.run("sacctmgr", "-i", "-Q", "add", *arguments, check=False)
        expected = f"{self.name}|{ACCOUNT}|{user}"
        listing = self.run("sacctmgr", "-n", "-P", "show", "associations", "format=Cluster,Account,User").stdout
        if expected not in listing.splitlines():
            raise self._failure(f"the accounting database lacks {expected}, it has:\n{listing}")

    def _launch_controller(self, *options: str) -> None:
        self._launch("slurmctld", "slurmctld", "-D", "-f", str(self._slurm_conf), *options)

    def _launch_node(self, name: str) -> None:
        options = ["-D", "-f", str(self._slurm_conf), "-N", name]
        if slurm_root() is not None:
            options += ["-d", _program("slurmstepd")]
        self._launch(_slurmd(name), "slurmd", *options, environment={NODE_VARIABLE: name})

    def _wait_for_controller(self) -> None:
        # scontrol retries for 9 s where nothing listens: first the port, then the question.
        self._wait_for_port("slurmctld", self._port(0))
        self._wait_for("slurmctld to answer", lambda: " is UP" in self._output("scontrol", "ping"), 20, "slurmctld")

    def _registered_since(self, name: str, launched_at: datetime) -> bool:
        words = self._output("scontrol", "show", "node", name).split()
        values = dict(word.split("=", 1) for word in words if "=" in word)
        try:
            slurmd_started_at = datetime.fromisoformat(values["SlurmdStartTime"])
        except (KeyError, ValueError):  # "None" before the first registration
            return False
        states = set(values["State"].rstrip("*").split("+"))
        return slurmd_started_at >= launched_at and states.isdisjoint({"DOWN", "UNKNOWN", "NOT_RESPONDING"})

    # Daemons

    def _launch(self, name: str, program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a daemon in a session of its own, so that Ctrl-C at the test's terminal does not reach it."""
        if self._running(name):
            raise ClusterFailure(f"{name} runs already")
        base = {"PATH": _search_path(), "LC_ALL": "C", "SLURM_CONF": str(self._slurm_conf)}
        if "TZ" in os.environ:
            base["TZ"] = os.environ["TZ"]
        with self._log(name).open("ab") as log:
            child = subprocess.Popen(
                [_program(program), *arguments],
                env=base | dict(environment or {}),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        process = Process.of(child.pid)
        if process is None:
            raise self._failure(f"{name} ended at once with exit status {child.wait()}")
        self._children[child.pid] = child
        self._daemons[name] = process
        self._record()

    def _running(self, name: str) -> bool:
        process = self._daemons.get(name)
        if process is None:
            return False
        if child := self._children.get(process.pid):
            child.poll()
        return process.alive()

    def _end(self, name: str, signal_number: int) -> None:
        """Signal a daemon and wait until it is gone; after 10 s, SIGKILL."""
        process = self._daemons.get(name)
        if process is None:
            return
        for number in (signal_number, signal.SIGKILL):
            process.send(number)
            deadline = time.monotonic() + 10
            while self._running(name) and time.monotonic() < deadline:
                time.sleep(POLL_INTERVAL_S)
            if not self._running(name):
                break
        del self._daemons[name]
        if child := self._children.pop(process.pid, None):
            with suppress(subprocess.TimeoutExpired):
                child.wait(1)
        self._record()

    def _processes_on(self, node: str) -> set[Process]:
        """slurmd, slurmstepds and jobs of a node, with all that they started, also what cut its ties to them.

        slurmstepd leaves its parent and renames itself, a job may do the same: the environment they were
        started with tells them apart from those of other nodes and other clusters.
        """
        conf = str(self._slurm_conf)
        found: set[Process] = set()
        for process in _living_processes():
            environment = process.environment()
            names = (environment.get(NODE_VARIABLE), environment.get("SLURMD_NODENAME"))
            if environment.get("SLURM_CONF") == conf and node in names:
                found |= {process} | process.descendants()
                # That of Slurm 26.05 has no environment.
                if (parent := process.parent()) is not None and parent.name() == "slurmstepd":
                    found.add(parent)
        return {process for process in found if process.pid != os.getpid()}

    def _record(self) -> None:
        """Write down what another process needs to stop the cluster."""
        names = [setting.name for setting in fields(self) if setting.init and setting.name != "directory"]
        settings = {name: getattr(self, name) for name in names}
        record = {"settings": settings, "daemons": {name: asdict(process) for name, process in self._daemons.items()}}
        path = _record_path(self.directory)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(record, indent=1))
        unfinished.replace(path)

    # The end of this process

    def _stop_when_this_process_ends(self) -> None:
        self._owner_pid = os.getpid()
        atexit.register(self._stop_at_exit)
        # A signal leaves atexit no chance. The guard's standard input ends with this process, however it ends.
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.cluster", "guard", str(self.directory)],
            cwd=Path(__file__).parent.parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _stop_at_exit(self) -> None:
        # A forked child inherits the registration, not the cluster.
        if os.getpid() == self._owner_pid:
            self.stop()

    def _dismiss_guard(self) -> None:
        atexit.unregister(self._stop_at_exit)
        if self._guard is None:
            return
        guard, self._guard = self._guard, None
        # Killed, not told to end: with nothing left to stop, its own round would only cost time.
        guard.kill()
        guard.communicate()

    # Waiting

    def _wait_for(self, what: str, condition: Callable[[], bool], limit_s: float, *daemons: str) -> None:
        """Poll ``condition``; raises ClusterFailure after ``limit_s``, or at once when one of ``daemons`` has ended."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if ended := [daemon for daemon in daemons if not self._running(daemon)]:
                raise self._failure(f"waited for {what}, but {', '.join(ended)} ended")
            if time.monotonic() > deadline:
                raise self._failure(f"waited {limit_s:g} s for {what}")
            time.sleep(POLL_INTERVAL_S)

    def _wait_for_port(self, daemon: str, port: int) -> None:
        self._wait_for(f"{daemon} to listen on port {port}", lambda: _port_open(port), 20, daemon)

    def _output(self, *argv: str) -> str:
        """A command's output; empty when it fails or hangs."""
        try:
            return self.run(*argv, check=False, timeout=10).stdout
        except subprocess.TimeoutExpired:
            return ""

    def _succeeds(self, *argv: str) -> bool:
        try:
            return self.run(*argv, check=False, timeout=10).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _failure(self, message: str) -> ClusterFailure:
        parts = [message]
        if self._running("slurmctld"):
            parts.append(f"== sinfo\n{self._output('sinfo', '-N', '-l').strip()}")
        for log in sorted(self._logs.glob("*.log")):
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
            parts.append("\n".join([f"== {log}", *tail]))
        return ClusterFailure("\n".join(parts))

    def _known_sacct_fields(self) -> str:
        if not self._sacct_fields:
            known = set(self.run("sacct", "--helpformat").stdout.split())
            self._sacct_fields = ",".join(name for name in SACCT_FIELDS if name in known)
        return self._sacct_fields

    def _check_node(self, name: str) -> None:
        if name not in self.nodes:
            raise ValueError(f"no node {name!r}; there are {', '.join(self.nodes)}")

    def _check_accounting(self) -> None:
        if not self.accounting:
            raise ValueError("this cluster runs without slurmdbd")

    # Configuration

    @property
    def _etc(self) -> Path:
        return self.directory / "etc"

    @property
    def _logs(self) -> Path:
        return self.directory / "log"

    @property
    def _database(self) -> Path:
        return self.directory / "db"

    @property
    def _slurm_conf(self) -> Path:
        return self._etc / "slurm.conf"

    @property
    def _munge_key(self) -> Path:
        return self._etc / "munge.key"

    def _sockets(self) -> Iterator[Path]:
        """Every UNIX socket of the cluster. Where that of a job's step is too long, each launch fails after a minute."""
        yield self._munge_socket
        yield self._database_socket
        for node in self.nodes:
            yield self.directory / "spool" / node / f"{node}_{MAX_JOB_ID}.{BATCH_STEP_ID}"

    @property
    def _shared(self) -> SlurmCluster:
        """The cluster whose munged and slurmdbd this one uses."""
        return SlurmCluster.recorded(Path(self.accounting_of)) if self.accounting_of else self

    @property
    def _munge_socket(self) -> Path:
        if self.accounting_of:
            return self._shared._munge_socket
        return self.directory / "munge" / "socket"

    @property
    def _database_socket(self) -> Path:
        return self.directory / "run" / "mariadbd.socket"

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _port(self, offset: int) -> int:
        """Of the block: 0 slurmctld, 1 slurmdbd, 2 MariaDB, from 10 the nodes."""
        if self.base_port is None:
            raise ValueError("the cluster has no ports before start()")
        return self.base_port + offset

    def _node_port(self, name: str) -> int:
        return self._port(FIRST_NODE_PORT + self.nodes.index(name))

    def _write_configuration(self) -> None:
        for name in ("etc", "log", "run", "munge", "state", "db", "db-tmp", *(f"spool/{node}" for node in self.nodes)):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        if not self._munge_key.exists():
            _write_private(self._munge_key, os.urandom(128))
        slurm_conf = self._settings() | (self._accounting_settings() if self.accounting else {})
        _write_lines(self._slurm_conf, _assignments(slurm_conf) + self._node_lines() + self._partition_lines())
        _write_lines(self._etc / "gres.conf", self._gres_lines())
        # slurmd loads a cgroup plugin even when nothing uses it. The one for v2 then asks systemd, rearranges the
        # host's groups and refuses some hosts; the one for v1 touches nothing before it is used, on any host.
        _write_lines(self._etc / "cgroup.conf", ["CgroupPlugin=cgroup/v1"])
        (self._etc / "job_submit.lua").write_text(self.job_submit)
        if self.accounting:
            # slurmdbd refuses a file that others may read.
            dbd_conf = "\n".join(_assignments(self._database_daemon_settings())) + "\n"
            _write_private(self._etc / "slurmdbd.conf", dbd_conf.encode())
            _write_lines(
                self._etc / "accounts.sql",
                [
                    "CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';",
                    "GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';",
                ],
            )

    def _settings(self) -> dict[str, object]:
        user = _user_name()
        run = self.directory / "run"
        return {
            "ClusterName": self.name,
            "SlurmctldHost": f"{socket.gethostname().partition('.')[0]}(127.0.0.1)",
            "SlurmctldPort": self._port(0),
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._munge_socket},cred_expire={self.cred_expire_s}",
            "CredType": "cred/munge",
            "StateSaveLocation": self.directory / "state",
            "SlurmdSpoolDir": self.directory / "spool" / "%n",
            "SlurmctldPidFile": run / "slurmctld.pid",
            "SlurmdPidFile": run / "slurmd-%n.pid",
            "SlurmctldDebug": "info",
            "SlurmdDebug": "info",
            # One host plays machines larger than itself; no cgroups, as most machines that run tests grant none.
            "SlurmdParameters": "config_overrides",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "MailProg": "/bin/true",
            **_plugins(),
            # Loopback only.
            "CommunicationParameters": "NoInAddrAny,NoCtldInAddrAny",
            "JobAcctGatherType": "jobacct_gather/linux",
            # Slurm's default: a look at every mapping of every process takes much of what two processors have.
            "JobAcctGatherFrequency": "task=30",
            "JobAcctGatherParams": "OverMemoryKill,UsePss",
            "AccountingStorageType": "accounting_storage/none",
            "SchedulerType": "sched/backfill",
            # Microseconds, seconds, seconds: a test must not wait a site's half minute for its job to start.
            "SchedulerParameters": "sched_min_interval=100000,batch_sched_delay=1,bf_interval=5",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "PriorityType": "priority/basic",
            "GresTypes": "gpu",
            "FirstJobId": _first_job_id(),
            "MaxArraySize": self.max_array_size,
            "MaxJobCount": max(self.max_job_count, 2 * self.max_array_size),
            "DefMemPerCPU": 1024,
            "ReturnToService": 2,
            "SlurmctldTimeout": 30,
            "SlurmdTimeout": 10,
            "MessageTimeout": 10,
            "KillWait": self.kill_wait_s,
            "MinJobAge": 300,
            "InactiveLimit": 0,
            "JobRequeue": int(self.job_requeue),
            **({"JobSubmitPlugins": "lua"} if self.job_submit else {}),
            **({} if self.grace_s is None else {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE"}),
        }

    def _accounting_settings(self) -> dict[str, object]:
        return {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": self._shared._port(1),
            # No password: the path of the munge socket goes here.
            "AccountingStoragePass": self._munge_socket,
            "AccountingStorageEnforce": "associations,limits,qos",
            "AccountingStorageTRES": "gres/gpu",
            "PriorityType": "priority/multifactor",
        }

    def _database_daemon_settings(self) -> dict[str, object]:
        return {
            "DbdHost": "localhost",
            "DbdAddr": "127.0.0.1",
            "DbdPort": self._port(1),
            "SlurmUser": _user_name(),
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._munge_socket}",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": self._port(2),
            "StorageUser": "slurm",
            "StoragePass": "slurm",
            "StorageLoc": "slurm_acct_db",
            "PidFile": self.directory / "run" / "slurmdbd.pid",
            "DebugLevel": "info",
            **_plugins(),
        }

    def _node_lines(self) -> list[str]:
        return [
            f"NodeName={name} NodeAddr=127.0.0.1 Port={self._node_port(name)} {self._hardware(name)}"
            for name in self.nodes
        ]

    def _hardware(self, name: str) -> str:
        if self.real_gpus > 0:
            memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10 // 2**20
            return f"CPUs={os.cpu_count()} RealMemory={memory_mib} Gres=gpu:h100:{self.real_gpus} Feature=h100"
        if name.startswith("dgx2-"):
            return (
                "Sockets=2 CoresPerSocket=24 ThreadsPerCore=1 RealMemory=1500000"
                f" Gres=gpu:v100:{V100_PER_NODE} Feature=v100"
            )
        return (
            "Sockets=2 CoresPerSocket=56 ThreadsPerCore=1 RealMemory=2000000"
            f" Gres=gpu:{self.dgxh_gpu}:{H100_PER_NODE} Feature=h100"
        )

    def _partition_lines(self) -> list[str]:
        limits = {"gpu": "Default=YES MaxTime=7-00:00:00", "dgx2": "MaxTime=7-00:00:00", "dgxh": "MaxTime=2-00:00:00"}
        members = {"gpu": self.nodes, "dgx2": _numbered("dgx2", self.dgx2_nodes)}
        members["dgxh"] = _numbered("dgxh", self.dgxh_nodes)
        if self.grace_s is not None:
            members["urgent"] = members["dgxh"]
            limits["urgent"] = "MaxTime=1:00:00 PriorityTier=10 PreemptMode=OFF"
            limits["dgxh"] += f" PreemptMode=REQUEUE GraceTime={self.grace_s}"
        return [
            f"PartitionName={name} Nodes={','.join(nodes)} {limits[name]} DefaultTime=12:00:00 State=UP"
            for name, nodes in members.items()
            if nodes
        ]

    def _gres_lines(self) -> list[str]:
        if self.real_gpus > 0:
            return [_gres_line("dgxh-1", "h100", _real_gpu_devices(self.real_gpus))]
        devices = self._stand_in_devices(V100_PER_NODE)
        return [
            _gres_line(name, "v100", devices)
            if name.startswith("dgx2-")
            else _gres_line(name, self.dgxh_gpu, devices[:H100_PER_NODE])
            for name in self.nodes
        ]

    def _stand_in_devices(self, count: int) -> list[Path]:
        """Character devices to stand in for GPUs: with anything else jobs get no CUDA_VISIBLE_DEVICES.

        Slurm only looks at them, it never opens one.
        """
        terminals = [Path(f"/dev/tty{index}") for index in range(count)]
        if all(path.is_char_device() for path in terminals):
            return terminals
        folder = self.directory / "devices"
        folder.mkdir(exist_ok=True)
        devices = [folder / f"gpu{index}" for index in range(count)]
        try:
            for path in devices:
                if not path.is_char_device():
                    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except OSError as error:
            reason = f"no /dev/tty0 to /dev/tty{count - 1}, and making devices failed ({error.strerror})"
            raise PartMissing(f"{reason}; run as root with the right to mknod") from error
        return devices


def _record_path(directory: Path) -> Path:
    return directory / "cluster.json"


def _slurmd(node: str) -> str:
    return f"slurmd-{node}"


def _numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(1, count + 1)]


def _program(name: str) -> str:
    path = shutil.which(name, path=_search_path())
    if path is None:
        raise PartMissing(f"{name} not installed; call install_slurm() as root")
    return path


def _user_name() -> str:
    """Of the user the daemons will run as; $LOGNAME may name another, as after su."""
    return pwd.getpwuid(os.geteuid()).pw_name


def _first_job_id() -> int:
    """An id no earlier cluster used: clients name folders by job id, and would read an old cluster's results."""
    return int(time.time()) % 1_000_000 * 10 + 1000


def _assignments(settings: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def _gres_line(node: str, gpu_type: str, devices: Sequence[Path]) -> str:
    return f"NodeName={node} Name=gpu Type={gpu_type} File={','.join(map(str, devices))}"


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(content)


def _real_gpu_devices(count: int) -> list[Path]:
    return [Path(f"/dev/nvidia{index}") for index in range(count)]


def _free_port_block(size: int) -> tuple[int, socket.socket]:
    """The first of ``size`` free ports, and the socket that claims them: no other cluster takes them before that is closed.

    Daemons bind seconds later. The claim is the UDP port of the first number, which Slurm does not use.
    """
    if size > PORT_BLOCKS.step:
        raise ValueError(f"{size} ports are more than a block has: {PORT_BLOCKS.step}")
    for base in random.sample(PORT_BLOCKS, len(PORT_BLOCKS)):
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with suppress(OSError):
            claim.bind(("127.0.0.1", base))
            if all(_port_free(port) for port in range(base, base + size)):
                return base, claim
        claim.close()
    raise ClusterFailure(f"no {size} free ports in a row between {PORT_BLOCKS.start} and {PORT_BLOCKS.stop}")


def _port_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _port_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _unix_socket_open(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        return probe.connect_ex(str(path)) == 0


def _stop_recorded(directory: Path) -> None:
    with suppress(FileNotFoundError):
        SlurmCluster.recorded(directory).stop()


def main(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    directory = Path(arguments[1]).resolve() if arguments[1:] else DEFAULT_DIRECTORY
    if command == "start":
        try:
            install_slurm()
            SlurmCluster(directory).start(keep=True)
        except (PartMissing, ClusterFailure) as error:
            print(error, file=sys.stderr)
            return 1
    if command == "stop":
        _stop_recorded(directory)
        return 0
    if command == "guard":
        sys.stdin.buffer.read()
        _stop_recorded(directory)
        return 0
    if command in {"start", "env"}:
        print(f"export SLURM_CONF={directory / 'etc' / 'slurm.conf'}")
        if root := slurm_root():
            print(f"export PATH={root / 'programs'}:$PATH")
        return 0
    print("usage: python -m tests.slurm.cluster start|stop|env [DIR]", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
