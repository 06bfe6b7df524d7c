import asyncio
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer

from soundstage.type.v1.audio_pb2 import (
    ENCODING_WAV,
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    AudioChunk,
    AudioFormat,
    AudioHeader,
    SampleFormat,
)
from soundstage_cli.audio import write_audio
from soundstage_cli.sinks import AudioFile
from soundstage_gateway.audio_encoder import open_encoder


@pytest.mark.parametrize("sample_format", [SAMPLE_FORMAT_S16, SAMPLE_FORMAT_S24, SAMPLE_FORMAT_F32])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("num_frames", [0, 333])
async def test_a_wav_file_tells_its_true_length(
    tmp_path: Path, sample_format: SampleFormat.ValueType, channels: int, num_frames: int
) -> None:
    written = AudioFormat(encoding=ENCODING_WAV, sample_format=sample_format, sample_rate_hz=44_100, channels=channels)
    sound = np.linspace(-0.5, 0.5, num_frames * channels, dtype=np.float32).reshape(-1, channels)
    encoder = open_encoder(written)
    path = tmp_path / "song.wav"
    with AudioFile(path) as file:
        await file.begin(AudioHeader(format=written))
        for piece in [*encoder.encode(sound), *encoder.finish()]:
            await file.write(AudioChunk(data=piece.data))
    data = path.read_bytes()
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert len(data) % 2 == 0
    assert soundfile.info(path).frames == num_frames
    found, _ = soundfile.read(path, dtype="float32", always_2d=True)
    assert np.abs(found - sound).max(initial=0) <= 2**-15


async def test_a_wav_file_cut_within_its_header_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    with AudioFile(path) as file:
        await file.begin(AudioHeader(format=AudioFormat(encoding=ENCODING_WAV)))
        await file.write(AudioChunk(data=b"RIFF"))
    assert path.read_bytes() == b"RIFF"


@pytest.mark.parametrize("is_begun", [True, False])
def test_who_cancels_is_told_of_the_file_that_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_begun: bool
) -> None:
    file = AudioFile(tmp_path / "song.wav")

    async def write() -> None:
        with file:
            if is_begun:
                await file.begin(AudioHeader())
            raise asyncio.CancelledError

    with pytest.raises(typer.Exit):
        write_audio("", "song.wav", write(), [file])
    said = "".join(capsys.readouterr().err.splitlines())
    assert said.startswith("cancelled; what came till then is in") == is_begun
    assert file.path.exists() == is_begun
