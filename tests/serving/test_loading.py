"""Real models behind the routes: a small one that writes, and one of each way to fine-tune."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import save_file

import plug
from plug.errors import UsageError
from plug.finetuning.kind import make_kind
from plug.generation.generator import Generator
from plug.loading.load import load
from plug.loading.save import save
from plug.model.configuration import PRESETS, PlugConfig
from plug.model.plug import Plug
from plug.serving.loading import load_model, load_models, named_directories
from plug.serving.models import ServedModel
from plug.serving.settings import ServeSettings
from plug.tokenization import PlugTokenizer

pytest.importorskip("transformers")

CPU = torch.device("cpu")
LABELS = {"classification": ["花", "山", "庙"], "labelling": ["O", "B-X", "I-X"]}
TASKS = ("classification", "labelling", "reading", "generation")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PlugTokenizer) -> Path:
    """A random model that writes more than one token."""
    config: PlugConfig = PRESETS["test"]
    torch.manual_seed(0)
    model = Plug(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
        model.embeddings.position_embeddings.weight *= 8
    directory = tmp_path_factory.mktemp("models") / "base"
    save(model, directory, tokenizer=tiny_tokenizer)
    return directory


@pytest.fixture(scope="module")
def models_dir(base: Path) -> Path:
    """`base` and a directory of each task, as `plug finetune` leaves them."""
    tokenizer = PlugTokenizer.load(base)
    for task in TASKS:
        torch.manual_seed(1)
        directory, labels = base.parent / task, LABELS.get(task, [])
        kind = make_kind(task, tokenizer, labels, source_length=32)  # type: ignore[arg-type]
        kind.load_model(base).save_pretrained(directory)
        tokenizer.save(directory)
        settings = {"task": task, "source_length": 32, "target_length": 8, "num_beams": 1}
        run = {"settings": settings, "labels": labels, "label_names": {}, "pairs": None}
        (directory / "finetuning.json").write_text(json.dumps(run))
    return base.parent


@pytest.fixture(scope="module")
def real(models_dir: Path, serving: Callable[..., Any]) -> Iterator[Any]:
    """A server with all of them."""
    names = ("base", *TASKS)
    models = [load_model(name, models_dir / name, rows=4, device=CPU) for name in names]
    with serving(models) as client:
        yield client


def test_what_each_model_can_do(real: Any) -> None:
    data = json.loads(real.get("/v1/models")[1])["data"]

    assert {each["id"]: set(each["capabilities"]) - {"tokenize"} for each in data} == {
        "base": {"generate", "embeddings", "classify", "fill_mask"},
        "classification": {"classify"},
        "labelling": {"tag"},
        "reading": {"answer"},
        "generation": {"generate", "questions"},
    }


def test_a_text_is_that_of_generate(real: Any, base: Path) -> None:
    body = {"prompt": "今天天气", "max_tokens": 12, "seed": 3, "n": 2, "logprobs": 2}
    _, answer, _ = real.post("/v1/completions", body)
    expected = Generator(base)(
        "今天天气", out_length=12, seed=3, num_return_sequences=2, logprobs=2
    )

    assert [each["text"] for each in answer["choices"]] == [each.text for each in expected]
    for choice, result in zip(answer["choices"], expected, strict=True):
        found = choice["logprobs"]
        assert found["token_logprobs"] == pytest.approx([x.logprob for x in result.logprobs])
        for token, logprob, top, each in zip(
            found["tokens"],
            found["token_logprobs"],
            found["top_logprobs"],
            result.logprobs,
            strict=True,
        ):
            assert top[token] == logprob
            assert len(top) == 2 + (logprob < min(likely for _, likely in each.top))


def test_a_stream_joins_to_the_whole_text(real: Any, base: Path) -> None:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="any", max_retries=0) as api:
        body: dict[str, Any] = {
            "model": "base",
            "prompt": "我们去公园",
            "seed": 5,
            "max_tokens": 40,
        }
        whole = api.completions.create(**body).choices[0].text
        pieces = [each.choices[0].text for each in api.completions.create(**body, stream=True)]

    assert "".join(pieces) == whole == Generator(base)("我们去公园", out_length=40, seed=5).text


def test_stop_strings_end_a_text(real: Any) -> None:
    body = {"prompt": "今天", "max_tokens": 30, "seed": 1}
    text = real.post("/v1/completions", body)[1]["choices"][0]["text"]
    stop = text[4:6]
    _, answer, _ = real.post("/v1/completions", {**body, "stop": [stop]})

    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_what_the_engines_did_is_measured(real: Any) -> None:
    real.post("/v1/completions", {"prompt": "今天", "max_tokens": 5})
    lines = [x.split() for x in real.get("/metrics")[1].splitlines() if not x.startswith("#")]
    values = {line[0]: float(line[1]) for line in lines}

    assert values["plug_steps_total"] >= 5
    assert values["plug_encoder_seconds_total"] > 0
    assert values["plug_decoder_seconds_total"] > 0
    assert values["plug_cache_bytes"] > 10_000


def test_beams_beside_the_rest(real: Any, base: Path) -> None:
    body = {"prompt": "今天", "max_tokens": 8, "num_beams": 3}
    _, answer, _ = real.post("/v1/completions", body)

    assert answer["choices"][0]["text"] == Generator(base)("今天", out_length=8, num_beams=3).text


def test_the_best_of_several(real: Any) -> None:
    body = {"prompt": "今天", "max_tokens": 6, "seed": 1, "logprobs": 0}
    _, answer, _ = real.post("/v1/completions", {**body, "n": 4})
    means = [sum(x["logprobs"]["token_logprobs"]) / 6 for x in answer["choices"]]
    _, best, _ = real.post("/v1/completions", {**body, "best_of": 4})

    assert best["choices"][0]["text"] == answer["choices"][means.index(max(means))]["text"]
    assert best["usage"]["completion_tokens"] == 24


def test_log_probabilities_of_a_chat(real: Any) -> None:
    body = {"messages": [{"role": "user", "content": "今天"}], "max_tokens": 3, "model": "base"}
    _, answer, _ = real.post("/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 2})

    content = answer["choices"][0]["logprobs"]["content"]
    assert [len(each["top_logprobs"]) for each in content] == [2, 2, 2]
    assert all(bytes(each["bytes"]).decode("utf-8", "ignore") is not None for each in content)


def test_embeddings_by_the_openai_client(real: Any, base: Path) -> None:
    texts = ["今天天气很好", "山上有座庙"]
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="any", max_retries=0) as api:
        found = api.embeddings.create(model="base", input=texts)  # in base64
        plain = api.embeddings.create(model="base", input=texts, encoding_format="float")

    expected = plug.embed(texts, model=str(base)).tolist()
    for data in (found.data, plain.data):
        assert data[0].embedding == pytest.approx(expected[0], abs=1e-6)
        assert data[1].embedding == pytest.approx(expected[1], abs=1e-6)


def test_zero_shot_labels_and_masks(real: Any) -> None:
    body = {"input": "今天天气很好", "labels": ["天气", "公园"], "model": "base"}
    _, labels, _ = real.post("/v1/classify", body)
    _, masks, _ = real.post("/v1/fill-mask", {"input": "今天[MASK]气", "top_k": 3})

    assert sum(each["probability"] for each in labels["data"][0]["labels"]) == pytest.approx(1)
    assert len(masks["data"][0]["masks"][0]["candidates"]) == 3


@pytest.mark.parametrize(
    ("path", "body", "parts", "key"),
    [
        ("/v1/classify", {"input": "今天天气"}, ["今天天气"], "label"),
        ("/v1/tag", {"input": "今天天气很好"}, ["今天天气很好"], "tags"),
        ("/v1/answer", {"question": "花？", "context": "公园看花"}, ["花？", "公园看花"], "answer"),
        ("/v1/questions", {"answer": "花", "context": "看花"}, ["花", "看花"], "prediction"),
    ],
)  # fmt: skip
def test_fine_tuned_models_answer_as_plug_predict(
    real: Any, models_dir: Path, path: str, body: dict[str, str], parts: list[str], key: str
) -> None:
    name = dict(zip(("/v1/classify", "/v1/tag", "/v1/answer", "/v1/questions"), TASKS, strict=True))
    status, answer, _ = real.post(path, {**body, "model": name[path]})
    expected = plug.Predictor(models_dir / name[path]).predict_text(*parts)

    assert status == 200
    assert answer["data"][0][{"prediction": "question"}.get(key, key)] == expected[key]


def test_many_texts_of_one_request(real: Any) -> None:
    _, answer, _ = real.post("/v1/tag", {"input": ["今天天气"] * 40, "model": "labelling"})

    assert [each["index"] for each in answer["data"]] == list(range(40))


def test_a_field_that_the_model_refuses_is_named(real: Any) -> None:
    body = {"prompt": "花", "logit_bias": {"9999": 1}}

    assert real.post("/v1/completions", body)[1]["error"]["param"] == "logit_bias"


USER = {"role": "user", "content": "花"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/tag", {"input": "花", "model": "base"}, 400),
        ("/v1/completions", {"prompt": "花", "model": "labelling"}, 400),
        ("/v1/classify", {"input": "花", "model": "base"}, 400),
        ("/v1/classify", {"input": "花", "labels": ["a", "a"], "model": "base"}, 400),
        ("/v1/classify", {"input": "花", "labels": ["a", "b" * 65], "model": "base"}, 400),
        ("/v1/classify", {"input": "", "model": "classification"}, 400),
        ("/v1/fill-mask", {"input": "没有"}, 400),
        ("/v1/embeddings", {"input": ["花", " "]}, 400),
        ("/v1/embeddings", {"input": "花", "dimensions": 8}, 400),
        ("/v1/answer", {"question": " ", "context": "花"}, 400),
        ("/v1/completions", {"prompt": "😀"}, 400),
        ("/v1/completions", {"prompt": "花", "num_beams": 2, "stop": "x"}, 400),
        ("/v1/completions", {"prompt": "花", "num_beams": 2, "n": 2}, 400),
        ("/v1/completions", {"prompt": "花", "num_beams": 2, "best_of": 2}, 400),
        ("/v1/chat/completions", {"messages": [USER], "num_beams": 2, "n": 2}, 400),
        ("/v1/chat/completions", {"messages": [USER | {"content": " "}]}, 400),
        ("/v1/completions", {"prompt": "花", "logit_bias": {"9999": 1}}, 400),
        ("/v1/models/load", {"name": "labelling"}, 403),
        ("/v1/models/unload", {"name": "base"}, 404),
    ],
)
def test_what_a_model_cannot_do(real: Any, path: str, body: dict[str, Any], status: int) -> None:
    found, answer, _ = real.post(path, body)

    assert found == status
    error = answer["error"]
    assert error["message"].endswith("。")
    if "completions" in path:
        assert error["param"] in body


def test_special_tokens_in_a_text_stay_text(real: Any) -> None:
    _, answer, _ = real.post("/tokenize", {"prompt": "花[SEP][MASK]", "return_offsets": True})

    assert 3 not in answer["tokens"]
    assert len(answer["offsets"]) == answer["count"] > 3


def test_models_are_loaded_and_unloaded_while_the_server_runs(
    base: Path, models_dir: Path, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(
        [load_model("base", base, rows=2, device=CPU)], models_dir=str(models_dir)
    ) as client:
        monkeypatch.setattr(
            client.service, "_loader", lambda n, d: load_model(n, d, rows=2, device=CPU)
        )
        assert client.post("/v1/models/load", {"name": "labelling"})[0] == 200
        assert client.post("/v1/tag", {"input": "今天", "model": "labelling"})[0] == 200
        assert client.post("/v1/models/load", {"name": "labelling"})[0] == 400
        assert client.post("/v1/models/load", {"name": "../base"})[0] == 400
        assert client.post("/v1/models/load", {"name": "nothing"})[0] == 404
        assert client.post("/v1/models/unload", {"name": "labelling"})[0] == 200
        assert client.post("/v1/tag", {"input": "今天", "model": "labelling"})[0] == 404
        assert client.post("/v1/models/unload", {"name": "base"})[0] == 404


@pytest.fixture(scope="module")
def adapter_directory(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`adapter_directory(name, seed, **config)`: an adapter of `base`, as peft saves it."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = {n: x.shape for n, x in load(base).named_parameters() if n.endswith("fc1.weight")}

    def make(name: str, seed: int, run: dict[str, Any] | None = None, **config: Any) -> Path:
        (folder / name).mkdir()
        torch.manual_seed(seed)
        tensors = {}
        for weight, (out, inputs) in shapes.items():
            place = f"base_model.model.{weight.removesuffix('.weight')}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(2, inputs)
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, 2)
            if config.get("use_dora"):
                tensors[f"{place}.lora_magnitude_vector"] = torch.rand(out)
        config = {"peft_type": "LORA", "lora_alpha": 2, "r": 2} | config
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / name / "adapter_model.safetensors")
        if run is not None:
            (folder / name / "finetuning.json").write_text(json.dumps(run))
        return folder / name

    return make


def test_adapters_share_a_server(
    base: Path, adapter_directory: Callable[..., Path], serving: Callable[..., Any]
) -> None:
    """Each text is what `plug generate --adapter` writes; adapters come and go at run time."""
    lengths = {"source_length": 32, "target_length": 8, "num_beams": 2}
    run = {"settings": {"task": "generation"} | lengths, "labels": [], "label_names": {}}
    one, two, asks = (
        adapter_directory(name, seed, given)
        for name, seed, given in (("one", 1, None), ("two", 2, None), ("asks", 3, run))
    )
    dora = adapter_directory("dora", 4, use_dora=True)
    models_dir = str(one.parent)
    settings = ServeSettings(max_num_seqs=3, models_dir=models_dir)
    models, loader = load_models(
        "base", base, {}, {"one": str(one), "asks": str(asks)}, settings, device=CPU, dtype=None
    )
    body = {"prompt": "今天天气", "max_tokens": 20, "seed": 3}
    expected = {
        name: Generator(base, adapter=path)("今天天气", out_length=20, seed=3).text
        for name, path in (("base", None), ("one", one), ("two", two))
    }
    with serving(models, models_dir=models_dir) as client:
        client.service._loader = loader
        assert client.post("/v1/completions", {**body, "model": "two"})[0] == 404
        status, described, _ = client.post("/v1/models/load", {"name": "two"})
        assert (status, set(described["capabilities"])) == (200, {"generate", "tokenize"})
        texts: dict[str, str] = {}

        def ask(name: str) -> None:
            _, answer, _ = client.post("/v1/completions", {**body, "model": name})
            texts[name] = answer["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(name,)) for name in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        question = {"answer": "花", "context": "看花", "model": "asks"}
        _, answer, _ = client.post("/v1/questions", question)
        refused = client.post("/v1/models/load", {"name": "dora"})
        assert client.post("/v1/models/unload", {"name": "two"})[0] == 200
        assert client.post("/v1/completions", {**body, "model": "two"})[0] == 404
        ask("one")

    assert texts == expected
    assert len(set(texts.values())) == 3
    asked = plug.Predictor(base, adapter=asks).predict_text("花", "看花")
    assert answer["data"][0]["question"] == asked["prediction"]
    assert refused[0] == 400
    assert "DoRA" in refused[1]["error"]["message"]
    assert dora.is_dir()


def test_a_fine_tuned_writer_takes_adapters_too(
    base: Path, adapter_directory: Callable[..., Path], serving: Callable[..., Any], tmp_path: Path
) -> None:
    lengths = {"source_length": 32, "target_length": 8, "num_beams": 1}
    run = {"settings": {"task": "generation"} | lengths, "labels": [], "label_names": {}}
    shutil.copytree(base, tmp_path / "mine")
    (tmp_path / "mine" / "finetuning.json").write_text(json.dumps(run))
    own = str(adapter_directory("for-mine", 5))

    def models(finetuned: dict[str, str], adapters: dict[str, str]) -> list[ServedModel]:
        settings = ServeSettings(max_num_seqs=3)
        directory = tmp_path / "mine"
        found, _ = load_models(
            "mine", directory, finetuned, adapters, settings, device=CPU, dtype=None
        )
        return found

    with pytest.raises(UsageError, match=f"请用 --adapter one={own}"):
        models({"one": own}, {})
    body = {"prompt": "今天天气", "max_tokens": 20, "seed": 3, "model": "one"}
    with serving(models({}, {"one": own})) as client:
        _, answer, _ = client.post("/v1/completions", body)
    expected = Generator(base, adapter=own)("今天天气", out_length=20, seed=3).text
    assert answer["choices"][0]["text"] == expected


def test_names_and_directories_of_the_command_line() -> None:
    assert named_directories("--finetuned", ["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(UsageError, match="finetuned"):
            named_directories("--finetuned", wrong)
