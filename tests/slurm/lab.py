"""The whole lab on a real cluster, as a user would do it, with a transcript: docs/results/ has what it gave on two H100s.

    python -m tests.slurm.lab OUT --model FOLDER --larger FOLDER --real FOLDER [--site FOLDER ...] [--wheels FOLDER] [--quick]

Runs on whatever cluster `sbatch` reaches, in partition dgxh. `--model` and `--larger` are checkpoints (random weights do),
`--real` is one whose texts mean something. A new home gets a virtual environment (with labctl from `--wheels`, or from this
clone) that sees the packages in the folders `--site`; OUT gets transcript.md, the reports and the bundle. `--quick` tries it
without GPUs.

In the sweep of 24 cells the job of transformers is requeued in its middle, and cancelled in the middle of what is then left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.terminal import Terminal

ROOT = Path(__file__).parent.parent.parent
SWEEP = """\
name = "lab"
partition = "dgxh"
model_id = "{model}"
backend = ["hf", "vllm"]
batch_size = {batches}
max_new_tokens = {lengths}
sampling = ["greedy", "temperature=0.7,top_p=0.9,seed=1"]
ignore_eos = true
repeats = {repeats}
"""
GPU_TIME = """labctl query "SELECT backend, count(*) AS jobs, sum(starts) AS starts, sum(runs_done) AS runs_done,
    round(sum(limit_gpu_s)) AS time_limit, round(sum(held_gpu_s)) AS held, round(sum(load_gpu_s)) AS loading,
    round(sum(warmup_gpu_s)) AS warm_up, round(sum(measured_gpu_s)) AS measured
  FROM measured_jobs GROUP BY backend\""""
SACCT = "sacct --duplicates --allocations --format=JobID%-12,State%-14,Submit,Start,Elapsed,Timelimit,AllocTRES%-42"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("model", "larger", "real"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--site", type=Path, nargs="*", default=[])
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--home", type=Path, help="a folder that does not exist yet  [default: a temporary one]")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--within", type=float, default=1500.0, help="seconds: no further part begins after them")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    options = parser.parse_args(arguments)
    options.out = options.out.absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    home = options.home or Path(tempfile.mkdtemp(prefix="ada-"))
    with (options.out / "transcript.md").open("a", encoding="utf-8") as file:
        lab = Lab(options, home, file)
        lab.prepare()
        lab.say(f"Recorded on {datetime.now(UTC):%Y-%m-%d, %H:%M} UTC.")
        for name in options.parts:
            if time.monotonic() - lab.began > options.within:
                lab.say(f"No time was left for: {name}.")
                continue
            started = time.monotonic()
            PARTS[name](lab)
            print(f"[{time.monotonic() - lab.began:.0f} s] {name}: {time.monotonic() - started:.0f} s", flush=True)


class Lab:
    """A user's home, terminal and workspace, and the transcript that comes of them."""

    def __init__(self, options: argparse.Namespace, home: Path, file: Any) -> None:
        self.options, self.home, self.file = options, home, file
        self.began = time.monotonic()
        environment = {**os.environ, "HOME": str(home), "PATH": f"{home}/env/bin:{os.environ['PATH']}", "NO_COLOR": "1"}
        environment.pop("PYTHONPATH", None)
        self.terminal = Terminal(environment, home, columns=150, out=self.put)
        self.models = {name: f"~/models/{folder.name}" for name, folder in self._folders().items()}

    def _folders(self) -> dict[str, Path]:
        return {name: getattr(self.options, name).absolute() for name in ("model", "larger", "real")}

    # ------------------------------------------------------------ what is there before the user comes

    def prepare(self) -> None:
        """The user's home: models, and a virtual environment with labctl that sees torch and the rest."""
        (self.home / "models").mkdir(parents=True, exist_ok=True)
        for folder in set(self._folders().values()):
            if folder.parent != self.home / "models":
                (self.home / "models" / folder.name).symlink_to(folder)
        env = self.home / "env"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
        site = next((env / "lib").glob("python3*")) / "site-packages"
        others = [str(folder.absolute()) for folder in self.options.site]
        others += [path for path in sys.path if path.endswith("-packages")]
        (site / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
        given = sorted(map(str, self.options.wheels.glob("*.whl"))) if self.options.wheels else [str(ROOT)]
        pip = [sys.executable, "-m", "pip", "--python", str(env / "bin" / "python"), "install", "--quiet", "--no-deps"]
        offline = ["--no-index", "--no-compile"] if self.options.wheels else []
        subprocess.run([*pip, *offline, *given], check=True)
        if self.options.quick:
            settings = self.home / ".config" / "labctl" / "labctl.toml"
            settings.parent.mkdir(parents=True)
            settings.write_text(
                '[partitions.dgxh]\ndevice = "cpu"\nenv = { OMP_NUM_THREADS = "1" }\n', encoding="utf-8"
            )

    # ------------------------------------------------------------ the transcript

    def say(self, text: str) -> None:
        self._write(f"{text}\n\n")

    def put(self, text: str) -> None:
        self._write(f"```\n{text.rstrip()}\n```\n\n")

    def _write(self, text: str) -> None:
        self.file.write(text)
        self.file.flush()
        print(text, end="", flush=True)

    def type(self, command: str, within_s: float = 300) -> str:
        return self.terminal.type(command, within_s=within_s)

    def hidden(self, command: str) -> Any:
        """The JSON that a command prints, for what decides how to go on."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.terminal.here, env=self.terminal.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return json.loads(done.stdout)

    def until(self, holds: Callable[[list[dict[str, Any]]], bool], within_s: float = 300) -> None:
        """Wait until that holds of the sweep's runs."""
        until = time.monotonic() + within_s
        while not holds(self.hidden("labctl status lab --json")):
            if time.monotonic() > until:
                raise SystemExit(f"not so after {within_s:.0f} s")
            time.sleep(0.5)

    def keep(self, *names: str) -> None:
        for name in names:
            shutil.copy(self.terminal.here / name, self.options.out / name)


# ---------------------------------------------------------------- the parts


def first_look(lab: Lab) -> None:
    if not lab.options.quick:
        lab.type("nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv")
    lab.type("sinfo")
    lab.type("labctl --version")
    lab.type("labctl init lab --yes")
    lab.terminal.here = lab.home / "lab"
    lab.type(f"labctl doctor -p dgxh --model-id {lab.models['model']} --on-node")
    for name in ("model", "larger"):
        lab.type(f"labctl fit {lab.models[name]} -p dgxh --batch-size 16")


def sweep(lab: Lab) -> None:
    quick = lab.options.quick
    text = SWEEP.format(
        model=lab.models["model"],
        batches=[1, 2, 3] if quick else [1, 16, 64],
        lengths=[8, 16] if quick else [128, 256],
        repeats=2 if quick else 5,
    )
    (lab.terminal.here / "sweep.toml").write_text(text, encoding="utf-8")
    lab.type("cat sweep.toml")
    lab.type("labctl submit sweep.toml")
    lab.until(lambda runs: _done(runs, "hf") >= 3)
    lab.type("labctl status lab")
    job = _job(lab, "hf")
    lab.type(f"scontrol requeue {job}")
    lab.until(lambda runs: not _running(runs, "hf"))
    lab.type("labctl matrix lab")
    before = _done(lab.hidden("labctl status lab --json"), "hf")
    lab.until(lambda runs: _done(runs, "hf") >= before + 3, within_s=500)
    lab.type(f"scancel {job}")
    lab.until(lambda runs: not _running(runs, "hf"))
    lab.type("labctl status lab")
    lab.type("labctl retry lab")
    lab.type("labctl status --watch lab", within_s=500)


def answers(lab: Lab) -> None:
    lab.type("labctl compare lab --by backend --by batch_size --metric output_tok_s")
    lab.type(
        "labctl compare lab --by backend --metric ttft_s --metric tpot_s --where batch_size=1 --where sampling=greedy"
    )
    lab.type("labctl compare lab --by sampling --metric output_tok_s --where backend=vllm --where batch_size=1")
    longest = 16 if lab.options.quick else 256
    lab.type(f"labctl compare lab --by backend --cost --where max_new_tokens={longest} --where sampling=greedy")
    lab.type("labctl report lab -o lab.html && labctl bundle lab --author labctl -o lab.labctl.zip")
    lab.keep("lab.html", "lab.labctl.zip")


def exercises(lab: Lab) -> None:
    models = lab.models
    quick = " --max-new-tokens 8 --repeats 2" if lab.options.quick else ""
    asked = {
        1: f"--model-id {models['real']}",
        3: f"--model-id {models['model']}",
        4: f"--model-id {models['model']} --model-id {models['larger']}",
        5: f"--model-id {models['model']}{' --engine-option compile=false' if quick else ''}",
    }
    for number, options in asked.items():
        lengths = " --max-new-tokens 8 --max-new-tokens 16 --repeats 2" if quick and number == 3 else quick
        lab.type(f"labctl exercise {number} -p dgxh {options}{lengths} --wait", within_s=400)
        lab.type(f"labctl report exercise-{number} -o exercise-{number}.html")
        lab.keep(f"exercise-{number}.html")


def gpu_time(lab: Lab) -> None:
    lab.type(SACCT)
    lab.type(GPU_TIME)


def keep(lab: Lab) -> None:
    shutil.make_archive(str(lab.options.out / "workspace"), "xztar", lab.terminal.here)


PARTS: dict[str, Callable[[Lab], None]] = {
    "first": first_look,
    "sweep": sweep,
    "answers": answers,
    "exercises": exercises,
    "gpu-time": gpu_time,
    "keep": keep,
}


def _of(runs: list[dict[str, Any]], backend: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["backend"] == backend]


def _done(runs: list[dict[str, Any]], backend: str) -> int:
    return sum(run["state"] == "done" for run in _of(runs, backend))


def _running(runs: list[dict[str, Any]], backend: str) -> bool:
    return any(run["state"] == "running" for run in _of(runs, backend))


def _job(lab: Lab, backend: str) -> str:
    runs = _of(lab.hidden("labctl status lab --json"), backend)
    return str(next(run["slurm_id"] for run in runs if run["state"] == "running"))


if __name__ == "__main__":
    main()
