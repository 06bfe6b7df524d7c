"""Settings lowered to what a budget has room for; no network is loaded."""

from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from soundstage_budget.cards import Card
from soundstage_budget.models import DITS, DitModel
from soundstage_budget.need import KEPT_BYTES, need_dit
from soundstage_budget.plan import DoesNotFitError
from soundstage_dit.settings import DitSettings
from soundstage_dit.size import fit
from soundstage_runtime.settings import load_settings

GB = 10**9
CARD = Card(name="a card", memory_gib=40, capability=(8, 0))


def settings_of(*arguments: str) -> DitSettings:
    return load_settings(DitSettings, ["--model", "a", *arguments])


def fit_card(budget_gb: float, *arguments: str, models: tuple[str, ...] = ("turbo",)) -> DitSettings:
    sizes = [DITS[name] for name in models]
    return fit(settings_of(*arguments), sizes, round(budget_gb * GB), dtype="bfloat16", card=CARD)


def test_a_large_budget_lowers_nothing_but_what_songs_hold() -> None:
    asked = settings_of("--offload", "none")
    assert fit_card(40, "--offload", "none") == asked.model_copy(
        update={"max_songs_gb": fit_card(40).max_songs_gb, "max_tokens": asked.max_tokens, "quantization": "none"}
    )
    assert 0 < fit_card(40).max_songs_gb < asked.max_songs_gb
    assert fit_card(40).offload == "none"


@pytest.mark.parametrize(
    ("budget_gb", "offload", "max_duration_s"), [(8, "none", 600), (5, "model", 600), (3, "layer", 600)]
)
def test_weights_leave_the_card_before_songs_get_shorter(budget_gb: float, offload: str, max_duration_s: int) -> None:
    settings = fit_card(budget_gb)
    assert (settings.offload, settings.max_duration_s) == (offload, max_duration_s)


def test_what_is_asked_for_is_kept_to() -> None:
    settings = fit_card(5.5, "--offload", "layer", "--quantization", "int8", "--max-duration-s", "60")
    assert (settings.offload, settings.quantization, settings.max_duration_s) == ("layer", "int8", 60)
    with pytest.raises(
        DoesNotFitError, match=r"gpu_memory gives dit 2\.79 GiB; turbo in bfloat16 needs at least 6\.37 GiB"
    ):
        fit_card(3, "--offload", "none", "--quantization", "none")


def test_weights_are_rounded_where_that_is_left_open_and_all_else_would_not_do() -> None:
    assert fit_card(4, "--offload", "model").quantization == "int8"
    assert fit_card(40).quantization == "none"
    asked = settings_of("--offload", "model")
    with pytest.raises(DoesNotFitError, match="turbo in bfloat16 needs at least"):
        fit(asked, [DITS["turbo"]], 4 * GB, dtype="bfloat16", card=CARD, has_torchao=False)


def test_songs_are_no_longer_and_no_more_at_once_than_a_cards_tier_has_them() -> None:
    card = Card(name="a small card", memory_gib=3.8, capability=(8, 6))
    asked = settings_of("--max-duration-s", "600", "--max-in-flight", "8")
    with capture_logs() as logs:
        settings = fit(asked, [DITS["turbo"]], 3 * GB, dtype="bfloat16", card=card)
    assert (settings.max_duration_s, settings.max_in_flight, settings.max_batch) == (360, 1, 1)
    told = [log["what"] for log in logs]
    assert "longest song in seconds: 600 asked, 360 fits" in told
    assert "songs at once: 8 asked, 1 fits" in told


def test_songs_and_adapters_together_stay_within_the_budget() -> None:
    for budget_gb in (2.5, 3.0, 4.0, 6.0, 9.0, 20.0):
        settings = fit_card(budget_gb)
        need = need_dit(
            DITS["turbo"],
            dtype="bfloat16",
            quantization="none",
            offload=settings.offload if settings.offload != "auto" else "none",
            max_batch=settings.max_in_flight,
            max_duration_s=settings.max_duration_s,
            max_tokens=settings.max_tokens,
            on_card=True,
        )
        rest = need.total - need.kv
        assert rest + (settings.max_songs_gb + settings.max_adapters_gb) * GB <= budget_gb * GB


def test_two_models_on_a_card_share_what_one_leaves() -> None:
    settings = fit_card(12, models=("turbo", "sft"))
    assert settings.offload == "none"
    assert settings.max_models_gb is not None
    one_gb = (DITS["turbo"].parameters + sum(DITS["turbo"].beside)) * 2 / GB
    assert one_gb < settings.max_models_gb < 12
    assert fit_card(12, "--max-models-gb", "6.5", models=("turbo", "sft")).max_models_gb == 6.5


def test_a_cpu_holds_all_models_and_offloads_none() -> None:
    tiny = replace(DITS["turbo"], parameters=DITS["turbo"].parameters)
    sizes: list[DitModel] = [tiny, replace(tiny, variant="sft")]
    budget = 40 * GB
    together = fit(settings_of(), sizes, budget, dtype="float32", card=Card())
    assert (together.offload, together.max_models_gb) == ("none", None)
    assert together.max_kept_gb == KEPT_BYTES / 1e9
    with pytest.raises(DoesNotFitError, match="needs at least"):
        fit(settings_of(), sizes, 14 * GB, dtype="float32", card=Card())
    fit(settings_of(), sizes[:1], 14 * GB, dtype="float32", card=Card())
