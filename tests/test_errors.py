"""What a user may ask wrongly: methods, ratios, options, models. One line and exit code 2 each."""

from __future__ import annotations

import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Refused
from safetensors.torch import load_file, save_file

from edgeprune.cli import main

SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"

REQUESTS = [
    (["--method", "nosuch"], "no method 'nosuch'; choose one of: cdpruner, dart, divprune"),
    (["--cr", "0.5"], "a number of at least 1; got 0.5"),
    (["--cr", "nan"], "a number of at least 1; got nan"),
    (["--cr", "inf"], "a number of at least 1; got inf"),
    (
        ["--cr", "four"],
        "argument --cr: a number, or numbers with commas between, such as 2,4,8; got 'four'",
    ),
    (["--method", "uniform", "--cr", "17"], "this model has 16, so --cr is at most 16"),
    (["--cr", "1e9"], "this model has 16, so --cr is at most 16"),
    (["--method", "none", "--cr", "4"], "--method none prunes nothing; leave out --cr"),
    (["--set", "color=red"], "method utp has no option 'color'; it has: agnostic_layers"),
    (["--set", "agnostic_layers=many"], "option agnostic_layers takes a int; got 'many'"),
    (["--set", "agnostic_layers"], "--set takes NAME=VALUE; got 'agnostic_layers'"),
    (["--set", "utr=1", "--set", "utr=2"], "--set gives utr twice; give it once"),
    (["--target", "tpu"], "no target 'tpu'; choose one of: cpu, cuda, rtx, jetpack7, jetpack6"),
    (["--dtype", "int8"], "--dtype is one of fp32, fp16, bf16; got 'int8'"),
    (["--dtype", ""], "--dtype is one of fp32, fp16, bf16; got ''"),
    (["--solver", "guess"], "argument --solver: invalid choice: 'guess'"),
    (["--parity", "-1"], "--parity is a number of samples, 0 for none; got -1"),
    (["--max-sites", "0"], "--max-sites is at least 1 and needs --solver joint; got 0 with joint"),
    (["--max-sites", "3", "--solver", "paper"], "needs --solver joint; got 3 with paper"),
    (["--samples", "0"], "--samples is at least 1; got 0"),
    (["--method", "uniform", "--schedule", "s.json"], "follows no schedule; leave out --schedule"),
    (["--schedule", "nosuch.json"], "nosuch.json cannot be read"),
    (["--samples-file", "nosuch.json"], "nosuch.json cannot be read"),
    ([], "give --samples-file FILE (LLaVA-Instruct JSON) and --image-dir DIR"),
]


@pytest.mark.parametrize(("options", "says"), REQUESTS, ids=[" ".join(o) for o, _ in REQUESTS])
def test_a_request_that_cannot_be_met(
    options: list[str], says: str, tiny_checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    line = refused("export", "--model", tiny_checkpoint, "-o", tmp_path / "bundle", *options)
    assert says in line
    assert not any(tmp_path.iterdir()), "nothing half-written"


def test_commands_and_options_that_do_not_exist(refused: Refused) -> None:
    assert "invalid choice: 'exprot'" in refused("exprot")
    assert "edgeprune --help" in refused()
    assert "unrecognized arguments: --colour" in refused("methods", "--colour")
    assert "required: --prompt" in refused("run", "bundle")
    assert "--image" in refused("run", "bundle", "--prompt", "what ?")


def test_a_schedule_that_is_damaged_or_of_another_model(
    tiny_checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    file, output = tmp_path / "schedule.json", tmp_path / "bundle"
    other = {
        "schema": 1, "counts": [100, 44], "objective": 0.0, "bound": 0.0, "solver": "joint",
        "visual_tokens": 144, "cr": 2.0, "sample_ids": [], "evidence_hash": "", "versions": {},
        "seconds": 0.0,
    }  # fmt: skip
    lacking = {name: value for name, value in other.items() if name != "counts"}
    for content, says in (
        ("{", "not a schedule, nor any JSON"),
        ("[]", "names no schema"),
        (json.dumps(lacking), "lacks 'counts'"),
        (json.dumps({**other, "schema": 9}), "has schema 9"),
        (json.dumps({**other, "counts": [1, 2]}), "counts never rise"),
        (json.dumps(other), "144"),
    ):
        file.write_text(content)
        line = refused(
            "export", "--model", tiny_checkpoint, "--cr", 2, "--schedule", file, "-o", output
        )
        assert str(file) in line and says in line
    assert not output.exists()


def test_calibrate_refuses_before_it_measures(
    tiny_checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "file").touch()
    model = ["calibrate", "--model", tiny_checkpoint]
    assert "at most 16" in refused(*model, "--cr", 20, "-o", tmp_path / "schedule.json")
    assert "need no calibration" in refused(*model, "--method", "uniform", "-o", tmp_path / "s")
    assert "is a folder; name a file in it" in refused(*model, "-o", tmp_path)
    assert "cannot be written (" in refused(*model, "-o", tmp_path / "file" / "schedule.json")


def test_a_traceback_is_shown_on_demand(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPRUNE_DEBUG", "1")
    assert main(["export", "--method", "nosuch"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("Traceback") and "\nedgeprune: there is no method 'nosuch'" in err


def _config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            value = {**config[name], **value}
        config[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _without(folder: Path, tensor: str) -> None:
    weights = load_file(folder / SHARD)
    index = json.loads((folder / INDEX).read_text())
    del weights[tensor], index["weight_map"][tensor]
    save_file(weights, folder / SHARD)
    (folder / INDEX).write_text(json.dumps(index))


def _name_another(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["language_model.another"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


def _template_without_image(folder: Path) -> None:
    template = "{% for message in messages %}USER: hello {% endfor %}ASSISTANT:"
    (folder / "chat_template.jinja").write_text(template)


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["want a folder with config.json"]),
    "config cut": (lambda f: _cut(f / "config.json"), ["config.json cannot be read"]),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), ["is not a JSON object"]),
    "other family": (lambda f: _config(f, model_type="bert"), ["is a bert", "knows: ", "llava"]),
    "no family": (lambda f: _config(f, model_type=None), ["without model_type"]),
    "wrong type": (lambda f: _config(f, text_config={"hidden_size": "big"}), ["config.json"]),
    "other strategy": (
        lambda f: _config(f, vision_feature_select_strategy="last"),
        ["config.json", "vision_feature_select_strategy"],
    ),
    "weights cut": (lambda f: _cut(f / SHARD), [SHARD, "not a whole safetensors file"]),
    "weights empty": (lambda f: (f / SHARD).write_bytes(b""), [SHARD, "download it again"]),
    "shard missing": (lambda f: (f / SHARD).unlink(), [SHARD, "is missing"]),
    "index cut": (lambda f: _cut(f / INDEX), [INDEX, "cannot be read"]),
    "index empty": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "maps no tensors"]),
    "tensor not in shard": (_name_another, [SHARD, "is damaged at language_model.another"]),
    "no safetensors": (
        lambda f: [(f / INDEX).unlink(), (f / SHARD).rename(f / "pytorch_model.bin")],
        ["only safetensors are read"],
    ),
    "wrong shape": (
        lambda f: _config(f, text_config={"intermediate_size": 128}),
        ["mlp.gate_proj.weight is [96, 64], config.json says [128, 64]"],
    ),
    "vast sizes": (
        lambda f: _config(f, text_config={"vocab_size": 1 << 62}),
        ["config.json describes no model that can be built"],
    ),
    "vast token": (
        lambda f: _config(f, image_token_index=1 << 63, image_token_id=1 << 63),
        ["does not read the configuration's image token 9223372036854775808"],
    ),
    "tensor missing": (
        lambda f: _without(f, "language_model.lm_head.weight"),
        ["has no tensor lm_head.weight"],
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no usable processor"]),
    "tokenizer cut": (lambda f: _cut(f / "tokenizer.json"), ["no usable processor"]),
    "no processor": (
        lambda f: (f / "processor_config.json").unlink(),
        ["says nothing of its image processor"],
    ),
    "no image slot": (_template_without_image, ["the chat template does not show one <image>"]),
}


@pytest.mark.parametrize(("damage", "says"), MODELS.values(), ids=MODELS.keys())
def test_a_checkpoint_that_cannot_be_used(
    damage: Callable[[Path], object],
    says: list[str],
    copy_checkpoint: Callable[[], Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    damage(folder := copy_checkpoint())
    output = tmp_path / "bundle"
    line = refused("export", "--model", folder, "--method", "none", "-o", output, "--parity", 0)
    assert all(words in line for words in says), line
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"], "nothing half-written"


def test_models_that_are_no_folder(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("weights")
    for model in ("nosuch", tmp_path / "nosuch", tmp_path / "file", tmp_path, ""):
        line = refused("export", "--method", "none", "--model", model)
        assert "is no checkpoint: want a folder with config.json, or a hub id" in line
    assert "neither a folder nor a hub id" in refused("export", "--model", "a name/with spaces")


@pytest.fixture
def dead_hub() -> Iterator[tuple[str, list[bytes]]]:
    """A hub that hangs up on everybody, and the requests it got."""
    calls: list[bytes] = []

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            calls.append(self.request.recv(1000))

    with socketserver.TCPServer(("127.0.0.1", 0), HangUp) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
        server.shutdown()


def test_no_network_is_told_at_once(dead_hub: tuple[str, list[bytes]], tmp_path: Path) -> None:
    address, calls = dead_hub
    command = [sys.executable, "-m", "edgeprune.cli", "export", "--model", "nobody/nothing"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "bundle")],
        env={**os.environ, "HF_ENDPOINT": address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("edgeprune: nobody/nothing is not in the local cache and the hub")
    assert done.stderr.count("\n") == 1
    assert sum(b"nobody/nothing" in call for call in calls) == 1, "at once, not after retries"
