"""Answers of a given form: JSON, JSON of a schema, or text that matches a regular expression.

Before each token, all tokens are forbidden that no answer of this form has there. So an answer has
the form, or ends with `length` before it is complete. The grammar is kept by llguidance, a library
without dependencies (https://github.com/guidance-ai/llguidance).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import BackendError, SpecError, brief
from edgeprune.generation import Sampling
from edgeprune.install_hints import install
from edgeprune.runtime.logits import Scores
from edgeprune.runtime.tokenizer import SafeTokenizer

LONGEST = 1 << 16
"""Letters of a schema or an expression at most."""
SPACE = r"[ \n]{0,8}"
"""White space inside JSON: bounded, so that no answer is spent on it."""

NO_TOKENS = (
    "this model has no tokens to write an answer of the form that was asked for; ask for another"
)


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What answers look like; SpecError where that is no form at all."""

    kind: str  # json, regex
    text: str  # the schema, or the expression

    def __post_init__(self) -> None:
        if self.kind not in _NAMES:
            raise SpecError(f"the kind of an answer is {' or '.join(_NAMES)}; got {self.kind!r}")
        if len(self.text) > LONGEST:
            raise SpecError(
                f"a schema or regular expression has at most {LONGEST} letters; got"
                f" {len(self.text)}"
            )

    @classmethod
    def json_object(cls) -> AnswerFormat:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> AnswerFormat:
        """JSON that a schema allows."""
        if not isinstance(schema, Mapping):
            raise SpecError("a JSON schema is an object, such as {'type': 'object'}")
        try:
            return cls("json", json.dumps(schema, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise SpecError(f"the JSON schema is no JSON ({brief(error)})") from error

    @classmethod
    def regex(cls, pattern: str) -> AnswerFormat:
        """Text that an expression matches from its first to its last letter. White space at both
        ends of an answer does not count. `\\d`, `\\w` and `\\s` are those of ASCII; there is no
        looking around and no backreference."""
        if not isinstance(pattern, str) or not pattern:
            raise SpecError("a regular expression is a text that is not empty")
        return cls("regex", pattern)


class Vocabulary:
    """What llguidance knows of a model's tokens; made once, which takes up to a second."""

    def __init__(self, tokenizer: SafeTokenizer, ends: Sequence[int]) -> None:
        """`ends` are the tokens that end an answer."""
        try:
            import llguidance
        except ImportError as error:
            raise BackendError(
                f"llguidance, which keeps answers to a form, is missing; {install('structured')}"
            ) from error
        self._library, self._ends = llguidance, list(ends)
        self._tokens = tokenizer.for_grammars(self._ends)
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def grammar(self, wanted: AnswerFormat) -> Grammar:
        """The form, for one answer; SpecError where the library cannot keep it."""
        matcher = self._library.LLMatcher
        try:
            if wanted.kind == "json":
                options: Any = {"whitespace_pattern": SPACE}
                text = matcher.grammar_from_json_schema(wanted.text, overrides=options)
            else:
                pattern = self._library.regex_to_lark(rf"[ \n]?(?:{wanted.text})", "dws")
                text = matcher.grammar_from_lark(f"start: /{pattern}/")
            compiled = matcher(self._tokens, text, log_level=0, limits=self._limits)
        except ValueError as error:
            raise SpecError(f"{_NAMES[wanted.kind]} cannot be kept: {brief(error)}") from error
        if compiled.is_error():
            raise SpecError(
                f"{_NAMES[wanted.kind]} cannot be kept: {_reason(compiled.get_error())}"
            )
        return Grammar(compiled, self._ends)


class Grammar:
    """A form and how much of it one answer has; `mask` and `take` are called in turn."""

    def __init__(self, matcher: Any, ends: Sequence[int]) -> None:
        self._matcher, self._ends = matcher, list(ends)

    def mask(self, scores: Scores) -> None:
        """Forbid, in place, the tokens that cannot come next: [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(scores.size, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: scores.size]
        allowed[: known.size] = known
        scores[~allowed] = -np.inf
        allowed[self._ends] = False
        if not allowed.any() and not self._matcher.is_accepting():
            raise SpecError(NO_TOKENS)

    def take(self, token: int) -> None:
        """Go on behind a token that was chosen."""
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            told = self._matcher.get_error()
            if told.startswith("NoExtension"):
                raise SpecError(NO_TOKENS)
            raise SpecError(f"the form of the answer is too complex: {_reason(told)}")


def check_settings(sampling: Sampling) -> None:
    """SpecError where a setting would end an answer before its form is complete, or go on."""
    for name in ("stop", "min_new_tokens"):
        if getattr(sampling, name):
            raise SpecError(f"{name} would break the form of the answer; leave it out")


_NAMES = {"json": "the JSON schema", "regex": "the regular expression"}


def _reason(told: str) -> str:
    """The sentence of the library's message; what is drawn around it is left out."""
    found = re.search(r"^error: (.*)$", told, re.MULTILINE)
    return brief(found[1] if found else told or "it is too complex")
