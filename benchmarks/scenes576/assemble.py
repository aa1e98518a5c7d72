"""Put the trained parts and SmolLM2 together into a checkpoint for `edgeprune export`.

    python -m benchmarks.scenes576.assemble TRAINED CHECKPOINT

TRAINED is what `train` wrote: tower, projector and the LoRA adapter, which is merged into the
language model's weights. The checkpoint is float16. It needs the packages that `benchmarks.real_lm`
names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks import real_lm
from benchmarks.scenes576.tower import TowerShape, vision_config
from edgeprune.errors import ModelError
from edgeprune.models._lora import Lora


def assemble(trained: Path, folder: Path) -> Path:
    """Write the checkpoint; ModelError where a package or a file is missing."""
    from transformers import CLIPVisionConfig

    shape = TowerShape(**json.loads((trained / "settings.json").read_text())["tower"])
    model, tokenizer = real_lm.llava(CLIPVisionConfig(**vision_config(shape)))
    join(model, trained)
    real_lm.save(model, tokenizer, folder)
    return folder


def join(model: Any, trained: Path) -> None:
    """Give a LLaVA the trained tower and projector, and merge the adapter into its decoder."""
    model.model.load_state_dict(load_file(trained / "vision.safetensors"), strict=False)
    parts = model.model.vision_tower, model.model.multi_modal_projector
    wanted = sum(len(part.state_dict()) for part in parts)
    if wanted != len(load_file(trained / "vision.safetensors")):
        raise ModelError(f"{trained / 'vision.safetensors'} is of another tower")
    lora = Lora.open(trained)
    if lora is None:
        raise ModelError(f"{trained} holds no adapter_config.json")
    weights = dict(model.named_parameters())
    for name in lora.changes:
        weights[name].data.copy_(lora.merged(name, weights[name].data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("trained", type=Path)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    print(assemble(args.trained, args.checkpoint))


if __name__ == "__main__":
    main()
