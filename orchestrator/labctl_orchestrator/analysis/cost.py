"""The cost of a run, at the partition's price per GPU hour, such as "2.50 EUR"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from labctl_orchestrator.request.settings import Settings, load
from labctl_orchestrator.store.database import Store
from labctl_orchestrator.store.workspace import Workspace
from labctl_slurm.partitions import price_of


@dataclass(frozen=True)
class Price:
    """The price of a GPU hour: `amount`, in `currency`."""

    amount: float
    currency: str

    def of_gpu_seconds(self, gpu_s: float) -> float:
        """The cost of these GPU-seconds."""
        return self.amount * gpu_s / 3600

    def per_million_tokens(self, output_tok_s: float, gpus: int) -> float:
        """The cost of a million tokens at this throughput: GPUs x price of an hour / tokens of an hour x 1,000,000. Loading and
        waiting are not included."""
        return self.of_gpu_seconds(gpus * 1e6 / output_tok_s)


def prices_here(workspace: Workspace, store: Store) -> dict[str, Price]:
    """The price of each partition with runs and a price."""
    return prices(load(workspace), [partition for (partition,) in store.tuples("SELECT DISTINCT partition FROM runs")])


def prices(settings: Settings, partitions: Iterable[str]) -> dict[str, Price]:
    """The price of each partition that has one in the settings. Raises WrongUseError for an invalid price."""
    known = set(settings.names())
    texts = {name: settings.partition(name).price_per_gpu_hour for name in partitions if name in known}
    return {name: Price(*price_of(text)) for name, text in texts.items() if text}
