"""Every reader on a small file in its published format, and on broken ones."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plug.errors import PlugError, UsageError
from plug.finetuning.readers import GenerationExample, LabellingExample, read_labelling
from plug.finetuning.rows import read_rows
from plug.finetuning.tasks import TASKS, find_task, read_examples
from plug.textfiles import Notes

SQUAD = {
    "version": "v1.0",
    "data": [
        {
            "title": "",
            "paragraphs": [
                {
                    "context": "山上有座庙，庙里有花。",
                    "qas": [
                        {
                            "question": "庙里有什么？",
                            "id": "Q1",
                            "answers": [
                                {"text": "花", "answer_start": 9},
                                {"text": "有花", "answer_start": 8},
                            ],
                        },
                        {
                            "question": "哪里有庙？",
                            "id": "Q2",
                            "answers": [{"text": "山上", "answer_start": 7}],
                        },
                    ],
                }
            ],
        }
    ],
}


def read(name: str, path: Path, answered: bool = True) -> list[Any]:
    return read_examples(find_task(name), path, answered=answered)


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        (
            "afqmc",
            {"sentence1": "花呗提额", "sentence2": "提花呗额度", "label": "0"},
            ("花呗提额", "提花呗额度", "0", ""),
        ),
        (
            "tnews",
            {"label": "102", "label_desc": "news_entertainment", "sentence": "甜甜圈"},
            ("甜甜圈", None, "102", "news_entertainment"),
        ),
        (
            "iflytek",
            {"label": "11", "label_des": "薅羊毛", "sentence": "返利"},
            ("返利", None, "11", "薅羊毛"),
        ),
        (
            "ocnli",
            {"sentence1": "甲", "sentence2": "乙", "label": "neutral", "genre": "tv", "id": 7},
            ("甲", "乙", "neutral", ""),
        ),
        (
            "csl",
            {"id": 1, "abst": "摘要。", "keyword": ["磨齿", "误差"], "label": 1},
            ("磨齿；误差", "摘要。", "1", ""),
        ),
        (
            "cluewsc2020",
            {
                "target": {
                    "span1_text": "洋人", "span1_index": 2, "span2_text": "他们", "span2_index": 6,
                },
                "idx": 1,
                "label": "true",
                "text": "这些洋人好。他们高。",
            },
            ("这些[洋人]好。_他们_高。", None, "true", ""),
        ),
        ("classification", {"text": "好", "label": 3}, ("好", None, "3", "")),
        ("classification", {"text_a": "一", "text_b": "二", "label": "是"}, ("一", "二", "是", "")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["dev.json", "dev.jsonl.gz"])
def test_classification_sets(
    task: str, row: dict[str, Any], expected: tuple[str | None, ...], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    line = json.dumps(row, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    (example,) = read(task, path)
    assert (example.text_a, example.text_b, example.label, example.label_name) == expected
    assert example.place == f"{path} 第 1 行"


def test_ocnli_without_agreement_is_skipped(write_lines: Callable[..., Path]) -> None:
    rows = [{"sentence1": "甲", "sentence2": "乙", "label": label} for label in ("-", "neutral")]
    assert [example.label for example in read("ocnli", write_lines("a.json", rows))] == ["neutral"]


def test_csv_and_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"好，\n很好",1\n坏,0\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text("text\tlabel\n好\t1\n坏\t\n", encoding="utf-8")
    assert [e.text_a for e in read("classification", tmp_path / "a.csv")] == ["好，\n很好", "坏"]
    rows = [row for _, row in read_rows(tmp_path / "a.tsv")]
    assert rows == [{"text": "好", "label": "1"}, {"text": "坏", "label": ""}]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"tokens": [["山", "上"]], "tags": [["O", "B-X"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (example,) = read("labelling", tmp_path / "a.parquet")
    assert (example.tokens, example.tags) == (("山", "上"), ("O", "B-X"))


def test_cluener_spans_become_tags(write_lines: Callable[..., Path]) -> None:
    row = {
        "text": "温格胜曼联和曼联",
        "label": {"name": {"温格": [[0, 1]]}, "organization": {"曼联": [[3, 4], [6, 7]]}},
    }
    (example,) = read("cluener2020", write_lines("dev.json", [row]))
    name, team = ["B-name", "I-name"], ["B-organization", "I-organization"]
    assert list(example.tags) == [*name, "O", *team, "O", *team]


def test_peoples_daily(tmp_path: Path) -> None:
    path = tmp_path / "dev.txt"
    path.write_text("中 B-ORG\n共 I-ORG\n\n\n致 O\n", encoding="utf-8")
    assert read("people_daily_ner", path) == [
        LabellingExample(
            tokens=("中", "共"), tags=("B-ORG", "I-ORG"), place=f"{path} 第 1 行起的句子"
        ),
        LabellingExample(tokens=("致",), tags=("O",), place=f"{path} 第 5 行起的句子"),
    ]


def test_squad_as_reading(write_lines: Callable[..., Path]) -> None:
    first, second = read("cmrc2018", write_lines("dev.json", [SQUAD]))
    assert (first.question, first.answers, first.start) == ("庙里有什么？", ("花", "有花"), 9)
    assert second.start == 0  # the file says 7, where the answer does not stand


def test_squad_as_question_generation(write_lines: Callable[..., Path]) -> None:
    first, _ = read("dureader_robust_qg", write_lines("dev.json", [SQUAD]))
    assert (first.source, first.target) == (("花", "山上有座庙，庙里有花。"), "庙里有什么？")


def test_kbqa(tmp_path: Path) -> None:
    path = tmp_path / "dev.txt"
    path.write_text(
        "<question id=1>\t谁写的？\n<triple id=1>\t红楼梦 ||| 作者 ||| 曹雪芹\n"
        "<answer id=1>\t曹雪芹\n==================\n"
        "<question id=2>\t几时？\n<triple id=2>\t甲 ||| 时间 ||| \n<answer id=2>\n====\n",
        encoding="utf-8",
    )
    examples = read("kbqg", path)
    assert [(e.source, e.target) for e in examples] == [
        (("红楼梦 ||| 作者 ||| 曹雪芹",), "谁写的？"),
        (("甲 ||| 时间 |||",), "几时？"),
    ]


def test_kgclue_and_own_pairs(write_lines: Callable[..., Path]) -> None:
    row = {"id": 0, "question": "问？", "answer": "甲 ||| 乙 ||| 丙"}
    (example,) = read("kgclue", write_lines("a.json", [row]))
    assert (example.source, example.target) == (("甲 ||| 乙 ||| 丙",), "问？")
    row = {"src_txt": "花[SEP]山上有花", "tgt_txt": "有什么？"}
    (example,) = read("generation", write_lines("b.jsonl", [row]))
    assert (example.source, example.target) == (("花", "山上有花"), "有什么？")


def test_files_to_predict_need_no_answers(write_lines: Callable[..., Path]) -> None:
    assert read("tnews", write_lines("a.json", [{"id": 3, "sentence": "题"}]), False)[0].id == 3
    assert read("cluener2020", write_lines("b.json", [{"text": "温格"}]), False)[0].tags is None
    (example,) = read("generation", write_lines("c.json", [{"src_txt": "甲"}]), False)
    assert example == GenerationExample(source=("甲",), place=example.place)


def test_a_folder_is_a_datasets_name(write_lines: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_lines("set/train.jsonl", [{"text": "好", "label": "1"}])
    assert read("classification", Path(f"{tmp_path}/set:train"))[0].text_a == "好"


def test_a_split_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"是目录。请给出其中的文件，或写 .*:train"):
        read("classification", tmp_path)
    with pytest.raises(UsageError, match=r"没有文件 nothing。要用 datasets .*nothing:train"):
        read("classification", Path("nothing"))


# --- one certain reading, or a refusal ---------------------------------------------------------


def test_quotation_marks_mean_nothing_in_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"很好用\t好评\n"真香"他说\t差评\n', encoding="utf-8")
    rows = [(e.text_a, e.label) for e in read("classification", path)]
    assert rows == [('"很好用', "好评"), ('"真香"他说', "差评")]


def test_csv_follows_rfc_4180(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('text,label\r\n"他说""好"",\r\n走了",1\r\n5寸"屏,0\r\n'.encode())
    examples = read("classification", path)
    assert [e.text_a for e in examples] == ['他说"好",\n走了', '5寸"屏']
    assert [e.place for e in examples] == [f"{path} 第 2 行", f"{path} 第 4 行"]


def test_a_header_in_the_middle_is_no_example(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.csv", Notes()
    path.write_text("text,label\n好,1\n\ufefftext,label\n坏,0\n", encoding="utf-8")
    examples = read_examples(find_task("classification"), path, answered=True, notes=notes)
    assert [e.text_a for e in examples] == ["好", "坏"]
    assert "跳过了重复的表头：1 处" in notes.lines()[1]


@pytest.mark.parametrize(
    ("label", "expected"),
    [(1, "1"), (1.0, "1"), ("1", "1"), (True, "true"), (" 好 ", "好"), (-1, "-1")],
)
def test_labels_of_many_types(
    label: object, expected: str, write_lines: Callable[..., Path]
) -> None:
    (example,) = read("classification", write_lines("a.jsonl", [{"text": "好", "label": label}]))
    assert example.label == expected


@pytest.mark.parametrize("label", [[], ["好"], {"a": 1}, float("nan"), float("inf"), 0.5, "\ud800"])
def test_what_is_no_label(label: object, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "好", "label": label}))
    with pytest.raises(PlugError, match=r"第 1 行(的标签应是文字或整数| 里有.*不是有限的数)"):
        read("classification", tmp_path / "a.jsonl", False)


def test_minus_is_a_label_but_of_pairs(write_lines: Callable[..., Path]) -> None:
    rows = [{"text": "好", "label": "-"}, {"text": "坏", "label": "+"}]
    assert [e.label for e in read("classification", write_lines("a.jsonl", rows))] == ["-", "+"]
    pairs = [{"text_a": "好", "text_b": "坏", "label": "-"}]
    with pytest.raises(UsageError, match="在 NLI 数据里这表示没有一致的标签"):
        read("classification", write_lines("b.jsonl", pairs))
    assert len(read("classification", write_lines("b.jsonl", pairs), False)) == 1


def test_blank_tokens_and_marks_of_column_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(
        "北\tB-LOC\n京\tI-LOC\n\u200b\n\ufeff上 B-LOC \r\n  O\n\u3000 O\n海 B-LOC\n",
        encoding="utf-8",
    )
    first, second = read("people_daily_ner", path)
    assert (first.tokens, first.tags) == (("北", "京"), ("B-LOC", "I-LOC"))
    assert second.tokens == ("上", " ", "\u3000", "海")
    assert second.tags == ("B-LOC", "O", "O", "B-LOC")


@pytest.mark.parametrize(
    "row",
    [
        {"tokens": ["一"], "tags": [1]},
        {"tokens": ["一"], "tags": "1"},
        {"tokens": ["一"], "tags": [None, "O"]},
        {"tokens": ["一"], "tags": {"a": 1}},
        {"tokens": ["一", None], "tags": ["O", "O"]},
        {"tokens": ["一", "二", "三"], "tags": ["O", "O"]},
        {"tokens": 5, "tags": ["O"]},
        {"tokens": "['一' '二']", "tags": "['O' 'O']"},  # an array of numpy
        {"tokens": "['一', '二']", "tags": "[0, 1]"},
        {"tokens": "['一', '二']", "tags": "[0 1]"},
        {"tokens": "[]", "tags": "[]"},
        {"tokens": "一,二", "tags": "B-A,I-A"},
    ],
)
def test_what_are_no_tokens_and_tags(row: dict[str, Any], write_lines: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="第 1 行"):
        read("labelling", write_lines("a.jsonl", [row]))


@pytest.mark.parametrize("write", [str, json.dumps])
def test_lists_that_a_table_holds_as_text(write: Callable[[Any], str], tmp_path: Path) -> None:
    rows = [(["'", '"', "\\", ","], ["O", "B-人", "I-人", "O"]), (["北", " "], ["B-地", "O"])]
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("tokens", "tags"), *((write(a), write(b)) for a, b in rows)])
    notes = Notes()

    found = list(read_labelling(path, notes))

    assert [([*each.tokens], [*(each.tags or ())]) for each in found] == rows
    assert "读作列表：4 处" in notes.lines()[0]


def test_tokens_between_blanks_may_be_brackets(write_lines: Callable[..., Path]) -> None:
    rows = [{"tokens": "[ 注 ]", "tags": "O O O"}, {"tokens": "[1] 见 [2]", "tags": "O O O"}]
    found = read("labelling", write_lines("a.jsonl", rows))
    assert [each.tokens for each in found] == [("[", "注", "]"), ("[1]", "见", "[2]")]


@pytest.mark.parametrize("form", ["dataset", "parquet"])
def test_names_of_a_class_label_stand_for_its_numbers(form: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kind = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    features = datasets.Features(
        {"tokens": [datasets.Value("string")], "ner_tags": datasets.Sequence(kind), "label": kind}
    )
    rows = {
        "tokens": [["李", "雷", "在"], ["山"]],
        "ner_tags": [[1, 2, 0], [-1]],
        "label": [2, -1],
    }
    path = tmp_path / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    source = path if form == "parquet" else Path(f"{tmp_path}:train")

    found = [row for _, row in read_rows(source)]
    assert [row["label"] for row in found] == ["I-X", None]
    examples = read("labelling", source, False)
    assert [e.tags for e in examples] == [("B-X", "I-X", "O"), None]
    with pytest.raises(UsageError, match="没有答案（tags）"):
        read("labelling", source)


def test_tables_are_not_left_to_datasets(write_lines: Callable[..., Path], tmp_path: Path) -> None:
    write_lines("train.csv", [])
    with pytest.raises(UsageError, match=r"是表格文件，请直接给出文件，如 .*train.csv"):
        read("classification", Path(f"{tmp_path}:train"))


def squad(context: str, *answers: object, **more: object) -> dict[str, Any]:
    question = {"id": "Q", "question": "何处？", "answers": list(answers), **more}
    return {"data": [{"paragraphs": [{"context": context, "qas": [question]}]}]}


@pytest.mark.parametrize(
    ("start", "expected"),
    [(0, 0), (1, 0), (7, 6), (8, 9), (9, 9), (99, 9), ("6", 6), (6.0, 6), (None, None), (-1, None)],
)
def test_the_nearest_place_of_an_answer_counts(
    start: object, expected: int | None, write_lines: Callable[..., Path]
) -> None:
    """花 stands at 0, 6 and 9."""
    document = squad("花开了，好多花又是花", {"text": "花", "answer_start": start})
    (example,) = read("reading", write_lines("a.json", [document]))
    assert (example.start, example.answers) == (expected, ("花",))


def test_an_answer_that_stands_midway_between_two_places_is_not_learnt(
    write_lines: Callable[..., Path],
) -> None:
    notes = Notes()
    document = squad("花花世界花花", {"text": "世", "answer_start": 1}, {"text": "x"})
    document["data"] += squad("花山花", {"text": "花", "answer_start": 1})["data"]
    document["data"][1]["paragraphs"][0]["qas"][0]["id"] = "R"
    path = write_lines("a.json", [document])
    first, second = read_examples(find_task("reading"), path, answered=True, notes=notes)
    assert (first.start, second.start) == (2, None)
    assert notes.lines() == [
        f"答案的位置不对，改为最近的一处：1 处（如 {path} 的问题“Q”）。",
        f"答案的位置不对，前后两处一样近，不用来训练：1 处（如 {path} 的问题“R”）。",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "花", "answer_start": True},
        {"text": "花", "answer_start": 1.5},
        {"text": "花", "answer_start": "six"},
        {"text": None, "answer_start": 0},
        {"text": ["花"], "answer_start": 0},
        {"text": "", "answer_start": 0},
        "花",
    ],
)
def test_what_is_no_answer(answer: object, write_lines: Callable[..., Path]) -> None:
    with pytest.raises(PlugError, match="问题“Q”"):
        read("reading", write_lines("a.json", [squad("花开了", answer)]))


def test_answers_as_datasets_writes_them(write_lines: Callable[..., Path]) -> None:
    document = squad("花开了")
    (question,) = document["data"][0]["paragraphs"][0]["qas"]
    question["answers"] = {"text": [" 开了 "], "answer_start": [0]}
    (example,) = read("reading", write_lines("a.json", [document]))
    assert (example.answers, example.start) == (("开了",), 1)
    question["is_impossible"] = True
    with pytest.raises(UsageError, match="问题“Q”没有答案"):
        read("reading", write_lines("b.json", [document]))


def test_two_questions_of_one_name_are_refused(write_lines: Callable[..., Path]) -> None:
    document = squad("花开了", {"text": "花", "answer_start": 0})
    document["data"] += squad("花落了", {"text": "花", "answer_start": 0})["data"]
    with pytest.raises(UsageError, match="两个不同的问题都叫 Q"):
        read("reading", write_lines("a.json", [document]))


def test_a_column_file_is_converted_from_its_scheme(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.txt", Notes()
    path.write_text("北 B-LOC\n京 E-LOC\n人 O\n\n我 S-PER\n", encoding="utf-8")
    first, second = read_examples(find_task("people_daily_ner"), path, answered=True, notes=notes)
    assert (first.tags, second.tags) == (("B-LOC", "I-LOC", "O"), ("B-PER",))
    assert first.scheme == "BIOES"
    assert notes.lines() == [f"BIOES 标签换成了 BIO：1 处（如 {path} 第 1 行起的句子）。"]


BROKEN = [
    ("tnews", "a.json", '{"sentence": "好", "label": "100"}\n{"sente', "第 2 行 不是有效的 JSON"),
    ("tnews", "a.json", "[1]", "第 1 行应是一个 JSON 对象"),
    ("tnews", "a.json", '{"text": "好", "label": "100"}', "第 1 行没有“sentence”这一列"),
    ("tnews", "a.json", '{"sentence": "好"}', "第 1 行没有答案（label）"),
    ("tnews", "a.json", '{"sentence": " ", "label": "100"}', "“sentence”应是文字"),
    ("tnews", "a.json", "", "只有 0 个例子"),
    ("tnews", "a.xlsx", "x", "不认识的格式.*另存为“CSV UTF-8"),
    ("classification", "a.csv", "PK\3\4\0", "是 Excel 工作簿.*另存为“CSV UTF-8"),
    ("classification", "a.csv", "text;label\n好,1;1\n", "要用英文逗号，这里用的是 ';'"),
    ("classification", "a.csv", "text,label\n好,1,2\n", "第 2 行有 3 列"),
    ("classification", "a.csv", 'text,label\n好,1\n"坏,0\n差,0\n', "第 3 行起的引号没有配对"),
    ("classification", "a.csv", "text,label,text\n好,1,2\n", "表头里 .'text'.*出现了两次"),
    ("classification", "a.tsv", "text\tlabel\n好\n", "第 2 行有 1 列，表头却有 2 列"),
    ("classification", "a.csv", "好,1\n坏,0\n", "第 2 行没有“text”"),
    ("classification", "a.json", '{"text": "好", "text": "坏", "label": 1}', "有两个键 'text'"),
    ("classification", "a.json", '{"text": "\\ud800", "label": 1}', "“text”应是文字"),
    ("classification", "a.json", '{"text": "\\u200b", "label": 1}', "“text”应是文字"),
    ("classification", "a.json", '{"a": ' + "[" * 99999, "嵌套太深"),
    ("classification", "a.json", "[\n{}\n]", "若是数组，可用 jq"),
    ("people_daily_ner", "a.txt", "中 O\n O\n", "第 2 行应是“字 标签”两列"),
    ("people_daily_ner", "a.txt", "EU NNP B-NP B-ORG\n", "第 1 行应是“字 标签”两列"),
    ("cluener2020", "a.json", '{"text": "甲", "label": {"x": {"丙": [[0, 0]]}}}', "不是 '丙'"),
    ("kbqg", "a.txt", "<>\t甲\n", "第 1 行应是"),
    ("kbqg", "a.txt", "<triple id=1>\t甲\n<triple id=2>\t乙\n", "<triple> 在一段里出现两次"),
    ("generation", "a.json", '{"src_txt": "甲[SEP]", "tgt_txt": "乙"}', "有空的一段"),
    ("generation", "a.json", '{"src_txt": "甲", "tgt_txt": ["乙"]}', "“tgt_txt”应是文字"),
    ("classification", "a.csv", "txt,label\n好,1\n", "第 2 行没有“text”.*'txt'.*改名为 text,label"),
    ("classification", "a.csv", "text_a,label\n好,1\n", "没有“text_b”这一列.*改名为 text_b"),
    ("labelling", "a.jsonl", '{"tokens": ["一", "二"], "tags": ["O"]}', "2 个 tokens.*1 个"),
    ("people_daily_ner", "a.txt", "中 O\n国\n", "第 2 行应是“字 标签”两列"),
    ("cluener2020", "a.json", '{"text": "甲", "label": {"x": {"甲乙": [[0, 1]]}}}', "超出了 1 个"),
    ("cmrc2018", "a.json", '{"data": [', "a.json 不是有效的 JSON"),
    ("cmrc2018", "a.json", '{"data": [{}]}', "不是 SQuAD 格式"),
    ("kbqg", "a.txt", "你好\n====\n", "第 1 行应是“<question id=N>”"),
    (
        "cluewsc2020",
        "a.json",
        '{"text": "甲乙", "label": "true", "target": {"span1_text": "丙", "span1_index": 0}}',
        "span1_index=0 处不是 '丙'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "content", "complaint"), BROKEN)
def test_broken_files_say_where(
    task: str, name: str, content: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PlugError, match=complaint) as raised:
        read(task, tmp_path / name)
    assert name in str(raised.value)


def test_unknown_tasks_are_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"没有任务 'tnew'.*tnews"):
        find_task("tnew")


@pytest.mark.shared
@pytest.mark.parametrize("folder", ["afqmc", "cluewsc2020", "csl", "cluener2020", "kgclue", "drcd"])
def test_published_files_are_read_whole(folder: str, shared_data: Path) -> None:
    counts = {"afqmc": 2158, "cluewsc2020": 152, "csl": 547, "cluener2020": 672, "kgclue": 1000}
    (path,) = (shared_data / "tasks" / folder).glob("dev.*")
    examples = read(folder, path)
    assert len(examples) == counts.get(folder, 1902)  # the data's README
    labels = set(TASKS[folder].labels)
    assert {e.label for e in examples if hasattr(e, "label")} <= labels
    assert {tag for e in examples if hasattr(e, "tags") for tag in e.tags} <= labels
