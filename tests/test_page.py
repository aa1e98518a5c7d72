"""The page at `/` in a real browser: an image, questions, layers, colours, keyboard and names."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgeprune.demo import SAMPLES_DIR
from tests.chromium import BROWSER, Page, page
from tests.server import NEXT, QUESTION, Server, asked, chat, refusal, running

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no chromium")

AXE = Path(__file__).resolve().parents[1] / "node_modules/axe-core/axe.min.js"
CONTROLS = {"button", "textbox", "combobox", "slider", "img", "image"}


@pytest.fixture(scope="module")
def server(demo_dense: Path, demo_fastv: Path) -> Iterator[Server]:
    with running(demo_dense, demo_fastv) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(browser: Page, server: Server) -> Page:
    """The page, loaded, with the dense bundle beside the pruned one."""
    browser.complaints.clear()
    browser.size(1280, 900)
    browser.go(f"{server.url}/")
    browser.wait("document.querySelector('#model')?.options.length === 2")
    return browser


def ask(tab: Page, question: str = "", answers: int = 2) -> list[str]:
    """Ask as a user does, by keyboard; all answers that are complete then."""
    tab.run("document.querySelector('#question').focus()")
    if question:
        tab.run("document.querySelector('#question').value = ''")
        tab.type(question)
    tab.press("Enter", 13)
    tab.wait(f"document.querySelectorAll('.times').length === {answers}")
    tab.wait("!document.querySelector('#layers').hidden")
    return list(tab.run("[...document.querySelectorAll('.said')].map((one) => one.textContent)"))


def pick_sample(tab: Page) -> None:
    tab.run("document.querySelector('#samples button').click()")
    tab.wait("document.querySelector('#figures img') && document.querySelector('#question').value")


def colours(tab: Page, figure: int) -> Any:
    """Pixels of a drawn image: [height, width, 3]."""
    script = f"document.querySelectorAll('#figures canvas')[{figure}].toDataURL()"
    uri = str(tab.run(script))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
    return np.asarray(image, np.int64)


def unnamed(tab: Page) -> list[Any]:
    """What a screen reader would meet without a name."""
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    found = [node for node in nodes if node.get("role", {}).get("value") in CONTROLS]
    assert len(found) > 5
    return [node["role"] for node in found if not node.get("name", {}).get("value")]


@needs_browser
def test_a_sample_is_asked_and_layers_are_shown(tab: Page, server: Server) -> None:
    pick_sample(tab)
    assert tab.run("document.querySelector('#question').value") == QUESTION
    assert ask(tab) == ["5", "5"]
    assert ask(tab, NEXT, answers=4)[3] == "3"
    assert tab.run("document.querySelectorAll('#figures canvas').length") == 2
    with httpx.Client(base_url=server.url, timeout=60) as client:
        wanted = chat(client, asked(QUESTION), details=True).json()["pruning"]
    tab.run("document.querySelector('#layer').focus()")
    whole = None
    for key, code, layer in (("Home", 36, 0), ("ArrowRight", 39, 1), ("End", 35, 12)):
        tab.press(key, code)
        told = tab.run("document.querySelector('#layer').getAttribute('aria-valuetext')")
        sites = [site for site in wanted["sites"] if site["layer"] <= layer]
        kept = sites[-1]["kept"] if sites else range(144)
        where = f"layer {layer} of 12" if layer else "input"
        assert told == f"{where}: {len(kept)} of 144 visual tokens"
        drawn = colours(tab, 0)
        whole = drawn if whole is None else whole
        patch = drawn.shape[0] // 12
        for index, (row, column) in enumerate(np.ndindex(12, 12)):
            at = patch * row + patch // 2, patch * column + patch // 2
            grey = 36 + 0.33 * (whole[at] @ np.array([0.299, 0.587, 0.114]))
            expected = whole[at] if index in kept else grey
            assert np.abs(drawn[at] - expected).max() <= 2, (layer, index)
    assert tab.complaints == []


@needs_browser
def test_a_file_and_a_camera_begin_anew(tab: Page, tmp_path: Path) -> None:
    pick_sample(tab)
    ask(tab)
    tab.choose_file("#file", SAMPLES_DIR / "scene-6.png")
    tab.wait("document.querySelectorAll('#turns li').length === 0")
    tab.wait("document.querySelector('#figures img')")
    assert tab.run("document.querySelector('#layers').hidden") is True
    text = tmp_path / "no-image.png"
    text.write_text("no image")
    tab.choose_file("#file", text)
    tab.wait("!document.querySelector('#notice').hidden")
    assert "no image that a browser reads" in tab.run("document.body.textContent")
    tab.run("document.querySelector('#question').value = ''")
    tab.run("document.querySelector('#question').focus()")
    tab.type("what " * 5000)
    tab.press("Enter", 13)
    tab.wait("document.querySelector('.failed')")
    assert "shorten the prompt" in tab.run("document.querySelector('.failed').textContent")
    tab.run("document.querySelector('#camera').click()")
    tab.wait("document.querySelector('#video').videoWidth")
    tab.run("document.querySelector('#take').click()")
    tab.wait("document.querySelector('#figures img')?.src.startsWith('data:image/png')")
    tab.wait("document.querySelector('#video').srcObject === null")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_everything_has_a_name(tab: Page, dark: bool) -> None:
    tab.size(360, 740, dark=dark, phone=True)
    pick_sample(tab)
    ask(tab)
    assert tab.run("document.documentElement.scrollWidth") <= 360
    ground = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split(",")[1]) < 60) == dark
    assert unnamed(tab) == []
    assert tab.run("document.documentElement.lang") == "en"
    reached = []
    for _ in range(12):
        tab.press("Tab", 9)
        reached.append(tab.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"model", "beside", "layer", "file", "camera", "question", "ask"} <= {*reached}
    assert tab.complaints == []


@needs_browser
@pytest.mark.skipif(not AXE.is_file(), reason="npm install --no-save axe-core")
def test_axe_finds_nothing(tab: Page) -> None:
    for dark in (False, True):
        tab.size(1280, 900, dark=dark)
        pick_sample(tab)
        ask(tab)
        tab.run(AXE.read_text(encoding="utf-8") + "; true")
        found = tab.run("axe.run().then((done) => JSON.stringify(done.violations))")
        assert json.loads(found) == []


def test_the_page_asks_for_a_key_and_takes_nothing_from_elsewhere(demo_fastv: Path) -> None:
    with (
        running(demo_fastv, "--api-key", "secret") as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        shown = client.get("/")
        policy = shown.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy and "http" not in policy
        for name in ("page.js", "page.css", "icon.svg", "scene-1.png"):
            found = client.get(f"/page/{name}")
            assert found.status_code == 200 and found.headers["x-content-type-options"] == "nosniff"
            assert f"/page/{name}" in shown.text or name == "scene-1.png"
        static = Path(__file__).resolve().parents[1] / "edgeprune/serve/static"
        for file in static.iterdir():
            told = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http:" not in told and "https:" not in told, file.name
        for name in ("nosuch", "..%2Fpage.py", "__init__.py"):
            assert client.get(f"/page/{name}").status_code == 404
        refusal(client.get("/v1/models"), 401)


def test_details_tell_times_and_what_is_left(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        whole = chat(client, asked(QUESTION), details=True).json()
        times, pruning = whole["timings"], whole["pruning"]
        assert times["prefill_ms"] > 0 and times["decode_tokens"] >= 1
        assert (pruning["grid"], pruning["visual_tokens"]) == ([12, 12], 144)
        for site in pruning["sites"]:
            assert len(site["kept"]) == pruning["layers"][site["layer"] - 1]
            assert site["kept"] == sorted(set(site["kept"])) and max(site["kept"]) < 144
        assert pruning["image"].startswith("data:image/png;base64,")
        assert "timings" not in chat(client, asked(QUESTION)).json()
        assert "true or false" in refusal(chat(client, asked(QUESTION), details=1), 400)
