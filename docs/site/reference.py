"""The reference pages, made from the code: every command, the Python names, the HTTP routes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import plug
from plug.cli import app, help
from plug.finetuning.settings import FinetuneSettings
from plug.generation.settings import GenerationSettings
from plug.options import REQUIRED, markdown_table, options_of
from plug.serving.app import create_app
from plug.serving.settings import ServeSettings

DOCS = Path(__file__).resolve().parents[1]
PYTHON = (  # in the order in which a reader meets them
    (
        ("写作", "Write"),
        ("generate", "Generator", "GenerationResult", "GenerationSettings", "pipeline"),
    ),
    (("多个请求", "Many requests"), ("AsyncEngine",)),
    (("不经微调", "Without fine-tuning"), ("classify", "fill_mask", "embed", "TextEncoder")),
    (("微调", "Fine-tune"), ("finetune", "FinetuneSettings", "Predictor")),
    (("模型", "Models"), ("load", "Plug", "PlugConfig", "PRESETS", "PlugTokenizer")),
    (
        ("transformers", "transformers"),
        (
            "PlugForConditionalGeneration",
            "PlugForMaskedLM",
            "PlugForPreTraining",
            "PlugForQuestionAnswering",
            "PlugForSequenceClassification",
            "PlugForTokenClassification",
            "PlugModel",
            "PlugTransformersConfig",
        ),
    ),
    (("错误", "Errors"), ("PlugError", "UsageError")),
)


def pages() -> dict[str, str]:
    """Return the Markdown of each page by its file's name."""
    made = {
        "commands.md": commands(CHINESE),
        "commands.en.md": commands(ENGLISH),
        "python.md": python(CHINESE),
        "python.en.md": python(ENGLISH),
        "http.md": http(CHINESE),
        "http.en.md": http(ENGLISH),
    }
    # Texts of options link to their own page.
    return {name: text.replace("](#", "](../generation.md#") for name, text in made.items()}


# --- commands -------------------------------------------------------------------------------------


CHINESE = {
    "commands": "# 命令与选项\n\n由程序生成，与 `plug 命令 --help` 相同。",
    "参数": "参数",
    "选项": "选项",
    "作用": "作用",
    "same": "选项相同：{}。",
    "python": "# Python 接口\n\n`import plug` 之后可用的名字。说明取自源码，是英文的。\n",
    "sizes": "规格：",
    "setting": "| 设置 | 默认 | 取值 | 含义 |",
    "http": "# HTTP 接口\n\n由服务的 OpenAPI 描述生成。"
    "怎样使用、对话模板：[部署](../serving.md)。\n",
    "field": "| 字段 | 类型 | 默认 | 含义 |",
    "required": "必填",
    "length": "长度",
    "statuses": "失败时的状态码：{}。含义见[部署](../serving.md#错误)。",
    "guide": "serving.zh-CN.md",
}
ENGLISH = {
    "commands": "# Commands and options\n\nMade from the code. The command line itself "
    "speaks Chinese, and so do the options that have no English text in the code.",
    "参数": "argument",
    "选项": "option",
    "作用": "meaning",
    "same": "With the same options: {}.",
    "python": "# Python\n\nThe names of `import plug`.\n",
    "sizes": "Sizes: ",
    "setting": "| setting | default | values | meaning |",
    "http": "# HTTP routes\n\nMade from the server's OpenAPI schema. How to use them, and the "
    "template of a chat: [Serving](../serving.md).\n",
    "field": "| field | type | default | meaning |",
    "required": "required",
    "length": "length",
    "statuses": "Statuses of failures: {}. Their meaning: [Serving](../serving.md#errors).",
    "guide": "serving.md",
}
SETTINGS = {
    "plug generate": GenerationSettings,
    "plug finetune": FinetuneSettings,
    "plug serve": ServeSettings,
}


def commands(words: dict[str, str]) -> str:
    lines = [words["commands"]]
    root = typer.main.get_command(app)
    help.use_on(root)
    alike: dict[str, list[str]] = {}  # commands by their options: all tasks have the same
    of: dict[str, tuple[Any, list[Any]]] = {}
    for name, command in walk(root, "plug"):
        context = command.make_context(name, [], resilient_parsing=True)
        of[name] = command, list(help.sections(command, context))
        alike.setdefault(str(of[name][1]), []).append(name)
    for names in alike.values():  # of the tasks, the one for a reader's own file stands for all
        name = next((each for each in names if each.endswith(" classification")), names[0])
        others = [each for each in names if each != name]
        command, sections = of[name]
        lines.append(f"\n## `{name}`\n\n{command.help or ''}\n")
        if others:
            lines.append(words["same"].format("、".join(f"`{other}`" for other in others)) + "\n")
        english = english_of(SETTINGS[name]) if words is ENGLISH and name in SETTINGS else {}
        for title, rows in sections:
            if title != "命令":
                lines.append(f"\n| {words[title]} | {words['作用']} |\n| --- | --- |")
                lines += [
                    f"| `{escaped(option)}` | {cell(english.get(option.split()[0], text))} |"
                    for option, text in rows
                ]
    return "\n".join(lines) + "\n"


def english_of(settings: type) -> dict[str, str]:
    """The English text of each option of a settings class, by its flag."""
    found = {}
    for name, (default, each) in options_of(settings).items():
        facts = [each.kind.limits] if each.kind.limits else []
        if default not in (REQUIRED, None, (), {}):
            facts.append(f"default `{default}`")
        elif each.unset[1]:
            facts.append(f"default {each.unset[1]}")
        found["--" + name.replace("_", "-")] = each.english + (
            f" ({'; '.join(facts)})" if facts else ""
        )
    return found


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each command under its full name; a group is not one itself."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, below in command.commands.items():
        yield from walk(below, f"{name} {word}")


# --- Python ---------------------------------------------------------------------------------------


def python(words: dict[str, str]) -> str:
    """A directive of mkdocstrings for each public name, and the options of settings."""
    listed = {name for _, names in PYTHON for name in names}
    if missing := set(plug.__all__) - listed - {"__version__"}:
        raise LookupError(f"docs/site/reference.py: PYTHON lacks {sorted(missing)}")
    lines = [words["python"]]
    for title, names in PYTHON:
        lines.append(f"\n## {title[words is ENGLISH]}\n")
        for name in names:
            lines.append(f"\n### `plug.{name}` {{ #plug.{name} }}\n")
            lines.append(described(name, getattr(plug, name), words))
    return "\n".join(lines) + "\n"


def described(name: str, found: Any, words: dict[str, str]) -> str:
    home = f"{plug._HOMES[name]}.{name}"
    if name == "PRESETS":
        return words["sizes"] + "、".join(f"`{each}`" for each in found) + "\n"
    if getattr(found, "__module__", "").startswith("plug.hf"):
        home = f"{found.__module__}.{name}"
    is_settings = dataclasses.is_dataclass(found) and any(
        "option" in field.metadata for field in dataclasses.fields(found)
    )
    options = "    options:\n      members: false\n      show_signature: false\n"
    directive = f"::: {home}\n" + (options if is_settings else "")
    return directive + ("\n" + settings_table(found, words) if is_settings else "")


def settings_table(settings: type, words: dict[str, str]) -> str:
    if words is ENGLISH:
        return markdown_table(settings)
    rows = [words["setting"], "| --- | --- | --- | --- |"]
    for name, (default, each) in options_of(settings).items():
        shown = each.unset[0] or ("无" if default in ((), {}, None) else f"`{default}`")
        if default is REQUIRED:
            shown = words["required"]
        rows.append(f"| `{name}` | {shown} | {cell(each.kind.limits)} | {cell(each.chinese)} |")
    return "\n".join(rows) + "\n"


# --- HTTP -----------------------------------------------------------------------------------------


def http(words: dict[str, str]) -> str:
    schema = create_app([], ServeSettings()).openapi()
    routes = guide_says(words["guide"], r"`(?:(?:GET|POST) )?(/[^`]*)`")
    meanings = guide_says(words["guide"], r"`(\w+)`")
    defaults = {}
    for name, (default, each) in options_of(GenerationSettings).items():
        meanings.setdefault(name, each.english if words is ENGLISH else each.chinese)
        defaults[name] = each.unset[words is ENGLISH].strip() or default
    lines = [words["http"]]
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            said = routes.get(re.sub(r"\{.*?\}", "NAME", path), "")
            lines.append(f"\n## `{method.upper()} {path}`\n\n{said}\n")
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "$ref" in body.get("schema", {}):
                model = resolved(schema, body["schema"])
                writes = path in ("/v1/completions", "/v1/chat/completions")
                known = (meanings, defaults) if writes else ({}, {})
                lines += fields(model, schema, words, *known)
            if statuses := [status for status in route["responses"] if status != "200"]:
                lines.append("\n" + words["statuses"].format(", ".join(statuses)) + "\n")
    return "\n".join(lines) + "\n"


def guide_says(page: str, name: str) -> dict[str, str]:
    """What the tables of a page of `docs/` say, by each name of a row's first cell."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for first, rest in re.findall(r"^\| (`.*?) \| (.*) \|$", text, re.M):
        for each in re.findall(name, first):
            found.setdefault(each.replace("名字", "NAME"), rest)
    return found


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    for name in part.get("$ref", "#").split("/")[1:]:
        schema = schema[name]
    return schema if "$ref" in part else part


def fields(
    model: dict[str, Any],
    schema: dict[str, Any],
    words: dict[str, str],
    meanings: dict[str, str],
    defaults: dict[str, Any],
) -> Iterator[str]:
    """The rows of a table; what is known of a field from elsewhere comes before the schema's."""
    yield f"{words['field']}\n| --- | --- | --- | --- |"
    required = model.get("required", ())
    for name, field in model.get("properties", {}).items():
        default = field.get("default")
        default = defaults.get(name) if default is None else default
        shown = "" if default in (None, (), {}) else f"`{json.dumps(default, ensure_ascii=False)}`"
        if isinstance(default, str):
            shown = default
        if name in required:
            shown = words["required"]
        takes = cell(kind(field, schema).replace("length", words["length"]))
        meaning = meanings.get(name) or cell(field.get("description", ""))
        yield f"| `{name}` | {takes} | {shown} | {meaning} |"


def kind(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a field takes, in few words."""
    if "anyOf" in field:
        return " | ".join(kind(each, schema) for each in field["anyOf"])
    field = resolved(schema, field)
    if field.get("type") == "array":
        return f"list[{kind(field.get('items', {}), schema)}]"
    if "enum" in field:
        return " | ".join(f"`{each}`" for each in field["enum"])
    limits = [
        f"{sign} {field[key]}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
            ("minLength", "length ≥"),
            ("maxLength", "length ≤"),
        )
        if key in field
    ]
    name = field.get("type") or field.get("title") or "any"
    name = " | ".join(name) if isinstance(name, list) else name
    return " ".join([name, *limits])


def cell(text: str) -> str:
    """A text inside a table's cell."""
    return escaped(text).replace("<", "&lt;")


def escaped(text: str) -> str:
    """A text or code on one line of a table."""
    return re.sub(r"\s+", " ", inspect.cleandoc(text)).replace("|", "\\|")
