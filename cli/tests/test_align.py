"""soundstage align, before a gateway that keeps songs."""

from pathlib import Path

from typer.testing import CliRunner

from soundstage.music.v1.song_service_pb2 import SongVariant
from soundstage_cli.app import app

from .conftest import Keeping


def test_lines_go_to_stdout_or_into_a_file(gateway: str, keeping: Keeping, tmp_path: Path) -> None:
    keeping.keep("a", variants=[SongVariant(), SongVariant()])
    options = ["align", "a", "--variant", "2", "--gateway", gateway]
    shown = CliRunner().invoke(app, options)
    assert (shown.exit_code, shown.stdout) == (0, "[00:01.00]la\n")
    assert "25%" in shown.stderr
    file = tmp_path / "song.lrc"
    assert CliRunner().invoke(app, [*options, "-o", str(file)]).stdout == ""
    assert file.read_text() == "[00:01.00]la\n"
    assert CliRunner().invoke(app, [*options, "-o", str(tmp_path)]).exit_code == 2


def test_a_song_that_is_not_known_is_an_error_in_words(gateway: str) -> None:
    done = CliRunner().invoke(app, ["align", "f" * 32, "--gateway", gateway])
    assert done.exit_code == 1
    assert "which is not kept here" in done.stderr
