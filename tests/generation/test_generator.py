from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

import plug
from plug.errors import UsageError
from plug.generation.async_engine import AsyncEngine
from plug.generation.generator import Generator, generate
from plug.generation.pipeline import TextGenerationPipeline
from plug.generation.result import GenerationResult
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
    generator.prepared.config = generator.config


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
    decode = generator.prepared.model.decode

    def counted(*inputs: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return decode(*inputs)

    generator.prepared.model.decode = counted  # type: ignore[method-assign]
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
    encode = generator.prepared.encode

    def spy(sources: list[list[int]], numbers: list[int]) -> Any:
        seen.extend(sources)
        return encode(sources, numbers)

    generator.prepared.encode = spy  # type: ignore[method-assign, assignment]
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


@pytest.mark.parametrize("texts", [None, 7, {"山上": 1}])
def test_what_is_no_list_of_texts_is_refused(texts: Any, generator: Generator) -> None:
    with pytest.raises(UsageError, match=type(texts).__name__):
        generator(texts)


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


# --- shared by threads, streamed, interrupted -----------------------------------------------------

CALLS: list[tuple[list[str], dict[str, Any]]] = [
    (["山上有座庙"], {"out_length": 30, "do_sample": False}),
    (["今天天气很好", "庙"], {"out_length": 25, "temperature": 2.0}),
    (["公园"], {"out_length": 40, "window": 7}),
    (["好"], {"out_length": 12, "num_beams": 3}),
    (["看花", "山", "好"], {"out_length": 20, "mode": "original", "temperature": 3.0}),
    (["我" * 30], {"out_length": 20, "prompt_lookup_num_tokens": 8, "do_sample": False}),
]


def test_threads_that_share_a_generator_get_what_each_gets_alone(generator: Generator) -> None:
    alone = [generate(texts, model=generator, seed=5, **options) for texts, options in CALLS]
    wrong: list[str] = []

    def ask(first: int) -> None:
        for number in range(first, first + 6):
            texts, options = CALLS[number % len(CALLS)]
            try:
                results = generate(texts, model=generator, seed=5, **options)
            except Exception as error:
                wrong.append(repr(error))
                continue
            expected = alone[number % len(CALLS)]
            if [each.token_ids for each in results] != [each.token_ids for each in expected]:
                wrong.append(f"{texts}: another text")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_stream_gives_the_pieces_and_the_results(generator: Generator) -> None:
    texts = ["山上", "今天天气很好", "庙"]
    options: dict[str, Any] = {"out_length": 12, "min_length": 12, "seed": 5, "batch_size": 2}
    expected = generator(texts, **options)

    shown, results = ["", "", ""], {}
    for piece in generator.stream(texts, **options):
        assert piece.index not in results, "the result is a text's last piece"
        shown[piece.index] += piece.text
        if piece.result is not None:
            results[piece.index] = piece.result

    assert shown == [each.text for each in expected]
    assert [results[index].token_ids for index in range(3)] == [each.token_ids for each in expected]


def test_streams_may_be_open_side_by_side_and_dropped(generator: Generator) -> None:
    alone = [generator(text, out_length=15, seed=5).text for text in ("山上", "庙")]
    beams = generator("好", out_length=9, num_beams=2)
    dropped = generator.stream("公园", out_length=90_000, min_length=90_000)
    next(dropped)
    first, second = (generator.stream(text, out_length=15, seed=5) for text in ("山上", "庙"))

    shown = ["", ""]
    for one, other in zip_longest(first, second):
        assert generator("好", out_length=9, num_beams=2).text == beams.text
        shown[0] += one.text if one else ""
        shown[1] += other.text if other else ""
    del dropped

    assert shown == alone
    assert generator("山上", out_length=15, seed=5).text == alone[0]


def test_a_callback_may_call_the_generator(generator: Generator) -> None:
    expected = generator("山上", out_length=6, seed=5)
    heard: list[str] = []

    def answer(_: int, piece: str) -> None:
        heard.append(piece)
        assert generator("山上", out_length=6, seed=5).text == expected.text

    assert generator("庙", out_length=9, seed=2, on_text=answer).text == "".join(heard)


def test_a_callback_that_raises_ends_the_call_and_the_generator_goes_on(
    generator: Generator,
) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("gone")

    expected = generator(["山上", "庙"], out_length=6, seed=5)
    with pytest.raises(ConnectionError, match="gone"):
        generator(["庙", "山上"], out_length=6, on_text=fail)
    assert generator(["山上", "庙"], out_length=6, seed=5)[1].text == expected[1].text


def test_arguments_of_a_stream_are_checked_at_once(generator: Generator) -> None:
    with pytest.raises(UsageError, match="out_length"):
        generator.stream("山上", out_length=0)
    with pytest.raises(UsageError, match="空的"):
        generator.stream("")


# --- what can be asked ----------------------------------------------------------------------------


def test_one_text_is_one_text_and_not_its_characters(generator: Generator) -> None:
    result = generator("山上有庙", out_length=5, seed=1)

    assert isinstance(result, GenerationResult)
    assert result.prompt_token_count == 4
    assert generator(("山上有庙",), out_length=5, seed=1)[0].token_ids == result.token_ids
    assert generator(iter(["山上有庙"]), out_length=5, seed=1)[0].token_ids == result.token_ids
    [answer] = TextGenerationPipeline(generator)("山上有庙", out_length=5, seed=1)
    assert answer == {"generated_text": result.text}


def test_settings_may_be_given_and_changed_everywhere(generator: Generator) -> None:
    settings = GenerationSettings(out_length=9, temperature=2.0, min_length=3)
    expected = generator("山上", out_length=5, temperature=2.0, min_length=3, seed=1)

    assert generator("山上", settings, out_length=5, seed=1).token_ids == expected.token_ids
    [*_, last] = generator.stream("山上", settings, out_length=5, seed=1)
    assert last.result is not None
    assert last.result.token_ids == expected.token_ids
    [answer] = TextGenerationPipeline(generator)("山上", settings, out_length=5, seed=1)
    assert answer == {"generated_text": expected.text}
    again = generate("山上", settings, model=generator, out_length=5, seed=1)
    assert again.token_ids == expected.token_ids
    with pytest.raises(UsageError, match="out_length"):
        generator("山上", out_lengt=5)


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [
        ([5, 320], "320 应在 0 到 319"),
        ([-1], "-1 应在"),
        (["山"], "'山' 应是整数"),
        ([True], "True"),
    ],
)
def test_token_ids_that_are_none_are_refused(
    token_ids: list[Any], says: str, generator: Generator
) -> None:
    with pytest.raises(UsageError, match=says):
        generator([token_ids], out_length=3)


def test_stop_strings_and_ids_end_the_text(generator: Generator) -> None:
    whole = generator("山上", out_length=60, seed=4, min_length=60)
    stop = whole.text[20:23]
    result = generator("山上", out_length=60, seed=4, stop=stop)
    assert result.text == whole.text[: whole.text.index(stop)]
    assert result.finish_reason == "stop"
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    pieces = generator.stream("山上", out_length=60, seed=4, stop=[stop, "没有的"])
    assert "".join(piece.text for piece in pieces) == result.text

    ids = whole.token_ids[10], 5
    result = generator("山上", out_length=60, seed=4, stop_token_ids=ids)
    assert result.token_ids == whole.token_ids[: min(map(_first(whole.token_ids), ids))]
    assert result.finish_reason == "stop"
    for lookup in (None, 8):
        result = generator(
            "山上", do_sample=False, out_length=60, stop="没有的", prompt_lookup_num_tokens=lookup
        )
        assert result.text == generator("山上", do_sample=False, out_length=60).text


def _first(ids: tuple[int, ...]) -> Callable[[int], int]:
    return lambda token_id: ids.index(token_id) if token_id in ids else len(ids)


def test_ids_that_the_vocabulary_lacks_are_refused(generator: Generator) -> None:
    with pytest.raises(UsageError, match="stop_token_ids 的词元编号 99999"):
        generator("山上", stop_token_ids=99999)


def test_several_texts_of_one_prompt_each_with_its_own_seed(generator: Generator) -> None:
    options: dict[str, Any] = {"out_length": 9, "temperature": 2.0}
    alone = [generator("山上", seed=seed, **options) for seed in (5, 6, 7)]
    other = generator("庙", seed=9, **options)

    results = generator(
        ["山上", "庙"], seed=[5, 8], num_return_sequences=3, batch_size=4, **options
    )

    assert [each.seed for each in results] == [5, 6, 7, 8, 9, 10]
    assert [each.text for each in results[:3]] == [each.text for each in alone]
    assert results[4].text == other.text
    assert [each.seed for each in generator("山上", seed=5, num_return_sequences=2)] == [5, 6]


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 8, "do_sample": False}])
def test_log_probabilities_are_the_models_own(
    options: dict[str, Any], generator: Generator, lively_model: Plug
) -> None:
    prompt = "我" * 9
    result = generator(prompt, out_length=20, seed=4, logprobs=3, top_k=5, **options)

    source = torch.tensor([[2, *generator.tokenizer.encode(prompt), 3]])
    fed = torch.tensor([[2, *result.token_ids[:-1]]])
    with torch.no_grad():
        logits = lively_model.lm_logits(lively_model.decode(fed, lively_model.encode(source)))
    every = logits[0].log_softmax(-1)
    assert result.logprobs is not None
    assert len(result.logprobs) == len(result.token_ids)
    for place, (token_id, found) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        assert found.logprob == pytest.approx(every[place, token_id].item(), abs=1e-4)
        values, ids = every[place].topk(3)
        assert [each for each, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert generator(prompt, out_length=3, logprobs=0).logprobs is not None
    assert generator(prompt, out_length=3).logprobs is None


def test_a_batch_with_and_without_log_probabilities_gives_each_its_own(
    generator: Generator,
) -> None:
    with AsyncEngine(generator, rows=3) as engine:
        asks = [engine.submit("山上", out_length=9, seed=1, logprobs=n) for n in (None, 1, 4)]
        results = [each.result() for each in asks]

    assert results[0].logprobs is None
    assert [len(each.logprobs[0].top) for each in results[1:] if each.logprobs] == [1, 4]
    assert {each.token_ids for each in results} == {results[0].token_ids}
