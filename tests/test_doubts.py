"""A figure from a short or strange measurement has a mark and a note, in compare, show and the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest

from labctl_orchestrator.analysis import doubts
from labctl_orchestrator.report.findings import ReportScope, gather
from labctl_orchestrator.report.page import _verdict_tables
from labctl_orchestrator.store.collect import collect
from labctl_orchestrator.store.database import open_store
from labctl_workers.record import Repeat, Sample

from .conftest import Labctl, Records, measured

RATE, TTFT, PEAK = "output_tok_s", "ttft_s", "peak_allocated_bytes"
SHORT = "shortest repeat 0.4 s: times under 1 s are not exact; raise max_new_tokens or batch_size"
FEW = "prompt of 11 tokens: below 16, ttft and prefill_tok_s show only the fixed cost of a step; use a longer prompt"


def passes(
    wall_s: float = 2.0, *, prompt_tokens: int = 64, text: str = "a shard each", tokens: int = 4, ended: str = "length"
) -> list[Repeat]:
    found = [measured(number, text=text, tokens=tokens) for number in range(3)]
    for repeat in found:
        repeat.wall_s = wall_s
        repeat.samples[0].prompt_tokens = prompt_tokens
        repeat.samples[0].finish_reason = ended
    return found


def measure(records: Records, repeats: Sequence[Repeat]) -> str:
    batch = records.submit()
    records.done(batch, records.attempt(batch), repeats=list(repeats))
    return batch.runs[0].run_id


def marks(labctl: Labctl, *metrics: str) -> tuple[dict[str, list[str]], list[str]]:
    """(the doubts of the run's figure, by metric; the notes with a mark)."""
    flags = [word for metric in metrics for word in ("--metric", metric)]
    answer = labctl("compare", "--json", *flags).json
    of_rows = {block["metric"]: row["doubts"] for block in answer["blocks"] for row in block["rows"]}
    return of_rows, [note for note in answer["notes"] if note.startswith("* ")]


def test_a_pass_under_a_second_is_called_short_in_compare_show_and_report(labctl: Labctl, records: Records) -> None:
    run_id = measure(records, passes(0.4))
    assert marks(labctl, RATE, PEAK) == ({RATE: ["short pass"], PEAK: []}, [f"* {SHORT}"])
    shown = labctl("compare", "--metric", RATE, "--metric", PEAK)
    assert ("tok/s*" in shown.out, "GiB*" in shown.out) == (True, False)
    assert f"note: * {SHORT}" in " ".join(shown.err.split())
    assert f"* {SHORT}" in " ".join(labctl("show", run_id).out.split())
    with closing(open_store(records.workspace)) as store:
        collect(records.workspace, store)
        found = gather(records.workspace, store, ReportScope(metrics=(RATE, PEAK)))
    assert f"* {SHORT}" in found.comparison.notes
    medians = [
        table.rows[0][[column.title for column in table.columns].index("mean")] for table in _verdict_tables(found)
    ]
    assert [median.endswith("*") for median in medians] == [True, False]


def test_values_for_a_spreadsheet_have_no_mark(labctl: Labctl, records: Records) -> None:
    measure(records, passes(0.4))
    assert "*" not in labctl("compare", "--metric", RATE, "--csv").out


def test_a_pass_of_a_second_and_a_longer_prompt_need_no_word(labctl: Labctl, records: Records) -> None:
    run_id = measure(records, passes(1.0, prompt_tokens=16))
    assert marks(labctl, RATE, TTFT) == ({RATE: [], TTFT: []}, [])
    assert "*" not in labctl("show", run_id).out


def test_a_prompt_of_few_tokens_is_called_so_where_ttft_is_compared(labctl: Labctl, records: Records) -> None:
    run_id = measure(records, passes(prompt_tokens=11))
    assert marks(labctl, RATE) == ({RATE: []}, [])
    assert marks(labctl, RATE, TTFT) == ({RATE: [], TTFT: ["short prompt"]}, [f"* {FEW}"])
    assert f"* {FEW}" in " ".join(labctl("show", run_id).out.split())


def test_one_longer_prompt_among_short_ones_is_enough(labctl: Labctl, records: Records) -> None:
    repeats = passes(prompt_tokens=11)
    for repeat in repeats:
        repeat.samples.append(Sample(1, 1, 64, [1, 2], [0.1, 0.2], "length", "two"))
    measure(records, repeats)
    assert marks(labctl, TTFT)[1] == []


@pytest.mark.parametrize(
    ("more", "kind", "told"),
    [
        (
            {"text": " \n", "ended": "stop"},
            "empty answers",
            "3 answers without text: the model ended at once; check the prompt, or use --ignore-eos",
        ),
        (
            {"text": " \n"},
            "tokens without text",
            "3 answers without text: all tokens are special tokens or spaces; check the prompt and the model",
        ),
        ({"text": "", "tokens": 0}, "no tokens", "3 answers of 0 tokens: no speed was measured;"),
    ],
)
def test_answers_of_nothing_are_counted(
    labctl: Labctl, records: Records, more: dict[str, Any], kind: str, told: str
) -> None:
    run_id = measure(records, passes(**more))
    found, (note,) = marks(labctl, RATE, PEAK)
    assert found[PEAK] == [kind]
    assert note.startswith(f"* {told}")
    assert told in " ".join(labctl("show", run_id).out.split())


def test_many_runs_have_one_note_with_the_span() -> None:
    assert doubts.sentence(doubts.SHORT_PASS, [0.4, 0.005, 0.9], " (7 runs)").startswith(
        "shortest repeats 5.0 ms to 0.9 s (7 runs): times under 1 s are not exact"
    )


def test_what_is_not_known_is_no_doubt() -> None:
    assert doubts.of_run(None, None, 0, 0, None) == []
    assert not doubts.Doubt(doubts.SHORT_PASS, 0.1).concerns("load_s")
