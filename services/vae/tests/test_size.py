"""Settings that fit a budget: as much of a song at once as there is room for, and no network is loaded."""

import pytest
from structlog.testing import capture_logs

from soundstage_budget.cards import Card
from soundstage_budget.models import VAE
from soundstage_budget.plan import DoesNotFitError
from soundstage_runtime.settings import load_settings
from soundstage_vae.settings import VaeSettings
from soundstage_vae.size import fit

GIB = 1 << 30
CARD = Card(name="a card", memory_gib=48, capability=(8, 6))


def fit_to(budget_gib: float, *arguments: str, card: Card = CARD) -> VaeSettings:
    settings = load_settings(VaeSettings, ["--model", "a", *arguments])
    return fit(settings, VAE, round(budget_gib * GIB), dtype="float32", card=card)


@pytest.mark.parametrize(
    ("budget_gib", "offload", "window", "tiles"),
    [(40, "none", 1536, 4), (4, "none", 1536, 1), (2, "none", 512, 1), (1.25, "none", 128, 1), (1, "model", 128, 1)],
)
def test_a_card_is_used_for_all_that_it_has_room_for(budget_gib: float, offload: str, window: int, tiles: int) -> None:
    with capture_logs() as logs:
        settings = fit_to(budget_gib)
    assert (settings.offload, settings.window_frames, settings.max_batch_tiles) == (offload, window, tiles)
    assert len(logs) == (offload == "model")  # what was chosen for one was not given up


def test_a_cpu_takes_short_tiles_one_by_one_unless_it_is_asked_otherwise() -> None:
    settings = fit_to(40, card=Card())
    assert (settings.offload, settings.window_frames, settings.max_batch_tiles) == ("none", 64, 1)
    settings = fit_to(40, "--window-frames", "512", "--max-batch-tiles", "2", "--offload", "model", card=Card())
    assert (settings.offload, settings.window_frames, settings.max_batch_tiles) == ("none", 512, 2)


def test_what_is_asked_for_is_kept_to_or_given_up_in_words() -> None:
    settings = fit_to(40, "--window-frames", "256", "--max-batch-tiles", "2", "--offload", "model")
    assert (settings.offload, settings.window_frames, settings.max_batch_tiles) == ("model", 256, 2)
    with capture_logs() as logs:
        settings = fit_to(1.3, "--window-frames", "1536", "--offload", "none")
    assert settings.window_frames == 128
    assert [log["what"] for log in logs] == ["window_frames: 1536 asked, 128 fits"]
    with pytest.raises(DoesNotFitError, match=r"gives vae 1\.00 GiB; oobleck in float32 needs at least 1\.23 GiB"):
        fit_to(1, "--offload", "none")
