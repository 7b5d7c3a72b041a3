"""Perplexity: windows, the text of a run, its scores in the record, its interval over documents, and what a person reads."""

from __future__ import annotations

import json
import math
import random
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labctl_orchestrator.analysis import bootstrap
from labctl_orchestrator.analysis.bootstrap import FEWEST_DOCUMENTS, ratio_of_sums
from labctl_orchestrator.analysis.intervals import t_975, variance
from labctl_orchestrator.request import text_file
from labctl_orchestrator.request.packing import PREFILL_S, need_s
from labctl_orchestrator.request.plan import Device, Plan, make_plan
from labctl_orchestrator.request.request import FABLES, build
from labctl_orchestrator.request.settings import request_file
from labctl_orchestrator.request.sweep import Sweep
from labctl_slurm.errors import WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import foreseen
from labctl_workers.record import (
    JobSpec,
    ModelRef,
    Refusal,
    RunSpec,
    ScoredText,
    TextScores,
    sha256_of_json,
    write_json,
)
from labctl_workers.score import score, windows

from .conftest import JobArray, Labctl, Records, Slurm, sacct_line
from .models import shallow, smollm2  # noqa: F401  fixtures

# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "expected"),
    [
        (10, 4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        (10, 4, 4, [(0, 1, 4), (4, 5, 8), (8, 9, 10)]),  # the first token of each is not scored
        (9, 4, 4, [(0, 1, 4), (4, 5, 8)]),
        (4, 4, 2, [(0, 1, 4)]),
        (2, 4, 2, [(0, 1, 2)]),
        (1, 4, 2, []),
        (0, 4, 2, []),
    ],
)
def test_windows_of_a_document(tokens: int, window: int, stride: int, expected: list[tuple[int, int, int]]) -> None:
    assert list(windows(tokens, window, stride)) == expected


def test_windows_that_overlap_score_each_token_but_the_first_once() -> None:
    draw = random.Random(1)
    for _ in range(200):
        window = draw.randint(2, 40)
        stride, tokens = draw.randint(1, window - 1), draw.randint(1, 200)
        found = list(windows(tokens, window, stride))
        assert [at for _, first, end in found for at in range(first, end)] == list(range(1, tokens))
        assert all(end - begin <= window and first > begin for begin, first, end in found)


class Text:
    """A tokenizer of a token for each letter."""

    longest = None

    def token_ids(self, text: str) -> list[int]:
        return list(map(ord, text))


class Scorer:
    """An engine whose log-probability of a token is minus its context's length, or what `answers` says."""

    text = Text()

    def __init__(self, answers: Sequence[float] | None = ()) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str]] = []

    def log_probabilities(self, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float] | None:
        self.asked.append(("".join(map(chr, prompt)), "".join(map(chr, token_ids))))
        if self.answers is None or self.answers:
            return None if self.answers is None else list(self.answers)
        return [-float(len(prompt) + place) for place in range(len(token_ids))]


RUN = RunSpec("r", {"dtype": "float16"}, "p", 1, score=ScoredText("t", "0", 4, 2))


def test_the_sums_of_each_document_are_those_of_its_windows() -> None:
    engine: Any = Scorer()
    found = score(engine, RUN, ["abcdef", "x", "yz"], [])
    assert engine.asked == [("a", "bcd"), ("cd", "ef"), ("y", "z")]
    assert found == TextScores([1 + 2 + 3 + 2 + 3, 0.0, 1.0], [5, 0, 1])


def test_a_text_that_the_engine_does_not_score_leaves_the_reason() -> None:
    engine: Any = Scorer(None)
    found = score(engine, RUN, ["abcdef"], [])
    assert (found.nll, found.tokens) == ([], [])
    assert found.error == "no log-probabilities of document 0, tokens 0 to 4: see the job's log"


def test_log_likelihoods_that_are_not_finite_fail_the_run() -> None:
    engine: Any = Scorer([float("nan")])
    with pytest.raises(Refusal) as caught:
        score(engine, RUN, ["ab"], [])
    assert caught.value.kind == "logits-not-finite"


@pytest.mark.model
def test_transformers_own_loss_gives_the_same_sums(shallow: Path) -> None:  # noqa: F811
    """The reference of the documentation, on the first fables, in windows that overlap and that do not."""
    from labctl_workers.engines import make_engine
    from tests.benchmarks.bare_perplexity import window_scores
    from tests.reference import model_of

    documents = text_file.read(FABLES).documents[:2]
    job = JobSpec("j", "local", "local", "hf", ModelRef("m", path=str(shallow)), "float32", "cpu", 1, [], {})
    engine = make_engine(job, shallow)
    engine.load()
    model = model_of(shallow, "cpu")
    for window, stride in ((64, 24), (64, 64)):
        found = score(engine, replace(RUN, score=ScoredText("t", "0", window, stride)), documents, [])
        sums = [window_scores(model, engine.text.token_ids(text), window, stride) for text in documents]
        assert found.tokens == [tokens for _, tokens in sums]
        for ours, (theirs, tokens) in zip(found.nll, sums, strict=True):
            assert math.exp(ours / tokens) == pytest.approx(math.exp(theirs / tokens), rel=1e-4)


# ---------------------------------------------------------------- the text of a submission


def test_the_shipped_text_has_a_document_for_each_fable() -> None:
    found = text_file.read(FABLES)
    assert found.name == "fables"
    assert len(found.documents) >= 2 * FEWEST_DOCUMENTS
    assert all(document.count("\n\n") >= 1 for document in found.documents)  # a title and its text
    assert "\n\n\n" not in "".join(found.documents)


def test_two_empty_lines_part_the_documents_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\n\nstill one\n\n \n\ntwo\r\n\r\n\r\n\n\nthree\n")
    assert text_file.read(str(file)).documents == ["one\n\nstill one", "two", "three"]


def test_json_lines_have_a_document_each(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one\\n\\n\\ntwo", "id": 1}\n\n{"text": "three"}\n')
    assert text_file.read(str(file)).documents == ["one\n\n\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n\n ", "no documents in text"),
        ("a.txt", b"\xff", "cannot read text"),
        ("a.jsonl", b'{"text": "one"}\n{"prompt": "two"}', "line 2 has no text"),
        ("a.jsonl", b"one", "line 1 is not JSON"),
        ("a.toml", b"x = 1", "not a text to score"),
        ("missing.txt", None, "cannot read text"),
    ],
)
def test_another_file_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WrongUseError, match=message) as caught:
        text_file.read(str(tmp_path / name))
    assert caught.value.remedy


def planned(**keys: Any) -> Plan:
    sweep = Sweep(build([("f", {"partition": "dgxh", "model_id": "m", **keys})]))
    partition = Partition(name="dgxh", dtype="bfloat16", gpu="H100", capability="9.0")
    return make_plan(
        sweep, {"dgxh": partition}, {("m", "main"): ModelRef("m", "c" * 40)}, lambda of: Device("cuda", "9.0")
    )


def run_of(**keys: Any) -> RunSpec:
    (run,) = planned(**keys).runs
    return run


def test_a_scored_text_is_another_run_by_its_content_and_windows(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.txt", "same.txt", "other.txt"))
    one.write_text("a text")
    same.write_text("a text")
    other.write_text("another text")
    first = run_of(score=str(one))
    assert first.score == ScoredText("one.txt", text_file.read(str(one)).sha256, 1024, 512)
    assert run_of(score=str(same)).run_id == first.run_id
    ids = [
        first.run_id,
        run_of().run_id,
        run_of(score=str(other)).run_id,
        run_of(score=str(one), score_window=512).run_id,
        run_of(score=str(one), score_stride=1024).run_id,
    ]
    assert len(set(ids)) == 5
    assert "score" not in run_of().definition


def test_a_job_has_the_documents_and_the_time_to_score_them() -> None:
    (with_text,), (without,) = planned(score=FABLES).jobs, planned().jobs
    text = text_file.read(FABLES)
    assert with_text.texts == {text.sha256: text.documents}
    more = need_s(with_text, with_text.runs[0], None) - need_s(without, without.runs[0], None)
    tokens = sum(len(document.encode()) for document in text.documents) / 4
    assert more == pytest.approx(2 * PREFILL_S * tokens, rel=0.01)


def test_a_file_lies_beside_its_submission_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('score = "a.txt"\n')
    assert request_file(str(file))[1]["score"] == str(tmp_path / "a.txt")
    file.write_text('score = "fables"\n')
    assert request_file(str(file))[1]["score"] == FABLES


def test_a_stride_is_at_most_a_window() -> None:
    with pytest.raises(WrongUseError, match="score_stride is longer than a window: 512 of 256 tokens"):
        build([("flags", {"partition": "p", "score": FABLES, "score_window": 256})])


def test_a_window_that_the_model_has_no_positions_for_is_refused_before_the_queue() -> None:
    from types import SimpleNamespace

    (job,) = planned(score=FABLES).jobs
    config = SimpleNamespace(max_position_embeddings=1024, rope_scaling=None, num_hidden_layers=2)
    (refusal,) = [one for one in foreseen(job, config, None) if one.kind == "score-window"]
    assert refusal.message == "windows of the scored text are too long: 1024 tokens, m has at most 1024"
    config.max_position_embeddings = 1025  # vLLM generates a token after the window
    assert [one.kind for one in foreseen(job, config, None)] == []


def test_transformers_serve_gives_no_scores() -> None:
    (job,) = planned(score=FABLES, serve=True, gpus=1).jobs
    assert "serve-scores" in [one.kind for one in foreseen(job, None, None)]


# ---------------------------------------------------------------- the interval


def test_equal_weights_give_the_interval_of_a_mean() -> None:
    """With equal weights the ratio is a mean; for values of a symmetric distribution the interval is close to Student's."""
    draw = random.Random(3)
    values = tuple(draw.gauss(2.0, 1.0) for _ in range(60))
    found = ratio_of_sums(values, (5,) * 60)
    mean, half = sum(values) / 300, t_975(59) * math.sqrt(variance([value / 5 for value in values]) / 60)
    assert found.difference == pytest.approx(mean)
    assert found.low == pytest.approx(mean - half, abs=0.2 * half)
    assert found.high == pytest.approx(mean + half, abs=0.2 * half)


def test_values_in_proportion_to_their_weights_have_no_spread() -> None:
    weights = tuple(range(10, 40))
    found = ratio_of_sums(tuple(0.25 * weight for weight in weights), weights)
    assert found == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_is_the_same_at_each_call_and_turns_with_the_sign() -> None:
    draw = random.Random(4)
    weights = tuple(draw.randint(50, 400) for _ in range(25))
    values = tuple(draw.expovariate(1.0) * weight for weight in weights)
    found = ratio_of_sums(values, weights)
    assert ratio_of_sums.__wrapped__(values, weights) == found
    turned = ratio_of_sums(tuple(-value for value in values), weights)
    assert (turned.low, turned.high) == pytest.approx((-(found.high or 0), -(found.low or 0)))


def test_few_documents_have_no_interval() -> None:
    assert ratio_of_sums((1.0,) * (FEWEST_DOCUMENTS - 1), tuple(range(1, FEWEST_DOCUMENTS))).low is None
    assert ratio_of_sums((1.0, 2.0), (0, 2)) == (1.0, None, None)
    assert ratio_of_sums((), ()) == (0.0, None, None)


def test_many_documents_are_drawn_in_groups() -> None:
    draw = random.Random(5)
    weights = tuple(draw.randint(50, 400) for _ in range(3000))
    values = tuple(draw.gauss(0.1, 1.0) * weight for weight in weights)
    found = ratio_of_sums(values, weights)
    assert found.difference == pytest.approx(sum(values) / sum(weights))
    half = (
        t_975(2999)
        * math.sqrt(variance([v - found.difference * w for v, w in zip(values, weights, strict=True)]) * 3000)
        / sum(weights)
    )
    assert ((found.high or 0) - (found.low or 0)) / 2 == pytest.approx(half, rel=0.15)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 texts of 20 documents whose differences have a skewed distribution; `benchmarks/perplexity_coverage.py` has more."""
    from tests.benchmarks.perplexity_coverage import coverage

    monkeypatch.setattr(bootstrap, "DRAWS", 500)
    held = coverage(300, 20, skewed=True)
    assert 0.91 <= held <= 0.98


# ---------------------------------------------------------------- compare, show, query


DOCUMENTS = 12
TEXT = sha256_of_json(["one", "two"])


def sums(perplexity: float, *, shift: float = 0.0, seed: int = 1, documents: int = DOCUMENTS) -> TextScores:
    """Scores of documents around a perplexity; `shift` moves the mean log-likelihood of each by about so much."""
    draw = random.Random(seed)
    tokens = [draw.randint(80, 300) for _ in range(documents)]
    noise = random.Random(seed + 1)
    nll = [count * (math.log(perplexity) + draw.gauss(0, 0.3)) for count in tokens]
    moved = [value + count * (shift + 0.001 * noise.gauss(0, 1)) for value, count in zip(nll, tokens, strict=True)]
    return TextScores(moved if shift else nll, tokens)


@pytest.fixture
def pair(records: Records, slurm: Slurm) -> JobArray:
    """Two runs of one partition that scored a text, in a job each."""
    slurm.accepts(2000)

    def scores_a_text(job: JobSpec, run: RunSpec) -> None:
        job.texts = {TEXT: ["one", "two"]}
        run.score = ScoredText("fables", TEXT, 1024, 512)

    batch = records.submit(dtypes=("float32", "bfloat16"), lengths=(8,), change=scores_a_text)
    name = f"labctl-{batch.array_id}"
    slurm.shows("", "".join(sacct_line(f"1000_{task}", "COMPLETED", name) for task in (0, 1)))
    return batch


def measure(records: Records, batch: JobArray, task: int, scores: TextScores | None, **more: Any) -> RunSpec:
    run = batch.jobs[task].runs[0]
    records.done(batch, records.attempt(batch, task, slurm_id=f"1000_{task}"), run, scores=scores, **more)
    return run


def perplexity_of(scores: TextScores) -> float:
    return math.exp(sum(scores.nll) / sum(scores.tokens))


def test_compare_says_what_a_dtype_costs_in_perplexity(labctl: Labctl, records: Records, pair: JobArray) -> None:
    theirs, ours = sums(20.0), sums(20.0, shift=0.003)
    measure(records, pair, 0, theirs)
    run = measure(records, pair, 1, ours)
    answer = labctl("compare", "--by", "dtype", "--metric", "perplexity", "--json").json
    row = next(row for row in answer["blocks"][0]["rows"] if row["run_id"] == run.run_id)
    assert row["mean"] == pytest.approx(perplexity_of(ours))
    assert row["ratio"] == pytest.approx(perplexity_of(ours) / perplexity_of(theirs))
    assert (row["n"], row["n_of"], row["verdict"]["kind"]) == (DOCUMENTS, "documents", "worse")
    differences = [one - other for one, other in zip(ours.nll, theirs.nll, strict=True)]
    low, high = (math.log(bound) for bound in row["ratio_interval"])
    # Student's interval of the ratio of sums, which the bootstrap is close to here.
    mean = sum(differences) / sum(ours.tokens)
    rest = [one - mean * count for one, count in zip(differences, ours.tokens, strict=True)]
    half = t_975(DOCUMENTS - 1) * math.sqrt(variance(rest) * DOCUMENTS) / sum(ours.tokens)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.5 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.5)
    last = labctl("compare", "--by", "dtype").out.strip().splitlines()[-1]
    change = (row["ratio"] - 1) * 100
    assert f"not significant, perplexity {change:+.2g}% (+0." in last


def test_runs_of_one_text_and_several_loads_are_averaged_and_other_texts_are_not_paired(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    run = measure(records, pair, 0, sums(20.0))
    other = records.attempt(pair, 0, slurm_id="3000_0", age_s=10)
    records.done(pair, other, run, scores=sums(20.0, shift=0.01))
    labctl("collect")
    query = f"SELECT perplexity, mean_log_likelihood, score FROM measured_runs WHERE run_id = '{run.run_id}'"
    (row,) = labctl("query", "--json", query).json
    both = [sums(20.0), sums(20.0, shift=0.01)]
    expected = math.exp(sum(sum(one.nll) / sum(one.tokens) for one in both) / 2)
    assert row["perplexity"] == pytest.approx(expected)
    assert row["mean_log_likelihood"] == pytest.approx(-math.log(expected))
    assert row["score"] == f"fables@{TEXT[:8]} 1024/512"
    answer = labctl("compare", run.run_id, "--metric", "perplexity", "--json").json
    assert answer["blocks"][0]["rows"][0]["mean"] == pytest.approx(expected)


def test_perplexities_over_different_tokens_are_not_compared(labctl: Labctl, records: Records, pair: JobArray) -> None:
    measure(records, pair, 0, sums(20.0))
    measure(records, pair, 1, sums(20.0, seed=9))
    answer = labctl("compare", "--by", "dtype", "--json").json
    rows = [row for block in answer["blocks"] if block["metric"] == "perplexity" for row in block["rows"]]
    assert rows[1]["not_comparable"] == "the text has other tokens: the models have different tokenizers"
    assert rows[1]["ratio"] is None
    assert any(one.startswith("perplexity cannot be compared: the text has other tokens") for one in answer["warnings"])


def test_show_prints_perplexity_with_its_interval_or_why_there_is_none(
    labctl: Labctl, records: Records, pair: JobArray
) -> None:
    scores = sums(20.0)
    run = measure(records, pair, 0, scores)
    told = " ".join(labctl("show", run.run_id).out.split())
    assert f"perplexity {perplexity_of(scores):.4g} (95% CI " in told
    assert f"{DOCUMENTS} documents, {sum(scores.tokens):,} tokens" in told
    other = measure(records, pair, 1, TextScores(error="no log-probabilities of document 0"))
    told = " ".join(labctl("show", other.run_id).out.split())
    assert "perplexity not computed: no log-probabilities of document 0" in told
    answer = labctl("compare", "--by", "dtype", "--json").json
    assert f"no value for perplexity: {other.run_id}" in answer["notes"]


def test_runs_without_a_text_have_no_column_and_no_note(labctl: Labctl, records: Records, pair: JobArray) -> None:
    for task in (0, 1):
        measure(records, pair, task, None)
    answer = labctl("compare", "--by", "dtype")
    assert "perplexity" not in answer.out + answer.err
    asked = labctl("compare", "--by", "dtype", "--metric", "perplexity").err
    assert "perplexity has no value where no text is scored (--score)" in asked


def test_scores_that_are_no_numbers_are_no_perplexity(labctl: Labctl, records: Records, pair: JobArray) -> None:
    run = measure(records, pair, 0, TextScores([float("nan"), 1.0], [3, 4]))
    labctl("collect")
    query = f"SELECT perplexity FROM measured_runs WHERE run_id = '{run.run_id}'"
    assert labctl("query", "--json", query).json == [{"perplexity": None}]


def test_a_bundle_keeps_text_and_scores(labctl: Labctl, records: Records, pair: JobArray, tmp_path: Path) -> None:
    for task in (0, 1):
        measure(records, pair, task, sums(20.0))
    bundle = tmp_path / "b.zip"
    assert labctl("bundle", "--output", str(bundle)).code == 0
    with zipfile.ZipFile(bundle) as archive:
        documents = {name: json.loads(archive.read(name)) for name in archive.namelist() if name.endswith(".json")}
    jobs = [document for document in documents.values() if "prompt_sets" in document]
    results = [document for document in documents.values() if "repeats" in document]
    assert [job["texts"] for job in jobs] == [{TEXT: ["one", "two"]}] * 2
    assert [record["scores"]["nll"] for record in results] == [sums(20.0).nll] * 2


def test_a_bundle_whose_text_was_changed_is_refused(
    labctl: Labctl, records: Records, pair: JobArray, tmp_path: Path
) -> None:
    measure(records, pair, 0, sums(20.0))
    measure(records, pair, 1, sums(20.0))
    job = pair.spec(1)
    write_json(job, {**json.loads(job.read_text()), "texts": {TEXT: ["one", "three"]}})
    bundle = tmp_path / "b.zip"
    assert labctl("bundle", "--output", str(bundle)).code == 0
    ran = labctl("import", str(bundle), "--origin", "other")
    assert ran.code == 2
    assert "another configuration than the hashed one" in ran.err
