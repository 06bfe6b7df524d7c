"""Chromium begins with a song that is still being decoded, and plays it to its end."""

import asyncio

import pytest
from playwright.async_api import async_playwright

from .conftest import Deploy
from .test_players import SONG_S, Held, begin_song

pytestmark = pytest.mark.browser

BEGIN = """(url) => {
  window.audio = new Audio(url);
  audio.volume = 0;
  audio.playbackRate = 4;
  return audio.play();
}"""
END = """() => audio.error
  ? { error: audio.error.message }
  : audio.ended && { start: audio.played.start(0), end: audio.played.end(0), parts: audio.played.length,
                     duration: audio.duration }"""


# FLAC alone waits: Chromium plays no FLAC before it has all of it.
@pytest.mark.parametrize("extension", ["wav", "mp3", "ogg", "webm", "m4a", "flac"])
async def test_chromium_begins_before_a_song_is_decoded_and_plays_it_to_its_end(deploy: Deploy, extension: str) -> None:
    held = Held("vae")
    arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
    async with deploy(held) as deployment, async_playwright() as playwright, asyncio.timeout(90):
        song = await begin_song(deployment)
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        page = await browser.new_page()
        await page.goto(f"{deployment.http}/static/icon.svg")
        if extension == "flac":
            held.may_go_on.set()
        await page.evaluate(BEGIN, f"{deployment.http}/v1/{song}/audio.{extension}")
        await page.wait_for_function("audio.error || audio.currentTime > 1", timeout=60_000)
        async with deployment.studio.tape(song, 0) as tape:
            is_whole = tape.is_whole
        held.may_go_on.set()
        heard = await (await page.wait_for_function(END, timeout=60_000)).json_value()
        await browser.close()
    assert is_whole == (extension == "flac")
    assert heard["parts"] == 1
    assert heard["start"] == 0
    assert heard["end"] == heard["duration"] == pytest.approx(SONG_S, abs=0.05)
