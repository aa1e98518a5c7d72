"""The body of a chat completion -> a request that is checked. Fields have OpenAI's names."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from edgeprune.errors import SpecError
from edgeprune.generation import Sampling
from edgeprune.runtime.answering import MOST
from edgeprune.runtime.choosing import check
from edgeprune.runtime.formats import AnswerFormat, check_settings
from edgeprune.serve.errors import refused
from edgeprune.serve.images import ImageDoors
from edgeprune.serve.messages import Conversation, conversation

SETTINGS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "stop": "stop",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
"""Fields that are settings of Sampling; those from top_k on are no fields of OpenAI's."""

OWN = {"model", "messages", "stream", "stream_options", "choices", "response_format", "regex"}
OWN |= {"logprobs", "top_logprobs", "details", *SETTINGS}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
}
"""Fields that this server does not follow, and the values with which they ask for nothing."""

STOPS = 16
"""Stop strings at most: each is looked for after each token."""

IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
"""Fields that change no answer."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A request, checked but for what depends on the bundle."""

    model: str
    conversation: Conversation
    settings: dict[str, Any]  # of Sampling, those that were given
    choices: tuple[str, ...]  # answers to choose from; empty: whatever the model says
    answer_format: AnswerFormat | None = None  # the form of the answer; None: any
    logprobs: int | None = None  # likeliest tokens to tell in each place; None: no scores
    details: bool = False  # whether times and kept tokens are told
    stream: bool = False
    stream_usage: bool = False  # whether a stream ends with a chunk that holds the usage

    def sampling(self, own: Sampling) -> Sampling | None:
        """The checkpoint's own settings with the given ones on top; None where none was given."""
        if not self.settings:
            return None
        return replace(own, **{"max_new_tokens": None, **self.settings})


def parse(body: bytes, doors: ImageDoors) -> ChatRequest:
    """A request from the bytes of its body; HttpError says which field is wrong."""
    fields = _object(body)
    for name, value in fields.items():
        if value is None or name in OWN or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise refused(f"there is no field {name[:40]!r}; leave it out", name[:40])
        if not any(value == neutral for neutral in NEUTRAL[name]):
            raise refused(f"{name} is not supported; leave it out", name)
    model = fields.get("model")
    if not isinstance(model, str):
        raise refused("model is the name of a bundle; GET /v1/models lists them", "model")
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise refused("stream_options is an object", "stream_options")
    settings = _settings(fields)
    wanted = _answer_format(fields, settings)
    return ChatRequest(
        model,
        conversation(fields.get("messages"), doors),
        settings,
        _choices(fields.get("choices"), settings, wanted),
        wanted,
        _logprobs(fields),
        _flag(fields.get("details"), "details"),
        _flag(fields.get("stream"), "stream"),
        _flag(options.get("include_usage"), "stream_options"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else str(error)
        raise refused(f"the body is no JSON ({why}); send an object as application/json") from error
    if not isinstance(fields, dict):
        raise refused("the body is a JSON object with model and messages")
    return fields


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _flag(value: Any, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise refused(f"{name} is true or false", name)


def _logprobs(fields: dict[str, Any]) -> int | None:
    """How many of the likeliest tokens to tell in each place; None where no scores are asked."""
    top = fields.get("top_logprobs")
    if not _flag(fields.get("logprobs"), "logprobs"):
        if top:
            raise refused("top_logprobs needs logprobs: true", "top_logprobs")
        return None
    if fields.get("choices") is not None:
        raise refused("choices come with log_probabilities; leave logprobs out", "logprobs")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise refused("top_logprobs is a whole number", "top_logprobs")
    if not 0 <= (top or 0) <= MOST:
        raise refused(f"top_logprobs is from 0 to {MOST}; got {top}", "top_logprobs")
    return top or 0


def _answer_format(fields: dict[str, Any], settings: dict[str, Any]) -> AnswerFormat | None:
    """The form of the answer: OpenAI's `response_format`, or a regular expression."""
    name = "response_format" if fields.get("regex") is None else "regex"
    try:
        if name == "regex":
            if fields.get("response_format") not in (None, {"type": "text"}):
                raise SpecError("response_format and regex both say a form; give one of them")
            found: AnswerFormat | None = AnswerFormat.regex(fields["regex"])
        else:
            found = _response_format(fields.get("response_format"))
        if found is not None:
            check_settings(replace(Sampling(), **settings))
    except SpecError as error:
        raise refused(str(error), name) from error
    return found


def _response_format(value: Any) -> AnswerFormat | None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind is None or (kind == "text" and isinstance(value, dict)):
        return None
    if kind == "json_object":
        return AnswerFormat.json_object()
    described = value.get("json_schema") if isinstance(value, dict) else None
    if kind == "json_schema" and isinstance(described, dict):
        return AnswerFormat.json_schema(described.get("schema", {}))
    raise SpecError(
        "response_format is {type: text}, {type: json_object}, or {type: json_schema,"
        " json_schema: {name: ..., schema: {...}}}"
    )


def _choices(value: Any, settings: dict[str, Any], wanted: AnswerFormat | None) -> tuple[str, ...]:
    if value is None:
        return ()
    try:
        check(value if isinstance(value, list) else "")
    except SpecError as error:
        raise refused(str(error), "choices") from error
    if wanted is not None:
        raise refused("choices are a form of the answer themselves; leave the other out", "choices")
    if settings:
        raise refused(
            f"{', '.join(settings)} would do nothing: choices are scored; leave it out", "choices"
        )
    return tuple(value)


def _settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Settings of Sampling; each is tried by itself, so that the error names the field."""
    found: dict[str, Any] = {}
    for name, setting in SETTINGS.items():
        value: Any = fields.get(name)
        if value is None:
            continue
        if setting in found:
            raise refused(f"{name} says the same as another field; give one of them", name)
        if setting == "stop":
            value = (value,) if isinstance(value, str) else value
            value = tuple(value) if isinstance(value, list) else value
            if isinstance(value, tuple) and len(value) > STOPS:
                raise refused(f"{STOPS} stop strings are the most; got {len(value)}", name)
        try:
            replace(Sampling(), **{setting: value})
        except SpecError as error:
            raise refused(str(error), name) from error
        found[setting] = value
    return found
