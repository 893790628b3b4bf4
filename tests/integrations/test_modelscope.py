"""The real ModelScope runs the model card's first program, and what users try beside it."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("modelscope", reason='needs ModelScope: pip install ".[modelscope]"')
pytest.importorskip("datasets", reason='ModelScope needs it: pip install ".[modelscope]"')
pytest.importorskip("addict", reason='ModelScope needs it: pip install ".[modelscope]"')
pytest.importorskip("sortedcontainers", reason='ModelScope needs it: pip install ".[modelscope]"')
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ModelScope's own, and of what it imports
    from datasets import Dataset
    from modelscope.hub import api as hub_api
    from modelscope.metainfo import Trainers
    from modelscope.msdatasets import MsDataset
    from modelscope.pipelines import pipeline
    from modelscope.pipelines import util as pipelines_util
    from modelscope.trainers import build_trainer
    from modelscope.utils.config import check_config
    from modelscope.utils.constant import Tasks
    from modelscope.utils.hub import read_config

    import plug.integrations.modelscope as integration
import plug
from plug.checkpoints.directory import find_model_directory
from plug.checkpoints.original import import_original
from plug.errors import PlugError, UsageError
from plug.integrations.modelscope.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore")  # as above

CARD_1 = """\
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

if __name__ == '__main__':
    input = '段誉轻挥折扇，摇了摇头，说道：“你师父是你的师父，你师父可不是我的师父。"'
    model_id = MODEL
    pipe = pipeline(Tasks.text_generation, model=model_id)
    pipe.models = []

    # out_length为期望的生成长度，最大为512
    result = pipe(input, out_length=256)
    print(result)
"""

PROMPT = '段誉轻挥折扇，摇了摇头，说道：“你师父是你的师父，你师父可不是我的师父。"'


# The first program


def test_the_cards_first_program_on_the_shipped_model(run_card: Callable[..., str]) -> None:
    printed = run_card(CARD_1, MODEL=str(find_model_directory()))
    text = eval(printed)["text"]
    assert len(text) > 20


def test_the_cards_first_program_on_an_original_writes_by_its_rules(
    run_card: Callable[..., str], original: Path, tmp_path: Path
) -> None:
    """As released, the seed of `configuration.json` makes every run write the same."""
    printed = run_card(CARD_1, MODEL=str(original))
    assert run_card(CARD_1, MODEL=str(original)) == printed

    import_original(original, tmp_path / "imported")
    seed = random.Random(1234).getrandbits(32)
    expected = plug.generate(
        PROMPT, model=str(tmp_path / "imported"), mode="original", out_length=256, seed=seed
    )
    assert eval(printed) == {"text": expected.text}
    assert original.with_name(original.name + ".plug").is_dir()


@pytest.mark.shared
@pytest.mark.parametrize(("code", "name"), [("modelscope", "prompt40"), ("alicemind", "prompt600")])
def test_an_original_writes_what_the_originals_code_wrote(
    code: str, name: str, golden: Path, shared_data: Path, tmp_path: Path
) -> None:
    """At the longer prompt ModelScope's own code fails past the first window; AliceMind's goes on.

    Source: golden/plug-tiny/generation.json, greedy.
    """
    directory = tmp_path / "hub" / "plug"
    (directory / "model").mkdir(parents=True)
    files = golden / "checkpoints" / "mp2"
    for path in [*files.glob("*.json"), *files.glob("model/*.pt")]:
        shutil.copyfile(path, directory / path.relative_to(files))
    shutil.copyfile(shared_data / "vocab" / "bert-chinese-vocab.txt", directory / "vocab.txt")
    runs = json.loads((golden / "generation.json").read_text(encoding="utf-8"))
    wanted = runs[code][name]
    pipe = pipeline(Tasks.text_generation, model=str(directory))
    assert pipe(wanted["prompt"], **runs["settings"]) == {"text": wanted["text"]}


@pytest.fixture
def pipe(model_directory: Path) -> Any:
    return pipeline(Tasks.text_generation, model=str(model_directory))


def test_options_are_those_of_generate(pipe: Any, model_directory: Path) -> None:
    options = {"out_length": 9, "top_k": 7, "top_p": 0.8, "temperature": 2.0, "seed": 5}
    expected = plug.generate("今天", model=str(model_directory), **options)
    assert pipe("今天", **options) == {"text": expected.text}
    assert pipe("今天", **options | {"seed": 6}) != {"text": expected.text}


def test_a_list_is_answered_in_its_order(pipe: Any, model_directory: Path) -> None:
    texts, seeds = ["今天", "山上有座庙", "花"], [1, 2, 3]
    expected = plug.generate(texts, model=str(model_directory), seed=seeds, out_length=9)
    answers = pipe(texts, seed=seeds, out_length=9, batch_size=2)
    assert answers == [{"text": each.text} for each in expected]
    assert pipe([]) == []


def test_the_directorys_options_come_before_the_defaults(model_directory: Path) -> None:
    file = model_directory / "configuration.json"
    content = json.loads(file.read_text())
    content["model"] |= {"top_k": 1, "out_length": 4, "seed": 1, "world_size": 8}
    file.write_text(json.dumps(content))
    pipe = pipeline(Tasks.text_generation, model=str(model_directory))
    options = {"model": str(model_directory), "out_length": 4, "seed": 0}
    assert pipe("今天") == {"text": plug.generate("今天", top_k=1, **options).text}
    assert pipe("今天", top_k=0, seed=0, temperature=9.0) == {
        "text": plug.generate("今天", top_k=0, temperature=9.0, **options).text
    }


def test_streaming_gives_all_so_far_and_ends_with_the_whole(pipe: Any) -> None:
    whole = pipe("今天", out_length=20, seed=4)["text"]
    texts = [each["text"] for each in pipe("今天", out_length=20, seed=4, stream=True)]
    assert len(texts) > 5
    assert texts[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert list(pipe.stream_generate("今天", out_length=20, seed=4))[-1]["text"] == whole


def test_a_stream_may_be_closed_and_calls_may_come_between(pipe: Any) -> None:
    expected = pipe("花", out_length=5, seed=1)
    whole = pipe("今天", out_length=30, seed=4)
    stream = pipe("今天", out_length=30, seed=4, stream=True)
    abandoned = pipe("山上", out_length=300, seed=5, stream=True)
    next(stream)
    next(abandoned)
    assert pipe("花", out_length=5, seed=1) == expected
    abandoned.close()
    assert list(stream)[-1] == whole


def test_a_dataset_is_answered_row_by_row(pipe: Any) -> None:
    rows = Dataset.from_list([{"text": "今天"}, {"text": "花"}])
    answers = list(pipe(MsDataset.to_ms_dataset(rows, target="text"), out_length=5, seed=1))
    assert answers == [pipe(text, out_length=5, seed=1) for text in ("今天", "花")]


def test_a_quantised_directory_writes(model_directory: Path, run_plug: Any, tmp_path: Path) -> None:
    assert run_plug("quantize", "--model", model_directory, "--to", tmp_path / "q",
                    "--bits", 8).status == 0  # fmt: skip
    pipe = pipeline(Tasks.text_generation, model=str(tmp_path / "q"))
    expected = plug.generate("今天", model=str(tmp_path / "q"), out_length=9, seed=1)
    assert pipe("今天", out_length=9, seed=1) == {"text": expected.text}


def test_weights_in_another_precision(model_directory: Path) -> None:
    pipe = pipeline(Tasks.text_generation, model=str(model_directory), dtype="bfloat16")
    options = {"out_length": 40, "temperature": 3.0, "top_k": 0, "seed": 1}
    half = plug.Generator(str(model_directory), dtype=torch.bfloat16)
    expected = plug.generate("今天", model=half, **options).text
    assert expected != plug.generate("今天", model=str(model_directory), **options).text
    assert pipe("今天", **options) == {"text": expected}
    with pytest.raises(UsageError, match=r"dtype='int3' 只能是 float32、"):
        pipeline(Tasks.text_generation, model=str(model_directory), dtype="int3")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (3, {}, "输入应是文字（str），却是 int"),
        (["花", None], {}, "第 2 个输入应是文字"),
        ("", {}, "是空的"),
        ("花", {"out_length": 0}, "out_length=0 应在 1 到"),
        ("花", {"max_length": 5}, "没有参数 max_length。可用：.*out_length"),
        (["花", "山"], {"stream": True}, "流式输出一次只写一段，却给了 2 段"),
    ],
)
def test_a_call_that_makes_no_sense(
    pipe: Any, text: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipe(text, **options)


# Models that cannot be had


def empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def without_configuration(directory: Path) -> None:
    (directory / "configuration.json").unlink()


def with_a_broken_configuration(directory: Path) -> None:
    (directory / "configuration.json").write_text('{"task":')


def with_broken_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\0" * 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty, "不是模型目录"),
        (without_configuration, "没有 configuration.json，ModelScope 认不出它"),
        (with_a_broken_configuration, "不是有效的 JSON"),
        (with_broken_weights, "已损坏"),
    ],
)
def test_a_directory_that_is_not_right(
    change: Callable[[Path], None], message: str, model_directory: Path
) -> None:
    change(model_directory)
    with pytest.raises(PlugError, match=message):
        pipeline(Tasks.text_generation, model=str(model_directory))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "找不到模型目录 /nowhere/at/all"),
        ("nowhere", "找不到模型目录 nowhere"),
        ("plug-mini-zh", r"只认目录。.*assets/plug-mini-zh"),
    ],
)
def test_a_path_that_is_not_there(model: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline(Tasks.text_generation, model=model)
    with pytest.raises(UsageError, match=message):
        build_trainer(name=Trainers.nlp_plug_trainer, default_args={"model": model})


def test_an_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelScope's own reason, and what to do."""

    class NoNetwork:
        def get_model(self, *_args: Any, **_kwargs: Any) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(pipelines_util, "HubApi", NoNetwork)
    monkeypatch.setattr(hub_api, "HubApi", NoNetwork)
    with pytest.raises(UsageError, match=r"damo/nlp_plug 不是这台机器上的目录.*no route.*网络"):
        pipeline(Tasks.text_generation, model="damo/nlp_plug")


def test_an_original_without_its_shards(original: Path) -> None:
    for shard in (original / "model").iterdir():
        shard.unlink()
    with pytest.raises(UsageError, match=r"没有权重.*放进 .*/model"):
        pipeline(Tasks.text_generation, model=str(original))


def test_a_task_that_the_model_was_not_made_for(model_directory: Path) -> None:
    with pytest.raises(UsageError, match="不能做 text-classification"):
        pipeline(Tasks.text_classification, model=str(model_directory))


# The directory, and the switch


def test_a_hub_directory_passes_modelscopes_own_checks(
    run_plug: Callable[..., Any], model_directory: Path, tmp_path: Path
) -> None:
    run_plug("convert", "--from", model_directory, "--to", tmp_path / "hub", "--to-modelscope")
    config = read_config(str(tmp_path / "hub"))
    check_config(config, is_training=True)
    assert config.pipeline.type == "plug-generation"
    pipe = pipeline(Tasks.text_generation, model=str(tmp_path / "hub"))
    expected = plug.generate("今天", model=str(model_directory), out_length=9, seed=1)
    assert pipe("今天", out_length=9, seed=1) == {"text": expected.text}


@pytest.fixture
def index() -> Iterator[dict[Any, Any]]:
    """ModelScope's index of modules, as it was before and is again after."""
    from modelscope.utils.import_utils import LazyImportModule

    whole = LazyImportModule.get_ast_index()
    before = dict(whole["index"])
    yield whole["index"]
    whole["index"] = before


def test_other_internals_are_told_with_the_version_tested(index: dict[Any, Any]) -> None:
    for key in integration.BUILT_IN:
        index.pop(key)
    with pytest.raises(PlugError, match=rf"modelscope .* 测试过的 {integration.TESTED} 不同"):
        integration.switch_on()


def test_a_program_that_fails_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.py").write_text(CARD_1.replace("MODEL", "'/nowhere'"), encoding="utf-8")
    assert main(["card.py"]) == 2
    assert capsys.readouterr().err == (
        "错误：找不到模型目录 /nowhere，它也不是“拥有者/名字”样的编号。请检查路径。\n"
    )
    assert main(["nowhere.py"]) == 2
    assert main([]) == 2


def test_a_launchers_argument_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's launcher puts it first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.py").write_text("import sys; print(sys.argv)", encoding="utf-8")
    assert main(["--local_rank=1", "card.py", "a"]) == 0
    assert capsys.readouterr().out == "['card.py', '--local_rank=1', 'a']\n"
