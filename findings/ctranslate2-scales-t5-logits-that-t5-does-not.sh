#!/usr/bin/env bash
# Expected: ct2-transformers-converter makes a model that gives the scores of its source: for T5 it does, to 1e-6.
# Happens (ctranslate2 4.8.5, transformers 5.24.0): not for T5 v1.1, mT5 and what was made of them. T5 multiplies the decoder's output by
#   d_model ** -0.5 before the output layer, T5 v1.1 does not, and tie_word_embeddings=false in config.json is what tells the two apart. Since
#   version 5 transformers keeps that in `scale_decoder_outputs` (mT5 has no field for it), and config.tie_word_embeddings, at which the
#   converter looks, is True for every T5. All logits are divided by sqrt(d_model): 28 for mT5-base. The best next token is
#   the same, so greedy search is the same and no warning is given; its probability is next to 1/vocabulary.
# Hurts: whoever serves mT5, Flan-T5, Mengzi-T5 or Randeng-T5 with CTranslate2. Beam search takes other texts, sampling writes noise, and scores
#   (reranking, confidence, perplexity) mean nothing. Setting config.tie_word_embeddings = False between loading and converting mends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ctranslate2==4.8.5 transformers==5.24.0 "torch>=2.11,<2.14"
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'P'
import json
from pathlib import Path

import ctranslate2
import torch
import transformers
from transformers import BertTokenizer, MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.logging.disable_progress_bar()
characters = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"
Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]), encoding="utf-8")
tokenizer = BertTokenizer.from_pretrained(".", bos_token="[CLS]", eos_token="[SEP]")
sizes = {"vocab_size": len(tokenizer), "d_model": 64, "d_kv": 16, "d_ff": 37, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
         "eos_token_id": 3, "decoder_start_token_id": 0}
source, target = ["[CLS]", *"天地玄黄宇宙洪荒", "[SEP]"], list("日月盈昃辰宿")
source_ids, target_ids = (torch.tensor([tokenizer.convert_tokens_to_ids(tokens)]) for tokens in (source, [*target, "[SEP]"]))


@torch.no_grad()
def compare(model_class, config_class, tied, **options):
    """The mean log-probability of a text by transformers and by CTranslate2, and what both write."""
    torch.manual_seed(0)
    model = model_class(config_class(**sizes, **options, tie_word_embeddings=tied)).eval()
    for weight in model.parameters():
        weight.normal_(std=0.3)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))  # not flat
    name = f"{model_class.__name__}-{tied}"
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    config = json.loads(Path(name, "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    Path(name, "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))  # as models are published
    model = model_class.from_pretrained(name).eval()
    ctranslate2.converters.TransformersConverter(name).convert(f"{name}/converted")
    translator = ctranslate2.Translator(f"{name}/converted", compute_type="float32")

    own = model(input_ids=source_ids, labels=target_ids).logits.log_softmax(-1)[0].gather(1, target_ids.T).mean()
    converted = translator.score_batch([source], [target])[0].log_probs
    texts = {}
    for beams in (1, 4):
        ids = model.generate(input_ids=source_ids, attention_mask=torch.ones_like(source_ids), num_beams=beams, max_new_tokens=8, do_sample=False)
        written = translator.translate_batch([source], beam_size=beams, max_decoding_length=8)[0].hypotheses[0]
        texts[beams] = "".join(tokenizer.convert_ids_to_tokens(ids[0, 1:])).removesuffix("[SEP]"), "".join(written)
    result = float(own), sum(converted) / len(converted), texts
    print(f"{model_class.__name__}, tie_word_embeddings={tied}: log-probability {result[0]:.4f} by transformers, {result[1]:.4f} by CTranslate2; "
          f"greedy: {texts[1][0]} and {texts[1][1]}; 4 beams: {texts[4][0]} and {texts[4][1]}")
    return result


print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__)
own, converted, texts = compare(T5ForConditionalGeneration, T5Config, True)
assert abs(own - converted) < 1e-4, "it changed"
v11 = {"feed_forward_proj": "gated-gelu"}
for own, converted, texts in (compare(T5ForConditionalGeneration, T5Config, False, **v11), compare(MT5ForConditionalGeneration, MT5Config, False, **v11)):
    assert abs(own - converted) > 0.3, "it changed"
    assert texts[1][0] == texts[1][1] and texts[4][0] != texts[4][1], "it changed"
P
