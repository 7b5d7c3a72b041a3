"""Shell completion of argument and option values: one table for all commands.

Loaded only while a shell completes. Uses no Slurm and no network and writes nothing. Unreadable sources give no candidates.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

from labctl_orchestrator.store import workspace

MOST_RUNS = 300
Candidates = Iterable[tuple[str, str]]  # (word, description); zsh and fish show the description


class CompletedText(click.types.StringParamType):
    """A text parameter with candidates; accepts any text. `paths` is "file" or "dir" if paths complete as well."""

    def __init__(self, candidates: Callable[[click.Context], Candidates], *, paths: str = "") -> None:
        self.candidates = candidates
        self.paths = paths

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self.paths and incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type=self.paths)]
        try:
            found = [
                CompletionItem(word, help=about) for word, about in self.candidates(ctx) if word.startswith(incomplete)
            ]
        except Exception:
            return []  # a message would garble the command line that the person types
        return found or ([CompletionItem(incomplete, type=self.paths)] if self.paths else [])


def add_candidates(command: click.Command) -> None:
    """Give the command's text parameters the completing types of `COMPLETED`, by name."""
    for parameter in command.params:
        completed = COMPLETED.get(parameter.name or "")
        if completed is not None and isinstance(parameter.type, click.types.StringParamType):
            parameter.type = completed


def _partitions(ctx: click.Context) -> Candidates:
    from labctl_orchestrator.request import settings

    known = settings.load(workspace.find())
    return [(name, known.partition(name).gpu) for name in known.names()]


def _cached_models(ctx: click.Context) -> Candidates:
    """Models of the Hub cache: folders named models--org--name."""
    from labctl_orchestrator.models import hub_cache

    names = [folder.name.removeprefix("models--") for folder in hub_cache.folder().glob("models--*")]
    return [(name.replace("--", "/"), "cached") for name in sorted(names)]


def _sites(ctx: click.Context) -> Candidates:
    from labctl_slurm import site_profiles

    return [(name, site_profiles.load(name).title) for name in site_profiles.names()]


def _query(sql: str, parameters: tuple[int, ...] = ()) -> list[Any]:
    here = workspace.find()
    if here is None or not here.index.is_file():
        return []
    database = sqlite3.connect(f"{here.index.as_uri()}?mode=ro", uri=True, timeout=1.0)
    try:
        return database.execute(sql, parameters).fetchall()
    finally:
        database.close()


def _submissions(ctx: click.Context) -> Candidates:
    for submission_id, name, created_at in _query(
        "SELECT submission_id, name, created_at FROM submissions ORDER BY created_at DESC"
    ):
        yield (name or submission_id, f"submission of {created_at[:10]}")


def _runs(ctx: click.Context) -> Candidates:
    rows = _query(
        "SELECT run_id, partition, backend, model, dtype, max_new_tokens FROM runs ORDER BY rowid DESC LIMIT ?",
        (MOST_RUNS,),
    )
    return [(run_id, " ".join(map(str, settings))) for run_id, *settings in rows]


def _submissions_and_runs(ctx: click.Context) -> Candidates:
    return [*dict(_submissions(ctx)).items(), *_runs(ctx)]


def _metrics(ctx: click.Context) -> Candidates:
    from labctl_orchestrator.analysis.metrics import ALL_METRICS

    return [(name, metric.title) for name, metric in ALL_METRICS.items()]


def _axes(ctx: click.Context) -> Candidates:
    from labctl_orchestrator.analysis.comparison import AXES

    return [(axis, "") for axis in AXES]


def _backends(ctx: click.Context) -> Candidates:
    from labctl_workers.engines import ENGINES

    return [(name, "") for name in ENGINES]


def _dtypes(ctx: click.Context) -> Candidates:
    from labctl_orchestrator.request.request import DTYPE_CHOICES

    return [(name, "") for name in DTYPE_CHOICES]


def _samplings(ctx: click.Context) -> Candidates:
    return [("greedy", ""), ("temperature=0.7,top_p=0.9,seed=1", "an example")]


def _engine_options(ctx: click.Context) -> Candidates:
    """KEY= for each option of the backends on the line, or of all backends."""
    from labctl_workers.engines import ENGINES, engine_class

    backends = ctx.params.get("backend") or tuple(ENGINES)
    found = {
        option: kind
        for backend in backends
        if backend in ENGINES
        for option, kind in engine_class(backend).OPTIONS.items()
    }
    return [(f"{option}=", kind.__name__) for option, kind in sorted(found.items())]


_MODELS = CompletedText(_cached_models, paths="dir")
COMPLETED: dict[str, CompletedText] = {
    "partition": CompletedText(_partitions),
    "partitions": CompletedText(_partitions),
    "model_id": _MODELS,
    "model": _MODELS,
    "names": CompletedText(_submissions_and_runs),
    "run": CompletedText(_submissions_and_runs),
    "metrics": CompletedText(_metrics),
    "metric": CompletedText(_metrics),
    "by": CompletedText(_axes),
    "across": CompletedText(_axes),
    "backend": CompletedText(_backends),
    "dtype": CompletedText(_dtypes),
    "sampling": CompletedText(_samplings),
    "engine_option": CompletedText(_engine_options),
    "conditions": CompletedText(lambda ctx: [(f"{axis}=", "") for axis, _ in _axes(ctx)]),
    "site_name": CompletedText(_sites, paths="file"),
    "file": CompletedText(lambda ctx: [], paths="file"),
    "prompts": CompletedText(lambda ctx: [], paths="file"),
    "score": CompletedText(lambda ctx: [], paths="file"),
    "quality": CompletedText(lambda ctx: [], paths="file"),
    "dataset": CompletedText(lambda ctx: [], paths="file"),
    "folder": CompletedText(lambda ctx: [], paths="dir"),
}
