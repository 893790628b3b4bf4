"""What our pipelines have in common: a directory found, inputs checked, answers in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from modelscope.msdatasets import MsDataset
from modelscope.pipelines.base import Pipeline
from modelscope.utils.config import Config

from plug.checkpoints.directory import find_model_directory, is_original
from plug.checkpoints.hub import CONFIGURATION_FILE
from plug.checkpoints.original_cache import converted
from plug.errors import PlugError, UsageError
from plug.progress import byte_counter

_OF_THE_ORIGINAL = {  # arguments of its pipeline that have no meaning on one device
    "trust_remote_code", "master_ip", "master_port", "first_sequence", "sequence_length",
    "auto_collate",
}  # fmt: skip


class PlugPipeline(Pipeline):
    """A pipeline over a directory of ours, or an original's, which is converted once.

    A call takes an input and the options that are ``known``.

    Args:
        model: the directory.
        device: "cpu", "cuda:1", …; ModelScope's "gpu" is CUDA where there is one, else the CPU.
        preprocessor: must be None: texts are read by the directory's own tokenizer.
        options: none but those that the original took and that one device has no use for.

    Raises:
        UsageError: no such directory, or an argument that makes no sense here.
        PlugError: its files are damaged.
    """

    known: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, model: Any, device: str = "gpu", preprocessor: Any = None, **options: Any
    ) -> None:
        # Not the constructor of `Pipeline`: it would build the model from ModelScope's registry.
        if preprocessor is not None:
            raise UsageError("PLUG 自带分词器，不能另给 preprocessor。请去掉它。")
        if unknown := sorted(options.keys() - _OF_THE_ORIGINAL):
            raise UsageError(f"PLUG 的 pipeline 没有参数 {'、'.join(unknown)}。请去掉它。")
        self.model_dir, self.directory = find_directories(model)
        self.cfg = read_configuration(self.model_dir)
        self.device_name = device
        self.model = None
        self.models: list[Any] = []  # the model card empties it
        self.has_multiple_models = False
        self.preprocessor = None
        self.framework = "pytorch"

    def __call__(self, input: Any, **options: Any) -> Any:
        """The answer to an input, those to a list in its order, or an iterator over a dataset's.

        Raises:
            UsageError: an input or option makes no sense.
        """
        if unknown := sorted(options.keys() - self.known):
            raise UsageError(
                f"没有参数 {'、'.join(unknown)}。可用：{'、'.join(sorted(self.known)) or '无'}。"
            )
        if isinstance(input, MsDataset):
            return self._each(input, options)
        listed = isinstance(input, list)
        inputs = input if listed else [input]
        for number, each in enumerate(inputs, start=1):
            self.check(each, f"第 {number} 个输入" if listed else "输入")
        answers = self.answer(inputs, options)
        return answers if listed else answers[0]

    def _each(self, inputs: MsDataset, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for each in inputs:
            yield self(each, **options)

    def check(self, each: Any, place: str) -> None:
        """Raise `UsageError` where an input is no text."""
        if not isinstance(each, str):
            raise UsageError(f"{place}应是文字（str），却是 {type(each).__name__}。")

    def answer(self, inputs: list[Any], options: dict[str, Any]) -> list[Any]:
        """An answer to each of the inputs; those and the options' names are checked."""
        raise NotImplementedError


def find_directories(model: Any) -> tuple[Path, Path]:
    """A model's directory as it was given, and the one of ours to load.

    They differ for an original's, which is converted on first use.
    """
    if not isinstance(model, str | Path):
        raise UsageError(f"model 应是模型的目录或编号，却是 {type(model).__name__}。")
    given = Path(model)
    if is_original(given):
        return given, converted(given, lambda: byte_counter("转换"))
    if (given / "vocab.txt").is_file() and not any(given.glob("*.safetensors")):
        raise UsageError(
            f"{given} 里没有权重。原版的 mp_rank_NN_model_states.pt 要另外取得，"
            f"放进 {given / 'model'}。"
        )
    directory = find_model_directory(given)
    return directory, directory


def read_configuration(directory: Path) -> Config:
    """A directory's `configuration.json`; an empty one where there is none.

    Raises:
        PlugError: it is damaged.
    """
    path = directory / CONFIGURATION_FILE
    if not path.is_file():
        return Config({})
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlugError(f"{path} 不是有效的 JSON：{error}。") from None
    if not isinstance(values, dict):
        raise PlugError(f"{path} 应是一个 JSON 对象。")
    return Config(values)


def device_of(name: str) -> str | None:
    """ModelScope's name of a device as ours."""
    if name == "gpu":
        return None
    return name.replace("gpu", "cuda", 1) if name.startswith("gpu") else name
