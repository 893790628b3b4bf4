"""`ModelRunner`: carries out the steps that a `Scheduler` plans, on the device.

It holds what a step reads and writes: tokens, positions, the key-value cache, the sampler's state
and, on CUDA, graphs. All of it are fixed buffers, so that a step can be captured once and replayed.
A `PreparedModel` is what runners share: the weights as decoding wants them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plug.device import explain_out_of_memory, has_kernels, send
from plug.distributed.fully_sharded import gathers_layers
from plug.distributed.processes import close_with_group
from plug.errors import UsageError
from plug.generation.adapter_stack import AdapterStack
from plug.generation.cpu_model import CpuModel
from plug.generation.encoder_cache import EncoderCache
from plug.generation.kv_cache import DecoderCache
from plug.generation.plain_model import PlainModel, ShardedModel
from plug.generation.sampling import Joining, Plan, Sampler, copy_rows, log_probabilities
from plug.generation.scheduler import NO_CHOICE, StepPlan
from plug.generation.sequence import Sequence as WrittenSequence
from plug.generation.sequence import TokenLogprobs
from plug.generation.settings import MAX_LOOKUP_TOKENS
from plug.loading.adapters import has_adapters
from plug.model.layers import KeyValue
from plug.model.plug import Plug

if TYPE_CHECKING:
    from plug.generation.fused_model import FusedModel


# Above this many sequences, a graph decodes a multiple of it.
ROWS_GRANULARITY = 4
# A graph of the plain model computes over lengths that are rounded up to a multiple of this.
GRAPH_GRANULARITY = 64


class PreparedModel:
    """A `Plug` ready to decode, for any number of runners in any threads.

    The weights are read once, here: later changes of the `Plug` need another `PreparedModel`.

    Args:
        model: with a decoder.
        graphs: on CUDA, capture each step that comes again as a graph. Not worth it for many texts
            of different length at once, where sequences leave at nearly every step.
        reuse_bytes: bytes of encoded sources kept for when they come again (`EncoderCache`).
        takes_adapters: adapters may be added to `adapters`, for texts that ask for them.
        stacks_weights: weights may be moved, several into one tensor (`FusedModel`). Not where they
            are also trained and saved: `transformers` would copy each that is part of another.

    Attributes:
        adapters: None where none are taken.
        lock: held while the device works for one of the runners, never while a caller's code runs.

    Raises:
        UsageError: the model is an encoder alone.
    """

    def __init__(
        self,
        model: Plug,
        *,
        graphs: bool = True,
        reuse_bytes: int = 0,
        takes_adapters: bool = False,
        stacks_weights: bool = True,
    ) -> None:
        if model.decoder is None:
            raise UsageError(
                "这个模型只有编码器（num_decoder_layers=0，预训练第一阶段的产物），不能写作。"
                "请用第二阶段（plug pretrain stage2）得到的模型。"
            )
        self.config = model.config
        self.device = model.embeddings.word_embeddings.weight.device
        self.uses_graphs = graphs and self.device.type == "cuda"
        self.adapters = AdapterStack(model) if takes_adapters else None
        granularity = GRAPH_GRANULARITY if self.uses_graphs else 1
        self.model = _prepare(model, granularity, self.adapters, stacks_weights)
        self.encoder_cache = EncoderCache(reuse_bytes)
        self.lock = threading.RLock()

    def encode(
        self, sources: Sequence[Sequence[int]], numbers: Sequence[int] = ()
    ) -> list[list[KeyValue]]:
        """Return what decoding needs of each source, as `PlainModel.encode`; to be read only."""
        if not any(numbers):
            return self.encoder_cache.encode(sources, self.model.encode)
        # An adapter makes another source of the same ids.
        numbered = [
            [-number, *ids] if number else ids for number, ids in zip(numbers, sources, strict=True)
        ]

        def encode(missing: Sequence[Sequence[int]]) -> list[list[KeyValue]]:
            return self.model.encode(
                [ids[1:] if ids[0] < 0 else ids for ids in missing],
                [max(0, -ids[0]) for ids in missing],
            )

        return self.encoder_cache.encode(numbered, encode)


def _prepare(
    model: Plug, granularity: int, adapters: AdapterStack | None, stacks_weights: bool
) -> PlainModel | FusedModel:
    if gathers_layers(model):
        return ShardedModel(model, granularity)
    words = model.embeddings.word_embeddings.weight
    is_half = words.dtype in (torch.float16, torch.bfloat16)
    if stacks_weights and has_kernels(words.device) and is_half and not has_adapters(model):
        from plug.generation.fused_model import FusedModel  # imports Triton

        return FusedModel(model, adapters)
    if CpuModel.can_run(model):
        return CpuModel(model, adapters=adapters)
    return PlainModel(model, granularity, adapters)


class Size(NamedTuple):
    """How much a runner has room for; it decides the memory of the cache.

    Attributes:
        slots: sequences at once.
        source_length: tokens of a source, with [CLS] and [SEP].
        window: steps from one encoding.
    """

    slots: int
    source_length: int
    window: int

    def holds(self, other: Size) -> bool:
        """Whether nothing of ``other`` is larger."""
        return all(own >= others for own, others in zip(self, other, strict=True))

    def joined(self, other: Size) -> Size:
        """Return the smallest size that holds both."""
        return Size(*map(max, self, other))


class ModelRunner:
    """The device's side of decoding. Used by one thread at a time.

    Sequences are numbered by their slot; a step decodes the first ones.

    Args:
        prepared: the model; other runners may use it at the same time.
        size: what the buffers have room for.

    Attributes:
        ahead: how many steps the scheduler may plan before it reads ids (`Scheduler`).
        is_intact: False after an interruption in the middle of a step: then make another runner.
        cache: keys and values; None before the first source.
    """

    def __init__(self, prepared: PreparedModel, size: Size) -> None:
        config, device = prepared.config, prepared.device
        self.prepared = prepared
        self.size = size
        self.ahead = 1 if device.type == "cuda" else 0
        self.is_intact = True
        self.cache: DecoderCache | None = None
        self._config = config
        self._sampler = Sampler(
            size.slots, config.vocab_size, config.eos_token_id, size.window, device
        )
        self._tokens = torch.zeros(size.slots, dtype=torch.long, device=device)
        self._positions = torch.zeros_like(self._tokens)
        self._encoder_seconds = 0.0
        self._encodings: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        # For each slot the number of drafted tokens, then these.
        self._drafts = self._tokens.new_zeros(size.slots, 1 + MAX_LOOKUP_TOKENS)
        # Of each slot the adapter's number; and what the host knows of them.
        self._adapters, self._numbers = torch.zeros_like(self._tokens), [0] * size.slots
        self._adapters_version = 0
        self._adapter = 0  # of all slots in step
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}
        # The graphs of a runner share their memory.
        self._pool = torch.cuda.graph_pool_handle() if prepared.uses_graphs else None
        close_with_group(self)

    def close(self) -> None:
        """Free the graphs; `close_with_group` says why. Later steps capture them again."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        if self._pool is not None:  # the memory of the old one goes with its graphs
            self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> FetchedIds:
        """Carry out ``plan``; return the chosen ids, which `FetchedIds.read` waits for.

        Raises:
            PlugError: the device has no memory left.
        """
        self.is_intact = False
        prepared, model = self.prepared, self.prepared.model
        with prepared.lock, explain_out_of_memory(prepared.device, self.size.slots):
            self._arrange(plan)
            cache = self.cache
            assert cache is not None, "the first step of a sequence has it encoded"
            adapters = self._use_adapters([each.adapter for each in plan.sequences])
            # More slots than there are sequences may be decoded, so that few graphs are needed.
            # Nobody reads what those write.
            rows = min(self._rounded(len(plan.sequences)), self.size.slots)
            choice = self._sampler.plan(plan.steps, rows, plan.drafted)
            key = self._graph_key(choice, plan.drafted, plan.length), adapters is not None
            if key in self._graphs:
                captured, chosen = self._graphs[key]
                captured.replay()
            else:
                # A new graph's step runs twice: for its result, and to be captured.
                for graph in (None, torch.cuda.CUDAGraph()) if prepared.uses_graphs else (None,):
                    with self._capture(graph):
                        if self.prepared.adapters is not None:
                            self.prepared.adapters.use(0 if adapters is None else adapters[:rows])
                        fed, positions = self._fed(rows, plan.drafted)
                        logits = model.decode(fed, positions, plan.length, cache)
                        output = self._choose(logits, choice, plan.drafted)
                    if graph is None:
                        chosen = output
                        if prepared.uses_graphs:  # the capture may use their memory
                            chosen = tuple(each.clone() for each in output)
                    else:
                        self._graphs[key] = graph, output
            fetched = FetchedIds([each[: len(plan.sequences)] for each in chosen])
        self.is_intact = True
        return fetched

    @property
    def encoder_seconds(self) -> float:
        """Seconds that encoding has taken so far; on CUDA once the device is done with it."""
        while self._encodings and self._encodings[0][1].query():
            start, end = self._encodings.popleft()
            self._encoder_seconds += start.elapsed_time(end) / 1000
        return self._encoder_seconds

    # --- the parts of a step ----------------------------------------------------------------------

    def _arrange(self, plan: StepPlan) -> None:
        """Move, join and encode, so that each slot holds the sequence that the plan has there."""
        device = self.prepared.device
        if plan.moves:
            self._sampler.move([(move.source, move.target) for move in plan.moves])
            source_slots = send([move.source for move in plan.moves], device, torch.long)
            target_slots = send([move.target for move in plan.moves], device, torch.long)
            for state in (self._tokens, self._positions):
                copy_rows(state, source_slots, target_slots)
        past = [move for move in plan.moves if move.length]  # others are filled anew
        if past:
            assert self.cache is not None, "they have a past"
            slots, into = [move.source for move in past], [move.target for move in past]
            length = max(move.length for move in past)
            self.cache.take(slots, length, sources=True, into=into)
        if plan.joined:
            self._sampler.join([self._joining(slot, plan.sequences[slot]) for slot in plan.joined])
        if plan.due:
            rows = send(plan.due, device, torch.long)
            self._tokens.index_fill_(0, rows, self._config.decoder_start_token_id)
            self._positions.index_fill_(0, rows, 0)
            windows = {slot: plan.sequences[slot].longest_window for slot in plan.due}
            self._sampler.refill(windows)
        if plan.drafted:
            filled = torch.zeros(self._drafts.shape, dtype=torch.long)
            for slot, draft in enumerate(plan.drafts):
                filled[slot, : 1 + len(draft)] = torch.tensor([len(draft), *draft])
            self._drafts.copy_(send(filled, device, torch.long))
        # Last: a copy from the host waits for the GPU, which should not wait for the host in turn.
        if plan.due:
            with self._timed():
                due = [plan.sequences[slot] for slot in plan.due]
                sources, numbers = [s.source for s in due], [s.adapter for s in due]
                self._encode(plan.due, sources, numbers)

    def _joining(self, slot: int, sequence: WrittenSequence) -> Joining:
        assert sequence.longest_window <= self.size.window, "the window exceeds the cache"
        rules = sequence.rules
        limits = rules.steps, rules.forbidden, rules.num_ids, rules.min_length
        return Joining(slot, sequence.settings, sequence.seed, *limits)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add what its block takes to `encoder_seconds`."""
        if self.prepared.device.type == "cuda":  # which the host does not wait for
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._encodings.append(events)
        else:
            began = time.perf_counter()
            yield
            self._encoder_seconds += time.perf_counter() - began

    def _use_adapters(self, numbers: list[int]) -> Tensor | None:
        """Return the numbers of all slots, on the device; None where the first ones are all 0."""
        adapters = self.prepared.adapters
        if adapters is None:
            return None
        if adapters.version != self._adapters_version:
            self.close()  # the graphs hold the matrices of before
            self._adapters_version = adapters.version
        if not any(numbers):
            return None
        numbers = numbers + [0] * (self.size.slots - len(numbers))
        if numbers != self._numbers:
            self._adapters.copy_(send(numbers, self.prepared.device, torch.long))
            self._numbers = numbers
        return self._adapters

    def _encode(
        self, slots: Sequence[int], sources: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> None:
        """Encode sources, ids with [CLS] and [SEP], for these slots, whose past is dropped."""
        encoded = self.prepared.encode(sources, numbers)
        if self.cache is None:  # made here, where the heads of this process are known
            self.cache = DecoderCache(
                encoded[0][0][0],
                layers=len(encoded[0]),
                rows=self.size.slots,
                source_length=self.size.source_length,
                capacity=self.size.window,
            )
            self.prepared.model.expect(self.size.slots)
        self.cache.put_sources(slots, encoded)

    def _rounded(self, rows: int) -> int:
        """How many slots to decode for ``rows``: on CUDA few numbers, since each has its graphs."""
        if not self.prepared.uses_graphs or rows <= ROWS_GRANULARITY:
            return rows
        return -(-rows // ROWS_GRANULARITY) * ROWS_GRANULARITY

    def _graph_key(self, choice: Plan, drafted: int, length: int) -> Hashable:
        """All that the shapes of a step depend on."""
        granularity = self.prepared.model.granularity
        if not self.prepared.uses_graphs:
            return None
        if granularity is None:  # lengths are read on the device
            return choice, drafted
        assert self.cache is not None, "encode comes first"
        source_length = self.cache.encoder_view(choice.rows, granularity)[0][0][0].shape[2]
        return choice, drafted, -(-length // granularity), source_length

    def _capture(self, graph: torch.cuda.CUDAGraph | None) -> torch.cuda.graph | nullcontext[None]:
        if graph is None:
            return nullcontext()
        # Other threads, such as NCCL's watchdog, may use the device meanwhile.
        return torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")

    def _fed(self, rows: int, drafted: int) -> tuple[Tensor, Tensor]:
        """Return the tokens to feed and their positions, (rows, 1 + drafted) each."""
        tokens, positions = self._tokens[:rows, None], self._positions[:rows, None]
        if not drafted:
            return tokens, positions
        counts, drafts = self._drafts[:rows].split([1, MAX_LOOKUP_TOKENS], 1)
        # A sequence with a shorter draft feeds its last token again, at the same position.
        ahead = torch.arange(1 + drafted, device=tokens.device).clamp(max=counts)
        return torch.cat([tokens, drafts], 1).gather(1, ahead), positions + ahead

    def _choose(self, logits: Tensor, choice: Plan, drafted: int) -> tuple[Tensor, ...]:
        """Choose from logits (rows, 1 + drafted, vocab); make the buffers ready for the next step.

        Returns:
            Ids (rows, 1 + drafted), perhaps fewer columns on a CPU. Columns hold one choice after
            another while the last one was the draft's, then `NO_CHOICE`. Where a sequence asks for
            them, the two parts of `LogProbabilities` follow, (rows, columns, 1 + count) each.
        """
        if not drafted:
            chosen = self._sampler.choose(logits[:, 0], choice)
            self._keep(chosen, None, choice)
            return self._with_logprobs(chosen[:, None], logits, choice)
        counts, drafts = self._drafts[: choice.rows].split([1, MAX_LOOKUP_TOKENS], 1)
        counted = torch.ones(choice.rows, dtype=torch.bool, device=logits.device)
        found = []
        for index in range(1 + drafted):
            chosen = self._sampler.choose(logits[:, index], choice, counted)
            found.append(torch.where(counted, chosen, NO_CHOICE))
            shown, kept = self._keep(chosen, counted, choice)
            if index < drafted:
                is_right = (shown == drafts[:, index]) & (index < counts[:, 0])
                counted = kept & is_right
                if counted.device.type == "cpu" and not counted.any():  # a GPU is not waited for
                    break
        return self._with_logprobs(torch.stack(found, 1), logits, choice)

    @staticmethod
    def _with_logprobs(ids: Tensor, logits: Tensor, choice: Plan) -> tuple[Tensor, ...]:
        if choice.logprobs is None:
            return (ids,)
        columns = [
            log_probabilities(logits[:, index], ids[:, index], choice.logprobs)
            for index in range(ids.shape[1])
        ]
        return ids, *(torch.stack(parts, 1) for parts in zip(*columns, strict=True))

    def _keep(self, chosen: Tensor, counted: Tensor | None, choice: Plan) -> tuple[Tensor, Tensor]:
        """Do on the device what `Rules.accept` does on the host, for the next step.

        An id of a padding row of the word table becomes [UNK]. [SEP] and `NO_TOKEN` are not
        written: where they do not end the text, the step comes again.

        Args:
            chosen: (rows,).
            counted: bool (rows,), whose choice counts; None is everyone's.
            choice: of the step.

        Returns:
            The ids written, and bool (rows,): where one is written.
        """
        end, emitted = self._config.eos_token_id, self._config.num_emitted_tokens
        unknown, last = self._config.unk_token_id, self.size.window - 1
        tokens, positions = self._tokens[: choice.rows], self._positions[: choice.rows]
        if has_kernels(chosen.device):
            from plug.kernels import sampling as kernels

            shown, kept = kernels.keep(
                chosen, counted, tokens, positions,
                end=end, num_emitted=emitted, unknown=unknown, last=last,
            )  # fmt: skip
        else:
            kept = (chosen != end) & (chosen >= 0)
            kept = kept if counted is None else counted & kept
            shown = chosen.masked_fill(chosen >= emitted, unknown)
            tokens.copy_(torch.where(kept, shown, tokens))
            positions.add_(kept).clamp_(max=last)  # slots that nobody reads go on and on
        self._sampler.record(shown, kept, choice)
        return shown, kept

    # --- all slots in step, for beams -------------------------------------------------------------

    @torch.inference_mode()
    def start(self, sources: Sequence[Sequence[int]], copies: int = 1, adapter: int = 0) -> None:
        """Encode sources, ids with [CLS] and [SEP], for the first slots.

        Args:
            sources: of the texts.
            copies: slots for each source, one after the other.
            adapter: number of the one that all slots use, until the next start.
        """
        self._adapter = adapter
        with self.prepared.lock:
            self._encode(range(len(sources)), sources, [adapter] * len(sources))
            if copies > 1:
                slots = [slot for slot in range(len(sources)) for _ in range(copies)]
                self.reorder(slots, 0, sources=True)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Feed one token to each of the first slots; logits of the next, (rows, vocab) in float32.

        Feeding the same token at the same position again changes nothing and gives the same.

        Args:
            token_ids: one a slot.
            positions: where each stands in its window, from 0.
        """
        prepared = self.prepared
        assert self.cache is not None, "call start first"
        with prepared.lock:
            fed, where = (
                send(values, prepared.device, torch.long)[:, None]
                for values in (token_ids, positions)
            )
            if prepared.adapters is not None:
                prepared.adapters.use(self._adapter)
            return prepared.model.decode(fed, where, max(positions) + 1, self.cache)[:, 0]

    @torch.inference_mode()
    def reorder(self, slots: Sequence[int], length: int, *, sources: bool) -> None:
        """Have slot i go on from where slot ``slots[i]`` was, in the first ``length`` positions.

        Args:
            slots: may repeat.
            length: positions that hold something.
            sources: the source comes along; beams of one text leave theirs where it is.
        """
        assert self.cache is not None, "call start first"
        with self.prepared.lock:
            self.cache.take(slots, length, sources=sources)


class FetchedIds:
    """Ids on their way to the host; a `plug.generation.scheduler.TokenIds`.

    Args:
        chosen: as `ModelRunner._choose` returns them.
    """

    def __init__(self, chosen: Sequence[Tensor]) -> None:
        self._on_cuda = chosen[0].device.type == "cuda"
        self._chosen = list(chosen)
        if self._on_cuda:
            self._chosen = [
                torch.empty_like(each, device="cpu", pin_memory=True).copy_(each, non_blocking=True)
                for each in chosen
            ]
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[list[int]]:
        if self._on_cuda:
            self._arrived.synchronize()
        return self._chosen[0].tolist()

    def logprobs(self) -> list[list[TokenLogprobs]] | None:
        if len(self._chosen) == 1:
            return None
        if self._on_cuda:
            self._arrived.synchronize()
        _, values, ids = (each.tolist() for each in self._chosen)
        return [
            [
                TokenLogprobs(of_place[0], tuple(zip(ids_of_place[1:], of_place[1:], strict=True)))
                for of_place, ids_of_place in zip(of_row, ids_of_row, strict=True)
            ]
            for of_row, ids_of_row in zip(values, ids, strict=True)
        ]
