"""What an answer tells where `details` is asked: times, and what pruning left of the image.

The page draws both. Kept tokens are indices on the grid of what the model saw of the image, row by
row; that image comes with them, so that patches lie where the model had them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from edgeprune.images import read_image
from edgeprune.manifest import Manifest
from edgeprune.runtime.answer import Timings
from edgeprune.runtime.survivors import Kept, Site, can_be_drawn, drawn, seen, survivors


def details(
    kept: Kept, manifest: Manifest, images: Sequence[bytes], timings: Timings
) -> dict[str, Any]:
    """`timings` in milliseconds, and for one image that can be drawn `pruning`."""
    record: dict[str, Any] = {
        "timings": {
            "preprocess_ms": timings.preprocess,
            "vision_ms": timings.vision,
            "prefill_ms": timings.prefill,
            "decode_ms": sum(timings.decode),
            "decode_tokens": len(timings.decode),
        }
    }
    if len(images) == 1 and manifest.image.frames is None and can_be_drawn(manifest):
        grid = drawn(manifest)
        image = Image.fromarray(seen(read_image(images[0]).image, manifest.image))
        record["pruning"] = {
            "grid": list(grid),
            "visual_tokens": manifest.prune.visual_tokens,
            "layers": list(manifest.prune.counts),
            "sites": [_site(site, grid[1]) for site in survivors(kept, manifest)],
            "image": _png(image),
        }
    return record


def _site(site: Site, columns: int) -> dict[str, Any]:
    return {
        "layer": site.layer,
        "caption": site.caption,
        "kept": sorted(row * columns + column for row, column in site.kept),
        "merged": sorted(row * columns + column for row, column in site.merged),
    }


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
