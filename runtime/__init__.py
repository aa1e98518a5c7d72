"""The torch-free runtime: opens a bundle and answers questions about pictures.

from edgeprune.runtime import Session

answer = Session.open("out/demo-utp-cr4").ask("scene.png", "what color is the star ?")
"""

from edgeprune.runtime.sampling import Sampling
from edgeprune.runtime.session import Answer, Session, Timings

__all__ = ["Answer", "Sampling", "Session", "Timings"]
