"""Every logits processor does what transformers' own does, alone and all together, in its order."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from edgeprune.errors import SpecError
from edgeprune.generation import Sampling
from edgeprune.runtime import logits as ours
from edgeprune.runtime.sampling import Sampler

ENDS = (2, 5)
VOCABULARY = 12
tokens = st.integers(0, VOCABULARY - 1)
beyond = st.integers(0, VOCABULARY + 3)  # ids without a logit: an image's placeholder may be one
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.3, 1.05, 1.2, 7.0]),
    "no_repeat_ngram_size": st.integers(1, 4),
    "bad_words_ids": st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), min_size=1).map(
        tuple
    ),
    "min_length": st.integers(1, 12),
    "min_new_tokens": st.integers(1, 6),
    "suppress_tokens": st.lists(beyond, min_size=1).map(tuple),
    "begin_suppress_tokens": st.lists(beyond, min_size=1).map(tuple),
}


def theirs(name: str, value: Any, prompt: int) -> LogitsProcessor:
    """transformers' processor, as `generate` makes it."""
    ends = torch.tensor(ENDS)
    return {
        "repetition_penalty": lambda: RepetitionPenaltyLogitsProcessor(value),
        "no_repeat_ngram_size": lambda: NoRepeatNGramLogitsProcessor(value),
        "bad_words_ids": lambda: NoBadWordsLogitsProcessor([list(w) for w in value], ends),
        "min_length": lambda: MinLengthLogitsProcessor(value, ends),
        "min_new_tokens": lambda: MinNewTokensLengthLogitsProcessor(prompt, value, ends),
        "suppress_tokens": lambda: SuppressTokensLogitsProcessor(value),
        "begin_suppress_tokens": lambda: SuppressTokensAtBeginLogitsProcessor(value, prompt),
    }[name]()


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 9999))
def test_a_processor_is_that_of_transformers(name: str, data: st.DataObject, seed: int) -> None:
    value = data.draw(SETTINGS[name])
    ids = data.draw(st.lists(beyond, min_size=1, max_size=14))
    prompt = data.draw(st.integers(1, len(ids)))
    logits = np.random.default_rng(seed).normal(0, 3, VOCABULARY).astype(np.float32)
    if name == "bad_words_ids" and not [w for w in value if w not in ((2,), (5,))]:
        return  # transformers takes no list of ends alone
    wanted = theirs(name, value, prompt)(torch.tensor([ids]), torch.from_numpy(logits)[None])[0]
    (processor,) = (p for p in ours.PROCESSORS if p.__name__ == name)
    found = logits.copy()
    given_ids = np.array(value) if name.endswith("suppress_tokens") else value
    processor(found, given_ids, ours.Context(np.array(ids), len(ids) - prompt, ENDS))
    np.testing.assert_array_equal(found, wanted.numpy())


def test_every_setting_of_transformers_is_a_processor_here() -> None:
    assert [p.__name__ for p in ours.PROCESSORS] == list(SETTINGS)
    assert {p.__name__ for p in ours.PROCESSORS} <= {field.name for field in fields(Sampling)}
    on = {"repetition_penalty": 1.1, "min_length": 3, "bad_words_ids": ((1,),)}
    found = {p.__name__: value for p, value in ours.active(Sampling(**on, temperature=1.0))}
    assert found == on and ours.active(Sampling(temperature=0.5, top_k=3)) == []


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=[2, 5],
        pad_token_id=0,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval()


ALL = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[7], [3, 9], [2]],
    "min_length": 12,
    "suppress_tokens": [11, 12, 13],
    "begin_suppress_tokens": [20, 21, 30, 31],
}
TOGETHER: list[dict[str, Any]] = [
    {},
    ALL,
    {**ALL, "min_new_tokens": 9, "repetition_penalty": 0.8},
    {"repetition_penalty": 1.05},
    {"min_new_tokens": 20, "no_repeat_ngram_size": 3},
]


def frozen(options: dict[str, Any]) -> Sampling:
    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return Sampling(**{name: tuples(value) for name, value in options.items()})


@pytest.mark.parametrize("options", TOGETHER, ids=str)
def test_together_they_answer_as_generate_does(
    options: dict[str, Any], model: LlamaForCausalLM
) -> None:
    rng = np.random.default_rng(3)
    for _ in range(12):
        prompt = rng.integers(3, 40, 6)
        given = torch.from_numpy(prompt)[None]
        config = GenerationConfig(**options, eos_token_id=[2, 5], pad_token_id=0)
        wanted = model.generate(
            given,
            generation_config=config,
            attention_mask=torch.ones_like(given),
            max_new_tokens=40,
            do_sample=False,
        )[0].tolist()
        sampler, ids = Sampler(frozen(options), (2, 5), prompt.size), prompt
        with torch.no_grad():
            while ids.size < prompt.size + 40:
                logits = model(torch.from_numpy(ids)[None]).logits[0, -1]
                ids = np.append(ids, sampler.pick(logits.numpy(), ids))
                if ids[-1] in (2, 5):
                    break
        assert ids.tolist() == wanted


def test_the_graphs_own_choice_will_do_where_nothing_is_forbidden() -> None:
    assert Sampler(Sampling(stop=("a",), top_k=3), ENDS, 0).takes_likeliest
    assert not Sampler(Sampling(temperature=1.0), ENDS, 0).takes_likeliest
    for name, value in ALL.items():
        assert not Sampler(frozen({name: value}), ENDS, 0).takes_likeliest


def test_logits_are_left_as_they_were() -> None:
    """A backend hands out its own buffer."""
    logits = np.arange(4, dtype=np.float32)
    assert Sampler(Sampling(suppress_tokens=(3,)), ENDS, 1).pick(logits, np.array([1])) == 2
    assert logits.tolist() == [0, 1, 2, 3]


def test_settings_that_leave_nothing_are_refused() -> None:
    sampler = Sampler(Sampling(suppress_tokens=(0, 1)), ENDS, 0)
    with pytest.raises(SpecError, match="leave no token"):
        sampler.pick(np.zeros(2, np.float32), np.array([1]))
