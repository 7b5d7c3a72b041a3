"""Which GPUs are the job's. NVIDIA's management library is a fake here: `FakeNvml` stands in for the module pynvml."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from labctl_workers.hardware import Gpu, check_gpus, clocks, energy_j, used_bytes, visible_gpus
from labctl_workers.record import JobSpec, ModelRef, Refusal, ScriptSettings
from labctl_workers.telemetry import TelemetrySampler

UUIDS = (
    "GPU-11111111-aaaa-0000-0000-000000000000",
    "GPU-22222222-bbbb-0000-0000-000000000000",
    "GPU-22223333-cccc-0000-0000-000000000000",
    "GPU-44444444-dddd-0000-0000-000000000000",
)
# What NVML says of an A100 40 GB with slices: UUID -> (its GPU, name, bytes). Made up, in the form of public issues of vLLM.
SLICES = {
    "MIG-377e0049-554c-540b-93c6-d0976f8426cb": (1, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5100273664),
    "MIG-f39aa248-6f1b-5769-b119-8d650bb34b27": (1, "NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5100273664),
}
SLICE, OTHER_SLICE = SLICES


class FakeNvmlError(Exception):
    """What the fake raises where NVML would raise NVMLError."""


@dataclass
class FakeNvml:
    """A fake of the few functions of pynvml that labctl calls: a node of GPUs, by UUID."""

    uuids: tuple[str, ...] = UUIDS
    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    has_driver: bool = True
    does_not_count: tuple[int, ...] = ()
    started: int = 0
    stopped: int = 0
    asked: list[str] = field(default_factory=list)

    def module(self) -> ModuleType:
        module = ModuleType("pynvml")
        functions = {name: getattr(self, name) for name in dir(self) if name.startswith("nvml")}
        constants = {"NVML_CLOCK_MEM": "memory", "NVML_CLOCK_SM": "sm", "NVML_TEMPERATURE_GPU": "gpu"}
        vars(module).update(functions, NVMLError=FakeNvmlError, **constants)
        return module

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.has_driver:
            raise FakeNvmlError("NVML Shared Library Not Found")
        self.started += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.stopped += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:  # noqa: N802
        self.asked.append(uuid)
        if uuid in SLICES:
            return uuid
        if uuid not in self.uuids:
            raise FakeNvmlError("Not Found")
        return self.uuids.index(uuid)

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return self.uuids[handle]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> int:  # noqa: N802
        return SLICES[handle][0]

    def nvmlDeviceGetIndex(self, handle: int) -> int:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return SLICES[handle][1] if handle in SLICES else self.name

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return self.capability

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        if handle in SLICES:
            return SimpleNamespace(total=SLICES[handle][2], used=2**20)
        return SimpleNamespace(total=80 * 2**30, used=(handle + 1) * 2**30)

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: str) -> int:  # noqa: N802
        return {"memory": 2619, "sm": 1980}[clock]

    def nvmlDeviceGetClockInfo(self, handle: int, clock: str) -> int:  # noqa: N802
        return {"memory": 2600, "sm": 1500 + handle}[clock]

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:  # noqa: N802
        return 5120

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if handle in self.does_not_count:
            raise FakeNvmlError("Not Supported")
        return 1500 * (handle + 1)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: str) -> int:  # noqa: N802
        return 40 + handle

    def nvmlDeviceGetPowerManagementLimit(self, handle: int) -> int:  # noqa: N802
        raise FakeNvmlError("Not Supported")

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A fake NVML of four H100s, and no CUDA_VISIBLE_DEVICES."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake.module())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def indices(gpus: list[Gpu]) -> list[int]:
    return [gpu.index for gpu in gpus]


# ---------------------------------------------------------------- CUDA_VISIBLE_DEVICES


def test_without_the_variable_all_gpus_of_the_node_are_visible(nvml: FakeNvml) -> None:
    assert indices(visible_gpus()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", []),
        (" ", []),
        ("0", [0]),
        ("2,3", [2, 3]),
        ("3,1", [3, 1]),
        (" 1 , 0 ", [1, 0]),
        (UUIDS[2], [2]),
        (f"{UUIDS[3]},{UUIDS[0]}", [3, 0]),
        ("GPU-4444", [3]),
        ("GPU-1", [0]),
        (f"GPU-4444,{UUIDS[1]}", [3, 1]),
        ("-1", []),
        ("9", []),
        ("NoDevFiles", []),
        ("1,-1,2", [1]),
        ("1,7,2", [1]),
        (f"0,GPU-99999999,{UUIDS[1]}", [0]),
        ("0,GPU-2222,1", [0]),  # two GPUs begin like that
        ("MIG-11111111-aaaa-0000-0000-000000000000", []),
        ("3,GPU-,1", [3]),
        (SLICE, [1]),
        (f"{SLICE},{OTHER_SLICE}", [1, 1]),
        (f"{SLICE},MIG-none", [1]),
        (f"0,{SLICE}", [0, 1]),
    ],
)
def test_the_visible_gpus_are_those_that_the_variable_names_up_to_its_first_bad_entry(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert indices(visible_gpus()) == expected
    assert indices(visible_gpus(visible)) == expected


@pytest.mark.parametrize("visible", ["0,0", f"{UUIDS[1]},{UUIDS[1]}"])
def test_a_gpu_that_is_named_twice_makes_none_visible(nvml: FakeNvml, visible: str) -> None:
    assert visible_gpus(visible) == []


def test_a_text_that_is_given_beats_the_variable(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert indices(visible_gpus("3")) == [3]


def test_a_gpu_is_described_by_what_nvml_says_of_it(nvml: FakeNvml) -> None:
    (gpu,) = visible_gpus("1")
    bandwidth = 2619e6 * 5120 * 2 / 8
    assert gpu == Gpu(1, UUIDS[1], "NVIDIA H100 80GB HBM3", "9.0", 80 * 2**30, "580.65.06", bandwidth)


def test_nvml_is_stopped_as_often_as_it_was_started(nvml: FakeNvml) -> None:
    visible_gpus()
    used_bytes(UUIDS[0])
    used_bytes("GPU-unknown")
    assert nvml.started == nvml.stopped == 3


def test_a_node_without_nvidias_driver_has_no_gpus(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: NVML does not start."""
    nvml.has_driver = False
    assert visible_gpus() == []
    assert visible_gpus("0,1") == []
    assert used_bytes(UUIDS[0]) is None
    assert nvml.stopped == 0


# ---------------------------------------------------------------- memory in use


@pytest.mark.parametrize("uuid", [UUIDS[2], UUIDS[2].removeprefix("GPU-")], ids=["as NVML", "as torch"])
def test_memory_in_use_is_asked_by_uuid_as_nvml_or_as_torch_writes_it(nvml: FakeNvml, uuid: str) -> None:
    assert used_bytes(uuid) == 3 * 2**30
    assert nvml.asked == [UUIDS[2]]


def test_memory_in_use_of_a_gpu_that_nvml_does_not_know_is_not_known(nvml: FakeNvml) -> None:
    assert used_bytes("GPU-unknown") is None


# ---------------------------------------------------------------- bandwidth, energy, clocks


@pytest.mark.parametrize(
    ("mhz", "bits", "expected"), [(2619, 5120, 3.35e12), (877, 4096, 0.9e12)], ids=["H100 SXM", "V100 SXM2"]
)
def test_the_bandwidth_is_what_the_maker_says_of_the_gpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, mhz: int, bits: int, expected: float
) -> None:
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetMaxClockInfo", lambda handle, clock: mhz)
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetMemoryBusWidth", lambda handle: bits)
    assert visible_gpus()[0].memory_bandwidth_bytes_s == pytest.approx(expected, rel=0.01)


def test_a_bandwidth_that_an_old_nvml_does_not_tell_is_not_known(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["pynvml"], "nvmlDeviceGetMemoryBusWidth")
    assert visible_gpus()[0].memory_bandwidth_bytes_s is None


def test_energy_is_the_sum_of_the_counters_of_the_jobs_gpus_in_joules(nvml: FakeNvml) -> None:
    assert energy_j(visible_gpus("0,2")) == 1.5 + 4.5
    assert energy_j([]) is None


def test_energy_is_not_known_where_one_gpu_does_not_count(nvml: FakeNvml) -> None:
    gpus = visible_gpus("0,1")
    nvml.does_not_count = (1,)
    assert energy_j(gpus) is None
    assert energy_j(gpus[:1]) == 1.5
    nvml.has_driver = False
    assert energy_j(gpus[:1]) is None


def test_clocks_are_told_and_what_a_gpu_does_not_tell_is_not_known(nvml: FakeNvml) -> None:
    (found,) = clocks(visible_gpus("1"))
    assert asdict(found) == {
        "index": 1,
        "sm_mhz": 1501,
        "sm_max_mhz": 1980,
        "memory_mhz": 2600,
        "temperature_c": 41,
        "power_limit_w": None,  # not supported by this GPU
        "throttle_reasons": None,  # not known to this pynvml
    }


def test_a_job_for_the_cpu_needs_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault injection: pynvml cannot be imported."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    check_gpus(job(device="cpu"), [])
    assert energy_j([]) is None
    assert clocks([]) == []


# ---------------------------------------------------------------- is it what was asked for?


def job(**values: Any) -> JobSpec:
    asked = {"partition": "dgxh", "device": "cuda", "gpus": 2, "gpu": "H100", "capability": "9.0", **values}
    return JobSpec(
        job_id="j", executor="slurm", backend="hf", model=ModelRef("m"), dtype="bfloat16", runs=[], prompt_sets={}, **asked
    )  # fmt: skip


def refusal(asked: JobSpec, gpus: list[Gpu]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        check_gpus(asked, gpus)
    return caught.value


def test_the_gpus_that_were_asked_for_pass(nvml: FakeNvml) -> None:
    check_gpus(job(), visible_gpus("0,1"))
    check_gpus(job(gpus=1), visible_gpus("0,1"))
    check_gpus(job(gpus=4), visible_gpus())


def test_fewer_gpus_than_asked_for_are_refused_with_what_to_ask(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    error = refusal(job(), visible_gpus())
    assert error.kind == "fewer-gpus"
    assert "1 of 2" in error.message
    assert "CUDA_VISIBLE_DEVICES=3" in error.message
    assert "--gres=gpu:2" in error.remedy


def test_a_refusal_says_where_the_variable_is_not_set(nvml: FakeNvml) -> None:
    assert "CUDA_VISIBLE_DEVICES=not set" in refusal(job(gpus=8), visible_gpus()).message


def test_a_gpu_of_another_capability_is_refused_with_the_setting_to_change(nvml: FakeNvml) -> None:
    nvml.capability, nvml.name = (7, 0), "Tesla V100-SXM3-32GB"
    error = refusal(job(), visible_gpus("2,3"))
    assert error.kind == "other-capability"
    assert "GPU 2 has compute capability 7.0 (Tesla V100-SXM3-32GB)" in error.message
    assert "9.0" in error.message
    assert "slurm_partition" in error.remedy
    assert "[partitions.dgxh]" in error.remedy
    assert "H100" in error.remedy


def test_a_partition_that_names_no_capability_takes_any_gpu(nvml: FakeNvml) -> None:
    nvml.capability = (7, 0)
    check_gpus(job(capability=None), visible_gpus())


def test_only_the_gpus_that_the_job_uses_must_be_the_partitions() -> None:
    h100 = Gpu(0, UUIDS[0], "H100", "9.0", 1, "1")
    v100 = Gpu(1, UUIDS[1], "V100", "7.0", 1, "1")
    check_gpus(job(gpus=1), [h100, v100])
    assert refusal(job(gpus=2), [h100, v100]).kind == "other-capability"


def of_script(option: str) -> dict[str, Any]:
    return {"gpus": 1, "capability": None, "script": ScriptSettings(gpu_option=option)}


def test_a_slice_is_its_gpu_with_a_memory_of_its_own(nvml: FakeNvml) -> None:
    (gpu,) = visible_gpus(SLICE)
    assert (gpu.index, gpu.uuid, gpu.name, gpu.memory_bytes) == (1, SLICE, *SLICES[SLICE][1:])
    assert (gpu.capability, gpu.memory_bandwidth_bytes_s, gpu.is_slice) == ("9.0", None, True)
    assert used_bytes(SLICE) == 2**20
    assert energy_j([gpu]) is None  # the counter is that of the whole GPU
    sampler = TelemetrySampler([gpu])
    sampler.sample()
    assert (sampler.energy_j(0, 1), sampler.take().gpus) == (None, [])


def test_two_slices_are_refused_as_slices_and_not_as_too_few_gpus(nvml: FakeNvml) -> None:
    for visible in (SLICE, f"{SLICE},{OTHER_SLICE}"):
        error = refusal(job(gpus=2), visible_gpus(visible))
        assert error.kind == "mig-slices"
        assert "MIG slices (NVIDIA A100-SXM4-40GB MIG 1g.5gb): CUDA shows a process one slice" in error.message
        assert "--gpus 1" in error.remedy


def test_one_slice_is_used_where_the_user_chose_its_type_or_the_machine_is_his_own(nvml: FakeNvml) -> None:
    (gpu,) = visible_gpus(SLICE)
    check_gpus(job(**of_script("--gres=gpu:1g.5gb:1")), [gpu])
    check_gpus(replace(job(**of_script("")), executor="local"), [gpu])
    error = refusal(job(**of_script("--gres=gpu:1")), [gpu])
    assert (error.kind, "gpu_type" in error.remedy) == ("mig-slices", True)
    vllm = replace(job(**of_script("--gres=gpu:1g.5gb:1")), backend="vllm")
    assert "vLLM" in refusal(vllm, [gpu]).message


def test_the_remedy_for_too_few_gpus_requests_them_as_the_partition_does(nvml: FakeNvml) -> None:
    asked = job(script=ScriptSettings(gpu_option="--gpus-per-node=h100:2"))
    assert "(--gpus-per-node=h100:2)" in refusal(asked, visible_gpus("3")).remedy


def test_a_job_for_the_cpu_passes_without_any_gpu() -> None:
    check_gpus(job(device="cpu"), [])
