"""What a policy can look at. Nothing is computed until it is asked for, so only that is traced.

Batch is 1 throughout. Scores are float32 whatever the graph's dtype: attention probabilities near
1e-4 tie heavily in fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgeprune.errors import SpecError

LEAST = torch.finfo(torch.float32).min


WEIGHTS = 1 << 24
"""Attention weights of an encoder block that are held at once: 64 MB."""


@dataclass(frozen=True)
class Segments:
    """Lengths of the three runs of a sequence: text before the image, the image, text after."""

    prefix: int
    visual: int
    text: int

    @property
    def total(self) -> int:
        return self.prefix + self.visual + self.text


@dataclass(frozen=True)
class BlockSignals:
    """Inside an encoder block, between attention and MLP; an image of one tile."""

    key: Tensor  # [1, heads, S, head], of the block's tokens, [CLS] first where there is one
    block: int  # which it is, from 0
    blocks: int  # that are run
    patches: int  # that entered the first
    cls: bool  # whether there is a [CLS]

    def keys(self) -> Tensor:
        """Keys of the tokens, mean over heads, float32: [S, head]."""
        return self.key[0].float().mean(0)


@dataclass(frozen=True)
class VisionSignals:
    """Inside the encoder block whose output the projector reads (CLIP: the last but one).

    An image is one tile or several, each encoded by itself; a visual token is one patch or several
    merged, and tokens stand in the decoder's reading order.
    """

    features: Tensor  # [1, N, width], the block's output for the N tokens, [CLS] dropped
    query: Tensor | None  # [tiles, heads, (1 +) patches, head], [CLS] first where there is one;
    # None where patches leave the encoder before a block has seen all of them
    key: Tensor | None  # [tiles, heads, (1 +) patches, head]
    grid: tuple[int, int]  # rows, columns of the tokens; (1, V) where they are no rectangle
    cls: Tensor | None = None  # [tiles, 1, width], the block's output for [CLS]; None without one
    pool: Callable[[Tensor], Tensor] | None = None  # mean over each token's patches:
    # [tiles, patches, ...] -> [N, ...]; None where tokens are the patches of one tile
    cls_stays: bool = False  # whether every tile's [CLS] goes on, whatever is pruned
    tile_of: tuple[int, ...] = ()  # of each of the N tokens, its tile; empty where there is one
    middle: tuple[Tensor, ...] = ()  # as `features`, of middle blocks that the decoder sees too
    resampled: bool = False  # whether tokens are made of patches by the attention of `query`, one
    # of each token; a token's patches are all then, weighted by that
    shown: Tensor | None = None  # bool [tiles, patches], those that are no padding, which attends
    # to nothing; None where all are, as in all encoders with [CLS]

    def cls_features(self) -> Tensor:
        """The block's output for the [CLS] of each tile: [1, tiles, width]."""
        return self._needed_cls().transpose(0, 1)

    def cls_attention(self) -> Tensor:
        """Attention of [CLS] to each token, softmax over its tile's patches, head mean: [N]."""
        self._needed_cls()
        return self._per_token(self._attention(self._states()[0][:, :, :1])[:, 0])

    def received_attention(self, *, from_others: bool = False) -> Tensor:
        """Attention that each token receives, mean over heads and its tile's patches: [N].

        With `from_others` what a patch gives to itself is left out, and the mean is over the rest.
        """
        queries, given, own = self._states()[0][:, :, self._first :], list[Tensor](), list[Tensor]()
        tiles, heads, patches, _ = queries.shape
        rows = max(1, WEIGHTS // (tiles * heads * patches))
        for start in range(0, patches, rows):
            part = self._attention(queries[:, :, start : start + rows])  # [tiles, rows, patches]
            if self.shown is not None:
                part = part * self.shown[:, start : start + rows, None]
            given.append(part.sum(1))
            own.append(part.diagonal(start, 1, 2))
        received = given[0] if len(given) == 1 else torch.stack(given).sum(0)
        if not from_others or self.resampled:  # learned queries are no patches
            return self._per_token(received / self._givers(patches, 0))
        return self._per_token((received - torch.cat(own, 1)) / self._givers(patches, 1))

    def _givers(self, patches: int, less: int) -> Tensor | int:
        """How many patches of a tile attend to others, `less` of them left out, at least 1."""
        if self.shown is None:
            return max(1, patches - less)
        return (self.shown.sum(1, keepdim=True) - less).clamp(min=1).float()

    def salience(self) -> Tensor:
        """[CLS] attention, or received attention where the encoder has no [CLS]: [N]."""
        return self.received_attention() if self.cls is None else self.cls_attention()

    def keys(self) -> Tensor:
        """Keys of the tokens, mean over heads, float32: [N, head]."""
        return self._per_token(self._states()[1][:, :, self._first :].float().mean(1))

    def as_one_head(self) -> VisionSignals:
        """The same with all heads side by side as one: queries and keys [tiles, 1, .., width]."""
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in self._states())
        return replace(self, query=query, key=key)

    @property
    def _first(self) -> int:
        """Where a tile's patches begin."""
        return 0 if self.cls is None else 1

    def _attention(self, query: Tensor) -> Tensor:
        """Attention of R queries to the patches, softmax over [CLS] too, head mean:
        [tiles, heads, R, head] -> [tiles, R, patches]."""
        _, key = self._states()
        logits = query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
        if self.shown is not None:
            logits = torch.where(self.shown[:, None, None], logits, LEAST)
        attention: Tensor = logits.softmax(-1)[..., self._first :]
        return attention.mean(1)

    @property
    def sees_attention(self) -> bool:
        """Whether there is a block whose attention the method may look at."""
        return self.query is not None

    def _states(self) -> tuple[Tensor, Tensor]:
        """Queries and keys."""
        if self.query is None or self.key is None:
            raise SpecError(
                "this method looks at the attention of an encoder block that sees all patches, and"
                " --encoder lets patches leave before there is one, or for good behind the last;"
                " choose another at=, or a method that needs none, such as divprune or utp up to"
                " CR 4"
            )
        return self.query, self.key

    def _per_token(self, values: Tensor) -> Tensor:
        """[tiles, patches, ...] -> [N, ...]."""
        if self.resampled:
            weights = self._attention(self._states()[0])  # [tiles, N of a tile, patches]
            mixed = weights @ values.reshape(*values.shape[:2], -1)
            values = mixed.reshape(*mixed.shape[:2], *values.shape[2:])
        return values[0] if self.pool is None else self.pool(values)

    def _needed_cls(self) -> Tensor:
        if self.cls is None:
            raise SpecError(
                "this model's vision encoder has no [CLS], which the method reads; choose a method"
                " that needs none, such as divprune or fastv"
            )
        return self.cls


def dot(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """Dot products of queries [1, heads, R, head] with keys [1, kv_heads, S, head] of their group,
    times `scale` or head ** -0.5: float32 [1, kv_heads, group * R, S]."""
    size = key.shape[-1]
    scale = size**-0.5 if scale is None else scale
    grouped = query.float().reshape(1, key.shape[1], -1, size) * scale
    products: Tensor = grouped @ key.float().transpose(-1, -2)
    return products


@dataclass(frozen=True)
class InputSignals:
    """At the decoder's input, where projected visual tokens and text embeddings share a space."""

    visual: Tensor  # [1, n, D]; n = 0 in decode steps and later turns
    visual_tokens: int  # n of an image, known before tracing
    text: Tensor | None = None  # [1, T, D], after the image; only at stages with `text`
    tile_of: tuple[int, ...] = ()  # of each visual token, its tile; empty where there is one

    def question(self) -> Tensor:
        """Embeddings of the text after the image: [T, D]."""
        if self.text is None:
            raise SpecError("the text is known in the decoder only: give the stage text=True")
        return self.text[0]

    def alignment(self) -> Tensor:
        """Negative mean Euclidean distance of each visual token to the text tokens: [n]."""
        visual, text = self.visual[0].float(), self.question().float()
        visual = torch.cat([visual, text[:1]])  # ONNX Runtime reduces nothing where n = 0
        squares = visual.pow(2).sum(-1, keepdim=True) + text.pow(2).sum(-1) - 2 * visual @ text.T
        return -squares.clamp(min=0).sqrt().mean(-1)[:-1]


@dataclass(frozen=True)
class Anchors:
    """Rows of the rotary tables, each int64 [1], for three of the positions p1 .. p2 that an image
    takes: p1, p' = floor((p1 + p2) / 2 + 1/2) and p2; under M-RoPE of each of the three by itself.
    """

    first: Tensor
    middle: Tensor
    last: Tensor


@dataclass(frozen=True)
class AttentionStates:
    """Queries [1, heads, S, head] and keys [1, kv_heads, S, head] of one layer."""

    query: Tensor  # before rotary embedding
    key: Tensor
    rotated_query: Tensor  # with their positions
    rotated_key: Tensor


@dataclass(frozen=True)
class LayerSignals:
    """Inside decoder layer l, for the tokens of this call (the cache's older tokens left out)."""

    segments: Segments
    hidden: Tensor  # [1, S, width], the layer's output
    attention: AttentionStates | None  # None: the layer has none
    cos: Tensor  # [n, head / 2], rotary tables
    sin: Tensor
    rows: Tensor  # int64 [S], each token's row of the tables
    anchors: Anchors  # the whole image's, whatever is left of it
    visual_tokens: int  # of an image, that entered this layer, known before tracing
    inputs: InputSignals  # what entered layer 1
    factor: float = 1.0  # of the rotary tables, beside 1 where a model's context is stretched
    scale: float | None = None  # of products of queries and keys; None: head ** -0.5
    cap: float | None = None  # that the scaled products are bent towards, cap * tanh(x / cap)
    past: bool = True  # whether text sees what is up to itself alone, and not the whole prompt

    @property
    def states(self) -> AttentionStates:
        """Queries and keys; SpecError where the layer has no attention."""
        if self.attention is None:
            raise SpecError("this method looks at attention, and the layer before it has none")
        return self.attention

    @property
    def visual(self) -> Tensor:
        """Hidden states of the live visual tokens, [1, n, width]."""
        start, end = self.segments.prefix, self.segments.prefix + self.segments.visual
        return self.hidden[:, start:end]

    @property
    def text(self) -> Tensor:
        """Hidden states of the text after the image, [1, T, width]."""
        return self.hidden[:, self.segments.prefix + self.segments.visual :]

    def last_query_attention(self, agnostic: Tensor | None = None) -> Tensor:
        """Attention of the last token to each visual token, head mean: float32 [visual].

        With `agnostic` (int64 [1]) every visual token is scored as if it stood at that row of the
        rotary tables (UTP, Eq. 2); text tokens keep theirs, so they still share the softmax.
        """
        start, end = self.segments.prefix, self.segments.prefix + self.segments.visual
        last = self.states.rotated_query[:, :, -1:]
        logits = self._dot(last, self.states.rotated_key)  # [1, kv_heads, group, S]
        if agnostic is not None:
            logits = self._moved(logits, last, agnostic)
        return logits.softmax(-1).mean((0, 1, 2))[start:end]

    def last_query_likeness(self) -> Tensor:
        """As the last token's attention, were there no rotary embedding at all: [visual]."""
        start, end = self.segments.prefix, self.segments.prefix + self.segments.visual
        logits = self._dot(self.states.query[:, :, -1:], self.states.key)
        return logits.softmax(-1).mean((0, 1, 2))[start:end]

    def text_attention(self, agnostic: Tensor | None = None) -> Tensor:
        """Attention of each text token after the image to each visual token, the softmax over all
        tokens that it sees: float32 [heads, T, n]. `agnostic` as in `last_query_attention`."""
        start, end = self.segments.prefix, self.segments.prefix + self.segments.visual
        queries = self.states.rotated_query[:, :, end:]
        logits = self._dot(queries, self.states.rotated_key)  # [1, kv_heads, group * T, S]
        if agnostic is not None:
            logits = self._moved(logits, queries, agnostic)
        logits = logits.reshape(queries.shape[1], self.segments.text, self.segments.total)
        indices = torch.arange(self.segments.total, device=logits.device)
        if self.past:
            later = indices[None, :] > indices[end:, None]
            logits = torch.where(later, LEAST, logits)
        attention: Tensor = logits.softmax(-1)
        return attention[:, :, start:end]

    def text_nearness(self) -> Tensor:
        """What rotary embedding alone makes of the distance between each text token after the
        image and each visual token, the mean of cos(distance * frequency): float32 [T, n]."""
        start, end = self.segments.prefix, self.segments.prefix + self.segments.visual
        cos, sin = (table.index_select(0, self.rows).float() for table in (self.cos, self.sin))
        near: Tensor = cos[end:] @ cos[start:end].T + sin[end:] @ sin[start:end].T
        return near / (cos.shape[1] * self.factor**2)

    def _dot(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores of the layer's attention, as `dot` gives them."""
        logits = dot(query, key, self.scale)
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def _moved(self, logits: Tensor, queries: Tensor, position: Tensor) -> Tensor:
        """`logits` of rotated queries, [1, kv_heads, group * R, S], as if each visual token stood
        at `position`."""
        start, end = self.segments.prefix, self.segments.prefix + self.segments.visual
        moved = self._dot(self._against(queries, position), self.states.key[:, :, start:end])
        return torch.cat([logits[..., :start], moved, logits[..., end:]], dim=-1)

    def _against(self, queries: Tensor, position: Tensor) -> Tensor:
        """Rotated queries, [1, heads, R, head], turned so that their dot product with an unrotated
        key is that of a key rotated to `position`: R_p'^T R_n q."""
        cos = self.cos.index_select(0, position).float()  # [1, head / 2]
        sin = self.sin.index_select(0, position).float()
        low, high = queries.float().chunk(2, dim=-1)
        return torch.cat([low * cos + high * sin, high * cos - low * sin], dim=-1)
