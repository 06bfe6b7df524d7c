import json
from pathlib import Path

import pytest
import torch
from rich.text import Text
from typer.testing import CliRunner

from soundstage_cli.app import app
from soundstage_cli.bench import dit, dit_report
from soundstage_cli.bench.lm import Run
from soundstage_cli.bench.report import summarize


def make_run(engine: str, number: int, rate: float, songs: int = 1) -> Run:
    return Run(engine=engine, songs=songs, round=number, codes_per_s=rate, first_code_s=1.0)


def test_measures_a_tiny_planner_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--size", "tiny", "--rounds", "1", "--codes", "20", "--threads", "1", "--dtype", "float32"]
    folders = ["--output", str(tmp_path / "figures"), "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, ["bench", "lm", *options, *folders, "--songs", "1", "--songs", "2"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "figures" / "lm.json").read_text())
    assert [(run["engine"], run["songs"]) for run in report["runs"]] == [
        ("transformers", 1),
        ("torch", 1),
        ("torch", 2),
    ]
    assert all(run["codes_per_s"] > 0 and run["first_code_s"] > 0 for run in report["runs"])
    assert (tmp_path / "figures" / "lm.png").read_bytes().startswith(b"\x89PNG")
    assert "songs at once" in done.output


def test_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed between the rounds; the engine is three times as fast in both.
    runs = [
        make_run(name, number, rate / number)
        for number in (1, 2)
        for name, rate in (("transformers", 5.0), ("torch", 15.0))
    ]
    base, torch = summarize(runs)
    assert (torch.ratio.least, torch.ratio.most) == (3.0, 3.0)
    assert (base.codes_per_s.least, base.codes_per_s.median, base.codes_per_s.most) == (2.5, 3.75, 5.0)


def test_says_why_an_engine_cannot_be_measured(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--engine", "vllm", "--rounds", "1", "--dtype", "float32"]
    folders = ["--cache", str(tmp_path), "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "lm", *options, *folders])
    assert done.exit_code == 1
    assert "runs on torch, not on vllm" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lm", "--size", "9B"], "--size: is '9B'; must be one of 0.6B, tiny"),
        (["lm", "--size", "tiny", "--engine", "jax"], "--engine: is 'jax'; must be one of torch, vllm"),
        (["lm", "--size", "tiny", "--dtype", "foo"], "--dtype: is 'foo'; must be one of float32, bfloat16"),
        (["lm", "--size", "tiny", "--vllm-python", "/nope"], "--vllm-python: is '/nope', which cannot be run"),
        (["lm", "--size", "tiny", "--cache", "a_file"], "--cache: is 'a_file', which cannot be made: File exists"),
        (["dit", "--output", "a_file"], "--output: is 'a_file', which cannot be made: File exists"),
        (["vae", "--output", "/proc/x"], "--output: is '/proc/x', which cannot be made: No such file or directory"),
        (["dit", "--size", "9B"], "--size: is '9B'; must be one of tiny, mid, 2B, XL"),
        (["dit", "--dtype", "zz"], "--dtype: is 'zz'; must be one of float32, bfloat16, float16"),
        (["dit", "--device", "tpu"], "--device: is 'tpu'; must be one of cpu, cuda"),
        (
            ["dit", "--max-seconds", "10"],
            "--max-seconds: is 10, shorter than any song that is measured; must be 30 or more",
        ),
    ],
)
def test_refuses_what_it_cannot_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("a_file").touch()
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert f"Invalid value for {words}" in Text.from_ansi(done.output).plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is here")
@pytest.mark.parametrize("command", ["dit", "vae"])
def test_refuses_a_card_that_is_not_here(tmp_path: Path, command: str) -> None:
    done = CliRunner().invoke(app, ["bench", command, "--size", "tiny", "--device", "cuda", "-o", str(tmp_path)])
    assert done.exit_code == 2
    assert "no card here" in done.output


def test_measures_a_tiny_transformer_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--size", "tiny", "--rounds", "2", "--threads", "1", "--max-seconds", "30", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "dit", *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "dit-tiny.json").read_text())
    assert [(run["round"], run["songs"], run["engine"]) for run in report["runs"]] == [
        (number, songs, engine) for number in (1, 2) for songs in (1, 8) for engine in ("diffusers", "soundstage")
    ]
    assert all(run["step_s"] > 0 for run in report["runs"])
    assert (tmp_path / "dit-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "times as fast as diffusers" in done.output


@torch.inference_mode()
def test_both_transformers_compute_the_same() -> None:
    size = dit.SIZES["tiny"]
    plan = dit.Plan(size="tiny", cases=(), rounds=1, threads=1, device="cpu", dtype="float32", is_compiled=False)
    case = dit.Case(duration_s=5, songs=2)
    baseline = dit.make_theirs(plan)
    models = (baseline, dit.make_ours(baseline, plan))
    theirs, ours = (dit.make_step(model, case, size, plan)() for model in models)
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        assert one.std() > 0.01
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_step_is_compared_with_the_same_case_in_its_round() -> None:
    runs = [
        dit.Run(engine=engine, duration_s=30 * songs, songs=songs, round=number, step_s=number * songs * factor)
        for number in (1, 2)
        for songs in (1, 8)
        for engine, factor in (("diffusers", 3.0), ("soundstage", 1.5))
    ]
    ratios = {(one.engine, one.songs): one.ratio for one in dit_report.summarize(runs)}
    assert {(ratio.least, ratio.most) for (engine, _), ratio in ratios.items() if engine == "soundstage"} == {
        (2.0, 2.0)
    }
    assert {(ratio.least, ratio.most) for (engine, _), ratio in ratios.items() if engine == "diffusers"} == {(1.0, 1.0)}
