"""The real ModelScope runs the model card's second program: training."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("modelscope", reason='needs ModelScope: pip install ".[modelscope]"')
pytest.importorskip("datasets", reason='ModelScope needs it: pip install ".[modelscope]"')
pytest.importorskip("addict", reason='ModelScope needs it: pip install ".[modelscope]"')
pytest.importorskip("sortedcontainers", reason='ModelScope needs it: pip install ".[modelscope]"')
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ModelScope's own, and of what it imports
    from datasets import Dataset
    from modelscope.metainfo import Trainers
    from modelscope.msdatasets import MsDataset
    from modelscope.pipelines import pipeline
    from modelscope.trainers import build_trainer
    from modelscope.utils.constant import Tasks
    from transformers import TrainerCallback

    import plug.integrations.modelscope
import plug
from plug.checkpoints.directory import find_model_directory
from plug.errors import UsageError
from plug.finetuning.run import finetune

pytestmark = pytest.mark.filterwarnings("ignore")  # as above

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
ROWS = [{"src_txt": f"花[SEP]我们去公园看花{c}", "tgt_txt": f"看花{c}好。"} for c in "山上有座"]


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
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "dureader").mkdir()
    for split, count in (("train", len(rows)), ("validation", 1)):  # beams of 262 tokens each
        text = "".join(lines[:count])
        (tmp_path / "dureader" / f"{split}.jsonl").write_text(text, encoding="utf-8")
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
def test_the_cards_second_program_on_the_shipped_model(
    run_card: Callable[..., str], dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    run_card(CARD_2, MODEL=str(find_model_directory()), DATASET=dataset)

    output = tmp_path / "plug_work_dir" / "rank0" / "output"
    assert pipeline(Tasks.text_generation, model=str(output))("花[SEP]我们去公园", out_length=8)[
        "text"
    ]


@pytest.mark.slow
def test_the_cards_second_program_in_two_processes(
    original: Path, dataset: str, tmp_path: Path
) -> None:
    """Each process has a work_dir of its own on the card; all is in the first one's."""
    program = CARD_2.replace("MODEL", repr(str(original))).replace("DATASET", repr(dataset))
    (tmp_path / "card.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m",
               "plug.integrations.modelscope", "card.py"]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
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
    learnt = (tmp_path / "work/plug_data/train_dataset.jsonl").read_text().splitlines()
    assert json.loads(learnt[0])["tgt_txt"] == "看花山"
    scored = (tmp_path / "work/plug_data/eval_dataset.jsonl").read_text().splitlines()
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
    lines = (tmp_path / "work/plug_data/train_dataset.jsonl").read_text().splitlines()
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
        ({"max_epochs": -1}, "epochs=-1 应是 0，或在 0.001"),
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


def test_an_interrupted_run_goes_on_with_the_same_data(
    trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopAtSave(TrainerCallback):
        def on_save(self, *_args: Any, **_kwargs: Any) -> None:
            raise KeyboardInterrupt

    whole = trainer(work_dir=str(tmp_path / "whole"), max_epochs=2).train()
    with pytest.raises(UsageError, match="没有可以接着进行的训练"):
        trainer(max_epochs=2).train(resume=True)
    with monkeypatch.context() as patch:
        run = functools.partial(finetune, callbacks=[StopAtSave()])
        patch.setattr("plug.integrations.modelscope.trainer.finetune", run)
        with pytest.raises(KeyboardInterrupt):
            trainer(max_epochs=2).train()
    with pytest.raises(UsageError, match=r"没有完成的训练.*resume=True"):
        trainer(max_epochs=2).train()
    with pytest.raises(UsageError, match="数据与中断的训练不同"):
        trainer(max_epochs=2, train_dataset=ROWS[:3]).train(resume=True)
    assert trainer(max_epochs=2).train(resume=True) == pytest.approx(whole)


def test_a_quantised_model_gets_adapters(
    trainer: Callable[..., Any],
    model_directory: Path,
    run_plug: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("peft")
    run_plug("quantize", "--model", model_directory, "--to", tmp_path / "q", "--bits", 8)

    def whole(cfg: Any) -> Any:
        cfg.train.memory = "full"
        return cfg

    def faster(cfg: Any) -> Any:
        cfg.train.optimizer.lr = 0.02
        return cfg

    with pytest.raises(UsageError, match="不能训练每个权重"):
        trainer(model=str(tmp_path / "q"), cfg_modify_fn=whole).train()
    trained = trainer(model=str(tmp_path / "q"), cfg_modify_fn=faster, max_epochs=2)
    before = trained.evaluate()
    after = trained.train()
    assert f"plug merge --model {tmp_path / 'q'} --adapter {trained.output}" in caplog.text
    assert not (trained.output / "config.json").exists()
    assert trained.evaluate() == pytest.approx(after)
    assert trained.evaluate(str(tmp_path / "q")) == pytest.approx(before)
    with pytest.raises(UsageError, match="已有训练好的模型，不会覆盖"):
        trainer(model=str(tmp_path / "q")).train()
