"""Versions of the packages that a result depends on."""

from __future__ import annotations

from importlib import metadata


def installed(module: str) -> str:
    """The version of the package of a module's name, or of the one that brings the module.

    `onnxruntime` is brought by onnxruntime-gpu too. PackageNotFoundError where nothing does.
    """
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        packages = metadata.packages_distributions().get(module)
        if not packages:
            raise
        return metadata.version(packages[0])
