"""`build_trainer(Trainers.nlp_plug_trainer, …)`: the original's way to fine-tune, by `finetune`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from modelscope.hub.snapshot_download import snapshot_download
from modelscope.trainers.base import BaseTrainer
from modelscope.trainers.builder import TRAINERS
from modelscope.utils.config import Config

from plug.checkpoints.directory import CONFIG_FILE, load_tokenizer
from plug.device import find_device
from plug.errors import PlugError, UsageError
from plug.files import write_text
from plug.finetuning.kind import make_kind
from plug.finetuning.plain import load_plain
from plug.finetuning.readers import read_generation
from plug.finetuning.run import finetune
from plug.finetuning.settings import FinetuneSettings
from plug.generation.settings import WINDOW
from plug.integrations.modelscope.base import device_of, find_directories, read_configuration
from plug.integrations.modelscope_hub import training_sections
from plug.loading.adapters import is_adapter
from plug.model.configuration import PlugConfig

logger = logging.getLogger(__name__)

NUM_BEAMS = 5  # of the original's evaluation; its other settings are `GenerationSettings`' own
OUTPUT = "output"  # ModelScope's name for the folder of the model in a work_dir
DATA = "plug_data"  # beside it: the datasets as they are read
READ = {  # what is read of the configuration, and the option of `FinetuneSettings` that it is
    "train.max_epochs": "epochs",
    "train.dataloader.batch_size_per_gpu": "batch_size",
    "train.optimizer.lr": "learning_rate",
    "train.optimizer.weight_decay": "weight_decay",
    "train.lr_scheduler.warmup": "warmup_fraction",
    "train.clip_grad": "clip_grad_norm",
    "train.memory": "memory",
    "preprocessor.sequence_length": "source_length",
    "evaluation.dataloader.batch_size_per_gpu": "eval_batch_size",
}
PARALLEL = {  # and of `ParallelSettings`
    "train.sharding": "sharding",
    "train.deepspeed": "deepspeed",
}
READ_TOO = {
    *PARALLEL,
    "train.work_dir",
    "preprocessor.first_sequence",
    "preprocessor.second_sequence",
    "preprocessor.target_max_length",
}


@TRAINERS.register_module(module_name="nlp-plug-trainer", force=True)
class PlugTrainer(BaseTrainer):
    """Fine-tunes a model on pairs of texts; the result, in ``work_dir``/output, is a model.

    Where the device has too little memory to train every weight, or the model is quantised, LoRA
    adapters are trained and ``work_dir``/output holds these alone: `train.memory` of the
    configuration ("auto", "full", "lora", "qlora") decides, as `plug finetune --memory` does.

    Args:
        model: a model's directory, an original's too, or its id on ModelScope.
        train_dataset: rows with `src_txt` and `tgt_txt`: of `datasets`, an `MsDataset`, or any
            iterable of dicts. `[SEP]` in `src_txt` separates parts.
        eval_dataset: rows that choose the best epoch.
        work_dir: where everything goes; under a launcher, that of the first process.
        cfg_file: a `configuration.json` in place of the model's.
        cfg_modify_fn: given the configuration, returns it changed.
        model_revision: of an id.
        max_epochs: in place of the configuration's.
        seed: of the run.
        device: "cpu", "gpu", …; None is CUDA where there is one.
        launcher: "pytorch" or None; processes are counted by the launcher's variables either way.
        options: none are known; `trust_remote_code` has no meaning here.

    Raises:
        UsageError: a model, dataset, option or work_dir makes no sense.
    """

    def __init__(
        self,
        model: str,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        work_dir: str | None = None,
        cfg_file: str | None = None,
        cfg_modify_fn: Callable[[Config], Config] | None = None,
        model_revision: str | None = None,
        max_epochs: float | None = None,
        seed: int = 42,
        device: str | None = None,
        launcher: str | None = None,
        **options: Any,
    ) -> None:
        # Not the constructor of `BaseTrainer`: it needs a file, and knows no defaults.
        if unknown := sorted(options.keys() - {"trust_remote_code"}):
            raise UsageError(f"PLUG 的训练器没有参数 {'、'.join(unknown)}。请去掉它。")
        if launcher not in (None, "pytorch"):
            raise UsageError(f"launcher={launcher!r} 只能是 'pytorch' 或 None。")
        if isinstance(model, str) and not Path(model).exists():
            model = snapshot_download(model, revision=model_revision)
        self.model_dir, self.directory = find_directories(model)
        self.device = None if device is None else device_of(device)
        self.cfg = self._configuration(cfg_file, cfg_modify_fn)
        if max_epochs is not None:
            self.cfg.train.max_epochs = max_epochs
        self.seed = seed
        self.datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self.tokenizer = load_tokenizer(self.directory)
        chosen = find_device(self.device)
        with _for_deepspeed(self.cfg.safe_get("train.deepspeed")):
            self.processes = PartialState(cpu=chosen.type == "cpu")
        # The model card gives each process a work_dir of its own. All must have one.
        [self.work_dir] = broadcast_object_list([str(work_dir or self.cfg.train.work_dir)])

    @property
    def output(self) -> Path:
        """The directory of the model that is trained."""
        return Path(self.work_dir) / OUTPUT

    def train(self, *, resume: bool = False) -> dict[str, float]:
        """Fine-tune; the weights of the best epoch end up in ``work_dir``/output.

        Args:
            resume: go on with the run that was interrupted in the same work_dir.

        Returns:
            Metrics on ``eval_dataset``.

        Raises:
            UsageError: the datasets or ``work_dir`` make no sense; nothing was trained.
            PlugError: the disk is full.
        """
        self._check_output(resume)
        rows = {name: self._rows(name) for name in self.datasets}
        settings = self._settings()
        rows["train_dataset"] = self._cut(rows["train_dataset"])
        for name, pairs in rows.items():
            self._write(self._file(name), pairs, kept=resume)
        result = finetune(settings, device=self.device, resume=resume)
        if self.processes.is_main_process:
            if is_adapter(self.output):
                logger.warning(
                    "训练完成，LoRA 适配器在 %s。要合并成一个模型：plug merge --model %s"
                    " --adapter %s --to 新目录。",
                    self.output, self.directory, self.output,
                )  # fmt: skip
            else:
                logger.warning("训练完成，模型在 %s。", self.output)
        return result.metrics

    def evaluate(self, checkpoint_path: str | None = None) -> dict[str, float]:
        """Metrics on ``eval_dataset`` by the original's beam search.

        Args:
            checkpoint_path: of a model, or of an adapter of the trainer's model; None is the one
                trained here, or before that the base.

        Raises:
            UsageError: the dataset or the path make no sense.
        """
        tuned = self.output if checkpoint_path is None else Path(checkpoint_path)
        directory, adapter = self.directory, None
        if is_adapter(tuned):
            adapter = tuned
        elif checkpoint_path is not None or (tuned / CONFIG_FILE).is_file():
            directory = find_directories(str(tuned))[1]
        self._write(path := self._file("eval_dataset"), self._rows("eval_dataset"))
        settings = self._settings()
        kind = make_kind(
            "generation",
            load_tokenizer(directory),
            source_length=settings.source_length,
            target_length=settings.target_length,
            num_beams=settings.num_beams,
        )
        model = load_plain(kind, directory, find_device(self.device), adapter)
        examples = list(read_generation(path))
        predictions = kind.predict(model, examples, batch_size=settings.eval_batch_size)
        return kind.evaluate(examples, predictions).metrics

    def _configuration(self, file: str | None, modify: Callable[[Config], Config] | None) -> Config:
        """The model's configuration, defaults where it says nothing, changed by the user."""
        if file is not None and not Path(file).is_file():
            raise UsageError(f"找不到 cfg_file {file}。")
        cfg = Config.from_file(file) if file else read_configuration(self.model_dir)
        self.config = PlugConfig.from_file(self.directory / CONFIG_FILE)
        cfg.merge_from_dict(dict(_flat(training_sections(self.config))), force=False)
        if modify is None:
            return cfg
        before = dict(_flat(cfg))
        cfg = modify(cfg)
        if not isinstance(cfg, Config):
            raise UsageError("cfg_modify_fn 应返回改过的 cfg。请在它的末尾写 return cfg。")
        after = dict(_flat(cfg))
        changed = {name for name in before.keys() | after.keys()
                   if before.get(name) != after.get(name)}  # fmt: skip
        if unread := sorted(changed - READ.keys() - READ_TOO):
            logger.warning("cfg_modify_fn 对 %s 的改动没有用到。", "、".join(unread))
        return cfg

    def _settings(self) -> FinetuneSettings:
        values = {name: self.cfg.safe_get(key) for key, name in READ.items()}
        parallel = {name: self.cfg.safe_get(key) for key, name in PARALLEL.items()}
        values["parallel"] = {name: value for name, value in parallel.items() if value}
        values["memory"] = values["memory"] or "auto"
        return FinetuneSettings(
            task="generation",
            train=str(self._file("train_dataset")),
            eval=str(self._file("eval_dataset")),
            output=str(self.output),
            model=str(self.directory),
            target_length=min(WINDOW["plug"], self.config.max_position_embeddings),
            num_beams=NUM_BEAMS,
            seed=self.seed,
            **values,
        )

    def _file(self, dataset: str) -> Path:
        return Path(self.work_dir) / DATA / f"{dataset}.jsonl"

    def _check_output(self, resume: bool) -> None:
        if not self.processes.is_main_process:
            return
        if (self.output / CONFIG_FILE).is_file() or is_adapter(self.output):
            raise UsageError(f"{self.output} 里已有训练好的模型，不会覆盖。请换一个 work_dir。")
        unfinished = self.output.is_dir() and any(self.output.iterdir())
        if resume and not unfinished:
            raise UsageError(f"{self.work_dir} 里没有可以接着进行的训练。请去掉 resume=True。")
        if unfinished and not resume:
            raise UsageError(
                f"{self.output} 里有一次没有完成的训练。"
                "请用 trainer.train(resume=True) 接着进行，或换一个 work_dir。"
            )

    def _rows(self, name: str) -> list[dict[str, str]]:
        """A dataset's pairs, checked.

        Raises:
            UsageError: there is none, a row has not both columns, or a column is no text.
        """
        dataset = self.datasets[name]
        if dataset is None:
            raise UsageError(f"没有给 {name}。请给有 src_txt 和 tgt_txt 两列的数据集。")
        columns = {
            "src_txt": self.cfg.preprocessor.first_sequence,
            "tgt_txt": self.cfg.preprocessor.second_sequence,
        }
        rows = []
        for number, row in enumerate(dataset, start=1):
            place = f"{name} 第 {number} 条"
            if not isinstance(row, dict):
                raise UsageError(
                    f"{place}应有 {'、'.join(columns.values())} 两列，却是 {row!r}。"
                    "如果数据集分成 train、validation 等，请给其中的一份。"
                )
            for column in columns.values():
                if not isinstance(text := row.get(column), str) or not text.strip():
                    raise UsageError(
                        f"{place}的“{column}”应是文字，却是 {text!r}；有的列是 {sorted(row)}。"
                    )
            rows.append({ours: row[theirs] for ours, theirs in columns.items()})
        if not rows:
            raise UsageError(f"{name} 是空的。")
        return rows

    def _write(self, path: Path, rows: list[dict[str, str]], *, kept: bool = False) -> None:
        """Rows as JSON lines, for all processes; one writes, the others wait for it.

        With ``kept`` they must be there already.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            if kept and path.read_text(encoding="utf-8") != text:
                raise UsageError(
                    f"数据与中断的训练不同（那时的在 {path}）。请用原来的，或换 work_dir。"
                )
            if self.processes.is_main_process:
                write_text(path, text)
        except OSError as error:
            raise PlugError(f"没能写入 {path}：{error.strerror or error}。") from error
        self.processes.wait_for_everyone()

    def _cut(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        """Targets longer than the original reads lose their end, as they do there."""
        longest = self.cfg.preprocessor.target_max_length
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 3:
            raise UsageError(f"preprocessor.target_max_length={longest!r} 应是不小于 3 的整数。")
        rows, count = deepcopy(rows), 0
        for row in rows:
            ids, offsets = self.tokenizer.encode_with_offsets(row["tgt_txt"])
            if len(ids) > longest - 2:  # [CLS] and [SEP] are counted
                row["tgt_txt"] = row["tgt_txt"][: offsets[longest - 3][1]]
                count += 1
        if count and self.processes.is_main_process:
            logger.warning(
                "train_dataset 有 %d 条的目标长过 target_max_length=%d 个词元，截去了末尾。",
                count, longest,
            )  # fmt: skip
        return rows


@contextmanager
def _for_deepspeed(configuration: str | None) -> Iterator[None]:
    """Have Accelerate, which asks once and early, know that DeepSpeed will train."""
    if configuration:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        yield
    finally:
        if configuration:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` as ``("a.b", 1)``."""
    for name, value in dict(values.items()).items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
