"""generate, songs, audio and play, before a gateway that keeps songs."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner, Result

from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_COMPLETED,
    SONG_STATE_FAILED,
    SONG_STATE_RUNNING,
    GenerateSongRequest,
    OutputOptions,
    SongError,
    SongVariant,
    StreamAudioRequest,
)
from soundstage.type.v1.audio_pb2 import ENCODING_PCM, ENCODING_WAV, SAMPLE_FORMAT_S24, AudioFormat, Encoding
from soundstage_cli.app import app
from soundstage_cli.songs import tell_span
from soundstage_runtime.pcm import to_s16

from .conftest import NUM_FRAMES, Keeping, samples

PCM = to_s16(samples()).tobytes()


def run(gateway: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--gateway", gateway])


def words(result: Result) -> str:
    """What was said, without what the frame of an error adds."""
    return " ".join(result.stderr.replace("│", " ").split())


def keep_three(keeping: Keeping) -> None:
    """Keep songs aa…, ab… and b…: one that is made, one in the making and one that failed."""
    variant = SongVariant(seed=7, frame_count=83 * 48_000)
    variant.plan.metadata.bpm = 120
    request = GenerateSongRequest(caption="a [bold] piano")
    keeping.keep("aa", state=SONG_STATE_COMPLETED, request=request, variants=[variant, variant])
    keeping.keep("ab", state=SONG_STATE_RUNNING, variants=[SongVariant(seed=8)])
    keeping.keep("b", state=SONG_STATE_FAILED, error=SongError(message="no room"))


def test_songs_are_listed_the_newest_first(gateway: str, keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    keep_three(keeping)
    rows = [" ".join(line.split()) for line in run(gateway, "songs").stdout.splitlines()]
    assert rows[0] == "song state length made expires caption"
    assert [row.split()[:2] for row in rows[1:]] == [
        ["b0000000", "failed"],
        ["ab000000", "running"],
        ["aa000000", "completed"],
    ]
    assert rows[3].endswith("completed 1:23, 1:23 0 s ago in 3 h a [bold] piano")
    assert len(run(gateway, "songs", "--limit", "1").stdout.splitlines()) == 2


def test_a_song_is_told_of_by_the_beginning_of_its_name(gateway: str, keeping: Keeping) -> None:
    keep_three(keeping)
    lines = run(gateway, "songs", "show", "aa").stdout.splitlines()
    assert lines[0] == f"song: songs/{'aa':0<32}"
    assert "caption: a [bold] piano" in lines
    assert lines[-1] == "variant 2: seed 7, 1:23, 120 bpm"
    assert run(gateway, "songs", "show", "songs/b").stdout.splitlines()[-1] == "error: no room"
    # The address may stand before the verb too.
    early = CliRunner().invoke(app, ["songs", "--gateway", gateway, "show", "b"])
    assert early.stdout == run(gateway, "songs", "show", "b").stdout


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("a", "is 'a', which begins 2 songs"),
        ("c", "is 'c', which begins no song"),
        ("songs/", "is empty"),
        ("\udcff", "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", [["songs", "show"], ["songs", "delete"], ["audio"], ["play"]])
def test_a_name_that_means_no_one_song_is_refused(
    gateway: str, keeping: Keeping, command: list[str], name: str, complaint: str, player: Path
) -> None:
    keep_three(keeping)
    result = run(gateway, *command, name)
    assert (result.exit_code, len(keeping.songs), keeping.streamed) == (2, 3, [])
    assert complaint in words(result)


def test_songs_are_cancelled_and_deleted(gateway: str, keeping: Keeping) -> None:
    keep_three(keeping)
    assert f"songs/{'ab':0<32} is cancelled" in run(gateway, "songs", "cancel", "ab").stderr
    assert keeping.cancelled.is_set()
    assert "is deleted" in run(gateway, "songs", "delete", "b").stderr
    assert len(keeping.songs) == 2
    unknown = run(gateway, "songs", "delete", "f" * 32)
    assert (unknown.exit_code, "which is not kept here" in words(unknown)) == (1, True)


@pytest.mark.parametrize(
    ("span_s", "told"), [(-5, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (7200, "2 h"), (200_000, "2 d")]
)
def test_a_time_is_told_in_its_largest_unit(span_s: float, told: str) -> None:
    assert tell_span(span_s) == told


@pytest.mark.parametrize(
    ("ending", "encoding"),
    [
        ("pcm", "PCM"),
        ("wav", "WAV"),
        ("flac", "FLAC"),
        ("mp3", "MP3"),
        ("ogg", "OGG_OPUS"),
        ("webm", "WEBM_OPUS"),
        ("m4a", "MP4_AAC"),
        ("M4A", "MP4_AAC"),
    ],
)
def test_a_files_ending_says_how_it_is_written(
    gateway: str, keeping: Keeping, tmp_path: Path, ending: str, encoding: str
) -> None:
    path = tmp_path / f"song.{ending}"
    assert run(gateway, "generate", "x", "-o", str(path)).exit_code == 0
    assert keeping.streamed[0].output.format.encoding == Encoding.Value(f"ENCODING_{encoding}")
    assert keeping.created[0].output == keeping.streamed[0].output
    if ending in ("wav", "flac"):
        np.testing.assert_array_equal(soundfile.read(path, dtype="int16")[0], to_s16(samples()))
    else:
        assert path.stat().st_size > 100


def test_every_option_of_the_output_is_passed_on(gateway: str, keeping: Keeping, tmp_path: Path) -> None:
    # This gateway writes S16 at 48 kHz whatever it is asked for.
    options = ["--sample-rate", "44100", "--mono", "--bit-rate", "96000", "--gain", "-3", "--fade-in", "1.5"]
    options += ["--fade-out", "2", "--sample-format", "s24"]
    path = str(tmp_path / "song.bin")
    keeping.keep("a", variants=[SongVariant(), SongVariant()])
    assert run(gateway, "generate", "x", "-o", path, "--encoding", "wav", *options).exit_code == 0
    wanted = OutputOptions(
        format=AudioFormat(
            encoding=ENCODING_WAV,
            sample_format=SAMPLE_FORMAT_S24,
            sample_rate_hz=44_100,
            channels=1,
            bit_rate_bps=96_000,
        ),
        gain_db=-3,
        fade_in_s=1.5,
        fade_out_s=2,
    )
    assert keeping.streamed[0].output == wanted
    wanted.peak_dbfs = -1
    part = ["--from-s", "0.05", "--to-s", "0.125", "--peak", "-1", "--variant", "2"]
    done = run(gateway, "audio", "a", "-o", path, "--encoding", "wav", *options, *part)
    assert done.exit_code == 0, done.output
    asked = keeping.streamed[1]
    assert asked == StreamAudioRequest(
        song=f"songs/{'a':0<32}", variant=1, first_frame=2205, frame_count=3307, output=wanted
    )


def test_stdout_is_pcm_or_what_is_asked_for(gateway: str, keeping: Keeping) -> None:
    assert run(gateway, "generate", "x", "-o", "-").stdout_bytes == PCM
    assert run(gateway, "audio", "1", "-o", "-", "--encoding", "flac").stdout_bytes.startswith(b"fLaC")


def test_a_pipe_that_cannot_start_over_says_so(gateway: str, keeping: Keeping) -> None:
    keeping.cuts = [3, 4]
    assert run(gateway, "generate", "x", "-o", "-").stdout_bytes == PCM
    keeping.cuts = [3]
    done = run(gateway, "audio", "1", "-o", "-", "--encoding", "flac")
    assert (done.exit_code, "only pcm and wav can go on" in words(done)) == (1, True)


@pytest.mark.parametrize("watch", [[], ["--watch"]])
def test_a_part_of_a_song_is_written(gateway: str, keeping: Keeping, tmp_path: Path, watch: list[str]) -> None:
    keeping.keep("a", variants=[SongVariant()])
    path = tmp_path / "part.pcm"
    done = run(gateway, "audio", "a", "-o", str(path), "--from-s", "0.1", "--to-s", "0.2", *watch)
    assert done.exit_code == 0, done.output
    assert path.read_bytes() == PCM[4800 * 4 : 9600 * 4]
    assert keeping.watched.is_set() == bool(watch)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "x", "-o", "song.aiff"], "is 'song.aiff'; must end in one of .wav, .flac, .mp3, .ogg, .webm"),
        (["generate", "x", "-o", "song"], "must end in one of"),
        (["generate", "x", "--encoding", "aac"], "is 'aac'; must be one of wav, flac,"),
        (["generate", "x", "--sample-format", "s8"], "is 's8'; must be one of s16, s24, f32"),
        (["generate", "x", "-o", "/nowhere/song.mp3"], "is '/nowhere/song.mp3', which cannot be written"),
        (["audio", "a", "--from-s", "2", "--to-s", "2"], "is 2; must be more than --from-s, 2"),
        (["audio", "a", "--from-s", "-1"], "is '-1'; must be a number from 0 to 600"),
        *(
            (["audio", "a", f"--{end}", wrong], f"is '{wrong}'")
            for end in ("from-s", "to-s")
            for wrong in ("nan", "inf", "1e30")
        ),
        (["play", "a", "--from-s", "inf"], "is 'inf'; must be a number from 0 to 600"),
        (["generate", "x", "--duration", "abc"], "is 'abc'; must be a number"),
        (["generate", "x", "--seed", "-1"], "is '-1'; must be a whole number from 0 to 4294967295"),
        (["generate", "x", "--task", "cover"], "is not given; --task cover works on a file"),
        (["plan", "x", "-o", "/nowhere/plan.json"], "is '/nowhere/plan.json', which cannot be written"),
        (["align", "a", "-o", "/nowhere/song.lrc"], "is '/nowhere/song.lrc', which cannot be written"),
        (["audio", "a", "--variant", "9"], "is '9'; must be a whole number from 1 to 8"),
        (["play"], "give the name of a song, or -c"),
        (["play", "a", "-c", "x"], "give the name of a song, or -c"),
        (["play", "a", "--player", "radio"], "is 'radio'; must be one of ffplay, mpv, aplay, paplay"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    gateway: str, keeping: Keeping, arguments: list[str], complaint: str
) -> None:
    result = run(gateway, *arguments)
    assert (result.exit_code, keeping.created, keeping.streamed) == (2, [], [])
    assert complaint in words(result)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["audio", "aa", "--from-s", "83"], "--from-s: is 83; the song ends after 83 s"),
        (["audio", "aa", "--to-s", "83.5"], "--to-s: is 83.5; the song ends after 83 s"),
        (["audio", "aa", "--variant", "3"], "--variant: is 3; the song has variants 1 to 2"),
        (["align", "aa", "--variant", "3"], "--variant: is 3; the song has variants 1 to 2"),
        (["play", "aa", "--from-s", "83"], "--from-s: is 83; the song ends after 83 s"),
        (["play", "ab", "--variant", "2"], "--variant: is 2; the song has one variant"),
    ],
)
def test_a_part_that_a_song_does_not_have_is_refused_by_the_option(
    gateway: str, keeping: Keeping, player: Path, arguments: list[str], complaint: str
) -> None:
    keep_three(keeping)
    result = run(gateway, *arguments)
    assert (result.exit_code, keeping.streamed) == (2, [])
    assert complaint in words(result)


def test_an_empty_address_is_refused() -> None:
    result = run("", "songs")
    assert (result.exit_code, "--gateway: is empty" in words(result)) == (2, True)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["generate", "x"], signal.SIGINT),
        (["generate", "x"], signal.SIGTERM),
        (["play", "-c", "x"], signal.SIGINT),
        (["play", "-c", "x"], signal.SIGHUP),
    ],
)
def test_whoever_stops_the_command_cancels_the_song(
    gateway: str, keeping: Keeping, tmp_path: Path, player: Path, command: list[str], number: signal.Signals
) -> None:
    keeping.is_stuck = True
    arguments = [sys.executable, "-m", "soundstage_cli.app", *command, "--gateway", gateway]
    # What is started in the background of a shell ignores SIGINT, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        assert keeping.watched.wait(60)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert keeping.cancelled.is_set()
    assert (process.returncode, b"Traceback" in said) == (130, False)
    assert said.endswith(b"cancelled\n") == (command[0] == "generate")  # of no file, as there is none


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this machine have one player, aplay, which writes what it hears to the file that is returned."""
    return make_player(tmp_path, monkeypatch, 'exec cat > "$0.heard"')


def make_player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / "aplay"
    program.write_text(f'#!/bin/sh\nPATH=/bin:/usr/bin\necho "$@" > "$0.arguments"\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "aplay.heard"


@pytest.mark.parametrize("arguments", [["a"], ["-c", "x", "--duration", "3", "--seed", "5"]])
def test_a_song_is_played_to_its_end(gateway: str, keeping: Keeping, player: Path, arguments: list[str]) -> None:
    keeping.keep("a", variants=[SongVariant()])
    keeping.cuts = [4]
    done = run(gateway, "play", *arguments)
    assert done.exit_code == 0, done.output
    assert player.read_bytes()[44:] == PCM
    assert (player.parent / "aplay.arguments").read_text() == "-q -\n"
    first, second = keeping.streamed
    assert (first.output.format.encoding, second.output.format.encoding) == (ENCODING_WAV, ENCODING_PCM)
    assert 0 < second.first_frame == NUM_FRAMES - second.frame_count
    assert first.output.max_buffer_s == 10
    for request in keeping.created:
        assert (request.caption, request.metadata.duration_s, [*request.seeds]) == ("x", 3, [5])


@pytest.mark.players
def test_a_real_ffplay_plays_a_song_to_its_end(
    gateway: str, keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = tmp_path / "heard"
    monkeypatch.setenv("SDL_AUDIODRIVER", "disk")  # as a card that writes down what it plays
    monkeypatch.setenv("SDL_DISKAUDIOFILE", str(heard))
    keeping.keep("a", variants=[SongVariant()])
    keeping.cuts = [4]
    done = run(gateway, "play", "a", "--player", "ffplay")
    assert done.exit_code == 0, done.output
    assert len(keeping.streamed) == 2
    assert heard.read_bytes().strip(b"\0").startswith(PCM.strip(b"\0"))


def run_player(gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, *arguments: Any) -> Result:
    make_player(tmp_path, monkeypatch, script)
    return run(gateway, "play", "a", *arguments)


def test_a_player_that_fails_is_named(
    gateway: str, keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping.keep("a", variants=[SongVariant()])
    for script in ("exit 3", "cat > /dev/null; exit 3"):
        done = run_player(gateway, tmp_path, monkeypatch, script)
        assert (done.exit_code, "aplay ended with exit status 3" in words(done)) == (1, True)


def test_a_player_that_ends_before_the_song_is_an_error(
    gateway: str, keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping.keep("a", variants=[SongVariant()])
    done = run_player(gateway, tmp_path, monkeypatch, "exit 0")
    assert (done.exit_code, "aplay ended with exit status 0, before the song did" in words(done)) == (1, True)


def test_a_machine_without_players_is_told_what_to_install(
    gateway: str, keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(gateway, "play", "a")
    assert (done.exit_code, keeping.streamed) == (2, [])
    assert "none of ffplay, mpv, aplay, paplay is installed; install ffmpeg or mpv" in words(done)
    asked = run(gateway, "play", "a", "--player", "mpv")
    assert "is mpv, which is not installed" in words(asked)
    assert os.environ["PATH"] == str(tmp_path)
