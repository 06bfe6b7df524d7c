"""Encoders: an output's samples become the bytes of its format, by one encoder for a stream."""

import struct
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final, Protocol, cast

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from numpy.typing import NDArray

from soundstage.type.v1.audio_pb2 import (
    ENCODING_FLAC,
    ENCODING_MP3,
    ENCODING_MP4_AAC,
    ENCODING_MP4_OPUS,
    ENCODING_OGG_OPUS,
    ENCODING_PCM,
    ENCODING_WAV,
    ENCODING_WEBM_OPUS,
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S24,
    AudioFormat,
)
from soundstage_runtime import pcm
from soundstage_runtime.score import CHANNELS

_UNKNOWN_SIZE: Final = 0xFFFFFFFF
_WAVE_INTEGER: Final = 1
_WAVE_FLOAT: Final = 3
_WAVE_EXTENSIBLE: Final = 0xFFFE
_WAVE_FAMILY: Final = bytes.fromhex("000000001000800000aa00389b71")  # of subformats named by the tags above
_SPEAKERS: Final = {1: 0b100, 2: 0b011}  # the one in the middle; left and right


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The next bytes of a stream, and how many more frames can be played with them, the encoder's delay left out."""

    data: bytes
    frame_count: int


class Encoder(Protocol):
    """Encodes a stream from its first frame to its last; one that is dropped on the way leaves nothing behind."""

    delay_frames: int
    """How many frames a decoder gives before the stream's first."""

    def encode(self, samples: NDArray[np.float32]) -> list[Piece]:
        """Encode the next samples [n, channels]; what a codec or container holds back comes with a later call."""
        ...

    def finish(self) -> list[Piece]:
        """Return what is left; nothing may follow."""
        ...


def open_encoder(audio_format: AudioFormat, *, frame_count: int = 0) -> Encoder:
    """Open an encoder of a complete format. `frame_count` is what FLAC says of its length; 0 if nobody knows it.

    Of stereo at 48 kHz one core writes PCM and WAV 10000 times as fast as it plays, FLAC 800, Opus 130, MP3 and AAC 40
    times: half a second of those takes 12 ms, in which other threads may run.
    """
    is_plain = audio_format.encoding in (ENCODING_PCM, ENCODING_WAV)
    return _PlainEncoder(audio_format) if is_plain else _CodecEncoder(audio_format, frame_count)


class _PlainEncoder:
    """Writes samples as they are; WAV has a header before them."""

    delay_frames = 0

    def __init__(self, audio_format: AudioFormat) -> None:
        self._sample_format = audio_format.sample_format
        self._header = _wav_header(audio_format) if audio_format.encoding == ENCODING_WAV else b""

    def encode(self, samples: NDArray[np.float32]) -> list[Piece]:
        data = self._header + pcm.to_bytes(samples, self._sample_format)
        self._header = b""
        return [Piece(data=data, frame_count=len(samples))] if data else []

    def finish(self) -> list[Piece]:
        return self.encode(np.empty((0, 1), np.float32))  # a stream without frames has a header too


def _wav_header(audio_format: AudioFormat) -> bytes:
    """Return what comes before the samples of a WAV file whose length nobody knows."""
    rate_hz, channels = audio_format.sample_rate_hz, audio_format.channels
    sample_size_bytes = pcm.frame_size_bytes(audio_format.sample_format) // CHANNELS
    frame_size_bytes, bits = sample_size_bytes * channels, sample_size_bytes * 8
    tag = _WAVE_INTEGER
    extension = b""
    if audio_format.sample_format == SAMPLE_FORMAT_F32:
        tag, extension = _WAVE_FLOAT, struct.pack("<H", 0)
    elif audio_format.sample_format == SAMPLE_FORMAT_S24:
        tag = _WAVE_EXTENSIBLE
        extension = struct.pack("<HHIH", 22, bits, _SPEAKERS[channels], _WAVE_INTEGER) + _WAVE_FAMILY
    layout = struct.pack("<HHIIHH", tag, channels, rate_hz, rate_hz * frame_size_bytes, frame_size_bytes, bits)
    layout += extension
    riff = struct.pack("<4sI4s4sI", b"RIFF", _UNKNOWN_SIZE, b"WAVE", b"fmt ", len(layout))
    return riff + layout + struct.pack("<4sI", b"data", _UNKNOWN_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How FFmpeg writes an encoding. Decoders leave out the delay of Opus by themselves, so it counts as none.

    `held_packets` are those that the container has not written yet whenever it writes.
    """

    codec: str
    container: str
    samples: str = "flt"
    delay_frames: int = 0
    held_packets: int = 0
    options: Mapping[str, str] = field(default_factory=dict[str, str])


_MP3: Final = {"id3v2_version": "0"}
_OGG: Final = {"page_duration": "100000"}  # microseconds: five packets, and one page is held
_WEBM: Final = {"live": "1", "cluster_time_limit": "200"}  # milliseconds
_MP4: Final = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000"}  # microseconds
_RECIPES: Final = {
    ENCODING_FLAC: _Recipe(codec="flac", container="flac"),
    ENCODING_MP3: _Recipe(codec="libmp3lame", container="mp3", samples="fltp", delay_frames=1105, options=_MP3),
    ENCODING_OGG_OPUS: _Recipe(codec="libopus", container="ogg", held_packets=5, options=_OGG),
    ENCODING_WEBM_OPUS: _Recipe(codec="libopus", container="webm", held_packets=2, options=_WEBM),
    ENCODING_MP4_AAC: _Recipe(
        codec="aac", container="mp4", samples="fltp", delay_frames=1024, held_packets=1, options=_MP4
    ),
    ENCODING_MP4_OPUS: _Recipe(codec="libopus", container="mp4", held_packets=1, options=_MP4),
}


class Track:
    """Samples in, packets of a container that was opened for them out. What is too loud is clipped before a codec."""

    def __init__(self, container: OutputContainer, audio_format: AudioFormat) -> None:
        recipe = _RECIPES[audio_format.encoding]
        self._rate_hz = audio_format.sample_rate_hz
        self._samples = recipe.samples
        if audio_format.encoding == ENCODING_FLAC:
            self._samples = "s32" if audio_format.sample_format == SAMPLE_FORMAT_S24 else "s16"
        self._layout = "stereo" if audio_format.channels == CHANNELS else "mono"
        # Left free, Opus takes up to twice the bit rate that was asked for.
        options = {"vbr": "constrained"} if recipe.codec == "libopus" else {}
        stream = container.add_stream(recipe.codec, self._rate_hz, options, layout=self._layout)
        self._stream = cast(AudioStream, stream)
        self._stream.format = self._samples
        if audio_format.bit_rate_bps:
            self._stream.bit_rate = audio_format.bit_rate_bps
        self.num_frames = 0

    def encode(self, samples: NDArray[np.float32]) -> list["Packet[AudioStream]"]:
        """Encode the next samples [n, channels]."""
        if not len(samples):
            return []
        frame = AudioFrame.from_ndarray(_arrange(samples, self._samples), self._samples, self._layout)
        frame.sample_rate, frame.pts = self._rate_hz, self.num_frames
        frame.time_base = Fraction(1, self._rate_hz)
        self.num_frames += len(samples)
        return self._stream.encode(frame)

    def finish(self) -> list["Packet[AudioStream]"]:
        """Return what the codec has held back."""
        return self._stream.encode(None)


class _CodecEncoder:
    """Encodes with FFmpeg."""

    def __init__(self, audio_format: AudioFormat, frame_count: int) -> None:
        recipe = _RECIPES[audio_format.encoding]
        self.delay_frames = recipe.delay_frames
        self._outlet = _Outlet()
        options = {"flush_packets": "1", **recipe.options}
        self._container = av.open(self._outlet, "w", recipe.container, options)
        weakref.finalize(self, self._container.close)  # FFmpeg's memory would wait for the garbage collector
        self._track = Track(self._container, audio_format)
        self._container.start_encoding()
        if audio_format.encoding == ENCODING_FLAC:
            self._outlet.data = _tell_length(self._outlet.data, frame_count)
        self._ends = deque([0] * (recipe.held_packets + 1), recipe.held_packets + 1)
        self._written_frames = self._told_frames = 0

    def encode(self, samples: NDArray[np.float32]) -> list[Piece]:
        self._write(self._track.encode(samples))
        return self._pieces()

    def finish(self) -> list[Piece]:
        self._write(self._track.finish())
        self._container.close()
        self._written_frames = self._track.num_frames
        return self._pieces()

    def _write(self, packets: list["Packet[AudioStream]"]) -> None:
        """Write packets. A packet's time counts from the first frame fed, so its end says how many it completes."""
        for packet in packets:
            self._ends.append((packet.pts or 0) + (packet.duration or 0))
            size_bytes = len(self._outlet.data)
            self._container.mux(packet)
            if len(self._outlet.data) > size_bytes:
                self._written_frames = self._ends[0]

    def _pieces(self) -> list[Piece]:
        data, self._outlet.data = self._outlet.data, b""
        frame_count = self._written_frames - self._told_frames
        self._told_frames = self._written_frames
        return [Piece(data=data, frame_count=frame_count)] if data else []


class _Outlet:
    """A file that cannot be rewound, as FFmpeg is to believe; `data` is what was written since it was last emptied."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


def _tell_length(header: bytes, frame_count: int) -> bytes:
    """Write a number of frames into a FLAC file's header: the 36 bits that end with byte 26."""
    (word,) = struct.unpack_from(">Q", header, 18)
    return header[:18] + struct.pack(">Q", word | frame_count) + header[26:]


def _arrange(samples: NDArray[np.float32], sample_format: str) -> NDArray[Any]:
    """Turn samples [n, channels] into what FFmpeg takes under the name of a sample format."""
    match sample_format:
        case "s16":
            return pcm.to_s16(samples).reshape(1, -1)
        case "s32":  # of which FLAC keeps the upper 24 bits
            return (pcm.to_s24(samples) << 8).reshape(1, -1)
        case "flt":
            return np.clip(samples, -1, 1).reshape(1, -1)
        case _:
            return np.ascontiguousarray(np.clip(samples, -1, 1).T)
