"""`finetune` itself: it learns, it resumes exactly, and it refuses what makes no sense."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import TrainerCallback

from plug.checkpoints.directory import find_model_directory, load_tokenizer
from plug.errors import PlugError, UsageError
from plug.finetuning.predict import Predictor
from plug.finetuning.readers import ClassificationExample
from plug.finetuning.run import _note_traditional, finetune, is_cut_into_bytes
from plug.finetuning.settings import FinetuneSettings
from plug.textfiles import Notes

Make = Callable[..., FinetuneSettings]

REPORT = {"report.md", "report.html", "metrics.json", "predictions.jsonl", "log.jsonl"}


@pytest.mark.parametrize(
    ("task", "metric", "times"),
    [
        ("classification", "accuracy", 30),
        ("labelling", "f1", 40),
        ("reading", "exact_match", 40),
        ("generation", "exact_match", 60),
    ],
)
def test_twenty_examples_are_learnt_by_heart(
    task: str, metric: str, times: int, settings: Make, data: Callable[..., Path]
) -> None:
    once = data(task)
    result = finetune(settings(task, data(task, times), eval=str(once), epochs=3.0), device="cpu")

    assert result.metrics[metric] == 1.0
    written = {path.name for path in result.directory.iterdir()}
    assert written >= REPORT | {"config.json", "model.safetensors", "tokenizer.json"}
    assert "checkpoints" not in written

    predictor = Predictor(result.directory, "cpu")
    examples = predictor.read(once)
    scores = predictor.kind.evaluate(examples, predictor(examples, batch_size=7)).metrics
    assert scores == pytest.approx(result.metrics)


class StopAfterEpoch(TrainerCallback):
    """What an interruption looks like: the run ends after its checkpoint."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if round(state.epoch) == self.epoch:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_as_an_unbroken_one(
    settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"epochs": 3.0, "batch_size": 5, "layer_decay": 0.9, "child_tuning": 0.5}
    whole = settings("classification", data("classification"), **options)
    finetune(whole, device="cpu")
    broken = settings("classification", data("classification"), output=f"{tmp_path}/2", **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, device="cpu", callbacks=[StopAfterEpoch(2)])
    with pytest.raises(UsageError, match=r"没有完成的训练.*--resume"):
        finetune(broken, device="cpu")
    with pytest.raises(UsageError, match=r"设置不能变（learning_rate：0.005 → 0.1）"):
        finetune(
            settings(
                "classification",
                data("classification"),
                output=f"{tmp_path}/2",
                **options | {"learning_rate": 0.1},
            ),
            device="cpu",
            resume=True,
        )
    rows = Path(broken.train).read_text(encoding="utf-8")
    first, rest = rows.split("\n", 1)
    Path(broken.train).write_text(f"{rest.rstrip()}\n{first}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"数据不能变：.* 的内容和开始训练时不同"):
        finetune(broken, device="cpu", resume=True)
    Path(broken.train).write_text(rows, encoding="utf-8")
    finetune(broken, device="cpu", resume=True)

    expected, actual = (load_file(f"{run.output}/model.safetensors") for run in (whole, broken))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    logs = [
        [
            {
                key: value
                for key, value in json.loads(line).items()
                if key in ("step", "eval_macro_f1")
            }
            for line in Path(f"{run.output}/log.jsonl").read_text().splitlines()[:-1]
        ]
        for run in (whole, broken)
    ]
    assert logs[0] == logs[1] != []


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_resumed_run_computes_as_many_examples_at_once_as_it_is_told(
    processes: str,
    settings: Make,
    data: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """`--memory auto`, begun by one or by two processes that had 10 examples a step together."""
    whole = settings("classification", data("classification"), epochs=3.0)
    finetune(whole, device="cpu")
    broken = replace(whole, output=f"{tmp_path}/2")
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, device="cpu", callbacks=[StopAfterEpoch(1)])
    file = tmp_path / "2" / "finetuning.json"
    run = json.loads(file.read_text(encoding="utf-8"))
    run["processes"] = int(processes)
    run["settings"]["batch_size"] //= int(processes)
    file.write_text(json.dumps(run), encoding="utf-8")

    (tmp_path / "2").rename(tmp_path / "moved")
    changed = {"output": f"{tmp_path}/moved", "batch_size": 10, "gradient_accumulation_steps": 1}
    if processes == "1":
        changed |= {"batch_size": 5, "gradient_accumulation_steps": 2}
    moved = finetune(replace(broken, **changed), device="cpu", resume=True).directory

    kept = json.loads((moved / "finetuning.json").read_text(encoding="utf-8"))
    assert {name: kept["settings"][name] for name in changed} == changed
    assert kept["processes"] == 1
    expected, actual = (
        load_file(directory / "model.safetensors") for directory in (Path(whole.output), moved)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, "--batch-size 5 --set gradient_accumulation_steps=2 --resume。"),
        (
            {"batch_size": 5, "gradient_accumulation_steps": 2},
            "--batch-size 1 --set gradient_accumulation_steps=10 --resume。",
        ),
        ({"batch_size": 1}, "再加 --resume 接着训练。"),
        ({"optimizer": "adafactor", "precision": "fp32"}, "再加 --resume 接着训练。"),
    ],
)
def test_too_little_memory_in_the_middle_of_a_run_is_one_sentence(
    changes: dict[str, Any],
    advice: str,
    settings: Make,
    data: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exhaust(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("plug.finetuning.trainer.FinetuneTrainer.training_step", exhaust)
    with pytest.raises(PlugError, match="显存用完了") as caught:
        finetune(settings("classification", data("classification"), **changes), device="cpu")
    assert str(caught.value).endswith(advice)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_checkpoint_that_was_cut_off_is_passed_over(
    epoch: int, settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    """With one before it the run goes on from there; with none it begins anew."""
    whole = settings("classification", data("classification"), epochs=3.0)
    finetune(whole, device="cpu")
    broken = settings("classification", data("classification"), epochs=3.0, output=f"{tmp_path}/2")
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, device="cpu", callbacks=[StopAfterEpoch(epoch)])
    (tmp_path / "2" / "checkpoints" / f"checkpoint-{2 * epoch}" / "trainer_state.json").unlink()
    finetune(broken, device="cpu", resume=True)
    expected, actual = (load_file(f"{run.output}/model.safetensors") for run in (whole, broken))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_run_that_cannot_resume_ends_alike_and_keeps_the_best_weights_alone(
    settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"epochs": 4.0, "learning_rate": 0.02}
    whole = finetune(settings("classification", data("classification"), **options), device="cpu")
    lean = settings("classification", data("classification"), output=f"{tmp_path}/2", **options)

    class Look(TrainerCallback):
        names: ClassVar[set[str]] = set()

        def on_epoch_begin(self, args: Any, *_: Any, **__: Any) -> None:
            self.names |= {path.name for path in Path(args.output_dir).rglob("*")}

    result = finetune(lean, device="cpu", resumable=False, callbacks=[Look()])
    assert result.metrics == whole.metrics
    weights = [load_file(run.directory / "model.safetensors") for run in (whole, result)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    assert "model.safetensors" in Look.names
    assert "optimizer.pt" not in Look.names


def test_a_loss_that_is_no_number_ends_the_run(settings: Make, data: Callable[..., Path]) -> None:
    run = settings("classification", data("classification"), learning_rate=1e30, epochs=3.0)
    # The next loss says so, or the evaluation that comes before it.
    message = r"(loss|模型输出) 不再是有限的数。请降低 learning_rate（现在是 1e\+30）"
    with pytest.raises(PlugError, match=message):
        finetune(run, device="cpu")


def test_a_finished_run_is_not_overwritten(settings: Make, data: Callable[..., Path]) -> None:
    run = settings("classification", data("classification"))
    finetune(run, device="cpu")
    for resume in (False, True):
        with pytest.raises(UsageError, match="已有一次完成的训练"):
            finetune(run, device="cpu", resume=resume)
    (output := Path(run.output) / "checkpoints").mkdir()  # stopped before it removed them
    for content in ("{", "[1]"):
        (output.parent / "metrics.json").write_text(content)
        with pytest.raises(PlugError, match=r"metrics\.json"):
            finetune(run, device="cpu", resume=True)


def test_the_best_epoch_is_kept(settings: Make, data: Callable[..., Path]) -> None:
    run = settings("classification", data("classification"), epochs=4.0, learning_rate=0.02)
    result = finetune(run, device="cpu")
    log = [json.loads(line) for line in (result.directory / "log.jsonl").read_text().splitlines()]
    scores = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    assert len(scores) == 4
    assert result.metrics["accuracy"] == max(scores)


def test_patience_ends_a_run_that_does_not_get_better(
    settings: Make, data: Callable[..., Path]
) -> None:
    run = settings(
        "classification", data("classification"), epochs=9.0, learning_rate=1e-12, patience=1
    )
    result = finetune(run, device="cpu")
    log = (result.directory / "log.jsonl").read_text().splitlines()
    assert sum("eval_accuracy" in line for line in log) == 2


def test_r_drop_fgm_and_scratch_run_and_change_the_outcome(
    settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    weights = []
    changed = [
        {}, {"r_drop": 1.0}, {"label_smoothing": 0.2}, {"r_drop": 1.0, "label_smoothing": 0.2},
        {"fgm": 1.0}, {"from_scratch": True}, {"seed": 2},
    ]  # fmt: skip
    for number, changes in enumerate(changed):
        run = settings(
            "classification", data("classification"), output=f"{tmp_path}/{number}", **changes
        )
        finetune(run, device="cpu")
        weights.append(
            load_file(f"{run.output}/model.safetensors")["encoder.layers.0.feed_forward.fc1.weight"]
        )
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("classification", {}),
        ("classification", {"r_drop": 1.0}),
        ("labelling", {"label_smoothing": 0.1}),
        ("reading", {}),
        ("generation", {}),
    ],
)
def test_an_example_counts_alike_in_a_batch_that_is_not_full(
    task: str, changes: dict[str, float], settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    """Twenty examples: steps of 12 and 8 at once, or of batches of 6 and 6, then 6 and 2."""
    norms = []
    for size, count in ((12, 1), (6, 2)):
        run = settings(
            task, data(task), batch_size=size, gradient_accumulation_steps=count, **changes,
            output=str(tmp_path / str(size)),
        )  # fmt: skip
        finetune(run, device="cpu")
        lines = map(json.loads, Path(run.output, "log.jsonl").read_text().splitlines())
        norms.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
    assert len(norms[0]) == 2
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.2}], ids=["plain", "smoothed"])
def test_two_processes_take_the_step_of_one(
    changes: dict[str, float],
    settings: Make,
    write_lines: Callable[..., Path],
    run_together: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    """Each token has the same weight, whichever process its text is in and however long that is.

    The second process finds nothing to object to before the first one has looked at the output.
    """
    rows = [{"src_txt": "花", "tgt_txt": "山上有座庙"[: 1 + number % 5]} for number in range(8)]
    run = settings("generation", write_lines("rows.jsonl", rows), batch_size=8, **changes)
    finetune(run, device="cpu")
    two = replace(run, batch_size=4, output=str(tmp_path / "two"))
    words = [*shlex.split(two.command())[1:], "--device", "cpu"]
    ran = run_together(2, "command", arguments=words, first_is_late=2.0)
    assert [each["status"] for each in ran] == [0, 0], ran
    first, second = (
        json.loads(Path(output, "log.jsonl").read_text().splitlines()[0])
        for output in (run.output, two.output)
    )
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_texts_that_are_not_read_to_their_end_are_counted(
    task: str, settings: Make, write_lines: Callable[..., Path]
) -> None:
    """Sources of 13 to 16 tokens with [CLS] and [SEP], of which 16 are read."""
    names = {"classification": ("text", "label"), "generation": ("src_txt", "tgt_txt")}[task]
    texts = ["山" * length for length in (13, 14, 15, 16)]
    rows = [dict(zip(names, (text, "花庙"[i % 2]), strict=True)) for i, text in enumerate(texts)]
    run = settings(task, write_lines("long.jsonl", rows), source_length=16)

    told = finetune(run, device="cpu").facts["train_notes"]

    assert "source_length=16" in told
    assert "2 处（如" in told
    assert "第 3 行" in told


def test_transformers_loads_the_result(settings: Make, data: Callable[..., Path]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = finetune(settings("classification", data("classification")), device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(result.directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.directory)
    text = "今天气很好"
    with torch.no_grad():
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
    found = Predictor(result.directory, "cpu").predict_text(text)
    assert model.config.id2label[int(probabilities.argmax())] == found["label"]
    assert float(probabilities.max()) == pytest.approx(found["probability"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_pipeline_of_transformers_finds_the_entities_that_predict_finds(
    settings: Make, data: Callable[..., Path]
) -> None:
    from transformers import pipeline

    run = settings("labelling", data("labelling", 10), epochs=4.0)
    result = finetune(run, device="cpu")
    text = "今天气很好，我们"  # 今天 is one piece of the tokenizer, and was two tokens in training
    find = pipeline(
        "token-classification", model=str(result.directory), aggregation_strategy="simple"
    )

    theirs = [(each["start"], each["end"], each["entity_group"]) for each in find(text)]

    found = Predictor(result.directory, "cpu").predict_text(text)["entities"]
    assert found
    assert theirs == [(each["start"], each["end"], each["type"]) for each in found]


def test_going_on_from_another_task_s_model_is_refused(
    settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    first = finetune(settings("classification", data("classification")), device="cpu")
    again = {"model": str(first.directory), "output": f"{tmp_path}/2"}
    with pytest.raises(UsageError, match="是为 classification 微调过的模型"):
        finetune(settings("labelling", data("labelling"), **again), device="cpu")
    finetune(settings("classification", data("classification"), **again), device="cpu")


BAD_DATA = [
    ("tnews", [{"sentence": "好", "label": "100"}, {"sentence": "坏", "label": "999"}],
     "第 2 行的标签 '999' 不在标签表里"),
    ("classification", [{"text": "好", "label": "1"}], "只有 1 个例子，至少要 2 个"),
    ("classification", [{"text": "好", "label": "1"}] * 2, "只有一种标签"),
    ("generation", [{"src_txt": "山", "tgt_txt": "山" * 17}] * 2,
     "第 1 行要生成的文字有 18 个词元，超过上限 target_length=16（共 2 例如此）.*-length 18"),
    ("cluener2020", [{"text": "甲", "label": {"x": {"甲": [[0, 0]]}}}] * 2, "'B-x'.*不在标签表里"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "rows", "complaint"), BAD_DATA)
def test_bad_data_is_told_before_anything_is_made(
    task: str,
    rows: list[Any],
    complaint: str,
    settings: Make,
    write_lines: Callable[..., Path],
) -> None:
    run = settings(task, write_lines("train.json", rows))
    with pytest.raises(UsageError, match=complaint):
        finetune(run, device="cpu")
    assert not Path(run.output).exists()


def test_an_eval_label_that_training_never_saw_is_told(
    settings: Make, data: Callable[..., Path], write_lines: Callable[..., Path]
) -> None:
    other = write_lines("eval.jsonl", [{"text": "好", "label": "春"}])
    run = settings("classification", data("classification"), eval=str(other))
    with pytest.raises(UsageError, match=r"eval.jsonl 第 1 行的标签 '春' 不在标签表里"):
        finetune(run, device="cpu")


def test_an_output_that_holds_something_else_is_left_alone(
    settings: Make, data: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("x")
    for output, complaint in (("mine", "有别的东西"), ("mine/letter.txt", "是一个文件")):
        run = settings("classification", data("classification"), output=str(tmp_path / output))
        with pytest.raises(UsageError, match=complaint):
            finetune(run, device="cpu")
    with pytest.raises(UsageError, match="没有可以接着进行的训练"):
        finetune(settings("classification", data("classification")), device="cpu", resume=True)


def test_weights_that_are_missing_are_told(
    settings: Make, data: Callable[..., Path], base_model: Path
) -> None:
    from safetensors.torch import save_file

    path = base_model / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layers.1.feed_forward.fc1.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(PlugError, match=r"缺少权重.*encoder.layers.1.feed_forward.fc1.weight"):
        finetune(settings("classification", data("classification")), device="cpu")


def test_lengths_the_model_has_no_positions_for(settings: Make, data: Callable[..., Path]) -> None:
    for task, changes in (
        ("classification", {"source_length": 97}),
        ("classification", {"source_length": 8}),
        ("generation", {"target_length": 97}),
    ):
        with pytest.raises(UsageError, match=r"应在 .* 到 96 之间"):
            finetune(settings(task, data(task), **changes), device="cpu")


def test_a_vocabulary_that_has_the_characters_is_not_warned_of() -> None:
    text, simplified = "這是一個繁體中文的句子。", "这是一个简体中文的句子。"
    shipped: Any = load_tokenizer(find_model_directory())
    whole: Any = SimpleNamespace(encode=lambda each: [ord(character) for character in each])
    assert is_cut_into_bytes(text, shipped)
    assert not is_cut_into_bytes(text, whole)
    assert not is_cut_into_bytes(simplified, shipped)


def test_traditional_examples_are_counted_in_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = ["后来，他们决定离开这里。", "後來，他們決定離開這裡。", "這是一個句子。"]
    examples = [
        ClassificationExample(text_a=text, label="x", place=f"a.csv 第 {line} 行")
        for line, text in enumerate(texts, 1)
    ]
    notes = Notes()

    _note_traditional(examples, load_tokenizer(find_model_directory()), notes)

    [line] = notes.lines()
    assert "opencc -c t2s）：2 处（如 a.csv 第 2 行）" in line
    assert [record.getMessage() for record in caplog.records] == [line]
