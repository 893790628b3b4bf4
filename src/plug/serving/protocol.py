"""What clients send and get: OpenAI's fields, and PLUG's own routes.

A request may also carry every field of `GenerationSettings` under its own name (`SAMPLING`); those
are checked there, so that an option has one home. `docs/serving.md` has the list.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plug.errors import UsageError
from plug.generation.settings import GenerationSettings
from plug.options import options_of
from plug.serving.errors import bad_request

# Fields of `GenerationSettings` that HTTP has under OpenAI's name, and that name.
RENAMED = {"out_length": "max_tokens", "min_length": "min_tokens"}
# Fields that a route takes by itself, or that another of OpenAI's fields stands for.
_OTHERWISE = {*RENAMED, "num_return_sequences", "logprobs"}
SAMPLING = tuple(
    field.name for field in dataclasses.fields(GenerationSettings) if field.name not in _OTHERWISE
)
# What would change the answer and is not done here; any value but those below is refused.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
MAX_TOP_LOGPROBS = 20
MAX_INPUTS = 2048  # texts of one request for embeddings, as at OpenAI
MAX_TEXTS = 256  # of one request for PLUG's own routes

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Label = Annotated[str, Field(min_length=1, max_length=32)]
TokenIds = list[Annotated[int, Field(ge=0)]]


class Body(BaseModel):
    """What every request may have; fields that it does not know are kept in `model_extra`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = Field(None, description="a name of /v1/models; the first model if left out")
    user: str | None = Field(None, description="accepted and not used")

    def ignored(self) -> list[str]:
        """Fields that nothing reads, sorted.

        Raises:
            ApiError: a field would change the answer and is not supported.
        """
        extra = self.model_extra or {}
        for name, harmless in UNSUPPORTED.items():
            if name in extra and extra[name] not in harmless:
                raise bad_request(
                    f"{name} 还不支持，忽略它会改变结果。请去掉它。", name, "unsupported_parameter"
                )
        return sorted(extra.keys() - self._known() - UNSUPPORTED.keys())

    def _known(self) -> set[str]:
        return set()


class StreamOptions(BaseModel):
    """OpenAI's, and vLLM's `continuous_usage_stats`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Body):
    """What both routes that write have in common."""

    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    n: int = Field(1, ge=1)
    seed: Seed | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    timings: bool = Field(False, description="have the seconds of this request in the answer")

    def _known(self) -> set[str]:
        return set(SAMPLING)

    def wants_usage(self) -> tuple[bool, bool]:
        """Whether a stream ends with the usage, and whether each chunk has it.

        Raises:
            ApiError: there are options of a stream, but there is no stream.
        """
        options = self.stream_options
        if options is not None and not self.stream:
            raise bad_request("stream_options 只用于 stream=true。请去掉它。", "stream_options")
        if options is None:
            return False, False
        continuous = bool(options.continuous_usage_stats)
        return bool(options.include_usage), continuous and bool(options.include_usage)

    def add_stops(self, stops: list[str]) -> None:
        """End the text at these strings too, whatever the client's own are."""
        extra = self.model_extra
        assert extra is not None
        own = extra.get("stop", [])
        if isinstance(own, (str, list)):  # else it is refused later
            extra["stop"] = [*([own] if isinstance(own, str) else own), *stops]

    def generation_settings(self, limit: int, logprobs: int | None) -> GenerationSettings:
        """How to write.

        Args:
            limit: tokens that the server writes at most.
            logprobs: of how many alternatives; None is none, not even of what was written.

        Raises:
            ApiError: a value is not accepted; its field is named.
        """
        extra = self.model_extra or {}
        given = {name: extra[name] for name in SAMPLING if name in extra}
        if given.get("top_k") == -1:  # vLLM's way to say all
            given["top_k"] = 0
        if self.max_tokens is not None and self.max_tokens > limit:
            raise bad_request(
                f"max_tokens={self.max_tokens} 超过这个服务器的上限 {limit}。请改小。", "max_tokens"
            )
        out_length = self.max_tokens or min(limit, GenerationSettings().out_length)
        given["out_length"] = out_length
        if self.min_tokens:
            if self.min_tokens > out_length:
                raise bad_request(
                    f"min_tokens={self.min_tokens} 应不超过 max_tokens={out_length}。", "min_tokens"
                )
            given["min_length"] = self.min_tokens
        if logprobs is not None:
            given["logprobs"] = logprobs
        try:
            return GenerationSettings(**given)
        except UsageError as error:
            raise bad_request(str(error), field_of(str(error))) from None


class CompletionBody(GenerationBody):
    """/v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    best_of: int | None = Field(None, ge=1)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts, each text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [[each for each in prompt if isinstance(each, int)]]
        return [each for each in prompt if not isinstance(each, int)]


class Part(BaseModel):
    """A part of a message's content; text is the only kind that the model reads."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """/v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    def model_post_init(self, _context: Any) -> None:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens


class EmbeddingsBody(Body):
    """/v1/embeddings."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class TokenizeBody(Body):
    """/tokenize, as vLLM's."""

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1024)
    return_token_strs: bool = False
    return_offsets: bool = Field(False, description="the characters of the prompt of each token")


class DetokenizeBody(Body):
    """/detokenize, as vLLM's."""

    tokens: TokenIds = Field(max_length=100_000)


class Example(BaseModel):
    """A text with its label, to learn from."""

    text: str
    label: str


class ClassifyBody(Body):
    """/v1/classify: with labels, zero-shot; without, by a fine-tuned model's own."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    text_pair: str | None = Field(None, description="the second text, of tasks that compare two")
    labels: Annotated[list[Label], Field(min_length=2, max_length=100)] | None = None
    examples: Annotated[list[Example], Field(max_length=64)] = []
    prompt: str | None = Field(None, description="has {text}; the label comes at its end")
    method: Literal["decoder", "mlm"] = "decoder"


class FillMaskBody(Body):
    """/v1/fill-mask."""

    input: str
    top_k: int = Field(5, ge=1, le=100)


class TagBody(Body):
    """/v1/tag: the entities of texts, by a model fine-tuned for labelling."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


class AnswerBody(Body):
    """/v1/answer: a stretch of the context, by a model fine-tuned for reading."""

    question: str
    context: str


class QuestionsBody(Body):
    """/v1/questions: a question to an answer in its context, by a model fine-tuned for that."""

    context: str
    answer: str


class LoadBody(Body):
    """/v1/models/load: a subdirectory of `--models-dir`, which becomes a model of that name."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")


class UnloadBody(Body):
    """/v1/models/unload: a model that was loaded by `/v1/models/load`."""

    name: str


# Roles of a conversation, as the prompt spells them.
ROLES = {"user": "用户", "assistant": "助手"}


def fold_messages(messages: Sequence[Message]) -> tuple[str, list[str]]:
    r"""The prompt of a conversation, and strings that end the answer.

    PLUG continues texts and was not taught to converse. Messages of the system come first, each a
    paragraph. A single message of the user is then continued as it stands. With more turns, each is
    a line "用户：…" or "助手：…", the prompt ends with "助手：", and the answer before "\n用户：".
    """
    system = [each.text for each in messages if each.role in ("system", "developer")]
    turns = [each for each in messages if each.role in ROLES]
    if len(turns) == 1 and turns[0].role == "user":
        return "\n".join([*system, turns[0].text]), []
    lines = [f"{ROLES[each.role]}：{each.text}" for each in turns]
    return "\n".join([*system, *lines, f"{ROLES['assistant']}："]), [f"\n{ROLES['user']}："]


_SCHEMAS: dict[str, dict[str, Any]] = {  # kind of option -> its JSON Schema
    "Int": {"type": "integer"},
    "Float": {"type": "number"},
    "Bool": {"type": "boolean"},
    "Choice": {"type": "string"},
    "Strings": {"type": ["string", "array"]},
    "TokenIds": {"type": "array", "items": {"type": "integer"}},
    "Biases": {"type": "object", "additionalProperties": {"type": "number"}},
}


def sampling_schema() -> dict[str, Any]:
    """JSON Schema of the fields in `SAMPLING`, as far as it can say what they take."""
    return {
        name: {"description": each.english, **_SCHEMAS[type(each.kind).__name__]}
        for name, (_, each) in options_of(GenerationSettings).items()
        if name in SAMPLING
    }


def dumps(value: Any) -> bytes:
    """JSON in ASCII: no reader takes a character in it for the end of a line."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def header_text(text: str) -> str:
    """Text for the value of a header: ASCII, on one line, not long."""
    cut = text if len(text) <= 500 else text[:499] + "~"
    return re.sub(r"[^ -~]", "?", cut)


def field_of(message: str) -> str | None:
    """The field that a message of `GenerationSettings` begins with."""
    match = re.match(r"\w+", message, re.ASCII)
    name = match.group() if match else ""
    names: Mapping[str, str] = {**{each: each for each in SAMPLING}, **RENAMED}
    return names.get(name)
