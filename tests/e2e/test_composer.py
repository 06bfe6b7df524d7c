"""Plans, drafts and descriptions through four real processes on tiny random models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile


def run(gateway: str, *arguments: str) -> str:
    """Run the command line; returns what it printed."""
    command = [sys.executable, "-m", "soundstage_cli.app", *arguments, "--gateway", gateway]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_plan_can_be_edited_and_sent_back(gateway: str, tmp_path: Path) -> None:
    path, wav = tmp_path / "song.json", tmp_path / "song.wav"
    told = run(gateway, "plan", "a calm piano", "--duration", "3", "--seed", "7", "-o", str(path))
    plan = json.loads(path.read_text())
    assert f"bpm: {plan['metadata']['bpm']}  (the model)" in told
    assert "duration_s: 3  (you)" in told
    assert len(plan["codes"]) == 15
    assert plan["seeds"] == [7]
    plan["metadata"]["key_scale"] = "Am"
    plan["codes"], plan["metadata"]["duration_s"] = plan["codes"][:10], 2
    path.write_text(json.dumps(plan))
    told = run(gateway, "generate", "--request", str(path), "-o", str(wav))
    assert "A minor" in told
    assert soundfile.info(wav).frames == 2 * 48_000


def test_the_song_of_a_plan_is_the_song_planned_on_the_way(gateway: str, tmp_path: Path) -> None:
    path, once, twice = tmp_path / "song.json", tmp_path / "once.wav", tmp_path / "twice.wav"
    words = ("a calm piano", "--duration", "2", "--seed", "7")
    run(gateway, "plan", *words, "-o", str(path))
    run(gateway, "generate", "--request", str(path), "-o", str(once))
    run(gateway, "generate", *words, "-o", str(twice))
    assert once.read_bytes() == twice.read_bytes()


def test_an_idea_becomes_a_text_that_can_be_sung(gateway: str, tmp_path: Path) -> None:
    path, wav = tmp_path / "song.json", tmp_path / "song.wav"
    told = run(gateway, "draft", "rain on a tin roof", "--language", "en", "--seed", "7", "-o", str(path))
    assert "# Caption" in told
    assert "vocal_language: en" in told
    request = json.loads(path.read_text())
    request["metadata"]["duration_s"] = 2
    path.write_text(json.dumps(request))
    run(gateway, "generate", "--request", str(path), "--no-plan", "-o", str(wav))
    assert soundfile.info(wav).frames == 2 * 48_000


def test_a_rough_text_is_polished_and_what_was_fixed_stays(gateway: str) -> None:
    told = run(gateway, "polish", "a calm piano", "--bpm", "90", "--key", "c# minor", "--duration", "30", "--seed", "7")
    assert "bpm: 90" in told
    assert "key_scale: C# minor" in told
    assert "duration_s: 30" in told


def test_a_sound_file_of_any_rate_is_described(gateway: str, tmp_path: Path) -> None:
    path = tmp_path / "tone.flac"
    seconds = np.arange(2 * 44_100) / 44_100
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * seconds), 44_100)
    told = run(gateway, "describe", str(path), "--seed", "7")
    assert "# Caption" in told
    assert "duration_s: 2" in told
