"""ModelScope's pipelines and trainer, done by this package. Importing it switches it on.

ModelScope finds a pipeline or trainer by name in an index of its own modules, and imports the
module that the index names. Two of its names are PLUG's, and lead to code that needs 8 GPUs and a
private package; this module makes them, and new names, lead to the modules beside it. Nothing
else of ModelScope is changed but the messages for a model that it cannot find.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plug.checkpoints.directory import CONFIG_FILE, find_model_directory
from plug.checkpoints.hub import CONFIGURATION_FILE
from plug.errors import PlugError, UsageError, install
from plug.shipped import SHIPPED_MODEL

TESTED = "1.40.2"  # the version of modelscope that the tests ran with

NAMES = {  # of a pipeline, as `configuration.json` has it -> ModelScope's tasks that it does
    "plug-generation": ("text-generation", "fill-mask"),
    "plug-text-classification": ("text-classification", "sentence-similarity", "nli"),
    "plug-token-classification": ("token-classification", "named-entity-recognition"),
}
TASKS = [task for tasks in NAMES.values() for task in tasks]
BUILT_IN = [  # names that are PLUG's in ModelScope
    ("PIPELINES", "text-generation", "plug-generation"),
    ("TRAINERS", "default", "nlp-plug-trainer"),
]


def _modules() -> dict[tuple[str, str, str], str]:
    """Registry, group and name -> the module that registers it."""
    modules = {
        ("PIPELINES", task, name): "understanding" if task in tasks else "wrong_task"
        for name, tasks in NAMES.items()
        for task in TASKS
    }
    modules |= dict(zip(BUILT_IN, ("generation", "trainer"), strict=True))
    return {key: f"{__name__}.{module}" for key, module in modules.items()}


def switch_on() -> None:
    """Make ModelScope's names lead here; again and again does no harm.

    Raises:
        UsageError: ModelScope, or something that its pipelines need, is not installed.
        PlugError: it has changed, and works in another way than the version tested.
    """
    try:
        import modelscope.pipelines.builder
        import modelscope.trainers.builder
        from modelscope.utils.ast_utils import INDEX_KEY, MODULE_KEY
        from modelscope.utils.import_utils import LazyImportModule
    except ModuleNotFoundError as error:
        raise UsageError(
            f"要和 ModelScope 一起用，缺少 {error.name}。请安装：{install('modelscope')}"
        ) from error
    except ImportError as error:
        raise _changed(str(error)) from error
    try:
        index = LazyImportModule.get_ast_index()[INDEX_KEY]
        missing = [key for key in BUILT_IN if key not in index]
        builders = (modelscope.pipelines.builder, modelscope.trainers.builder)
        finders = [builder.is_official_hub_path for builder in builders]
    except (AttributeError, KeyError, TypeError) as error:
        raise _changed(repr(error)) from error
    if missing:
        raise _changed(f"索引里没有 {missing}")
    for key, module in _modules().items():
        index[key] = {MODULE_KEY: module}
    for builder, find in zip(builders, finders, strict=True):
        if not hasattr(find, "__wrapped__"):
            builder.is_official_hub_path = _explained(find)


def _changed(what: str) -> PlugError:
    from importlib.metadata import version

    return PlugError(
        f"modelscope {version('modelscope')} 的内部与 plug-zh 测试过的 {TESTED} 不同（{what}）。"
        f"请安装测试过的版本：pip install modelscope=={TESTED}"
    )


def _explained(find: Callable[..., bool]) -> Callable[..., bool]:
    """ModelScope's check of a model's path or id, with messages that say what to do."""

    @functools.wraps(find)
    def is_official_hub_path(path: Any, *args: Any, **kwargs: Any) -> bool:
        if isinstance(path, str):
            _check_local(path)
        try:
            return find(path, *args, **kwargs)
        except ValueError as error:
            raise UsageError(
                f"{path} 不是这台机器上的目录，ModelScope 也取不到这个编号的模型：{error}。"
                "请检查拼写和网络，或给出本机的目录。"
            ) from error

    return is_official_hub_path


def _check_local(path: str) -> None:
    """Raise a `PlugError` where a path has no directory, or one that ModelScope cannot read."""
    directory = Path(path)
    if directory.is_file():
        raise UsageError(f"模型 {path} 应是目录，却是文件。请给出它所在的目录。")
    if not directory.exists():
        if path == SHIPPED_MODEL:
            raise UsageError(f"ModelScope 只认目录。{path} 的目录是 {find_model_directory()}。")
        if directory.is_absolute() or path.count("/") != 1:
            raise UsageError(f"找不到模型目录 {path}，它也不是“拥有者/名字”样的编号。请检查路径。")
        return
    file = directory / CONFIGURATION_FILE
    if file.is_file():
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlugError(f"{file} 不是有效的 JSON：{error}。请重新生成它。") from None
    elif not (directory / CONFIG_FILE).is_file():
        raise UsageError(f"{path} 里没有 {CONFIGURATION_FILE}，不是模型目录。请检查路径。")
    elif '"plug"' in (directory / CONFIG_FILE).read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{path} 里没有 {CONFIGURATION_FILE}，ModelScope 认不出它（旧版本写的，或 ModelScope "
            "没有它的任务，如阅读理解）。请重新生成它，或直接用 plug generate、plug predict。"
        )


switch_on()
