"""A decoder layer in which tokens of an image have weights of their own (CogVLM, arXiv 2311.03079).

Norms, attention and cache are common to all tokens. Every projection and the MLP exists twice, and
a token goes through one of the two: where it stands is known from the segments of the call, so both
are products over contiguous tokens and nothing is masked. The token before the image, which marks
its begin, counts as the image's. It is the last of the prefix, which has few tokens: these go
through both, so that no size in the graph is a difference of others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edgeprune.models._decoder_config import DecoderConfig, LayerConfig
from edgeprune.models._decoder_layer import MLP, Attention, DecoderLayer
from edgeprune.models._layers import common
from edgeprune.models._ops import TorchOps
from edgeprune.policies._signals import Segments


class ExpertLayer(DecoderLayer):
    def __init__(self, config: DecoderConfig, layer: LayerConfig, ops: TorchOps) -> None:
        super().__init__(config, layer, ops)
        own = replace(layer, qkv_bias=layer.expert_qkv_bias)
        self.image_attention = Attention(config, own, ops)
        self.image_mlp = MLP(config, own, ops)

    def project(self, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        of_image, of_text = apart(x, segments)
        found = zip(
            self.image_attention.project(of_image), self.attention.project(of_text), strict=True
        )
        query, key, value = (joined(image, text, segments, 2) for image, text in found)
        return query, key, value

    def attended(self, x: Tensor, segments: Segments) -> Tensor:
        of_image, of_text = apart(x, segments)
        found = self.image_attention.output(of_image), self.attention.output(of_text)
        return joined(*found, segments, 1)

    def mapped(self, x: Tensor, segments: Segments) -> Tensor:
        of_image, of_text = apart(x, segments)
        return joined(self.image_mlp(of_image), self.mlp(of_text), segments, 1)


def apart(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Tokens [1, S, width] for the weights of images, [1, P + V, width], and those for the weights
    of text, [1, P + T, width]."""
    start, end = segments.prefix, segments.prefix + segments.visual
    return x[:, :end], torch.cat([x[:, :start], x[:, end:]], dim=1)


def joined(image: Tensor, text: Tensor, segments: Segments, dim: int) -> Tensor:
    """All S tokens again along a dimension: of the prefix the last is the image's."""
    image, text = common(False, image, text)
    start = torch.scalar_tensor(segments.prefix, dtype=torch.int64)
    marks = torch.arange(segments.prefix, device=image.device) == start - 1
    shape = [-1 if axis == dim else 1 for axis in range(image.dim())]
    before, (visual, after) = segments.prefix, (segments.visual, segments.text)
    own, other = (x.narrow(dim, 0, before) for x in (image, text))
    prefix = torch.where(marks.view(shape), own, other)
    rest = image.narrow(dim, before, visual), text.narrow(dim, before, after)
    return torch.cat([prefix, *rest], dim=dim)
