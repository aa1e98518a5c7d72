"""The demo scenes, their questions, and the trained checkpoint inside the package."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.demo import (
    MODEL_DIR,
    SAMPLES_DIR,
    Scene,
    calibration_samples,
    draw,
    held_out,
    make_scene,
    questions,
)
from edgeprune.demo.questions import ANSWERS, KINDS, Question, benchmark, every_question
from edgeprune.demo.scenes import COLORS, PLURALS, SHAPES, SPLITS, coverage, load_digits


def truth(scene: Scene, question: Question) -> str:
    """The answer, worked out from the words of the question and the list of things alone."""
    words = question.text.removesuffix(" ?").split()
    things = scene.things
    match words:
        case ["what", "color", "is", "the", shape]:
            (answer,) = [t.color for t in things if t.shape == shape]
        case ["what", "shape", "is", "the", color, "object"]:
            (answer,) = [t.shape for t in things if t.color == color]
        case ["is", "there", "a", color, shape]:
            hits = [t for t in things if (t.color, t.shape) == (color, shape)]
            answer = "yes" if hits else "no"
        case ["how", "many", plural, "are", "there"]:
            answer = str(sum(PLURALS[t.shape] == plural for t in things))
        case ["what", "digit", "is", "on", "the", color, "card"]:
            (card,) = [t for t in things if t.shape == "card" and t.color == color]
            answer = str(load_digits().labels[card.digit_index])
        case ["is", "the", first, *side, "the", second]:
            (a,) = [t for t in things if t.shape == first]
            (b,) = [t for t in things if t.shape == second]
            holds = {
                "left of": a.x < b.x,
                "right of": a.x > b.x,
                "above": a.y < b.y,
                "below": a.y > b.y,
            }
            answer = "yes" if holds[" ".join(side)] else "no"
        case _:
            raise AssertionError(question.text)
    return answer


def test_scene_and_image_follow_from_the_seed() -> None:
    for seed in range(5):
        first, second = make_scene(seed), make_scene(seed)
        assert first == second
        assert np.array_equal(np.asarray(draw(first)), np.asarray(draw(second)))
        assert questions(seed) == questions(seed)
    assert make_scene(0) != make_scene(1)
    assert make_scene(0) != make_scene(0, "train")


def test_images_are_full_size_color() -> None:
    image = draw(make_scene(3))
    assert image.size == (168, 168)
    assert image.mode == "RGB"


def test_things_are_distinct_and_apart() -> None:
    for seed in range(200):
        things = make_scene(seed).things
        assert 3 <= len(things) <= 6
        assert len({(t.shape, t.color) for t in things}) == len(things)
        for i, a in enumerate(things):
            assert a.shape in SHAPES
            assert a.color in COLORS
            for b in things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2


def test_every_thing_covers_its_centre() -> None:
    for seed in range(50):
        scene = make_scene(seed)
        owner = coverage(scene)
        for i, thing in enumerate(scene.things):
            assert owner[thing.y // 14, thing.x // 14] == i


def test_splits_share_no_digit() -> None:
    digits = load_digits()
    used = {}
    for split in SPLITS:
        scenes = [make_scene(seed, split) for seed in range(300)]
        used[split] = {t.digit_index for s in scenes for t in s.things if t.digit_index is not None}
        assert all(digits.splits[list(used[split])] == SPLITS.index(split))
    assert sum(map(len, used.values())) == len(set().union(*used.values()))


def test_seeds_outside_the_split_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        make_scene(10**9, "train")


def test_answers_agree_with_the_scene() -> None:
    for seed in range(150):
        scene = make_scene(seed)
        for kind in KINDS:
            for question in every_question(scene, kind):
                assert question.answer == truth(scene, question)
                assert question.answer in ANSWERS[kind]


def test_benchmark_is_even_over_kinds_and_answers() -> None:
    asked = list(benchmark(600, "held_out"))
    assert asked == list(benchmark(600, "held_out"))
    assert len({q.image_id for q in asked}) == 600
    for kind in KINDS:
        answers = [q.answer for q in asked if q.kind == kind]
        assert len(answers) == 100
        for answer in ANSWERS[kind]:
            assert abs(answers.count(answer) - 100 / len(ANSWERS[kind])) <= 3


def test_every_no_of_presence_is_a_near_miss() -> None:
    for question in benchmark(300, "held_out"):
        if question.kind == "presence" and question.answer == "no":
            color, shape = question.text.split()[3:5]
            things = make_scene(question.image_id).things
            assert color in {t.color for t in things}
            assert shape in {t.shape for t in things}


def test_calibration_is_another_split() -> None:
    samples = list(calibration_samples(12))
    assert {q.split for _, q in samples} == {"calibration"}
    assert {q.split for _, q in held_out(12)} == {"held_out"}


def test_sample_images_are_there() -> None:
    assert len(list(SAMPLES_DIR.glob("*.png"))) >= 3


def test_model_folder_is_small() -> None:
    files = [f for f in MODEL_DIR.rglob("*") if f.is_file()]
    assert any(f.suffix == ".safetensors" for f in files)
    assert sum(f.stat().st_size for f in files) <= 12 * 2**20


def _answers(asked: list[Question]) -> list[str]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model = load(MODEL_DIR, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(MODEL_DIR)
    texts = []
    for question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        turn = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(turn, add_generation_prompt=True))
    images = [draw(make_scene(q.image_id, q.split)) for q in asked]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4)
    answers: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    return answers


def test_the_checkpoint_answers_held_out_questions() -> None:
    asked = list(benchmark(120, "held_out"))
    answers = [text.split("</s>")[0].strip() for text in _answers(asked)]
    right = sum(a == q.answer for a, q in zip(answers, asked, strict=True))
    assert right >= 0.85 * len(asked)


def test_the_checkpoint_answers_a_second_turn() -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(MODEL_DIR)
    content = [{"type": "image"}, {"type": "text", "text": "what color is the star ?"}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "how many stars are there ?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == (
        "USER: <image>\nwhat color is the star ? ASSISTANT: red </s>"
        "USER: how many stars are there ? ASSISTANT:"
    )
