"""The scenes of 576 visual tokens, their questions, and the training of the model for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import real_lm
from benchmarks.scenes576 import symbols
from benchmarks.scenes576.assemble import join
from benchmarks.scenes576.decoder import MATRICES, Decoder, Lora, stacked, unpacked, widened
from benchmarks.scenes576.losses import Model, Scores, answer_logits, answer_loss
from benchmarks.scenes576.pools import PER_SCENE, Plan, Pool, Reader, Resident, dialogue
from benchmarks.scenes576.questions import (
    ANSWERS,
    APART,
    KINDS,
    Question,
    benchmark,
    every_question,
)
from benchmarks.scenes576.scenes import (
    COLORS,
    GRID,
    PLURALS,
    SHAPES,
    SIZE,
    SPLITS,
    Scene,
    coverage,
    draw,
    generator,
    make_scene,
)
from benchmarks.scenes576.tower import Sight, TowerShape, vision_config
from benchmarks.scenes576.write_questions import write
from edgeprune.compare.questions import Questions
from edgeprune.demo.scenes import load_digits

SPECIALS = ("<pad>", "<|im_start|>", "<|im_end|>", "<image>")


def truth(scene: Scene, question: Question) -> str:
    """The answer, worked out from the words of the question and the list of objects alone."""
    words = question.text.removesuffix("?").split()
    items = scene.items

    def one(color: str, shape: str) -> tuple[int, int]:
        (hit,) = [(i.x, i.y) for i in items if (i.color, i.shape) == (color, shape)]
        return hit

    match words:
        case ["What", "color", "is", "the", shape]:
            (answer,) = [i.color for i in items if i.shape == shape]
        case ["What", "shape", "is", "the", color, "object"]:
            (answer,) = [i.shape for i in items if i.color == color]
        case ["Is", "there", "a" | "an", color, shape]:
            answer = "yes" if (color, shape) in [(i.color, i.shape) for i in items] else "no"
        case ["How", "many", plural, "are", "there"]:
            answer = str(sum(PLURALS[i.shape] == plural for i in items))
        case ["What", "number", "is", "on", "the", color, "card"]:
            (card,) = [i for i in items if i.shape == "card" and i.color == color]
            assert card.digits is not None
            answer = "".join(str(load_digits().labels[i]) for i in card.digits)
        case ["Is", "the", color, shape, "in", "the", low, "or", "the", high, "half"]:
            x, y = one(color, shape)
            answer = (low, high)[(x if low == "left" else y) > SIZE / 2]
        case ["Is", "the", color, shape, *side, "the", color2, shape2]:
            (x, y), (x2, y2) = one(color, shape), one(color2, shape2)
            assert color == color2 or shape == shape2, "look-alikes are compared"
            holds = {"left": x < x2, "right": x > x2, "above": y < y2, "below": y > y2}
            if "or" in side:
                (answer,) = [word for word in side if holds.get(word)]
            else:
                answer = "yes" if holds[side[0]] else "no"
        case _:
            raise AssertionError(question.text)
    return answer


def test_scene_and_image_follow_from_the_seed() -> None:
    for seed in range(4):
        first, second = make_scene(seed), make_scene(seed)
        assert first == second
        assert np.array_equal(np.asarray(draw(first)), np.asarray(draw(second)))
    assert draw(make_scene(0)).size == (SIZE, SIZE)
    assert make_scene(0) != make_scene(1)


def test_splits_share_neither_seeds_nor_digits() -> None:
    firsts = [
        generator(seed, split, 0).integers(2**62) for split in SPLITS for seed in (0, 10**9 - 1)
    ]
    assert len(set(firsts)) == len(firsts)
    with pytest.raises(ValueError, match="outside"):
        generator(10**9, "train", 0)
    shown = {
        split: {d for s in range(150) for i in make_scene(s, split).items for d in i.digits or ()}
        for split in SPLITS
    }
    for split, indices in shown.items():
        assert indices, split
        assert {SPLITS[load_digits().splits[i]] for i in indices} == {split}


def test_scenes_are_as_described() -> None:
    scenes = [make_scene(seed, "train") for seed in range(200)]
    assert {len(scene.items) for scene in scenes} == set(range(5, 11))
    most, areas = 0, []
    for scene in scenes:
        pairs = [(i.shape, i.color) for i in scene.items]
        assert len(set(pairs)) == len(pairs)
        most = max(most, *(sum(s == shape for s, _ in pairs) for shape in SHAPES))
        owner = coverage(scene)
        for index, item in enumerate(scene.items):
            assert owner[item.y // 14, item.x // 14] == index
            assert item.size // 2 <= item.x < SIZE - item.size // 2
            areas.append((owner == index).sum() / owner.size)
    assert most == 6
    assert 0.007 < np.mean(areas) < 0.015


def test_every_answer_is_right() -> None:
    asked = dict.fromkeys(KINDS, 0)
    for seed in range(60):
        scene = make_scene(seed, "validation")
        for kind in KINDS:
            for question in every_question(scene, kind):
                assert question.answer == truth(scene, question), question
                assert question.answer in ANSWERS[kind]
                asked[kind] += 1
    assert min(asked.values()) > 20
    assert APART >= SIZE // 8


def test_benchmark_is_even_over_kinds_and_answers() -> None:
    questions = list(benchmark(16 * len(KINDS), "test"))
    assert questions == list(benchmark(16 * len(KINDS), "test"))
    assert len({q.seed for q in questions}) == len(questions)
    for kind in KINDS:
        own = [q for q in questions if q.kind == kind]
        assert len(own) == 16
        assert len({q.answer for q in own}) == min(16, len(ANSWERS[kind]))


def test_compare_takes_the_written_questions(tmp_path: Path) -> None:
    write(tmp_path, 16, 2)
    asked = list(Questions(None, tmp_path / "questions.jsonl", tmp_path / "images"))
    assert [a.kind for a in asked] == [*KINDS, *KINDS]
    assert [(a.text, a.answers) for a in asked] == [
        (q.text, (q.answer,)) for q in benchmark(16, "test")
    ]
    records = json.loads((tmp_path / "samples.json").read_text())
    assert [r["conversations"][1]["value"] for r in records] == [
        q.answer for q in benchmark(2, "calibration")
    ]
    assert all((tmp_path / "images" / r["image"]).is_file() for r in records)


def make_tokenizer(file: Path) -> Tokenizer:
    """One token per word with the blank before it, per digit and per mark; a small vocabulary."""
    texts = ["user assistant is"]
    for seed in range(60):
        scene = make_scene(seed, "train")
        texts += [f"{q.text} {q.answer}" for kind in KINDS for q in every_question(scene, kind)]
    words = {word for text in texts for word in text.replace("?", "").split()}
    words |= {*COLORS, *SHAPES, *PLURALS.values(), *"0123456789", "?", "\n"}
    vocabulary = [*SPECIALS, *sorted({*words, *(f" {w}" for w in words)})]
    while len(vocabulary) % 32:
        vocabulary.append(f"<{len(vocabulary)}>")
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?[A-Za-z]+|\d|\n|\?"), behavior="isolated"
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(file))
    return tokenizer


def tiny_llava(vocabulary: int) -> LlavaForConditionalGeneration:
    """A LLaVA of 576 visual tokens with random weights, two layers and grouped queries."""
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1000.0, "rope_type": "default"},
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_config(TINY)), text_config=text,
        image_token_index=SPECIALS.index("<image>"), image_seq_length=576,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


TINY = TowerShape(width=32, layers=3, heads=2, hidden=48)


def test_training_computes_what_transformers_computes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    reader = Reader(tmp_path / "tokenizer.json")
    llava = tiny_llava(tokenizer.get_vocab_size())
    decoder = stacked(llava.model.language_model)
    lora = Lora(decoder, rank=4, alpha=8.0)
    for name in MATRICES:
        nn.init.normal_(lora.get_parameter(f"{name}_B"), std=0.05)
    sight = Sight(TINY, decoder.width)
    for p in sight.parameters():
        p.data = (p.data + 0.05 * torch.randn_like(p)).half().float()
    for p in lora.parameters():
        p.data = p.data.half().float()
    save_file(sight.state(), tmp_path / "vision.safetensors")
    save_file(lora.state(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(lora.config()))
    join(llava, tmp_path)

    pool = Pool.make(Plan("v", 2, GRID, split="validation", pixels=True))
    pool.fill(0, reader)
    resident = Resident(pool, torch.device("cpu"))
    resident.bring(9.0)
    slots = 3
    batch = resident.batch(torch.arange(2), slots, None)
    assert batch.pixels is not None
    model = Model(decoder, lora, sight, nn.ModuleList(),
                  symbols.Table(torch.empty(0), torch.empty(0)),
                  torch.tensor(reader.prefix()))  # fmt: skip
    with torch.no_grad():
        tokens, *_ = sight(batch.pixels, torch.float32)
        mine = answer_logits(model, lora.merged(decoder), tokens, batch)
        for scene in range(2):
            pixels = (batch.pixels[scene].permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
            for slot in range(slots):
                ids = torch.tensor([[*reader.prefix(), *[SPECIALS.index("<image>")] * 576,
                                     *batch.ids[scene, slot].tolist()]])  # fmt: skip
                theirs = llava(input_ids=ids, pixel_values=pixels).logits[0]
                at = batch.columns[scene, slot] + len(reader.prefix()) + 576
                real = batch.targets[scene, slot] >= 0
                assert torch.equal(ids[0, at + 1][real], batch.targets[scene, slot][real])
                torch.testing.assert_close(mine[scene, slot], theirs[at], atol=1e-4, rtol=1e-4)
                assert theirs[at].abs().max() > 0.5


def test_a_first_turn_is_what_the_chat_template_writes() -> None:
    from jinja2 import Environment

    content = [{"type": "image"}, {"type": "text", "text": "Is it?"}]
    written = (
        Environment()
        .from_string(real_lm.TEMPLATE)
        .render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    )
    assert dialogue("Is it?") == written
    assert dialogue("Is it?", "no") == f"{written}no<|im_end|>"


def packed(rng: np.random.Generator, shape: tuple[int, ...], size: int) -> np.ndarray:
    """Random blocks of Q4_1 (20 bytes) or Q8_0 (34), weights of about 0.1."""
    *rows, columns = shape
    blocks = rng.integers(0, 256, (int(np.prod(rows)) * columns // 32, size), dtype=np.uint8)
    scale = np.float16([0.03, -0.22] if size == 20 else [0.002])
    blocks[:, : scale.nbytes] = scale.view(np.uint8)
    return blocks.reshape(*rows, -1)


def test_weights_of_four_and_eight_bits_are_widened() -> None:
    block = np.zeros(20, np.uint8)
    block[:4] = np.float16([0.5, -2.0]).view(np.uint8)
    block[4:] = np.arange(16) | (15 - np.arange(16)) << 4
    values = np.concatenate([np.arange(16), 15 - np.arange(16)]) * 0.5 - 2.0
    assert widened(torch.from_numpy(np.tile(block, (2, 3)))).tolist() == [[*values] * 3] * 2
    block = np.zeros(34, np.uint8)
    block[:2] = np.float16([0.25]).view(np.uint8)
    block[2:] = np.arange(-16, 16, dtype=np.int8).view(np.uint8)
    assert widened(torch.from_numpy(block[None]))[0].tolist() == (np.arange(-16, 16) / 4).tolist()


def carried(folder: Path) -> Decoder:
    """What `pack` writes, of a small random language model; and how training reads it."""
    folder.mkdir()
    tokenizer = make_tokenizer(folder / "tokenizer.json")
    rng = np.random.default_rng(0)
    width, hidden, layers, heads, kv = 96, 128, 2, 3, 1
    sizes = {"q_proj": (width, width), "k_proj": (32, width), "v_proj": (32, width),
             "o_proj": (width, width), "gate_proj": (hidden, width), "up_proj": (hidden, width),
             "down_proj": (width, hidden)}  # fmt: skip
    stacks = {name: packed(rng, (layers, *size), 20) for name, size in sizes.items()}
    embed = packed(rng, (tokenizer.get_vocab_size(), width), 34)
    rest = {"embed": embed, "norms": np.ones((layers, 2, width), np.float32),
            "last_norm": np.ones(width, np.float32),
            "settings": np.array([heads, kv, 10000.0, 1e-5])}  # fmt: skip
    names = MATRICES[:4], MATRICES[4:]
    pieces = [folder / f"decoder-{n}.safetensors" for n in (1, 2)]
    save_arrays({n: stacks[n] for n in names[0]} | rest, pieces[0])
    save_arrays({n: stacks[n] for n in names[1]}, pieces[1])
    return unpacked(pieces)


def test_all_factors_learn_and_slots_are_apart(tmp_path: Path) -> None:
    decoder = carried(tmp_path / "carry")
    reader = Reader(tmp_path / "carry" / "tokenizer.json")
    pool = Pool.make(Plan("4", 8, 4, 3))
    pool.fill(0, reader)
    resident = Resident(pool, torch.device("cpu"))
    resident.bring(9.0)
    table = symbols.make_table(decoder.embed, reader.word)
    lora = Lora(decoder, rank=4, alpha=8.0)
    model = Model(decoder, lora, Sight(TINY, 96), nn.ModuleList(), table,
                  torch.tensor(reader.prefix()))  # fmt: skip
    batch = resident.batch(torch.arange(8), 4, None)
    tokens = table.ideal(batch.symbols)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = answer_loss(model, lora.merged(decoder), tokens, batch,
                           Scores.fresh(tokens.device))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # at step 0, B is zero and no gradient reaches A
            assert all(p.grad is not None and p.grad.any() for p in lora.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]

    def answers(ids: Tensor) -> Tensor:
        batch.ids = ids
        with torch.no_grad():
            return answer_logits(model, lora.merged(decoder), tokens, batch)

    before = answers(batch.ids)
    other = batch.ids.clone()
    other[:, 1] = other[:, 1].flip(-1)
    after = answers(other)
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    assert not torch.equal(before[:, 1], after[:, 1])
    assert PER_SCENE >= 4


@pytest.mark.slow
def test_training_runs_from_start_to_end(tmp_path: Path) -> None:
    carried(tmp_path / "carry")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.scenes576.train", "--minutes", "0.6",
               "--carry", str(tmp_path / "carry"), "--out", str(out), "--workers", "1",
               "--scenes", "64", "--symbolic", "64", "--checked", "16", "--tokens", "2600",
               "--images", "8", "--most", "8", "--slots", "4", "--rank", "4"]  # fmt: skip
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, cwd=root, timeout=300)
    assert {f.name for f in out.iterdir()} == {
        "vision.safetensors", "adapter_model.safetensors", "adapter_config.json", "settings.json",
        "log.jsonl", "validation.json",
    }  # fmt: skip
    result = json.loads((out / "validation.json").read_text())
    assert sum(result["asked"].values()) == 16 * PER_SCENE
    lines = (out / "log.jsonl").read_text().splitlines()
    stages = {json.loads(line).get("stage") for line in lines}
    assert {"language", "vision", "joint"} <= stages
    command[command.index(str(out))] = str(tmp_path / "more")
    more = ["--resume", str(out), "--shares", "0,0,1", "--joint-rate", "0", "--rate", "0"]
    subprocess.run([*command, *more], check=True, cwd=root, timeout=300)
    for name in ("vision.safetensors", "adapter_model.safetensors"):
        first, second = (load_file(folder / name) for folder in (out, tmp_path / "more"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
