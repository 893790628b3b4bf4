"""`pipeline(Tasks.text_generation, …)`: a text in, ``{"text": …}`` out, as on the model card."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modelscope.pipelines.builder import PIPELINES

from plug.checkpoints.directory import RUN_FILE
from plug.checkpoints.weights import DTYPES
from plug.errors import UsageError
from plug.generation.generator import Generator
from plug.generation.result import Piece
from plug.generation.settings import GenerationSettings
from plug.integrations.modelscope.base import PlugPipeline, device_of

OUT_LENGTH = 128  # tokens, where none is given; the original's
SETTINGS = frozenset(field.name for field in dataclasses.fields(GenerationSettings))
OTHERS = frozenset({"seed", "batch_size", "allow_special_tokens", "stream"})


@PIPELINES.register_module("text-generation", module_name="plug-generation", force=True)
class PlugGeneration(PlugPipeline):
    """Continues texts. Arguments and errors as in `PlugPipeline`, and two more.

    ``device_map="auto"`` is for a card too small for the model, ``dtype`` ("bfloat16", …) the one
    of its weights; both as in `plug.load`.

    Options of a call come first, then those of `configuration.json` (under "model"), then the
    defaults of `GenerationSettings`. An original's weights write by the original's rules.
    """

    known = SETTINGS | OTHERS

    def __init__(
        self,
        model: Any,
        device: str = "gpu",
        *,
        device_map: Any = None,
        dtype: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, device, **options)
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype={dtype!r} 只能是 {'、'.join(DTYPES)}。")
        self._encode: Callable[[str], str | list[int]] = lambda text: text
        if (self.directory / RUN_FILE).is_file():
            self._encode = _finetuned_source(self.directory)
        self.generator = Generator(
            self.directory,
            device=device_of(device),
            dtype=None if dtype is None else DTYPES[dtype],
            device_map=device_map,
        )
        told = self.cfg.get("model") or {}
        self.defaults: dict[str, Any] = {"out_length": OUT_LENGTH}
        if self.directory != self.model_dir:
            self.defaults["mode"] = "original"
        self.defaults |= {name: told[name] for name in told.keys() & self.known}
        seed = self.defaults.pop("seed", None)
        # A seed in the file makes runs of a program repeatable, not calls within it alike.
        self._seeds = None if seed is None else random.Random(seed)

    def answer(self, inputs: list[str], options: dict[str, Any]) -> list[Any]:
        """``{"text": …}`` for each input; with ``stream``, an iterator for the only one.

        Args:
            inputs: the texts.
            options: those of `plug.generate` (``out_length``, ``top_k``, ``temperature``, …),
                ``seed`` (one, or one a text), ``batch_size``, ``stream``.

        Raises:
            UsageError: an option or a text makes no sense.
            PlugError: the device has no memory left.
        """
        if not inputs:
            return []
        values = self.defaults | {name: options[name] for name in options if name != "stream"}
        if values.get("seed") is None and self._seeds is not None:
            values["seed"] = [self._seeds.getrandbits(32) for _ in inputs]
        if options.get("stream") and len(inputs) != 1:
            raise UsageError(f"流式输出一次只写一段，却给了 {len(inputs)} 段。")
        if (count := values.get("num_return_sequences", 1)) != 1:
            raise UsageError(f"一个输入写一段，不能用 num_return_sequences={count}。请多次调用。")
        written = self.generator.stream([self._encode(text) for text in inputs], **values)
        if options.get("stream"):
            return [_so_far(written)]
        results = {piece.index: piece.result for piece in written if piece.result is not None}
        return [{"text": results[index].text} for index in range(len(inputs))]

    def stream_generate(self, input: str, **options: Any) -> Iterator[dict[str, str]]:
        """ModelScope's name for a call with ``stream=True``: all that is written so far, again."""
        return self(input, stream=True, **options)


def _so_far(written: Iterator[Piece]) -> Iterator[dict[str, str]]:
    text = ""
    for piece in written:
        if piece.text:
            text += piece.text
            yield {"text": text}


def _finetuned_source(directory: Path) -> Callable[[str], list[int]]:
    """A source as the fine-tuned model learnt to read it: `[SEP]` between parts, cut at the end."""
    from plug.finetuning.predict import kind_of

    kind = kind_of(directory)
    if kind.model_class != "PlugForConditionalGeneration":
        raise UsageError(f"{directory} 是为别的任务微调的，不能写作。请用 plug predict。")

    def encode(text: str) -> list[int]:
        return kind.features([kind.example([text])])[0]["input_ids"][1:-1]

    return encode
