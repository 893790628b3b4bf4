#!/usr/bin/env bash
# Expected: a model for question answering in peft's class for it gives what the model alone gives, as long as the adapter is new
#   (its second matrix is zero): PeftModelForQuestionAnswering.forward has a parameter `token_type_ids`.
# Happens (peft 0.21.2): the parameter is accepted and not handed on. Question and text have the same token type; outputs are those
#   without token types. PeftModelForSequenceClassification hands them on.
# Hurts: whoever fine-tunes BERT and the like to answer questions with LoRA. Nothing says so; scores are just lower, and adapters that
#   were trained so are used in another way wherever token types arrive.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.17.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import peft
import torch
import transformers
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

torch.manual_seed(0)
config = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
input_ids = torch.randint(1, 99, (1, 8))
token_type_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])


@torch.no_grad()
def differences(model_class, task_type, output):
    """How far peft's outputs with token types are from the model's own, with and without them."""
    model = model_class(config).eval()
    with_types = getattr(model(input_ids=input_ids, token_type_ids=token_type_ids), output)
    without = getattr(model(input_ids=input_ids), output)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, target_modules=["query"])).eval()
    found = getattr(adapted(input_ids=input_ids, token_type_ids=token_type_ids), output)
    return float((found - with_types).abs().max()), float((found - without).abs().max())


answering = differences(BertForQuestionAnswering, "QUESTION_ANS", "start_logits")
classifying = differences(BertForSequenceClassification, "SEQ_CLS", "logits")
print("peft", peft.__version__, "transformers", transformers.__version__)
print("question answering: %.4f from the model with token types, %.4f from it without" % answering)
print("classification:     %.4f from the model with token types, %.4f from it without" % classifying)
assert answering[0] > 0.01 and answering[1] == 0, "it changed"
assert classifying[0] == 0 and classifying[1] > 0, "it changed"
P
