"""The page in a real Chromium, before a real gateway and tiny models."""

import asyncio
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import soundfile
from numpy.typing import NDArray
from playwright.async_api import Browser, Page, Route, async_playwright, expect

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="module")]

SHORT = {
    "caption": "a bright tune",
    "metadata": {"duration_s": 4},
    "planner": {"enabled": False},
    "diffusion": {"steps": 2},
}
FADE_FRAMES = 48_000 // 20  # what a repaint may change beside its window, at most
TIMEOUT_MS = 60_000  # on a busy machine
expect.set_options(timeout=TIMEOUT_MS)
# What is on the canvas, apart from the scale and the line that stands for what is not decoded.
NUM_DRAWN = """() => {
  const canvas = document.querySelector("#waveform");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height * 0.4);
  return data.filter((value, index) => index % 4 === 3 && value).length;
}"""
UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button, a, [role=slider], progress")]
  .filter((node) => !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim()))
  .map((node) => node.outerHTML)"""
FAINT = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    const color = node ? getComputedStyle(node).backgroundColor : "rgb(255, 255, 255)";
    return channels(color)[3] === 0 ? ground(node.parentElement) : color;
  };
  return [...document.querySelectorAll("body *:not(option)")]
    .filter((node) => node.checkVisibility() && !node.matches(":disabled, :not([href]).button"))
    .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .map((node) => [light(getComputedStyle(node).color), light(ground(node)), node])
    .map(([a, b, node]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 80)])
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    """The URL of a gateway before three stages."""
    up = ["soundstage_cli.app", "up", "--models", str(models / "original"), "--port", "0"]
    with run(up, until="soundstage is ready at") as url:
        yield url


@contextmanager
def run(arguments: list[str], *, until: str) -> Generator[str]:
    """Run a process with a gateway in it until it says that it is ready; yield the gateway's URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"SOUNDSTAGE_GATEWAY_HTTP_PORT": port}
    command = [sys.executable, "-m", *arguments]
    out, errors = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, text=True, env=environment, stdout=out, stderr=errors) as process:
        assert process.stdout is not None
        said: list[str] = []
        try:
            while not (said and until in said[-1]):
                said.append(process.stdout.readline())
                assert said[-1], "".join(said)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)
    assert process.returncode == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium."""
    arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        yield chromium
        await chromium.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, address: str) -> AsyncIterator[Page]:
    """The page, just opened; an error in its own code fails the test."""
    errors: list[str] = []
    context = await browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB")
    page = await context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.on("pageerror", lambda error: errors.append(error.message))
    await page.goto(address)
    await expect(page.locator("#status")).to_have_text("Ready")
    yield page
    await context.close()
    assert errors == []


@pytest.fixture(scope="module")
def song(address: str) -> str:
    """The name of a song that is made."""
    name = ask("POST", f"{address}/v1/songs", SHORT)["song"]["name"]
    wait_until_made(address, name)
    return name


def wait_until_made(address: str, name: str) -> None:
    with urllib.request.urlopen(f"{address}/v1/{name}/events") as events:
        assert events.read().endswith(b"event: end\ndata: {}\n\n")


def ask(method: str, url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {} if data is None else {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)) as answer:
        return json.load(answer)


async def order(page: Page, *, duration_s: int, caption: str = "a bright tune", **more: str) -> None:
    """Fill in the form and send it; the planner, which is slow, is left out."""
    await page.fill("#caption", caption)
    await page.fill("#duration", str(duration_s))
    await page.click("summary >> text=Tempo")
    await page.check("#unplanned")
    for field, value in more.items():
        await page.fill(f"#{field}", value)
    await page.click("#make")


async def wait_until_decoded(page: Page) -> None:
    await expect(page.locator("#stages li", has_text="Sound")).to_contain_text("whole")


async def test_a_song_is_heard_and_drawn_before_it_is_decoded(page: Page) -> None:
    await order(page, duration_s=300, lyrics="[verse]\nla la la", steps="1")
    await page.wait_for_function("() => document.querySelector('#audio').currentTime > 0.3")
    share = await page.evaluate("document.querySelectorAll('#stages progress')[2].value")
    assert share < 1
    await page.wait_for_function(f"() => ({NUM_DRAWN})() > 50")
    await expect(page.locator("#about")).to_contain_text(re.compile(r"heard after \d+\.\d s"))
    await expect(page.locator("#words li[aria-current]")).to_have_count(1)
    heard_s = await page.evaluate("document.querySelector('#audio').currentTime")
    await page.wait_for_function(f"() => document.querySelector('#audio').currentTime > {heard_s + 0.5}")


async def test_the_plan_says_where_each_value_comes_from(page: Page) -> None:
    await page.fill("#caption", "a bright tune")
    await page.fill("#duration", "10")
    await page.click("summary >> text=Tempo")
    await page.fill("#bpm", "99")
    await page.select_option("#variants", "2")
    await page.click("#make")
    await wait_until_decoded(page)
    plan = page.locator("#plan dl")
    await expect(plan).to_contain_text(re.compile(r"Tempo\s*99 bpm\s*you"))
    await expect(plan).to_contain_text(re.compile(r"Key\s*\S+ (major|minor)\s*planner"))
    for stage in ("Plan", "Diffusion"):
        await expect(page.locator("#stages li", has_text=stage)).to_contain_text(re.compile(r"\d\.\d s"))
    first = await page.text_content("#about")
    await page.click("label[for=variant-1]")
    await wait_until_decoded(page)
    assert await page.text_content("#about") != first


async def test_a_whole_song_is_sought_by_click_and_by_key(page: Page, song: str) -> None:
    await open_song(page, song)
    box = await page.locator("#waveform").bounding_box()
    assert box is not None
    await page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + 20)
    await page.wait_for_function("() => Math.abs(document.querySelector('#audio').currentTime - 3) < 0.1")
    await page.keyboard.press("ArrowLeft")
    await page.wait_for_function("() => document.querySelector('#audio').currentTime < 0.1")
    await page.keyboard.press("Space")
    await page.wait_for_function("() => document.querySelector('#audio').currentTime > 0.3")
    await expect(page.locator("#screen")).to_have_attribute("aria-valuetext", re.compile("0:0[0-4] of 0:04"))


async def test_a_slider_is_moved_by_every_key_once_it_can_be(page: Page, song: str) -> None:
    await open_song(page, song)
    slider = page.locator("#screen")
    await expect(slider).to_have_attribute("aria-disabled", "false")
    await slider.focus()
    for key, time_s in (("PageUp", 4), ("PageDown", 0), ("ArrowUp", 4), ("ArrowDown", 0), ("End", 4), ("Home", 0)):
        await page.keyboard.press(key)
        await page.wait_for_function(f"() => Math.abs(document.querySelector('#audio').currentTime - {time_s}) < 0.1")
    assert await page.locator("#stage output, #stage [aria-live]").count() == 0  # the time is not read out as it runs


async def test_a_slider_says_that_a_stream_cannot_be_sought(page: Page) -> None:
    await order(page, duration_s=300, steps="1")
    await page.wait_for_function("() => document.querySelector('#audio').currentTime > 0.3")
    assert await page.evaluate("document.querySelectorAll('#stages progress')[2].value") < 1
    await expect(page.locator("#screen")).to_have_attribute("aria-disabled", "true")


async def test_the_address_leads_to_songs_and_back(page: Page, song: str, address: str) -> None:
    other = ask("POST", f"{address}/v1/songs", {**SHORT, "caption": "the other one"})["song"]["name"]
    await page.goto(f"{address}/?theme=x#{song}")
    await expect(page.locator("#title")).to_have_text("a bright tune")
    await page.evaluate(f"location.hash = '{other}'")  # as a pasted address does
    await expect(page.locator("#title")).to_have_text("the other one")
    await page.go_back()
    await expect(page.locator("#title")).to_have_text("a bright tune")
    await page.click("#songs button.open:has-text('the other one')")
    await expect(page.locator("#title")).to_have_text("the other one")
    assert page.url == f"{address}/?theme=x#{other}"
    await page.go_back()
    await expect(page.locator("#title")).to_have_text("a bright tune")
    page.on("dialog", lambda dialog: dialog.accept())
    await page.click("[aria-label='Delete the other one']")
    await expect(page.locator("#songs li", has_text="the other one")).to_have_count(0)
    assert page.url == f"{address}/?theme=x#{song}"


WAITS = '{"error": {"code": 14, "status": "UNAVAILABLE", "message": "waits", "retryAfterS": 0.2}}'


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (429, "application/json", WAITS),
        (503, "application/json", WAITS),
        (200, "text/event-stream", f"event: end\ndata: {WAITS}\n\n"),
        (200, "text/event-stream", "event: end\ndata: {}\n\n"),
    ],
)
async def test_a_song_whose_events_are_refused_is_watched_again(page: Page, status: int, kind: str, body: str) -> None:
    num_refused = 0

    async def refuse_twice(route: Route) -> None:
        nonlocal num_refused
        num_refused += 1
        if num_refused > 2:
            await route.continue_()
        else:
            await route.fulfill(status=status, content_type=kind, body=body)

    await page.route("**/events?*", refuse_twice)
    await order(page, duration_s=4, caption="not seen at first")
    await wait_until_decoded(page)
    await page.wait_for_function("() => document.querySelector('#audio').currentTime > 0.3")


async def test_a_stream_that_breaks_off_goes_on_where_it_was(page: Page, song: str, address: str) -> None:
    await open_song(page, song)
    async with cut_streams(address, after_bytes=20_000) as url:
        await page.goto(f"{url}#{song}")
        await wait_until_decoded(page)
        await page.click("#play")
        # 20 000 bytes are a second and a quarter.
        await page.wait_for_function("() => document.querySelector('#audio').currentTime > 2.5")
    assert await page.text_content("#song-error") == ""


async def test_a_press_just_as_the_stream_fails_is_heeded(page: Page, song: str, address: str) -> None:
    press = """document.addEventListener("error", () => document.querySelector("#play").click(), true)"""
    await page.add_init_script(press)
    async with cut_streams(address, after_bytes=100) as url:
        await page.goto(f"{url}#{song}")
        await page.wait_for_function("() => document.querySelector('#audio').currentTime > 1")
    assert await page.text_content("#song-error") == ""


@asynccontextmanager
async def cut_streams(address: str, *, after_bytes: int) -> AsyncGenerator[str]:
    """Yield the URL of a proxy that passes all on to a gateway, but cuts what is streamed to a player."""
    host, port = address.removeprefix("http://").split(":")
    writers: list[asyncio.StreamWriter] = []
    ends: list[asyncio.Event] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(end := asyncio.Event())
        gateway_reader, gateway_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, gateway_writer))
        left_bytes = math.inf

        async def pass_requests_on() -> None:
            nonlocal left_bytes
            while data := await reader.read(65_536):
                left_bytes = after_bytes if b"max_buffer_s" in data else left_bytes
                gateway_writer.write(data)
            gateway_writer.close()

        requests = asyncio.create_task(pass_requests_on())
        with suppress(ConnectionError):
            while left_bytes > 0 and (data := await gateway_reader.read(65_536)):
                data = data[: int(min(left_bytes, len(data)))]
                left_bytes -= len(data)
                writer.write(data)
                await writer.drain()
        writer.close()
        await asyncio.gather(requests, return_exceptions=True)
        end.set()

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    for writer in writers:
        writer.close()
    for end in ends:
        await end.wait()


async def open_song(page: Page, song: str) -> None:
    await page.goto(f"{page.url.partition('#')[0]}#{song}")
    await page.reload()
    await wait_until_decoded(page)


async def test_every_format_is_offered_for_download(page: Page, song: str) -> None:
    await open_song(page, song)
    for extension in ("wav", "flac", "mp3", "m4a", "ogg", "webm"):
        await page.select_option("#format", extension)
        async with page.expect_download() as download:
            await page.click("#download")
        file = await download.value
        assert file.suggested_filename.endswith(f".{extension}")
        assert (await file.path()).stat().st_size > 10_000


async def test_a_song_is_cancelled(page: Page) -> None:
    await page.fill("#caption", "far too long")
    await page.fill("#duration", "600")
    await page.click("#make")
    await expect(page.locator("#status")).to_have_text("Planning")
    await page.click("#cancel")
    await expect(page.locator("#about")).to_contain_text("cancelled")
    await expect(page.locator("#cancel")).to_be_hidden()
    await expect(page.locator("#songs li", has_text="far too long")).to_contain_text("cancelled")


async def test_a_part_that_is_dragged_over_is_made_anew(page: Page, song: str, address: str) -> None:
    await open_song(page, song)
    await drag(page, 0.25, 0.5)
    await page.fill("#repaint-caption", "a drum solo")
    await page.click("#repaint >> text=Repaint")
    await expect(page.locator("#title")).to_have_text("a drum solo")
    await wait_until_decoded(page)
    made = ask("GET", f"{address}/v1/{page.url.partition('#')[2]}")["song"]
    window = made["request"]["task"]["repaint"]
    assert made["request"]["source"] == f"{song}/variants/0"
    assert (window["startS"], window["endS"]) == (pytest.approx(1, abs=0.1), pytest.approx(2, abs=0.1))
    assert int(made["variants"][0]["frameCount"]) == 4 * 48_000
    before, after = (sound(f"{address}/v1/{name}") for name in (song, made["name"]))
    start, end = (round(float(window[key]) * 48_000) for key in ("startS", "endS"))
    assert np.array_equal(before[: start - FADE_FRAMES], after[: start - FADE_FRAMES])
    assert np.array_equal(before[end + FADE_FRAMES :], after[end + FADE_FRAMES :])
    assert np.abs(before[start:end] - after[start:end]).max() > 0.001


def sound(url: str) -> NDArray[np.float32]:
    """All samples of a song, [frames, 2]."""
    with urllib.request.urlopen(f"{url}/audio.wav?sample_format=f32") as answer:
        return soundfile.read(io.BytesIO(answer.read()))[0].astype(np.float32)


async def drag(page: Page, start: float, end: float) -> None:
    """Drag over the waveform between two shares of its width."""
    box = await page.locator("#waveform").bounding_box()
    assert box is not None
    await page.mouse.move(box["x"] + box["width"] * start, box["y"] + 50)
    await page.mouse.down()
    await page.mouse.move(box["x"] + box["width"] * end, box["y"] + 60, steps=5)
    await page.mouse.up()


async def test_a_file_is_sent_and_covered(page: Page, tmp_path: Path) -> None:
    wav, text = tmp_path / "tune.wav", tmp_path / "text.wav"
    soundfile.write(wav, np.random.default_rng(0).uniform(-0.1, 0.1, 96_000), 48_000)
    text.write_text("no sound at all")
    await page.fill("#caption", "the same by a brass band")
    await page.select_option("#kind", "cover")
    await page.set_input_files("#upload", text)
    await expect(page.locator("#source")).to_have_attribute("aria-invalid", "true")
    assert await page.input_value("#upload") == ""  # else the same name, mended, would be no news
    await page.set_input_files("#upload", wav)
    await expect(page.locator("#source option:checked")).to_have_text("tune.wav, 0:02")
    await expect(page.locator("#source")).not_to_have_attribute("aria-invalid", "true")
    await page.click("#make")
    await wait_until_decoded(page)
    await expect(page.locator("#about")).to_contain_text("made from tune.wav")


async def test_a_refusal_marks_the_field_and_says_why(page: Page) -> None:
    await page.click("#make")
    await expect(page.locator("#caption")).to_have_attribute("aria-invalid", "true")
    await expect(page.locator("#caption")).to_be_focused()
    await expect(page.locator("#caption-error")).to_contain_text("say in one of them what to make")
    await expect(page.locator("#order-error")).to_contain_text("caption is empty")
    await page.fill("#caption", "a bright tune")
    await page.click("summary >> text=Tempo")
    await page.fill("#bpm", "5")
    await page.click("summary >> text=Tempo")
    await page.click("#make")
    await expect(page.locator("#bpm-error")).to_have_text("is 5; must be 30 to 300")
    await expect(page.locator("#bpm")).to_be_focused()
    await expect(page.locator("#caption")).not_to_have_attribute("aria-invalid", "true")
    await page.fill("#bpm", "fast")
    await page.click("#make")
    await expect(page.locator("#bpm-error")).to_have_text("is “fast”; must be a number")


async def test_an_error_of_the_servers_own_is_told_with_its_id(page: Page) -> None:
    body = json.dumps({"error": {"code": 13, "message": "an internal error", "requestId": "a1b2"}})
    await page.route("**/v1/songs", lambda route: route.fulfill(status=500, body=body))
    await page.fill("#caption", "a bright tune")
    await page.click("#make")
    await expect(page.locator("#order-error")).to_have_text("an internal error (a1b2)")


async def test_a_server_that_is_gone_costs_no_words(page: Page) -> None:
    await page.fill("#caption", "a bright tune")
    await page.context.set_offline(True)
    await page.click("#make")
    await expect(page.locator("#order-error")).to_contain_text("does not answer")
    assert await page.input_value("#caption") == "a bright tune"
    await page.context.set_offline(False)
    await page.fill("#duration", "2")
    await page.click("#make")
    await wait_until_decoded(page)
    await expect(page.locator("#order-error")).to_be_empty()


async def test_songs_outlive_a_reload_until_they_are_deleted(page: Page) -> None:
    await order(page, duration_s=2, caption="one to forget")
    await wait_until_decoded(page)
    await page.reload()
    await expect(page.locator("#title")).to_have_text("one to forget")
    page.on("dialog", lambda dialog: dialog.accept())
    await page.click("[aria-label='Delete one to forget']")
    await expect(page.locator("#songs li", has_text="one to forget")).to_have_count(0)
    await expect(page.locator("#title")).to_have_text("Nothing is playing")


async def test_a_key_is_asked_for_and_kept(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n")
    gateway = ["soundstage_gateway", "--port", "0", "--keys-file", str(tmp_path / "keys")]
    with run(gateway, until=" ready") as url:
        page = await browser.new_page()
        await page.goto(url)
        for key in ("wrong", "right"):
            await page.fill("#key-text", key)
            await page.keyboard.press("Enter")
        await expect(page.locator("#key")).to_be_hidden()
        await page.reload()
        await expect(page.locator("#status")).to_contain_text("does not answer")  # there are no stages
        await expect(page.locator("#key")).to_be_hidden()
        await page.close()


async def test_all_can_be_named_reached_and_read(page: Page, song: str) -> None:
    await open_song(page, song)
    await page.select_option("#kind", "repaint")
    await page.click("summary >> text=Tempo")
    await page.click("summary >> text=Make a part")
    assert await page.evaluate(UNNAMED) == []
    wanted = await page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, a, summary, [tabindex='0']")]
          .filter((node) => node.checkVisibility() && !node.disabled).map((node) => node.id || node.textContent)"""
    )
    await page.focus("#caption")
    reached = ["caption"]
    for _ in wanted[1:]:
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached == wanted
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        assert await page.evaluate(FAINT) == []


async def test_a_song_without_words_is_named_by_its_source_however_long(page: Page, address: str) -> None:
    source = ask("POST", f"{address}/v1/songs", {**SHORT, "caption": "x" * 200})["song"]["name"]
    wait_until_made(address, source)
    request = {"source": f"{source}/variants/0", "task": {"repaint": {"start_s": 2}}, **SHORT, "caption": ""}
    del request["metadata"]  # the song is as long as its source
    name = ask("POST", f"{address}/v1/songs", request)["song"]["name"]
    await page.set_viewport_size({"width": 390, "height": 800})
    await page.reload()
    await page.goto(f"{address}/#{name}")
    await expect(page.locator("#title")).to_have_text(f"From {'x' * 200}")
    await expect(page.locator("#about")).to_contain_text(f"made from {'x' * 200}")
    assert await page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.players
async def test_ffmpeg_plays_the_playlist_of_a_song_in_the_making(address: str) -> None:
    name = ask("POST", f"{address}/v1/songs", {**SHORT, "metadata": {"duration_s": 60}})["song"]["name"]
    command = "ffmpeg -nostdin -loglevel error -live_start_index 0 -f hls -i {url} -f s16le -ac 2 -ar 48000 -"
    command = command.format(url=f"{address}/v1/{name}/hls/index.m3u8")
    player = await asyncio.create_subprocess_exec(*command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    heard, told = await asyncio.wait_for(player.communicate(), 120)
    assert (player.returncode, told) == (0, b"")
    assert 0 <= len(heard) // 4 - 60 * 48_000 <= 2048  # the codec's delay, and its last block


@pytest.mark.parametrize("width", [1280, 390])
async def test_it_fits_its_window(page: Page, tmp_path: Path, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    await page.fill("#caption", "late-night jazz trio, brushed drums, a muted trumpet")
    await page.fill("#lyrics", LYRICS)
    await page.fill("#duration", "30")
    await page.click("summary >> text=Tempo")
    await page.check("#keep")
    await page.click("summary >> text=Tempo")
    await page.click("#make")
    await page.wait_for_function("() => document.querySelector('#audio').currentTime > 3")
    await drag(page, 0.55, 0.7)
    assert await page.evaluate("document.documentElement.scrollWidth") == width
    picture = os.environ.get("SOUNDSTAGE_PICTURE") if width == 1280 else None
    await page.screenshot(path=picture or tmp_path / "page.png")


LYRICS = """[verse]
The last train hums along the shore
And every window holds a light

[chorus]
Stay till the rain has had its say
Stay till the morning is in sight"""
