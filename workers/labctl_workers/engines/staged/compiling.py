"""What is asked of torch's compiler for the steps of a decode: one token of each sequence, over and over; and for prompts.

Such a step is bound by memory, and at one sequence by what stands between one kernel and the next. So: few kernels, each
reading its weights before it has to wait for the kernel before it (programmatic dependent launch, compute capability 9.0), and
sizes chosen by times that hold for kernels that follow one another. All by the compiler's own settings and seams; a torch that
lacks one goes without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from labctl_workers.engines.staged import stages
from labctl_workers.engines.staged.stages import Functions

# What a torch does not know of these is left out.
OPTIONS: dict[str, Any] = {
    "coordinate_descent_tuning": True,  # sizes are searched, not guessed
    "combo_kernels": True,  # small kernels side by side are one
    "triton.enable_pdl": True,
    # A pass of its own over the scores: the attention of one row has them in its own loops.
    "online_softmax": False,
}
# To be raised where what is compiled changes by more than its source and OPTIONS: kept code is not found again then.
FORM = 3
# Sums up to this length are one piece, not a loop: the compiler puts the wait for the kernel before a loop, weights and all.
LONGEST_PIECE = 16384
# A candidate's time is the lower quartile of so many, the cache emptied between them by reading this much.
CANDIDATE_TIMES = 30
EMPTYING_BYTES = 128 * 2**20


def functions() -> Functions:
    """The parts of a step, compiled each by itself: the layers of a model are alike, so one compiled layer serves them all,
    and nothing is lost, since between layers stands a norm that no kernel spans."""
    import torch

    allow_many_shapes()
    known = set(torch._inductor.list_options())
    options = {name: value for name, value in OPTIONS.items() if name in known}

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        return made

    # One function for prompts of any length: their products are large, and only what stands between them is compiled.
    prompt_layer = torch.compile(stages.run_layer, fullgraph=True, dynamic=True)
    return Functions(compiled(stages.enter), compiled(stages.run_layer), compiled(stages.leave), prompt_layer)


def allow_many_shapes() -> None:
    """A layer is compiled for each bucket and device; torch gives up after eight forms of one function."""
    import torch._dynamo

    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(1024, config.accumulated_recompile_limit)
    config.recompile_limit = max(256, config.recompile_limit)


@contextlib.contextmanager
def as_it_will_run() -> Iterator[None]:
    """While functions are compiled: long sums in one piece, and candidates timed as they will run."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            stack.enter_context(_long_pieces())
        with contextlib.suppress(ImportError, AttributeError):
            stack.enter_context(_timed_with_a_clean_cache())
        yield


def _long_pieces() -> contextlib.AbstractContextManager[Any]:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):  # type: ignore[misc]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
            return bool(inner and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_PIECE))

    handled: contextlib.AbstractContextManager[Any] = V.set_choices_handler(Choices())
    return handled


@contextlib.contextmanager
def _timed_with_a_clean_cache() -> Iterator[None]:
    """torch's own clock empties the cache by writing to it, and the kernel that is timed then waits for those writes, which
    no kernel of a decode has to: of one matrix-vector product it chose sizes between 10 and 30 us from one time to the next
    (H100, torch 2.11)."""
    import torch
    from torch._inductor.runtime.benchmarking import InductorBenchmarker

    usual = InductorBenchmarker.benchmark_gpu
    InductorBenchmarker.benchmark_gpu = lambda self, call, *_, **__: _time_ms(call)
    try:
        yield
    finally:
        InductorBenchmarker.benchmark_gpu = usual
        torch.cuda.empty_cache()  # else what emptied the cache would count as memory that the run holds


def _time_ms(call: Callable[[], Any]) -> float:
    import torch

    call()
    emptying = torch.empty(EMPTYING_BYTES // 4, dtype=torch.int32, device="cuda")
    pairs = []
    for _ in range(CANDIDATE_TIMES):
        emptying.sum()
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        call()
        pairs[-1][1].record()
    torch.cuda.synchronize()
    times: list[float] = sorted(started.elapsed_time(ended) for started, ended in pairs)
    return times[len(times) // 4]
