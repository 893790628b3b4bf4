"""The reference pages, made from the code: every command, the Python names, the HTTP routes."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer

import plug
from plug.cli import app, help
from plug.finetuning.settings import FinetuneSettings
from plug.generation.settings import GenerationSettings
from plug.options import REQUIRED, markdown_table, options_of
from plug.serving.app import create_app
from plug.serving.settings import ServeSettings

PYTHON = (  # in the order in which a reader meets them
    ("写作 Write", ("generate", "Generator", "GenerationResult", "GenerationSettings", "pipeline")),
    ("多个请求 Many requests", ("AsyncEngine",)),
    ("不经微调 Without fine-tuning", ("classify", "fill_mask", "embed", "TextEncoder")),
    ("微调 Fine-tune", ("finetune", "FinetuneSettings", "Predictor")),
    ("模型 Models", ("load", "Plug", "PlugConfig", "PRESETS", "PlugTokenizer")),
    (
        "transformers",
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
    ("错误 Errors", ("PlugError", "UsageError")),
)


def pages() -> dict[str, str]:
    """Return the Markdown of each page by its file's name."""
    made = {
        "commands.md": commands(CHINESE),
        "commands.en.md": commands(ENGLISH),
        "python.md": python(),
        "http.md": http(),
    }
    # Texts of options link to their own page.
    return {name: text.replace("](#", "](../generation.md#") for name, text in made.items()}


# --- commands -------------------------------------------------------------------------------------


CHINESE = {
    "# ": "# 命令与选项\n\n由程序生成，与 `plug 命令 --help` 相同。",
    "参数": "参数",
    "选项": "选项",
    "作用": "作用",
    "same": "选项与 `{}` 相同。",
}
ENGLISH = {
    "# ": "# Commands and options\n\nMade from the code. The command line itself "
    "speaks Chinese, and so do the options that have no English text in the code.",
    "参数": "argument",
    "选项": "option",
    "作用": "meaning",
    "same": "The options are those of `{}`.",
}
SETTINGS = {
    "plug generate": GenerationSettings,
    "plug finetune": FinetuneSettings,
    "plug serve": ServeSettings,
}


def commands(words: dict[str, str]) -> str:
    lines = [words["# "]]
    root = typer.main.get_command(app)
    help.use_on(root)
    shown: dict[str, str] = {}  # the options of a command, and its name
    for name, command in walk(root, "plug"):
        context = command.make_context(name, [], resilient_parsing=True)
        lines.append(f"\n## `{name}`\n\n{command.help or ''}\n")
        sections = list(help.sections(command, context))
        same = shown.setdefault(str(sections), name)
        if same != name:  # a task's: all have the same
            lines.append(words["same"].format(same))
            continue
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


def python() -> str:
    """A directive of mkdocstrings for each public name, and the options of settings."""
    listed = {name for _, names in PYTHON for name in names}
    if missing := set(plug.__all__) - listed - {"__version__"}:
        raise LookupError(f"docs/site/reference.py: PYTHON lacks {sorted(missing)}")
    lines = ["# Python\n", "`import plug`。公开的名字，与源码里的说明。The public names.\n"]
    for title, names in PYTHON:
        lines.append(f"\n## {title}\n")
        for name in names:
            lines.append(f"\n### `plug.{name}` {{ #plug.{name} }}\n")
            lines.append(described(name, getattr(plug, name)))
    return "\n".join(lines) + "\n"


def described(name: str, found: Any) -> str:
    home = f"{plug._HOMES[name]}.{name}"
    if name == "PRESETS":
        return "规格 sizes：" + "、".join(f"`{each}`" for each in found) + "\n"
    if getattr(found, "__module__", "").startswith("plug.hf"):
        home = f"{found.__module__}.{name}"
    is_settings = dataclasses.is_dataclass(found) and any(
        "option" in field.metadata for field in dataclasses.fields(found)
    )
    options = "    options:\n      members: false\n      show_signature: false\n"
    directive = f"::: {home}\n" + (options if is_settings else "")
    return directive + ("\n" + markdown_table(found) if is_settings else "")


# --- HTTP -----------------------------------------------------------------------------------------


def http() -> str:
    schema = create_app([], ServeSettings()).openapi()
    lines = [
        "# HTTP 接口 HTTP routes\n",
        "由服务的 OpenAPI 描述生成。Made from the server's OpenAPI schema.\n",
    ]
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            lines.append(f"\n## `{method.upper()} {path}`\n\n{route.get('description', '')}\n")
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {})
            if "$ref" in body.get("schema", {}):
                lines += fields(resolved(schema, body["schema"]), schema)
            answers = [
                f"{status}：{answer['description']}"
                for status, answer in route["responses"].items()
                if status != "200"
            ]
            if answers:
                lines.append("\n状态码 statuses：" + "；".join(answers) + "\n")
    return "\n".join(lines) + "\n"


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    for name in part.get("$ref", "#").split("/")[1:]:
        schema = schema[name]
    return schema if "$ref" in part else part


def fields(model: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    yield "| 字段 field | 类型 type | 默认 default | 含义 meaning |\n| --- | --- | --- | --- |"
    required = model.get("required", ())
    for name, field in model.get("properties", {}).items():
        default = "必填 required" if name in required else f"`{field.get('default')}`"
        meaning = cell(field.get("description", ""))
        yield f"| `{name}` | {cell(kind(field, schema))} | {default} | {meaning} |"


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
            ("minLength", "长度 length ≥"),
            ("maxLength", "长度 length ≤"),
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
