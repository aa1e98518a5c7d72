"""Whether answers of a form parse: a real language model is asked for JSON, again and again.

Each try draws a question, a schema, a temperature, a seed and a length. It is right where the
answer parses and has the schema's fields, or where it ends with `length`; both are counted.

    python -m benchmarks.real_lm checkpoints/smollm2-llava
    edgeprune export --model checkpoints/smollm2-llava --method none --dtype fp32 \
        --samples-file checkpoints/smollm2-llava/samples.json \
        --image-dir checkpoints/smollm2-llava/images --output out/smollm2
    python -m benchmarks.json_answers out/smollm2 --tries 500
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from edgeprune.demo import SAMPLES_DIR
from edgeprune.runtime import AnswerFormat, Sampling, Session

SHAPES = ["circle", "star", "heart", "card"]
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {"type": "object"},
    "shape": {
        "type": "object",
        "properties": {"shape": {"enum": SHAPES}, "visible": {"type": "boolean"}},
        "required": ["shape", "visible"],
        "additionalProperties": False,
    },
    "scene": {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 40},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            "box": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x", "y"],
            },
        },
        "required": ["title", "count", "tags"],
        "additionalProperties": False,
    },
}
PATTERNS = (r"(yes|no), because [a-z ]{5,60}\.", r"\d{4}-\d{2}-\d{2}", r"(red|green|blue){1,3}")
QUESTIONS = (
    "Describe the image as JSON.",
    "What do you see? Answer with JSON.",
    "Which shapes are there? Say it as a JSON object.",
    "Tell me a story about a star.",
    'Give {"shape": ..., "count": ...}.',
)


def verdict(name: str, text: str) -> str:
    """`right`, or what is wrong with a complete answer."""
    if name not in SCHEMAS:
        return "right" if re.fullmatch(name, text) else "no match"
    try:
        found = json.loads(text)
    except ValueError:
        return "does not parse"
    if not isinstance(found, dict):
        return "no object"
    schema = SCHEMAS[name]
    missing = set(schema.get("required", ())) - set(found)
    more = set(found) - set(schema.get("properties", found))
    if missing or more:
        return "wrong fields"
    if name == "shape" and not (found["shape"] in SHAPES and isinstance(found["visible"], bool)):
        return "wrong values"
    if name == "scene" and not (
        len(found["title"]) <= 40
        and isinstance(found["count"], int)
        and 0 <= found["count"] <= 99
        and len(found["tags"]) <= 3
    ):
        return "wrong values"
    return "right"


def tried(session: Session, rng: random.Random) -> tuple[str, str, int, float]:
    """One try: the form, how it went, tokens, milliseconds a token."""
    name = rng.choice([*SCHEMAS, *PATTERNS])
    wanted = AnswerFormat.json_schema(SCHEMAS[name]) if name in SCHEMAS else None
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7, 1.0, 1.5]),
        seed=rng.randrange(1 << 30),
        max_new_tokens=rng.choice([12, 60, 160]),
    )
    image = SAMPLES_DIR / f"scene-{rng.choice([1, 6])}.png"
    started = time.perf_counter()
    answer = session.ask(
        image, rng.choice(QUESTIONS), sampling, answer_format=wanted or AnswerFormat.regex(name)
    )
    spent = 1e3 * (time.perf_counter() - started - 1e-3 * answer.timings.first_token)
    outcome = "length" if answer.finish == "length" else verdict(name, answer.text)
    if outcome not in ("right", "length"):
        print(f"{name}: {outcome}: {answer.text!r}", flush=True)
    return name, outcome, len(answer.ids), spent / max(1, len(answer.ids) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers of a form: how many parse.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tries", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    rng, counts = random.Random(args.seed), Counter[str]()
    by_form: dict[str, Counter[str]] = {}
    tokens, times = 0, list[float]()
    with Session.open(args.bundle, threads=args.threads) as session:
        for _ in range(args.tries):
            name, outcome, said, each = tried(session, rng)
            counts[outcome] += 1
            by_form.setdefault(name, Counter())[outcome] += 1
            tokens += said
            times.append(each)
    record = {
        "tries": args.tries,
        **counts,
        "wrong": args.tries - counts["right"] - counts["length"],
        "tokens": tokens,
        "median_ms_per_token": sorted(times)[len(times) // 2],
        "by_form": by_form,
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
