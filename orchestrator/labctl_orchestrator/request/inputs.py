"""The input of each run of a submission: its prompts, a dataset's entries, or random prompts."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from labctl_orchestrator.request import datasets, lengths, tasks, text_file
from labctl_orchestrator.request.prompts import prompts_of
from labctl_orchestrator.request.request import SubmissionSpec
from labctl_orchestrator.request.sweep import Combination
from labctl_slurm.errors import WrongUseError
from labctl_workers.record import Dataset, Prompt, Workload


@dataclass(frozen=True)
class Input:
    """The prompts of a run, the lengths of a dataset's entries, the requests of a repeat (None: the default) and its workload."""

    prompts: list[Prompt]
    dataset: Dataset | None
    requests: int | None
    workload: Workload | None

    @property
    def has_lengths(self) -> bool:
        """Whether each request has an output length of its own."""
        of = self.dataset
        return (self.workload is not None and self.workload.output_len is not None) or (
            of is not None and (of.output_tokens is not None or of.answers is not None)
        )


class Inputs:
    """The inputs of a submission's runs; each file is read once."""

    def __init__(self, request: SubmissionSpec) -> None:
        self.request = request
        self.read = functools.cache(datasets.read)
        self.score = None if request.score is None else text_file.read(request.score)
        self.tasks = [tasks.parse(text) for text in dict.fromkeys(request.quality)]
        self._of = functools.cache(self._made)

    def of(self, cell: Combination) -> Input:
        """Raises WrongUseError for settings that exclude each other, and for an invalid file."""
        found = self._of(cell.input_len, cell.output_len, cell.prefix_len, cell.dataset, cell.requests)
        if found.dataset is not None and found.dataset.times_s is not None and cell.request_rate is not None:
            raise WrongUseError(
                "request_rate and a trace exclude each other", "the trace has times: remove request_rate"
            )
        return found

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        return list(prompts_of(self.request))

    def _made(
        self,
        input_len: str | None,
        output_len: str | None,
        prefix_len: int | None,
        dataset: str | None,
        requests: int | None,
    ) -> Input:
        seed = self.request.seed or 0
        if input_len is None and output_len is None and prefix_len is None and dataset is None:
            return Input(self.prompts, None, requests, None)
        if dataset is not None and input_len is not None:
            raise WrongUseError(
                "input_len and dataset exclude each other", "the dataset has prompts or their lengths: remove input_len"
            )
        entries = None if dataset is None else self.read(dataset)
        if prefix_len is not None:
            most = None if input_len is None else lengths.longest(input_len)
            if entries is not None and entries.dataset.input_tokens:
                most = max(entries.dataset.input_tokens)
            if most is None:
                raise WrongUseError(
                    "prefix_len needs random prompts", "give --input-len or --lengths, or a trace as --dataset"
                )
            if prefix_len > most:
                raise WrongUseError(
                    f"prefix_len is longer than every prompt: {prefix_len} of {most} tokens at most",
                    "give a smaller --prefix-len: the prefix is a part of the prompt",
                )
        workload = Workload(input_len, output_len, prefix_len or 0, seed=seed)
        if entries is None:
            return Input([] if input_len else self.prompts, None, requests, workload)
        workload.dataset, workload.sha256 = entries.name, entries.sha256
        prompts, sampled, own = entries.sampled(requests, seed)
        return Input(prompts, sampled, own, workload)
