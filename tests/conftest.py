"""Tiny checkpoints, and a running deployment of real processes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from soundstage_cli.tiny.checkpoints import write_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of tiny checkpoints in both layouts."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def gateway(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a gateway before three stages, started by `soundstage up`."""
    log = tmp_path_factory.mktemp("up") / "log"
    command = [sys.executable, "-m", "soundstage_cli.app", "up", "--models", str(models / "original"), "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as up:
        assert up.stdout is not None
        line = up.stdout.readline()
        try:
            assert line.startswith("soundstage is ready at "), log.read_text()
            yield line.split()[-1]
        finally:
            up.terminate()
            up.wait(60)
    assert up.returncode == 0, log.read_text()
