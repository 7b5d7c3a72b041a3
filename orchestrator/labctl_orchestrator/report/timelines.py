"""Telemetry of some runs as the rows of a chart: a band for each quantity, over the phases of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labctl_orchestrator.analysis.comparison import Cell
from labctl_orchestrator.analysis.doubts import VALIDITY
from labctl_orchestrator.analysis.metrics import figure
from labctl_orchestrator.store import documents
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.window import MASK
from labctl_orchestrator.store.workspace import Workspace
from labctl_workers.record import Repeat, RunResult, Telemetry

JsonRow = dict[str, object]
# More runs and points make the page large.
MOST_RUNS, MOST_POINTS = 8, 100
# (field of `record.GpuTelemetry`, title, unit), from the top.
OF_A_GPU = (
    ("power_w", "power", "W"), ("sm_mhz", "SM clock", "MHz"), ("temperature_c", "temperature", "C"),
    ("utilisation_percent", "utilisation", "%"), ("memory_used_bytes", "GPU memory", "B"),
)  # fmt: skip
OF_THE_JOB = (("cpus_used", "CPUs used", ""), ("rss_bytes", "resident memory", "B"))
# Of a band, for the line; the rest is for its title.
FILLED = 0.7
# A shorter phase has a line, and no room for its name.
NAMED_SHARE = 0.08


@dataclass(frozen=True)
class Timeline:
    """The telemetry of a cell (its place) in its latest engine load."""

    cell: int
    telemetry: Telemetry
    repeats: Sequence[Repeat]

    @property
    def bands(self) -> list[tuple[str, str, list[tuple[str, Sequence[float | None]]]]]:
        """(title, unit, [(device, values)]) of each quantity with a value."""
        gpus = self.telemetry.gpus
        of_gpus = (
            (title, unit, [(f"GPU {gpu.index}", getattr(gpu, name)) for gpu in gpus if getattr(gpu, name)])
            for name, title, unit in OF_A_GPU
        )
        of_job = ((title, unit, [("job", getattr(self.telemetry, name))]) for name, title, unit in OF_THE_JOB)
        known = [
            (title, unit, lines)
            for title, unit, lines in (*of_gpus, *of_job)
            if any(value is not None for _, values in lines for value in values)
        ]
        return known if len(self.telemetry.times_s) > 1 else []


def timelines(workspace: Workspace, store: Store, cells: Sequence[Cell]) -> list[Timeline]:
    """Of up to MOST_RUNS cells: those with a mark first."""
    marked = [any(doubt.kind in VALIDITY for doubt in cell.doubts) for cell in cells]
    places = sorted(range(len(cells)), key=lambda place: not marked[place])[:MOST_RUNS]
    found = []
    for place in sorted(places):
        key = (cells[place].run_id, cells[place].loads[-1])
        for (path,) in store.tuples("SELECT path FROM results WHERE run_id = ? AND attempt_id = ?", key):
            record = documents.read_at(workspace.data / path, RunResult)
            if record is not None and record.telemetry is not None:
                found.append(Timeline(place, record.telemetry, record.repeats))
    return [one for one in found if one.bands]


def rows_of(one: Timeline, key: str, bands: int) -> Iterator[JsonRow]:
    """The rows of a run: `kind` is "phase", "repeat", "label" or "sample". `at` is a place from the bottom, in bands."""
    times, phases = one.telemetry.times_s, one.telemetry.phases
    end = times[-1]

    def row(kind: str, what: str, start_s: float, **more: object) -> JsonRow:
        return {"measure": key, "kind": kind, "what": what, "t": round(start_s, 2), **more}

    for phase, later in zip(phases, [*(other.start_s for other in phases[1:]), end], strict=True):
        name = phase.name if later - phase.start_s > NAMED_SHARE * (end - times[0]) else ""
        yield row("phase", phase.name, phase.start_s, end=round(later, 2), at=bands, name=name)
    for repeat in one.repeats:
        if (start_s := repeat.started_s) is not None:
            yield row("repeat", f"repeat {repeat.repeat}", start_s, end=round(start_s + repeat.wall_s, 2))
    for place, (title, unit, lines) in enumerate(one.bands, 1):
        bottom = bands - place
        highest = max(value for _, values in lines for value in values if value is not None) or 1.0
        yield row("label", f"{title}, 0 to {figure(highest, unit)}", times[0], at=round(bottom + FILLED, 1))
        for device, values in lines:
            gpus = [gpu for gpu in one.telemetry.gpus if f"GPU {gpu.index}" == device and title == "SM clock"]
            reasons = gpus[0].throttle_reasons if gpus else []
            for start_s, value, held in _points(times, values, reasons):
                at = round(bottom + FILLED * value / highest, 3)
                more = {"held": True} if held else {}
                yield row("sample", title, start_s, device=device, at=at, value=figure(value, unit), **more)


def _points(
    times: Sequence[float], values: Sequence[float | None], reasons: Sequence[int | None]
) -> list[tuple[float, float, bool]]:
    """(time, mean, whether heat or a fault held the clock back) of neighbouring samples, at most MOST_POINTS, without those that
    equal both neighbours."""
    step = -(-len(times) // MOST_POINTS)
    points = []
    for first in range(0, len(times), step):
        known = [value for value in values[first : first + step] if value is not None]
        if known:
            held = any((bits or 0) & MASK for bits in reasons[first : first + step])
            points.append((times[first], sum(known) / len(known), held))
    states = [point[1:] for point in points]
    return [point for at, point in enumerate(points) if states[max(0, at - 1) : at + 2] != [point[1:]] * 3]
