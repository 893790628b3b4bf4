#!/usr/bin/env bash
# Expected: pipeline("token-classification", aggregation_strategy="simple") gives the entities of a model with the tags B, M, E, S (or B, I, E, S),
#   in which most Chinese corpora of names come (Resume, Weibo, OntoNotes, CLUENER): aggregation is said to group the tokens of an entity.
# Happens (transformers 5.24.0): only B- and I- are looked at. An E- or M- tag begins a new group whenever the one before it has another
#   prefix, and the prefix is then taken off, so that each piece has the right type: 张三丰, tagged B M E, comes as three persons 张, 三
#   and 丰; 北京大学 as 北, 京大 and 学. "first", "average" and "max" give the same. Nothing is printed. B I I is right.
# Hurts: whoever serves a Chinese NER model: nearly every entity is cut, its type and its score look right, and counting or linking entities
#   goes wrong without an error. Renaming M and E to I in config.id2label (S to B) is what works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 "torch>=2.11,<2.14"
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertForTokenClassification, BertTokenizer, pipeline

transformers.logging.set_verbosity_error()
text = "张三丰在北京大学读书"
Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *text]), encoding="utf-8")
tokenizer = BertTokenizer.from_pretrained(".")


def entities(tags, strategy):
    """What the pipeline makes of these tags of the characters; the model's head is made to give them."""
    labels = ["O", *dict.fromkeys(tag for tag in tags if tag != "O")]
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=0, num_attention_heads=4, intermediate_size=37,
                        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)})
    model = BertForTokenClassification(config).eval()
    model.classifier = torch.nn.Identity()
    logits = 9 * torch.eye(len(labels))[[labels.index(tag) for tag in ["O", *tags, "O"]]]
    model.classifier.forward = lambda hidden_states: logits[None]
    tagger = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy=strategy)
    return [(entity["entity_group"], text[entity["start"] : entity["end"]]) for entity in tagger(text)]


print("transformers", transformers.__version__)
whole = [("PER", "张三丰"), ("ORG", "北京大学")]
bio = ["B-PER", "I-PER", "I-PER", "O", "B-ORG", "I-ORG", "I-ORG", "I-ORG", "O", "O"]
bmes = ["B-PER", "M-PER", "E-PER", "O", "B-ORG", "M-ORG", "M-ORG", "E-ORG", "O", "O"]
bies = [tag.replace("M-", "I-") for tag in bmes]
for strategy in ("simple", "first", "average", "max"):
    found = [entities(tags, strategy) for tags in (bio, bmes, bies)]
    print(f"{strategy}: B I:", found[0], "| B M E:", found[1], "| B I E:", found[2])
    assert found[0] == whole, "it changed"
    assert found[1] == [("PER", "张"), ("PER", "三"), ("PER", "丰"), ("ORG", "北"), ("ORG", "京大"), ("ORG", "学")], "it changed"
    assert found[2] == [("PER", "张三"), ("PER", "丰"), ("ORG", "北京大"), ("ORG", "学")], "it changed"
P
