import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.settings import ServerSettings, StageSettings, load_settings


class KilnSettings(ServerSettings):
    """Settings of a process that exists in this test alone."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_KILN_")

    model: str = Field(description="what to fire")
    max_in_flight: int = Field(2, ge=1)
    is_hot: bool = Field(False)


def test_flags_beat_the_environment_and_that_beats_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUNDSTAGE_KILN_MODEL", "clay")
    monkeypatch.setenv("SOUNDSTAGE_KILN_PORT", "1234")
    settings = load_settings(KilnSettings, ["--port", "4321", "--is-hot"])
    assert (settings.model, settings.port, settings.max_in_flight, settings.is_hot) == ("clay", 4321, 2, True)


def test_a_missing_value_names_its_variable_and_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(KilnSettings, [])
    assert caught.value.code == 2
    assert "SOUNDSTAGE_KILN_MODEL (or --model) is not set: Field required" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--port", "70000"],
            "SOUNDSTAGE_KILN_PORT (or --port) is '70000': Input should be less than or equal to 65535",
        ),
        (
            ["--max-in-flight", "0"],
            "SOUNDSTAGE_KILN_MAX_IN_FLIGHT (or --max-in-flight) is '0': Input should be greater",
        ),
        (
            ["--log-format", "xml"],
            "SOUNDSTAGE_KILN_LOG_FORMAT (or --log-format) is 'xml': Input should be 'console' or",
        ),
        (["--grace-s", "soon"], "SOUNDSTAGE_KILN_GRACE_S (or --grace-s) is 'soon': Input should be a valid number"),
    ],
)
def test_a_bad_value_is_told_with_what_is_wanted(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(KilnSettings, ["--model", "clay", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_all_bad_values_are_told_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUNDSTAGE_KILN_GRACE_S", "-1")
    with pytest.raises(SystemExit):
        load_settings(KilnSettings, ["--port", "x"])
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == [
        "SOUNDSTAGE_KILN_PORT",
        "SOUNDSTAGE_KILN_GRACE_S",
        "SOUNDSTAGE_KILN_MODEL",
    ]


def test_a_flag_nobody_knows_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(KilnSettings, ["--model", "clay", "--colour", "red"])
    assert caught.value.code == 2
    assert "--colour" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "6GiB", "0.5"])
def test_a_budget_is_a_size_or_a_fraction(text: str) -> None:
    assert load_settings(StageSettings, ["--model", "clay", "--gpu-memory", text]).gpu_memory == text


def test_a_budget_that_is_neither_is_told_with_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(StageSettings, ["--model", "clay", "--gpu-memory", "plenty"])
    assert "GPU_MEMORY (or --gpu-memory) is 'plenty': Value error, 'plenty' is no amount" in capsys.readouterr().err


class OvenSettings(StageSettings):
    """Settings of a stage that exists in this test alone."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_OVEN_")


def test_a_card_is_made_smaller_by_a_variable_that_all_stages_share(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("8", 8.0), ("15.5", 15.5), ("", None)):
        monkeypatch.setenv("MAX_CUDA_VRAM", text)
        assert load_settings(OvenSettings, ["--model", "clay"]).max_cuda_vram == expected
    assert load_settings(OvenSettings, ["--model", "clay", "--max-cuda-vram", "6"]).max_cuda_vram == 6


@pytest.mark.parametrize("text", ["much", "0", "-8", "nan", "8GB"])
def test_a_size_of_a_card_that_is_none_is_told_by_the_variables_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    monkeypatch.setenv("MAX_CUDA_VRAM", text)
    with pytest.raises(SystemExit) as caught:
        load_settings(OvenSettings, ["--model", "clay"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert f"MAX_CUDA_VRAM (or --max-cuda-vram) is {text!r}: Value error, must be a number of GB, as 8" in told
    assert "OVEN" not in told


def test_what_is_left_at_its_default_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(OvenSettings, ["--model", "clay"]).asked("max_in_flight") is None
    assert load_settings(OvenSettings, ["--model", "clay", "--max-in-flight", "8"]).asked("max_in_flight") == 8
    monkeypatch.setenv("SOUNDSTAGE_OVEN_MAX_IN_FLIGHT", "8")
    assert load_settings(OvenSettings, ["--model", "clay"]).asked("max_in_flight") == 8
