"""What the Tab key offers for the values of arguments and options, by their names: one table for all commands.

Loaded only while a shell completes. Nothing is asked of Slurm or the network and nothing is written; where something cannot be
read, nothing is offered.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from labctl_orchestrator.store import workspace

MOST_RUNS = 300
Offered = Iterable[tuple[str, str]]  # a word, and what it is (zsh and fish show that)


class Offering(click.types.StringParamType):
    """A text for which words are offered; it takes any."""

    def __init__(self, offered: Callable[[click.Context], Offered], *, paths: str = "") -> None:
        self.offered = offered
        self.paths = paths

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self.paths and incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type=self.paths)]
        try:
            found = [
                CompletionItem(word, help=about) for word, about in self.offered(ctx) if word.startswith(incomplete)
            ]
        except Exception:
            return []  # a shell that completes is no place for a message
        return found or ([CompletionItem(incomplete, type=self.paths)] if self.paths else [])


def offer(command: click.Command) -> click.Command:
    """Give the command's parameters the types that offer words, where they take a text."""
    for parameter in command.params:
        offered = OFFERED.get(parameter.name or "")
        if offered is not None and isinstance(parameter.type, click.types.StringParamType):
            parameter.type = offered
    return command


def _partitions(ctx: click.Context) -> Offered:
    from labctl_orchestrator.request import settings

    known = settings.load(workspace.find())
    return [(name, known.partition(name).gpu) for name in known.names()]


def _cached_models(ctx: click.Context) -> Offered:
    """The models of the hub's cache: folders named models--org--name."""
    home = (
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    names = [folder.name.removeprefix("models--") for folder in cache.glob("models--*")]
    return [(name.replace("--", "/"), "in the cache") for name in sorted(names)]


def _query(sql: str, parameters: tuple[int, ...] = ()) -> list[Any]:
    here = workspace.find()
    if here is None or not here.index.is_file():
        return []
    database = sqlite3.connect(f"{here.index.as_uri()}?mode=ro", uri=True, timeout=1.0)
    try:
        return database.execute(sql, parameters).fetchall()
    finally:
        database.close()


def _requests(ctx: click.Context) -> Offered:
    for submission_id, name, created_at in _query(
        "SELECT submission_id, name, created_at FROM submissions ORDER BY created_at DESC"
    ):
        yield (name or submission_id, f"request of {created_at[:10]}")


def _runs(ctx: click.Context) -> Offered:
    rows = _query(
        "SELECT run_id, partition, backend, model, dtype, max_new_tokens FROM runs ORDER BY rowid DESC LIMIT ?",
        (MOST_RUNS,),
    )
    return [(run_id, " ".join(map(str, asked))) for run_id, *asked in rows]


def _requests_and_runs(ctx: click.Context) -> Offered:
    return [*dict(_requests(ctx)).items(), *_runs(ctx)]


def _metrics(ctx: click.Context) -> Offered:
    from labctl_orchestrator.analysis.metrics import ALL_METRICS

    return [(name, metric.title) for name, metric in ALL_METRICS.items()]


def _axes(ctx: click.Context) -> Offered:
    from labctl_orchestrator.analysis.comparison import AXES

    return [(axis, "") for axis in AXES]


def _backends(ctx: click.Context) -> Offered:
    from labctl_workers.engines import ENGINES

    return [(name, "") for name in ENGINES]


def _dtypes(ctx: click.Context) -> Offered:
    from labctl_orchestrator.request.request import DTYPE_CHOICES

    return [(name, "") for name in DTYPE_CHOICES]


def _samplings(ctx: click.Context) -> Offered:
    return [("greedy", ""), ("temperature=0.7,top_p=0.9,seed=1", "an example")]


def _engine_options(ctx: click.Context) -> Offered:
    """KEY= of the backends that the line names, of all where it names none."""
    from labctl_workers.engines import ENGINES, options_of

    backends = ctx.params.get("backend") or tuple(ENGINES)
    found = {option: kind for backend in backends if backend in ENGINES for option, kind in options_of(backend).items()}
    return [(f"{option}=", kind.__name__) for option, kind in sorted(found.items())]


_MODELS = Offering(_cached_models, paths="dir")
OFFERED: dict[str, Offering] = {
    "partition": Offering(_partitions),
    "partitions": Offering(_partitions),
    "model_id": _MODELS,
    "model": _MODELS,
    "names": Offering(_requests_and_runs),
    "run": Offering(_requests_and_runs),
    "metrics": Offering(_metrics),
    "metric": Offering(_metrics),
    "by": Offering(_axes),
    "across": Offering(_axes),
    "backend": Offering(_backends),
    "dtype": Offering(_dtypes),
    "sampling": Offering(_samplings),
    "engine_option": Offering(_engine_options),
    "conditions": Offering(lambda ctx: [(f"{axis}=", "") for axis, _ in _axes(ctx)]),
    "file": Offering(lambda ctx: [], paths="file"),
    "prompts": Offering(lambda ctx: [], paths="file"),
    "folder": Offering(lambda ctx: [], paths="dir"),
}
