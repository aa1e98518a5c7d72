"""Stored tensors that no module of a bundle reads: known leftovers, reported, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable

from edgeprune.errors import ModelError
from edgeprune.models._checkpoint import Checkpoint
from edgeprune.models._format import UNWRAP, is_wrapped
from edgeprune.models._lora import MERGE

_SPARE = re.compile(
    r"rotary_emb\.inv_freq$"  # computed from config.json
    r"|\.position_ids$"  # 0, 1, 2, ...
    r"|\.post_layernorm\."  # after the last block, of which the projector reads nothing
    r"|vision_model\.head\."  # SigLIP's, for one vector an image
    r"|\.mask_token$"  # of training
    r"|image_newline$"  # ends rows of tiles, which a bundle for frames has not
)
SHOWN = 3
"""Names in a line."""


def is_spare(name: str, left_out: tuple[str, ...]) -> bool:
    """Whether a tensor is one of those that checkpoints hold for other uses, or of a block that is
    not run: `left_out` are the prefixes of such blocks."""
    return bool(_SPARE.search(name)) or name.startswith(left_out)


def check_unread(
    checkpoint: Checkpoint, read: set[str], changed: set[str], spare: Callable[[str], bool]
) -> tuple[str, ...]:
    """Lines about a checkpoint's adapter and the tensors that are not `read`.

    ModelError where an adapter changes what nothing reads (`changed` are its names of what is
    read), or where a tensor shows that others mean something else.
    """
    lines, lora = list[str](), checkpoint.lora
    if lora is not None:
        if lost := sorted(name for name in lora.changes - changed if not spare(name)):
            raise ModelError(
                f"{next(iter(lora.files.values()))} changes {shortened(lost)}, which this model has"
                f" not; {MERGE}"
            )
        lines.append(str(lora))
    unread = sorted(name for name in checkpoint.files.keys() - read if not spare(name))
    unread = [name for name in unread if not checkpoint.is_empty_bias(name)]
    if wrapped := [name for name in unread if is_wrapped(name)]:
        raise ModelError(f"{checkpoint.folder} holds {wrapped[0]}: {UNWRAP}")
    if unread:
        lines.append(f"stored, and read by nothing: {shortened(unread)}")
    return tuple(lines)


def shortened(names: list[str]) -> str:
    """The first of many names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
