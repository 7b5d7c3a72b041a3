"""`--where`: which cells a condition leaves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labctl_orchestrator.analysis.conditions import condition
from labctl_slurm.errors import WrongUseError

from .conftest import refused

HOLDS = [
    ("dtype=float16", "float16", True),
    ("dtype = float16", "float16", True),
    ("dtype!=float16", "float16", False),
    ("batch_size=8", 8, True),
    ("batch_size>=8", 8, True),
    ("batch_size>8", 8, False),
    ("batch_size<64", 8, True),
    ("batch_size <= 7", 8, False),
    ("request_rate=0.50", 0.5, True),
    ("request_rate>1", None, False),
    ("ignore_eos=true", 1, True),
    ("ignore_eos=false", 1, False),
    ("backend in hf,vllm", "vllm", True),
    ("backend in hf, other", "vllm", False),
    ("backend not in hf,other", "vllm", True),
    ("max_new_tokens in 128,256", 256, True),
    ("sampling=temperature=0.7,top_p=0.9,seed=1", "temperature=0.7,top_p=0.9,seed=1", True),
    ("sampling in greedy,temperature=0.7,top_p=0.9,seed=1", "temperature=0.7,top_p=0.9,seed=1", True),
    ("sampling in greedy,temperature=0.7,top_p=0.9,seed=1", "greedy", True),
    ("sampling in greedy,temperature=0.7,top_p=0.9,seed=12", "temperature=0.7,top_p=0.9,seed=1", False),
    ("sampling not in temperature=0.7,top_p=0.9,seed=1", "temperature=0.7,top_p=0.9,seed=1", False),
    ("inner in in,out", "in", True),
]


@pytest.mark.parametrize(("text", "value", "holds"), HOLDS)
def test_a_condition_holds_for_what_it_says(text: str, value: Any, holds: bool) -> None:
    assert condition(text).holds(value) is holds


@pytest.mark.parametrize("text", ["dtype", "=float16", "dtype~float16", "", "a b=c"])
def test_another_form_is_refused_with_an_example(text: str) -> None:
    assert "batch_size>=8" in refused(lambda: condition(text), WrongUseError).remedy


@pytest.mark.parametrize("text", ["batch_size!==8", "batch_size=>8", "batch_size==8", "dtype=~float", "a<>b", "a=!b"])
def test_an_operator_that_there_is_not_is_no_part_of_the_value(text: str) -> None:
    assert "!=" in refused(lambda: condition(text), WrongUseError).remedy


@pytest.mark.parametrize(("text", "value"), [("dtype>8", "float16"), ("batch_size<many", 8)])
def test_an_order_of_what_is_no_number_is_refused(text: str, value: Any) -> None:
    refused(lambda: condition(text).holds(value), WrongUseError)


@given(st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_orders_are_those_of_numbers_not_of_texts(value: int, bound: int) -> None:
    told = {how: condition(f"gpus{how}{bound}").holds(value) for how in ("=", "!=", "<", ">", "<=", ">=")}
    assert told == {
        "=": value == bound, "!=": value != bound, "<": value < bound, ">": value > bound, "<=": value <= bound,
        ">=": value >= bound,
    }  # fmt: skip
