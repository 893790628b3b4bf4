"""`plug generate`, in this process where possible, and as users run it where it matters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plug import traditional
from plug.cli import main
from plug.generation import prompt_lookup as lookup
from plug.generation.generator import generate
from plug.loading.save import save
from plug.model.configuration import PRESETS
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs `plug generate … --model <tiny>`: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        model = [] if "--model" in arguments else ["--model", str(model_directory)]
        monkeypatch.setattr(sys, "argv", ["plug", "generate", *arguments, *model])
        status = main()
        return status, *capsys.readouterr()

    return run


def test_the_continuation_is_printed(run: Run, model_directory: Path) -> None:
    status, out, _ = run("山上", "--seed", "3", "--out-length", "20", "--temperature", "2")

    expected = generate("山上", model=model_directory, seed=3, out_length=20, temperature=2)
    assert (status, out) == (0, expected.text + "\n")


def test_drafts_are_made_where_asked_for_and_change_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafted = []
    find = lookup.find_draft
    monkeypatch.setattr(
        lookup, "find_draft", lambda *inputs: drafted.append(inputs) or find(*inputs)
    )
    arguments = ["山上山上", "--temperature", "0", "--out-length", "20"]

    expected = run(*arguments)
    assert not drafted
    found = run(*arguments, "--prompt-lookup-num-tokens", "6")

    assert found == expected
    assert drafted


def test_json_holds_the_text_the_ids_and_the_speed(run: Run) -> None:
    status, out, _ = run("山上", "--json", "--out-length", "12", "--top-k", "1")

    answer = json.loads(out)
    assert status == 0
    assert len(answer["token_ids"]) == 12
    assert answer["prompt"] == "山上"
    assert answer["prompt_token_count"] == 2
    assert answer["finish_reason"] == "length"
    assert answer["tokens_per_second"] == pytest.approx(12 / answer["seconds"], rel=0.05)


def test_each_line_of_a_file_is_continued(run: Run, tmp_path: Path) -> None:
    prompts = [f"今天{number}" for number in range(10)]  # more than a batch
    (tmp_path / "prompts.txt").write_text("\r\n\n".join(prompts), encoding="utf-8")

    options = ("--file", str(tmp_path / "prompts.txt"), "--out-length", "5", "--seed", "1")
    _, out, _ = run(*options, "--json")
    _, plain, _ = run(*options)

    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert plain == "".join(f"{answer['text']}\n\n" for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "空"),
        (["   "], "空白"),
        ([], "--file"),
        (["山", "--file", "x"], "二者选一"),
        (["--file", "没有这个文件"], "没有这个文件"),
        (["山\udce5"], "U+DCE5"),
        (["山", "--out-length", "0"], "1 到 100000"),
        (["山", "--out-length", "-3"], "1 到 100000"),
        (["山", "--out-length", "100001"], "1 到 100000"),
        (["山", "--out-length", "许多"], "整数"),
        (["山", "--mode", "modelscope"], "original"),
        (["山", "--temperature", "-1"], "temperature"),
        (["山", "--top-k", "-1"], "top_k"),
        (["山", "--top-p", "2"], "top_p"),
        (["山", "--num-beams", "0"], "num_beams"),
        (["山", "--seed", "-1"], "seed"),
        (["山", "--window", "97"], "96"),
        (["山", "--prompt-lookup-num-tokens", "33"], "32"),
        (["山", "--prompt-lookup-num-tokens", "8", "--num-beams", "2"], "束搜索"),
        (["山", "--device", "abacus"], "abacus"),
        (["山", "--model", "没有这个模型"], "没有这个模型"),
    ],
)
def test_wrong_use_is_one_chinese_line_and_status_2(
    arguments: list[str], says: str, run: Run
) -> None:
    status, out, err = run(*arguments)

    assert status == 2
    assert out == ""
    assert err.startswith("错误：")
    assert says in err
    assert err.count("\n") == 1


def test_verbose_tells_how_long_reading_the_weights_took(model_directory: Path) -> None:
    command = [sys.executable, "-m", "plug", "generate", "山上", "--model", str(model_directory)]

    done = subprocess.run(
        [*command, "--out-length", "2", "-v"], capture_output=True, text=True, check=True
    )

    told = done.stderr.splitlines()[0]  # a new machine's speed is told of after it
    assert re.fullmatch(r"权重 0\.00 GB，\d+\.\d\d 秒读到 cpu（\d+\.\d\d GB/s）.*", told)


def test_a_batch_size_and_a_precision_may_be_given(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("山上\n今天\n天气", encoding="utf-8")
    options = ["--file", str(tmp_path / "prompts.txt"), "--top-k", "1", "--out-length", "4"]

    expected = run(*options)
    assert run(*options, "--batch-size", "2") == expected
    assert run(*options, "--dtype", "bfloat16")[0] == 0
    assert run(*options, "--batch-size", "0")[0] == 2


def test_traditional_text_is_converted_on_request_and_otherwise_warned_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traditional, "to_simplified", lambda text: text.replace("氣", "气"))
    options = ["--seed", "1", "--out-length", "4", "--json"]

    _, expected, _ = run("今天天气很好", *options)
    _, converted, _ = run("今天天氣很好", *options, "--simplify")
    assert json.loads(converted)["token_ids"] == json.loads(expected)["token_ids"]

    traditional._has_warned.clear()
    assert run("這裡的天氣很好", *options)[0] == 0
    assert "--simplify" in caplog.text


def test_binary_files_and_files_without_text_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x93\x00\xff")
    (tmp_path / "blank").write_text(" \n\n", encoding="utf-8")

    assert "不是文本" in run("--file", str(tmp_path / "binary"))[2]
    status, _, err = run("--file", str(tmp_path / "blank"))
    assert (status, "没有文字" in err) == (2, True)


def test_an_encoder_alone_cannot_write(
    run: Run, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    values = PRESETS["test"].to_dict() | {"num_decoder_layers": 0}
    encoder = Plug(type(PRESETS["test"]).from_dict(values))
    save(encoder, tmp_path / "encoder", tokenizer=tiny_tokenizer)

    status, _, err = run("山", "--model", str(tmp_path / "encoder"))

    assert (status, "只有编码器" in err) == (2, True)


def test_a_hundred_thousand_characters_are_cut_and_said_so(run: Run) -> None:
    status, out, _ = run("山" * 100_000, "--out-length", "3", "--json")

    assert status == 0
    assert json.loads(out)["prompt_token_count"] == 100_000


def test_slow_imports_are_avoided_and_the_warning_goes_to_stderr(
    model_directory: Path,
) -> None:
    program = (
        "import sys; from plug.cli import main; status = main(); "
        "slow = {'transformers', 'torch._dynamo', 'numpy.testing'}; "
        "print(sorted(slow & sys.modules.keys()), file=sys.stderr); "
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "generate", "--model", str(model_directory)]

    done = subprocess.run(
        [*command, "山" * 200, "--out-length", "5"], capture_output=True, text=True, check=True
    )

    assert done.stdout.endswith("\n")
    warning, modules = done.stderr.splitlines()
    assert "200 个词元，模型只读最后 94 个" in warning
    assert modules == "[]"


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_prompts_come_from_standard_input(name: str, model_directory: Path) -> None:
    command = [sys.executable, "-m", "plug", "generate", "--model", str(model_directory)]

    done = subprocess.run(
        [*command, "--file", name, "--json", "--out-length", "2"],
        input="山上\n今天\n".encode(),
        capture_output=True,
        check=True,
    )

    answers = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["山上", "今天"]


def test_a_file_of_prompts_is_read_as_data_is(
    model_directory: Path,
    tmp_path: Path,
    run_plug: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "prompts.txt"
    command = ("generate", "--model", model_directory, "--device", "cpu", "--out-length", "2")

    file.write_bytes("今天\n\n\ufeff山上\n\u200b\n".encode())
    ran = run_plug(*command, "--file", file, "--json")
    assert [json.loads(line)["prompt"] for line in ran.out.splitlines()] == ["今天", "山上"]
    assert "空行没有续写：2 处" in caplog.text
    assert "U+FEFF：1 处" in caplog.text

    file.write_bytes("今天\n山上\n".encode("gbk"))
    assert "iconv -f GB18030 -t UTF-8" in run_plug(*command, "--file", file).err
