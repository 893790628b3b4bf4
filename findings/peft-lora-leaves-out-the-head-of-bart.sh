#!/usr/bin/env bash
# Expected: LoraConfig(task_type="SEQ_CLS") trains the head of a classifier besides the adapter and saves it with the adapter, as it does for
#   BERT (PeftModelForSequenceClassification is there for nothing else); a loaded adapter gives what the trained model gave.
# Happens (peft 0.21.2, transformers 5.24.0): heads are looked for by two names, "classifier" and "score". That of BART, mBART and T5 (all
#   encoder-decoders of transformers that classify) is called "classification_head": it stays as it was initialised, is not in the
#   adapter's file, and nothing is said, not even when the adapter is loaded onto a base with another random head. BERT is right.
#   modules_to_save=["classification_head"] is what was meant.
# Hurts: whoever fine-tunes a Chinese BART, CPT or mT5 to classify. Training works, since the adapter learns to fit the random head, and
#   the score looks well; the saved adapter, loaded in another process, guesses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.24.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import peft
import torch
import transformers
from safetensors import safe_open
from transformers import BartConfig, BartForSequenceClassification, BartModel, BertConfig, BertForSequenceClassification, BertModel
from transformers import T5Config, T5ForSequenceClassification, T5Model

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
bart = BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
                  encoder_ffn_dim=37, decoder_ffn_dim=37, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=3)
t5 = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
              eos_token_id=2, num_labels=3)
bert = BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=37,
                  hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)

# The class of an example is its first token: something that is learnt at once.
generator = torch.Generator().manual_seed(0)
labels = torch.randint(0, 3, (60,), generator=generator)
input_ids = torch.randint(10, 99, (60, 8), generator=generator)
input_ids[:, 0], input_ids[:, -1] = labels + 3, 2


@torch.no_grad()
def accuracy(model):
    return float((model.eval()(input_ids=input_ids).logits.argmax(-1) == labels).float().mean())


def trained_and_loaded(name, model_class, base_class, config, targets, **options):
    """Accuracy after training, in another process's place after loading, and the names that the adapter's head has in its file."""
    torch.manual_seed(0)
    base_class(config).save_pretrained(f"{name}-base")
    model = peft.get_peft_model(model_class.from_pretrained(f"{name}-base", config=config),
                                peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=16, lora_alpha=64, **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        model.train()(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(f"{name}-adapter")
    with safe_open(f"{name}-adapter/adapter_model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if "lora_" not in key]
    torch.manual_seed(1)  # a new process
    base = model_class.from_pretrained(f"{name}-base", config=config)
    loaded = peft.PeftModel.from_pretrained(base, f"{name}-adapter")
    result = accuracy(model), accuracy(loaded), heads
    print(f"{name}: accuracy {result[0]:.2f} after training, {result[1]:.2f} when loaded; besides the adapter its file has", heads)
    return result


print("peft", peft.__version__, "transformers", transformers.__version__)
of_bart = trained_and_loaded("bart", BartForSequenceClassification, BartModel, bart, r".*(encoder|decoder)\.layers.*(_proj|fc1|fc2)")
of_t5 = trained_and_loaded("t5", T5ForSequenceClassification, T5Model, t5, r".*block.*\.(q|k|v|o|wi|wo)")
of_bert = trained_and_loaded("bert", BertForSequenceClassification, BertModel, bert, ["query", "key", "value", "dense"])
meant = trained_and_loaded("bart, as meant", BartForSequenceClassification, BartModel, bart,
                           r".*(encoder|decoder)\.layers.*(_proj|fc1|fc2)", modules_to_save=["classification_head"])
for trained, loaded, heads in (of_bart, of_t5):
    assert trained > 0.9 and loaded < 0.8 and heads == [], "it changed"
for trained, loaded, heads in (of_bert, meant):
    assert trained > 0.9 and loaded == trained and heads, "it changed"
P
