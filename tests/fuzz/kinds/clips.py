"""Clips whose boxes and fields are altered, and playlists that name other files."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

from tests.fuzz.case import Case, command
from tests.fuzz.mutate import damage
from tests.fuzz.seeds import QUESTION, Seeds

WEIGHT = 10

NUMBERS = (0, 1, 2, 8, 255, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta")
FIELDS = (b"mvhd", b"tkhd", b"mdhd", b"stsd", b"stts", b"stsz", b"stsc", b"stco", b"elst", b"stss")


def make(rng: Random, seeds: Seeds, folder: Path) -> Case:
    clip = folder / "clip.mp4"
    playlist = rng.random() < 0.1
    if playlist:
        content, note = _playlist(rng, seeds, folder)
    else:
        content, note = _altered(rng, seeds)
    clip.write_bytes(content)
    ask = command(
        *("run", seeds.video_bundle, "--video", clip, "--prompt", QUESTION),
        *("--max-new-tokens", 1, "--threads", 1),
    )
    return Case(ask, note, not playlist and content[:4] != b"\0" * 4, refuse=playlist)


def _playlist(rng: Random, seeds: Seeds, folder: Path) -> tuple[bytes, str]:
    """Text that FFmpeg would follow to a good clip beside it."""
    for name in ("mpeg2.ts", "ffv1.mkv"):
        (folder / name).write_bytes((seeds.folder / "clips" / name).read_bytes())
    texts = {
        "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nmpeg2.ts\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile ffv1.mkv\n",
        "absolute concat": f"ffconcat version 1.0\nfile {folder / 'ffv1.mkv'}\n",
        "network": "#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    }
    name = rng.choice(sorted(texts))
    return texts[name].encode(), name


def _altered(rng: Random, seeds: Seeds) -> tuple[bytes, str]:
    seed = rng.choice(seeds.all("clips"))
    content, notes = seed.read_bytes(), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        if seed.suffix in (".mp4", ".mov") and rng.random() < 0.7:
            content, note = _boxes(content, rng)
        elif rng.random() < 0.15:
            content, note = content.replace(b"Lavf", b"\xff\xfeav"), "text that is no UTF-8"
        else:
            content, note = damage(content, rng, rng.choice(seeds.all("clips")).read_bytes())
        notes.append(note)
    return content, f"{seed.name}: {', '.join(notes)}"


def _found(content: bytes, start: int, end: int) -> list[tuple[bytes, int, int]]:
    """Boxes of an MP4: name, first byte, the byte after the last."""
    found, at = [], start
    while at + 8 <= end:
        size = struct.unpack_from(">I", content, at)[0]
        if size < 8 or at + size > end:
            break
        name = content[at + 4 : at + 8]
        found.append((name, at, at + size))
        if name in HOLDERS:
            found += _found(content, at + 8, at + size)
        at += size
    return found


def _boxes(content: bytes, rng: Random) -> tuple[bytes, str]:
    boxes = _found(content, 0, len(content))
    fields = [box for box in boxes if box[0] in FIELDS]
    if not fields:
        return damage(content, rng)
    name, start, end = rng.choice(fields)
    data, way = bytearray(content), rng.choice(["field", "field", "field", "size", "name", "half"])
    if way == "field":
        at = rng.randrange(start + 8, max(start + 9, end - 3))
        struct.pack_into(">I", data, at, rng.choice(NUMBERS))
        way = f"field {at - start}"
    elif way == "half":
        struct.pack_into(
            ">H", data, rng.randrange(start + 8, end - 1), rng.choice([0, 1, 9999, 65535])
        )
    elif way == "size":
        struct.pack_into(">I", data, start, rng.choice(NUMBERS))
    else:
        data[start + 4 : start + 8] = rng.choice([*HOLDERS, *FIELDS, b"free"])
    return bytes(data), f"{way} of {name.decode()}"
