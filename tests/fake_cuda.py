"""An ONNX Runtime whose CUDA provider is the CPU's, with a memory of its own: what crosses over is
counted.

It holds a backend to what CUDA would do: an input that lies on the host is copied to the GPU when
it is bound, so what is written to it afterwards is not seen; a value on the GPU is read through
`numpy`, and an output that is bound to the host is copied there by each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Value:
    """A value on the host or on the GPU."""

    def __init__(self, cuda: FakeCuda, inner: Any, device: str) -> None:
        self.cuda, self.inner, self.device = cuda, inner, device

    @property
    def size(self) -> int:
        return int(self.inner.tensor_size_in_bytes())

    def numpy(self) -> NDArray[Any]:
        if self.device == "cuda":
            self.cuda.downloaded += self.size
        found: NDArray[Any] = self.inner.numpy()
        return found

    def update_inplace(self, array: NDArray[Any]) -> None:
        self.inner.update_inplace(np.ascontiguousarray(array))

    def shape(self) -> list[int]:
        return list(self.inner.shape())

    def data_ptr(self) -> int:
        return int(self.inner.data_ptr())


class Binding:
    """Inputs and outputs of one session."""

    def __init__(self, cuda: FakeCuda, session: Any) -> None:
        self.cuda, self.inner = cuda, session.io_binding()
        self.outputs: dict[str, Value | str] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        inner = value.inner
        if value.device == "cpu":
            self.cuda.uploaded += value.size
            inner = ort.OrtValue.ortvalue_from_numpy(inner.numpy().copy())
        self.inner.bind_ortvalue_input(name, inner)

    def bind_cpu_input(self, name: str, array: NDArray[Any]) -> None:
        self.inner.bind_cpu_input(name, array)  # small: the shape of a block

    def bind_input(self, name: str, device: str, *rest: Any) -> None:
        assert device == "cuda", "the pointer of a block on the GPU"
        self.inner.bind_input(name, "cpu", *rest)

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self.outputs[name] = value
        self.inner.bind_ortvalue_output(name, value.inner)

    def bind_output(self, name: str, device: str, *rest: Any) -> None:
        self.outputs[name] = device
        self.inner.bind_output(name, "cpu", *rest)

    def get_outputs(self) -> list[Value]:
        return [
            value if isinstance(value, Value) else Value(self.cuda, inner, value)
            for value, inner in zip(self.outputs.values(), self.inner.get_outputs(), strict=True)
        ]

    def count(self) -> None:
        """What a run copies to the host."""
        for value, inner in zip(self.outputs.values(), self.inner.get_outputs(), strict=True):
            device = value.device if isinstance(value, Value) else value
            self.cuda.downloaded += inner.tensor_size_in_bytes() if device == "cpu" else 0


class InferenceSession:
    def __init__(self, cuda: FakeCuda, model: Any, options: Any, providers: Sequence[Any]) -> None:
        (name, settings), spare = providers
        assert [name, spare] == PROVIDERS
        assert settings == {"use_tf32": "0"}, "float32 is float32"
        self.cuda = cuda
        self.inner = ort.InferenceSession(model, options, ["CPUExecutionProvider"])

    def get_providers(self) -> list[str]:
        return PROVIDERS

    def io_binding(self) -> Binding:
        return Binding(self.cuda, self.inner)

    def run_with_iobinding(self, binding: Binding) -> None:
        self.inner.run_with_iobinding(binding.inner)
        binding.count()


@dataclass
class FakeCuda:
    """Stands for the module `onnxruntime`; counts bytes that cross over."""

    uploaded: int = 0
    downloaded: int = 0
    OrtValue: Any = field(init=False)
    SessionOptions: Any = ort.SessionOptions
    __version__: str = ort.__version__

    def __post_init__(self) -> None:
        self.OrtValue = self

    def InferenceSession(self, model: Any, options: Any, providers: Sequence[Any]) -> Any:  # noqa: N802
        return InferenceSession(self, model, options, providers)

    def get_available_providers(self) -> list[str]:
        return PROVIDERS

    def ortvalue_from_numpy(self, array: NDArray[Any], device: str = "cpu") -> Value:
        self.uploaded += array.nbytes if device == "cuda" else 0
        return Value(self, ort.OrtValue.ortvalue_from_numpy(array), device)

    def ortvalue_from_shape_and_type(
        self, shape: Sequence[int], element: Any, device: str
    ) -> Value:
        return Value(self, ort.OrtValue.ortvalue_from_shape_and_type(shape, element, "cpu"), device)
