"""Compiles decode steps and the layers of prompts with torch's compiler.

A decode step is bound by memory, and with one sequence by the gaps between kernels. So the settings reduce the number of kernels,
and let each kernel read its weights before the kernel before it ends (programmatic dependent launch, compute capability 9.0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labctl_workers.engines.staged import stages
from labctl_workers.engines.staged.stages import Functions

# Options that this torch does not have are left out.
OPTIONS = {
    "coordinate_descent_tuning": True,  # tunes tile sizes; a product with one row becomes a sum, which fuses
    "combo_kernels": True,  # merges small independent kernels
    "triton.enable_pdl": True,
    # It would add a pass over the scores: the attention of one row has them in its own loops.
    "online_softmax": False,
}


def functions() -> Functions:
    """The parts of a step, each compiled separately: all layers of a model share one compiled layer."""
    import torch

    allow_many_shapes()
    known = set(torch._inductor.list_options())
    options = {name: value for name, value in OPTIONS.items() if name in known}

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        return made

    # One function for prompts of any length: their matrix products are large, so only the operations between them matter.
    prompt_layer = torch.compile(stages.run_layer, fullgraph=True, dynamic=True)
    return Functions(compiled(stages.enter), compiled(stages.run_layer), compiled(stages.leave), prompt_layer)


def allow_many_shapes() -> None:
    """Raise torch's limit of eight compiled forms of one function: a layer is compiled for each bucket and device."""
    import torch._dynamo

    config = torch._dynamo.config
    config.accumulated_recompile_limit = max(1024, config.accumulated_recompile_limit)
    config.recompile_limit = max(256, config.recompile_limit)
