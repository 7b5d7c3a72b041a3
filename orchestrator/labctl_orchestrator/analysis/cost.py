"""What a run costs, at a partition's price of a GPU for an hour: "2.50 EUR", in whatever word its users pay with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from labctl_orchestrator.request.settings import Settings, load
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.partitions import price_of


@dataclass(frozen=True)
class Price:
    """What one GPU costs for an hour: `amount`, in `currency`."""

    amount: float
    currency: str

    def of_gpu_seconds(self, gpu_s: float) -> float:
        """What this many GPU-seconds cost."""
        return self.amount * gpu_s / 3600

    def per_million_tokens(self, output_tok_s: float, gpus: int) -> float:
        """At a steady throughput: GPUs x price of an hour / tokens of an hour x a million. The measured window alone counts,
        as if the engine never had to be loaded and never waited."""
        return self.of_gpu_seconds(gpus * 1e6 / output_tok_s)


def prices_here(workspace: Workspace, store: Store) -> dict[str, Price]:
    """The price of each partition of the store's runs that has one."""
    return prices(load(workspace), [partition for (partition,) in store.tuples("SELECT DISTINCT partition FROM runs")])


def prices(settings: Settings, partitions: Iterable[str]) -> dict[str, Price]:
    """The price of each partition that has one; partitions that are in the settings no more have none.

    Raises WrongUseError for a price that is none.
    """
    known = set(settings.names())
    texts = {name: settings.partition(name).price_per_gpu_hour for name in partitions if name in known}
    return {name: Price(*price_of(text)) for name, text in texts.items() if text}
