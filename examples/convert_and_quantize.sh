#!/usr/bin/env bash
# 从原版的目录到 8 位和 4 位的模型：转换、量化、写作。
#
#     bash examples/convert_and_quantize.sh [原版的目录]
#
# 不给目录时，先造一个小的原版目录：随机权重，2 个分片，只为走一遍，写出来的是乱码。
# 结果写在 runs/convert-example（须不存在）。需要 pip install "."，不用显卡。
set -euo pipefail

original=${1:-}
folder=runs/convert-example
[[ ! -e $folder ]] || { echo "$folder 已存在。请先移走。" >&2; exit 1; }
mkdir -p "$folder"

if [[ -z $original ]]; then
  original=$folder/original
  python - "$folder/random" <<'PYTHON'
import sys
from pathlib import Path

import torch

import plug
from plug.loading.save import save

folder = Path(sys.argv[1])
folder.mkdir()
# 原版词表的样子：特殊符号在 0 和 100 到 103，后面是字。
pieces = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
pieces += sorted({*"春天来了，山上有座庙，花开了。今天天气很好，我们去公园看花。"})
vocabulary = folder.with_name("vocab.txt")
vocabulary.write_text("\n".join(pieces) + "\n", encoding="utf-8")
torch.manual_seed(0)
config = plug.PlugConfig(
    vocab_size=256, num_emitted_tokens=len(pieces), hidden_size=256, intermediate_size=512,
    num_hidden_layers=2, num_decoder_layers=2, num_attention_heads=4, max_position_embeddings=512,
    unk_token_id=100, decoder_start_token_id=101, eos_token_id=102, mask_token_id=103,
)
tokenizer = plug.PlugTokenizer.from_vocabulary_file(vocabulary)
save(plug.Plug(config), folder, tokenizer=tokenizer)
PYTHON
  plug convert --from "$folder/random" --to "$original" --to-original 2
fi

# 转成本项目的目录，各张量变成 bf16。
plug convert --from "$original" --to "$folder/model" --dtype bfloat16
# 量化可以直接读原版的分片，不必先转换。
plug quantize --model "$original" --to "$folder/int8" --bits 8
plug quantize --model "$original" --to "$folder/int4" --bits 4

for name in model int8 int4; do
  echo "== $name：$(du -sh "$folder/$name" | cut -f1)"
  plug generate "春天来了，" --model "$folder/$name" --seed 1 --out-length 30
done
