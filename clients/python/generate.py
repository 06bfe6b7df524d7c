"""Makes a song and writes it as it comes, to a file or to a player; after a lost connection it goes on where it was."""

import argparse
import os
import sys
import time
from functools import partial
from typing import Any, BinaryIO

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from soundstage.music.v1 import song_service_pb2 as music
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.audio_pb2 import ENCODING_PCM, ENCODING_WAV, AudioChunk, Encoding

METADATA = (("authorization", f"Bearer {key}"),) if (key := os.environ.get("SOUNDSTAGE_KEY")) else ()
say = partial(print, file=sys.stderr, flush=True)


class Download:
    """A song on its way to a file, or to stdout if `output` is "-"."""

    def __init__(self, songs: SongServiceStub, output: str, encoding: Encoding.ValueType) -> None:
        self.songs, self.output, self.encoding = songs, output, encoding
        self.sink: BinaryIO | None = None
        self.song, self.next_frame, self.failures = "", 0, 0  # failures in a row, without a frame between them

    def run(self, request: music.GenerateSongRequest) -> int:
        events = self.songs.GenerateSong(request, metadata=METADATA)
        while True:
            try:
                for event in events:
                    self.take(event)
                return 0
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not self.song or self.failures == 4:
                    raise
            time.sleep(0.2 * 2**self.failures)
            self.failures += 1
            rest = music.StreamAudioRequest(song=self.song, first_frame=self.next_frame)
            rest.output.format.encoding = self.encoding
            if self.encoding == ENCODING_WAV and self.sink:
                rest.output.format.encoding = ENCODING_PCM  # the header has come
            elif self.encoding not in (ENCODING_WAV, ENCODING_PCM):
                if self.sink and self.output == "-":
                    raise OSError("the connection was lost, and on a pipe only PCM and WAV can go on after that")
                rest.first_frame, self.sink = 0, None  # other files must be of one piece
            say(f"the connection was lost; going on at frame {rest.first_frame}")
            events = self.songs.StreamAudio(rest, metadata=METADATA)

    def take(self, event: Any) -> None:  # of GenerateSong or StreamAudio: their audio events have the same names
        match event.WhichOneof("event"):
            case "accepted":
                self.song = event.accepted.song
                say(f"{self.song}, seed {event.accepted.seeds[0]}")
            case "plan":
                say(f"plan: {event.plan.metadata.bpm} bpm, {event.plan.metadata.key_scale}")
            case "progress":
                say(f"{music.Stage.Name(event.progress.stage)} {event.progress.done}/{event.progress.total}")
            case "audio_chunk":
                self.write(event.audio_chunk)
            case kind:
                say(kind)

    def write(self, chunk: AudioChunk) -> None:
        if not self.sink:  # opened only now: a refused request leaves no empty file behind
            self.sink = open(1 if self.output == "-" else self.output, "wb")  # noqa: PTH123, SIM115
        self.sink.write(chunk.data)
        self.sink.flush()
        end = chunk.first_frame + chunk.frame_count
        if end > self.next_frame:
            self.next_frame, self.failures = end, 0
            say(f"audio up to frame {end}")


def explain(error: Any) -> None:
    """Print a call's status, and its google.rpc details on lines of their own."""
    say(f"{error.code().name}: {error.details()}")
    for packed in getattr(rpc_status.from_call(error), "details", ()):
        for detail in (info := ErrorInfo(), bad_request := BadRequest(), retry := RetryInfo()):
            packed.Unpack(detail)
        if info.reason:
            say(f"  reason: {info.reason}")
        for violation in bad_request.field_violations:
            say(f"  {violation.field}: {violation.description}")
        if retry.HasField("retry_delay"):
            say(f"  try again in {retry.retry_delay.ToMilliseconds() / 1000:g} s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a song and write it as it comes.")
    parser.add_argument("--caption", default="")
    parser.add_argument("--duration", type=float, default=10, help="in seconds")
    parser.add_argument("--seed", type=int, action="append", help="drawn by the server when absent")
    names = [name.removeprefix("ENCODING_") for name in Encoding.keys()[1:]]
    parser.add_argument("--encoding", default="PCM", choices=names)
    parser.add_argument("--output", default="song.pcm", help='a file, or "-" for stdout')
    parser.add_argument("--address", default="127.0.0.1:50050")
    options = parser.parse_args()
    request = music.GenerateSongRequest(caption=options.caption, seeds=options.seed, detach=True)
    request.metadata.duration_s = options.duration
    request.output.format.encoding = encoding = Encoding.Value(f"ENCODING_{options.encoding}")
    songs = SongServiceStub(grpc.insecure_channel(options.address))
    download = Download(songs, options.output, encoding)
    try:
        return download.run(request)
    except grpc.RpcError as error:
        explain(error)
    except (KeyboardInterrupt, OSError) as stop:
        # Detached, the song would be finished for nobody; exception() waits for an answer and raises nothing.
        request = music.CancelSongRequest(song=download.song)
        songs.CancelSong.future(request, timeout=5, metadata=METADATA).exception()
        say(f"cancelled: {str(stop) or 'Ctrl-C'}")
    return 1


sys.exit(main())
