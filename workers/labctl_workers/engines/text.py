"""Tokenizers. Equal prompts give equal token ids, for every engine and on every day."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from labctl_workers.record import EngineCounts, JobSpec, Prompt, Refusal, Scalar
from labctl_workers.workload import RunSizes, arrive_over_time, sizes_of

# The date for chat templates that write one: with the real date, the same run would have another prompt each day. Llama 3.1's
# and 3.2's templates have this date as their fallback.
PROMPT_DATE = datetime(2024, 7, 26, 12)


class Text:
    """The tokenizer of a checkpoint, from transformers. `raw_prompt` disables the chat template."""

    def __init__(self, source: str, revision: str | None, *, raw_prompt: bool) -> None:
        import transformers

        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
        self.raw_prompt = raw_prompt
        self.longest: int | None = None
        self._encoded: dict[str, list[tuple[int, ...]]] = {}
        # Left padding keeps the last prompt token next to the first new one in a batch of unequal prompts.
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:  # any token will do: the attention mask covers it
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        """The token ids of each prompt, the same at every call, even if a template uses random numbers."""
        key = repr(prompts)
        if key not in self._encoded:
            self._encoded[key] = [tuple(self._token_ids(prompt)) for prompt in prompts]
        return list(self._encoded[key])

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if self.raw_prompt or not self.tokenizer.chat_template:
            if not isinstance(prompt, str):
                raise Refusal(
                    "no-chat-template",
                    "messages of a dataset need a chat template"
                    + (": --raw-prompt omits it" if self.raw_prompt else ", and the model's tokenizer has none"),
                    "use a dataset of prompts" if not self.raw_prompt else "remove --raw-prompt",
                )
            return self.token_ids(prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        # Not every tokenizer takes further arguments: only for templates that write the date, such as Llama 3.1's.
        writes_date = "strftime_now" in str(self.tokenizer.chat_template)
        date = {"strftime_now": PROMPT_DATE.strftime} if writes_date else {}
        # The template writes the special tokens: tokenizing its text without them adds none twice.
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **date)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(self, text: str) -> int:
        """The tokens of a text, without special ones."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def token_ids(self, text: str) -> list[int]:
        """The token ids of a text, without a chat template, with the special ones that the tokenizer adds."""
        return list(self.tokenizer(text)["input_ids"])

    @functools.cached_property
    def ordinary(self) -> list[int]:
        """The token ids that are neither special nor added, ascending."""
        own = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return sorted(set(self.tokenizer.get_vocab().values()) - own)

    @functools.cached_property
    def begin(self) -> list[int]:
        """The BOS, where the tokenizer puts one before every text."""
        first = self.tokenizer("a")["input_ids"][:1]
        return list(first) if first == [self.tokenizer.bos_token_id] else []

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def end_tokens(self, generation_config: Any) -> set[int]:
        """The token ids that end an answer: from the checkpoint's generation settings, else from the tokenizer."""
        ends = getattr(generation_config, "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def generation_config(transformers: Any, source: str, revision: str | None, config: Any) -> Any:
    """The checkpoint's generation settings; from its configuration where it has no generation_config.json."""
    try:
        return transformers.GenerationConfig.from_pretrained(source, revision=revision)
    except OSError:
        return transformers.GenerationConfig.from_model_config(config)


class TextEngine:
    """The part of an engine that handles text; `load` sets `text`."""

    DEFAULTS: ClassVar[dict[str, Scalar]] = {}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    job: JobSpec
    text: Any = None

    def encode(self, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
        return list(self.text.encode(prompts))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.text.decode(token_ids))

    def gpus_at_once(self, requests: int) -> int:
        """One: the layers of the next GPU wait for the batch."""
        return 1

    def counts(self) -> EngineCounts:
        """None: the engine neither decodes speculatively nor has a prefix cache."""
        return EngineCounts()

    def sizes(self) -> list[RunSizes]:
        """The sizes of the requests of each run of the job."""
        found = []
        for run in self.job.runs:
            dataset = self.job.datasets.get(run.prompt_set)
            prompt_tokens = [len(token_ids) for token_ids in self.encode(self.job.prompt_sets[run.prompt_set])]
            sizes = sizes_of(run, prompt_tokens, dataset, self.text.count, self.text.longest)
            found.append(RunSizes(run, sizes, arrive_over_time(self.job, run)))
        return found


def most_tokens(config: Any) -> int | None:
    """The model's longest sequence, as vLLM computes it from the configuration; None if unknown."""
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, Mapping) else None
    if most is None or kind in (None, "default", "llama3", "longrope", "su", "yarn"):
        return most
    return int(most * (rope.get("factor") or 1.0))


def check_window(job: JobSpec, longest: int | None) -> None:
    """Raises Refusal where a window is not shorter than the model's longest sequence (None: unknown): vLLM scores a prompt and
    generates one token after it."""
    own = job.option("max_model_len", int)
    most = min((limit for limit in (longest, own) if limit is not None), default=None)
    for run in job.runs:
        if most is not None and run.score is not None and run.score.window >= most:
            raise Refusal(
                "score-window",
                f"windows of the scored text are too long: {run.score.window} tokens, {job.model.name} has at most {most}",
                f"give --score-window {most // 2} and --score-stride {most // 4}",
            )


def longest_window(job: JobSpec) -> int:
    """The tokens of the longest window of the job's scored texts; 0 without one."""
    return max((run.score.window for run in job.runs if run.score is not None), default=0)
