"""Write SmolLM2's packed weights in pieces that `train` reads where no GGUF reader is installed.

    python -m benchmarks.scenes576.pack FOLDER

writes FOLDER/decoder-*.safetensors (two of 47 and 50 MB, or with --pieces 3 of at most 34 MB), the
package's own 4- and 8-bit blocks stacked over the layers, and FOLDER/tokenizer.json. It needs the
packages that `benchmarks.real_lm` names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import real_lm
from benchmarks.scenes576.decoder import MATRICES
from edgeprune.errors import ModelError

STORED = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
PIECES = {
    2: (("embed", *MATRICES[:4]), MATRICES[4:]),
    3: (("embed",), (*MATRICES[:4], "down_proj"), ("gate_proj", "up_proj")),
}
"""Which matrices go into which file."""


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in transformers' order.

    GGUF has the two halves of a head's rotary pairs interleaved.
    """
    pairs = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def write(folder: Path, pieces: int = 2) -> list[Path]:
    """Write the pieces and the tokenizer; ModelError where a package is missing."""
    if absent := real_lm.missing():
        raise ModelError(f"{', '.join(absent)} are missing: {real_lm.INSTALL}")
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    file = real_lm.gguf_file()
    reader = GGUFReader(file)
    tensors: dict[str, Any] = {t.name: t.data for t in reader.tensors}

    def setting(name: str) -> float:
        return float(reader.fields[f"llama.{name}"].parts[-1][0])

    layers = int(setting("block_count"))
    heads, kv_heads = setting("attention.head_count"), setting("attention.head_count_kv")
    stacks = {}
    for name in MATRICES:
        rows = [tensors[f"blk.{i}.{STORED[name]}.weight"] for i in range(layers)]
        if name in ("q_proj", "k_proj"):
            rows = [halves_apart(r, int(heads if name == "q_proj" else kv_heads)) for r in rows]
        stacks[name] = np.stack(rows)
    norms = [[tensors[f"blk.{i}.{n}_norm.weight"] for n in ("attn", "ffn")] for i in range(layers)]
    stacks["embed"] = np.array(tensors["token_embd.weight"])
    rest = {
        "norms": np.array(norms, dtype=np.float32),
        "last_norm": np.array(tensors["output_norm.weight"]),
        "settings": np.array(
            [
                heads,
                kv_heads,
                setting("rope.freq_base"),
                setting("attention.layer_norm_rms_epsilon"),
            ]
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, names in enumerate(PIECES[pieces], start=1):
        written.append(folder / f"decoder-{number}.safetensors")
        save_file({name: stacks[name] for name in names} | rest, written[-1])
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    real_lm.add_image_token(tokenizer)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return [*written, folder / "tokenizer.json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pieces", type=int, default=2, choices=sorted(PIECES))
    args = parser.parse_args()
    for path in write(args.folder, args.pieces):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
