import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from soundstage_cli.bench.command import app
from soundstage_cli.bench.vae import Plan, Run, make_both, summarize


def test_measures_a_tiny_codec_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--size", "tiny", "--seconds", "3", "--rounds", "2", "--threads", "1", "--window", "64"]
    done = CliRunner().invoke(app, ["vae", *options, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "vae-tiny-cpu-float32-3s.json").read_text())
    assert [(run["engine"], run["round"]) for run in report["runs"]] == [
        (engine, number)
        for number in (1, 2)
        for engine in ("diffusers", "diffusers, memory kept", "soundstage, windows to 64")
    ]
    assert all(0 < run["first_audio_s"] <= run["song_s"] for run in report["runs"])
    assert (tmp_path / "vae-tiny-cpu-float32-3s.png").read_bytes().startswith(b"\x89PNG")
    assert "decoding a song" in done.output


def test_ratios_of_decoding_are_taken_within_a_round() -> None:
    # The machine halves its speed between the rounds; ours is twice as fast in both.
    runs = [
        Run(engine=name, round=number, song_s=taken_s * number, first_audio_s=1.0)
        for number in (1, 2)
        for name, taken_s in (("diffusers", 6.0), ("soundstage", 3.0))
    ]
    times = summarize(runs)[1].times["diffusers"]
    assert (times.least, times.most) == (2.0, 2.0)


def test_both_codecs_decode_the_same_audio() -> None:
    plan = Plan(
        size="tiny", duration_s=1, windows=[64], rounds=1, threads=1, device="cpu", dtype="float32", is_compiled=False
    )
    theirs, ours = make_both(plan)
    latents = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    with torch.inference_mode():
        whole = theirs.decode(torch.from_numpy(latents.T[None].copy())).sample[0].T.numpy()
    np.testing.assert_allclose(ours.decode(latents), whole, rtol=0, atol=1e-5)
    assert theirs.use_tiling


def test_refuses_a_codec_of_a_size_it_does_not_know() -> None:
    assert CliRunner().invoke(app, ["vae", "--size", "huge"]).exit_code == 2
