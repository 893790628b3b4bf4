"""`pipeline`: a callable with a loaded model, in the manner of `transformers`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from plug.errors import UsageError
from plug.generation.generator import Generator
from plug.generation.settings import GenerationSettings
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

TASKS = ("text-generation",)


class TextGenerationPipeline:
    """Continues texts: ``pipe("…", out_length=100)`` gives ``[{"generated_text": "…"}]``."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __call__(
        self,
        texts: str | Iterable[str],
        settings: GenerationSettings | None = None,
        **options: Any,
    ) -> list[dict[str, str]]:
        """Return one dict for each result, in order.

        "generated_text" is the continuation without the prompt.

        Args:
            texts: one or more.
            settings: as in `plug.generate`.
            options: those of `plug.generate`, but for model, tokenizer and device.
        """
        listed = [texts] if isinstance(texts, str) else texts
        results = self.generator(listed, settings, **options)
        return [{"generated_text": result.text} for result in results]


def pipeline(
    task: str,
    model: str | Path | Plug | None = None,
    tokenizer: PlugTokenizer | None = None,
    device: str | None = None,
) -> TextGenerationPipeline:
    """Load a model once, for many calls from any number of threads.

    Args:
        task: "text-generation".
        model: as in `plug.generate`.
        tokenizer: as in `plug.generate`.
        device: as in `plug.generate`.

    Raises:
        UsageError: another task, or as in `plug.generate`.
    """
    if task not in TASKS:
        raise UsageError(f"没有任务 {task!r}。可用：{'、'.join(TASKS)}。")
    return TextGenerationPipeline(Generator(model, tokenizer, device))
