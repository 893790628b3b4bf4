from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from plug.serving.completions import Logprobs, Reply
from plug.serving.jobs import Choice, Piece
from plug.serving.models import ServedModel
from plug.serving.record import Record
from plug.tokenization import PlugTokenizer


@pytest.fixture
def api(client: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def test_a_completion_by_the_openai_client(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="plug-test", prompt="今天", max_tokens=5, seed=7)

    assert answer.choices[0].text == "今天天气很好，"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 5)
    assert answer.model == "plug-test"


def test_a_streamed_completion_by_the_openai_client(api: openai.OpenAI) -> None:
    stream = api.completions.create(
        model="plug-test",
        prompt="今天",
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)

    assert "".join(each.choices[0].text for each in chunks[:-1]) == "今天天气很好，我"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 7


def test_a_chat_by_the_openai_client(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="plug-test", messages=[{"role": "user", "content": "今天"}], max_tokens=4
    )

    assert answer.choices[0].message.content == "今天天气很好"
    assert answer.choices[0].message.role == "assistant"


def test_a_streamed_chat_by_the_openai_client(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="plug-test",
        messages=[{"role": "user", "content": "今天"}],
        max_completion_tokens=4,
        stream=True,
    )
    chunks = list(stream)

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == "今天天气很好"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_models_by_the_openai_client(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["plug-test"]
    assert api.models.retrieve("plug-test").owned_by == "plug"


def events(client: Any, path: str, value: Any) -> list[Any]:
    """The data of a stream's events, the last "[DONE]"."""
    body = json.dumps({**value, "stream": True}).encode()
    answer = client.request("POST", path, body, Content_Type="application/json")
    assert answer.status == 200
    frames = answer.read().decode().split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    data = [frame.removeprefix("data: ") for frame in frames]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


def test_a_stream_ends_with_done(client: Any) -> None:
    assert events(client, "/v1/completions", {"prompt": "花", "max_tokens": 3})[-1] == "[DONE]"


def test_usage_in_every_chunk(client: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "花", "max_tokens": 3, "stream_options": options}
    *chunks, _ = events(client, "/v1/completions", body)

    counts = [each["usage"]["completion_tokens"] for each in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_several_texts_have_seeds_that_follow_one_another(client: Any) -> None:
    body = {"prompt": ["花", "山"], "n": 2, "seed": 5, "max_tokens": 2}
    _, answer, _ = client.post("/v1/completions", body)

    assert [each["index"] for each in answer["choices"]] == [0, 1, 2, 3]
    assert [each["seed"] for each in answer["choices"]] == [5, 6, 5, 6]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}


def test_token_ids_as_a_prompt(client: Any) -> None:
    client.post("/v1/completions", {"prompt": [300, 301], "max_tokens": 1})
    client.post("/v1/completions", {"prompt": [[300], [301]], "max_tokens": 1})

    assert [list(each.prompt) for each in client.engine.seen] == [[300, 301], [300], [301]]


def test_echo_puts_the_prompt_before_the_text(client: Any) -> None:
    body = {"prompt": "看花", "echo": True, "max_tokens": 1}
    _, answer, _ = client.post("/v1/completions", body)
    first, *_ = events(client, "/v1/completions", body)

    assert answer["choices"][0]["text"] == "看花今天"
    assert first["choices"][0]["text"] == "看花"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_text_offsets_are_places_in_the_text(
    is_streamed: bool, tiny_tokenizer: PlugTokenizer
) -> None:
    """Of characters of several bytes, and of tokens that a stop string holds back, too."""
    model = ServedModel("m", tiny_tokenizer, max_source_tokens=96, token_count=320)
    reply = Reply(model, Record("r"), is_chat=False, logprobs=0, echo=True)
    prompt, ids = tiny_tokenizer.encode("😀看花"), tiny_tokenizer.encode("很好，龘我")
    shown = ["很", "", "", "", "", "好，龘", "我"]  # with the stop string "好，龘龘"
    pieces = [
        Piece(*each, [0.0], [[]]) for each in zip(shown, [[each] for each in ids], strict=True)
    ]

    logprobs = Logprobs(reply, Choice(0, prompt, seed=1))
    groups = [[each] for each in pieces] if is_streamed else [pieces]
    parts = [logprobs.of(group)["text_offset"] for group in groups]

    assert [each for part in parts for each in part] == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 7]


def test_timings_where_they_are_asked_for(client: Any) -> None:
    body = {"prompt": "花", "max_tokens": 2, "timings": True}
    _, answer, _ = client.post("/v1/completions", body)

    timings = answer["timings"]
    assert 0 < timings["time_to_first_token"] <= timings["total"]


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([("user", "花")], "花"),
        ([("system", "看山"), ("user", "花")], "看山\n花"),
        ([("user", "花"), ("assistant", "山"), ("user", "庙")],
         "用户：花\n助手：山\n用户：庙\n助手："),
    ],
)  # fmt: skip
def test_the_template_of_a_chat(client: Any, messages: list[Any], prompt: str) -> None:
    body = {"messages": [{"role": role, "content": text} for role, text in messages]}
    status, answer, _ = client.post("/tokenize", body)
    _, back, _ = client.post("/detokenize", {"tokens": answer["tokens"]})

    assert status == 200
    assert back["prompt"] == prompt


def test_content_in_parts_is_joined(client: Any) -> None:
    parts = [{"type": "text", "text": "看"}, {"type": "text", "text": "花"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    status, _, _ = client.post("/v1/chat/completions", body)

    assert status == 200
    assert len(client.engine.seen[0].prompt) == 2
