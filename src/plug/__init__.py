"""PLUG in Python: a Chinese model that both understands and writes.

The public names are imported on first use (PEP 562), so that `import plug` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from plug.errors import PlugError as PlugError
    from plug.errors import UsageError as UsageError
    from plug.finetuning.predict import Predictor as Predictor
    from plug.finetuning.run import finetune as finetune
    from plug.finetuning.settings import FinetuneSettings as FinetuneSettings
    from plug.generation.async_engine import AsyncEngine as AsyncEngine
    from plug.generation.generator import Generator as Generator
    from plug.generation.generator import generate as generate
    from plug.generation.pipeline import pipeline as pipeline
    from plug.generation.result import GenerationResult as GenerationResult
    from plug.generation.settings import GenerationSettings as GenerationSettings
    from plug.hf import (
        PlugForConditionalGeneration as PlugForConditionalGeneration,
    )
    from plug.hf import PlugForMaskedLM as PlugForMaskedLM
    from plug.hf import PlugForPreTraining as PlugForPreTraining
    from plug.hf import (
        PlugForQuestionAnswering as PlugForQuestionAnswering,
    )
    from plug.hf import (
        PlugForSequenceClassification as PlugForSequenceClassification,
    )
    from plug.hf import (
        PlugForTokenClassification as PlugForTokenClassification,
    )
    from plug.hf import PlugModel as PlugModel
    from plug.hf import PlugTransformersConfig as PlugTransformersConfig
    from plug.loading.load import load as load
    from plug.model.configuration import PRESETS as PRESETS
    from plug.model.configuration import PlugConfig as PlugConfig
    from plug.model.plug import Plug as Plug
    from plug.tokenization import PlugTokenizer as PlugTokenizer
    from plug.zero_shot.classify import classify as classify
    from plug.zero_shot.embed import embed as embed
    from plug.zero_shot.encoder import TextEncoder as TextEncoder
    from plug.zero_shot.fill_mask import fill_mask as fill_mask

_HOMES = {  # public name -> the module it lives in
    "AsyncEngine": "plug.generation.async_engine",
    "FinetuneSettings": "plug.finetuning.settings",
    "GenerationResult": "plug.generation.result",
    "GenerationSettings": "plug.generation.settings",
    "Generator": "plug.generation.generator",
    "PRESETS": "plug.model.configuration",
    "Plug": "plug.model.plug",
    "PlugConfig": "plug.model.configuration",
    "PlugError": "plug.errors",
    "PlugForConditionalGeneration": "plug.hf",
    "PlugForMaskedLM": "plug.hf",
    "PlugForPreTraining": "plug.hf",
    "PlugForQuestionAnswering": "plug.hf",
    "PlugForSequenceClassification": "plug.hf",
    "PlugForTokenClassification": "plug.hf",
    "PlugModel": "plug.hf",
    "Predictor": "plug.finetuning.predict",
    "PlugTokenizer": "plug.tokenization",
    "PlugTransformersConfig": "plug.hf",
    "TextEncoder": "plug.zero_shot.encoder",
    "UsageError": "plug.errors",
    "classify": "plug.zero_shot.classify",
    "embed": "plug.zero_shot.embed",
    "fill_mask": "plug.zero_shot.fill_mask",
    "finetune": "plug.finetuning.run",
    "generate": "plug.generation.generator",
    "load": "plug.loading.load",
    "pipeline": "plug.generation.pipeline",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plug' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
