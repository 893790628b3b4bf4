"""What is not there is refused before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COMMANDS = """
generate --model {missing} 今天
generate --adapter {missing} 今天
generate --file {missing}.txt
predict --model {missing} 今天
predict --model {here} --file {missing}.jsonl
finetune classification --model {missing} --train a.jsonl --eval a.jsonl --output b
finetune classification --train {missing}.jsonl --eval a.jsonl --output b
evaluate lm --model {missing} --text a.txt
evaluate lm --text {missing}.txt
evaluate classification --model {missing} --data a.jsonl
evaluate classification --adapter {here} --data {missing}.jsonl
classify --model {missing} --labels 甲,乙 今天
embed --model {missing} 今天
fill-mask --model {missing} 今[MASK]
serve --model {missing}
quantize --model {missing} --bits 8 --to b
merge --adapter {missing} --to b
merge --adapter {here} --model {missing} --to b
convert --from {missing} --to b
convert --from-checkpoint {missing} --to b
"""
PROGRAM = """
import contextlib, io, json, sys
from plug.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main()
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([status, heavy, said.getvalue()]))
"""


def test_what_is_not_there_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    here = tmp_path / "adapter"
    here.mkdir()
    (here / "adapter_config.json").write_text("{}")
    missing = tmp_path / "missing"
    commands = [
        [word.format(missing=missing, here=here) for word in line.split()]
        for line in COMMANDS.strip().splitlines()
    ]

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip

    outcomes = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(outcomes) == len(commands)
    for command, (status, heavy, said) in zip(commands, outcomes, strict=True):
        assert (status, heavy) == (2, []), (command, said)
        assert said.startswith("错误：")
        assert str(missing) in said, (command, said)
    assert [each.name for each in tmp_path.iterdir()] == ["adapter"]
