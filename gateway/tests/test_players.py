"""Players begin with a song that is still being decoded, and play it to its end."""

import asyncio
import os
import tempfile
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pytest

from soundstage.music.v1.song_service_pb2 import CreateSongRequest, GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.score_pb2 import SongMetadata

from .conftest import Deploy, Deployment, Steady

pytestmark = pytest.mark.players

SONG_S: Final = 24
FRAMES: Final = SONG_S * 48_000
LONGEST_CODEC_FRAME: Final = 1152
DELAYS_FRAMES: Final = {"mp3": 1105, "m4a": 1024}  # what a live stream cannot tell players to leave out
LOST_FRAMES: Final = {"vlc": 3840}  # what VLC loses at the end when it writes a file, also of a file
NOBODY: Final = "setpriv --reuid=65534 --clear-groups " if os.geteuid() == 0 else ""  # VLC will not be run by root
COMMANDS: Final = {
    "ffmpeg": "ffmpeg -loglevel error -i {url} -f s16le -ar 48000 -ac 2 -flush_packets 1 -",
    "mpv": "mpv --no-config --no-terminal --no-video --ao=pcm --ao-pcm-waveheader=no --ao-pcm-file=/dev/stdout "
    "--audio-format=s16 --audio-samplerate=48000 --audio-channels=stereo {url}",
    "vlc": f"{NOBODY}cvlc --quiet --no-video {{url}} --sout "
    "#transcode{{acodec=s16l,channels=2,samplerate=48000}}:std{{access=file,mux=dummy,dst=-}} vlc://quit",
    "gstreamer": "gst-launch-1.0 -q souphttpsrc location={url} ! decodebin ! audioconvert ! audioresample ! "
    "audio/x-raw,format=S16LE,rate=48000,channels=2 ! fdsink",
}


@dataclass
class Held(Steady):
    """A codec that decodes half of a song, and the rest when it is let."""

    num_chunks: int = 0
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def between(self) -> None:
        self.num_chunks += 1
        if self.num_chunks >= SONG_S:  # of half a second each
            await self.may_go_on.wait()


async def begin_song(deployment: Deployment) -> str:
    """Begin a song whose samples are 7 steps of S16 in the first 40 ms, 8 in the next, and so on; return its name."""
    request = GenerateSongRequest(caption="a calm piano", metadata=SongMetadata(duration_s=SONG_S), seeds=[7])
    return (await SongServiceStub(deployment.channel).CreateSong(CreateSongRequest(request=request))).song.name


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "ogg", "webm", "m4a"])
@pytest.mark.parametrize("player", COMMANDS)
async def test_a_player_begins_before_a_song_is_decoded_and_plays_it_to_its_end(
    deploy: Deploy, player: str, extension: str
) -> None:
    held = Held("vae")
    async with deploy(held) as deployment:
        song = await begin_song(deployment)
        command = COMMANDS[player].format(url=f"{deployment.http}/v1/{song}/audio.{extension}").split(" ")
        with tempfile.TemporaryDirectory() as home:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                stdout=PIPE,
                env=os.environ | {"HOME": home},
            )
            assert process.stdout is not None
            try:
                async with asyncio.timeout(60):
                    heard = await process.stdout.readexactly(4)
                    async with deployment.studio.tape(song, 0) as tape:
                        assert not tape.is_whole
                    held.may_go_on.set()
                    heard += await process.stdout.read()
                    assert await process.wait() == 0
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    samples = np.frombuffer(heard, "<i2").reshape(-1, 2)
    expected_frames = FRAMES + DELAYS_FRAMES.get(extension, 0)
    assert -LOST_FRAMES.get(player, 0) <= len(samples) - expected_frames <= LONGEST_CODEC_FRAME
    if extension in ("wav", "flac"):
        assert np.array_equal(samples, np.arange(7 * 1920, 7 * 1920 + len(samples))[:, None] // 1920 * [1, 1])
