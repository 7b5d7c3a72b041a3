"""What judges passes that took turns: tests/benchmarks/pairs.py and vllm_truth.py."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    before = set(sys.modules)
    yield
    for name in {"pairs", "report", "vllm_passes", "vllm_truth"} & (set(sys.modules) - before):
        del sys.modules[name]


def passes_of(chance: random.Random, ratios: list[float], number: int) -> tuple[Any, Any]:
    """Of engines that differ from their partners by these ratios: on a machine whose speed changes from minute to minute, the
    passes that follow one another being alike within a hundredth; every tenth is disturbed."""
    own, reference = [], []
    for ratio in ratios:
        speeds = [chance.choice((1.0, 1.3, 1.6)) for _ in range(number)]
        reference.append([{"took_s": speed * chance.gauss(1, 0.01)} for speed in speeds])
        disturbed = [3.0 if n % 10 == 9 else 1.0 for n in range(number)]
        own.append(
            [{"took_s": ratio * speed * d * chance.gauss(1, 0.01)} for speed, d in zip(speeds, disturbed, strict=True)]
        )
    return own, reference


def test_a_difference_of_two_hundredths_is_told_on_a_machine_whose_speed_changes_by_half() -> None:
    from pairs import ratio_of

    own, reference = passes_of(random.Random(1), [1.02, 1.02], 100)

    ratio, low, high = ratio_of(own, reference, "took_s")

    assert low < ratio < high
    assert ratio == pytest.approx(1.02, abs=0.005)
    assert high - low < 0.01


def test_engines_that_differ_widen_the_interval_for_any_engines_alone() -> None:
    from pairs import ratio_of

    own, reference = passes_of(random.Random(1), [0.95, 1.0, 1.07], 100)

    ratio, low, high = ratio_of(own, reference, "took_s")
    same, lower, higher = ratio_of(own, reference, "took_s", other_engines=True)

    assert same == ratio
    assert high - low < 0.01
    assert lower < 0.97
    assert higher > 1.04


def test_passes_are_enough_when_every_ratio_is_told_narrowly() -> None:
    from pairs import settled

    comparisons = [("own", "reference", "", ("took_s", "absent"))]

    def enough(number: int) -> bool:
        own, reference = passes_of(random.Random(1), [1.0], number)
        return settled({"own": own, "reference": reference}, comparisons, 0.01)

    assert not enough(8)
    assert enough(200)


@pytest.mark.parametrize(("theirs", "differs"), [("512", {}), ("1024", {"max_seq_len": ["512", "1024"]})])
def test_settings_that_vllm_tells_in_two_logs_are_held_against_each_other(
    tmp_path: Path, theirs: str, differs: dict[str, list[str]]
) -> None:
    from vllm_truth import set_up_differently

    config = "model='/m', max_seq_len={}, seed=0, compilation_config={{'mode': <NONE: 0>, 'sizes': [1, 2]}}, enforce_eager=True"
    line = f"(EngineCore pid=7) INFO [core.py:116] Initializing a V1 LLM engine (v0.26.0) with config: {config}\n"
    for name, value in (("own", "512"), ("theirs", theirs)):
        (tmp_path / name).write_text(f"before\n{line.format(value)}after, seed=1\n")

    assert set_up_differently(tmp_path / "own", tmp_path / "theirs") == differs


def test_a_log_that_tells_no_settings_is_a_difference(tmp_path: Path) -> None:
    from vllm_truth import set_up_differently

    (tmp_path / "own").write_text("nothing\n")
    (tmp_path / "theirs").write_text("nothing\n")

    assert "not told" in str(set_up_differently(tmp_path / "own", tmp_path / "theirs"))
