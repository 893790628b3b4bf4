#!/usr/bin/env bash
# Expected: a model that was quantised with activations, calibrated, frozen and saved gives after requantize(model, state, map), the documented way back,
#   what it gave before it was saved. For weights alone it does, to the last digit.
# Happens (optimum-quanto 0.2.7, torch 2.13.0): not with activations. Calibration() finds out by default (streamline=True) at which places an output need
#   not be quantised, since the next operation undoes it at once, and takes the quantisation out there. That decision is neither in the state nor
#   in quantization_map: the loaded model quantises the outputs of all layers. Here its logits are 0.050 of their norm away from those of the
#   model that was saved, as far as quantisation itself moved them (0.053), and its error is the larger one. All scales are equal, all tensors
#   load, nothing is printed. With Calibration(streamline=False) both are the same. What the option does:
#   https://github.com/huggingface/optimum-quanto/issues/336
# Hurts: whoever measures an int8 or float8 model (ROUGE, perplexity) in the process that made it and then ships the file: another model is served than
#   the one that was measured, and texts of the two differ without a change of weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optimum-quanto==0.2.7 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
from importlib.metadata import version

import torch
from optimum.quanto import Calibration, freeze, qint8, quantization_map, quantize, requantize
from transformers import BartConfig, BartForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
generator = torch.Generator().manual_seed(1)
ids, decoder_ids, other_ids = (torch.randint(3, 99, (4, length), generator=generator) for length in (9, 6, 9))


def bart():
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=99, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.2)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=ids, decoder_input_ids=decoder_ids).logits


def off(found, expected):
    return round(float((found - expected).norm() / expected.norm()), 4)


print("optimum-quanto", version("optimum-quanto"), "torch", torch.__version__)
exact = logits(bart())
for name, activations, streamline in (("weights alone", None, True), ("activations, as it is", qint8, True), ("streamline=False", qint8, False)):
    model = bart()
    quantize(model, weights=qint8, activations=activations)
    if activations:
        with torch.no_grad(), Calibration(streamline=streamline):
            model(input_ids=ids, decoder_input_ids=decoder_ids)
            model(input_ids=other_ids, decoder_input_ids=decoder_ids)
    freeze(model)
    torch.save(model.state_dict(), "model.pt")
    loaded = bart()
    requantize(loaded, torch.load("model.pt", weights_only=False), quantization_map(model), torch.device("cpu"))
    states = [{key: value for key, value in m.state_dict().items() if "scale" in key} for m in (model, loaded)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    measured, served = off(logits(model), exact), off(logits(loaded), exact)
    apart = off(logits(loaded), logits(model))
    print(f"{name}: error {measured} as measured, {served} when loaded; {apart} from one another")
    assert (apart > 0.02 and served > measured) if activations and streamline else apart == 0, "it changed"
P
