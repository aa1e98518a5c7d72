"""What a user may do wrongly with families, several images and videos, by the real command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from edgeprune.bundle import Bundle
from edgeprune.cli import main
from edgeprune.demo import SAMPLES_DIR
from edgeprune.errors import InputError
from edgeprune.models import elsewhere, names, nearby
from edgeprune.runtime.media import check_count
from tests import families
from tests.clips import clip
from tests.families import QUESTION
from tests.qwen import plain_checkpoint

SCENE = SAMPLES_DIR / "scene-1.png"
PROMPT = ["--prompt", QUESTION, "--max-new-tokens", "2"]


@pytest.mark.parametrize("other", elsewhere(), ids=lambda other: other.architecture)
def test_a_family_that_transformers_lacks_is_told_with_the_nearest(
    other: Any, tmp_path: Path, refused: Refused
) -> None:
    config = {"architectures": [other.architecture], "auto_map": {"AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refused("export", "--model", tmp_path)
    assert other.name in said
    assert said.endswith(f"the nearest family that edgeprune knows is {other.nearest}\n")


@pytest.mark.parametrize(("family", "near"), nearby(), ids=str)
def test_a_model_that_is_not_supported_is_told_with_the_nearest_and_what_is_missing(
    family: str, near: Any, tmp_path: Path, refused: Refused
) -> None:
    for kind in near.model_types:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        said = refused("models", "--model", tmp_path)
        assert f"is a {kind} ({near.name}), which is not supported; the nearest family" in said
        assert f"is {family}, and what is missing is: {near.missing}" in said
        assert near.missing.partition(":")[0] in ("tower", "projector", "decoder", "processor")


def test_weights_of_a_model_that_is_not_supported_are_not_fetched(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[Any]()

    def snapshot(model: str, **asked: Any) -> str:
        if asked.get("local_files_only"):
            raise LocalEntryNotFoundError("not there")
        fetched.append(asked["allow_patterns"])
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_moe"}')
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    said = refused("models", "--model", "Qwen/Qwen3.5-35B-A3B")
    wanted = "Qwen/Qwen3.5-35B-A3B is a qwen3_5_moe (Qwen3.5 with experts), which is not supported"
    assert wanted in said
    assert fetched == [["config.json", "params.json"]]


def test_parts_of_an_unknown_model_are_told_one_by_one(tmp_path: Path, refused: Refused) -> None:
    parts = {"vision_config": {"model_type": "siglip_vision_model"}, "text_config": {}}
    config = {"model_type": "new_vl", **parts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refused("models", "--model", tmp_path)
    tower, nearest = "; its tower, siglip_vision_model, is that of llava", "; the nearest family is"
    assert said.endswith(f"{tower}{nearest} llava\n")
    config["text_config"] = {"model_type": "mamba2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refused("models", "--model", tmp_path)
    assert said.endswith(f"{tower}; its decoder, mamba2, is not built here{nearest} llava\n")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, "pixtral, is that of mistral3; the nearest"),
        ({"vision_config": {"model_type": "qwen3_vl_vision"}}, "the nearest family is qwen3_vl"),
        ({"text_config": {"model_type": "gemma3_text"}}, "its decoder, gemma3_text, is that of ge"),
        (
            {
                "vision_config": {"model_type": "siglip_vision_model"},
                "text_config": {"model_type": "gemma3_text"},
            },
            "; its decoder, gemma3_text, is that of gemma3; the nearest family is gemma3",
        ),
        ({"auto_map": {"AutoModel": "code.Model"}}, "names code of its own (auto_map), which is"),
        ({"model_type": "qwen3"}, "; it is a language model and sees no images"),
        ({"model_type": ["llava"]}, "is a ['llava']; edgeprune knows"),
        ({"architectures": [["a"], 3]}, "is a new_vl; edgeprune knows"),
        ({"architectures": "LlavaQwen2ForCausalLM"}, "is a new_vl; edgeprune knows"),
    ],
    ids=str,
)
def test_an_unknown_model_is_told_what_is_known_of_it(
    config: dict[str, Any], says: str, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "new_vl", **config}))
    assert says in refused("models", "--model", tmp_path)


def test_a_family_that_nobody_asked_for_is_told_with_all_that_there_are(
    tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "blip_2"}')
    said = refused("export", "--model", tmp_path)
    assert f"is a blip_2; edgeprune knows: {', '.join(names())}" in said


def test_one_missing_shard_of_several(tmp_path: Path, refused: Refused) -> None:
    files = sorted(plain_checkpoint(tmp_path).glob("*.safetensors"))
    files[1].unlink()
    assert f"{files[1]} is missing; download" in refused("export", "--model", tmp_path)


def test_a_shard_that_the_machine_cannot_map(
    tiny_checkpoint: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of more bytes than memory, where the system promises no more than it has."""

    def deny(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 26703093968 bytes: Cannot allocate memory")

    monkeypatch.setattr("edgeprune.models._stored.safe_open", deny)
    said = refused("export", "--model", tiny_checkpoint)
    assert "Cannot allocate memory); split it into smaller shards" in said


PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
OTHER = "mlp.gate_proj.weight is [48, 32], config.json says [128, 32]; the two are not of one"


@pytest.mark.parametrize(
    ("make_one", "change", "says"),
    [
        (families.llava_next, {"rope_parameters": PARTIAL}, "rotates only a part of each head"),
        (families.llava_onevision, {"intermediate_size": 128}, OTHER),
        (families.internvl, {"intermediate_size": 128}, OTHER),
        (families.video_llava, {"intermediate_size": 128}, OTHER),
    ],
)
def test_a_config_that_cannot_be_met(
    make_one: Callable[[], families.Family],
    change: dict[str, Any],
    says: str,
    tmp_path: Path,
    refused: Refused,
) -> None:
    folder = make_one().save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    command = ["export", "--model", folder, "--method", "none", "--parity", "0"]
    assert says in refused(*command, "-o", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_for_a_video_takes_a_long_enough_one_only(
    tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    family, bundle = families.video_llava(num_hidden_layers=1), tmp_path / "bundle"
    folder = family.save(tmp_path / "tiny")
    options = ["--model", str(folder), "--method", "none", "--frames", "4", "--parity", "0"]
    assert main(["export", *options, "-o", str(bundle)]) == 0
    long, short = clip(tmp_path / "long.mkv", 6), clip(tmp_path / "short.mkv", 3)
    assert main(["run", str(bundle), "--video", str(long), *PROMPT, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out.splitlines()[-1])["turns"][0]["ids"]) == 2
    said = refused("run", bundle, "--video", short, *PROMPT)
    assert "short.mkv has 3 frames, this bundle takes 4; give a longer video, or export" in said
    assert "takes a video (--video)" in refused("run", bundle, "--image", SCENE, *PROMPT)


def test_more_images_than_a_bundle_has_places_for(
    tiny_bundle: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told before gigabytes of weights are read."""
    monkeypatch.setattr("edgeprune.runtime.session.Session.open", pytest.fail)
    said = refused("run", tiny_bundle, "--image", SCENE, "--image", SCENE, *PROMPT)
    assert "takes 1 image, got 2; give as many, or export with --num-images 2" in said
    record = Bundle.open(tiny_bundle).manifest.image
    with pytest.raises(InputError, match=r"got 0; give as many$"):
        check_count(0, record)


def test_a_image_that_is_too_long_and_narrow_for_tiles(tmp_path: Path, refused: Refused) -> None:
    family, bundle = families.llava_next(num_hidden_layers=1), tmp_path / "bundle"
    options = ["--model", str(family.save(tmp_path / "tiny")), "--method", "none", "--parity", "0"]
    assert main(["export", *options, "-o", str(bundle)]) == 0
    Image.new("RGB", (600, 20)).save(narrow := tmp_path / "narrow.png")
    said = refused("run", bundle, "--image", narrow, *PROMPT)
    assert "600 x 20 pixels is too long and narrow for this bundle" in said
    assert "cut it, or export with --image-size" in said


def test_images_of_several_tiles_calibrate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The published settings of InternVL say `crop_to_patches` false."""
    folder = families.internvl().save(tmp_path / "tiny")
    assert not json.loads((folder / "preprocessor_config.json").read_text())["crop_to_patches"]
    question = {"from": "human", "value": f"<image>{QUESTION}"}
    record = {"id": "1", "image": SCENE.name, "conversations": [question]}
    (tmp_path / "samples.json").write_text(json.dumps([record]))
    samples = ["--samples-file", tmp_path / "samples.json", "--image-dir", SCENE.parent]
    options = [*samples, "--samples", "1", "--image-size", "112x56", "--cr", "2"]
    command = ["calibrate", "--model", folder, *options, "-o", tmp_path / "schedule.json"]
    assert main([str(part) for part in command]) == 0
    counts = [int(count) for count in capfd.readouterr().out.split()]
    assert len(counts) == 3 and counts[0] <= 12, "three views of 4 tokens"


def test_an_image_processor_that_transformers_has_no_more(tmp_path: Path, refused: Refused) -> None:
    """One short line; a bundle for a video does not need it."""
    folder = families.llava_next_video(num_hidden_layers=1).save(tmp_path / "tiny")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor_type"] = "LlavaNextVideoImageProcessor"
    file.write_text(json.dumps(settings))
    said = refused("export", "--model", folder, "--method", "none", "-o", tmp_path / "bundle")
    assert f"{file} names the image processor LlavaNextVideoImageProcessor, which tran" in said
    assert "take image_processor_type out of the file" in said and len(said) < 400
    assert refused("models", "--model", folder) == said
    assert main(["models", "--model", str(folder), "--frames", "2"]) == 0
