"""Settings: every wrong value is a usage error that names the setting, and so is an unknown one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plug.errors import UsageError
from plug.options import parse_assignments
from plug.pretraining.settings import RunConfig

NAN, INF = float("nan"), float("inf")

Settings = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 0) for name in ("steps", "batch_tokens", "micro_batch_tokens", "log_every")],
        *[(name, -1) for name in ("steps", "checkpoint_every", "workers", "seed")],
        *[(name, 1.5) for name in ("steps", "workers", "seed")],
        *[(name, "3") for name in ("steps", "learning_rate", "dropout")],
        *[(name, True) for name in ("steps", "learning_rate", "seed")],
        *[(name, value) for name in ("learning_rate", "clip_grad_norm") for value in (0, -1.0)],
        *[
            (name, value)
            for name in ("warmup_fraction", "mlm_fraction", "whole_sentence_share")
            for value in (-0.1, 1.1, NAN)
        ],
        *[(name, value) for name in ("mlm_rate", "shuffle_rate", "dropout") for value in (-1, 2)],
        *[
            (name, value)
            for name in ("learning_rate", "weight_decay", "domain_exponent", "clip_grad_norm")
            for value in (NAN, INF, -0.5)
        ],
        ("domain_exponent", 1000.0),
        ("seed", 2**31),
        ("seed", 2**70),
        ("betas", [0.9]),
        ("betas", [0.9, 0.99, 0.999]),
        ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]),
        ("betas", [NAN, 0.9]),
        ("betas", ["a", "b"]),
        ("betas", 0.9),
        ("model", 3),
        ("model", [1]),
        ("domain_factors", [1.0]),
        ("domain_factors", {"a": -1.0}),
        ("domain_factors", {"a": NAN}),
        ("domain_factors", {"a": "2"}),
        ("preset", "huge"),
        ("preset", 3),
        ("precision", "fp16"),
        ("optimizer", "sgd"),
        ("schedule", "step"),
        ("compile", "yes"),
        ("sentence_objective", 1),
        ("corpus", 1),
        ("output", ["a"]),
    ],
)
def test_wrong_values(name: str, value: object, settings: Settings) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        settings(**{name: value})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "shapes",
    [
        [],
        "64",
        3,
        [64],
        [[64]],
        [[64, 64, 1.0]],
        [[7, 1.0]],
        [[64.0, 1.0]],
        [[64, 0]],
        [[64, -1.0]],
        [[64, NAN]],
        [[64, "a"]],
        [["64", 1.0]],
        [[64, True]],
        [[64, 1.0], [64, 2.0]],
    ],
)
def test_wrong_shapes(shapes: Any, settings: Settings) -> None:
    with pytest.raises(UsageError, match="shapes"):
        settings(shapes=shapes).parsed_shapes(1)


def test_shapes_of_both_stages(settings: Settings) -> None:
    assert settings(shapes=[[64, 1], [96, 0.5]]).parsed_shapes(1) == [((64,), 1.0), ((96,), 0.5)]
    assert settings(shapes=[[64, 32, 2.0]]).parsed_shapes(2) == [((64, 32), 2.0)]
    with pytest.raises(UsageError, match="源长度"):
        settings(shapes=[[64, 1.0]]).parsed_shapes(2)


# --- files -----------------------------------------------------------------------------------

GOOD = """
corpus = "build/corpus"
output = "runs/a"
steps = 10
shapes = [[64, 1]]
batch_tokens = 2048
learning_rate = 1
model = { hidden_size = 128, num_hidden_layers = 3 }
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        (tmp_path / "a.toml").write_text(content, encoding="utf-8")
        return tmp_path / "a.toml"

    return write


def test_a_file_withparse_assignments(file: Callable[[str], Path]) -> None:
    assignments = [
        "steps=20",
        "schedule=cosine",
        "output = runs/b c",
        "betas=[0.8, 0.9]",
        "model.hidden_size=64",
        "model.intermediate_size=256",
        "compile=true",
        "learning_rate=2e-3",
    ]
    config = RunConfig.from_file(file(GOOD), parse_assignments(assignments))
    assert config.steps == 20
    assert config.schedule == "cosine"
    assert config.output == "runs/b c"
    assert config.betas == [0.8, 0.9]
    assert config.model == {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 256}
    assert config.compile is True
    assert config.learning_rate == 0.002
    assert config.corpus == "build/corpus"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "stpes = 3\n", r"不认识的设置 \['stpes'\]"),
        (GOOD.replace("steps = 10\n", ""), r"缺少设置 \['steps'\]"),
        (GOOD + "steps = 11\n", "不是有效的 TOML"),
        ("steps = ", "不是有效的 TOML"),
        (GOOD.replace("10", '"10"'), "steps"),
        (GOOD + "precision = 2021-01-01\n", "precision"),
    ],
)
def test_wrong_files(content: str, message: str, file: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig.from_file(file(content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml 不存在"):
        RunConfig.from_file(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="不是有效的 TOML"):
        RunConfig.from_file(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "应写成 名字=值"),
        ("=3", "不认识的设置"),
        ("stpes=3", "不认识的设置"),
        ("steps=many", "steps='many'"),
        ("steps=", "steps=''"),
        ("compile=True", "compile='True'"),
    ],
)
def test_wrong_overrides(assignment: str, message: str, file: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig.from_file(file(GOOD), parse_assignments([assignment]))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*-stage?.toml"))
)
def test_the_configs_we_give_are_good(path: Path) -> None:
    config = RunConfig.from_file(path)
    shapes = config.parsed_shapes(dimensions=1 if "stage1" in path.name else 2)
    assert all(sum(shape) <= config.batch_tokens for shape, _ in shapes)
