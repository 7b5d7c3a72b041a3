"""What is asked of torch's compiler for the steps of a decode: one token of each sequence, over and over; and for prompts.

Such a step is bound by memory, and at one sequence by what stands between one kernel and the next. So: few kernels, each
reading its weights before it has to wait for the kernel before it (programmatic dependent launch, compute capability 9.0). All by
the compiler's own settings; a torch that lacks one goes without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labctl_workers.engines.staged import stages
from labctl_workers.engines.staged.stages import Functions

# What a torch does not know of these is left out.
OPTIONS: dict[str, Any] = {
    "coordinate_descent_tuning": True,  # sizes are searched; a product with one row becomes a sum, which fuses
    "combo_kernels": True,  # small kernels side by side are one
    "triton.enable_pdl": True,
    # A pass of its own over the scores: the attention of one row has them in its own loops.
    "online_softmax": False,
}


def functions() -> Functions:
    """The parts of a step, compiled each by itself: the layers of a model are alike, so one compiled layer serves them all."""
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
