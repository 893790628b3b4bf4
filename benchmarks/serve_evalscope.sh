#!/usr/bin/env bash
# `evalscope perf`, ModelScope's own load test, against `plug serve` with plug-mini-zh on a CPU: 16 clients stream 64 tokens
# each after prompts of 62, 160 requests in all. Prints the summary that stands in results/serve_evalscope.txt; a minute.
#
#   python -m venv /tmp/evalscope && /tmp/evalscope/bin/pip install "evalscope[perf]==1.14.1"
#   EVALSCOPE=/tmp/evalscope/bin/evalscope OMP_NUM_THREADS=2 bash benchmarks/serve_evalscope.sh
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -r "$work"' EXIT
port=${PORT:-8231}
python -m plug serve --port "$port" --device cpu > "$work/server.out" 2>&1 & server=$!
python - > "$work/prompts.txt" <<'PYTHON'
import random
import plug
from plug.checkpoints.directory import find_model_directory
tokenizer, draw = plug.PlugTokenizer.load(find_model_directory()), random.Random(0)
for _ in range(400):
    ids = [draw.randrange(300, 12_000) for _ in range(62)]
    print(tokenizer.decode(ids).replace("\n", " "))
PYTHON
until curl -sf "http://127.0.0.1:$port/ready" > "$work/ready"; do
  kill -0 "$server" || { cat "$work/server.out"; exit 1; }
  sleep 0.5
done
"${EVALSCOPE:-evalscope}" perf --url "http://127.0.0.1:$port/v1/completions" --api openai --model plug-mini-zh \
  --dataset line_by_line --dataset-path "$work/prompts.txt" --number 160 --parallel 16 --warmup-num 16 \
  --max-tokens 64 --min-tokens 64 --extra-args '{"ignore_eos": true}' --stream --no-apply-chat-template \
  --outputs-dir "$work/out" --no-timestamp > "$work/log" 2>&1 || { tail -30 "$work/log"; exit 1; }
sed 's/\x1b\[[0-9;]*m//g; /Output Path/d' "$work/out/plug-mini-zh/performance_summary.txt"
