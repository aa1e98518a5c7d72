"""The good files that are altered: a checkpoint, its bundles, a schedule, images and clips."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = "what color is the star ?"


@dataclass(frozen=True)
class Seeds:
    """Where they are."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def bundle(self) -> Path:
        """Of one image, with pruning inside the decoder."""
        return self.folder / "bundle"

    @property
    def video_bundle(self) -> Path:
        """Of a clip's three frames."""
        return self.folder / "video-bundle"

    @property
    def dial(self) -> Path:
        """Of one image at two ratios, with weights of 4 and 8 bits that samples chose."""
        return self.folder / "dial"

    @property
    def bundles(self) -> tuple[Path, Path]:
        """Those of one image."""
        return self.bundle, self.dial

    @property
    def checkpoints(self) -> list[Path]:
        """A checkpoint of each of several families, and a quantised one."""
        return sorted((self.folder / "checkpoints").iterdir())

    @property
    def schedule(self) -> Path:
        return self.folder / "schedule.json"

    @property
    def image(self) -> Path:
        return self.folder / "images" / "rgb.png"

    @property
    def outside(self) -> Path:
        """A good image that no input may reach."""
        return self.folder / "outside.png"

    def all(self, kind: str) -> list[Path]:
        """Every seed in the folder `images` or `clips`."""
        return sorted((self.folder / kind).iterdir())

    @property
    def manifest(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.bundle / "manifest.json").read_text())
        return found


def prepare(folder: Path) -> Seeds:
    """Make the seeds, or take those that the folder already has."""
    seeds, done = Seeds(folder), folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _images(seeds.folder / "images", seeds.outside)
        _models(seeds)
        _checkpoints(seeds.folder / "checkpoints")
        _schedule(seeds)
        _clips(seeds.folder / "clips")
        done.touch()
    return seeds


def _models(seeds: Seeds) -> None:
    from benchmarks.shapes import write
    from edgeprune.cli import main
    from tests import families
    from tests.tiny import TINY

    write(TINY, seeds.checkpoint)
    video = families.internvl().save(seeds.folder / "video-checkpoint")
    (samples := seeds.folder / "images.json").write_text(json.dumps([_sample(seeds.image)] * 2))
    fastv = "--method", "fastv", "--set", "K=1"
    chosen = (
        "--weights",
        "auto:bits=6",
        "--samples-file",
        samples,
        "--image-dir",
        seeds.image.parent,
    )
    exports = [
        (seeds.bundle, seeds.checkpoint, *fastv, "--cr", "1.5"),
        (seeds.dial, seeds.checkpoint, *fastv, "--cr", "1.5,1.2", *chosen),
        (seeds.video_bundle, video, "--method", "none", "--frames", 3),
    ]
    for output, model, *options in exports:
        parts = ["export", "--model", model, *options, "--parity", 0, "-o", output]
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
            code = main([str(part) for part in parts])
        if code:
            raise RuntimeError(f"no seeds without this export: {said.getvalue()}")


def _sample(image: Path) -> dict[str, object]:
    """A record of LLaVA-Instruct."""
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    return {"id": "a", "image": image.name, "conversations": turns}


def _checkpoints(folder: Path) -> None:
    """Tiny random ones, in the layout that transformers saves."""
    from tests import families, gemma, glm, lfm2, pixtral, qwen
    from tests.packing import Codes, gptq, pack

    folder.mkdir()
    for family in (pixtral.pixtral(), pixtral.ministral3(), gemma.gemma3(), lfm2.lfm2_vl()):
        family.save(folder / family.name)
    glm.checkpoint(folder / "glm46v")
    qwen.stacked_checkpoint(folder / "qwen3_vl")
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}

    def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes = Codes.of(weight, 4, 16, symmetric=True)
        return gptq(codes), codes.floats()

    pack(families.llava().save(folder / "llava"), folder, scheme, packed)


def _schedule(seeds: Seeds) -> None:
    """For the checkpoint's 16 visual tokens and 3 layers, at CR 2."""
    from edgeprune.calib.schedule import Evidence, solve

    rng = np.random.default_rng(0)
    attention = rng.random((2, 3, 16)).astype(np.float32)
    loss = np.sort(rng.random((2, 3)).astype(np.float32))[:, ::-1]
    evidence = Evidence(attention, loss.copy(), None, ("a", "b"))
    seeds.schedule.write_text(solve(evidence, cr=2, first=16).to_json())


def _images(folder: Path, outside: Path) -> None:
    """One small image in each mode and format that is read, with what their headers may hold."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    levels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    rgba = Image.fromarray(levels)
    rgb, grey, frames = rgba.convert("RGB"), rgba.convert("L"), [rgba.convert("RGB").rotate(90)]
    deep = Image.fromarray(levels[..., 0].astype(np.uint16) * 200)
    real = Image.fromarray(levels[..., 0].astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    many = {"save_all": True, "append_images": frames}
    saved: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "rgb.png": (rgb, {}),
        "rgba.png": (rgba, {}),
        "grey-alpha.png": (rgba.convert("LA"), {}),
        "palette.png": (rgb.quantize(16), {"transparency": bytes(range(16))}),
        "bits.png": (grey.convert("1"), {}),
        "deep.png": (deep, {}),
        "frames.png": (rgb, many),
        "exif.png": (rgb, {"exif": exif, "icc_profile": b"x" * 200, "dpi": (72, 72)}),
        "plain.jpg": (rgb, {"exif": exif}),
        "progressive.jpg": (rgb, {"progressive": True, "comment": b"a comment"}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "grey.jpg": (grey, {"quality": 30, "restart_marker_blocks": 2}),
        "raw.tiff": (rgb, {"exif": exif}),
        "lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
        "deflate.tiff": (rgba, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (rgb, {"compression": "jpeg"}),
        "fax.tiff": (grey.convert("1"), {"compression": "group4"}),
        "deep.tiff": (deep, {}),
        "float.tiff": (real, {}),
        "pages.tiff": (rgb, many),
        "big.tiff": (grey, {"big_tiff": True}),
        "plain.gif": (rgb.quantize(16), {"transparency": 3}),
        "frames.gif": (rgb, many),
        "lossy.webp": (rgb, {"exif": exif}),
        "lossless.webp": (rgba, {"lossless": True}),
        "frames.webp": (rgb, many),
        "rgb.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(16), {}),
        "icon.ico": (rgba, {"sizes": [(16, 16), (32, 24)]}),
        "icon-bmp.ico": (rgba, {"sizes": [(16, 16)], "bitmap_format": "bmp"}),
        "rgb.ppm": (rgb, {}),
        "deep.pgm": (deep, {}),
        "bits.pbm": (grey.convert("1"), {}),
        "float.pfm": (real, {}),
        "rgb.jp2": (rgb, {}),
        "rgb.avif": (rgb, {}),
    }
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    (folder / "letters.ppm").write_bytes(b"P3 4 2 255\n" + b"1 2 3\n" * 8)
    rgb.save(outside)


def _clips(folder: Path) -> None:
    """A few frames in each container that is common."""
    from tests.clips import clip, corner, encoded

    folder.mkdir(exist_ok=True)
    levels = np.random.default_rng(0).integers(0, 256, (32, 64), dtype=np.uint8)
    frames = [np.roll(levels, 4 * n, 1) for n in range(6)]
    clip(folder / "ffv1.mkv", 6)
    corner(folder / "turned.mp4", "90 clockwise", Fraction(2))
    for name, codec, pixels in (
        ("mpeg4.mp4", "mpeg4", "yuv420p"),
        ("mjpeg.avi", "mjpeg", "yuvj420p"),
        ("mpeg2.ts", "mpeg2video", "yuv420p"),
        ("mpeg2.mpg", "mpeg2video", "yuv420p"),
        ("vp8.webm", "libvpx", "yuv420p"),
        ("h264.mp4", "libx264", "yuv420p"),
        ("h264.mov", "libx264", "yuv420p"),
        ("flv1.flv", "flv", "yuv420p"),
        ("gif.gif", "gif", "gray"),
    ):
        encoded(folder / name, codec, pixels, frames)
