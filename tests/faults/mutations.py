"""Seeded damage: bits, lengths and structure of a file, changed as failing disks, cut transfers and strangers do."""

import json
import random
import struct
from typing import Any

STRANGE = [None, [], {}, "", "..", "/", "x" * 5000, True, -1, 0, 1e308, -1e308, 2**63, float("nan"), float("inf"), [[]]]
"""Values that stand where others are expected."""


def mutate_bytes(content: bytes, random_: random.Random) -> bytes:
    """Flips, cuts, doubles or overwrites a part of a file."""
    kind = random_.choice(("flip", "flip", "flips", "cut", "append", "zeros", "noise", "swap"))
    data = bytearray(content)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 64):
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        return bytes(data)
    start = random_.randrange(len(data))
    length = min(random_.choice((1, 8, 200, 5000)), len(data) - start)
    if kind == "cut":
        return bytes(data[:start])
    if kind == "append":
        return bytes(data) + random_.randbytes(length)
    if kind == "zeros":
        data[start : start + length] = bytes(length)
    if kind == "noise":
        data[start : start + length] = random_.randbytes(length)
    if kind == "swap":
        return bytes(data[start:] + data[:start])
    return bytes(data)


def mutate_json(content: bytes, random_: random.Random) -> bytes:
    """Puts a strange value somewhere, takes something away, or nests beyond all bounds."""
    value = json.loads(content)
    if random_.random() < 0.1:
        return b"[" * 200_000 + b"]" * 200_000
    if random_.random() < 0.15:
        return mutate_bytes(content, random_)
    place: Any = value
    key: Any = random_.choice(list(place)) if isinstance(place, dict) else random_.randrange(len(place))
    while isinstance(place[key], (dict, list)) and place[key] and random_.random() < 0.85:
        place = place[key]
        key = random_.choice(list(place)) if isinstance(place, dict) else random_.randrange(len(place))
    if random_.random() < 0.2:
        del place[key]
    else:
        place[key] = random_.choice(STRANGE)
    # The value may have stood there already.
    damaged = json.dumps(value)
    return content if damaged == json.dumps(json.loads(content)) else damaged.encode()


def mutate_safetensors(content: bytes, random_: random.Random) -> bytes:
    """Damages header, header length or contents of a `.safetensors` file."""
    if random_.random() < 0.4:
        return mutate_bytes(content, random_)
    (length,) = struct.unpack("<Q", content[:8])
    if random_.random() < 0.2:
        return struct.pack("<Q", random_.choice((0, 1, length - 1, length + 8, 2**40, 2**63))) + content[8:]
    header = mutate_json(content[8 : 8 + length], random_)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def mutate_embedded_json(content: bytes, random_: random.Random) -> bytes:
    """Damages the JSON that a scene file carries as text in its header."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    key = random_.choice(sorted(key for key in metadata if metadata[key].startswith(("{", "["))))
    damaged = mutate_json(metadata[key].encode(), random_).decode(errors="replace")
    if damaged == metadata[key]:
        return content
    metadata[key] = damaged
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + content[8 + length :]
