"""The exercises, five of the handout and one on GPUs: a submission file, comparison axes and reading instructions each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from labctl_slurm.errors import WrongUseError

FOLDER = Path(__file__).parent
# Default partition of exercises on one partition; labctl.toml and flags override it.
PARTITION = "dgxh"


@dataclass(frozen=True)
class Exercise:
    """One exercise. `by`: axes of its comparison (empty: labctl chooses). `texts`: it shows the answers. `memory`: it compares
    memory with the prediction of `labctl fit`. `partitions`: the number that it needs."""

    number: int
    by: tuple[str, ...]
    metrics: tuple[str, ...]
    texts: bool = True
    memory: bool = False
    partitions: int = 1

    @property
    def name(self) -> str:
        """The name of its submission."""
        return f"exercise-{self.number}"

    @property
    def file(self) -> Path:
        """Its submission file."""
        return FOLDER / f"{self.number}.toml"

    @property
    def title(self) -> str:
        return self._text.partition("\n")[0].removeprefix("# ")

    @property
    def question(self) -> str:
        """The question, in a few sentences."""
        return self._text.split("\n\n")[1]

    @property
    def reading(self) -> str:
        """How to read the answer, what may mislead, and the next command."""
        return self._text[self._text.index("## ") :].strip()

    @property
    def _text(self) -> str:
        return (FOLDER / f"{self.number}.md").read_text(encoding="utf-8")

    def paragraphs(self) -> list[str]:
        """`reading` for a terminal, without Markdown syntax."""
        return [re.sub(r"^## (.*)", r"\1:", line) for line in self.reading.splitlines() if line]


EXERCISES = (
    Exercise(1, ("sampling",), ("output_tok_s", "tpot_s", "mean_log_probability", "repeated_bigrams", "accuracy")),
    Exercise(2, (), ("output_tok_s", "ttft_s", "tpot_s", "mbu", "energy_per_token_j"), partitions=2),
    Exercise(
        3,
        ("max_new_tokens",),
        ("output_tok_s", "tpot_s", "kv_cache_used_bytes", "peak_allocated_bytes"),
        texts=False,
        memory=True,
    ),
    Exercise(4, ("model",), ("output_tok_s", "ttft_s", "tpot_s", "weights_bytes", "mbu")),
    Exercise(5, ("backend", "batch_size"), ("output_tok_s", "ttft_s", "tpot_s", "init_s")),
    Exercise(
        6,
        ("gpus",),
        ("output_tok_s", "output_tok_s_per_gpu", "tpot_s", "weights_bytes", "mbu", "energy_per_token_j"),
        texts=False,
    ),
)


def exercise(number: str) -> Exercise:
    """The exercise with this number. Raises WrongUseError for an unknown number."""
    found = {str(one.number): one for one in EXERCISES}
    if number not in found:
        raise WrongUseError(f"unknown exercise: {number!r}", f"give one of {', '.join(found)}")
    return found[number]
