"""Ways to damage a file: each gives other content, and says what was done. Used by `fuzz.py`."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[bytes, random.Random], tuple[bytes, str]]
WORDS = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "[]",
    "{}",
    '""',
    "!!python/object/apply:os.system [id]",
    "&a [*a]",
    "*b",
    "nan",
    ".inf",
    "0x10",
    "1_000",
    "2020-01-01",
    "~",
    "'\x00'",
    "!!binary aGk=",
    "[[[[[[[[]]]]]]]]",
    "../../etc",
    "/",
    ".",
    "\u202e",
    "9" * 400,
    "- 1",
    "? a",
    "<<: {a: 1}",
    "%YAML 1.1",
    "---",
    "...",
    "a: b: c",
    "\t",
    '"\\ud800"',
    "1e-400",
    "9" * 25,
    "x" * 100_000,
    "[" * 100_000,
    "&a [&b [*a, *b], *a]",
    "!!set {a, a}",
    "http://me:secret@localhost/v1",
    "/dev/zero",
    "~nobody/x",
]
VALUES = [
    None,
    True,
    -1,
    0,
    10**400,
    1.5,
    "",
    "x",
    [],
    {},
    [[]],
    {"a": None},
    "\ud800",
    "\x00",
    [None],
    -(10**30),
    2**31,
    2**63,
    float("nan"),
    float("-inf"),
    1e-320,
    "\udfff\ud800",
    "x" * 100_000,
    "../../x",
    "/dev/zero",
    {"": {"": [{}]}},
    ["x"] * 1000,
]


def any_bytes(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Damage that knows nothing of the format."""
    place = chance.randrange(len(content) + 1)
    length = chance.choice([1, 1, 2, 8, 64])
    way = chance.choice(
        ["flip", "cut off", "remove", "insert", "zero", "double", "empty", "swap", "encode", "mark", "ends"]
    )
    if way == "flip":
        place = min(place, len(content) - 1)
        content = content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    elif way == "cut off":
        content = content[:place]
    elif way == "remove":
        content = content[:place] + content[place + length :]
    elif way == "insert":
        content = content[:place] + chance.randbytes(length) + content[place:]
    elif way == "zero":
        content = content[:place] + bytes(length) + content[place + length :]
    elif way == "double":
        content = content[:place] + content[place : place + length] * 2 + content[place + length :]
    elif way == "empty":
        content = b""
    elif way == "encode":
        to = chance.choice(["utf-16", "utf-16-be", "utf-32", "utf-7"])
        return content.decode("utf-8", "replace").encode(to), f"written as {to}"
    elif way == "mark":
        content = chance.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PK\3\4", b"\x80\4"]) + content
    elif way == "ends":
        content = content.replace(b"\n", chance.choice([b"\r\n", b"\r", b"\0", b"\n\n", "\u2028".encode()]))
    else:
        other = chance.randrange(len(content) + 1)
        one, two = sorted((place, other))
        content = content[two:] + content[one:two] + content[:one]
    return content, f"{way} at {place}"


def any_yaml(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A line of YAML that says something else, twice, or nothing."""
    lines = content.decode().splitlines()
    place = chance.randrange(len(lines))
    key = lines[place].split(":")[0]
    way = chance.choice(["value", "double", "remove", "indent", "key", "nest", "word"])
    word = chance.choice(WORDS)
    if way == "value":
        lines[place] = f"{key}: {word}"
    elif way == "double":
        lines.insert(place, lines[place])
    elif way == "remove":
        del lines[place]
    elif way == "indent":
        lines[place] = " " * chance.randrange(1, 9) + lines[place]
    elif way == "key":
        lines[place] = lines[place].replace(key, key[:-1] + chance.choice("xyz:"), 1)
    elif way == "nest":
        lines[place] = f"{key}: " + "{a: " * chance.choice([3, 3000]) + "1" + "}" * 3
    else:
        lines.insert(place, word)
    return "\n".join(lines).encode("utf-8", "surrogatepass"), f"{way} {word!r:.40} in line {place + 1}"


def any_json(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A JSON document, or one line of several, in which one value is another."""
    lines = content.decode().split("\n")
    places = [i for i, line in enumerate(lines) if line.strip()]
    whole = content.decode().lstrip().startswith("{\n")
    place = chance.choice(places)
    tree = json.loads(content) if whole else json.loads(lines[place])
    path, node, parent = [], tree, tree
    while isinstance(node, (dict, list)) and node and (not path or chance.random() < 0.7):
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(key)
        parent, node = node, node[key]
    value = chance.choice(VALUES)
    if path:
        parent[path[-1]] = value
    text = json.dumps(tree, indent=2 if whole else None)
    if chance.random() < 0.2:
        text = chance.choice(
            [text + text, text.replace("{", '{"a": NaN, ', 1), "[" * 5000, text.replace('"', "'")]
        )
    if not whole:
        lines[place] = text
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass"), f"{path} = {value!r:.40}"


def any_header(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A safetensors file whose header says something else of the same bytes."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = chance.choice([key for key in header if key != "__metadata__"])
    one = header[name]
    way = chance.choice(
        ["offsets", "shape", "dtype", "length", "double", "missing", "overlap", "value", "deep", "cut"]
    )
    if way == "offsets":
        one["data_offsets"] = [chance.choice([-1, 0, 10**18, 3]), chance.choice([-5, 1, 10**18, len(body)])]
    elif way == "shape":
        one["shape"] = chance.choice(
            [[], [0], [-1], [10**9, 10**9], ["x"], [1.5], [True], None, one["shape"][::-1]]
        )
    elif way == "dtype":
        one["dtype"] = chance.choice(["F33", "", None, 3, "I64", "BOOL", "F16"])
    elif way == "missing":
        del header[name]
    elif way == "overlap":
        other = header[chance.choice([key for key in header if key not in ("__metadata__", name)])]
        one["data_offsets"] = other["data_offsets"]
    elif way == "value":
        header[name] = chance.choice(VALUES)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if way == "double":
        text = text[:-1] + b", " + json.dumps({name: one}).encode()[1:]
    elif way == "deep":
        text = b"[" * 100_000
    length = (
        len(text) if way != "length" else chance.choice([0, 1, 2**63, 2**40, len(text) - 1, len(text) + 1])
    )
    if way == "cut":
        body = body[: chance.randrange(len(body))]
    return struct.pack("<Q", length) + text + body, f"{way} of {name}"


def any_kind(path: Path, chance: random.Random) -> str:
    """Put something else than a file at a path; what it is."""
    links = {"a device": "/dev/zero", "a link to nothing": "nowhere", "a link to itself": path.name}
    way = chance.choice(["nothing", "a folder", "a pipe", "a link out", *links])
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a pipe":
        os.mkfifo(path)
    elif way != "nothing":
        path.symlink_to(links.get(way, __file__))
    return way
