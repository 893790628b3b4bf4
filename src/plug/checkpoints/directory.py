"""Model directories as files: find one, and write its configs.

A directory holds `config.json`, `generation_config.json`, `model*.safetensors` and tokenizer
files; `transformers` loads it too. `plug.loading` turns one into a model and back. The original's
checkpoints are in `original.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plug.checkpoints.hub import write_pretrained_configuration
from plug.errors import UsageError
from plug.files import about_windows_path, recover, write_json
from plug.model.configuration import PlugConfig, read_config_file
from plug.shipped import SHIPPED_DIRECTORY, SHIPPED_MODEL
from plug.tokenization import PlugTokenizer

if TYPE_CHECKING:  # commands look for the model before they import torch
    import torch
    from torch import nn

    from plug.checkpoints.weights import TensorSpec

CONFIG_FILE = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
RUN_FILE = "finetuning.json"  # of a fine-tuned model or adapter: its task, settings, labels


def find_model_directory(name_or_path: str | Path | None = None) -> Path:
    """The directory of a model: None or "plug-mini-zh" is the one that ships with the package.

    Raises:
        UsageError: there is no such directory, it is empty, or it holds something else.
    """
    if name_or_path is None or str(name_or_path) == SHIPPED_MODEL:
        directory = SHIPPED_DIRECTORY
        if not directory.is_dir():
            raise UsageError(
                f"安装包里没有随附的模型 {SHIPPED_MODEL}。请重新安装 plug-zh，或用目录指定模型。"
            )
    else:
        directory = Path(name_or_path).expanduser()
        recover(directory)
    if not directory.exists():
        raise UsageError(
            f"找不到模型 {name_or_path}：它不是目录，也不是随附模型的名字 {SHIPPED_MODEL}。"
            f"{about_windows_path(directory)}"
        )
    if not directory.is_dir():
        raise UsageError(f"模型 {directory} 应是目录，却是文件。请给出它所在的目录。")
    if not any(directory.iterdir()):
        raise UsageError(f"模型目录 {directory} 是空的。请检查路径，或重新取得模型。")
    if is_original(directory):
        raise UsageError(
            f"{directory} 是原版 PLUG 的权重。请先转换：plug convert --from {directory} --to 新目录"
        )
    if not (directory / CONFIG_FILE).is_file():
        if (directory / ADAPTER_CONFIG).is_file():
            raise UsageError(
                f"{directory} 是 LoRA 适配器，不是模型。请用 --adapter {directory}，"
                f"或先合并：plug merge --adapter {directory} --to 新目录"
            )
        raise UsageError(f"{directory} 里没有 {CONFIG_FILE}，不是 PLUG 模型目录。")
    PlugConfig.from_file(directory / CONFIG_FILE)
    return directory


def is_original(directory: Path) -> bool:
    """Whether it holds the original's shards."""
    return any(directory.glob("model/mp_rank_*_model_states.pt"))


def refuse_quantized(directory: Path) -> None:
    """Raise a `UsageError` where a directory's weights are integers, and floats are needed."""
    if read_config_file(directory / CONFIG_FILE).get("quantization") is not None:
        raise UsageError(f"{directory} 是量化过的，只能用来写作和评测。请改用量化之前的模型。")


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a model directory must hold."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_configs(
    directory: Path,
    config: PlugConfig,
    specs: dict[str, TensorSpec],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json`, ModelScope's `configuration.json` and the defaults of generation.

    Args:
        directory: exists.
        config: of the model.
        specs: of its tensors; the floating dtype with the most bytes is named in `config.json`.
        quantization: what `config.json` says of quantised layers; None where there are none.
    """
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] += spec.num_bytes
    bookkeeping: dict[str, Any] = {
        "model_type": "plug",
        "architectures": ["PlugForPreTraining"],
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "dtype": str(sizes.most_common(1)[0][0]).removeprefix("torch."),
    }
    if quantization is not None:
        bookkeeping["quantization"] = quantization
    write_json(directory / CONFIG_FILE, bookkeeping | config.to_dict())
    if config.num_decoder_layers:
        write_json(directory / "generation_config.json", generation_config(config))
    write_pretrained_configuration(directory, config)


def generation_config(config: PlugConfig) -> dict[str, Any]:
    """The content of `generation_config.json`, which `generate` of transformers begins with.

    It names ids alone, so that `generate` and `Seq2SeqTrainer` search and stop as they do with
    BART. The sampling of `plug generate` is in `GenerationSettings`.
    """
    return {
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def load_tokenizer(directory: Path) -> PlugTokenizer:
    """Return the tokenizer of a model directory.

    Raises:
        UsageError: there is none, or it is not the one of the directory's model.
    """
    tokenizer = PlugTokenizer.load(directory)
    check_tokenizer(tokenizer, PlugConfig.from_file(directory / CONFIG_FILE), directory)
    return tokenizer


def check_tokenizer(tokenizer: PlugTokenizer, config: PlugConfig, source: object) -> None:
    """Raise a `UsageError` unless a tokenizer has the ids that a model's config says."""
    found = (
        tokenizer.vocab_size,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.mask_token_id,
    )
    wanted = (
        config.num_emitted_tokens,
        config.pad_token_id,
        config.unk_token_id,
        config.decoder_start_token_id,
        config.eos_token_id,
        config.mask_token_id,
    )
    if found != wanted:
        raise UsageError(
            f"{source} 的分词器与模型不配：词数和 [PAD] [UNK] [CLS] [SEP] [MASK] 的编号是"
            f" {list(found)}，config.json 写的是 {list(wanted)}。"
            "请用模型原来的分词器和 config.json。"
        )
