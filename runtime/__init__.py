"""The torch-free runtime: opens a bundle and answers questions about images.

from edgeprune.runtime import Session

answer = Session.open("out/demo-utp-cr4").ask("scene.png", "what color is the star ?")
"""

from edgeprune.runtime.answer import Answer, Choice, Timings
from edgeprune.runtime.engine import Engine
from edgeprune.runtime.formats import AnswerFormat
from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.sequence import Sequence
from edgeprune.runtime.session import Session

__all__ = [
    "Answer",
    "AnswerFormat",
    "Choice",
    "Engine",
    "Sampling",
    "Sequence",
    "Session",
    "Timings",
]
