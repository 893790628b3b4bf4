"""Models that write: a lively random one, the golden one; and a runner that follows a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from plug.checkpoints.original import import_original
from plug.generation.generator import Generator
from plug.generation.model_runner import ModelRunner, PreparedModel, Size
from plug.generation.scheduler import Scheduler, StepPlan
from plug.generation.sequence import Sequence as SequenceOfIds
from plug.generation.window import prompt_limit
from plug.loading.load import load
from plug.model.configuration import PlugConfig
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer


@pytest.fixture
def lively_model(config: PlugConfig, lively: Callable[[PlugConfig], Plug]) -> Plug:
    return lively(config)


@pytest.fixture
def generator(lively_model: Plug, tiny_tokenizer: PlugTokenizer) -> Generator:
    return Generator(lively_model, tiny_tokenizer)


@pytest.fixture(scope="session")
def original_tokenizer(shared_data: Path) -> PlugTokenizer:
    return PlugTokenizer.from_vocabulary_file(shared_data / "vocab" / "bert-chinese-vocab.txt")


@pytest.fixture(scope="session")
def golden_model(small_golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Plug:
    """The original's tiny model from its float16 weights; it writes the same greedily."""
    return _imported(small_golden / "checkpoints" / "mp2-fp16", tmp_path_factory)


@pytest.fixture(scope="session")
def golden_prepared(golden_model: Plug) -> PreparedModel:
    return PreparedModel(golden_model)


@pytest.fixture(scope="session")
def exact_golden_prepared(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    """The same from the float32 weights of ../shared, which its beams were computed with."""
    return PreparedModel(_imported(golden / "checkpoints" / "mp2", tmp_path_factory))


def _imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Plug:
    directory = tmp_path_factory.mktemp("plug-tiny") / "model"
    import_original(source, directory)
    return load(directory)


@pytest.fixture(scope="session")
def golden_json(small_golden: Path) -> Callable[[str], Any]:
    """Reads a file of `tests/golden/plug-tiny`."""
    return lambda name: json.loads((small_golden / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def scripted_runner() -> type[ScriptedRunner]:
    return ScriptedRunner


Script = Sequence[int]


class ScriptedRunner:
    """Takes the device's place: a sequence's i-th step chooses the i-th id of its script.

    Scripts are given for each sequence, or in the order in which sequences join. Drafts are
    checked as a device checks them. What plans say is compared with what the slots contain.
    """

    def __init__(
        self, scripts: Sequence[Script] | dict[SequenceOfIds, Script], ahead: int = 0
    ) -> None:
        self.ahead = ahead
        self.scripts = dict(scripts) if isinstance(scripts, dict) else {}
        self.slots: dict[int, SequenceOfIds] = {}
        self.plans: list[StepPlan] = []
        self.windows: list[list[list[int]]] = []  # the sources of each encoding
        self.window_first_step: list[int] = []
        self._left = [] if isinstance(scripts, dict) else list(scripts)

    def step(self, plan: StepPlan) -> ScriptedIds:
        before = dict(self.slots)
        for move in plan.moves:
            self.slots[move.target] = before[move.source]
        for slot in plan.joined:
            self.slots[slot] = plan.sequences[slot]
            if self._left:
                self.scripts[plan.sequences[slot]] = self._left.pop(0)
        for slot, sequence in enumerate(plan.sequences):
            assert self.slots[slot] is sequence
            assert sequence.steps_in_window <= plan.length
        if plan.due:
            self.windows.append([list(plan.sequences[slot].source) for slot in plan.due])
            self.window_first_step.append(len(self.plans))
        self.plans.append(plan)
        return ScriptedIds(
            [
                self._chosen(self.scripts[sequence][at:], draft)
                for sequence, at, draft in zip(plan.sequences, plan.steps, plan.drafts, strict=True)
            ]
        )

    @staticmethod
    def _chosen(script: Sequence[int], draft: Sequence[int]) -> list[int]:
        right = 0
        while right < len(draft) and draft[right] == script[right]:
            right += 1
        return [*script[: right + 1], *[-1] * (len(draft) - right)]


@dataclass(frozen=True)
class ScriptedIds:
    ids: list[list[int]]

    def read(self) -> list[list[int]]:
        return self.ids

    def logprobs(self) -> None:
        return None


@pytest.fixture(scope="session")
def write() -> Callable[..., None]:
    return write_all


def write_all(
    runner: Any, sequences: Sequence[SequenceOfIds], slots: int = 0, ahead: int | None = None
) -> None:
    """Write all; at most ``slots`` at once, the next joining where one leaves.

    Args:
        runner: a runner, or a `PreparedModel` that gets one with enough room.
        sequences: new ones.
        slots: 0 is as many as there are sequences.
        ahead: as in `Scheduler`; None is the runner's.
    """
    slots = slots or len(sequences)
    if isinstance(runner, PreparedModel):
        limit = prompt_limit(runner.config) + 2
        runner = ModelRunner(runner, Size(slots, limit, max(s.longest_window for s in sequences)))
    scheduler = Scheduler(slots, ahead=runner.ahead if ahead is None else ahead)
    waiting = list(sequences)
    while waiting or scheduler.running:
        while waiting and not scheduler.is_full:
            scheduler.join(waiting.pop(0))
        scheduler.update(runner.step(scheduler.plan()))
