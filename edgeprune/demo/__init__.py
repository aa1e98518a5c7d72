"""The embedded demo: a small trained LLaVA, and the drawn scenes and questions that test it.

`MODEL_DIR` holds the checkpoint in Hugging Face format (`LlavaForConditionalGeneration`).
"""

from pathlib import Path

from edgeprune.demo.questions import KINDS, Question, calibration_samples, held_out, questions
from edgeprune.demo.scenes import Scene, Thing, draw, make_scene

MODEL_DIR: Path = Path(__file__).parent / "model"
SAMPLES_DIR: Path = Path(__file__).parent / "samples"

__all__ = [
    "KINDS",
    "MODEL_DIR",
    "SAMPLES_DIR",
    "Question",
    "Scene",
    "Thing",
    "calibration_samples",
    "draw",
    "held_out",
    "make_scene",
    "questions",
]
