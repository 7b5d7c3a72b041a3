"""Plan the runs of a submission, grouped into jobs by engine load. The same submission gives the same plan."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from labctl_orchestrator.request import engine_options
from labctl_orchestrator.request.inputs import Inputs
from labctl_orchestrator.request.request import SubmissionSpec, percent
from labctl_orchestrator.request.sweep import NOTHING_LEFT, Combination, Sweep
from labctl_slurm.errors import PreflightError, WrongUseError
from labctl_slurm.partitions import Partition
from labctl_workers.engines import engine_class, parallel
from labctl_workers.record import (
    SCHEMA,
    JobSpec,
    ModelRef,
    RunSpec,
    ScoredText,
    Workload,
    requests_per_repeat,
    run_id_of,
    sha256_of_json,
)
from labctl_workers.workload import is_trace

FIRST_CAPABILITY_WITH_BFLOAT16 = 8.0
# Of a served run: requests one after another in each place; seconds of arrivals, and the fewest requests, at a rate.
ROUNDS = 10
SERVED_FOR_S = 60.0
FEWEST_SERVED = 20


@dataclass(frozen=True)
class Device:
    """The device of a partition: "cuda" with a compute capability (None: unknown), or "cpu"."""

    kind: str
    capability: str | None = None


@dataclass(frozen=True)
class Plan:
    """The jobs in the order of the submission. Their `job_id` is empty until they are in an array."""

    jobs: list[JobSpec]

    @property
    def runs(self) -> list[RunSpec]:
        return [run for job in self.jobs for run in job.runs]

    def without(self, run_ids: set[str]) -> Plan:
        """The plan without these runs, and without jobs that have none left."""
        jobs = [replace(job, runs=[run for run in job.runs if run.run_id not in run_ids]) for job in self.jobs]
        return Plan([job for job in jobs if job.runs])

    def with_loads(self, loads: Mapping[str, int]) -> Plan:
        """The plan with this number of engine loads of each run, by id. Runs share engine loads as far as possible; a run without
        any is left out."""
        jobs = []
        for job in self.jobs:
            before = 0
            for count in sorted({count for run in job.runs if (count := loads.get(run.run_id, 0)) > 0}):
                runs = [run for run in job.runs if loads.get(run.run_id, 0) >= count]
                jobs.append(replace(job, runs=runs, loads=count - before))
                before = count
        return Plan(jobs)


def make_plan(
    sweep: Sweep,
    partitions: Mapping[str, Partition],
    models: Mapping[tuple[str, str], ModelRef],
    device_of: Callable[[Partition], Device],
    adapters: Mapping[str, ModelRef] | None = None,
) -> Plan:
    """Resolve the runs of a sweep, and group those that share an engine load.

    `models` are by (model id, revision), `adapters` by the engine option `lora`. Raises WrongUseError for a dtype that cannot be
    resolved, and for an empty plan.
    """
    request = sweep.request
    inputs = Inputs(request)
    devices = {name: device_of(partition) for name, partition in partitions.items()}
    resolved: dict[tuple[object, ...], JobSpec] = {}
    jobs: dict[str, JobSpec] = {}
    planned: set[str] = set()
    for cell in sweep.cells:
        load = (cell.partition, cell.backend, cell.model_id, cell.revision, cell.dtype, cell.gpus, cell.parallel, cell.serve,
                cell.engine_options)  # fmt: skip
        if load not in resolved:
            partition, model = partitions[cell.partition], models[cell.model_id, cell.revision]
            resolved[load] = _job(request, cell, partition, devices[cell.partition], model, adapters or {})
        job = resolved[load]
        options = {**engine_class(cell.backend).DEFAULTS, **job.engine_options}
        if job.adapter is not None:  # rules name it as the submission does
            options["lora"] = dict(cell.engine_options)["lora"]
        with_defaults = tuple(sorted(options.items()))
        resolved_cell = replace(
            cell, dtype=job.dtype, gpus=job.gpus, parallel=job.parallel, engine_options=with_defaults
        )
        if sweep.leaves_out(resolved_cell):
            continue
        known = jobs.setdefault(sha256_of_json(_identity(job)), job)
        run = _run(request, known, cell, inputs)
        if run.run_id not in planned:  # `--dtype auto --dtype bfloat16` may give one run twice
            planned.add(run.run_id)
            known.runs.append(run)
    if not jobs:
        raise NOTHING_LEFT
    return Plan(list(jobs.values()))


def _job(
    request: SubmissionSpec,
    cell: Combination,
    partition: Partition,
    device: Device,
    model: ModelRef,
    adapters: Mapping[str, ModelRef],
) -> JobSpec:
    # The values of axes that the submission leaves to the partition; no dtype if the partition has none.
    defaults: dict[str, object] = {"gpus": _gpus(None, partition, device)}
    with contextlib.suppress(WrongUseError):
        defaults["dtype"] = resolved_dtype("auto", partition, device)
    gpus = _gpus(cell.gpus, partition, device)
    options = engine_options.of_backend(cell.backend, dict(cell.engine_options))
    adapter = adapters[str(options["lora"])] if "lora" in options else None
    if adapter is not None:
        options["lora"] = f"{adapter.name}@{(adapter.fingerprint or '')[:8]}"
    return JobSpec(
        job_id="",
        partition=partition.name,
        executor=partition.executor,
        backend=cell.backend,
        model=model,
        dtype=resolved_dtype(cell.dtype, partition, device),
        device=device.kind,
        gpus=gpus,
        runs=[],
        prompt_sets={},
        gpu=partition.gpu,
        parallel=parallel.normalised(cell.parallel, gpus, engine_class(cell.backend).PARALLEL[0]),
        capability=partition.capability if device.kind == "cuda" else None,
        engine_options=options,
        raw_prompt=request.raw_prompt,
        time_limit_s=partition.time_limit_s,
        defaults=defaults,
        loads=request.loads,
        served=cell.serve,
        adapter=adapter,
    )


NO_GPU_HERE = "this machine has no NVIDIA GPU"


def _gpus(requested: int | None, partition: Partition, device: Device) -> int:
    """The number of GPUs: 0 on a local partition without any. Raises PreflightError for --gpus there. Where the settings say
    that the device is "cpu", it is the number of workers that take the places of GPUs."""
    if partition.executor != "local" or device.kind != "cpu":
        return requested or partition.gpus
    if requested is not None and partition.device == "cpu":
        return requested
    if requested is not None:
        raise PreflightError(
            f"{NO_GPU_HERE}: --gpus {requested}", "remove --gpus, and sizes of --parallel, to use the CPU"
        )
    return 0


def _identity(job: JobSpec) -> dict[str, object]:
    """The parameters of an engine load, which are part of each run's definition."""
    model = {"fingerprint": job.model.fingerprint} if job.model.fingerprint else {
        "id": job.model.name, "revision": job.model.revision}  # fmt: skip
    keys = ("partition", "backend", "dtype", "device", "gpus", "parallel", "engine_options", "raw_prompt")
    own = {key: getattr(job, key) for key in keys}
    if job.adapter is not None:
        own["engine_options"] = {**job.engine_options, "lora": job.adapter.fingerprint}
    served = {"served": True} if job.served else {}  # offline run ids do not contain it
    return {"schema": SCHEMA, "model": model, **own, **served}


def _run(request: SubmissionSpec, job: JobSpec, cell: Combination, inputs: Inputs) -> RunSpec:
    """The run; adds its prompts to the job."""
    of = inputs.of(cell)
    prompt_set = (
        sha256_of_json(of.prompts)[:12]
        if of.dataset is None
        else sha256_of_json([of.prompts, of.dataset.to_json()])[:12]
    )
    job.prompt_sets[prompt_set] = of.prompts
    if of.dataset is not None:
        job.datasets[prompt_set] = of.dataset
    requests = of.requests
    if cell.serve and requests is None:
        requests = served_requests(cell, len(of.prompts) or 1)
    over_time = cell.request_rate is not None or is_trace(of.dataset)
    run = RunSpec(
        run_id="",
        definition={},
        prompt_set=prompt_set,
        max_new_tokens=None if of.has_lengths else cell.max_new_tokens,
        batch_size=cell.batch_size or (requests if over_time else None) or 1,
        sampling=cell.sampling,
        ignore_eos=request.ignore_eos or of.has_lengths,
        repeats=request.repeats,
        until=None if request.until is None else percent(request.until),
        max_repeats=request.max_repeats,
        warmup=request.warmup,
        request_rate=cell.request_rate,
        burstiness=request.burstiness if cell.request_rate is not None else 1.0,
        requests=requests,
        workload=of.workload,
    )
    if inputs.score is not None:
        text = inputs.score
        job.texts[text.sha256] = text.documents
        run.score = ScoredText(text.name, text.sha256, request.score_window, request.score_stride)
    if cell.serve:
        run.tasks = inputs.tasks
    run.definition = run_definition(job, run)
    run.run_id = run_id_of(run.definition)
    return run


def served_requests(cell: Combination, prompts: int) -> int:
    """The requests of a repeat of a served run: so many that most of the window is neither start nor end of the load."""
    if cell.request_rate is not None:
        return max(FEWEST_SERVED, math.ceil(SERVED_FOR_S * cell.request_rate))
    return requests_per_repeat(None, max(prompts, ROUNDS * (cell.batch_size or 1)), cell.batch_size or 1)


def run_definition(job: JobSpec, run: RunSpec) -> dict[str, object]:
    """All resolved parameters of the run and its job. The run's id is their hash, so the names of a dataset and of a scored text
    are left out: their hashes identify them."""
    workload = {
        key: value for key, value in (run.workload or Workload()).to_json().items() if value and key != "dataset"
    }
    score: dict[str, object] = {}
    if (of := run.score) is not None:
        score = {"text": sha256_of_json(job.texts[of.sha256]), "window": of.window, "stride": of.stride}
    return {
        **_identity(job),
        "prompts": sha256_of_json(job.prompt_sets[run.prompt_set]),
        "max_new_tokens": run.max_new_tokens,
        "batch_size": run.batch_size,
        "sampling": {"temperature": run.sampling.temperature, "top_p": run.sampling.top_p, "seed": run.sampling.seed},
        "ignore_eos": run.ignore_eos,
        # Only if set: earlier run ids do not contain these keys.
        **{key: value for key in ("request_rate", "requests") if (value := getattr(run, key)) is not None},
        **({"burstiness": run.burstiness} if run.burstiness != 1.0 else {}),
        **({} if run.workload is None else {"workload": workload}),
        **({} if run.score is None else {"score": score}),
        **({} if not run.tasks else {"quality": [[task.name, task.limit, task.sha256] for task in run.tasks]}),
        **({} if (own := job.datasets.get(run.prompt_set)) is None else {"entries": sha256_of_json(own.to_json())}),
    }


def resolved_dtype(dtype: str, partition: Partition, device: Device) -> str:
    """`auto` is the partition's dtype, else float32 on a CPU, float16 below compute capability 8.0, and bfloat16 from there.

    Raises WrongUseError where neither dtype nor capability is known.
    """
    if dtype != "auto":
        return dtype
    if partition.dtype != "auto":
        return partition.dtype
    if device.kind == "cpu":
        return "float32"
    capability = partition.capability or device.capability
    if capability is None:
        raise WrongUseError(
            f"dtype auto needs a dtype or capability of the partition: {partition.name}",
            f"give --dtype, or set dtype or capability in [partitions.{partition.name}] of labctl.toml",
        )
    return "bfloat16" if float(capability) >= FIRST_CAPABILITY_WITH_BFLOAT16 else "float16"


def device_of(partition: Partition) -> Device:
    """The partition's device; for "auto", this machine's GPUs if it has some, else its CPU."""
    if partition.device != "auto":
        return Device(partition.device, partition.capability)
    capability = capability_here()
    return Device("cpu") if capability is None else Device("cuda", capability)


def capability_here() -> str | None:
    """The compute capability of this machine's first GPU ("9.0"); None without NVIDIA's driver or a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        if pynvml.nvmlDeviceGetCount() == 0:
            return None
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
        return f"{major}.{minor}"
    finally:
        pynvml.nvmlShutdown()
