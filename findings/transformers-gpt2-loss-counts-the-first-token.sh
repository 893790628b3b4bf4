#!/usr/bin/env bash
# Expected: Trainer.evaluate() gives a GPT-2 the loss that the model itself gives for the same batch: the mean over the tokens that are
#   predicted. A text of n tokens has n - 1 of them, and the Trainer knows it: it counts labels[..., 1:] for causal models.
# Happens (transformers 5.24.0): it knows them by the class's name, which has to contain "ForCausalLM". GPT2LMHeadModel, OpenAIGPTLMHeadModel and
#   BertLMHeadModel have the same loss (self.loss_function) and another name: the sum over n - 1 tokens is divided by n. eval_loss and
#   the logged loss (the gradient too) are (n - 1) / n of the right ones, and less the shorter the texts: 4.03 for 4.60, which is a
#   perplexity of 56 for 100. LlamaForCausalLM is right, and so is the same GPT-2 in a class that is called ForCausalLM.
#   https://github.com/huggingface/transformers/pull/46204 (which mended it for the others)
# Hurts: whoever trains or scores Chinese GPT-2s (gpt2-chinese-cluecorpussmall, Wenzhong, CDial-GPT) on poems, couplets and dialogues of
#   ten or twenty tokens: exp(eval_loss) is 10% to 40% too low, flatters GPT-2 against other models, and depends on how texts are cut.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import math

import torch
import transformers
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel, Trainer, TrainingArguments

transformers.logging.set_verbosity(transformers.logging.CRITICAL)


class GPT2ForCausalLM(GPT2LMHeadModel):
    """The same model; only the name differs."""


gpt2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4)
configs = {
    GPT2LMHeadModel: gpt2,
    GPT2ForCausalLM: gpt2,
    OpenAIGPTLMHeadModel: OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4),
    BertLMHeadModel: BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37, is_decoder=True),
    LlamaForCausalLM: LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4),
}


@torch.no_grad()
def losses(model_class, length):
    """The model's own loss of 16 texts of this many tokens, and the Trainer's."""
    torch.manual_seed(0)
    model = model_class(configs[model_class]).eval()
    ids = torch.randint(3, 99, (16, length))
    arguments = TrainingArguments("run", per_device_eval_batch_size=16, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.remove_callback(transformers.PrinterCallback)
    return float(model(input_ids=ids, labels=ids).loss), trainer.evaluate()["eval_loss"]


print("transformers", transformers.__version__)
for model_class in configs:
    for length in (8, 32):
        own, evaluated = losses(model_class, length)
        print(f"{model_class.__name__}, {length} tokens: loss {own:.4f}, eval_loss {evaluated:.4f}, {evaluated / own:.4f} of it; "
              f"perplexity {math.exp(own):.0f}, exp(eval_loss) {math.exp(evaluated):.0f}")
        expected = 1 if model_class.__name__.endswith("ForCausalLM") else (length - 1) / length
        assert abs(evaluated / own - expected) < 1e-4, "it changed"
P
