"""Image files whose headers, chunks and tags are altered, and files that only look like images."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from random import Random

from tests.fuzz.case import Case, command
from tests.fuzz.mutate import damage
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 22

SIZES = (0, 1, 2, 7, 255, 256, 4096, 9_999, 10_001, 20_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 255, 256, 65_535, 65_536, 2**31 - 1, 2**32 - 1)

FOREIGN = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "pcx": b"\x0a\x05\x01\x08" + bytes(124),
    "xbm": b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {0x00};\n",
    "psd": b"8BPS\0\1" + bytes(40),
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "pdf": b"%PDF-1.4\n%%EOF\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "text": b"an image of a cat\n",
    "empty": b"",
}
SIGNS = (
    b"\x89PNG",
    b"\xff\xd8",
    b"GIF8",
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"P",
    b"\0\0",
)


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    content, note = altered(rng, seeds)
    (path := folder / "image.png").write_bytes(content)
    ask = command(
        *("run", seeds.bundle, "--image", path, "--prompt", QUESTION),
        *("--max-new-tokens", 1, "--threads", 1),
    )
    return Case(ask, note, content.startswith(SIGNS), refuse=note in FOREIGN)


def altered(rng: Random, seeds: Seeds) -> tuple[bytes, str]:
    """An image file, and what was altered; the name alone of a format that is not read."""
    if rng.random() < 0.06:
        name = rng.choice(sorted(FOREIGN))
        return FOREIGN[name], name
    seed = rng.choice(seeds.all("images"))
    content, notes = seed.read_bytes(), [seed.name]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        way = WAYS.get(seed.suffix)
        try:
            if way is None or rng.random() < 0.3:
                raise ValueError
            content, note = way(content, rng)
        except Exception:  # damaged before, or no such way
            content, note = damage(content, rng, rng.choice(seeds.all("images")).read_bytes())
        notes.append(note)
    return content, ": ".join([notes[0], ", ".join(notes[1:])])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    at, found = 8, []
    while at + 8 <= len(content):
        size = struct.unpack_from(">I", content, at)[0]
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    return found


EXTRA = (
    (b"tRNS", b"\0\1"),
    (b"tRNS", bytes(6)),
    (b"PLTE", bytes(3)),
    (b"PLTE", bytes(768)),
    (b"gAMA", bytes(4)),
    (b"acTL", struct.pack(">II", 2**31, 0)),
    (b"acTL", struct.pack(">II", 2, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**31, 2**31, 1, 1, 0, 0, 9, 9)),
    (b"eXIf", b"Exif\0\0"),
    (b"eXIf", b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    (b"tEXt", b"k\0" + b"v" * 9999),
    (b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000))),
    (b"pHYs", bytes(9)),
    (b"IEND", b""),
    (b"iCCP", b"k\0\0" + zlib.compress(bytes(9_000_000))),
    (b"iTXt", b"k\0\1\0\0\0" + b"x" * 99),
    (b"sBIT", b"\1"),
    (b"IDAT", b""),
    (b"fdAT", bytes(8)),
    (b"\xff" * 4, b"x"),
)


def png(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Fields of the header, chunks, and rows, their sums mended."""
    chunks = _chunks(content)
    way, at = rng.choice(["header", "header", "extra", "drop", "twice", "swap", "rows", "data"]), 0
    if way == "header":
        fields = list(struct.unpack(">IIBBBBB", chunks[0][1][:13]))
        which = rng.randrange(7)
        fields[which] = (
            rng.choice(SIZES) if which < 2 else rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
        )
        chunks[0] = b"IHDR", struct.pack(">IIBBBBB", *fields)
        way = f"header {fields}"
    elif way == "extra":
        chunks.insert(rng.randrange(1, len(chunks) + 1), extra := rng.choice(EXTRA))
        way = f"{extra[0]!r} of {len(extra[1])}"
    elif way == "rows":
        rows = bytearray(zlib.decompress(b"".join(d for k, d in chunks if k == b"IDAT")))
        for _ in range(rng.choice([1, 4, 99])):
            rows[rng.randrange(len(rows))] = rng.randrange(256)
        rows = rows[: rng.choice([1, len(rows), len(rows)])] * rng.choice([1, 1, 3])
        chunks = [c for c in chunks if c[0] != b"IDAT"]
        chunks.insert(1, (b"IDAT", zlib.compress(bytes(rows))))
    else:
        at = rng.randrange(len(chunks))
        kind, data = chunks[at]
        if way == "drop":
            del chunks[at]
        elif way == "twice":
            chunks.insert(at, chunks[at])
        elif way == "swap":
            other = rng.randrange(len(chunks))
            chunks[at], chunks[other] = chunks[other], chunks[at]
        else:
            chunks[at] = kind, damage(data, rng)[0]
        way = f"{way} {kind!r}"
    return content[:8] + b"".join(_chunk(*chunk) for chunk in chunks), way


def _segments(content: bytes) -> list[bytes]:
    """Markers with their lengths; a scan goes with all that follows it up to the next marker."""
    found, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        end = at + 2 + struct.unpack_from(">H", content, at + 2)[0]
        if content[at + 1] == 0xDA:
            while end + 1 < len(content) and not (
                content[end] == 0xFF and content[end + 1] not in (0, *range(0xD0, 0xD8))
            ):
                end += 1
        found.append(content[at:end])
        at = end
    return [*found, content[at:]]


def jpeg(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Fields of the frame, tables, and scans; scans a thousand times over."""
    parts = _segments(content)
    frame = next(n for n, part in enumerate(parts) if part[1:2] in (b"\xc0", b"\xc2"))
    scans = [n for n, part in enumerate(parts) if part[1:2] == b"\xda"]
    way = rng.choice(["size", "field", "table", "drop", "twice", "scans", "exif", "swap"])
    if way == "size":
        sizes = [rng.choice(SIZES) & 0xFFFF for _ in range(2)]
        parts[frame] = parts[frame][:5] + struct.pack(">HH", *sizes) + parts[frame][9:]
        way = f"size {sizes}"
    elif way == "field":
        part = bytearray(parts[frame])
        part[rng.choice([4, *range(9, len(part))])] = rng.choice(NUMBERS) & 255
        parts[frame] = bytes(part)
    elif way == "scans":
        many = rng.choice([2, 40, 1000])
        claimed = rng.choice([struct.pack(">HH", 9_000, 10_000), parts[frame][5:9]])
        parts[frame] = parts[frame][:5] + claimed + parts[frame][9:]
        parts[scans[-1]] *= many
        way = f"{many} scans, {claimed.hex()}"
    elif way == "exif":
        data = b"Exif\0\0" + rng.choice([b"", b"II*\0", b"MM\0*" + rng.randbytes(200)])
        parts.insert(1, b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data)
    else:
        at = rng.randrange(1, len(parts))
        if way == "drop":
            del parts[at]
        elif way == "twice":
            parts.insert(at, parts[at])
        elif way == "swap":
            other = rng.randrange(1, len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts[at] = parts[at][:4] + damage(parts[at][4:], rng)[0]
        way = f"{way} of segment {at}"
    return b"".join(parts), way


def tiff(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Tags of a directory: their kind, count, value; and where the next directory is."""
    order = "<" if content[:2] == b"II" else ">"
    if content[2:4] not in (b"*\0", b"\0*"):
        raise ValueError  # of 64-bit offsets
    data = bytearray(content)
    start = struct.unpack_from(f"{order}I", data, 4)[0]
    entries = struct.unpack_from(f"{order}H", data, start)[0]
    at = start + 2 + 12 * rng.randrange(entries)
    tag = struct.unpack_from(f"{order}H", data, at)[0]
    way = rng.choice(["value", "value", "value", "count", "kind", "tag", "next", "entries"])
    if way == "value":
        struct.pack_into(f"{order}I", data, at + 8, rng.choice(NUMBERS))
    elif way == "count":
        struct.pack_into(f"{order}I", data, at + 4, rng.choice(NUMBERS))
    elif way == "kind":
        struct.pack_into(f"{order}H", data, at + 2, rng.randrange(20))
    elif way == "tag":
        new = rng.choice(
            [254, 258, 259, 262, 266, 274, 277, 284, 317, 320, 322, 323, 330, 338, 34665]
        )
        struct.pack_into(f"{order}H", data, at, new)
    elif way == "next":
        struct.pack_into(
            f"{order}I", data, start + 2 + 12 * entries, rng.choice([start, 8, 2**32 - 1])
        )
    else:
        struct.pack_into(f"{order}H", data, start, rng.choice([0, 1, entries - 1, 65_535]))
    return bytes(data), f"{way} of tag {tag}"


def _numbers(first: int, last: int, width: int, order: str = "<") -> object:
    """Alters one number of a header that has a fixed place."""
    letter = {1: "B", 2: "H", 4: "I"}[width]

    def alter(content: bytes, rng: Random) -> tuple[bytes, str]:
        data, at = bytearray(content), rng.randrange(first, last, width)
        value = rng.choice([*SIZES, *NUMBERS]) & (256**width - 1)
        struct.pack_into(f"{order}{letter}", data, at, value)
        return bytes(data), f"{value} at {at}"

    return alter


def gif(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The screen, the first frame, or an extension that never ends."""
    data, way = bytearray(content), rng.choice(["screen", "frame", "extensions", "code"])
    frame = content.index(b",", 13 + 3 * (2 << (content[10] & 7)) * bool(content[10] & 128))
    if way == "screen":
        return _numbers(6, 10, 2)(content, rng)  # type: ignore[operator, no-any-return]
    if way == "frame":
        struct.pack_into("<H", data, frame + rng.choice([1, 3, 5, 7]), rng.choice(SIZES) & 0xFFFF)
    elif way == "extensions":
        data[frame:frame] = (b"\x21\xfe" + (b"\xff" + bytes(255)) * 4 + b"\0") * rng.choice(
            [1, 999]
        )
    else:
        data[frame + 10 : frame + 11] = bytes([rng.randrange(256)])
    return bytes(data), way


def webp(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Sizes of the chunks and of the canvas."""
    data, at, starts = bytearray(content), 12, []
    while at + 8 <= len(content):
        starts.append(at)
        size = struct.unpack_from("<I", content, at + 4)[0]
        at += 8 + size + (size & 1)
    at = rng.choice(starts)
    way = rng.choice(["size", "kind", "field", "twice"])
    if way == "size":
        struct.pack_into("<I", data, at + 4, rng.choice(NUMBERS))
    elif way == "kind":
        data[at : at + 4] = rng.choice(
            [b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF"]
        )
    elif way == "field":
        data[at + 8 + rng.randrange(min(16, len(data) - at - 8))] = rng.choice([0, 1, 127, 255])
    else:
        data[at:at] = data[at:]
    return bytes(data), f"{way} of chunk {content[at : at + 4]!r}"


def portable(content: bytes, rng: Random) -> tuple[bytes, str]:
    """The words of a PPM, PGM, PBM or PFM header."""
    words = content.split(maxsplit=3)
    at = rng.randrange(1, len(words))
    wide = [b"0", b"-1", b"1e9", b"99999", b"9" * 40, b"#", b"\xff", b"65536", b"20000"]
    words[at] = rng.choice(wide) if at < 3 else damage(words[at], rng)[0]
    return b"\n".join(words), f"word {at} {words[at][:20]!r}"


WAYS = {
    ".png": png,
    ".jpg": jpeg,
    ".tiff": tiff,
    ".gif": gif,
    ".webp": webp,
    ".bmp": _numbers(2, 50, 4),
    ".ico": _numbers(4, 38, 2),
    ".jp2": _numbers(40, 140, 4, ">"),
    ".avif": _numbers(0, 280, 4, ">"),
    ".ppm": portable,
    ".pgm": portable,
    ".pbm": portable,
    ".pfm": portable,
}
