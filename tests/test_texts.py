"""The answers of some runs beside one another: greedy against sampled, and what is told of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from labctl_orchestrator.analysis.answers import RunAnswers, answer_pairs, summaries
from labctl_workers.record import RunSpec, Sample, Sampling, run_id_of

from .conftest import JobArray, Labctl, Records, measured, refused

WORDS = {str(token): f" w{token}" for token in range(10)}


def sample(tokens: Sequence[int], *, log_probability: float | None = -1.0, end: str = "stop") -> Sample:
    text = "".join(WORDS[str(token)] for token in tokens)
    scores = None if log_probability is None else [log_probability] * len(tokens)
    return Sample(0, 0, 5, list(tokens), [0.1] * len(tokens), end, text, log_probabilities=scores)


def answers(run_id: str, *of_prompts: list[Sample]) -> RunAnswers:
    return RunAnswers(
        run_id, run_id, "same", {f"prompt {n}": of_prompt for n, of_prompt in enumerate(of_prompts)}, WORDS
    )


def test_all_answers_of_a_run_are_told_beside_the_first_runs() -> None:
    greedy = answers("greedy", [sample([1, 2, 3, 4])] * 2, [sample([5, 6, 5, 6])] * 2)
    sampled = answers(
        "sampled",
        [sample([1, 2, 9, 9], log_probability=-2.0, end="length"), sample([1, 2, 3, 4])],
        [sample([5, 7], log_probability=-3.0), sample([8], log_probability=-4.0)],
    )
    first, second = summaries([greedy, sampled])
    assert (first.answers, first.distinct, first.exact_match, first.equal_tokens) == (4, 1.0, 1.0, 4.0)
    assert first.repeated_bigrams == pytest.approx(1 / 6)  # of 0, 0, 1/3 and 1/3
    assert (second.answers, second.distinct, second.exact_match) == (4, 2.0, 0.25)
    assert second.equal_tokens == 1.5  # of 2, 4, 1 and 0
    assert second.mean_log_probability == -2.5  # of -2, -1, -3 and -4
    assert second.tokens == 3.0
    assert second.finish_reasons == {"length": 1, "stop": 3}


def test_what_was_not_scored_has_no_log_probability() -> None:
    (only,) = summaries([answers("a", [sample([1], log_probability=None)])])
    assert (only.mean_log_probability, only.repeated_bigrams) == (None, None)


def test_runs_of_other_prompts_are_refused() -> None:
    other = replace(answers("b"), samples={"another prompt": [sample([1])]})
    refused(lambda: summaries([answers("a", [sample([1])]), other]))


def test_the_first_answers_are_paired() -> None:
    (pair,) = answer_pairs(answers("a", [sample([1, 2]), sample([3])]), answers("b", [sample([1, 3]), sample([3])]))
    assert (pair.equal_tokens, pair.first.token, pair.second.token) == (1, " w2", " w3")


# ---------------------------------------------------------------- the command


def three_samplings(records: Records) -> JobArray:
    """One request: greedy, and two seeds."""

    def jobs(**values: object) -> list[object]:
        (job,) = Records.jobs(records, **values)  # type: ignore[arg-type]
        run = job.runs[0]
        for seed in (1, 2):
            asked = {**run.definition, "seed": seed}
            sampling = Sampling(0.7, 0.9, seed)
            job.runs.append(RunSpec(run_id_of(asked), asked, "p", run.max_new_tokens, sampling=sampling, repeats=2))
        return [job]

    records.jobs = jobs  # type: ignore[method-assign, assignment]
    batch = records.submit()
    del records.jobs  # type: ignore[attr-defined]
    attempt = records.attempt(batch)
    for number, run in enumerate(batch.runs):
        made = [measured(0), measured(1)]
        for repeat in made:
            repeat.samples = [sample([1, 2, 3, 4] if number == 0 else [1, 2, number + 4, repeat.repeat])]
        records.done(batch, attempt, run, repeats=made, tokens=WORDS)
    return batch


def test_greedy_and_sampled_answers_are_in_one_view(labctl: Labctl, records: Records) -> None:
    batch = three_samplings(records)
    ids = [run.run_id for run in batch.runs]
    shown = labctl("compare", "--text")
    assert shown.code == 0, shown.err
    assert "temperature=0.7,top_p=0.9,seed=2" in shown.out
    for run_id in ids[1:]:
        assert f"{run_id}: the same for 2 tokens (of the first of 2 answers)" in shown.out
    assert " w1 w2[[ w5]] w0" in shown.out
    found = labctl("compare", "--text", "--json").json
    assert found["runs"] == ids
    assert [one["exact_match"] for one in found["answers"]] == [1.0, 0.0, 0.0]
    assert [pair["runs"] for pair in found["pairs"]] == [[ids[0], ids[1]], [ids[0], ids[2]]]


def test_conditions_and_a_baseline_choose_what_is_read_and_what_it_is_compared_with(
    labctl: Labctl, records: Records
) -> None:
    ids = [run.run_id for run in three_samplings(records).runs]
    found = labctl("compare", "--text", "--where", "sampling!=temperature=0.7,top_p=0.9,seed=2", "--json").json
    assert found["runs"] == ids[:2]
    found = labctl("compare", "--text", "--baseline", "temperature=0.7,top_p=0.9,seed=2", "--json").json
    assert found["runs"] == [ids[2], ids[0], ids[1]]


def test_one_run_alone_is_refused_with_the_remedy(labctl: Labctl, records: Records) -> None:
    ids = [run.run_id for run in three_samplings(records).runs]
    ran = labctl("compare", "--text", ids[0])
    assert (ran.code, "labctl compare --text RUN RUN" in ran.err) == (2, True)
