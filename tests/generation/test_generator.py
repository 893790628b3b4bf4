from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import plug
from plug.errors import UsageError
from plug.generation.generator import GenerationResult, Generator, generate
from plug.generation.settings import GenerationSettings
from plug.loading.save import save
from plug.model.plug import Plug
from plug.tokenization import PlugTokenizer

TEXTS = ["山上有座庙", "今天天气很好，我们去公园看花。", "😀好", "我" * 60]
MODES: list[dict[str, Any]] = [
    {"do_sample": False},
    {"temperature": 1.5, "top_k": 50},
    {"temperature": 1.1, "top_k": 0, "top_p": 0.7},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": 5},
    {"num_beams": 3, "min_length": 0},
    {"num_beams": 3, "no_repeat_ngram_size": 2},
    {"mode": "original", "temperature": 3.0, "top_k": 0, "window": 7},
]


def key(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.token_ids, result.finish_reason, result.prompt_token_count


def end_with(token_id: int, generator: Generator) -> None:
    """Another token takes the place of [SEP], which random models hardly write."""
    generator.config = dataclasses.replace(generator.config, eos_token_id=token_id)
    generator.engine.config = generator.config


@pytest.mark.parametrize("options", MODES, ids=str)
def test_a_batch_of_n_is_n_single_runs(options: dict[str, Any], generator: Generator) -> None:
    options = {"out_length": 25, "seed": [5, 6, 7, 8], "model": generator, **options}
    end_with(generate(TEXTS[0], **options | {"seed": 5}).token_ids[21], generator)

    together = generate(TEXTS, **options)
    in_two = generate(TEXTS, batch_size=3, **options)
    seeds = options.pop("seed")
    alone = [generate(text, seed=seed, **options) for text, seed in zip(TEXTS, seeds, strict=True)]

    assert [key(each) for each in together] == [key(each) for each in alone]
    assert [key(each) for each in in_two] == [key(each) for each in alone]
    assert len({each.text for each in together}) == len(TEXTS)
    assert len({len(each.token_ids) for each in together}) > 1, "all ended together: no test"


def test_the_seed_of_a_result_gives_it_again(generator: Generator) -> None:
    first = generate("山上", model=generator, out_length=20, temperature=2.0)

    again = generate("山上", model=generator, out_length=20, temperature=2.0, seed=first.seed)
    other = generate("山上", model=generator, out_length=20, temperature=2.0)

    assert again.text == first.text
    assert other.text != first.text


@pytest.mark.parametrize("options", MODES, ids=str)
def test_what_is_shown_piece_by_piece_is_the_text(
    options: dict[str, Any], generator: Generator
) -> None:
    shown = ["", "", "", ""]

    def on_text(row: int, piece: str) -> None:
        shown[row] += piece

    results = generate(
        TEXTS, model=generator, out_length=25, seed=1, batch_size=3, on_text=on_text, **options
    )

    assert shown == [each.text for each in results]


def test_the_text_is_shown_while_it_is_written(generator: Generator) -> None:
    shown: list[int] = []
    steps = 0
    decode = generator.engine.decode

    def counted(*inputs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return decode(*inputs)

    generator.engine.decode = counted  # type: ignore[method-assign]
    generate("山上", model=generator, out_length=20, seed=1, on_text=lambda *_: shown.append(steps))

    assert shown[0] < 10


def test_out_length_may_exceed_windows_and_positions(generator: Generator) -> None:
    result = generate("山上", model=generator, out_length=250, min_length=250, seed=0)

    assert len(result.token_ids) == 250
    assert result.finish_reason == "length"
    assert not generator.tokenizer.special_ids & set(result.token_ids)


def test_the_models_own_end_is_reported_and_not_shown(generator: Generator) -> None:
    end_with(50, generator)
    results = [
        generate("山上", model=generator, top_k=0, temperature=2.0, seed=seed) for seed in range(9)
    ]

    ended = [each for each in results if each.finish_reason == "stop"]
    assert ended
    assert all(50 not in each.token_ids for each in ended)


def test_beams_forbid_repeated_ngrams_too(generator: Generator) -> None:
    [ids] = [
        generate(
            "山上", model=generator, num_beams=3, no_repeat_ngram_size=1, out_length=40
        ).token_ids
    ]

    assert len(set(ids)) == len(ids) == 40


def test_special_tokens_in_the_text_are_text_unless_asked_for(generator: Generator) -> None:
    seen: list[list[int]] = []
    read = generator.engine.read

    def spy(rows: list[int], sources: list[list[int]]) -> None:
        seen.extend(sources)
        read(rows, sources)

    generator.engine.read = spy  # type: ignore[method-assign]
    sep = generator.tokenizer.sep_token_id

    generate("山[SEP]庙", model=generator, out_length=1)
    generate("山[SEP]庙", model=generator, out_length=1, allow_special_tokens=True)

    assert seen[0].count(sep) == 1
    assert seen[1].count(sep) == 2


def test_a_long_prompt_is_read_from_its_end_and_said_so(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    long = "山" * 99_906 + "今天天气很好，我们去公园看花。山上有座庙\n" * 4 + "今天天气很好"

    result = generate(long, model=generator, out_length=10, seed=0)
    end = generate(
        generator.tokenizer.decode(generator.tokenizer.encode(long)[-94:]),
        model=generator,
        out_length=10,
        seed=0,
    )

    assert result.text == end.text
    assert result.prompt_token_count > 99_000
    assert "只读最后 94 个" in caplog.text


def test_a_model_is_found_by_its_directory(
    lively_model: Plug, tiny_tokenizer: PlugTokenizer, tmp_path: Path
) -> None:
    save(lively_model, tmp_path / "model", tokenizer=tiny_tokenizer)

    by_path = plug.generate("山上", model=tmp_path / "model", seed=3, out_length=9, device="cpu")
    by_object = plug.generate(
        "山上", model=lively_model, tokenizer=tiny_tokenizer, seed=3, out_length=9
    )

    assert key(by_path) == key(by_object)


def test_a_pipeline_answers_as_generate_does(
    lively_model: Plug, tiny_tokenizer: PlugTokenizer
) -> None:
    pipe = plug.pipeline("text-generation", model=lively_model, tokenizer=tiny_tokenizer)

    one = pipe("山上", seed=3, out_length=9)
    both = pipe(["今天", "山上"], seed=3, out_length=9)

    expected = generate("山上", model=lively_model, tokenizer=tiny_tokenizer, seed=3, out_length=9)
    assert one == [{"generated_text": expected.text}]
    assert both[1:] == one
    with pytest.raises(UsageError, match="text-generation"):
        plug.pipeline("translation")


# --- the original vocabulary ----------------------------------------------------------------------


@pytest.mark.shared
def test_generate_in_original_mode_gives_the_original_text(
    golden_model: Plug, original_tokenizer: PlugTokenizer, golden_json: Any
) -> None:
    cases = golden_json("generation.json")["alicemind"]
    results = generate(
        [cases[name]["prompt"] for name in ("prompt40", "prompt600")],
        model=golden_model,
        tokenizer=original_tokenizer,
        mode="original",
        top_k=1,
        temperature=1.0,
        out_length=300,
    )

    assert [each.text for each in results] == [case["text"] for case in cases.values()]
    assert [list(each.token_ids) for each in results] == [
        case["generated_ids"] for case in cases.values()
    ]


@pytest.mark.shared
def test_quotes_that_the_original_vocabulary_lacks_are_rewritten_to_those_it_has(
    golden_model: Plug, original_tokenizer: PlugTokenizer
) -> None:
    text = "‘‘‘”"
    assert generate(text, model=golden_model, tokenizer=original_tokenizer, out_length=1)


@pytest.mark.shared
@pytest.mark.parametrize("text", ["”", "\U0002a6d6"])
def test_text_of_which_the_original_vocabulary_knows_nothing_is_refused(
    text: str, golden_model: Plug, original_tokenizer: PlugTokenizer
) -> None:
    with pytest.raises(UsageError, match="词表里没有"):
        generate(text, model=golden_model, tokenizer=original_tokenizer, out_length=1)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "空"), (" \n\t　", "空白"), ("😀 🐉→", "表情"), ("好\ud83d", "U\\+D83D"), (7, "int")],
)
def test_text_without_content_is_refused(text: Any, says: str, generator: Generator) -> None:
    with pytest.raises(UsageError, match=says):
        generate(["山上", text], model=generator)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out_length", 0),
        ("out_length", -5),
        ("out_length", 100_001),
        ("out_length", 10**30),
        ("out_length", 2.5),
        ("out_length", True),
        ("mode", "modelscope"),
        ("temperature", -1.0),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.9"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.5),
        ("top_p", -0.1),
        ("repetition_penalty", 0),
        ("no_repeat_ngram_size", -2),
        ("num_beams", 0),
        ("num_beams", 65),
        ("length_penalty", float("nan")),
        ("min_length", -1),
        ("min_length", 257),
        ("window", 0),
        ("window", 97),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("seed", [1, 2]),
        ("batch_size", 0),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(
    name: str, value: Any, generator: Generator
) -> None:
    with pytest.raises(UsageError, match=name):
        generate("山上", model=generator, **{name: value})


def test_settings_that_contradict_each_other_are_refused(generator: Generator) -> None:
    with pytest.raises(UsageError, match="80%"):
        GenerationSettings(mode="original", min_length=3)
    with pytest.raises(UsageError, match="out_length=97 应不超过 96"):
        generate("山上", model=generator, num_beams=2, out_length=97)


def test_an_encoder_alone_is_refused(config: Any, tiny_tokenizer: PlugTokenizer) -> None:
    encoder = Plug(dataclasses.replace(config, num_decoder_layers=0))

    with pytest.raises(UsageError, match="只有编码器"):
        generate("山上", model=encoder, tokenizer=tiny_tokenizer)


def test_a_model_object_needs_a_tokenizer_that_fits(
    tiny_model: Plug, config: Any, tiny_tokenizer: PlugTokenizer
) -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        generate("山上", model=tiny_model)
    smaller = Plug(dataclasses.replace(config, vocab_size=300, num_emitted_tokens=300))
    with pytest.raises(UsageError, match="不配套"):
        generate("山上", model=smaller, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(device: str, model_directory: Path) -> None:
    with pytest.raises(UsageError, match=device):
        generate("山上", model=model_directory, device=device)


def test_a_call_that_was_interrupted_leaves_nothing_behind(generator: Generator) -> None:
    options = {"model": generator, "out_length": 12, "seed": 3}
    expected = generate(TEXTS, **options)

    def stop(_row: int, _piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(TEXTS, on_text=stop, **options)
    told: list[int] = []
    after = generate(TEXTS[:2], on_text=lambda row, _: told.append(row), **options)
    assert [key(each) for each in after] == [key(each) for each in expected[:2]]
    assert set(told) == {0, 1}
