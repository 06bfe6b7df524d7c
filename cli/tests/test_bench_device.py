"""bench/device.sh, rehearsed on a CPU, and with interpreters that only seem to measure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "bench" / "device.sh"
# As one that was asked for figures: -m, the module, the bench, its flags, and last the folder for them.
_FAKES = {
    "endless": 'for last; do :; done; echo "{}" >"$last/$3.json"; [ "$3" = history ] || exec sleep 60',
    "broken": 'echo "no such thing"; exit 3',
}


def run_script(folder: Path, *, python: str = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    settings = {"OUT": str(folder / "out"), "PYTHON": python, "WHEELS": str(folder / "none"), "SIZES": "tiny"}
    environment = os.environ | settings | {"DEVICE": "cpu", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([_SCRIPT], env=environment, capture_output=True, text=True, timeout=200, check=False)


def make_fake(folder: Path, name: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{_FAKES[name]}\n")
    path.chmod(0o755)
    return str(path)


def test_measures_a_step_and_ends_with_all_ratios(tmp_path: Path) -> None:
    done = run_script(tmp_path, BENCHES="dit")
    assert done.returncode == 0, done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["device.log", "dit-tiny-cpu-float32.json", "history.jsonl"]
    [line] = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    assert json.loads(line)["bench"] == "dit-tiny-cpu-float32"
    _, table = done.stdout.rsplit("times as fast", 1)
    assert "soundstage, 8 x 30 s" in table
    assert (tmp_path / "out" / "device.log").read_text() == done.stdout


def test_a_bench_that_is_cut_short_is_no_failure_and_leaves_its_figures(tmp_path: Path) -> None:
    done = run_script(tmp_path, python=make_fake(tmp_path, "endless"), BENCHES="lm dit", TOTAL_S="6")
    assert done.returncode == 0, done.stdout
    assert "lm was cut short after 1 s" in done.stdout
    assert "dit was cut short" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["device.log", "dit.json", "lm.json"]


def test_a_bench_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    done = run_script(tmp_path, python=make_fake(tmp_path, "broken"), BENCHES="lm dit")
    assert done.returncode == 1
    assert "lm failed with status 3" in done.stdout
    assert "dit failed with status 3" in done.stdout


def test_wheels_that_cannot_be_installed_end_the_script(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    done = run_script(tmp_path, WHEELS=str(tmp_path / "wheels"), BENCHES="lm")
    assert done.returncode == 1
    assert "==" not in done.stdout


@pytest.mark.parametrize("sizes", ["tiny", "2B XL"])
def test_all_benches_fit_into_what_comes_back(tmp_path: Path, sizes: str) -> None:
    done = run_script(tmp_path, python=make_fake(tmp_path, "broken"), SIZES=sizes)
    benches = [line.split()[1] for line in done.stdout.splitlines() if line.endswith("at most")]
    assert set(benches) == {"lm", "vae", "dit", "song"}
    assert len(benches) + len(["history.jsonl", "device.log"]) <= 8
