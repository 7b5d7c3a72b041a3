"""Of served_truth.py: each pass of labctl's load generator waits for its turn, outside the measured window.

A pass number N writes SERVED_TURNS/N.asked, begins when N.go is there, and writes N.done when it has ended.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_S = 0.01


def in_turns(generate: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    numbers = itertools.count()

    def generate_in_turn(self: Any, requests: Any, how: Any) -> Any:
        number = next(numbers)
        if not number:  # the first request of the load
            return generate(self, requests, how)
        shape = {
            "input_len": len(requests[0].token_ids),
            "output_len": requests[0].max_new_tokens,
            "concurrency": how.arrivals.in_flight,
            "requests": len(requests),
        }
        write(folder / f"{number}.asked", shape)
        while not (folder / f"{number}.go").exists():
            time.sleep(POLL_S)
        answers = generate(self, requests, how)
        write(folder / f"{number}.done", {"wall_s": answers.wall_s})
        return answers

    return generate_in_turn


def write(path: Path, value: Any) -> None:
    path.with_suffix(".new").write_text(json.dumps(value), encoding="utf-8")
    path.with_suffix(".new").rename(path)


if "SERVED_TURNS" in os.environ and "labctl_workers.start" in sys.orig_argv:
    from labctl_workers.engines.served import ServedEngine

    ServedEngine.generate = in_turns(ServedEngine.generate, Path(os.environ["SERVED_TURNS"]))  # type: ignore[method-assign]
