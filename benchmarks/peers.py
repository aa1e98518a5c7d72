"""Our dense decoder against the same decoder as other exporters build it, on one ONNX Runtime.

    python -m benchmarks.peers prepare                    # here: checkpoints, our bundles
    PEERS/bin/python -m benchmarks.peers build genai      # where that peer is installed
    PEERS/bin/python -m benchmarks.peers build mobius
    python -m benchmarks.peers race                       # here: everything, lap by lap in turn

The decoder is Qwen2-0.5B's with a small vocabulary and random weights. Peers get it as a text
model, `Qwen2ForCausalLM`, we as a LLaVA of the same weights; a race starts only where all agree on
the next token. Peers are installed apart, for their pins differ:

    mobius, genai:  pip install mobius-onnx==0.1.0 onnxruntime-genai==0.18.0
    optimum:        pip install optimum-onnx[onnxruntime]==0.1.0
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

STEM = "language_model."


def text_checkpoint(source: Path, folder: Path) -> None:
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for file in sorted(set(index.values())):
        shard = load_file(source / file)
        zeroed = False
        for name, tensor in shard.items():
            if name.endswith("o_proj.bias"):
                tensor.zero_()
                zeroed = True
            elif name.startswith(STEM):
                weights[name.removeprefix(STEM)] = tensor
        if zeroed:
            save_file(shard, source / file, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.float() for k, v in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    text = json.loads((source / "config.json").read_text())["text_config"]
    for name in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim"):
        text.pop(name)
    text |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "float32",
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "rope_theta": text["rope_parameters"]["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(text, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    )


if __name__ == "__main__":
    from benchmarks.shapes import SHAPES, write

    work = Path("out/peers")
    src = work / "0.5b"
    if not (src / "config.json").is_file():
        write(SHAPES["0.5b"], src)
    text_checkpoint(src, work / "text")
    from benchmarks.speed import bundles

    print(bundles("0.5b", 4, work, "fp32"))
