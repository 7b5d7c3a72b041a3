"""What people get wrong, over all commands, files and variables: each is one message with its remedy and the documented exit
code, no traceback, and a workspace that is as it was. Below the tables, the parsers are given what nobody would think of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labctl_orchestrator.cli import COMMANDS
from labctl_orchestrator.models import resolve
from labctl_orchestrator.request import engine_options, request, sampling
from labctl_orchestrator.request import settings as labctl_settings
from labctl_orchestrator.request.prompts import prompts_of
from labctl_orchestrator.request.sweep import Sweep
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm import partitions
from labctl_slurm.errors import LabctlError

from .conftest import JobArray, Labctl, Ran, Records, Slurm, files_below
from .test_cli import arguments_of, one_clear_message

WRONG_USE, PREFLIGHT = 2, 3
SUBMIT = "submit -p dgxh --model-id MODEL"
Line = str | list[str]


@dataclass(frozen=True)
class Wrong:
    """A command line that cannot be right; `says` is in what is answered, `files` and `env` are there before."""

    line: Line
    says: str = ""
    code: int = WRONG_USE
    files: dict[str, str | bytes] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- command lines, where nothing was submitted yet

COMMAND_LINES = {
    "unknown command": Wrong("statsu", "did you mean 'status'?"),
    "a command in capitals": Wrong("Status", "did you mean 'status'?"),
    "an option for a command": Wrong("--status", "labctl --help"),
    "unknown command like none": Wrong("frobnicate", "known: bundle, cancel"),
    "empty command": Wrong([""], "known: bundle, cancel"),
    "unknown option": Wrong("status --everythin", "labctl status --help"),
    "unknown option, nearly right": Wrong("status --wach", "did you mean '--watch'?"),
    "unknown option of submit, nearly right": Wrong(f"{SUBMIT} --max-new-token 8", "did you mean '--max-new-tokens'?"),
    "underscores in an option": Wrong(f"{SUBMIT} --max_new_tokens 8", "did you mean '--max-new-tokens'?"),
    "unknown short option": Wrong("status -z", "labctl status --help"),
    "unknown option of the program": Wrong("--nonsense status", "labctl --help"),
    "missing argument": Wrong("show", "no RUN given\n  -> give a run id, such as 3f9a12 (labctl status lists them): labctl show"),
    "missing argument of logs": Wrong("logs", "labctl logs --help"),
    "too many arguments": Wrong("show a b", "too many arguments: b\n  -> see labctl show --help"),
    "too many arguments for config": Wrong("config dgxh", "labctl config --help"),
    "too many folders": Wrong("init a b", "labctl init --help"),
    "option without its value": Wrong("submit -p"),
    "a value for a flag": Wrong(f"{SUBMIT} --wait=yes"),
    "no partition": Wrong("submit --model-id MODEL", "add --partition"),
    "unknown partition": Wrong("submit -p dgxx --model-id MODEL", "did you mean 'dgx"),
    "unknown partition like none": Wrong("submit -p turing --model-id MODEL", "known: dgx2, dgxh, local"),
    "empty partition": Wrong(["submit", "-p", "", "--model-id", "MODEL"]),
    "partition with a space": Wrong(["submit", "-p", "dgxh ", "--model-id", "MODEL"], "did you mean 'dgxh'?"),
    "two partitions in one": Wrong("submit -p dgx2,dgxh --model-id MODEL"),
    "one right and one wrong partition": Wrong("submit -p dgxh -p dgxx --model-id MODEL"),
    "unknown backend": Wrong(f"{SUBMIT} --backend hff", "did you mean 'hf'?"),
    "backend by its long name": Wrong(f"{SUBMIT} --backend transformers"),
    "empty backend": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--backend", ""]),
    "unknown dtype": Wrong(f"{SUBMIT} --dtype float8", "float"),
    "short dtype": Wrong(f"{SUBMIT} --dtype bf16"),
    "no gpus": Wrong(f"{SUBMIT} --gpus 0"),
    "negative gpus": Wrong(f"{SUBMIT} --gpus -1"),
    "gpus in words": Wrong(f"{SUBMIT} --gpus two", "--gpus is not a whole number: 'two'\n  -> give a number, such as --gpus 2"),
    "a part of a gpu": Wrong(f"{SUBMIT} --gpus 1.5"),
    "more gpus than there are": Wrong(f"{SUBMIT} --gpus 100000"),
    "no repeats": Wrong(f"{SUBMIT} --repeats 0"),
    "negative repeats": Wrong(f"{SUBMIT} --repeats -3"),
    "repeats in words": Wrong(f"{SUBMIT} --repeats many"),
    "repeats for ever": Wrong(f"{SUBMIT} --repeats 1000000000"),
    "negative warm-up": Wrong(f"{SUBMIT} --warmup -1"),
    "warm-up in words": Wrong(f"{SUBMIT} --warmup yes"),
    "no tokens": Wrong(f"{SUBMIT} --max-new-tokens 0"),
    "tokens in words": Wrong(f"{SUBMIT} --max-new-tokens all"),
    "tokens as a list": Wrong(f"{SUBMIT} --max-new-tokens 8,16"),
    "a wrong length among right ones": Wrong(f"{SUBMIT} --max-new-tokens 8 --max-new-tokens -8"),
    "more tokens than a number": Wrong(f"{SUBMIT} --max-new-tokens 100000000000000000000"),
    "no batch": Wrong(f"{SUBMIT} --batch-size 0"),
    "batch in words": Wrong(f"{SUBMIT} --batch-size big"),
    "no requests": Wrong(f"{SUBMIT} --requests 0"),
    "request rate of nothing": Wrong(f"{SUBMIT} --request-rate 0"),
    "negative request rate": Wrong(f"{SUBMIT} --request-rate -2"),
    "request rate that is no number": Wrong(f"{SUBMIT} --request-rate nan"),
    "infinite request rate": Wrong(f"{SUBMIT} --request-rate inf"),
    "request rate in words": Wrong(f"{SUBMIT} --request-rate fast"),
    "no runs in a job": Wrong(f"{SUBMIT} --runs-per-job 0"),
    "no jobs at once": Wrong(f"{SUBMIT} --jobs-at-once 0"),
    "empty prompt": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--prompt", ""]),
    "blank prompt": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--prompt", " \n"]),
    "prompt that is no text": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--prompt", "\udcff"]),
    "no prompts file": Wrong(f"{SUBMIT} --prompts missing.txt", "prompts file not found: missing.txt\n  -> correct the path"),
    "no dataset": Wrong(f"{SUBMIT} --dataset missing.json", "dataset not found: missing.json\n  -> correct the path"),
    "without a server, and none asked for": Wrong(f"{SUBMIT} --without-server", "--without-server needs --serve"),
    "an unknown way to share a model": Wrong(
        f"{SUBMIT} --backend vllm --parallel sideways", "give one of tensor, pipeline, data, or sizes"
    ),
    "tune: one value": Wrong(f"tune {SUBMIT[6:]} --request-rate 4", "the highest --request-rate, but got 4\n"),
    "tune: no value": Wrong(f"tune {SUBMIT[6:]}", "give --request-rate twice, or --concurrency twice"),
    "run: a time limit": Wrong(f"run {SUBMIT[6:]} --time 0-01:00:00", "unknown option: --time\n  -> labctl run --help lists"),
    "an sbatch option without its words": Wrong(f"{SUBMIT} --sbatch", "--sbatch needs a value"),
    "a shell without completion": Wrong("completion tcsh", "unknown SHELL: 'tcsh'\n  -> give one of bash, zsh, fish"),
    "a folder of prompts": Wrong(f"{SUBMIT} --prompts ."),
    "prompts of a user who is none": Wrong(f"{SUBMIT} --prompts ~nobody-of-this-name/x"),
    "empty name": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--name", ""]),
    "name of two lines": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--name", "a\nb"]),
    "name that colours the terminal": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--name", "\x1b[31mred"]),
    "a prompt and a file of prompts": Wrong(f"{SUBMIT} --prompt x --prompts y.txt", "give one of them"),
    "an sbatch option without a value": Wrong(f"{SUBMIT} --sbatch qos", "write it like comment=mine"),
    "name that is no text": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--name", "\udcff"]),
    "unknown sampling": Wrong(f"{SUBMIT} --sampling hot"),
    "sampling with an unknown key": Wrong(f"{SUBMIT} --sampling temprature=1", "did you mean 'temperature'?"),
    "sampling without a number": Wrong(f"{SUBMIT} --sampling temperature=hot"),
    "sampling at no temperature": Wrong(f"{SUBMIT} --sampling temperature=0", "greedy"),
    "sampling at infinite temperature": Wrong(f"{SUBMIT} --sampling temperature=inf"),
    "sampling at no number": Wrong(f"{SUBMIT} --sampling temperature=nan"),
    "sampling from nothing": Wrong(f"{SUBMIT} --sampling top_p=0"),
    "sampling from more than all": Wrong(f"{SUBMIT} --sampling top_p=1.5"),
    "a seed with a point": Wrong(f"{SUBMIT} --sampling seed=1.5"),
    "a negative seed": Wrong(f"{SUBMIT} --sampling seed=-1"),
    "a seed that no generator takes": Wrong(f"{SUBMIT} --sampling seed=4294967296"),
    "sampling that ends in a comma": Wrong(f"{SUBMIT} --sampling temperature=1,"),
    "empty sampling": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--sampling", ""]),
    "sampling without temperature": Wrong(f"{SUBMIT} --top-p 0.9", "--temperature"),
    "a seed without temperature": Wrong(f"{SUBMIT} --seed 7", "--temperature"),
    "temperature that is none": Wrong(f"{SUBMIT} --temperature -1"),
    "temperature in words": Wrong(f"{SUBMIT} --temperature warm"),
    "seed in words": Wrong(f"{SUBMIT} --temperature 1 --seed seven"),
    "unknown engine option": Wrong(f"{SUBMIT} --engine-option nonsense=1"),
    "no such attention": Wrong(f"{SUBMIT} --backend staged --engine-option attn_implementation=fast"),
    "engine option without a value": Wrong(f"{SUBMIT} --engine-option nonsense"),
    "engine option without a name": Wrong(f"{SUBMIT} --engine-option =1"),
    "engine option of another engine": Wrong(f"{SUBMIT} --engine-option gpu_memory_utilization=0.9"),
    "an option of staged for hf": Wrong(f"{SUBMIT} --engine-option compile=false"),
    "engine option of the wrong type": Wrong(f"{SUBMIT} --backend vllm --engine-option enforce_eager=3"),
    "engine option that labctl sets": Wrong(f"{SUBMIT} --backend vllm --engine-option tensor_parallel_size=2", "--gpus"),
    "managed sbatch option": Wrong(f"{SUBMIT} --sbatch gres=gpu:1"),
    "managed sbatch option, shortened": Wrong(f"{SUBMIT} --sbatch part=gpu"),
    "sbatch option of two dashes": Wrong(f"{SUBMIT} --sbatch --qos=high"),
    "short sbatch option": Wrong(f"{SUBMIT} --sbatch N=2"),
    "sbatch option without a value": Wrong(f"{SUBMIT} --sbatch nice"),
    "sbatch option of two lines": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--sbatch", "comment=a\nb"]),
    "memory without a unit": Wrong(f"{SUBMIT} --mem 64", "(64G, 64G per-gpu"),
    "a value for an sbatch option without one": Wrong(f"{SUBMIT} --sbatch hold=later", "write hold = true"),
    "time in words": Wrong(
        f"{SUBMIT} --time tomorrow",
        "--time: 'tomorrow' is not a time\n  -> write days-hours:minutes:seconds, such as 0-01:00:00\n",
    ),
    "time with a unit": Wrong(f"{SUBMIT} --time 2h", "days-hours:minutes:seconds"),
    "no time": Wrong(f"{SUBMIT} --time 0"),
    "negative time": Wrong(f"{SUBMIT} --time=-10"),
    "empty time": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--time", ""]),
    "memory in words": Wrong(f"{SUBMIT} --mem lots", "64G"),
    "memory with a long unit": Wrong(f"{SUBMIT} --mem 64GB", "64G"),
    "negative memory": Wrong(f"{SUBMIT} --mem=-1G"),
    "account of two lines": Wrong(["submit", "-p", "dgxh", "--model-id", "MODEL", "--account", "a\nb"]),
    "no such model folder": Wrong("submit -p dgxh --model-id ./missing"),
    "no such model folder of mine": Wrong("submit -p dgxh --model-id ~/missing"),
    "no such model": Wrong("submit -p dgxh --model-id a/b/c"),
    "model with a space": Wrong(["submit", "-p", "dgxh", "--model-id", "org/a model"]),
    "model with dots": Wrong("submit -p dgxh --model-id org/a..b"),
    "model as an address": Wrong("submit -p dgxh --model-id https://huggingface.co/org/name"),
    "empty model": Wrong(["submit", "-p", "dgxh", "--model-id", ""]),
    "a model's name that is no text": Wrong(["submit", "-p", "dgxh", "--model-id", "\udcff"]),
    "a model's name that is too long": Wrong(["submit", "-p", "dgxh", "--model-id", "x" * 5000]),
    "a folder without a model": Wrong("submit -p dgxh --model-id .", "config.json"),
    "a model without weights": Wrong("submit -p dgxh --model-id ./m", "weights", files={"m/config.json": "{}"}),
    "a hub name without its owner, offline": Wrong("submit -p dgxh --model-id tinyllama", "no folder", PREFLIGHT),
    "empty revision": Wrong(["submit", "-p", "dgxh", "--model-id", "org/name", "--revision", ""]),
    "no such request file": Wrong("submit missing.toml", ".toml"),
    "a folder for a request file": Wrong("submit .", ".toml"),
    "two request files": Wrong("submit a.toml b.toml", files={"a.toml": "", "b.toml": ""}),
    "one script, two partitions": Wrong("render -p dgxh -p dgx2 --model-id MODEL"),
    "no script": Wrong("render -p local --model-id MODEL"),
    "render: unknown partition": Wrong("render -p dgxx --model-id MODEL", "did you mean 'dgx"),
    "nothing of it here: status": Wrong("status"),
    "nothing of it here: status of all": Wrong("status --all"),
    "nothing of it here: watch": Wrong("status --watch"),
    "nothing of it here: show": Wrong("show 1"),
    "nothing of it here: logs": Wrong("logs 1"),
    "nothing of it here: compare": Wrong("compare"),
    "nothing of it here: matrix": Wrong("matrix"),
    "nothing of it here: retry": Wrong("retry"),
    "nothing of it here: cancel": Wrong("cancel"),
    "nothing of it here: clean": Wrong("clean"),
    "nothing of it here: du": Wrong("du"),
    "nothing of it here: collect": Wrong("collect"),
    "nothing of it here: rebuild": Wrong("collect --rebuild"),
    "watch for programs": Wrong("status --watch --json", "--json"),
    "run: several cells": Wrong("run -p local --model-id MODEL --max-new-tokens 1 --max-new-tokens 2"),
    "run: gpus in words": Wrong("run -p local --model-id MODEL --gpu-ids a,b"),
    "run: no gpus": Wrong(["run", "-p", "local", "--model-id", "MODEL", "--gpu-ids", ""]),
    "run: gpus where there are none": Wrong("run -p local --model-id MODEL --gpu-ids 0,1", "--gpu-ids names some: 0,1", code=3),
    "run: a gpu twice": Wrong("run -p local --model-id MODEL --gpu-ids 0,0"),
    "run: a negative gpu": Wrong("run -p local --model-id MODEL --gpu-ids=-1,0"),
    "run: other gpus than asked for": Wrong("run -p local --model-id MODEL --gpus 2 --gpu-ids 0"),
    "run: gpus that this shell has not": Wrong(
        "run -p dgxh --model-id MODEL --gpu-ids 0,2", "this shell has 2 GPUs", env={"CUDA_VISIBLE_DEVICES": "0,1"}
    ),
    "run: in a partition that nobody described": Wrong("run --model-id MODEL", env={"SLURM_JOB_PARTITION": "turing"}),
    "run: unknown partition": Wrong("run -p dgxx --model-id MODEL", "did you mean 'dgx"),
    "workspace of a user who is none": Wrong("init ~nobody-of-this-name/x"),
    "config of an unknown partition": Wrong("config -p dgxx", "did you mean 'dgx"),
    "unknown axis": Wrong("compare --by dtyp", "did you mean 'dtype'?"),
    "unknown axis like none": Wrong("compare --by zzz", "unknown axis: 'zzz'\n  -> give one such as partition, backend"),
    "unknown metric": Wrong("compare --metric tpt_s", "did you mean 'tpot_s'?"),
    "unknown metric like none": Wrong("compare --metric zzz", "unknown metric: 'zzz'\n  -> give one such as throughput, ttft, "),
    "retry: no runs in a job": Wrong("retry --runs-per-job 0", "--runs-per-job out of range: 0\n  -> give a number of at least"),
    "retry: runs in words": Wrong("retry --runs-per-job many"),
    "fit: no model": Wrong("fit", "labctl fit MODEL"),
    "fit: two models": Wrong("fit MODEL --model-id MODEL", "several models given"),
    "fit: no such folder": Wrong("fit ./missing"),
    "compare: two forms": Wrong("compare --csv --markdown", "several output formats: --csv and --markdown"),
    "compare: a form and JSON": Wrong("compare --plot --json", "--plot and --json"),
    "compare: answers and figures": Wrong("compare --text --cost", "not metrics: --cost"),
    "compare: answers in a form": Wrong("compare --text --csv", "not metrics: --csv"),
    "fit: a folder without a model": Wrong("fit .", "config.json"),
    "fit: a configuration that is no JSON": Wrong("fit ./m", files={"m/config.json": "{", "m/model.safetensors": b""}),
    "fit: a configuration that is a list": Wrong("fit ./m", files={"m/config.json": "[]", "m/model.safetensors": b""}),
    "fit: a model of no known kind": Wrong(
        "fit ./m", "Llama family", PREFLIGHT, files={"m/config.json": "{}", "m/model.safetensors": b""}
    ),
    "fit: no such model": Wrong("fit a/b/c"),
    "fit: unknown partition": Wrong("fit MODEL -p dgxx", "did you mean 'dgx"),
    "fit: unknown backend": Wrong("fit MODEL --backend tgi"),
    "fit: unknown dtype": Wrong("fit MODEL --dtype int4"),
    "fit: no batch": Wrong("fit MODEL --batch-size 0"),
    "fit: more than all of a GPU": Wrong("fit MODEL --gpu-memory-utilization 1.5"),
    "env: unknown partition": Wrong("env -p dgxx", "did you mean 'dgx"),
    "env: unknown backend": Wrong("env -p dgxh --backend tgi"),
    "env: where something is": Wrong("env -p dgxh --create there", files={"there/x": "mine"}),
    "doctor: unknown partition": Wrong("doctor -p dgxx", "did you mean 'dgx"),
    "doctor: minutes in words": Wrong("doctor --within long"),
    "fetch: no model": Wrong("fetch", "give a model, or --quality TASK"),
    "fetch: a folder": Wrong("fetch ."),
    "fetch: no such model": Wrong("fetch a/b/c"),
    "fetch: unknown partition": Wrong("fetch org/name -p dgxx", "did you mean 'dgx"),
    "reserve: unknown partition": Wrong("reserve -p dgxx --print", "did you mean 'dgx"),
    "reserve: no partition": Wrong("reserve --print", "add --partition"),
    "reserve: a partition without Slurm": Wrong("reserve -p local --print"),
    "reserve: no gpus": Wrong("reserve -p dgxh --gpus 0 --print"),
    "reserve: a time that is none": Wrong("reserve -p dgxh --time soon --print", "days-hours"),
    "reserve: an option that is misspelt": Wrong("reserve -p dgxh --tiem 1:00 --print", "did you mean '--time'?"),
    "reserve: an sbatch option that labctl writes": Wrong("reserve -p dgxh --sbatch nodes=2 --print"),
    "report: nothing here": Wrong("report"),
    "report: a page that is a folder": Wrong("report -o ."),
    "init: two folders": Wrong("init a b"),
    "completion: unknown shell": Wrong("completion tcsh", "bash"),
}  # fmt: skip

# ---------------------------------------------------------------- labctl.toml

SETTINGS_FILES: dict[str, str | bytes] = {
    "no TOML": "[partitions.dgxh\n",
    "a key twice": "[partitions.dgxh]\ntime = '1'\ntime = '2'\n",
    "a text without quotes": "[partitions.dgxh]\naccount = eecs\n",
    "not UTF-8": b"\xff",
    "UTF-16": "[defaults]\n".encode("utf-16"),
    "a NUL": "[defaults]\n\0",
    "unknown table": "[partition.dgxh]\n",
    "unknown table like none": "[site]\n",
    "a key outside a table": "account = 'eecs'\n",
    "partitions that are no table": "partitions = 3\n",
    "defaults that are no table": "defaults = ['dgxh']\n",
    "a partition that is no table": "partitions.dgxh = 'eecs'\n",
    "unknown key": '[partitions.dgxh]\nacount = "x"\n',
    "a flag's name for a key": "[partitions.dgxh]\nmax-time = '1'\n",
    "wrong type": '[partitions.dgxh]\ngpus = "two"\n',
    "a truth for a number": "[partitions.dgxh]\ngpus = true\n",
    "wrong value": "[partitions.dgxh]\ngpus = 0\n",
    "no cpus": "[partitions.dgxh]\ncpus_per_task = 0\n",
    "negative cpus": "[partitions.dgxh]\ncpus_per_task = -8\n",
    "a time that is none": "[partitions.dgxh]\ntime = 'an hour'\n",
    "a time as a number": "[partitions.dgxh]\ntime = 60\n",
    "a longest time below the time": "[partitions.dgxh]\ntime = '2:00:00'\nmax_time = '1:00:00'\n",
    "memory that is none": "[partitions.dgxh]\nmem = '64 GB'\n",
    "memory as a number": "[partitions.dgxh]\nmem = 64\n",
    "a dtype that is none": "[partitions.dgxh]\ndtype = 'fp16'\n",
    "a device that is none": "[partitions.dgxh]\ndevice = 'gpu'\n",
    "a capability that is none": "[partitions.dgxh]\ncapability = 'sm_90'\n",
    "a capability that is a list": "[partitions.dgxh]\ncapability = [9, 0]\n",
    "an executor that is none": "[partitions.dgxh]\nexecutor = 'ssh'\n",
    "a template that is none": "[partitions.dgxh]\ntemplate = 'nothing'\n",
    "a template that is a path": "[partitions.dgxh]\ntemplate = '../x'\n",
    "setup that is a text": "[partitions.dgxh]\nsetup = 'module load cuda'\n",
    "setup of numbers": "[partitions.dgxh]\nsetup = [1]\n",
    "setup with a NUL": '[partitions.dgxh]\nsetup = ["a\\u0000b"]\n',
    "env that is a list": "[partitions.dgxh]\nenv = ['A=1']\n",
    "env with a number": "[partitions.dgxh]\nenv = { A = 1 }\n",
    "env with a name that is none": "[partitions.dgxh]\nenv = { 'A-B' = '1' }\n",
    "env with a secret": "[partitions.dgxh]\nenv = { HF_TOKEN = 'hf_x' }\n",
    "an account of two lines": '[partitions.dgxh]\naccount = "a\\nb"\n',
    "an sbatch option that labctl writes": "[partitions.dgxh]\nsbatch = { gres = 'gpu:1' }\n",
    "an sbatch option that is short": "[partitions.dgxh]\nsbatch = { N = 1 }\n",
    "an sbatch option that is off": "[partitions.dgxh]\nsbatch = { exclusive = false }\n",
    "sbatch that is a list": "[partitions.dgxh]\nsbatch = ['--exclusive']\n",
    "gpu memory in words": "[partitions.dgxh]\ngpu_memory_gib = '80GB'\n",
    "wrong default": '[defaults]\nrepeats = "three"\n',
    "unknown default": "[defaults]\nrepeat = 3\n",
    "a default that is one request's": "[defaults]\nname = 'mine'\n",
    "a default backend that is none": "[defaults]\nbackend = 'tgi'\n",
    "a default that runs nothing": "[defaults]\ndtype = []\n",
    "a default that is a date": "[defaults]\nprompt = 2026-01-01\n",
}

# ---------------------------------------------------------------- request files

REQUEST_FILES: dict[str, str | bytes] = {
    "no TOML": "partition = \n",
    "YAML": "partition: dgxh\n",
    "JSON": '{"partition": "dgxh"}\n',
    "not UTF-8": b"partition = '\xff'\n",
    "unknown key": "parttion = 'dgxh'\n",
    "a flag's name for a key": "max-new-tokens = 8\n",
    "a text for a number": "max_new_tokens = ['8', 16]\n",
    "a number for a text": "backend = [1]\n",
    "a truth for a number": "repeats = true\n",
    "a part of a number": "batch_size = 1.5\n",
    "an empty axis": "dtype = []\n",
    "lists in lists": "dtype = [['float16']]\n",
    "no such partition": "partition = ['dgxx']\n",
    "engine options that are a list": "engine_options = ['attn_implementation=eager']\n",
    "an engine option without a value": "engine_options = { attn_implementation = [] }\n",
    "an engine option that is a table": "engine_options = { attn_implementation = { a = 1 } }\n",
    "an unknown engine option": "engine_options = { attn_implementatio = 'eager' }\n",
    "cells that are no tables": "cells = ['hf']\n",
    "a cell with an unknown key": "[[cells]]\ndtyp = 'float16'\n",
    "a cell with a setting": "[[cells]]\nrepeats = 3\n",
    "a cell with a wrong value": "[[cells]]\ndtype = 'float8'\n",
    "a cell of nothing": "[[cells]]\ndtype = []\n",
    "a rule with an unknown key": "[[exclude]]\ndtyp = 'float16'\n",
    "a rule of nothing": "[[exclude]]\n",
    "a rule that is no table": "exclude = ['float16']\n",
    "rules that leave nothing": "[[exclude]]\nbackend = 'hf'\n",
    "a prompt that is a list": "prompt = ['a', 'b']\n",
    "a prompts file that is a list": "prompts = ['a.txt']\n",
    "a prompts file that is none": "prompts = 'missing.txt'\n",
    "a time that is a time of day": "time = 01:00:00\n",
    "a time that is a number": "time = 60\n",
    "sbatch with a list": "sbatch = { comment = ['a'] }\n",
    "sbatch that labctl writes": "sbatch = { nodes = 2 }\n",
    "a name that is a number": "name = 3\n",
    "infinity": "request_rate = inf\n",
    "no number": "request_rate = nan\n",
}

# ---------------------------------------------------------------- prompt files

PROMPT_FILES: dict[str, tuple[str, str | bytes]] = {
    "empty": ("p.txt", ""),
    "blank lines": ("p.txt", "\n  \n\t\n"),
    "not UTF-8": ("p.txt", b"caf\xe9\n"),
    "UTF-16": ("p.txt", "a prompt\n".encode("utf-16")),
    "no lines of JSON": ("p.jsonl", ""),
    "not JSON": ("p.jsonl", "What is a GPU?\n"),
    "half of a line": ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b\n'),
    "JSON over several lines": ("p.jsonl", '{\n"prompt": "a"\n}\n'),
    "a list": ("p.jsonl", '["a", "b"]\n'),
    "a number": ("p.jsonl", "3\n"),
    "nothing": ("p.jsonl", "null\n"),
    "an object without a prompt": ("p.jsonl", '{"text": "a"}\n'),
    "a prompt that is no text": ("p.jsonl", '{"prompt": 3}\n'),
    "a blank prompt": ("p.jsonl", '{"prompt": " "}\n'),
    "half of a character": ("p.jsonl", '{"prompt": "\\ud800"}\n'),
    "deeper than anyone reads": ("p.jsonl", "[" * 100_000 + "\n"),
}

# ---------------------------------------------------------------- templates

TEMPLATES: dict[str, str | bytes] = {
    "broken": "{% if %}",
    "a block that does not end": "{% block x %}",
    "an unknown tag": "{% frobnicate %}",
    "undefined": "{{ nonsense }}",
    "an attribute that is undefined": "{{ partition.nonsense }}",
    "without its command": "#!/bin/bash\n",
    "without the worker's code": "#!/bin/bash\n#SBATCH --output={{ output|slurm }}\n{{ command }}\n",
    "extends nothing": '{% extends "nothing.j2" %}',
    "includes nothing": '{% include "nothing.j2" %}',
    "for ever": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "adds a text to a number": "{{ gpus + 'x' }}",
    "divides by nothing": "{{ 1 / 0 }}",
    "calls a text": "{{ job_name() }}",
    "an index that is not there": "{{ [][1].x }}",
    "an unknown filter": "{{ gpus|nonsense }}",
    "not UTF-8": b"# \xff",
}

# ---------------------------------------------------------------- the environment

VARIABLES = {
    "unknown": ({"LABCTL_DTYP": "float16"}, "did you mean 'LABCTL_DTYPE'?"),
    "a flag that is no default": ({"LABCTL_NAME": "x"}, ""),
    "unknown partition": ({"LABCTL_PARTITION": "dgxx"}, "did you mean 'dgx"),
    "empty partition": ({"LABCTL_PARTITION": ""}, ""),
    "unknown backend": ({"LABCTL_BACKEND": "hff"}, "did you mean 'hf'?"),
    "unknown dtype": ({"LABCTL_DTYPE": "fp8"}, ""),
    "a text for a number": ({"LABCTL_REPEATS": "three"}, "LABCTL_REPEATS"),
    "an empty number": ({"LABCTL_REPEATS": ""}, "LABCTL_REPEATS"),
    "a part of a number": ({"LABCTL_GPUS": "1.5"}, "LABCTL_GPUS"),
    "a list": ({"LABCTL_MAX_NEW_TOKENS": "8,16"}, "LABCTL_MAX_NEW_TOKENS"),
    "a text for a truth": ({"LABCTL_IGNORE_EOS": "ja"}, "LABCTL_IGNORE_EOS"),
    "engine options without a value": ({"LABCTL_ENGINE_OPTIONS": "attn_implementation"}, "key=value"),
    "an unknown engine option": ({"LABCTL_ENGINE_OPTIONS": "attn_implementatio=eager"}, ""),
    "an sbatch option that labctl writes": ({"LABCTL_SBATCH": "nodes=2"}, ""),
    "a time that is none": ({"LABCTL_TIME": "soon"}, "days-hours"),
    "memory that is none": ({"LABCTL_MEM": "much"}, ""),
    "a model that is none": ({"LABCTL_MODEL_ID": "a/b/c"}, ""),
    "prompts that are none": ({"LABCTL_PROMPTS": "missing.txt"}, ""),
    "a rate that is no number": ({"LABCTL_REQUEST_RATE": "fast"}, "LABCTL_REQUEST_RATE"),
}

# ---------------------------------------------------------------- words for runs, where there are some

OF_RUNS = {
    "status nonsense": "labctl status --all",
    "status --watch nonsense": "labctl status --all",
    "show nonsense": "labctl status --all",
    "show mine": "",
    "logs nonsense": "labctl status --all",
    "compare nonsense": "labctl status --all",
    "matrix nonsense": "labctl status --all",
    "retry nonsense": "labctl status --all",
    "cancel nonsense --yes": "labctl status --all",
    "clean nonsense": "labctl status --all",
    "status ffff 1000": "labctl status --all",
    "status mein": "did you mean 'mine'?",
    "compare --by dtyp": "did you mean 'dtype'?",
    "compare --by": "labctl compare --help",
    "compare --metric tpt_s": "did you mean 'tpot_s'?",
    "compare --where dtyp=float16": "did you mean 'dtype'?",
    "compare --where dtype": "",
    "compare --where dtype=float8": "",
    "compare --where =float16": "",
    "compare --text RUN nonsense": "labctl status --all",
    "compare --where batch_size>=many": "",
    "compare --where dtype>=float16": "",
    "compare --baseline nonsense": "",
    "compare --baseline dtyp=float16": "did you mean 'dtype'?",
    "compare --over space": "unknown --over: 'space'\n  -> the only value is time",
    "compare --fail-on-regression much": "",
    "compare --fail-on-regression": "labctl compare --help",
    "report --by dtyp -o x.html": "did you mean 'dtype'?",
    "report --metric speed -o x.html": "",
    "report nonsense -o x.html": "labctl status --all",
    "report -o nowhere/x.html": "",
    "matrix --across dtyp": "did you mean 'dtype'?",
}
# Of these more is in their own tests.
OF_DATA: dict[str, str] = {
    "export nonsense": "labctl status --all",
    "export --table measurements": "",
    "export --format xls": "",
    "export -o runs.xls": "",
    "export -o nowhere/runs.csv": "",
    "query --describe measured_run": "",
    "query SELECT": "",
    "query DROP": "",
    "bundle nonsense": "labctl status --all",
    "bundle --author a/b": "",
    "bundle -o nowhere/x.zip": "",
    "import": "labctl import --help",
    "import missing.zip": "",
    "import labctl.toml": "",
    "import a.zip b.zip --origin ada": "",
    "exercise 9": "",
    "exercise one": "",
}
OF_RUNS |= {line: says for line, says in OF_DATA.items() if line.split()[0] in COMMANDS}


def rows() -> list[Any]:
    found = {f"line: {name}": wrong for name, wrong in COMMAND_LINES.items()}
    for name, text in SETTINGS_FILES.items():
        says = "" if "template" in name else "labctl.toml"  # it may lie in either place
        found[f"labctl.toml: {name}"] = Wrong(SUBMIT, says, files={"labctl.toml": text})
    for name, text in REQUEST_FILES.items():
        line = SUBMIT if "partition" not in name else "submit --model-id MODEL"
        found[f"request: {name}"] = Wrong(f"{line} r.toml", files={"r.toml": text})
    for name, (file, text) in PROMPT_FILES.items():
        found[f"prompts: {name}"] = Wrong(f"{SUBMIT} --prompts {file}", file, files={file: text})
    for name, text in TEMPLATES.items():
        file = "templates/dgxh.sbatch.j2"
        found[f"template: {name}"] = Wrong(SUBMIT, "template", files={file: text})
    for name, (env, says) in VARIABLES.items():
        found[f"variable: {name}"] = Wrong("submit MODEL", says, env=env)
    return [pytest.param(wrong, id=name) for name, wrong in found.items()]


def test_there_are_at_least_two_hundred_of_them() -> None:
    assert len(rows()) + len(OF_RUNS) >= 200


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("wrong", rows())
def test_what_is_wrong_is_one_message_with_its_remedy_and_changes_nothing(
    labctl: Labctl,
    workspace: Workspace,
    slurm: Slurm,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Wrong,
) -> None:
    slurm.accepts()
    write(workspace.root, wrong.files)
    for variable, value in wrong.env.items():
        monkeypatch.setenv(variable, value)
    line: Line = wrong.line
    if line == "submit MODEL":  # what the variables leave to be said
        line = "submit" + ("" if "LABCTL_PARTITION" in wrong.env else " -p dgxh")
        line += "" if "LABCTL_MODEL_ID" in wrong.env else " --model-id MODEL"
    here = workspace.root.parent
    before = files_below(here)
    ran = labctl(*arguments_of(line, checkpoint))
    one_clear_message(ran, wrong.code)
    assert wrong.says in ran.err
    assert files_below(here) == before
    assert not workspace.data.exists()


@pytest.fixture
def measured_here(records: Records, slurm: Slurm) -> JobArray:
    """A request called mine, of two runs that are done; the database is there too."""
    slurm.shows()
    batch = records.submit(name="mine", lengths=(8, 16))
    attempt = records.attempt(batch)
    for run in batch.runs:
        records.done(batch, attempt, run)
    records.collect()
    return batch


@pytest.mark.parametrize("line", OF_RUNS)
def test_a_wrong_word_for_what_is_here_is_one_message_and_changes_nothing(
    labctl: Labctl, measured_here: JobArray, workspace: Workspace, line: str
) -> None:
    labctl("status")
    before = files_below(workspace.root)
    words = [measured_here.runs[0].run_id if word == "RUN" else word for word in line.split()]
    ran = labctl(*words)
    one_clear_message(ran, WRONG_USE)
    assert OF_RUNS[line] in ran.err
    assert files_below(workspace.root) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_option_that_it_does_not_have(
    labctl: Labctl, workspace: Workspace, command: str
) -> None:
    before = files_below(workspace.root.parent)
    ran = labctl(command, "--no-such-option-anywhere")
    one_clear_message(ran, WRONG_USE)
    assert f"labctl {command} --help" in ran.err
    assert files_below(workspace.root.parent) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_falls_over_a_workspace_that_is_a_file(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, checkpoint: Path, command: str
) -> None:
    slurm.accepts()
    workspace.data.write_text("", encoding="utf-8")
    ran = labctl(command)
    assert ran.code != 70, ran.err
    assert "Traceback" not in ran.out + ran.err
    assert workspace.data.read_text(encoding="utf-8") == ""


# These do what they say without a word more: they start a worker, write into the folder, or ask the network.
DOES_WHAT_IT_SAYS = ("run", "init", "fetch", "reserve", "env", "submit")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in DOES_WHAT_IT_SAYS])
def test_no_command_falls_over_a_database_that_is_none(
    labctl: Labctl, workspace: Workspace, slurm: Slurm, command: str
) -> None:
    slurm.shows()
    workspace.create()
    workspace.database.write_bytes(b"this is no database\n" * 100)
    before = files_below(workspace.root)
    ran = labctl(command)
    assert ran.code != 70, ran.err
    assert "Traceback" not in ran.out + ran.err
    assert files_below(workspace.root) == before


# ---------------------------------------------------------------- what nobody would think of

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def right_or_refused(action: Any) -> None:
    """Anything else that is raised is what a person would see as a traceback."""
    try:
        action()
    except LabctlError as error:
        assert error.message.strip()
        assert error.remedy.strip()


@given(ANY_TEXT)
def test_any_text_is_a_sampling_or_is_refused(text: str) -> None:
    right_or_refused(lambda: sampling.parse(text))


@given(ANY_TEXT)
def test_any_text_is_an_option_or_is_refused(text: str) -> None:
    right_or_refused(lambda: engine_options.parse(text))


@given(st.dictionaries(st.sampled_from(request.KEYS) | ANY_TEXT, JSON, max_size=4))
def test_any_values_are_a_request_or_are_refused(values: dict[str, Any]) -> None:
    def build() -> None:
        Sweep(request.build([("r.toml", values)]))

    right_or_refused(build)


@given(st.dictionaries(st.sampled_from(partitions.KEYS) | ANY_TEXT, JSON, max_size=4))
def test_any_table_is_a_partition_or_is_refused(table: dict[str, Any]) -> None:
    def build() -> None:
        partitions.build("p", [("labctl.toml", partitions.check_table("p", table, Path("labctl.toml")))])

    right_or_refused(build)


@given(ANY_TEXT)
def test_any_text_is_a_time_or_is_refused(text: str) -> None:
    try:
        assert partitions.seconds(text) > 0
    except ValueError as error:
        assert str(error)


@FEW
@given(content=st.binary(max_size=300) | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_any_file_holds_prompts_or_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    asked = request.build([("flags", {"prompts": str(tmp_path / name)})])

    def read() -> None:
        for prompt in prompts_of(asked):
            assert prompt.strip()
            prompt.encode("utf-8")  # it goes into a JSON file

    right_or_refused(read)


@FEW
@given(content=st.binary(max_size=200) | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_file_is_a_settings_file_or_is_refused(workspace: Workspace, content: bytes) -> None:
    workspace.settings_file.write_bytes(content)

    def load() -> None:
        known = labctl_settings.load(workspace)
        for name in known.names():
            known.partition(name)

    right_or_refused(load)


@FEW
@given(ANY_TEXT)
def test_any_text_is_a_model_or_is_refused(workspace: Workspace, text: str) -> None:
    right_or_refused(lambda: resolve.resolve(text))


# No process is ever given a NUL in a word: it is where a word ends.
ANY_WORD = st.sampled_from([*COMMANDS, "--json", "--all", "-p", "dgxh", "--by", "x", "-", "--", ""]) | ANY_TEXT.filter(
    lambda text: "\0" not in text
)


@FEW
@given(st.lists(ANY_WORD, max_size=5))
def test_any_command_line_is_answered(labctl: Labctl, workspace: Workspace, words: list[str]) -> None:
    words = [word for word in words if word not in DOES_WHAT_IT_SAYS]
    ran: Ran = labctl(*words)
    assert ran.code in {0, 1, 2, 3, 4, 5}, ran.err
    assert "Traceback" not in ran.out + ran.err
    assert ran.code == 0 or ran.err.startswith("labctl: ") or "labctl: " in ran.err
    json.dumps(ran.err)
    assert os.getcwd() == str(workspace.root)  # noqa: PTH109
