#!/usr/bin/env bash
# Expected: Trainer.predict(dataset) gives the prediction of example i in row i, as the examples of transformers take it when they write a test
#   file. train_sampling_strategy="group_by_length" is documented as "the sampler to use for the training dataloader".
# Happens (transformers 5.24.0): that argument also orders evaluation and prediction: rows come grouped by length, the longest first,
#   in an order drawn from the seed, in the Seq2SeqTrainer too. `label_ids` are in the same order, so that every metric is right;
#   PredictionOutput does not say which row is whose, and nothing is printed. It came in for speed, without a word on predict():
#   https://github.com/huggingface/transformers/pull/33514. A Trainer with train_sampling_strategy="random" gives the rows in order.
# Hurts: whoever trains with groups of like lengths, as sequence-to-sequence recipes do, and then writes predictions beside the texts: a test
#   set to hand in (CLUE), labels for distillation, an analysis of errors. Every line has another text's prediction, in a file of the right
#   length, while the score on the development set is as good as ever.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 accelerate==1.15.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
from pathlib import Path

import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification, DataCollatorForSeq2Seq
from transformers import BertTokenizer, DataCollatorWithPadding, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
texts = ["好", "很好吃", "差", "送货慢，客服不理人，不会再来", "还行", "味道好，店员热情", "一般般", "又贵又难吃"]
letters = sorted(set("".join(texts)))
Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]), encoding="utf-8")
tokenizer = BertTokenizer.from_pretrained(".")
torch.manual_seed(0)
classifier = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                      intermediate_size=37, num_labels=3))
writer = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=37,
                                                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=37, pad_token_id=0,
                                                 bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None))
to_classify = [tokenizer(text, return_token_type_ids=False) | {"labels": index % 3} for index, text in enumerate(texts)]
# The label is the text, so that a row tells whose it is.
to_write = [tokenizer(text, return_token_type_ids=False) | {"labels": tokenizer(text)["input_ids"]} for text in texts]
common = dict(output_dir="out", per_device_eval_batch_size=2, report_to="none", disable_tqdm=True, use_cpu=True)


@torch.no_grad()
def alone(example):
    return classifier.eval()(torch.tensor([example["input_ids"]])).logits[0]


def rows(strategy):
    """For each row that predict() gives, the example it belongs to: by its logits, and by the labels of the other trainer."""
    trainer = Trainer(model=classifier, args=TrainingArguments(train_sampling_strategy=strategy, **common), processing_class=tokenizer,
                      data_collator=DataCollatorWithPadding(tokenizer))
    logits = torch.tensor(trainer.predict(to_classify).predictions)
    of_logits = torch.cdist(logits, torch.stack([alone(example) for example in to_classify])).argmin(1).tolist()
    trainer = Seq2SeqTrainer(model=writer, processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer, model=writer),
                             args=Seq2SeqTrainingArguments(train_sampling_strategy=strategy, predict_with_generate=True,
                                                           generation_max_length=4, **common))
    labels = trainer.predict(to_write).label_ids
    labels[labels < 0] = 0
    of_labels = [texts.index(text.replace(" ", "")) for text in tokenizer.batch_decode(labels, skip_special_tokens=True)]
    return of_logits, of_labels


print("transformers", transformers.__version__)
for strategy in ("random", "sequential", "group_by_length"):
    found = rows(strategy)
    print(f"{strategy}: the rows of Trainer.predict are of the examples {found[0]}, those of Seq2SeqTrainer.predict {found[1]}")
    for order in found:
        assert sorted(order) == list(range(len(texts))), "it changed"
        assert (order != list(range(len(texts)))) == (strategy == "group_by_length"), "it changed"
        assert strategy != "group_by_length" or order[0] == 3, "it changed"
P
