"""Tag schemes of entities: which one a file uses, and how it reads in BIO.

BIO (IOB2) is what the model learns: B- begins an entity, I- continues it, O is outside. Also read:
BIO1 (IOB1, where I- may begin an entity), BIOES, BILOU, BMES, each with the prefix before or behind
the type, and plain names (PER PER O), where a run of one name is one entity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

from plug.errors import UsageError
from plug.finetuning.readers import OUTSIDE, LabellingExample
from plug.jsonfiles import shown
from plug.textfiles import Notes

Tags = tuple[str, ...]

NO_TYPE = "seg"  # the type of tags that have none: B, M, E, S of word segmentation

_PREFIXES = "BIMELSUW"
_BEFORE = re.compile(rf"([{_PREFIXES}])(?:[-_](.*))?", re.IGNORECASE)
_BEHIND = re.compile(rf"(.+)[-_]([{_PREFIXES}])", re.IGNORECASE)
_INSIDE, _END, _SINGLE = "IM", "EL", "SUW"


def convert_to_bio(examples: Sequence[LabellingExample], notes: Notes) -> list[LabellingExample]:
    """The examples with tags in BIO; `scheme` is what the file had.

    Args:
        examples: of one file; those without tags stay as they are.
        notes: is told of tags that do not obey their scheme, such as an I- that continues nothing
            (it begins an entity then, as in the scorer of CoNLL).

    Raises:
        UsageError: the tags mix schemes, or are numbers, so that their meaning is not certain.
    """
    found = set(chain.from_iterable(example.tags or () for example in examples))
    scheme, split = _recognise(found, examples)
    converted = []
    for example in examples:
        tags = example.tags
        if tags is not None:
            pairs = [split[tag] for tag in tags]
            if scheme == "IO":
                tags, strays = _plain_to_bio(pairs), 0
            else:
                tags, strays = _prefixed_to_bio(pairs, has_ends=scheme not in ("BIO", "BIO1"))
            if strays and scheme != "BIO1":
                notes.add("标签不合规则（如 I- 前面没有 B-），每段仍读作一个实体", example.place)
        converted.append(replace(example, tags=tags, scheme=scheme))
    if scheme != "BIO":
        notes.add(f"{scheme} 标签换成了 BIO", examples[0].place)
    return converted


def _recognise(
    found: set[str], examples: Sequence[LabellingExample]
) -> tuple[str, dict[str, tuple[str, str]]]:
    """The scheme, and (prefix, type) of every tag; the prefix of O is O."""
    named = {tag for tag in found if tag.upper() != OUTSIDE}
    outside = dict.fromkeys(found - named, (OUTSIDE, ""))
    place = next((e.place for e in examples if named.intersection(e.tags or ())), "")
    if named and all(tag.isdecimal() for tag in named):
        raise UsageError(f"{place}的 tags 是编号（{_few(named)}），不知道它们的名字。")
    for pattern, prefix, kind in ((_BEFORE, 1, 2), (_BEHIND, 2, 1)):
        matches = {tag: match for tag in named if (match := pattern.fullmatch(tag))}
        typed = [tag for tag, match in matches.items() if match[kind]]
        if not matches or (len(matches) < len(named) and not typed):
            continue
        split = {
            tag: (match[prefix].upper(), match[kind] or NO_TYPE) for tag, match in matches.items()
        }
        prefixes = {first for first, _ in split.values()}
        if pattern is _BEHIND and "B" not in prefixes:
            continue  # names that happen to end so
        if not typed and not {"B", "S"} & prefixes:
            continue  # names of one letter
        if rest := named - matches.keys():
            raise UsageError(
                f"{place}的标签混用了几种写法：{_few(matches)} 带前缀，{_few(rest)} 不带。"
                "请统一成一种，如 B-PER、I-PER、O。"
            )
        if typed and len(typed) < len(named):
            raise UsageError(f"{place}的标签有的带类型，有的不带：{_few(named)}。请统一。")
        return _prefix_scheme(prefixes, split | outside, examples, place), split | outside
    return ("IO" if named else "BIO"), {tag: ("", tag) for tag in named} | outside


def _prefix_scheme(
    prefixes: set[str],
    split: dict[str, tuple[str, str]],
    examples: Sequence[LabellingExample],
    place: str,
) -> str:
    for name, allowed, telling in (
        ("BIO", "BI", "BI"),
        ("BMES", "BMESW", "M"),
        ("BILOU", "BILU", "LU"),
        ("BIOES", "BIESW", "ESW"),
    ):
        if prefixes <= set(allowed) and prefixes & set(telling):
            if name == "BIO" and _is_bio1(split, examples):
                return "BIO1"
            return name
    raise UsageError(f"{place}的标签用了 {_few(prefixes)} 这些前缀，不是已知的标注方式。")


def _is_bio1(split: dict[str, tuple[str, str]], examples: Sequence[LabellingExample]) -> bool:
    """Whether I- begins entities, and B- stands only after an entity of the same type."""
    begun_by_inside = False
    for example in examples:
        before = ""
        for tag in example.tags or ():
            prefix, kind = split[tag]
            if prefix == "B" and before != kind:
                return False
            begun_by_inside |= prefix == "I" and before != kind
            before = kind
    return begun_by_inside


def _prefixed_to_bio(pairs: Iterable[tuple[str, str]], *, has_ends: bool) -> tuple[Tags, int]:
    """Tags in BIO, and how many of them did not obey the scheme."""
    tags, strays = [], 0
    going_on = ""  # type of the entity that the next tag may continue
    for prefix, kind in pairs:
        continues = prefix in _INSIDE + _END and going_on == kind
        if not continues:
            strays += prefix in _INSIDE + _END
            strays += has_ends and going_on != ""  # the entity before has no end
        if prefix == OUTSIDE:
            tags.append(OUTSIDE)
        else:
            tags.append(f"{'I' if continues else 'B'}-{kind}")
        going_on = "" if prefix in _END + _SINGLE + OUTSIDE else kind
    return tuple(tags), strays + (has_ends and going_on != "")


def _plain_to_bio(pairs: Iterable[tuple[str, str]]) -> Tags:
    """Of plain names: a run of one name is one entity."""
    tags, before = [], ""
    for prefix, kind in pairs:
        if prefix == OUTSIDE:
            tags.append(OUTSIDE)
        else:
            tags.append(f"{'I' if kind == before else 'B'}-{kind}")
        before = kind
    return tuple(tags)


def _few(tags: Iterable[str]) -> str:
    listed = sorted(tags)
    return shown("、".join(listed[:6]))[1:-1] + (f" 等 {len(listed)} 个" if len(listed) > 6 else "")
