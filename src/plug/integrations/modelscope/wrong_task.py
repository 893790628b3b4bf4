"""Every task of ours under the names of the others, to say why it cannot be done."""

from __future__ import annotations

from typing import Any

from modelscope.pipelines.base import Pipeline
from modelscope.pipelines.builder import PIPELINES

from plug.errors import UsageError
from plug.integrations.modelscope import NAMES, TASKS


class PlugWrongTask(Pipeline):
    """What ModelScope makes where a directory's pipeline cannot do the task that is asked."""

    group_key: str  # set by ModelScope: the task

    def __init__(self, model: Any, **_options: Any) -> None:
        raise UsageError(
            f"模型 {model} 不能做 {self.group_key}：它没有为此微调过。"
            "请用 plug finetune 微调，或换成它的任务（见它的 configuration.json）。"
        )


for _name, _tasks in NAMES.items():
    for _task in TASKS:
        if _task not in _tasks:
            PIPELINES.register_module(_task, _name, PlugWrongTask, force=True)
