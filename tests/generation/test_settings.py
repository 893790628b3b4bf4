"""The options of generation: what excludes what, and the documentation made from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plug.errors import UsageError
from plug.generation.settings import GenerationSettings
from plug.options import markdown_table, options_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "generation.md"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_p": float("nan")}, "top_p"),
        ({"temperature": 1e-5}, "temperature"),
        ({"no_repeat_ngram_size": 2**63}, "no_repeat_ngram_size"),
        ({"min_length": 9, "out_length": 8}, "不超过 out_length=8"),
        ({"mode": "original", "min_length": 3}, "80%"),
        ({"mode": "original", "ignore_eos": True}, "80%"),
        ({"num_beams": 2, "stop": "。"}, "^stop 不能用于束搜索"),
        ({"num_beams": 2, "logprobs": 0}, "^logprobs 不能用于束搜索"),
        (
            {"num_beams": 2, "prompt_lookup_num_tokens": 4},
            "^prompt_lookup_num_tokens 不能用于束搜索",
        ),
        ({"num_return_sequences": 2, "temperature": 0}, "贪心"),
        ({"tempreature": 1}, "是否想用 temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        GenerationSettings.of(**options)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63), 10**5000]),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none()), max_size=4),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=3)), st.floats(), max_size=3),
    st.complex_numbers(),
    st.sampled_from([object(), int, ..., range(3), np.float16("nan"), np.int8(3), np.ones(2)]),
)


@given(name=st.sampled_from(sorted(options_of(GenerationSettings))), value=JUNK)
def test_any_value_is_kept_within_limits_or_refused(name: str, value: object) -> None:
    try:
        settings = GenerationSettings.of(**{name: value})
    except UsageError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert GenerationSettings.of(settings) is settings
        assert dataclasses.replace(settings) == settings
        assert hash(settings) == hash(dataclasses.replace(settings))
    assert "\n" not in refusal
    assert len(refusal) < 300


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    settings = GenerationSettings(logit_bias={49: 1}, stop_token_ids=[48])

    settings.check_token_ids(50)
    with pytest.raises(UsageError, match=r"logit_bias .*49.*49"):
        settings.check_token_ids(49)
    with pytest.raises(UsageError, match=r"stop_token_ids .*60.*50"):
        GenerationSettings(stop_token_ids=[60]).check_token_ids(50)


def test_every_option_is_told_in_both_languages() -> None:
    for name, (_, option) in options_of(GenerationSettings).items():
        assert option.chinese.endswith("。"), name
        assert option.english.isascii(), name
        assert bool(option.unset[0]) == bool(option.unset[1]), name


def test_the_table_of_the_documentation_is_made_from_the_options() -> None:
    table = markdown_table(GenerationSettings)

    assert table in DOCS.read_text(encoding="utf-8"), f"put this into {DOCS}:\n{table}"
