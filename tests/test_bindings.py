"""What is bound to a call of ONNX Runtime lives until the call is over."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edgeprune.demo.questions import held_out
from edgeprune.runtime.session import Session


def test_inputs_live_as_long_as_a_call(
    tiny_jetpack6: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An OrtValue of a numpy array has the array's own memory, and a binding holds neither before
    ONNX Runtime 1.31: what is let go too early is read from memory that others write."""
    bound: list[tuple[str, weakref.ref[Any]]] = []
    bind, run = ort.IOBinding.bind_ortvalue_input, ort.InferenceSession.run_with_iobinding
    calls = 0

    def binds(self: Any, name: str, value: Any) -> None:
        bind(self, name, value)
        self._bound_inputs.pop(name)  # as an older one, it holds nothing
        bound.append((name, weakref.ref(value)))

    def runs(self: Any, binding: Any, options: Any = None) -> None:
        nonlocal calls
        calls += 1
        assert not [name for name, value in bound if value() is None]
        run(self, binding, options)
        bound.clear()

    monkeypatch.setattr(ort.IOBinding, "bind_ortvalue_input", binds)
    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", runs)
    with Session.open(tiny_jetpack6) as session:
        image, question = next(held_out(1))
        first = session.ask(image, question.text)
        second = session.follow_up("what color is the card ?")
    assert calls >= 3
    assert len(first.ids) and np.array(second.ids).size
