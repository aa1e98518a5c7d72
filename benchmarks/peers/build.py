"""Peers' graphs, built where the peer is installed: no import of ours but job.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.job import INT4, LLAMA, STATIC
from benchmarks.peers.llama import MODEL, PYTHON, write_q4_0


def build(work: Path, peer: str) -> None:
    """Have one peer build its graph below `work`, unless it is there."""
    output = work / peer
    if built(work, peer):
        return
    draft = work / f".{peer}"
    shutil.rmtree(draft, ignore_errors=True)
    if peer == LLAMA:
        draft.mkdir()
        write_q4_0(work / "text", draft)
        (draft / PYTHON).write_text(sys.executable)
    else:
        command = _command(peer, work / "text", draft)
        print("$", *command, flush=True)
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    draft.rename(output)


def built(work: Path, peer: str) -> bool:
    """Whether a peer's file is there."""
    return (work / peer / (MODEL if peer == LLAMA else "model.onnx")).is_file()


def _command(peer: str, text: Path, output: Path) -> list[str]:
    tools = Path(sys.executable).parent
    if peer.startswith("genai"):
        module = "onnxruntime_genai.models.builder"
        paths = ["-i", str(text), "-o", str(output), "-c", f"{output}/cache"]
        # Logits of the last token only, as ours.
        bits = "int4" if peer in INT4 else "fp32"
        options = ["-p", bits, "-e", "cpu", "--extra_options", "prune_lm_head=true"]
        if peer in INT4:  # activations rounded to int8, as ours
            options.append("int4_accuracy_level=4")
        return [sys.executable, "-m", module, *paths, *options]
    if peer == "optimum":
        options = ["--task", "text-generation-with-past", "--dtype", "fp32"]
        tool = [str(tools / "optimum-cli"), "export", "onnx"]
        return [*tool, "--model", str(text), *options, str(output)]
    options = {
        "mobius": ["--ep", "cpu"],
        "mobius-standard": ["--ep", "default"],
        "mobius-static": ["--ep", "cpu", "--static-cache", "--max-seq-len", str(STATIC)],
    }[peer]
    tool = [str(tools / "mobius"), "build", "--config", str(text), "--dtype", "f32"]
    return [*tool, *options, str(output)]
