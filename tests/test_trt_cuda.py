"""What the TensorRT backends call in CUDA and TensorRT, and what they say where it is missing."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeprune.runtime import dtypes, gpu
from tests.conftest import Refused
from tests.fake_gpu import VERSION
from tests.tiny import ASK_SCENE


def test_what_cuda_gave_is_given_back_newest_first() -> None:
    freed: list[tuple[str, Any]] = []
    host = ctypes.create_string_buffer(8)
    pinned = ctypes.addressof(host)
    names = "GraphExecDestroy GraphDestroy FreeHost Free StreamDestroy"
    device = gpu.CudaGpu(
        SimpleNamespace(ILogger=SimpleNamespace, __version__=VERSION),
        "TensorRT",
        SimpleNamespace(
            **{
                f"cuda{name}": lambda what, name=name: freed.append((name, what))
                for name in names.split()
            },
            **vars(
                cuda(
                    cudaGetDeviceCount=(0, 1),
                    cudaSetDevice=(0,),
                    cudaDeviceGetAttribute=(0, 8),
                    cudaStreamCreate=(0, 7),
                    cudaMalloc=(0, 1000),
                    cudaMallocHost=(0, pinned),
                    cudaStreamBeginCapture=(0,),
                    cudaStreamEndCapture=(0, 20),
                    cudaGraphInstantiate=(0, 21),
                )
            ),
            cudaDeviceAttr=Anything(),
            cudaStreamCaptureMode=Anything(),
        ),
    )
    device.allocate(64)
    device.pinned(8)
    device.record(lambda: None)
    device.close()
    assert freed == list(zip(names.split(), (21, 20, pinned, 1000, 7), strict=True))
    device.close()
    assert len(freed) == 5


class Anything:
    """Has every attribute."""

    def __getattr__(self, name: str) -> str:
        return name


def test_what_is_missing_is_named(
    tiny_rtx: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT first, then cuda-python."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT" in refused("run", tiny_rtx, *ASK_SCENE, "--backend", "trt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=VERSION))
    for module in ("cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, module, None)
    line = refused("run", tiny_rtx, *ASK_SCENE, "--backend", "trt")
    assert "is not installed; in edgeprune's checkout run: pip install '.[trt]'" in line
    monkeypatch.setattr("edgeprune.runtime.machine.jetson", lambda: "36.4.3")
    line = refused("run", tiny_rtx, *ASK_SCENE, "--backend", "trt")
    assert "JetPack 6: pip install 'cuda-python>=12.6,<13'" in line
    assert "[trt]" not in line, "it would put another TensorRT over JetPack's"


def cuda(**answers: tuple[Any, ...]) -> SimpleNamespace:
    """A CUDA runtime of which only some functions are there; each returns a code and values."""
    functions = {name: lambda *_, found=found: found for name, found in answers.items()}
    words = lambda code: (0, b"no CUDA-capable device is detected")  # noqa: E731
    return SimpleNamespace(cudaGetErrorString=words, **functions)


@pytest.mark.parametrize(
    ("count", "says"),
    [
        ((100, 0), "can be used here (CUDA: cudaGetDeviceCount: no CUDA-capable device"),
        ((0, 0), "no NVIDIA GPU is found here; use the backend ort-cpu"),
    ],
)
def test_no_gpu(
    count: tuple[int, int],
    says: str,
    tiny_rtx: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt = SimpleNamespace(__version__=VERSION, ILogger=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(gpu, "_cudart", lambda kind: cuda(cudaGetDeviceCount=count))
    monkeypatch.setattr("edgeprune.runtime.trt.quiet_logger", lambda trt: None)
    assert says in refused("run", tiny_rtx, *ASK_SCENE, "--backend", "trt")


CALLED = {
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_optimization_profiles get_device_memory_size_for_profile_v2"
    " create_execution_context",
    "IExecutionContext": "set_device_memory set_optimization_profile_async set_input_shape"
    " set_tensor_address execute_async_v3 is_stream_capturable",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
}


@pytest.mark.parametrize("name", CALLED)
def test_tensorrt_rtx_has_what_the_seam_calls(name: str) -> None:
    if sys.platform != "linux":
        pytest.importorskip("tensorrt_rtx")
    import tensorrt_rtx

    source = Path(gpu.__file__).read_text(encoding="utf-8")
    for called in CALLED[name].split():
        assert called in source
        assert hasattr(getattr(tensorrt_rtx, name), called)


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    import torch

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(1000), [0, -0.0, 1.00390625, 1e-40, 3e38]])
    values = values.astype(np.float32)
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    stored = dtypes.to_stored(values, "bf16")
    np.testing.assert_array_equal(stored, wanted.view(torch.uint16).numpy())
    np.testing.assert_array_equal(dtypes.from_stored(stored, "bf16"), wanted.float().numpy())
    half = dtypes.to_stored(values[:-1], "fp16")
    np.testing.assert_array_equal(half, values[:-1].astype(np.float16))
