"""`generate`: text in, text out. The command line, the server, the integrations all come here."""

from __future__ import annotations

import logging
import secrets
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from plug.checkpoints.directory import find_model_directory, load_tokenizer
from plug.device import find_device
from plug.distributed.processes import Processes, agree
from plug.distributed.tensor_parallel import is_sharded
from plug.errors import UsageError
from plug.generation.beam import beam_search
from plug.generation.detokenizer import RowStreams, text_stream
from plug.generation.model_runner import Engine
from plug.generation.sampling import penalize
from plug.generation.scheduler import Row, Writer, write
from plug.generation.settings import BEAM_MIN_LENGTH, GenerationSettings, Mode, check_int
from plug.generation.window import (
    FinishReason,
    OriginalRules,
    PlugRules,
    Rules,
    forbid,
    frame,
    prompt_limit,
    window_length,
)
from plug.loading.load import load
from plug.loading.memory import Room, explain_out_of_memory
from plug.loading.offload import DeviceMap
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer, replace_original_punctuation

logger = logging.getLogger(__name__)

DEFAULTS = GenerationSettings()
# Of sources read lately, on a CPU: 10 of 512 tokens with plug-mini-zh. On CUDA nothing is kept
# unless it is asked for: a source of 512 tokens takes 100 MB of the card with the 27B, and reading
# it again 0.03 s.
REUSE_BYTES = 128 * 2**20
ONE_TEXT = Room()
OnText = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What was written for one text.

    Attributes:
        text: the continuation alone.
        token_ids: its ids, the final [SEP] left out; in original mode before runs of [UNK] are
            made one.
        prompt_token_count: of the whole prompt, also where only its end was read.
        finish_reason: "stop" where the model ended the text, "length" at ``out_length``.
        seed: with it, the same text comes again.
        seconds: of the batch that this text was part of.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_count: int
    finish_reason: FinishReason
    seed: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds


class Generator:
    """A loaded model with its tokenizer, for many calls; `generate` and `pipeline` make one.

    Args:
        model: a name or directory as `plug.load` takes it, or a `Plug`.
        tokenizer: needed with a `Plug`; otherwise the model directory's own if None.
        device: "cpu", "cuda", …; None is CUDA where there is one. A `Plug` stays where it is.
        graphs: as in `Engine`.
        dtype: of the weights, as `plug.load` takes it.
        room: what the device's memory must have room for besides the weights, or loading fails.
        processes: what `start_processes` gives: each of them takes a share of the model, all call
            this together, and get the same.
        device_map: as `plug.load` takes it.
        reuse_bytes: of what the encoder made of the latest prompts, kept at most so that the same
            prompt begins at once next time; 0 keeps none. None is 128 MiB on a CPU, else 0.

    Raises:
        UsageError: no such model or device, an encoder alone, a tokenizer that does not fit, or
            ``reuse_bytes`` out of range.
        PlugError: as `plug.load`, and in calls where the device has no memory left.
    """

    def __init__(
        self,
        model: str | Path | Plug | None = None,
        tokenizer: PlugTokenizer | None = None,
        device: str | None = None,
        *,
        graphs: bool = True,
        dtype: torch.dtype | None = None,
        room: Room = ONE_TEXT,
        processes: Processes | None = None,
        device_map: DeviceMap | None = None,
        reuse_bytes: int | None = None,
    ) -> None:
        if reuse_bytes is not None:
            check_int("reuse_bytes", reuse_bytes, 0)
        if isinstance(model, Plug):
            if tokenizer is None:
                raise UsageError("model 是 Plug 对象时，还要给 tokenizer（PlugTokenizer）。")
        else:
            directory = find_model_directory(model)
            tokenizer = tokenizer or load_tokenizer(directory)
            chosen = find_device(device) if processes is None else processes.device
            with explain_out_of_memory(chosen, room.batch_size):
                model = load(
                    directory,
                    device=chosen,
                    dtype=dtype,
                    room=room,
                    processes=processes,
                    device_map=device_map,
                )
        self.config = model.config
        self.tokenizer = tokenizer
        on = model.embeddings.word_embeddings.weight.device
        if reuse_bytes is None:
            reuse_bytes = REUSE_BYTES if on.type == "cpu" else 0
        with explain_out_of_memory(on, room.batch_size):
            self.engine = Engine(model.eval(), graphs=graphs, reuse_bytes=reuse_bytes)
        self.is_shared_out = is_sharded(model)
        self._writer: Writer | None = None
        ours = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        theirs = (self.config.decoder_start_token_id, self.config.eos_token_id)
        if tokenizer.vocab_size > self.config.vocab_size or ours != theirs:
            raise UsageError(
                f"分词器（{tokenizer.vocab_size} 个词元，[CLS]、[SEP] 为 {ours}）与模型"
                f"（{self.config.vocab_size} 个，{theirs}）不配套。请用模型目录里的分词器。"
            )
        may_end = {tokenizer.sep_token_id}
        may_write = {tokenizer.unk_token_id} if tokenizer.is_original else set()
        self._banned = sorted(tokenizer.special_ids - may_end - may_write)

    @torch.inference_mode()
    def __call__(
        self,
        texts: Sequence[str | list[int]],
        settings: GenerationSettings = DEFAULTS,
        *,
        seed: int | Sequence[int] | None = None,
        batch_size: int = 8,
        allow_special_tokens: bool = False,
        on_text: OnText | None = None,
    ) -> list[GenerationResult]:
        """Continue each text, or token ids without [CLS] and [SEP]; arguments as in `generate`."""
        window = window_length(self.config, settings)
        if settings.num_beams > 1 and settings.out_length > window:
            raise UsageError(
                f"束搜索在一个窗口内进行：out_length={settings.out_length} 应不超过 {window}。"
                "请减小 out_length，或用 num_beams=1。"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size={batch_size!r} 应是不小于 1 的整数。")
        seeds = self.seeds(seed, len(texts))
        if self.is_shared_out and seed is None:
            seeds = agree(seeds)
        prompts = [
            text if isinstance(text, list) else self.encode(text, allow_special_tokens)
            for text in texts
        ]
        results: list[GenerationResult] = []
        for first in range(0, len(texts), batch_size):
            part = slice(first, first + batch_size)
            streams = None
            if on_text is not None:
                streams = RowStreams(self.tokenizer, on_text, len(prompts[part]), first)
            with explain_out_of_memory(self.engine.device, len(prompts[part])):
                results += self._batch(prompts[part], seeds[part], window, settings, streams)
        return results

    def _batch(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        window: int,
        settings: GenerationSettings,
        streams: RowStreams | None,
    ) -> list[GenerationResult]:
        began = time.perf_counter()
        if settings.num_beams > 1:
            written = self._search(prompts, settings)
            if streams:
                for row, (token_ids, _) in enumerate(written):
                    for token_id in token_ids:
                        streams.push(row, token_id)
        else:
            rules = self.rules(window, settings)
            rows = [
                Row(
                    prompt, rules, settings, seed, partial(streams.push, index) if streams else None
                )
                for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
            last, self._writer = self._writer, None  # one that is interrupted is not used again
            self._writer = write(self.engine, rows, last)
            written = [(row.written, row.finish_reason or "length") for row in rows]
        if streams:
            streams.flush()
        seconds = time.perf_counter() - began
        return [
            GenerationResult(
                text=self._decode(token_ids),
                token_ids=tuple(token_ids),
                prompt_token_count=len(prompt),
                finish_reason=finish_reason,
                seed=seed,
                seconds=seconds,
            )
            for prompt, (token_ids, finish_reason), seed in zip(
                prompts, written, seeds, strict=True
            )
        ]

    def rules(self, window: int, settings: GenerationSettings) -> Rules:
        """What may be written, and when it ends."""
        if settings.mode == "original":
            return OriginalRules(self.config, window, settings.out_length)
        min_length = settings.min_length or 0
        return PlugRules(self.config, window, settings.out_length, min_length, self._banned)

    def _search(
        self, prompts: list[list[int]], settings: GenerationSettings
    ) -> list[tuple[list[int], FinishReason]]:
        """Beam search; what follows the first [SEP] of a hypothesis is dropped."""
        config = self.config
        original = settings.mode == "original"
        repetition, ngram = settings.penalty, settings.no_repeat_ngram_size

        def allow(logits: Tensor, written: Tensor) -> Tensor:
            if not original:
                logits = forbid(logits, config.num_emitted_tokens, self._banned)
            if not settings.has_penalties or not written.shape[1]:
                return logits
            counts = written.new_full((len(written),), written.shape[1])
            penalties = torch.full_like(counts, repetition, dtype=logits.dtype)
            return penalize(
                logits, written, counts, penalties, torch.full_like(counts, ngram), ngram
            )

        found = beam_search(
            self.engine,
            [frame(prompt, config) for prompt in prompts],
            num_beams=settings.num_beams,
            max_length=settings.out_length,
            min_length=BEAM_MIN_LENGTH if settings.min_length is None else settings.min_length,
            length_penalty=settings.length_penalty,
            allow=allow,
        )
        written: list[tuple[list[int], FinishReason]] = []
        for hypothesis in found:
            token_ids = [
                config.unk_token_id if token_id >= config.num_emitted_tokens else token_id
                for token_id in hypothesis.token_ids
            ]
            if config.eos_token_id in token_ids:
                written.append((token_ids[: token_ids.index(config.eos_token_id)], "stop"))
            else:
                written.append((token_ids, "length"))
        return written

    @staticmethod
    def seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
        """One seed a text, checked; new ones for None."""
        if seed is None:
            return [secrets.randbits(32) for _ in range(count)]
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
        if len(seeds) != count:
            raise UsageError(
                f"给了 {len(seeds)} 个 seed，却有 {count} 段文字。请一段一个，或只给一个。"
            )
        for each in seeds:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**63:
                raise UsageError(f"seed={each!r} 应是 0 到 2^63-1 之间的整数。")
        return seeds

    def encode(self, text: str, allow_special_tokens: bool) -> list[int]:
        """The ids of a text to continue.

        Raises:
            UsageError: it has no content that the vocabulary knows.
        """
        if not isinstance(text, str):
            raise UsageError(f"要续写的应是文字（str），却是 {type(text).__name__}。")
        if not text.strip():
            raise UsageError("要续写的文字是空的，或只有空白。请给出至少一个字。")
        if self.tokenizer.is_original:
            text = replace_original_punctuation(text)
        token_ids = self.tokenizer.encode(text, allow_special_tokens=allow_special_tokens)
        if not any(unicodedata.category(character)[0] in "LNP" for character in text):
            raise UsageError(f"“{text[:20]}”里只有表情或符号，没有文字可续写。请给出至少一个字。")
        if all(token_id == self.tokenizer.unk_token_id for token_id in token_ids):
            raise UsageError(f"词表里没有“{text[:20]}”中的任何一个字，模型读不到内容。请换成文字。")
        if len(token_ids) > (limit := prompt_limit(self.config)):
            logger.warning("提示共 %d 个词元，模型只读最后 %d 个。", len(token_ids), limit)
        return token_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        stream = text_stream(self.tokenizer)
        return "".join([*map(stream.push, token_ids), stream.flush()])


@overload
def generate(texts: str, **options: Any) -> GenerationResult: ...


@overload
def generate(texts: list[str], **options: Any) -> list[GenerationResult]: ...


def generate(  # type: ignore[misc]  # the overloads leave the options to this signature
    texts: str | list[str],
    *,
    model: str | Path | Plug | Generator | None = None,
    tokenizer: PlugTokenizer | None = None,
    device: str | None = None,
    out_length: int = DEFAULTS.out_length,
    mode: Mode = DEFAULTS.mode,
    do_sample: bool = DEFAULTS.do_sample,
    temperature: float = DEFAULTS.temperature,
    top_k: int = DEFAULTS.top_k,
    top_p: float = DEFAULTS.top_p,
    repetition_penalty: float | None = DEFAULTS.repetition_penalty,
    no_repeat_ngram_size: int = DEFAULTS.no_repeat_ngram_size,
    num_beams: int = DEFAULTS.num_beams,
    length_penalty: float = DEFAULTS.length_penalty,
    min_length: int | None = DEFAULTS.min_length,
    window: int | None = DEFAULTS.window,
    prompt_lookup_num_tokens: int | None = DEFAULTS.prompt_lookup_num_tokens,
    seed: int | Sequence[int] | None = None,
    batch_size: int = 8,
    allow_special_tokens: bool = False,
    on_text: OnText | None = None,
) -> GenerationResult | list[GenerationResult]:
    """Continue a text, or each of a list of texts.

    Args:
        texts: what to continue; the last 510 tokens of each are read.
        model: a model's name or directory, a `Plug` (give its ``tokenizer`` too), or a
            `Generator`. None is the model that ships with the package. A name is loaded anew at
            every call: for many calls make a `Generator` or a `pipeline` once.
        tokenizer: the model directory's own if None.
        device: "cpu", "cuda", …; None is CUDA where there is one.
        out_length: these and the following up to ``prompt_lookup_num_tokens`` are
            `GenerationSettings`.
        mode: see ``out_length``.
        do_sample: see ``out_length``.
        temperature: see ``out_length``.
        top_k: see ``out_length``.
        top_p: see ``out_length``.
        repetition_penalty: see ``out_length``.
        no_repeat_ngram_size: see ``out_length``.
        num_beams: see ``out_length``.
        length_penalty: see ``out_length``.
        min_length: see ``out_length``.
        window: see ``out_length``.
        prompt_lookup_num_tokens: see ``out_length``.
        seed: of the draws; a text with a seed gives the same whatever else is in the list. One
            for all texts, or one each; None is a new one each.
        batch_size: texts decoded together.
        allow_special_tokens: read "[SEP]" and the like in the texts as special tokens.
        on_text: called with the text's number and each piece of its continuation as it is written.

    Returns:
        A result, or a list of them in the order of ``texts``.

    Raises:
        UsageError: a text without content, a value out of range, or a model that cannot write.
        PlugError: the model's files are damaged.
    """
    settings = GenerationSettings(
        out_length=out_length,
        mode=mode,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        num_beams=num_beams,
        length_penalty=length_penalty,
        min_length=min_length,
        window=window,
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )
    generator = model if isinstance(model, Generator) else Generator(model, tokenizer, device)
    results = generator(
        [texts] if isinstance(texts, str) else texts,
        settings,
        seed=seed,
        batch_size=batch_size,
        allow_special_tokens=allow_special_tokens,
        on_text=on_text,
    )
    return results[0] if isinstance(texts, str) else results
