"""edgeprune: visual-token pruning for vision-language models, frozen into static ONNX graphs."""

__version__ = "0.1.0"
__all__ = ["__version__"]
