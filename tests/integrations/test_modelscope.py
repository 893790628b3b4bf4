"""The real ModelScope runs the model card's two programs, and what users try beside them."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
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
from plug.checkpoints.hub import write_finetuned_configuration
from plug.checkpoints.original import export_original, import_original
from plug.checkpoints.store import find_model_directory, save
from plug.errors import PlugError, UsageError
from plug.integrations.modelscope.__main__ import main
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug

pytestmark = pytest.mark.filterwarnings("ignore")  # as above

CHARACTERS = "段誉轻挥折扇，摇了头说道你师父是的可不我今天气很好们去公园看花山上有座庙什么？"

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

CARD_2 = """\
import os
import tempfile

from modelscope.metainfo import Trainers
from modelscope.trainers import build_trainer

def main():
    # 准备数据集
    from datasets import load_dataset
    dataset_dict = load_dataset(DATASET)

    def concat_answer_context(dataset):
        dataset['src_txt'] = dataset['answers']['text'][0] + '[SEP]' + dataset[
            'context']
        return dataset

    train_dataset = dataset_dict['train'].map(concat_answer_context)
    eval_dataset = dataset_dict['validation'].map(concat_answer_context)

    train_dataset = train_dataset \\
        .rename_columns({'question': 'tgt_txt'}).remove_columns('context') \\
        .remove_columns('id').remove_columns('answers')
    eval_dataset = eval_dataset \\
        .rename_columns({'question': 'tgt_txt'}).remove_columns('context') \\
        .remove_columns('id').remove_columns('answers')

    # 准备work目录，用以存放log和finetune后的checkpoint文件
    tmp_dir = "plug_work_dir/rank" + os.environ['RANK']
    if not os.path.exists(tmp_dir):
        os.makedirs(tmp_dir)
    model_id = MODEL

    # 使用plug_trainer进行训练
    kwargs = dict(
        model=model_id,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        work_dir=tmp_dir)

    trainer = build_trainer(
        name=Trainers.nlp_plug_trainer, default_args=kwargs)
    trainer.train()

if __name__ == '__main__':
    main()
"""
PROMPT = '段誉轻挥折扇，摇了摇头，说道：“你师父是你的师父，你师父可不是我的师父。"'
ROWS = [{"src_txt": f"花[SEP]我们去公园看花{c}", "tgt_txt": f"看花{c}好。"} for c in "山上有座"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched, and relative paths are the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def original(make_model: Callable[[PlugConfig], Plug], tmp_path: Path) -> Path:
    """A tiny original directory with a vocabulary, and ModelScope's file, as it was released."""
    pieces = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]",
              "[MASK]", *dict.fromkeys(CHARACTERS)]  # fmt: skip
    config = dataclasses.replace(
        PRESETS["test"],
        vocab_size=160,
        num_emitted_tokens=len(pieces),
        pad_token_id=0, unk_token_id=100, decoder_start_token_id=101, eos_token_id=102,
        mask_token_id=103, encoder_final_norm_passes=2,
    )  # fmt: skip
    save(make_model(config), tmp_path / "ours", tokenizer=None)
    directory = tmp_path / "hub" / "nlp_plug_text-generation_27B"
    export_original(tmp_path / "ours", directory, 2)
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def run_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs one of the card's programs, given values for the names in capitals: what it prints."""

    def run(program: str, **values: object) -> str:
        for name, value in values.items():
            program = program.replace(name, repr(value))
        (tmp_path / "card.py").write_text(program, encoding="utf-8")
        assert main(["card.py"]) == 0
        return capsys.readouterr().out

    return run


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


def test_a_stream_that_is_closed_stops_and_one_that_is_open_is_alone(pipe: Any) -> None:
    expected = pipe("花", out_length=5, seed=1)
    stream = pipe("今天", out_length=300, seed=4, stream=True)
    next(stream)
    with pytest.raises(UsageError, match="还没有取完"):
        pipe("花")
    stream.close()
    assert pipe("花", out_length=5, seed=1) == expected


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


# The second program


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A folder that `load_dataset` reads, in the form of DuReader-robust."""
    rows = [
        {
            "id": str(index),
            "context": f"我们去公园看花{character}",
            "question": f"看什么{character}？",
            "answers": {"text": ["花"], "answer_start": [6]},
        }
        for index, character in enumerate("山上有座庙今天")
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for split in ("train", "validation"):
        (tmp_path / "dureader").mkdir(exist_ok=True)
        (tmp_path / "dureader" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return str(tmp_path / "dureader")


def test_the_cards_second_program(
    run_card: Callable[..., str],
    original: Path,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    run_card(CARD_2, MODEL=str(original), DATASET=dataset)

    output = tmp_path / "plug_work_dir" / "rank0" / "output"
    settings = json.loads((output / "finetuning.json").read_text())["settings"]
    theirs = {"num_beams": 5, "learning_rate": 1e-5, "epochs": 5, "batch_size": 32}
    assert settings.items() >= theirs.items()
    pipe = pipeline(Tasks.text_generation, model=str(output))
    predictor = plug.Predictor(output)
    source = "花[SEP]我们去公园看花山"
    written = predictor.predict_text(source)["prediction"]
    answer = pipe(source, out_length=settings["target_length"])["text"]
    assert answer.replace("“", "[UNK]") == written.replace(" ", "")


@pytest.mark.slow
def test_the_cards_second_program_in_two_processes(
    original: Path, dataset: str, tmp_path: Path
) -> None:
    """Each process has a work_dir of its own on the card; all is in the first one's."""
    program = CARD_2.replace("MODEL", repr(str(original))).replace("DATASET", repr(dataset))
    (tmp_path / "card.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
               "plug.integrations.modelscope", "card.py"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("训练完成") == 1
    work_dir = tmp_path / "plug_work_dir"
    assert (work_dir / "rank0" / "output" / "model.safetensors").is_file()
    assert list((work_dir / "rank1").iterdir()) == []


@pytest.fixture
def trainer(model_directory: Path, tmp_path: Path) -> Callable[..., Any]:
    """`trainer(…)`: of the tiny model on four rows, for one epoch, unless changed."""

    def make(**changes: Any) -> Any:
        arguments = {
            "model": str(model_directory),
            "train_dataset": ROWS,
            "eval_dataset": ROWS,
            "work_dir": str(tmp_path / "work"),
            "max_epochs": 1,
        }
        return build_trainer(name=Trainers.nlp_plug_trainer, default_args={**arguments, **changes})

    return make


def test_cfg_modify_fn_changes_the_run(
    trainer: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def modify(cfg: Any) -> Any:
        cfg.train.optimizer.lr = 0.02
        cfg.train.optimizer.type = "SGD"
        cfg.train.dataloader.batch_size_per_gpu = 2
        cfg.preprocessor.sequence_length = 20
        cfg.preprocessor.target_max_length = 5
        cfg.evaluation.dataloader.batch_size_per_gpu = 3
        return cfg

    metrics = trainer(cfg_modify_fn=modify).train()
    settings = json.loads((tmp_path / "work/output/finetuning.json").read_text())["settings"]
    wanted = {"learning_rate": 0.02, "batch_size": 2, "source_length": 20, "epochs": 1,
              "eval_batch_size": 3, "seed": 42}  # fmt: skip
    assert settings.items() >= wanted.items()
    assert "bleu4" in metrics
    assert "对 train.optimizer.type 的改动没有用到" in caplog.text
    assert "有 4 条的目标长过 target_max_length=5" in caplog.text
    learnt = (tmp_path / "work/data/train_dataset.jsonl").read_text().splitlines()
    assert json.loads(learnt[0])["tgt_txt"] == "看花山"
    scored = (tmp_path / "work/data/eval_dataset.jsonl").read_text().splitlines()
    assert json.loads(scored[0]) == ROWS[0]


def test_evaluate_scores_the_base_before_and_the_result_after(
    trainer: Callable[..., Any], model_directory: Path
) -> None:
    def faster(cfg: Any) -> Any:
        cfg.train.optimizer.lr = 0.02
        cfg.train.dataloader.batch_size_per_gpu = 1
        return cfg

    trained = trainer(cfg_modify_fn=faster, max_epochs=4)
    before = trained.evaluate()
    after = trained.train()
    assert trained.evaluate() == pytest.approx(after)
    assert trained.evaluate(str(model_directory)) == pytest.approx(before)
    assert before != pytest.approx(after)


def test_an_msdataset_and_other_column_names(trainer: Callable[..., Any], tmp_path: Path) -> None:
    renamed = [{"问": row["src_txt"], "答": row["tgt_txt"]} for row in ROWS]
    rows = MsDataset.to_ms_dataset(Dataset.from_list(renamed))

    def columns(cfg: Any) -> Any:
        cfg.preprocessor.first_sequence, cfg.preprocessor.second_sequence = "问", "答"
        return cfg

    trainer(train_dataset=rows, eval_dataset=rows, cfg_modify_fn=columns).train()
    lines = (tmp_path / "work/data/train_dataset.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ROWS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": None}, "没有给 train_dataset"),
        ({"train_dataset": []}, "train_dataset 是空的"),
        (
            {"eval_dataset": [{"text": "花"}]},
            r"eval_dataset 第 1 条的“src_txt”.*有的列是 \['text'\]",
        ),
        ({"train_dataset": {"train": ROWS}}, "请给其中的一份"),
        ({"banana": 1}, "没有参数 banana"),
        ({"launcher": "slurm"}, "launcher='slurm'"),
        ({"cfg_modify_fn": lambda _cfg: None}, "return cfg"),
        ({"cfg_file": "nowhere.json"}, "找不到 cfg_file"),
        ({"max_epochs": -1}, "epochs=-1 应大于 0"),
    ],
)
def test_training_that_makes_no_sense(
    trainer: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(**changes).train()
    assert not (tmp_path / "work" / "output").exists()


def test_a_work_dir_with_a_model_is_kept(trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer().train()
    before = (tmp_path / "work/output/model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="已有训练好的模型，不会覆盖"):
        trainer().train()
    assert (tmp_path / "work/output/model.safetensors").read_bytes() == before


def test_a_quantised_model_is_not_trained(
    trainer: Callable[..., Any], model_directory: Path, run_plug: Any, tmp_path: Path
) -> None:
    run_plug("quantize", "--model", model_directory, "--to", tmp_path / "q", "--bits", 8)
    with pytest.raises(UsageError, match="量化"):
        trainer(model=str(tmp_path / "q")).train()


# Understanding


@pytest.fixture
def finetuned(model_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A directory as `plug finetune` leaves it for a kind, with a random head."""
    from plug.finetuning.kind import make_kind
    from plug.tokenization import PlugTokenizer

    def make(kind: str, labels: list[str], pairs: bool | None = None) -> Path:
        torch.manual_seed(1)
        tokenizer = PlugTokenizer.load(model_directory)
        directory = tmp_path / kind
        made = make_kind(kind, tokenizer, labels, source_length=32, pairs=pairs)
        made.load_model(model_directory).save_pretrained(directory)
        tokenizer.save(directory)
        settings = {"task": kind, "source_length": 32, "target_length": 8, "num_beams": 1}
        run = {"settings": settings, "labels": labels, "label_names": {}, "pairs": pairs}
        (directory / "finetuning.json").write_text(json.dumps(run))
        write_finetuned_configuration(directory, kind, 1)
        return directory

    return make


def test_text_classification(finetuned: Callable[..., Path]) -> None:
    directory = finetuned("classification", ["花", "山", "庙"])
    pipe = pipeline(Tasks.text_classification, model=str(directory))
    texts = ["今天天气很好", "山上有座庙", "花"]
    answers = pipe(texts, batch_size=2)
    predictor = plug.Predictor(directory)
    for text, answer in zip(texts, answers, strict=True):
        found = predictor.predict_text(text)
        assert answer["labels"][0] == found["label"]
        assert answer["scores"][0] == pytest.approx(found["probability"], abs=1e-4)
        assert sum(answer["scores"]) == pytest.approx(1)
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        assert sorted(answer["labels"]) == sorted(["花", "山", "庙"])
    assert pipe("花", topk=1) == {key: value[:1] for key, value in answers[2].items()}
    with pytest.raises(UsageError, match="topk=0"):
        pipe("花", topk=0)


def test_a_pair_in_modelscopes_forms(finetuned: Callable[..., Path]) -> None:
    directory = finetuned("classification", ["0", "1"], pairs=True)
    pipe = pipeline(Tasks.sentence_similarity, model=str(directory))
    answer = pipe(("花", "山"))
    assert pipe({"text": "花", "text2": "山"}) == answer
    assert pipe([("花", "山"), ("山", "花")])[0]["labels"] == answer["labels"]
    with pytest.raises(UsageError, match="两段文字"):
        pipe("花")
    with pytest.raises(UsageError, match="输入应是文字、两段文字的元组"):
        pipe(("花", 3))


def test_token_classification(finetuned: Callable[..., Path]) -> None:
    directory = finetuned("labelling", ["O", "B-X", "I-X", "B-Y", "I-Y"])
    pipe = pipeline(Tasks.token_classification, model=str(directory))
    text = "今天天气很好，我们去公园看花。山上有座庙"
    predictor = plug.Predictor(directory)
    entities = predictor.predict_text(text)["entities"]
    assert entities, "a model that finds nothing shows nothing"
    assert pipe(text) == {
        "output": [
            {"type": each["type"], "start": each["start"], "end": each["end"],
             "span": text[each["start"] : each["end"]]}
            for each in entities
        ]
    }  # fmt: skip
    assert pipeline(Tasks.named_entity_recognition, model=str(directory))([text]) == [pipe(text)]


def test_fill_mask(model_directory: Path) -> None:
    pipe = pipeline(Tasks.fill_mask, model=str(model_directory))
    text = "今天[MASK]气很[MASK]。"
    first, second = (
        choices[0].text for choices in plug.fill_mask(text, model=str(model_directory))
    )
    assert pipe(text) == {"text": f"今天{first}气很{second}。"}
    with pytest.raises(UsageError, match=r"没有 \[MASK\]"):
        pipe("今天")
    with pytest.raises(UsageError, match="没有参数 top_k。可用：无"):
        pipe(text, top_k=2)


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
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card.py").write_text(CARD_1.replace("MODEL", "'/nowhere'"), encoding="utf-8")
    assert main(["card.py"]) == 2
    assert capsys.readouterr().err == (
        "错误：找不到模型目录 /nowhere，它也不是“拥有者/名字”样的编号。请检查路径。\n"
    )
    assert main(["nowhere.py"]) == 2
    assert main([]) == 2


def test_a_launchers_argument_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's launcher puts it first."""
    (tmp_path / "card.py").write_text("import sys; print(sys.argv)", encoding="utf-8")
    assert main(["--local_rank=1", "card.py", "a"]) == 0
    assert capsys.readouterr().out == "['card.py', '--local_rank=1', 'a']\n"
