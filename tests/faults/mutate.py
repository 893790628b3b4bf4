"""Damaged copies of a file: bytes, lines, JSON, safetensors, zipped pickles.

The same seed gives the same copies.

`mutations` knows nothing of the format. The others change what a format says and keep the rest
valid, since a reader's checks of syntax would stop nearly every random change before its meaning.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

INTERESTING_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF, ord('"'), ord(","), ord("\n"), ord("\r"), 0x1A)
INTERESTING_TEXT = (
    "\0",
    "\ufeff",
    "\u200b",
    "\u2028",
    "\x85",
    "\r",
    '"',
    '""',
    "'",
    ",",
    "\t",
    "\n\n",
    "\\",
    "\\u0000",
    "𠮷",
    "{",
    "[",
    "null",
    "NaN",
    "-1",
    "1e999",
    "9" * 400,
    "长" * 3000,
    " " * 200,
)
INTERESTING_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    -1,
    7,
    255,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.0,
    1.0,
    1.5,
    -0.5,
    1e-30,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "1",
    "\0",
    "../../etc/passwd",
    "/",
    "长" * 300,
    [],
    [1],
    [None],
    {},
    {"a": 1},
)


def mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """``count`` copies of ``data``, damaged in bytes, and in lines and characters if it is text."""
    rng = random.Random(seed)
    try:
        is_text = bool(data.decode("utf-8"))
    except UnicodeDecodeError:
        is_text = False
    for _ in range(count):
        damaged = data
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            change = _mutate_text if is_text and rng.random() < 0.6 else _mutate_bytes
            damaged = change(damaged, rng)
        yield damaged


def json_mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """``count`` damaged copies of a JSON file, most of them valid JSON that says something else."""
    rng = random.Random(seed)
    tree = json.loads(data, object_pairs_hook=_Pairs)
    for _ in range(count):
        if rng.random() < 0.2:
            yield next(mutations(data, rng.getrandbits(32), 1))
        else:
            yield _mutate_tree(tree, rng).encode("utf-8", "surrogatepass")


def json_lines_mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """As `json_mutations`, of one line of a file with a JSON value on each."""
    rng = random.Random(seed)
    lines = data.splitlines(keepends=True)
    for _ in range(count):
        index = rng.randrange(len(lines))
        damaged = next(json_mutations(lines[index], rng.getrandbits(32), 1))
        yield b"".join([*lines[:index], damaged.rstrip(b"\n") + b"\n", *lines[index + 1 :]])


def safetensors_mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """``count`` damaged copies of a safetensors file: header, length of the header, values."""
    rng = random.Random(seed)
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    tree = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    for _ in range(count):
        kind = rng.random()
        if kind < 0.2:
            yield next(mutations(data, rng.getrandbits(32), 1))
        elif kind < 0.3:
            wrong = rng.choice(
                (0, 1, 7, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1)
            )
            yield wrong.to_bytes(8, "little") + data[8:]
        elif kind < 0.4:  # values that are no numbers
            at = rng.randrange(len(values))
            yield data[: 8 + length] + values[:at] + b"\xff" * 8 + values[at + 8 :]
        else:
            if kind < 0.7:
                changed = next(json_mutations(header, rng.getrandbits(32), 1))
            else:
                changed = json.dumps(_mutate_entries(tree, names, rng)).encode()
            changed += b" " * (-len(changed) % 8)
            yield len(changed).to_bytes(8, "little") + changed + values


def zip_mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """``count`` damaged copies of a zip archive, such as `torch.save` writes."""
    rng = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in range(count):
        if rng.random() < 0.25:
            yield next(mutations(data, rng.getrandbits(32), 1))
            continue
        changed = list(members)
        index = rng.randrange(len(changed))
        pickles = [i for i, (name, _) in enumerate(changed) if name.endswith(".pkl")]
        if pickles and rng.random() < 0.6:
            index = rng.choice(pickles)
        name, content = changed[index]
        what = rng.randrange(6)
        if name.endswith(".pkl") and what < 5:
            changed[index] = (name, next(pickle_mutations(content, rng.getrandbits(32), 1)))
        elif what == 0:
            del changed[index]
        elif what == 1:
            changed[index] = (rng.choice((f"{name}x", "../../x", "/x", name[1:] or "x")), content)
        elif what == 2:
            changed[index] = (name, content[: rng.randrange(len(content) + 1)])
        elif what == 3:
            changed[index] = (name, content + bytes(rng.randrange(1, 4096)))
        else:
            changed[index] = (name, _mutate_bytes(content, rng))
        yield _zipped(changed)


def pickle_mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """``count`` damaged copies of a pickle: numbers and names of its opcodes, opcodes, bytes."""
    rng = random.Random(seed)
    places = [(code.name, at) for code, _, at in pickletools.genops(data) if at is not None]
    numbers = [(name, at) for name, at in places if name in ("BININT", "BININT1", "BININT2")]
    for _ in range(count):
        what = rng.random()
        if what < 0.4 and numbers:
            name, at = rng.choice(numbers)
            size = {"BININT": 4, "BININT1": 1, "BININT2": 2}[name]
            value = rng.choice((0, 1, 2, -1, 4096, 2**20, 2**31 - 1, -(2**31), rng.getrandbits(16)))
            yield data[:at] + b"J" + struct.pack("<i", value) + data[at + 1 + size :]
        elif what < 0.6:
            _, at = rng.choice(places)
            yield (
                data[:at]
                + bytes([rng.choice(b"()].0123NRbhijlpqrstu\x85\x86\x87\x88\x89")])
                + data[at + 1 :]
            )
        elif what < 0.7:
            _, first = rng.choice(places)
            _, second = rng.choice(places)
            first, second = sorted((first, second))
            yield data[:first] + data[second:]
        else:
            yield next(mutations(data, rng.getrandbits(32), 1))


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return bytes([rng.choice(INTERESTING_BYTES)])
    at = rng.randrange(len(data))
    to = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
    random_bytes = rng.randbytes(rng.choice((1, 4, 8, 100)))
    changes: tuple[Callable[[], bytes], ...] = (
        lambda: data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :],
        lambda: data[:at] + bytes([rng.choice(INTERESTING_BYTES)]) + data[at + 1 :],
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[to:],
        lambda: data[:at] + data[at:to] * 2 + data[to:],
        lambda: data[:at] + random_bytes + data[at:],
        lambda: data[:at] + random_bytes + data[at + len(random_bytes) :],
        lambda: data[:at] + bytes(to - at) + data[to:],
        lambda: data + random_bytes,
    )
    return rng.choice(changes)()


def _mutate_text(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "surrogateescape")
    if rng.random() < 0.5:
        at = rng.randrange(len(text) + 1)
        cut = at + rng.choice((0, 0, 1))
        text = text[:at] + rng.choice(INTERESTING_TEXT) + text[cut:]
    else:
        lines = text.splitlines(keepends=True) or [""]
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        what = rng.randrange(5)
        if what == 0:
            del lines[first]
        elif what == 1:
            lines.insert(second, lines[first])
        elif what == 2:
            lines[first], lines[second] = lines[second], lines[first]
        elif what == 3:
            lines[first] = lines[first].rstrip("\r\n")
        else:
            lines.insert(first, "\n")
        text = "".join(lines)
    return text.encode("utf-8", "surrogateescape")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a key can stand twice."""

    def dump(self) -> str:
        return "{" + ", ".join(f"{json.dumps(k)}: {_dump(v)}" for k, v in self) + "}"


def _dump(value: Any) -> str:
    if isinstance(value, _Pairs):
        return value.dump()
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return value.text if isinstance(value, _Raw) else json.dumps(value)


class _Raw:
    """Text that stands in the place of a value."""

    def __init__(self, text: str) -> None:
        self.text = text


def _mutate_tree(tree: Any, rng: random.Random) -> str:
    places: list[tuple[Any, int]] = []  # a container, and the index of a value in it

    def walk(node: Any) -> None:
        if isinstance(node, list):
            for index in range(len(node)):
                places.append((node, index))
                walk(node[index][1] if isinstance(node, _Pairs) else node[index])

    walk(tree)
    if not places or rng.random() < 0.02:
        return _dump(rng.choice(INTERESTING_VALUES))
    # Large lists would have every change; each container is as likely as another.
    container = rng.choice(list({id(c): c for c, _ in places}.values()))
    index = rng.randrange(len(container))
    return _dump(_with_change(tree, container, index, rng))


def _with_change(tree: Any, container: Any, index: int, rng: random.Random) -> Any:
    """A copy of ``tree`` in which the value at ``index`` of ``container`` is damaged."""
    if tree is container:
        return _damaged(container, index, rng)
    if isinstance(tree, _Pairs):
        return _Pairs((k, _with_change(v, container, index, rng)) for k, v in tree)
    if isinstance(tree, list):
        return [_with_change(each, container, index, rng) for each in tree]
    return tree


def _damaged(container: Any, index: int, rng: random.Random) -> Any:
    items = list(container)
    is_object = isinstance(container, _Pairs)
    key, value = items[index] if is_object else ("", items[index])
    other = rng.randrange(len(items))

    def put(new: Any) -> None:
        items[index] = (key, new) if is_object else new

    what = rng.randrange(10)
    if what == 0:
        del items[index]
    elif what == 1:
        items.insert(other, (key, rng.choice(INTERESTING_VALUES)) if is_object else value)
    elif what == 2 and is_object:
        items[index] = (
            rng.choice((key + "_", key[:-1], key.upper(), "", "model_type", "长")),
            value,
        )
    elif what == 3:
        items[index], items[other] = items[other], items[index]
    elif what == 4:
        put([value])
    elif what == 5:
        put(_Raw("[" * 100_000 + "]" * 100_000))
    elif what == 6 and isinstance(value, (int, float)) and not isinstance(value, bool):
        put(rng.choice((value + 1, value - 1, value * 2, -value, float(value), str(value))))
    elif what == 7 and isinstance(value, (int, float)) and not isinstance(value, bool):
        put(_Raw(rng.choice(("1e999", "-0", f"{value}.0", "0x10", "1_000", "9" * 5000))))
    else:
        put(rng.choice(INTERESTING_VALUES))
    return _Pairs(items) if is_object else items


def _mutate_entries(tree: dict[str, Any], names: list[str], rng: random.Random) -> dict[str, Any]:
    """A safetensors header whose entries claim other things, each by itself well-formed."""
    header = {name: dict(entry) for name, entry in tree.items()}
    first, second = (header[name] for name in rng.choices(names, k=2))
    what = rng.randrange(8)
    if what == 0:
        first["dtype"] = rng.choice(("F16", "BF16", "F64", "I8", "U8", "I32", "BOOL", "F8_E4M3"))
    elif what == 1:
        first["shape"] = first["shape"][::-1]
    elif what == 2:
        first["shape"] = [*first["shape"], 1]
    elif what == 3:
        first["data_offsets"], second["data_offsets"] = (
            second["data_offsets"],
            first["data_offsets"],
        )
    elif what == 4:
        first["data_offsets"] = list(second["data_offsets"])
    elif what == 5:
        first["shape"] = [rng.choice((0, 1, 2**31, 2**62, -1)), *first["shape"]]
    elif what == 6:
        start, end = first["data_offsets"]
        by = rng.choice((1, 4, -4, 2**40))
        first["data_offsets"] = [start + by, end + by]
    else:
        a, b = rng.choices(names, k=2)
        header[a], header[b] = header[b], header[a]
    return header


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    """An archive of ``members`` as `torch.save` writes them: uncompressed, at multiples of 64."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            header_bytes = 30 + len(name.encode())
            padding = -(buffer.tell() + header_bytes + 4) % 64
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, content)
    return buffer.getvalue()
