"""A directory as ModelScope's hub expects it: all of `configuration.json`, and a model card.

Needs no `modelscope`; `plug.integrations.modelscope` is what its pipelines and trainer run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from plug.checkpoints.directory import (
    CONFIG_FILE,
    RUN_FILE,
    find_model_directory,
    is_original,
)
from plug.checkpoints.headers import read_places
from plug.checkpoints.hub import CONFIGURATION_FILE
from plug.checkpoints.original import OriginalReader, Progress, write_imported
from plug.checkpoints.weights import check_finite, map_tensors
from plug.errors import PlugError, UsageError
from plug.files import new_directory, refuse_used, write_json, write_text
from plug.finetuning.settings import FinetuneSettings
from plug.jsonfiles import read_json
from plug.model.configuration import PlugConfig

CARD_FILE = "README.md"
ORIGINAL_TRAINING = {  # of the released 27B, whose learning rate would teach a small model little
    "epochs": 5,
    "batch_size": 32,
    "learning_rate": 1e-5,
    "warmup_fraction": 0.01,
}
SOURCE_LENGTH, TARGET_LENGTH = 384, 30  # tokens, [CLS] and [SEP] counted; the original's
EVAL_BATCH_SIZE = 32
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config.json",
    CONFIGURATION_FILE,
    "tokenizer.json",
    RUN_FILE,
    "README.md",
    "LICENSE*",
)


def training_sections(config: PlugConfig) -> dict[str, Any]:
    """What `configuration.json` says of training, in ModelScope's keys: the trainer's defaults.

    Source: the released 27B's file, for models that were imported; else `FinetuneSettings`.
    """
    defaults = FinetuneSettings(task="generation", train="", eval="", output="").to_dict()
    if config.encoder_final_norm_passes == 2:
        defaults |= ORIGINAL_TRAINING
    longest = config.max_position_embeddings
    return {
        "preprocessor": {
            "type": "text-gen-tokenizer",
            "first_sequence": "src_txt",
            "second_sequence": "tgt_txt",
            "sequence_length": min(SOURCE_LENGTH, longest),
            "target_max_length": min(TARGET_LENGTH, longest),
        },
        "train": {
            "work_dir": "./work_dir",
            "max_epochs": defaults["epochs"],
            "dataloader": {"batch_size_per_gpu": defaults["batch_size"]},
            "optimizer": {
                "lr": defaults["learning_rate"],
                "weight_decay": defaults["weight_decay"],
            },
            "lr_scheduler": {"warmup": defaults["warmup_fraction"]},
            "clip_grad": defaults["clip_grad_norm"],
        },
        "evaluation": {"dataloader": {"batch_size_per_gpu": EVAL_BATCH_SIZE}},
    }


def write_hub_directory(
    source: str | Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda _done, _total: None,
) -> list[str]:
    """A copy of a model for ModelScope's hub, or an original's checkpoint converted for it.

    Args:
        source: a name or directory as `plug.load` takes it, or an original's directory.
        target: is not there yet, or empty; filled only when all goes well.
        dtype: of all weights; for an original alone.
        progress: told bytes done and in all.

    Returns:
        What the user should know, in Chinese, a sentence each.

    Raises:
        UsageError: no such model, one that ModelScope has no task for, or ``target`` is in use.
        PlugError: files are damaged, or the disk is full.
    """
    refuse_used(target)
    notes: list[str] = []
    if is_original(Path(source)):
        original = OriginalReader(Path(source))
        with new_directory(target) as temporary:
            notes = write_imported(original, temporary, dtype=dtype, progress=progress)
            _complete(temporary, Path(source).resolve().name)
    elif dtype is not None:
        raise UsageError("--dtype 只用于原版的权重；本项目的模型照原样写入。请去掉它。")
    else:
        directory = find_model_directory(source)
        _check_configuration(directory)
        with new_directory(target) as temporary:
            _copy(directory, temporary, progress)
            _complete(temporary, directory.resolve().name)
    if "license:" not in (target / CARD_FILE).read_text(encoding="utf-8"):
        notes.append(f"{target / CARD_FILE} 没有写许可证（license:）。请在上传前补上。")
    return notes


def _check_configuration(directory: Path) -> None:
    if not (directory / CONFIGURATION_FILE).is_file():
        raise UsageError(
            f"{directory} 里没有 {CONFIGURATION_FILE}：ModelScope 没有这个模型的任务（阅读理解），"
            "或它是旧版本写的。请用 plug predict，或重新生成它。"
        )


def _copy(source: Path, target: Path, progress: Progress) -> None:
    """The files that make the model; not those of its run, which may quote the user's data.

    Raises:
        PlugError: the weights are damaged, NaN or infinite.
    """
    check_finite(source, map_tensors(read_places(source)))
    files = sorted({path for pattern in MODEL_FILES for path in source.glob(pattern)})
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        shutil.copyfile(path, target / path.name)
        done += path.stat().st_size
        progress(done, total)
    if (run := target / RUN_FILE).is_file():
        content = read_json(run)
        try:
            for name in ("train", "eval", "output", "model"):  # paths of the machine it ran on
                content["settings"][name] = Path(content["settings"][name]).name
        except (KeyError, TypeError):
            raise PlugError(f"{source / RUN_FILE} 已损坏。请重新微调。") from None
        write_json(run, content)


def _complete(directory: Path, name: str) -> None:
    """Add what training needs to `configuration.json`, and a model card's head to `README.md`."""
    path = directory / CONFIGURATION_FILE
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(task := content.get("task"), str):
        raise PlugError(f"{path} 没有写明任务（task）。请重新转换或微调。")
    config = PlugConfig.from_file(directory / CONFIG_FILE)
    if task == "text-generation":
        missing = training_sections(config)
        content |= {name: missing[name] for name in missing if name not in content}
    write_json(path, content)
    card = directory / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else _CARD.format(name=name)
    head, body = _split_head(text)
    known = {line.partition(":")[0] for line in head}
    added = _HEAD.format(task=task).splitlines()
    head = [line for line in added if line.partition(":")[0] not in known] + head
    write_text(card, "\n".join(["---", *head, "---", body]))


def _split_head(text: str) -> tuple[list[str], str]:
    """The lines between the first two `---`, and all that follows."""
    lines = text.splitlines()
    if lines[:1] == ["---"] and "---" in lines[1:]:
        end = lines.index("---", 1)
        return lines[1:end], "\n".join(lines[end + 1 :]) + "\n"
    return [], "\n" + text


_HEAD = """\
tasks: [{task}]
domain: [nlp]
language: [zh]
frameworks: [pytorch]
"""
_CARD = """\
# {name}

PLUG 模型，由 `plug convert --to-modelscope` 写成。

```python
import plug.integrations.modelscope  # pip install "plug-zh[modelscope]"
from modelscope.pipelines import pipeline

pipe = pipeline("text-generation", model="模型的目录或编号")
print(pipe("段誉轻挥折扇，摇了摇头，说道：", out_length=256))
```

"""
