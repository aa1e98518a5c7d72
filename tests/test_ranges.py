"""Half precision ends at 65,504: what does not fit is found, and refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeprune import policies
from edgeprune.bundle import Bundle
from edgeprune.calib.schedule import Schedule
from edgeprune.cli import main
from edgeprune.errors import ExportError, ModelError
from edgeprune.export import ranges
from edgeprune.measured import RangeRecord
from edgeprune.models import open_model
from edgeprune.models._processor import Prompt, random_prompt
from edgeprune.models._reference import Reference
from edgeprune.models._rounding import rounded
from edgeprune.policies import make
from edgeprune.runtime.engine import Engine
from edgeprune.spec import PruneSpec
from tests import families
from tests.conftest import Refused
from tests.overflows import LLAVA, Tensors, edited

TOKENS = 64  # of an answer
SMALL = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")
Tree = dict[str, Path]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tiny llava, and copies of it with one overflow each."""
    folder = tmp_path_factory.mktemp("planted")
    clean = families.llava().save(folder / "clean")
    copies = {name: folder / re.sub(r"\W+", "-", name) for name in LLAVA}
    return {"clean": clean} | {n: edited(clean, to, LLAVA[n]) for n, to in copies.items()}


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e5, torch.float16, "holds 1e+05, fp16 ends at 65,504; take --dtype bf16 or"),
        (-65520.0, torch.float16, "holds 6.552e+04, fp16 ends at 65,504"),
        (3.4e38, torch.bfloat16, "bf16 ends at 3.38953e+38; take --dtype fp32"),
        (float("nan"), torch.float32, "holds 2 of 6 numbers that are infinite or not a number"),
        (float("-inf"), torch.float16, "holds 2 of 6 numbers that are infinite or not a number"),
    ],
)
def test_a_number_that_does_not_fit_is_refused(value: float, dtype: torch.dtype, says: str) -> None:
    tensor = torch.tensor([[0.0, value, 1.0], [1e-9, 2.0, value]])
    with pytest.raises(ModelError) as caught:
        rounded(tensor, dtype, "model.safetensors: some.weight")
    assert str(caught.value).startswith("model.safetensors: some.weight holds")
    assert says in str(caught.value)


def test_numbers_that_fit_are_rounded() -> None:
    tensor = torch.tensor([65504.0, -65504.0, 65519.0, 1e-9, 1 / 3])
    assert torch.equal(rounded(tensor, torch.float16, ""), tensor.half())
    assert torch.equal(rounded(tensor.bfloat16(), torch.float32, ""), tensor.bfloat16().float())
    assert rounded(torch.empty(0, 3), torch.float16, "").shape == (0, 3)


def test_an_export_names_the_tensor_that_does_not_fit(
    planted: Tree, tmp_path: Path, refused: Refused
) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"

    def large(tensors: Tensors) -> None:
        tensors[name][3, 4] = 1e5

    model = edited(planted["clean"], tmp_path / "model", large)
    options = ["--model", model, "--method", "none", "--parity", 1, "-o", tmp_path / "bundle"]
    line = refused("export", *options, "--target", "cuda")
    assert f"model.safetensors: {name} holds 1e+05, fp16 ends at 65,504" in line
    assert not (tmp_path / "bundle").exists()


def proven(
    model: Path, keep: str, method: str = "none", cr: float = 1
) -> tuple[RangeRecord, tuple[str, ...]]:
    """What the range proof says of a checkpoint on three samples."""
    adapter, spec = open_model(str(model)), PruneSpec(method, cr)
    policy = make(spec)
    plan = policy.plan(adapter.shape, spec.cr)
    vocabulary = adapter.shape.vocabulary
    prompts = [random_prompt(adapter.pixels, vocabulary, seed) for seed in range(3)]
    proof = ranges.prove(adapter, policy, plan, prompts, keep)
    return proof.record, proof.notes


@pytest.mark.parametrize("name", LLAVA)
def test_what_passes_the_limit_first_is_named_and_can_stay_in_float32(
    name: str, planted: Tree
) -> None:
    overflow = LLAVA[name]
    with pytest.raises(ExportError, match=r"of 3.*export with --keep-fp32 auto") as caught:
        proven(planted[name], "none")
    assert str(caught.value).startswith(f"fp16 ends at 65,504, {overflow.named} reaches ")
    record, notes = proven(planted[name], "auto")
    assert notes == ()
    kept = set(record.float32)
    streams = [path for path in record.float32 if path.endswith(".residual")]
    assert overflow.kept <= kept
    assert streams[:1] == ([overflow.stream] if overflow.stream else [])
    assert record.samples == 3 and 1 <= record.sample <= 3
    assert record.peak < record.limit / ranges.SAFETY
    assert record.margin == record.limit / record.peak


def test_a_model_that_fits_keeps_nothing_in_float32(planted: Tree) -> None:
    plain, auto = proven(planted["clean"], "none"), proven(planted["clean"], "auto")
    assert plain == auto
    record, notes = plain
    assert (record.float32, notes) == ((), ())
    assert record.where == "vision input (add)"  # patches and their positions
    assert 5 < record.peak < 50


def test_what_cannot_stay_in_float32_is_refused_by_name(planted: Tree, tmp_path: Path) -> None:
    """A cache holds keys in float16, whatever computes them."""

    def large(tensors: Tensors) -> None:
        tensors["language_model.model.layers.2.self_attn.k_proj.weight"] *= 6e4

    model = edited(planted["clean"], tmp_path / "model", large)
    advice = "it cannot stay in float32: export with --dtype bf16 or --dtype fp32"
    for keep in ("none", "auto"):
        with pytest.raises(ExportError, match=r"decoder layers.2 attention.key reaches 2") as error:
            proven(model, keep)
        assert str(error.value).endswith(advice)


def test_numbers_near_the_limit_are_told(planted: Tree, tmp_path: Path) -> None:
    def near(tensors: Tensors) -> None:
        tensors["language_model.model.layers.1.mlp.down_proj.weight"][5] *= 2e4

    record, notes = proven(edited(planted["clean"], tmp_path / "model", near), "none")
    assert 1 < record.margin < ranges.SAFETY
    (note,) = notes
    assert "decoder layers.1" in note and "--keep-fp32 auto leaves more room" in note


def test_a_norm_below_the_smallest_number_is_told(planted: Tree, tmp_path: Path) -> None:
    """The graphs compute norms in float32; that an engine must do so is said."""

    def small(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith("multi_modal_projector") or name.endswith(SMALL):
                tensors[name] *= 1e-5

    model = edited(planted["clean"], tmp_path / "model", small)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-30
    (model / "config.json").write_text(json.dumps(config))
    _, notes = proven(model, "none")
    (note,) = notes
    assert "decoder layers.0 attention_norm: a mean square is" in note


def test_the_command_refuses_by_name_and_keeps_parts_in_float32(
    planted: Tree, tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    command = ["export", "--model", str(planted["residual"]), "--method", "none"]
    command += ["--target", "cuda", "--parity", "2", "-o", str(folder)]
    line = refused(*command)
    assert line.startswith("edgeprune: fp16 ends at 65,504, decoder layers.1 mlp.down reaches ")
    assert not folder.exists()
    assert main([*command, "--keep-fp32", "auto"]) == 0
    told = capfd.readouterr().err
    assert "in float32: decoder layers.1 mlp.down, decoder layers.1 residual and after" in told
    record = Bundle.open(folder).manifest.range
    assert record is not None
    streams = ("decoder.layers.1.residual", "decoder.layers.2.residual")
    assert record.float32 == ("decoder.layers.1.mlp.down", *streams)
    assert_greedy(planted["residual"], folder, record.float32)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "rtx", "jetpack7", "jetpack6"])
@pytest.mark.parametrize("name", LLAVA)
def test_greedy_answers_are_those_of_float32(
    name: str, target: str, planted: Tree, tmp_path: Path
) -> None:
    folder, model = tmp_path / "bundle", planted[name]
    command = ["export", "--model", str(model), "--method", "none", "--target", target]
    assert main([*command, "--keep-fp32", "auto", "-o", str(folder)]) == 0
    record = Bundle.open(folder).manifest.range
    assert record is not None and record.float32
    assert_greedy(model, folder, record.float32)


def assert_greedy(model: Path, bundle: Path, wide: tuple[str, ...]) -> None:
    """64 greedy tokens of float32 are the bundle's too, at each step at which float32 is surer of
    its token than half precision is far from it; those are nine steps of ten at least."""
    adapter, policy = open_model(str(model)), make(PruneSpec("none", 1))
    plan = policy.plan(adapter.shape, 1)
    exact = Reference.build(adapter, policy, plan)
    half = Reference.build(adapter, policy, plan, torch.float16)
    half.widen(wide)
    prompt = random_prompt(adapter.pixels, adapter.shape.vocabulary, 7)
    wanted = [exact.prefill(prompt).logits]
    while len(wanted) < TOKENS:
        wanted.append(exact.step(wanted[-1].argmax()[None, None]).logits)
    tokens = [int(logits.argmax()) for logits in wanted]
    eager = [half.prefill(prompt).logits]
    eager += [half.step(torch.tensor([[token]])).logits for token in tokens[:-1]]
    far = [float((e - w).abs().max()) for e, w in zip(eager, wanted, strict=True)]
    best = [logits.topk(2).values for logits in wanted]
    sure = [float(b[0] - b[1]) > distance for b, distance in zip(best, far, strict=True)]
    print(f"float32 is sure of {sum(sure)} of {TOKENS} tokens, {max(far):.1e} apart at most")
    assert sum(sure) >= 0.9 * TOKENS
    found = forced(bundle, prompt, tokens)
    assert [f for f, s in zip(found, sure, strict=True) if s] == [
        t for t, s in zip(tokens, sure, strict=True) if s
    ]


def forced(bundle: Path, prompt: Prompt, tokens: list[int]) -> list[int]:
    """What a bundle would say at each step of an answer that is given."""
    with Engine.open(bundle) as engine:
        sequence, image = engine.sequence(), engine.encode_pixels(prompt.pixels.numpy())
        found = [sequence.read(prompt.text_ids.numpy(), prompt.prefix_ids.numpy(), image)]
        found += [sequence.read(np.array([[token]])) for token in tokens[:-1]]
        return [output.token for output in found]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--target", "rtx", "--dtype", "bf16"], "is for fp16, this export is bf16; leave it out"),
        (["--target", "cpu"], "is for fp16, this export is fp32; leave it out"),
        (["--target", "cuda", "--parity", "0"], "left out by --parity 0; give --parity N"),
    ],
)
def test_an_option_that_can_do_nothing_is_refused(
    options: list[str], says: str, planted: Tree, tmp_path: Path, refused: Refused
) -> None:
    command = ["export", "--model", planted["clean"], "--method", "none", "--keep-fp32", "auto"]
    assert says in refused(*command, *options, "-o", tmp_path / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("method", policies.names())
def test_every_method_is_proven_and_runs_with_a_float32_stream(
    method: str, planted: Tree, tmp_path: Path
) -> None:
    """What a method computes is float32 anyway: nothing of it is near the limit."""
    cr = 1.0 if method == "none" else 1.4
    options = ["--model", str(planted["residual"]), "--method", method, "--cr", str(cr)]
    if method == "utp":
        options += ["--schedule", str(schedule(tmp_path / "schedule.json", (9, 5, 5), cr))]
    folder = tmp_path / "bundle"
    command = ["export", *options, "--target", "jetpack6", "--keep-fp32", "auto", "-o", str(folder)]
    assert main(command) == 0
    record = Bundle.open(folder).manifest.range
    assert record is not None
    assert "decoder.layers.2.residual" in record.float32


def schedule(file: Path, counts: tuple[int, ...], cr: float) -> Path:
    """A schedule that nothing was measured for."""
    made = Schedule(
        counts, 0.0, 0.0, "joint", visual_tokens=counts[0], cr=cr, sample_ids=(), evidence_hash="",
        versions={}, seconds=0.0,
    )  # fmt: skip
    file.write_text(made.to_json())
    return file
