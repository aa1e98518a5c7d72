"""Write the sample images of held-out scenes, at twice the size, into `edgeprune/demo/samples`.

python -m benchmarks.demo.make_samples
"""

from PIL import Image

from edgeprune.demo import SAMPLES_DIR, draw, make_scene, questions
from edgeprune.demo.scenes import SIZE

SEEDS = (1, 6, 7)  # of the held-out split


def main() -> None:
    """One PNG per seed, and on the terminal what can be asked about it."""
    SAMPLES_DIR.mkdir(exist_ok=True)
    for seed in SEEDS:
        image = draw(make_scene(seed, "held_out"))
        big = image.resize((2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS)
        big.save(SAMPLES_DIR / f"scene-{seed}.png", optimize=True)
        for question in questions(seed, "held_out"):
            print(seed, question.text, question.answer)


if __name__ == "__main__":
    main()
