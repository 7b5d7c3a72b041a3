"""A request becomes runs and jobs: what multiplies, what shares an engine load, and what a run's id depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.models import resolve
from labctl_orchestrator.request.plan import Device, Plan, make_plan, resolved_dtype
from labctl_orchestrator.request.request import AXES, Axes, SubmissionSpec
from labctl_orchestrator.request.sweep import Sweep
from labctl_slurm import partitions
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers import engines
from labctl_workers.record import JobSpec, ModelRef, RunSpec

from .conftest import Labctl, Slurm, refused, write_checkpoint

MODELS = {name: ModelRef(name, path=f"/models/{name}", fingerprint=name * 8) for name in ("one", "two", "three")}
ONE = SubmissionSpec(partition=("dgxh",), model_id=("one",))


def partition(name: str = "dgxh", **values: Any) -> Partition:
    shipped = partitions.shipped().get(name, {})
    return partitions.build(name, [("shipped", shipped), ("test", values)])


def planned(
    request: SubmissionSpec,
    known: Mapping[str, Partition] | None = None,
    model: ModelRef | None = None,
    kind: str = "cuda",
) -> Plan:
    tables = known or {name: partition(name) for name in request.partition}
    refs = {(name, revision): model or MODELS[name] for name in request.model_id for revision in request.revision}
    return make_plan(Sweep(request), tables, refs, lambda _: Device(kind, "9.0" if kind == "cuda" else None))


def ids(plan: Plan) -> set[str]:
    return {run.run_id for run in plan.runs}


def changed(request: SubmissionSpec, **values: Any) -> SubmissionSpec:
    return msgspec.structs.replace(request, **values)


# ---------------------------------------------------------------- what multiplies, what is shared


def test_the_axes_multiply() -> None:
    request = SubmissionSpec(
        partition=("dgx2", "dgxh"),
        backend=("hf", "vllm"),
        model_id=("one", "two"),
        dtype=("float16", "float32"),
        gpus=(1, 2),
        batch_size=(1, 8),
        sampling=("greedy", "temperature=0.7"),
        max_new_tokens=(16, 32, 64),
    )
    plan = planned(request)
    assert len(plan.runs) == len(ids(plan)) == 2**7 * 3
    assert len(plan.jobs) == 2**5  # batch size, sampling and length need no other engine


def test_runs_that_can_share_an_engine_load_share_a_job() -> None:
    plan = planned(changed(ONE, dtype=("float16", "float32"), max_new_tokens=(16, 32, 64)))
    assert [(job.dtype, [run.max_new_tokens for run in job.runs]) for job in plan.jobs] == [
        ("float16", [16, 32, 64]),
        ("float32", [16, 32, 64]),
    ]


def test_every_run_of_a_job_finds_its_prompts_in_the_job() -> None:
    (job,) = planned(changed(ONE, prompt="why?", max_new_tokens=(16, 32))).jobs
    assert [job.prompt_sets[run.prompt_set] for run in job.runs] == [["why?"], ["why?"]]


def test_a_value_that_is_given_twice_is_one_run() -> None:
    request = SubmissionSpec(
        partition=("dgxh", "dgxh"), backend=("hf", "hf"), model_id=("one", "one"), max_new_tokens=(16, 16)
    )
    assert len(planned(request).runs) == 1


def test_auto_and_the_dtype_that_it_means_are_one_run() -> None:
    assert len(planned(changed(ONE, dtype=("auto", "bfloat16"))).runs) == 1


def test_two_folders_of_one_content_are_one_run() -> None:
    copy = replace(MODELS["one"], name="two", path="/elsewhere/two")
    copies = {("one", "main"): MODELS["one"], ("two", "main"): copy}
    plan = make_plan(
        Sweep(changed(ONE, model_id=("one", "two"))), {"dgxh": partition()}, copies, lambda _: Device("cuda")
    )
    assert len(plan.runs) == 1


def test_the_partition_says_how_many_gpus_unless_the_request_does() -> None:
    known = {"dgxh": partition(gpus=4)}
    assert [job.gpus for job in planned(ONE, known).jobs] == [4]
    assert [job.gpus for job in planned(changed(ONE, gpus=(1,)), known).jobs] == [1]


def test_a_machine_without_gpus_has_workers_in_their_places_where_its_device_is_cpu() -> None:
    request = changed(ONE, partition=("local",), backend=("vllm",), parallel=("tensor=2,data=2",))
    error = refused(lambda: planned(request, kind="cpu"), PreflightError)
    assert error.message == "this machine has no NVIDIA GPU: --gpus 4"
    on_cpu = {"local": partition("local", device="cpu")}
    (job,) = planned(request, on_cpu, kind="cpu").jobs
    assert (job.device, job.gpus, job.parallel) == ("cpu", 4, "tensor=2,data=2")
    (job,) = planned(changed(request, parallel=()), on_cpu, kind="cpu").jobs
    assert job.gpus == 0


def test_a_job_on_a_cpu_demands_no_capability_of_its_node() -> None:
    assert [job.capability for job in planned(ONE, kind="cpu").jobs] == [None]
    assert [job.capability for job in planned(ONE).jobs] == ["9.0"]


def test_a_plan_less_all_runs_of_a_job_has_not_the_job() -> None:
    plan = planned(changed(ONE, dtype=("float16", "float32"), max_new_tokens=(16, 32)))
    first, second = plan.jobs
    left = plan.without({run.run_id for run in first.runs} | {second.runs[0].run_id})
    assert [(job.dtype, [run.max_new_tokens for run in job.runs]) for job in left.jobs] == [("float32", [32])]
    assert len(plan.runs) == 4  # and the plan itself is as it was


# ---------------------------------------------------------------- dtype auto


@pytest.mark.parametrize(
    ("asked", "of_partition", "kind", "capability", "of_device", "resolved"),
    [
        ("float32", "float16", "cuda", "9.0", None, "float32"),
        ("float16", "auto", "cpu", None, None, "float16"),
        ("auto", "float16", "cuda", "9.0", None, "float16"),
        ("auto", "bfloat16", "cpu", None, None, "bfloat16"),
        ("auto", "auto", "cpu", None, None, "float32"),
        ("auto", "auto", "cpu", "9.0", None, "float32"),
        ("auto", "auto", "cuda", "7.0", None, "float16"),
        ("auto", "auto", "cuda", "7.5", None, "float16"),
        ("auto", "auto", "cuda", "8.0", None, "bfloat16"),
        ("auto", "auto", "cuda", "8.6", None, "bfloat16"),
        ("auto", "auto", "cuda", "9.0", None, "bfloat16"),
        ("auto", "auto", "cuda", "10.0", None, "bfloat16"),  # as text it would be below 8.0
        ("auto", "auto", "cuda", None, "7.0", "float16"),
        ("auto", "auto", "cuda", None, "12.0", "bfloat16"),
        ("auto", "auto", "cuda", "7.0", "9.0", "float16"),  # what the partition says beats what this machine has
    ],
)
def test_dtype_auto_is_what_the_partition_or_its_gpu_can_do(
    asked: str, of_partition: str, kind: str, capability: str | None, of_device: str | None, resolved: str
) -> None:
    settings = {"dtype": of_partition} | ({"capability": capability} if capability else {})
    assert resolved_dtype(asked, partition("mine", **settings), Device(kind, of_device)) == resolved


def test_dtype_auto_without_dtype_or_capability_says_what_to_set() -> None:
    mine = partition("mine", dtype="auto")
    error = refused(lambda: resolved_dtype("auto", mine, Device("cuda")), WrongUseError)
    assert "mine" in error.message
    assert "--dtype" in error.remedy


# ---------------------------------------------------------------- the run's id


def some(*values: Any) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique=True).map(tuple)


def requests() -> st.SearchStrategy[SubmissionSpec]:
    return st.builds(
        SubmissionSpec,
        partition=some("dgx2", "dgxh"),
        backend=some("hf", "vllm"),
        model_id=some(*MODELS),
        dtype=some("auto", "float16", "bfloat16", "float32"),
        gpus=st.lists(st.integers(1, 8), max_size=2).map(tuple),
        batch_size=st.lists(st.integers(1, 64), min_size=1, max_size=2).map(tuple),
        sampling=some("greedy", "temperature=0.7", "temperature=0.7,seed=1", "temperature=0.7,top_p=0.9"),
        max_new_tokens=st.lists(st.integers(1, 4096), min_size=1, max_size=2).map(tuple),
        engine_options=st.dictionaries(
            st.sampled_from(("attn_implementation", "block_size", "model_impl")), some("x", "y", 1, True), max_size=2
        ),
        prompt=st.text(min_size=1),
        raw_prompt=st.booleans(),
        ignore_eos=st.booleans(),
        repeats=st.integers(1, 9),
        warmup=st.integers(0, 9),
        name=st.none() | st.text(min_size=1),
    )


@given(requests(), st.data())
def test_the_runs_do_not_depend_on_the_order_of_any_list(request: SubmissionSpec, data: st.DataObject) -> None:
    shuffled = {name: tuple(data.draw(st.permutations(getattr(request, name)))) for name in AXES}
    assert ids(planned(changed(request, **shuffled))) == ids(planned(request))


@given(requests())
def test_a_plan_of_the_same_request_is_the_same_plan(request: SubmissionSpec) -> None:
    assert planned(request) == planned(request)


@given(requests())
def test_no_run_is_in_a_plan_twice_and_no_job_is_without_runs(request: SubmissionSpec) -> None:
    plan = planned(request)
    assert len(plan.runs) == len(ids(plan))
    assert all(job.runs for job in plan.jobs)
    loads = {
        repr((job.partition, job.backend, job.model, job.dtype, job.gpus, job.engine_options)) for job in plan.jobs
    }
    assert len(loads) == len(plan.jobs)


@given(requests(), st.integers(1, 9), st.integers(0, 9), st.none() | st.text())
def test_name_repeats_and_warm_up_are_no_part_of_a_runs_id(
    request: SubmissionSpec, repeats: int, warmup: int, name: str | None
) -> None:
    assert ids(planned(changed(request, repeats=repeats, warmup=warmup, name=name))) == ids(planned(request))


@given(st.text(), st.text())
def test_a_models_name_and_place_are_no_part_of_a_runs_id(name: str, path: str) -> None:
    assert ids(planned(ONE, model=replace(MODELS["one"], name=name, path=path))) == ids(planned(ONE))


def test_a_copied_model_folder_gives_the_same_runs(tmp_path: Path) -> None:
    first, second = (resolve.resolve(str(write_checkpoint(tmp_path / name)))[0] for name in ("a", "b"))
    assert first.name != second.name
    assert ids(planned(ONE, model=first)) == ids(planned(ONE, model=second))


@pytest.mark.parametrize("setting", [{"account": "other"}, {"time": "2:00:00"}, {"mem": "1G"}, {"gpu_type": "h100"}])
def test_how_slurm_is_asked_is_no_part_of_a_runs_id(setting: dict[str, str]) -> None:
    assert ids(planned(ONE, {"dgxh": partition(**setting)})) == ids(planned(ONE))


HUB = ModelRef("org/name", revision="a" * 40)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: planned(changed(ONE, partition=("dgx2",), dtype=("bfloat16",))), id="partition"),
        pytest.param(lambda: planned(changed(ONE, backend=("vllm",))), id="backend"),
        pytest.param(lambda: planned(changed(ONE, model_id=("two",))), id="model content"),
        pytest.param(lambda: planned(ONE, model=HUB), id="hub model"),
        pytest.param(lambda: planned(changed(ONE, dtype=("float16",))), id="dtype"),
        pytest.param(lambda: planned(ONE, {"dgxh": partition(dtype="float32")}), id="the partition's dtype"),
        pytest.param(lambda: planned(changed(ONE, prompt="another")), id="prompt"),
        pytest.param(lambda: planned(changed(ONE, raw_prompt=True)), id="raw prompt"),
        pytest.param(lambda: planned(changed(ONE, ignore_eos=True)), id="end token"),
        pytest.param(lambda: planned(changed(ONE, batch_size=(2,))), id="batch size"),
        pytest.param(lambda: planned(changed(ONE, sampling=("temperature=0.7",))), id="sampling"),
        pytest.param(lambda: planned(changed(ONE, engine_options={"attn_implementation": ("x",)})), id="engine option"),
        pytest.param(lambda: planned(changed(ONE, max_new_tokens=(129,))), id="length"),
        pytest.param(lambda: planned(changed(ONE, backend=("vllm",))), id="backend"),
        pytest.param(lambda: planned(changed(ONE, request_rate=(2.0,))), id="request rate"),
        pytest.param(lambda: planned(changed(ONE, request_rate=(2.0,), burstiness=0.5)), id="burstiness"),
        pytest.param(lambda: planned(changed(ONE, serve=(True,))), id="served"),
        pytest.param(lambda: planned(changed(ONE, requests=(4,))), id="requests"),
        pytest.param(lambda: planned(changed(ONE, gpus=(1,))), id="gpus"),
        pytest.param(lambda: planned(ONE, {"dgxh": partition(gpus=4)}), id="the partition's gpus"),
        pytest.param(lambda: planned(changed(ONE, dtype=("bfloat16",)), kind="cpu"), id="device"),
    ],
)
def test_a_change_of_what_was_asked_makes_other_runs(other: Any) -> None:
    assert not ids(other()) & ids(planned(ONE))


def test_an_engine_option_is_for_the_backends_that_have_it() -> None:
    both = changed(ONE, backend=("hf", "vllm"), engine_options={"enforce_eager": (True, False)})
    jobs = planned(both).jobs
    assert [(job.backend, job.engine_options) for job in jobs] == [
        ("hf", {}), ("vllm", {"enforce_eager": True}), ("vllm", {"enforce_eager": False})
    ]  # fmt: skip
    assert ids(planned(ONE)) < ids(planned(both))  # the run without it is the run that it would be alone


@pytest.mark.parametrize(
    ("name", "one", "other", "written"),
    [
        ("cpu_offload_gb", 4, 4.0, "4.0"),
        ("gpu_memory_utilization", 1, 1.0, "1.0"),
        ("speculative_config", '{"model": "m", "num_speculative_tokens": 3}', '{"num_speculative_tokens":3,"model":"m"}',
         '{"model":"m","num_speculative_tokens":3}'),
        ("compilation_config", '{"level": 3, "pass_config": {"b": 1, "a": 2}}',
         '{ "pass_config":{"a":2,"b":1}, "level":3 }', '{"level":3,"pass_config":{"a":2,"b":1}}'),
    ],
)  # fmt: skip
def test_two_spellings_of_one_engine_option_are_one_run(name: str, one: Any, other: Any, written: str) -> None:
    asked = changed(ONE, backend=("vllm",), engine_options={name: (one, other)})
    (job,) = planned(asked).jobs
    assert len(job.runs) == 1
    assert str(job.engine_options[name]) == written
    alone = [ids(planned(changed(asked, engine_options={name: (value,)}))) for value in (one, other)]
    assert alone[0] == alone[1] == ids(planned(asked))


def test_values_that_differ_are_two_runs() -> None:
    for name, values in (("cpu_offload_gb", (4, 4.5)), ("speculative_config", ('{"a": 1}', '{"a": 2}'))):
        assert len(planned(changed(ONE, backend=("vllm",), engine_options={name: values})).runs) == 2


def test_an_exclude_rule_means_every_spelling_of_an_option() -> None:
    spellings = {"cpu_offload_gb": (2, 4.0), "speculative_config": ('{"a":1,"b":2}',)}
    rule = Axes(engine_options={"cpu_offload_gb": (4,), "speculative_config": ('{ "b": 2, "a": 1 }',)})
    (job,) = planned(changed(ONE, backend=("vllm",), engine_options=spellings, exclude=(rule,))).jobs
    assert job.engine_options["cpu_offload_gb"] == 2.0


class EngineWithDefaults:
    """A stand-in for an engine that declares the default of an option; it is never loaded."""

    OPTIONS: ClassVar[dict[str, type]] = {"compile": bool, "share": float}
    DEFAULTS: ClassVar[dict[str, Any]] = {"compile": True, "share": 0.5}
    PARALLEL: ClassVar[tuple[str, ...]] = ("layers",)


def test_an_option_at_its_engines_default_is_the_run_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "declared", f"{__name__}:EngineWithDefaults")
    asked = changed(ONE, backend=("declared",), engine_options={"compile": (True, False)})
    jobs = planned(asked).jobs
    assert [job.engine_options for job in jobs] == [{}, {"compile": False}]
    assert ids(planned(changed(ONE, backend=("declared",)))) < ids(planned(asked))
    without = planned(changed(asked, exclude=(Axes(engine_options={"compile": (True,)}),)))
    assert [job.engine_options for job in without.jobs] == [{"compile": False}]


def test_transformers_splits_the_layers_and_vllm_every_layer() -> None:
    jobs = planned(changed(ONE, backend=("hf", "vllm"))).jobs
    assert [(job.backend, job.parallel) for job in jobs] == [("hf", "layers"), ("vllm", "tensor")]


VLLM = changed(ONE, backend=("vllm",))


def ways(plan: Plan) -> list[tuple[str, int, str]]:
    return [(job.backend, job.gpus, job.parallel) for job in plan.jobs]


@pytest.mark.parametrize(
    ("gpus", "parallel", "expected"),
    [
        ((), (), [(2, "tensor")]),
        ((), ("pipeline",), [(2, "pipeline")]),
        ((), ("tensor=4,pipeline=2",), [(8, "tensor=4,pipeline=2")]),
        ((), ("pipeline=2,tensor=4",), [(8, "tensor=4,pipeline=2")]),
        ((), ("data=2",), [(2, "data")]),
        ((), ("tensor", "tensor=2", "tensor=2,data=1"), [(2, "tensor")]),  # one run in three spellings
        ((1, 2), ("tensor", "pipeline", "data"), [(1, "tensor"), (2, "tensor"), (2, "pipeline"), (2, "data")]),
        ((2, 4), ("pipeline", "tensor=2,pipeline=2"), [(2, "pipeline"), (4, "pipeline"), (4, "tensor=2,pipeline=2")]),
    ],
)
def test_the_gpus_of_a_model_are_those_of_its_parallelism(
    gpus: tuple[int, ...], parallel: tuple[str, ...], expected: list[tuple[int, str]]
) -> None:
    plan = planned(changed(VLLM, gpus=gpus, parallel=parallel))
    assert ways(plan) == [("vllm", *one) for one in expected]


def test_a_parallelism_is_for_the_backends_that_have_it() -> None:
    both = changed(ONE, backend=("hf", "vllm"))
    assert ways(planned(changed(both, parallel=("pipeline", "data")))) == [
        ("hf", 2, "layers"), ("vllm", 2, "pipeline"), ("vllm", 2, "data")
    ]  # fmt: skip
    assert ways(planned(changed(both, parallel=("tensor=2,data=2",)))) == [
        ("hf", 2, "layers"), ("vllm", 4, "tensor=2,data=2")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("pipeline", [(2, "tensor"), (4, "tensor")]),
        ("tensor", [(2, "pipeline"), (4, "pipeline")]),
        ("pipeline=4", [(2, "tensor"), (2, "pipeline"), (4, "tensor")]),
        ("tensor=2,pipeline=1", [(2, "pipeline"), (4, "tensor"), (4, "pipeline")]),
    ],
)
def test_an_exclude_rule_means_every_spelling_of_a_parallelism(rule: str, left: list[tuple[int, str]]) -> None:
    request = changed(VLLM, gpus=(2, 4), parallel=("tensor", "pipeline"), exclude=(Axes(parallel=(rule,)),))
    assert sorted(ways(planned(request))) == sorted(("vllm", *one) for one in left)


def test_a_rule_leaves_out_the_parallelism_that_nobody_wrote() -> None:
    request = changed(VLLM, gpus=(1, 2), exclude=(Axes(parallel=("tensor",), gpus=(2,)),))
    assert ways(planned(request)) == [("vllm", 1, "tensor")]


def test_another_revision_of_a_hub_model_makes_other_runs() -> None:
    assert ids(planned(ONE, model=HUB)) != ids(planned(ONE, model=replace(HUB, revision="b" * 40)))


@given(st.text(min_size=1), st.text(min_size=1))
def test_two_prompts_make_one_run_only_where_they_are_equal(first: str, second: str) -> None:
    same = ids(planned(changed(ONE, prompt=first))) == ids(planned(changed(ONE, prompt=second)))
    assert same == (first == second)


@pytest.mark.parametrize(
    ("same", "other"),
    [
        ("temperature=0.7", "temperature=0.7,seed=0"),
        ("temperature=0.7", "temperature=0.70,top_p=1"),
        ("seed=3,temperature=1,top_p=0.5", "temperature=1.0, top_p=.5, seed=3"),
    ],
)
def test_two_spellings_of_one_sampling_are_one_run(same: str, other: str) -> None:
    assert len(planned(changed(ONE, sampling=(same, other))).runs) == 1


def test_prompts_of_a_file_are_known_by_their_content(tmp_path: Path) -> None:
    def runs(name: str, text: str) -> set[str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return ids(planned(changed(ONE, prompts=str(tmp_path / name))))

    first = runs("a.txt", "one\ntwo\n")
    assert first == runs("b.txt", "one\n\ntwo") == runs("c.jsonl", '"one"\n{"prompt": "two"}\n')
    assert first != runs("d.txt", "two\none\n")
    assert runs("e.txt", f"{ONE.prompt}\n") == ids(planned(ONE))


def test_a_prompt_with_a_line_separator_of_unicode_is_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('"one\u2028line"\n', encoding="utf-8")
    (job,) = planned(changed(ONE, prompts=str(tmp_path / "prompts.jsonl"))).jobs
    assert list(job.prompt_sets.values()) == [["one\u2028line"]]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n", encoding="utf-8-sig")
    (job,) = planned(changed(ONE, prompts=str(tmp_path / "prompts.txt"))).jobs
    assert list(job.prompt_sets.values()) == [["one"]]


def test_the_order_of_flags_changes_no_run(labctl: Labctl, slurm: Slurm, checkpoint: Path) -> None:
    flags = ["-p dgxh", "-p dgx2", "--dtype float16", "--max-new-tokens 8", "--max-tokens 4", "--repeats 2"]

    def runs(*words: str) -> list[str]:
        answer = labctl("submit", "--dry-run", "--json", "--model-id", checkpoint, *" ".join(words).split())
        return sorted(run["run_id"] for batch in answer.json for job in batch["jobs"] for run in job["runs"])

    assert runs(*flags) == runs(*reversed(flags))
    assert len(runs(*flags)) == 4


# ---------------------------------------------------------------- options with a default


STAGED = changed(ONE, backend=("staged",))


def compiles(plan: Plan) -> list[object]:
    """What each job has of the option `compile`."""
    return [job.engine_options.get("compile", "default") for job in plan.jobs]


def test_an_option_with_the_backends_default_is_the_run_without_it() -> None:
    both = planned(changed(STAGED, engine_options={"compile": (True, False)}))
    assert compiles(both) == ["default", False]
    assert ids(planned(STAGED)) < ids(both)
    assert ids(planned(changed(STAGED, engine_options={"compile": (True,)}))) == ids(planned(STAGED))
    assert len(ids(both)) == len(both.jobs) == 2


def test_backends_are_runs_of_their_own_and_none_has_an_option_that_was_not_asked_for() -> None:
    plan = planned(changed(ONE, backend=("hf", "staged", "vllm")))
    assert [(job.backend, job.engine_options) for job in plan.jobs] == [("hf", {}), ("staged", {}), ("vllm", {})]
    assert [run.definition["backend"] for run in plan.runs] == ["hf", "staged", "vllm"]
    assert len(ids(plan)) == 3


def test_a_rule_leaves_out_the_default_that_nobody_wrote() -> None:
    rule = Axes(engine_options={"compile": (True,)})
    asked = changed(ONE, backend=("hf", "staged"), engine_options={"compile": (True, False)}, exclude=(rule,))
    assert [(job.backend, job.engine_options) for job in planned(asked).jobs] == [
        ("hf", {}), ("staged", {"compile": False})
    ]  # fmt: skip


# ---------------------------------------------------------------- engine loads


@given(loads=st.lists(st.integers(-2, 5), min_size=1, max_size=12))
def test_each_run_has_its_engine_loads_and_there_are_no_more_than_the_most_that_one_needs(loads: list[int]) -> None:
    runs = [RunSpec(f"{number:012x}", {}, "p", 8) for number in range(len(loads))]
    job = JobSpec("", "dgxh", "slurm", "hf", ModelRef("m"), "float16", "cuda", 2, runs, {"p": ["one"]})
    wanted = dict(zip([run.run_id for run in runs], loads, strict=True))
    jobs = Plan([job]).with_loads(wanted).jobs
    for run in runs:
        assert sum(each.loads for each in jobs if run in each.runs) == max(0, wanted[run.run_id])
    assert sum(each.loads for each in jobs) == max(0, *loads, 0)


def test_each_cell_may_have_its_own_number_of_requests() -> None:
    cells = (Axes(batch_size=(1,), requests=(8,)), Axes(batch_size=(16,), requests=(64,)), Axes(batch_size=(2,)))
    asked = changed(ONE, cells=cells)
    assert [(run.batch_size, run.requests) for job in planned(asked).jobs for run in job.runs] == [
        (1, 8), (16, 64), (2, None)
    ]  # fmt: skip
