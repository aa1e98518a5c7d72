"""Objects of OpenAI's API that a server sends: completions, chunks of a stream, models."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from edgeprune.runtime.answer import TokenScore
from edgeprune.serve.model import Finished, Piece, ServedBundle, Usage

LEAST = -9999.0
"""What OpenAI tells of a token whose probability is next to nothing."""


class ChatReply:
    """What one chat completion sends; whole, or chunk by chunk."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, finished: Finished) -> dict[str, Any]:
        """The answer in one object."""
        message = {"role": "assistant", "content": finished.text, "refusal": None}
        scores = None if finished.scores is None else _logprobs(finished.scores)
        choice = {"index": 0, "message": message, "logprobs": scores}
        choice |= {"finish_reason": finished.finish, **_shares(finished)}
        reply = {**self._head, "object": "chat.completion", "choices": [choice]}
        reply |= {"usage": usage_record(finished.usage), **_warnings(finished)}
        return reply | finished.details

    def first_chunk(self) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of the answer."""
        reply = self._chunk({"content": piece.text})
        if piece.scores:
            reply["choices"][0]["logprobs"] = _logprobs(piece.scores)
        return reply

    def last_chunk(self, finished: Finished) -> dict[str, Any]:
        """The chunk that says why the answer ended."""
        reply = self._chunk({}, finished.finish)
        reply["choices"][0] |= _shares(finished)
        return reply | _warnings(finished) | finished.details

    def usage_chunk(self, finished: Finished) -> dict[str, Any]:
        """The chunk with no choice, where the usage was asked for."""
        usage = usage_record(finished.usage)
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def _logprobs(scores: Sequence[TokenScore]) -> dict[str, Any]:
    return {"content": [_logprob(score) for score in scores], "refusal": None}


def _logprob(score: TokenScore) -> dict[str, Any]:
    """A token; those in its place have no places of their own."""
    whole = "\ufffd" not in score.text  # else a part of a letter
    record: dict[str, Any] = {
        "token": score.text,
        "logprob": max(score.log_probability, LEAST),
        "bytes": list(score.text.encode("utf-8", "surrogatepass")) if whole else None,
    }
    return record | {"top_logprobs": [_logprob(one) for one in score.likeliest]}


def _shares(finished: Finished) -> dict[str, Any]:
    """What each of the given answers is worth; no fields of OpenAI's."""
    if (choice := finished.choice) is None:
        return {}
    return {
        "probabilities": choice.probabilities,
        "log_probabilities": choice.log_probabilities,
    }


def _warnings(finished: Finished) -> dict[str, Any]:
    return {"warnings": list(finished.warnings)} if finished.warnings else {}


def usage_record(usage: Usage) -> dict[str, Any]:
    """Tokens; `visual_tokens` is no field of OpenAI's."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "visual_tokens": {
            "before": usage.visual,
            "after": sum(usage.kept) / len(usage.kept),
            "layers": list(usage.kept),
        },
    }


def model_record(bundle: ServedBundle, name: str, cr: float | None) -> dict[str, Any]:
    """A bundle in the list of models, under one of its names."""
    prune = bundle.manifest.at(cr).prune
    return {
        "id": name,
        "object": "model",
        "created": bundle.created,
        "owned_by": "edgeprune",
        "method": prune.method,
        "cr": prune.cr_reached,
        "visual_tokens": prune.visual_tokens,
        "layers": list(prune.counts),
        "loaded": bundle.loaded,
        "images": bundle.manifest.image.images,
        "frames": bundle.manifest.image.frames,
    }
