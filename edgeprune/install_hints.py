"""What to install for what is missing. The package index knows no edgeprune: from its checkout."""

from __future__ import annotations

CUDA_PYTHON = "JetPack 6: pip install 'cuda-python>=12.6,<13'; JetPack 7: 'cuda-python>=13'"
"""On a Jetson, where an extra would put another TensorRT over JetPack's."""


def install(extra: str) -> str:
    """The command that brings the packages of an extra."""
    return f"in edgeprune's checkout run: pip install '.[{extra}]'"
