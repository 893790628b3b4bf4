"""A fine-tuned model at work: predictions for texts and files, scores for files with answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from plug.checkpoints.directory import CONFIG_FILE, RUN_FILE, find_model_directory, load_tokenizer
from plug.device import find_device
from plug.errors import PlugError, UsageError
from plug.files import write_text
from plug.finetuning.kind import Kind, OnProgress, make_kind
from plug.finetuning.plain import load_plain
from plug.finetuning.settings import FinetuneSettings
from plug.finetuning.tasks import find_task, read_examples
from plug.jsonfiles import read_json, shown
from plug.loading.adapters import is_adapter
from plug.model.configuration import PlugConfig
from plug.shipped import SHIPPED_MODEL
from plug.textfiles import Notes, is_text, plain_suffix, read_lines, trim
from plug.traditional import as_read

TEXT_SUFFIX = ".txt"


class Predictor:
    """A model that `plug finetune` made, loaded.

    Args:
        directory: of the model, or of an adapter whose model is where it was in training; None
            with ``adapter`` is that model too.
        device: "cpu", "cuda", …; None is CUDA where there is one.
        num_beams: for generation, in place of the run's own.
        adapter: directory that `plug finetune --memory lora` (or `qlora`) wrote.

    Raises:
        UsageError: no such directory, or a model that was not fine-tuned.
    """

    def __init__(
        self,
        directory: str | Path | None,
        device: str | None = None,
        num_beams: int | None = None,
        *,
        adapter: str | Path | None = None,
    ) -> None:
        if directory is None and adapter is None:
            raise UsageError("请给出模型的目录（--model）或适配器的目录（--adapter）。")
        if adapter is None and directory is not None and is_adapter(directory):
            directory, adapter = None, directory
        added = None if adapter is None else Path(adapter).expanduser()
        if directory is None:
            assert added is not None
            directory = base_of(added)
        self.directory = find_model_directory(directory)
        self.task_name = read_run(added or self.directory)["settings"]["task"]
        self.task = find_task(self.task_name)
        self.kind = kind_of(self.directory, num_beams, added)
        self.model = load_plain(self.kind, self.directory, find_device(device), added)

    def __call__(
        self,
        examples: Sequence[Any],
        *,
        batch_size: int = 32,
        on_progress: OnProgress | None = None,
    ) -> list[Any]:
        """A prediction for each example, as `read` gives them.

        Raises:
            UsageError: they are texts.
        """
        if any(isinstance(each, str) for each in examples):
            raise UsageError("这里要的是 read(…) 读出的例子。文字请用 predict_text(…)，一次一段。")
        return self.kind.predict(
            self.model, examples, batch_size=batch_size, on_progress=on_progress
        )

    def predict_text(self, *parts: str) -> dict[str, Any]:
        """What a user typed (two parts for a pair, a question and its context) and the answer."""
        example = self.kind.example(parts)
        return self.kind.record(example, self([example])[0])

    def read(self, path: Path, *, simplify: bool = False) -> list[Any]:
        """Examples of a file to predict: the task's format, or `.txt`, one text a line.

        In `.txt` a line is taken as it stands, and tabs separate the parts of an example. Empty
        lines give no example; each example knows its line, and so does its record.

        Args:
            path: of the file.
            simplify: convert traditional characters of a `.txt` file (`plug.traditional`).

        Raises:
            UsageError: nothing to read, or ``simplify`` with a format whose positions would move.
        """
        if plain_suffix(path) != TEXT_SUFFIX:
            if simplify:
                raise UsageError(
                    f"--simplify 只用于命令行上的文字和 .txt 文件；{path} 请先用 opencc 转换。"
                )
            return read_examples(self.task, path, answered=False)
        notes, examples = Notes(), []
        for number, line in read_lines(path, notes):
            place = f"{path} 第 {number} 行"
            if not trim(line):
                notes.add("空行没有结果", place)
                continue
            try:
                example = self.kind.example(as_read(line, simplify).split("\t"))
            except UsageError as error:
                raise UsageError(f"{place}：{error}") from None
            examples.append(replace(example, place=place, line=number))
        if not examples:
            raise UsageError(f"{path} 里没有文字。请一行写一段。")
        notes.log()
        return examples


def kind_of(
    directory: Path, num_beams: int | None = None, adapter: Path | None = None
) -> Kind[Any, Any]:
    """What a fine-tuned model reads and writes, without the model; arguments as in `Predictor`.

    Raises:
        PlugError: `finetuning.json` does not fit `config.json`.
    """
    run = read_run(adapter or directory)
    settings = _settings_of(run)
    config = read_json(directory / CONFIG_FILE)
    named = config.get("id2label") if isinstance(config, dict) else None
    if (
        adapter is None
        and run["labels"]
        and named != {str(i): label for i, label in enumerate(run["labels"])}
    ):
        raise PlugError(
            f"{directory} 里 {RUN_FILE} 的 labels 与 {CONFIG_FILE} 的 id2label 不同。"
            "请重新微调，或从备份恢复。"
        )
    try:
        settings.check_lengths(
            PlugConfig.from_file(directory / CONFIG_FILE).max_position_embeddings
        )
    except UsageError as error:
        raise PlugError(
            f"{adapter or directory} 里的 {RUN_FILE} 与模型 {directory} 不符：{error}"
            "请重新微调，或从备份恢复。"
        ) from None
    return make_kind(
        find_task(settings.task).kind,
        load_tokenizer(directory),
        run["labels"],
        run["label_names"],
        source_length=settings.source_length,
        target_length=settings.target_length,
        num_beams=num_beams or settings.num_beams,
        pairs=run.get("pairs"),
        tag_scheme=run.get("tag_scheme"),
    )


def base_of(adapter: Path) -> str:
    """Return the model that an adapter of `plug finetune` was trained on, as it was named then.

    Raises:
        UsageError: peft alone wrote the adapter.
    """
    if is_adapter(adapter) and not (adapter / RUN_FILE).is_file():
        raise UsageError(f"{adapter} 没有写明它适配的模型。请用 --model 指定。")
    return read_run(adapter)["settings"].get("model", SHIPPED_MODEL)


def read_run(directory: Path) -> dict[str, Any]:
    """`finetuning.json` of a directory.

    Raises:
        UsageError: there is none.
        PlugError: it is damaged.
    """
    path = directory / RUN_FILE
    if not path.is_file():
        raise UsageError(
            f"{directory} 不是微调过的模型（没有 {RUN_FILE}）。请先运行 plug finetune。"
        )
    run = read_json(path)
    if problem := _problem(run):
        raise PlugError(f"{path} 已损坏：{problem}。请重新微调，或从备份恢复。")
    return run


_NEEDED = ("task", "source_length", "target_length", "num_beams")  # to predict


def _settings_of(run: dict[str, Any]) -> FinetuneSettings:
    return FinetuneSettings(**{"train": "", "eval": "", "output": ""} | run["settings"])


def _is_kept(saved: Any, read: Any) -> bool:
    """Whether a setting is read as it was saved; a table may have got options since then."""
    if isinstance(saved, dict) and isinstance(read, dict):
        return bool(read | saved == read)
    return bool(saved == read)


def _problem(run: Any) -> str:
    """What is wrong with the content of `finetuning.json`; "" if nothing is."""
    if not isinstance(run, dict):
        return "不是一个 JSON 对象"
    settings, labels, names = run.get("settings"), run.get("labels"), run.get("label_names")
    if not isinstance(settings, dict) or not settings.keys() >= set(_NEEDED):
        return f"settings 里应有 {'、'.join(_NEEDED)}"
    if unknown := settings.keys() - {field.name for field in fields(FinetuneSettings)}:
        return f"settings 里多出 {shown(sorted(unknown))}"
    try:
        read = _settings_of(run)
    except UsageError as error:
        return str(error).rstrip("。")
    kept = read.to_dict()
    if changed := [name for name, value in settings.items() if not _is_kept(value, kept[name])]:
        return f"settings 里的 {changed[0]}={shown(settings[changed[0]])} 不是训练时的值"
    if not isinstance(labels, list) or not all(is_text(each) and each for each in labels):
        return f"labels 应是文字的列表，却是 {shown(labels)}"
    task = find_task(read.task)
    has_labels = task.kind in ("classification", "labelling")
    if len(set(labels)) < len(labels) or bool(labels) != has_labels:
        return f"labels 有重复，或与任务 {read.task} 不符"
    if task.labels and tuple(labels) != task.labels:
        return f"labels 不是任务 {read.task} 的标签"
    if not isinstance(names, dict) or not all(
        name in labels and is_text(words) for name, words in names.items()
    ):
        return f"label_names 应是各标签的名字，却是 {shown(names)}"
    if type(processes := run.get("processes", 1)) is not int or processes < 1:
        return f"processes 应是进程数，却是 {shown(processes)}"
    if not isinstance(run.get("pairs"), (bool, type(None))):
        return f"pairs 应是 true、false 或 null，却是 {shown(run.get('pairs'))}"
    return ""


def prediction_line(kind: Kind[Any, Any], example: Any, prediction: Any) -> str:
    """A prediction as one line of JSON; of a `.txt` file with the number of its line."""
    line = {} if example.line is None else {"line": example.line}
    return json.dumps(line | kind.record(example, prediction), ensure_ascii=False)


def write_predictions(
    path: Path, kind: Kind[Any, Any], examples: Sequence[Any], predictions: Sequence[Any]
) -> None:
    """One JSON object a line.

    Raises:
        PlugError: the file cannot be written.
    """
    lines = [
        prediction_line(kind, example, prediction) + "\n"
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    write_text(path, "".join(lines))
