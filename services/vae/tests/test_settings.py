import pytest

from soundstage_runtime.settings import load_settings
from soundstage_vae.settings import VaeSettings


def test_reads_the_environment_and_flags_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUNDSTAGE_VAE_MODEL", "somewhere")
    monkeypatch.setenv("SOUNDSTAGE_VAE_WINDOW_FRAMES", "256")
    settings = load_settings(VaeSettings, ["--window-frames", "64"])
    assert (settings.model, settings.window_frames, settings.dtype) == ("somewhere", 64, "auto")


def test_leaves_windows_and_batches_to_the_device() -> None:
    settings = load_settings(VaeSettings, ["--model", "x"])
    assert (settings.window_frames, settings.max_batch_tiles, settings.last_layers_fp32) == ("auto", "auto", False)
    assert settings.compile
    settings = load_settings(
        VaeSettings, ["--model", "x", "--max-batch-tiles", "2", "--last-layers-fp32", "--no-compile"]
    )
    assert (settings.max_batch_tiles, settings.last_layers_fp32, settings.compile) == (2, True, False)


def test_names_a_window_too_short_for_its_context(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(VaeSettings, ["--model", "x", "--window-frames", "18"])
    assert "SOUNDSTAGE_VAE_WINDOW_FRAMES (or --window-frames) is '18'" in capsys.readouterr().err
