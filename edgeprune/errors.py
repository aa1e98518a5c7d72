"""Every error that edgeprune raises on purpose.

EdgepruneError
├── SpecError        a request that cannot be met: method, compression ratio, option
├── ModelError       a checkpoint that is missing, damaged or of another family
├── ScheduleError    a schedule that cannot be solved or read
├── ExportError      a graph that could not be written
│   └── ParityError  a graph that disagrees with its eager reference
├── BundleError      a bundle that is missing, altered or newer than this version
├── InputError       an image or a prompt that cannot be used
├── CapacityError    more tokens than the KV cache or the positions allow
├── SessionError     a dialogue that is closed, broken off, or used by two callers at once
└── BackendError     an inference engine that is missing or refuses

The command line prints the message on one line and exits with 2; a message therefore says what was
wanted, what was found and what to do.
"""

from __future__ import annotations

LONGEST = 400
"""Letters of another package's error that are passed on; ONNX Runtime lists a thousand inputs."""


class EdgepruneError(Exception):
    """Base of all errors below; catch this one to catch them all."""


class SpecError(EdgepruneError):
    """A request that cannot be met."""


class ModelError(EdgepruneError):
    """A checkpoint that is missing, damaged or of an unsupported family."""


class ScheduleError(EdgepruneError):
    """A schedule that cannot be solved or read."""


class ExportError(EdgepruneError):
    """A graph that could not be written."""


class ParityError(ExportError):
    """A graph that disagrees with its eager reference."""


class BundleError(EdgepruneError):
    """A bundle that is missing, altered or newer than this version reads."""


class InputError(EdgepruneError):
    """An image or a prompt that cannot be used."""


class CapacityError(EdgepruneError):
    """More tokens than the KV cache or the position table allows."""


class SessionError(EdgepruneError):
    """A dialogue that is closed, was broken off, or is used by two callers at once."""


class BackendError(EdgepruneError):
    """An inference engine that is missing or refuses to work."""


def told(error: Exception) -> str:
    """One line about any error, for a list of failures: ours say all, others their type too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EdgepruneError) and text else f"{type(error).__name__}: {text}"


def brief(error: object) -> str:
    """What an error of another package says, in one line; the end of a long one is left out."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."
