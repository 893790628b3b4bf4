"""PLUG in Python: a Chinese model that both understands and writes.

The public names are imported on first use (PEP 562), so that `import plug` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from plug.checkpoints.store import load as load
    from plug.errors import PlugError as PlugError
    from plug.errors import UsageError as UsageError
    from plug.finetuning.predict import Predictor as Predictor
    from plug.finetuning.run import finetune as finetune
    from plug.finetuning.settings import FinetuneSettings as FinetuneSettings
    from plug.generation.generate import GenerationResult as GenerationResult
    from plug.generation.generate import Generator as Generator
    from plug.generation.generate import generate as generate
    from plug.generation.pipeline import pipeline as pipeline
    from plug.integrations.transformers import (
        PlugForConditionalGeneration as PlugForConditionalGeneration,
    )
    from plug.integrations.transformers import PlugForMaskedLM as PlugForMaskedLM
    from plug.integrations.transformers import PlugForPreTraining as PlugForPreTraining
    from plug.integrations.transformers import (
        PlugForQuestionAnswering as PlugForQuestionAnswering,
    )
    from plug.integrations.transformers import (
        PlugForSequenceClassification as PlugForSequenceClassification,
    )
    from plug.integrations.transformers import (
        PlugForTokenClassification as PlugForTokenClassification,
    )
    from plug.integrations.transformers import PlugModel as PlugModel
    from plug.integrations.transformers import PlugTransformersConfig as PlugTransformersConfig
    from plug.generation.settings import GenerationSettings as GenerationSettings
    from plug.model.configuration import PRESETS as PRESETS
    from plug.model.configuration import PlugConfig as PlugConfig
    from plug.model.plug import Plug as Plug
    from plug.tokenization import PlugTokenizer as PlugTokenizer
    from plug.understanding.classify import classify as classify
    from plug.understanding.embed import embed as embed
    from plug.understanding.fill_mask import fill_mask as fill_mask
    from plug.understanding.reader import TextReader as TextReader

_HOMES = {  # public name -> the module it lives in
    "FinetuneSettings": "plug.finetuning.settings",
    "GenerationResult": "plug.generation.generate",
    "GenerationSettings": "plug.generation.settings",
    "Generator": "plug.generation.generate",
    "PRESETS": "plug.model.configuration",
    "Plug": "plug.model.plug",
    "PlugConfig": "plug.model.configuration",
    "PlugError": "plug.errors",
    "PlugForConditionalGeneration": "plug.integrations.transformers",
    "PlugForMaskedLM": "plug.integrations.transformers",
    "PlugForPreTraining": "plug.integrations.transformers",
    "PlugForQuestionAnswering": "plug.integrations.transformers",
    "PlugForSequenceClassification": "plug.integrations.transformers",
    "PlugForTokenClassification": "plug.integrations.transformers",
    "PlugModel": "plug.integrations.transformers",
    "Predictor": "plug.finetuning.predict",
    "PlugTokenizer": "plug.tokenization",
    "PlugTransformersConfig": "plug.integrations.transformers",
    "TextReader": "plug.understanding.reader",
    "UsageError": "plug.errors",
    "classify": "plug.understanding.classify",
    "embed": "plug.understanding.embed",
    "fill_mask": "plug.understanding.fill_mask",
    "finetune": "plug.finetuning.run",
    "generate": "plug.generation.generate",
    "load": "plug.checkpoints.store",
    "pipeline": "plug.generation.pipeline",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plug' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
