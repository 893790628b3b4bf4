#!/usr/bin/env bash
# Expected: what a model writes under an XGrammar grammar is, decoded, a text of the grammar: TokenizerInfo.from_huggingface(tokenizer) says that what it
#   needs is automatically detected from the tokenizer, and a tokenizer that it cannot handle is refused, as llguidance refuses this one.
# Happens (xgrammar 0.2.9, transformers 5.24.0): WordPiece, the Chinese BERT vocabulary, is taken as VocabType.RAW without a word: a token is thought to
#   stand for its own letters. "##ing" is four letters and two signs, so that "playing" cannot be written as play ##ing, in which way the model
#   learned it, but as play i n g alone; and there is no blank between two tokens, where decode() puts one. {"城市":"北京"}, the only text that
#   the schema here allows, comes as { " 城 市 " : " 北 京 " }: valid JSON with the key " 城 市 " and the value " 北 京 ".
#   A byte-level vocabulary gives the text that was meant.
# Hurts: whoever asks bart-base-chinese, CPT or a Chinese T5 for JSON, an enum or a choice: the answer does not fit the schema that it was held to, and
#   the key is not found; English words, numbers and names are spelled in pieces that the model does not know.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet xgrammar==0.2.9 llguidance==1.9.1 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import json
from importlib.metadata import version

import llguidance.hf
import torch
import transformers
import xgrammar
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, BertTokenizer, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
letters = "abcdefghijklmnopqrstuvwxyz"
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *'{}":,', *letters, *("##" + letter for letter in letters), *"城市北京", "play", "##ing"]
wordpiece = BertTokenizer(vocab={word: id_ for id_, word in enumerate(words)})
alphabet = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
backend = Tokenizer(models.BPE(vocab={piece: id_ for id_, piece in enumerate(alphabet)}, merges=[]))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
byte_level = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]")
schema = {"type": "object", "properties": {"城市": {"enum": ["北京"]}}, "required": ["城市"], "additionalProperties": False}


def compiler(tokenizer):
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer), stop_token_ids=[3])
    return info, xgrammar.GrammarCompiler(info)


def answer(tokenizer):
    """What a model with random weights writes under the schema."""
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=128, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        decoder_start_token_id=2, forced_eos_token_id=None)).eval()
    info, compiled = compiler(tokenizer)
    grammar = compiled.compile_json_schema(json.dumps(schema, ensure_ascii=False), any_whitespace=False, separators=(",", ":"))
    ids = model.generate(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=60, do_sample=False,
                         logits_processor=[xgrammar.contrib.hf.LogitsProcessor(grammar)])
    return info.vocab_type.name, tokenizer.decode(ids[0], skip_special_tokens=True)


def next_after(prefix, text):
    """The tokens that may follow the tokens `prefix` if the whole text is given."""
    _, compiled = compiler(wordpiece)
    matcher = xgrammar.GrammarMatcher(compiled.compile_grammar(f'root ::= "{text}"'))
    for token in prefix:
        assert matcher.accept_token(words.index(token))
    mask = xgrammar.allocate_token_bitmask(1, len(words))
    matcher.fill_next_token_bitmask(mask)
    return [word for id_, word in enumerate(words) if mask[0, id_ // 32] >> (id_ % 32) & 1]


print("xgrammar", version("xgrammar"), "transformers", transformers.__version__)
meant = {"城市": "北京"}
for name, tokenizer in (("byte-level", byte_level), ("WordPiece", wordpiece)):
    kind, text = answer(tokenizer)
    print(f"{name}, taken as {kind}: {text} -> {json.loads(text)}")
    assert json.loads(text) == (meant if tokenizer is byte_level else {" 城 市 ": " 北 京 "}), "it changed"
print("the tokenizer's own pieces of playing:", wordpiece.tokenize("playing"), "allowed after play:", next_after(["play"], "playing"))
assert wordpiece.tokenize("playing") == ["play", "##ing"] and next_after(["play"], "playing") == ["i"], "it changed"
try:
    llguidance.hf.from_tokenizer(wordpiece)
    refused = ""
except ValueError as error:
    refused = str(error)
print("llguidance refuses:", refused)
assert refused, "it changed"
P
