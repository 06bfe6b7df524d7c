import json
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.text import Text
from typer.testing import CliRunner

from soundstage_cli.app import app
from soundstage_cli.bench import dit, dit_report
from soundstage_cli.bench.command import keep
from soundstage_cli.bench.lm import Plan, Run
from soundstage_cli.bench.lm_report import make_report, summarize
from soundstage_cli.bench.report import HISTORY


def make_run(engine: str, number: int, rate: float, songs: int = 1) -> Run:
    return Run(engine=engine, songs=songs, round=number, codes_per_s=rate, first_code_s=1.0)


def test_measures_a_tiny_planner_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--size", "tiny", "--rounds", "1", "--codes", "20", "--threads", "1", "--dtype", "float32"]
    folders = ["--output", str(tmp_path / "figures"), "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, ["bench", "lm", *options, *folders, "--songs", "1", "--songs", "2"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "figures" / "lm-tiny-cpu-float32.json").read_text())
    assert [(run["engine"], run["songs"]) for run in report["runs"]] == [
        ("transformers", 1),
        ("torch", 1),
        ("torch", 2),
    ]
    assert all(run["codes_per_s"] > 0 and run["first_code_s"] > 0 for run in report["runs"])
    assert (tmp_path / "figures" / "lm-tiny-cpu-float32.png").read_bytes().startswith(b"\x89PNG")
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
@pytest.mark.parametrize("command", ["dit", "vae", "lm", "song"])
def test_refuses_a_card_that_is_not_here(tmp_path: Path, command: str) -> None:
    done = CliRunner().invoke(app, ["bench", command, "--size", "tiny", "--device", "cuda", "-o", str(tmp_path)])
    assert done.exit_code == 2
    assert "no card here" in done.output


def test_measures_a_tiny_transformer_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    options = ["--size", "tiny", "--rounds", "2", "--threads", "1", "--max-seconds", "30", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "dit", *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "dit-tiny-cpu-float32.json").read_text())
    assert [(run["round"], run["songs"], run["engine"]) for run in report["runs"]] == [
        (number, songs, engine) for number in (1, 2) for songs in (1, 8) for engine in ("diffusers", "soundstage")
    ]
    assert all(run["step_s"] > 0 for run in report["runs"])
    assert (tmp_path / "dit-tiny-cpu-float32.png").read_bytes().startswith(b"\x89PNG")
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
    # The machine halves its speed between the rounds; both are compiled in the second alone.
    runs = [
        dit.Run(engine=engine, duration_s=30 * songs, songs=songs, round=number, step_s=number * songs * factor)
        for number in (1, 2)
        for songs in (1, 8)
        for engine, factor in (("diffusers", 3.0), ("soundstage", 1.5))
    ]
    runs += [
        dit.Run(engine=f"{engine}, compiled", duration_s=30, songs=1, round=2, step_s=step_s)
        for engine, step_s in (("diffusers", 4.0), ("soundstage", 1.0))
    ]
    times = {
        (one.engine, one.songs, peer): (ratio.least, ratio.most)
        for one in dit_report.summarize(runs)
        for peer, ratio in one.times.items()
    }
    assert times == {
        ("soundstage", 1, "diffusers"): (2.0, 2.0),
        ("soundstage", 8, "diffusers"): (2.0, 2.0),
        ("diffusers, compiled", 1, "diffusers"): (1.5, 1.5),
        ("soundstage, compiled", 1, "diffusers"): (6.0, 6.0),
        ("soundstage, compiled", 1, "diffusers, compiled"): (4.0, 4.0),
    }


def test_a_second_of_a_long_song_is_compared_with_one_of_a_short_song() -> None:
    runs = [
        dit.Run(engine=dit.SLIDING, duration_s=duration_s, songs=1, round=number, step_s=number * step_s)
        for number in (1, 2)
        for duration_s, step_s in ((60, 3.0), (600, 60.0))
    ]
    ratio = dit_report.compare_lengths(runs)
    assert ratio is not None
    assert (ratio.times.least, ratio.times.most) == (0.5, 0.5)  # it costs twice as much
    assert dit_report.compare_lengths(runs[:1]) is None


def test_the_sliding_layers_alone_are_those_of_the_transformer() -> None:
    plan = dit.Plan(size="tiny", cases=(), rounds=1, threads=1, device="cpu", dtype="float32", is_compiled=False)
    baseline = dit.make_theirs(plan)
    whole, alone = dit.make_ours(baseline, plan), dit.make_sliding(baseline, plan)
    assert alone.shape.stack.windows == (128,)
    assert len(alone.layers) == 1
    assert torch.equal(alone.layers[0].mlp.up_proj.weight, whole.layers[0].mlp.up_proj.weight)


def test_every_run_adds_a_line_to_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--size", "tiny", "--rounds", "1", "--threads", "1", "--max-seconds", "30", "--output", str(tmp_path)]
    for _ in range(2):
        assert CliRunner().invoke(app, ["bench", "dit", *options]).exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    report = json.loads((tmp_path / "dit-tiny-cpu-float32.json").read_text())
    assert report.pop("runs")
    assert lines[1] == {"bench": "dit-tiny-cpu-float32"} | report
    assert [line["machine"] for line in lines] == [report["machine"]] * 2
    assert all(report[name] for name in ("date", "command", "versions", "ratios", "summaries"))
    shown = CliRunner().invoke(app, ["bench", "history", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("soundstage, 8 x 30 s") == 2
    assert CliRunner().invoke(app, ["bench", "history", str(tmp_path / "none")]).exit_code == 2


def test_a_run_that_is_cut_short_leaves_the_rounds_before(tmp_path: Path) -> None:
    plan = Plan(
        size="tiny",
        engines=["torch"],
        songs=[1],
        rounds=2,
        num_codes=10,
        threads=1,
        device="cpu",
        dtype="float32",
        cache=tmp_path,
        vllm_python=tmp_path,
    )

    def run() -> None:
        with keep(tmp_path, partial(make_report, plan)) as take:
            take([make_run("transformers", 1, 5.0), make_run("torch", 1, 15.0)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    [line] = (tmp_path / HISTORY).read_text().splitlines()
    assert json.loads(line)["ratios"][0]["times"]["median"] == 3.0
    assert len(json.loads((tmp_path / "lm-tiny-cpu-float32.json").read_text())["runs"]) == 2
