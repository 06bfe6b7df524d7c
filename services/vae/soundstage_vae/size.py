"""A codec within its memory: how large it is, and how much of a song it may hold at once."""

from pathlib import Path
from typing import Final

from soundstage_budget.cards import Card
from soundstage_budget.checkpoint_size import count_parameters, file_bytes
from soundstage_budget.models import VaeModel
from soundstage_budget.plan import plan_vae
from soundstage_device.budget import tell_given_up
from soundstage_runtime.checkpoint import CheckpointError, read_json
from soundstage_vae.settings import VaeSettings

_STEPS_PER_FRAME: Final = (240, 60, 10, 1)  # of the layers below an eighth of the sample rate


def read_size(folder: Path) -> VaeModel:
    """Read the size of a checkpoint; raises CheckpointError."""
    config, counts = read_json(folder / "config.json"), count_parameters(folder)
    encoder, decoder = (
        sum(count for name, count in counts.items() if name.startswith(half)) for half in ("encoder.", "decoder.")
    )
    try:
        channels = max(int(config["encoder_hidden_size"]), int(config["decoder_channels"]))
        multiples = [int(multiple) for multiple in config["channel_multiples"][1:]]
        widest = max(multiple * steps for multiple, steps in zip(multiples, _STEPS_PER_FRAME, strict=True))
        return VaeModel(
            variant="oobleck",
            encoder_parameters=encoder,
            decoder_parameters=decoder,
            largest_tensor=max(counts.values()),
            channels=channels,
            frame_values=channels * widest,
            file_bytes=file_bytes(folder),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json lacks a usable {error}") from error


def fit(settings: VaeSettings, size: VaeModel, budget_bytes: int, *, dtype: str, card: Card) -> VaeSettings:
    """Return settings that fit a budget; raises DoesNotFitError when not even the shortest tile does."""
    plan = plan_vae(
        size,
        card,
        budget_bytes=budget_bytes,
        dtype=dtype,
        offload=settings.offload,
        window_frames=settings.window_frames,
        max_tiles=settings.max_batch_tiles,
        max_batch=settings.max_in_flight,
    )
    tell_given_up(plan.given_up)
    lowered = {
        "offload": plan.offload,
        "window_frames": plan.window_frames,
        "first_window_frames": min(settings.first_window_frames, plan.window_frames),
        "max_batch_tiles": plan.max_tiles,
        "max_in_flight": plan.max_batch,
    }
    return settings.model_copy(update=lowered)
