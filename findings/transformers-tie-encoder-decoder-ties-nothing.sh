#!/usr/bin/env bash
# Expected: EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, decoder, tie_encoder_decoder=True) and T5Config(tie_encoder_decoder=True) give
#   a model whose encoder and decoder share their weights, as in version 4 (the paper's BERT2BERT-share), and what version 4 saved loads.
# Happens (transformers 5.24.0; 4.57.3 as it was): the option is taken, kept in the configuration and saved as true, and nothing is tied: 77367
#   parameters for 44109, without a word. A shared model saved by version 4 has the decoder's copy alone; version 5 leaves the
#   WHOLE encoder, embeddings included, as it was initialised. Its load report lists the names as "MISSING … newly initialized", as for a new
#   head, and the model writes. The guide to version 5 does not name the option; of a method that went with it:
#   https://github.com/huggingface/transformers/issues/43097
# Hurts: whoever builds a shared BERT2BERT of a Chinese BERT or a shared T5: twice the memory and the file, another model than the paper's.
#   Whoever moves one that was fine-tuned to version 5: texts that do not depend on the source in any sensible way. Copying the
#   decoder's weights into the encoder after loading, name by name, mends what was loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.3 5.24.0; do
    python3.11 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "transformers==$version" torch==2.13.0
done
cd "$folder"
cat >shared.py <<'P'
import torch
import transformers
from transformers import BertConfig, BertModel, EncoderDecoderModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity(logging.CRITICAL)
logging.disable_progress_bar()
torch.manual_seed(0)
version = transformers.__version__
ids = torch.arange(5, 15)[None]
BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
                     initializer_range=0.3)).save_pretrained("bert")


def bert2bert(**options):
    return EncoderDecoderModel.from_encoder_decoder_pretrained("bert", "bert", **options)


def t5(**options):
    return T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, **options))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids, decoder_input_ids=ids).logits


for build in (bert2bert, t5):
    plain, shared = build(), build(tie_encoder_decoder=True)
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, shared)]
    print(f"transformers {version}, {build.__name__}: {sizes[0]} parameters, {sizes[1]} with tie_encoder_decoder=True;",
          "in the configuration:", shared.config.tie_encoder_decoder)
    assert shared.config.tie_encoder_decoder, "it changed"
    assert sizes[1] < 0.7 * sizes[0] if version.startswith("4") else sizes[1] == sizes[0], "it changed"

if version.startswith("4"):
    model = bert2bert(tie_encoder_decoder=True)
    model.save_pretrained("shared")
    again = EncoderDecoderModel.from_pretrained("shared")
    assert torch.equal(logits(again), logits(model)), "it changed"
    torch.save(logits(model), "logits.pt")
else:
    expected = torch.load("logits.pt")
    model, report = EncoderDecoderModel.from_pretrained("shared", output_loading_info=True)
    missing = [name for name in report["missing_keys"] if name.startswith("encoder.")]
    of_encoder = [name for name in model.state_dict() if name.startswith("encoder.") and "pooler" not in name]

    def off():
        return float((logits(model) - expected).norm() / expected.norm())

    as_loaded = off()
    weights = model.state_dict()
    weights |= {name: weights[name.replace("encoder.", "decoder.bert.", 1)] for name in missing}
    model.load_state_dict(weights)
    copied = off()
    print(f"what version 4 saved, loaded: {len(missing)} of {len(of_encoder)} tensors of the encoder are missing, logits off by",
          f"{as_loaded:.2f} of their norm;\nwith the decoder's weights copied into the encoder by {copied:.7f}")
    assert len(missing) == len(of_encoder) and as_loaded > 0.1 and copied < 1e-4, "it changed"
P
for version in 4.57.3 5.24.0; do
    "$folder/$version/bin/python" -W ignore shared.py
done
