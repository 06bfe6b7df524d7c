"""One amount of memory for all stages: processes that are told of their share, and keep to it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

SOUNDSTAGE = [sys.executable, "-m", "soundstage_cli.app"]


def test_up_gives_each_stage_its_share(models: Path) -> None:
    ports = ["--port", "0", "--http-port", "0"]
    command = [*SOUNDSTAGE, "up", "--models", str(models / "original"), *ports, "--gpu-memory", "1.2GiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert up.stderr is not None
        line = up.stdout.readline()
        assert line.startswith("soundstage is ready at "), up.stderr.read()
        told = [up.stderr.readline() for _ in range(5)]
        [shares] = [line for line in told if line.startswith("memory: ")]
        found = re.search(r"lm (\S+) GiB \+ dit (\S+) GiB \+ vae (\S+) GiB = (\S+) GiB", shares)
        assert found is not None
        assert float(found[4]) <= 1.2
        lm = next(line for line in told if line.startswith("lm starting"))
        pid = lm.partition("(pid ")[2].rstrip(")\n")
        given = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        amount = int(given[given.index("--gpu-memory") + 1].removesuffix("MiB"))
        assert abs(amount / 1024 - float(found[1])) < 0.01
        up.send_signal(signal.SIGTERM)
        up.communicate()
    assert up.returncode == 0


def test_up_refuses_memory_that_is_too_little_with_the_sum(models: Path) -> None:
    command = [*SOUNDSTAGE, "up", "--models", str(models / "original"), "--port", "0", "--gpu-memory", "500MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 1
    assert re.search(r"has 0\.47 GiB of 0\.49 GiB to share, but .* lm \S+ GiB \+ dit .* \+ vae .* = ", done.stderr)
    assert "Traceback" not in done.stderr


def test_what_is_measured_is_no_more_than_what_was_predicted(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    arguments = ["--tiers", "0.5,1.2", "--models", str(models / "original"), "--json", str(path)]
    subprocess.run([*SOUNDSTAGE, "profile", *arguments], check=True, capture_output=True)
    small, large = json.loads(path.read_text())["measured"]
    assert "to share, but the least that would do is" in small["refused"]
    assert large["refused"] == ""
    assert [part["service"] for part in large["services"]] == ["lm", "dit", "vae"]
    for part in large["services"]:
        assert 0 < part["measured_bytes"] <= part["predicted_bytes"]
