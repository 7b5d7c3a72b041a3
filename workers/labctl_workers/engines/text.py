"""Text to token ids and back, the same for every engine and on every day: equal prompts are equal tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from labctl_workers.engines.base import Request
from labctl_workers.record import JobSpec

# What a chat template is told when it asks for the date: a prompt that changes at midnight would be another run each day.
# It is the date that Llama 3.1's and 3.2's templates write where they cannot ask.
DATE_OF_PROMPTS = datetime(2024, 7, 26, 12)


class Text:
    """The tokenizer of a checkpoint, from transformers. `raw_prompt` leaves the chat template out."""

    def __init__(self, source: str, revision: str | None, *, raw_prompt: bool) -> None:
        import transformers

        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
        self.raw_prompt = raw_prompt
        self._encoded: dict[tuple[str, ...], list[Request]] = {}
        # Left padding keeps the last prompt token next to the first new one in a batch of unequal prompts.
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:  # any token will do: the attention mask covers it
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)

    def encode(self, prompts: Sequence[str]) -> list[Request]:
        """The same answer each time: what is recorded of the prompts is what was measured, whatever a template draws."""
        key = tuple(prompts)
        if key not in self._encoded:
            self._encoded[key] = [
                Request(index, tuple(self._token_ids(prompt))) for index, prompt in enumerate(prompts)
            ]
        return list(self._encoded[key])

    def _token_ids(self, prompt: str) -> list[int]:
        if self.raw_prompt or not self.tokenizer.chat_template:
            return list(self.tokenizer(prompt)["input_ids"])
        turns = [{"role": "user", "content": prompt}]
        # Templates such as Llama 3.1's write the date. Only to those that ask: not every tokenizer takes further arguments.
        dated = (
            {"strftime_now": DATE_OF_PROMPTS.strftime} if "strftime_now" in str(self.tokenizer.chat_template) else {}
        )
        # The template writes the special tokens itself: text first, so that none is added twice.
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **dated)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def end_tokens(self, generation_config: Any) -> set[int]:
        """The ids that end an answer: the checkpoint's generation settings say, else the tokenizer."""
        ends = getattr(generation_config, "eos_token_id", None)
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


class TextEngine:
    """The part of an engine that speaks text; `text` is there once the engine has loaded."""

    job: JobSpec
    text: Any = None

    def encode(self, prompts: Sequence[str]) -> list[Request]:
        return list(self.text.encode(prompts))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.text.decode(token_ids))

    def micro_batches(self, requests: int) -> int:
        """One: a batch goes through the engine whole."""
        return 1

    def prompt_lengths(self) -> dict[str, list[int]]:
        """Tokens of each prompt of each of the job's prompt sets."""
        return {
            name: [len(request.token_ids) for request in self.encode(prompts)]
            for name, prompts in self.job.prompt_sets.items()
        }
