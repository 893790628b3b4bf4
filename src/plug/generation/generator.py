"""`Generator` and `generate`: text in, text out. Command line, pipelines and server come here."""

from __future__ import annotations

import logging
import secrets
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Listed
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch

from plug.checkpoints.directory import find_model_directory, load_tokenizer
from plug.device import explain_out_of_memory, find_device
from plug.distributed.processes import Processes, agree
from plug.distributed.tensor_parallel import is_sharded
from plug.errors import UsageError
from plug.generation.beam import beam_size, write_by_beams
from plug.generation.detokenizer import Detokenizer
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.result import GenerationResult, Piece
from plug.generation.scheduler import Scheduler
from plug.generation.sequence import Sequence
from plug.generation.settings import GenerationSettings, check_int
from plug.generation.window import (
    FinishReason,
    OriginalRules,
    PlugRules,
    Rules,
    frame,
    prompt_limit,
    window_length,
)
from plug.loading.adapters import Adapter
from plug.loading.estimate import Room
from plug.loading.load import load
from plug.loading.offload import DeviceMap
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer, replace_original_punctuation
from plug.traditional import as_read

logger = logging.getLogger(__name__)

# Bytes of encoded sources kept on a CPU: 10 sources of 512 tokens with plug-mini-zh. On CUDA none
# are kept unless asked for: with the 27B a source of 512 tokens takes 100 MB of the card, and
# encoding it again 0.03 s.
REUSE_BYTES = 128 * 2**20
ONE_TEXT = Room()
Prompt = str | list[int]
OnText = Callable[[int, str], None]


class Generator:
    """A loaded model with its tokenizer, for many calls, from any number of threads.

    Each call has buffers of its own, so that it gives what it gives alone; the device works for one
    call at a time, a step here and a step there.

    Args:
        model: a name or directory as `plug.load` takes it, or a `Plug`.
        tokenizer: needed with a `Plug`; otherwise the model directory's own if None.
        device: "cpu", "cuda", …; None is CUDA where there is one. A `Plug` stays where it is.
        graphs: as in `PreparedModel`.
        dtype: of the weights, as `plug.load` takes it.
        room: what the device's memory must have room for besides the weights, or loading fails.
        processes: what `start_processes` gives: each process takes a share of the model. All of
            them make the same calls in the same order, one at a time, and get the same results.
        device_map: as `plug.load` takes it.
        adapter: as `plug.load` takes it; not with a `Plug`.
        reuse_bytes: bytes of encoded prompts to keep, so that the same prompt begins at once next
            time; 0 keeps none. None is 128 MiB on a CPU, else 0.
        stacks_weights: as in `PreparedModel`.
        takes_adapters: `add_adapter` may be called; texts with different adapters share a batch.
            Not with a share of a model.

    Raises:
        UsageError: no such model or device, an encoder alone, a tokenizer that does not fit,
            ``reuse_bytes`` out of range, or ``takes_adapters`` with a share of a model.
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
        adapter: str | Path | None = None,
        reuse_bytes: int | None = None,
        takes_adapters: bool = False,
        stacks_weights: bool = True,
    ) -> None:
        if reuse_bytes is not None:
            check_int("reuse_bytes", reuse_bytes, 0)
        self.is_sharded = (
            is_sharded(model)
            if isinstance(model, Plug)
            else processes is not None and processes.world_size > 1
        )
        if self.is_sharded and takes_adapters:
            raise UsageError(
                "模型分在多个进程上时不能带着 takes_adapters。"
                "请先合并适配器（plug merge --model … --adapter … --to 新目录），再用新目录。"
            )
        if isinstance(model, Plug):
            if adapter is not None:
                raise UsageError(
                    "model 是 Plug 对象时不能给 adapter。请用 plug.load(…, adapter=…)。"
                )
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
                    adapter=adapter,
                )
        self.config = model.config
        self.tokenizer = tokenizer
        on = model.embeddings.word_embeddings.weight.device
        if reuse_bytes is None:
            reuse_bytes = REUSE_BYTES if on.type == "cpu" else 0
        with explain_out_of_memory(on, room.batch_size):
            self.prepared = PreparedModel(
                model.eval(),
                graphs=graphs,
                reuse_bytes=reuse_bytes,
                takes_adapters=takes_adapters,
                stacks_weights=stacks_weights,
            )
        self._calls = 0  # running now; counted for sharded models alone
        self._idle: deque[ModelRunner] = deque(maxlen=1)  # of the last call, for the next
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

    @overload
    def __call__(
        self, texts: str, settings: GenerationSettings | None = None, **options: Any
    ) -> GenerationResult: ...

    @overload
    def __call__(
        self, texts: Iterable[Prompt], settings: GenerationSettings | None = None, **options: Any
    ) -> list[GenerationResult]: ...

    def __call__(
        self,
        texts: str | Iterable[Prompt],
        settings: GenerationSettings | None = None,
        *,
        seed: int | Listed[int] | None = None,
        batch_size: int = 8,
        allow_special_tokens: bool = False,
        on_text: OnText | None = None,
        adapter: int = 0,
        **changes: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Continue a text, or each of several; arguments and results as in `generate`.

        A text may also be a list of token ids without [CLS] and [SEP]. ``adapter`` is a number that
        `add_adapter` returned.
        """
        results: dict[int, GenerationResult] = {}
        for piece in self.stream(
            texts,
            settings,
            seed=seed,
            batch_size=batch_size,
            allow_special_tokens=allow_special_tokens,
            adapter=adapter,
            **changes,
        ):
            if piece.text and on_text is not None:
                on_text(piece.index, piece.text)
            if piece.result is not None:
                results[piece.index] = piece.result
        in_order = [results[index] for index in range(len(results))]
        return in_order[0] if isinstance(texts, str) and len(in_order) == 1 else in_order

    def stream(
        self,
        texts: str | Iterable[Prompt],
        settings: GenerationSettings | None = None,
        *,
        seed: int | Listed[int] | None = None,
        batch_size: int = 8,
        allow_special_tokens: bool = False,
        adapter: int = 0,
        **changes: Any,
    ) -> Iterator[Piece]:
        """Return an iterator of the texts' pieces as they are written; arguments as in `generate`.

        Arguments are checked at once. No lock is held between two pieces: other calls may be made
        meanwhile, from the same thread too. The iterator may be dropped at any time: with beams
        there is a piece without text after each step, so that the search ends there.
        """
        settings = GenerationSettings.of(settings, **changes)
        window = self.window(settings)
        check_int("batch_size", batch_size, 1)
        if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
            raise UsageError(f"要续写的应是文字（str）或它们的列表，却是 {type(texts).__name__}。")
        listed = [texts] if isinstance(texts, str) else list(texts)
        seeds = self.seeds(seed, len(listed))
        if self.is_sharded and seed is None:
            seeds = agree(seeds)
        prompts = [self.encode(text, allow_special_tokens, settings.simplify) for text in listed]
        if (count := settings.num_return_sequences) > 1:
            prompts = [prompt for prompt in prompts for _ in range(count)]
            seeds = [(each + number) % 2**63 for each in seeds for number in range(count)]
        self.check_adapter(adapter)
        return self._stream(prompts, seeds, window, settings, batch_size, adapter)

    def _stream(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        window: int,
        settings: GenerationSettings,
        batch_size: int,
        adapter: int,
    ) -> Iterator[Piece]:
        if self.is_sharded:
            if self._calls:
                raise UsageError(
                    "模型分在多个进程上时，一次只能有一个调用：前一个还没有写完。"
                    "请等它写完，或取完它的流式输出。"
                )
            self._calls += 1
        try:
            write = self._search if settings.num_beams > 1 else self._write
            for first in range(0, len(prompts), batch_size):
                part = slice(first, first + batch_size)
                yield from write(prompts[part], seeds[part], window, settings, first, adapter)
        finally:
            self._calls = 0

    def _write(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        window: int,
        settings: GenerationSettings,
        first: int,
        adapter: int,
    ) -> Iterator[Piece]:
        """Write one batch; results are numbered from ``first``."""
        began = time.perf_counter()
        pieces: list[Piece] = []

        def add(index: int, text: str) -> None:
            pieces.append(Piece(index, text))

        sequences = [
            self.sequence(prompt, window, settings, seed, partial(add, index), adapter)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True), first)
        ]
        numbers = {sequence: index for index, sequence in enumerate(sequences, first)}
        longest = max(len(each.prompt) + each.rules.steps for each in sequences)
        source_length = min(longest, prompt_limit(self.config)) + 2
        longest_window = max(sequence.longest_window for sequence in sequences)
        runner = self._runner(Size(len(sequences), source_length, longest_window))
        scheduler = Scheduler(len(sequences), ahead=runner.ahead)
        for sequence in sequences:
            scheduler.join(sequence)
        try:
            while scheduler.running:
                finished = scheduler.update(runner.step(scheduler.plan()))
                for sequence in finished:
                    result = result_of(sequence, began)
                    pieces.append(Piece(numbers[sequence], "", result))
                yield from pieces
                pieces.clear()
        finally:
            self._give_back(runner)

    def _search(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        window: int,  # noqa: ARG002  # as in _write
        settings: GenerationSettings,
        first: int,
        adapter: int,
    ) -> Iterator[Piece]:
        """As `_write`, by beam search: an empty piece a step, then each text whole."""
        began = time.perf_counter()
        sources = [frame(prompt, self.config) for prompt in prompts]
        size = beam_size(sources, settings.num_beams, settings.out_length)
        runner = self._runner(size)
        steps = write_by_beams(runner, sources, settings, self._banned, adapter)
        found: list[tuple[list[int], FinishReason]] = []
        try:
            while not found:
                with explain_out_of_memory(self.prepared.device, len(prompts)):
                    found = next(steps)
                if not found:
                    yield Piece(first, "")
        finally:
            self._give_back(runner)
        for index, (token_ids, finish_reason) in enumerate(found):
            detokenizer = Detokenizer(self.tokenizer)
            for token_id in token_ids:
                detokenizer.push(token_id)
            detokenizer.flush()
            result = GenerationResult(
                text=detokenizer.text,
                token_ids=tuple(token_ids),
                prompt_token_count=len(prompts[index]),
                finish_reason=finish_reason,
                seed=seeds[index],
                seconds=time.perf_counter() - began,
            )
            yield Piece(first + index, result.text)
            yield Piece(first + index, "", result)

    def _runner(self, size: Size) -> ModelRunner:
        """Return a runner for one batch: the last call's, or a new one that has its room too."""
        try:
            idle = self._idle.pop()  # one thread gets it
        except IndexError:
            return ModelRunner(self.prepared, size)
        if idle.size.holds(size):
            return idle
        size = size.joined(idle.size)
        del idle  # its memory is free before the new one's is taken
        return ModelRunner(self.prepared, size)

    def _give_back(self, runner: ModelRunner) -> None:
        if runner.is_intact:
            self._idle.append(runner)

    def sequence(
        self,
        prompt: list[int],
        window: int,
        settings: GenerationSettings,
        seed: int,
        on_text: Callable[[str], None] | None = None,
        adapter: int = 0,
    ) -> Sequence:
        """Return a new sequence for a scheduler, which tells ``on_text`` each piece of its text."""
        return Sequence(
            prompt,
            self.rules(window, settings),
            settings,
            seed,
            Detokenizer(
                self.tokenizer,
                on_text,
                stop=settings.stop,
                min_length=settings.min_length or 0,
            ),
            adapter=adapter,
        )

    def add_adapter(self, adapter: Adapter) -> int:
        """Have texts written with a LoRA adapter too, beside those without; return its number.

        From any thread, also while texts are written.

        Args:
            adapter: of this model, as `plug.loading.adapters.read_adapter` reads it.

        Raises:
            UsageError: it is DoRA or has a head, or this generator takes none.
            PlugError: it is of a model of another shape.
        """
        if self.prepared.adapters is None:
            raise UsageError(
                "这个 Generator 不接受适配器。请用 Generator(…, takes_adapters=True)。"
            )
        with self.prepared.lock:
            return self.prepared.adapters.add(adapter)

    def remove_adapter(self, number: int) -> None:
        """Drop an adapter; a text under way that uses it goes on without one."""
        self.check_adapter(number)
        if number:
            assert self.prepared.adapters is not None
            with self.prepared.lock:
                self.prepared.adapters.remove(number)

    def check_adapter(self, number: int) -> None:
        """Raise a `UsageError` unless ``number`` is 0 or an adapter's."""
        adapters = self.prepared.adapters
        if number and (adapters is None or number not in adapters.adapters):
            raise UsageError(f"没有编号为 {number} 的适配器。请用 add_adapter 返回的编号。")

    def window(self, settings: GenerationSettings) -> int:
        """Return how many tokens are written from one encoding.

        Raises:
            UsageError: this model cannot do what ``settings`` ask for.
        """
        settings.check_token_ids(self.tokenizer.vocab_size)
        window = window_length(self.config, settings)
        if settings.num_beams > 1 and settings.out_length > window:
            raise UsageError(
                f"束搜索在一个窗口内进行：out_length={settings.out_length} 应不超过 {window}。"
                "请减小 out_length，或用 num_beams=1。"
            )
        return window

    def rules(self, window: int, settings: GenerationSettings) -> Rules:
        """Return what may be written, and when a text ends."""
        if settings.mode == "original":
            return OriginalRules(self.config, window, settings.out_length)
        min_length = settings.min_length or 0
        return PlugRules(self.config, window, settings.out_length, min_length, self._banned)

    @staticmethod
    def seeds(seed: int | Listed[int] | None, count: int) -> list[int]:
        """Return one checked seed a text; new ones for None."""
        if seed is None:
            return [secrets.randbits(32) for _ in range(count)]
        seeds = list(seed) if isinstance(seed, Listed) else [seed] * count
        if len(seeds) != count:
            raise UsageError(
                f"给了 {len(seeds)} 个 seed，却有 {count} 段文字。请一段一个，或只给一个。"
            )
        for each in seeds:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**63:
                raise UsageError(f"seed={each!r} 应是 0 到 2^63-1 之间的整数。")
        return seeds

    def encode(self, text: Prompt, allow_special_tokens: bool, simplify: bool = False) -> list[int]:
        """Return the ids of a text to continue; ids are checked and returned.

        Raises:
            UsageError: the text has no content that the vocabulary knows, or an id is none of it.
        """
        if isinstance(text, list):
            return self._checked(text)
        if not isinstance(text, str):
            raise UsageError(f"要续写的应是文字（str），却是 {type(text).__name__}。")
        if not text.strip():
            raise UsageError("要续写的文字是空的，或只有空白。请给出至少一个字。")
        text = as_read(text, simplify)
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

    def _checked(self, token_ids: list[int]) -> list[int]:
        size = self.config.vocab_size
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise UsageError(f"词元编号 {token_id!r} 应是整数。要续写文字，请给 str。")
            if not 0 <= token_id < size:
                raise UsageError(f"词元编号 {token_id} 应在 0 到 {size - 1} 之间。")
        return token_ids


def result_of(sequence: Sequence, began: float) -> GenerationResult:
    """Return the result of a finished sequence with a detokenizer.

    Raises:
        Exception: what went wrong for this sequence.
    """
    if sequence.error is not None:
        raise sequence.error
    assert sequence.detokenizer is not None
    assert sequence.finish_reason is not None
    return GenerationResult(
        text=sequence.detokenizer.text,
        token_ids=tuple(sequence.written),
        prompt_token_count=len(sequence.prompt),
        finish_reason=sequence.finish_reason,
        seed=sequence.seed,
        seconds=time.perf_counter() - began,
        logprobs=None if sequence.settings.logprobs is None else tuple(sequence.logprobs),
    )


@overload
def generate(
    texts: str, settings: GenerationSettings | None = None, **options: Any
) -> GenerationResult: ...


@overload
def generate(
    texts: Iterable[Prompt], settings: GenerationSettings | None = None, **options: Any
) -> list[GenerationResult]: ...


def generate(
    texts: str | Iterable[Prompt],
    settings: GenerationSettings | None = None,
    *,
    model: str | Path | Plug | Generator | None = None,
    tokenizer: PlugTokenizer | None = None,
    device: str | None = None,
    seed: int | Listed[int] | None = None,
    batch_size: int = 8,
    allow_special_tokens: bool = False,
    on_text: OnText | None = None,
    **changes: Any,
) -> GenerationResult | list[GenerationResult]:
    """Continue a text, or each of a list of texts.

    Args:
        texts: what to continue; the model reads the last 510 tokens of each.
        settings: how to write; None is the defaults of `GenerationSettings`.
        model: a model's name or directory, a `Plug` (give its ``tokenizer`` too), or a
            `Generator`. None is the model that ships with the package. A name is loaded anew at
            every call: for many calls make a `Generator` or a `pipeline` once.
        tokenizer: the model directory's own if None.
        device: "cpu", "cuda", …; None is CUDA where there is one.
        seed: of the draws; a text with a seed gives the same whatever else is in the list. One
            for all texts, or one each; None is a new one each.
        batch_size: texts decoded together.
        allow_special_tokens: read "[SEP]" and the like in the texts as special tokens.
        on_text: called with the result's number and each piece of its text as it is written. An
            exception that it raises ends the call.
        changes: fields of `GenerationSettings`, such as ``out_length=100``; they come before
            ``settings``.

    Returns:
        A result for a text, a list of results in the order of ``texts`` for a list. With
        ``num_return_sequences`` always a list, in which the results of a text follow each other;
        the k-th has the seed of the text plus k, counted from 0.

    Raises:
        UsageError: a text without content, a value out of range, or a model that cannot write.
        PlugError: the model's files are damaged.
    """
    generator = model if isinstance(model, Generator) else Generator(model, tokenizer, device)
    return generator(
        texts,
        settings,
        seed=seed,
        batch_size=batch_size,
        allow_special_tokens=allow_special_tokens,
        on_text=on_text,
        **changes,
    )
