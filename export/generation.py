"""A checkpoint's own settings of generation: honoured, refused, or named in a note.

They are those that transformers' `generate` would follow: generation_config.json or, without that
file, what older checkpoints keep in config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from edgeprune.errors import ModelError, SpecError
from edgeprune.generation import Sampling
from edgeprune.models._stored import read_json
from edgeprune.records import build
from edgeprune.spec import ModelShape

FILE = "generation_config.json"

HONOURED = {field.name for field in fields(Sampling)} - {"seed", "stop"} | {
    "do_sample",
    "eos_token_id",
    "stop_strings",
}
"""Settings that the runtime follows, by transformers' names."""

DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""Settings of drawn answers, and what `generate` takes where they are unset."""

IDLE = {
    "_commit_hash",
    "_from_model_config",
    "transformers_version",
    "bos_token_id",  # prompts are never empty
    "pad_token_id",  # nor padded
    "decoder_start_token_id",
    "forced_bos_token_id",  # acts after a prompt of one token
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "low_memory",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "early_stopping",  # of beams, as the next; num_beams itself is named
    "length_penalty",
    "renormalize_logits",
    "remove_invalid_values",  # logits that are not numbers end an answer
    "chat_format",  # of the first Qwen models: their family reads it
    "max_window_size",  # of theirs: history is cut by whoever keeps it
    "is_assistant",  # a draft model changes the time of an answer, not the answer
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "speculation_type",
    "use_mtp",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
}
"""Settings that cannot change an answer here."""

NEUTRAL = {  # what a setting that is not followed may be without effect, beside None and False
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
}

DEFAULT_LENGTH = 20  # transformers' max_length where none is set, which older files write out


@dataclass(frozen=True)
class Generation:
    """How a checkpoint's answers are drawn and end; `notes` says what was left out or mended."""

    sampling: Sampling
    eos_token_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()


def read_generation(
    folder: Path, config: Any, tokenizer: Any, shape: ModelShape, ends: tuple[int, ...] = ()
) -> Generation:
    """The settings of a checkpoint in `folder`; ModelError where one cannot be used.

    `ends` are the tokens that end an answer where the model's own code says so, and no settings do.
    """
    if ends:
        return replace(_read_generation(folder, config, tokenizer, shape), eos_token_ids=ends)
    return _read_generation(folder, config, tokenizer, shape)


def _read_generation(folder: Path, config: Any, tokenizer: Any, shape: ModelShape) -> Generation:
    if (folder / FILE).is_file():
        return generation(read_json(folder / FILE), config, tokenizer, shape, folder / FILE)
    whole = read_json(folder / "config.json")
    text = whole.get("text_config")
    given = {**(text if isinstance(text, dict) else {}), **whole}
    known = HONOURED | NEUTRAL.keys()
    legacy = {name: value for name, value in given.items() if name in known}
    return generation(legacy, config, tokenizer, shape, folder / "config.json")


def generation(
    given: dict[str, Any], config: Any, tokenizer: Any, shape: ModelShape, file: Path = Path(FILE)
) -> Generation:
    """The same from the settings themselves, `given` by name as `file` has them."""
    given = {name: value for name, value in given.items() if value is not None}
    notes: list[str] = []
    try:
        ends = _given_ends(given, shape.vocabulary, tokenizer)
        sampling = _sampling(given, shape, file.name, notes)
    except (SpecError, TypeError) as error:
        raise ModelError(f"{file.parent}: {error}; repair it there") from error
    if not ends:
        ends, whose = _other_ends(config, tokenizer, shape.vocabulary)
        if not ends:
            notes.append("no token ends an answer: it runs on to --max-new-tokens")
        elif file.name == FILE:
            notes.append(f"{FILE} names no eos_token_id; {whose} is used: {list(ends)}")
    notes += [
        f"generation setting {name} = {_short(value)} is left out"
        for name, value in given.items()
        if name not in HONOURED | IDLE and not _is_neutral(value, NEUTRAL.get(name))
    ]
    return Generation(sampling, ends, tuple(notes))


def _is_neutral(value: Any, neutral: Any) -> bool:
    """Whether a setting changes nothing; 0 is a value, although it equals False."""
    return value is False or value in ([], {}, "") or (value == neutral and neutral is not None)


def _sampling(given: dict[str, Any], shape: ModelShape, source: str, notes: list[str]) -> Sampling:
    """TypeError or SpecError where a setting has a value that `generate` could not use either."""
    drawn = given.get("do_sample", False)
    if not isinstance(drawn, bool):
        raise SpecError(f"do_sample is true or false; got {drawn!r}")
    found = {name: given.get(name, default) for name, default in DRAWN.items()}
    if not drawn:
        found["temperature"] = 0.0
    elif found["temperature"] == 0:
        notes.append("do_sample with temperature 0: the likeliest token is taken")
    if _above(found["top_p"], 1):
        notes.append(f"top_p = {found['top_p']} does nothing above 1; it is taken for 1")
        found["top_p"] = 1.0
    others = HONOURED & given.keys() - found.keys() - {"do_sample", "eos_token_id", "stop_strings"}
    found |= {name: given[name] for name in others}
    stop = given.get("stop_strings", [])
    found["stop"] = [stop] if isinstance(stop, str) else stop
    sampling: Sampling = build(Sampling, found, source)
    if "min_new_tokens" in given:  # which goes before min_length
        sampling = replace(sampling, min_length=0)
    most = shape.vocabulary
    if beyond := [i for word in sampling.bad_words_ids for i in word if i >= most]:
        raise SpecError(f"bad_words_ids has the id {beyond[0]}, the model has {most} tokens")
    return _with_length(sampling, shape.visual_tokens, notes)


def _with_length(sampling: Sampling, visual_tokens: int, notes: list[str]) -> Sampling:
    length = sampling.max_length
    if length is None or length == DEFAULT_LENGTH:
        return replace(sampling, max_length=None)
    if sampling.max_new_tokens is None and length <= visual_tokens:
        notes.append(
            f"max_length = {length} leaves no room for an answer after {visual_tokens} visual"
            " tokens; it is left out"
        )
        return replace(sampling, max_length=None)
    return sampling


def _given_ends(given: dict[str, Any], vocabulary: int, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer as the settings name them; SpecError where one is none."""
    ids = given.get("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    if wrong := [i for i in ids if not _is_token(i, vocabulary)]:
        own = getattr(tokenizer, "eos_token_id", None)
        raise SpecError(
            f"eos_token_id is a token id below {vocabulary} or a list of them; got {wrong[0]!r}"
            + (f" (the tokenizer's own is {own})" if own is not None else "")
        )
    return tuple(dict.fromkeys(ids))


def _other_ends(config: Any, tokenizer: Any, vocabulary: int) -> tuple[tuple[int, ...], str]:
    """Those of the decoder's configuration or of the tokenizer, and whose they are."""
    holders = {"config.json's": getattr(config, "text_config", None), "the tokenizer's": tokenizer}
    for whose, holder in holders.items():
        found = getattr(holder, "eos_token_id", None)
        ids: list[Any] = found if isinstance(found, list) else [found]
        if usable := tuple(i for i in ids if _is_token(i, vocabulary)):
            return usable, whose
    return (), ""


def _is_token(value: Any, vocabulary: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary


def _above(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and value > most


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
