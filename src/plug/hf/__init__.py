"""The classes that users of `transformers` expect, over the modules of `plug.model`.

They hold the same modules as `plug.Plug` under the same parameter names and own no mathematics:
`PlugParts` has that. A directory saved by either face loads in the other. Importing this package
registers the Auto classes; the names can also be imported from `plug`.
"""

from __future__ import annotations

from plug.errors import PlugError, install

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
    )
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise PlugError(f"要用 transformers，但它没有安装。请运行：{install('train')}") from None

from plug.hf.base import PlugPreTrainedModel
from plug.hf.config import PlugTransformersConfig
from plug.hf.seq2seq import (
    PlugForConditionalGeneration,
    PlugForPreTraining,
    PlugForPreTrainingOutput,
    PlugModel,
)
from plug.hf.tokenizer import PlugTokenizerFast
from plug.hf.understanding import (
    PlugForMaskedLM,
    PlugForQuestionAnswering,
    PlugForSequenceClassification,
    PlugForTokenClassification,
)
from plug.model.heads import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "PlugForConditionalGeneration",
    "PlugForMaskedLM",
    "PlugForPreTraining",
    "PlugForPreTrainingOutput",
    "PlugForQuestionAnswering",
    "PlugForSequenceClassification",
    "PlugForTokenClassification",
    "PlugModel",
    "PlugPreTrainedModel",
    "PlugTokenizerFast",
    "PlugTransformersConfig",
]

AutoConfig.register("plug", PlugTransformersConfig, exist_ok=True)
AutoTokenizer.register(
    PlugTransformersConfig, fast_tokenizer_class=PlugTokenizerFast, exist_ok=True
)
for _auto, _model in (
    (AutoModel, PlugModel),
    (AutoModelForPreTraining, PlugForPreTraining),
    (AutoModelForSeq2SeqLM, PlugForConditionalGeneration),
    (AutoModelForMaskedLM, PlugForMaskedLM),
    (AutoModelForSequenceClassification, PlugForSequenceClassification),
    (AutoModelForTokenClassification, PlugForTokenClassification),
    (AutoModelForQuestionAnswering, PlugForQuestionAnswering),
):
    _auto.register(PlugTransformersConfig, _model, exist_ok=True)
