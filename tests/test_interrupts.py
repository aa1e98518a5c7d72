"""Ctrl-C and `kill` end a command, whatever libraries make of them."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edgeprune.cli import main
from edgeprune.interrupts import interruptible
from edgeprune.models._stored import TensorFiles

TOLD = "edgeprune: interrupted; nothing half-written is left\n"
NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Ctrl-C is heard, also where tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_interrupt_that_a_library_makes_an_error_of_its_own(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interruptible():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_interrupt_in_a_finalizer_comes_again(capfd: pytest.CaptureFixture[str]) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), interruptible():
        thing = Finalized()
        del thing
        time.sleep(60)
    assert capfd.readouterr() == ("", "")


def test_other_errors_and_handlers_stay_what_they_are() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(ValueError, match="mine"), interruptible():
        assert [signal.getsignal(number) for number in NUMBERS] != before
        raise ValueError("mine")
    assert [signal.getsignal(number) for number in NUMBERS] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_a_thread_hears_no_signals() -> None:
    found: list[object] = []

    def work() -> None:
        with interruptible():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_an_export_whose_reader_loses_the_interrupt(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """safetensors calls Python while it reads a tensor, and torch drops what that raises."""
    errors: list[str] = []

    def interrupted(self: torch.UntypedStorage, at: int | slice) -> object:
        if at == 0 and any(tmp_path.glob(".bundle.*/new/weights.bin")):
            signal.raise_signal(signal.SIGTERM)
        return item(self, at)

    def read(self: TensorFiles, name: str) -> torch.Tensor:
        try:
            return reading(self, name)
        except ValueError as error:
            errors.append(str(error))
            raise

    item, reading = torch.UntypedStorage.__getitem__, TensorFiles.read
    monkeypatch.setattr(torch.UntypedStorage, "__getitem__", interrupted)
    monkeypatch.setattr(TensorFiles, "read", read)
    capfd.readouterr()
    command = ["export", "--model", str(tiny_checkpoint), "--method", "none", "--parity", "0"]
    assert main([*command, "-o", str(tmp_path / "bundle")]) == 130
    assert capfd.readouterr() == ("", TOLD)
    assert not any(tmp_path.iterdir())
    assert "could not determine the shape" in errors[0], "no interrupt: it was lost"
