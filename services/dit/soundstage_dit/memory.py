"""How much of the device's memory a song takes while it is made, and how much of a step there is memory for."""

from typing import Final

from soundstage_budget.need import LAYERS_AT_ONCE, song_bytes, velocity_tokens
from soundstage_dit.conditioning import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS
from soundstage_dit.residence import weight_bytes
from soundstage_dit.size import transformer_shape
from soundstage_dit.song import Cover, Edit, Song
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.score import REFERENCE_LATENTS

_FRAME_TOKENS: Final = 32  # what the prompt puts around lyrics


def estimate_bytes(song: Song, model: LoadedModel) -> int:
    """Estimate, from above, what a song's latents, contexts and conditions take; not what one step does."""
    shape = model.dit.shape
    return song_bytes(
        transformer_shape(shape.stack),
        num_frames=song.num_frames,
        num_conditions=_max_conditions(song),
        itemsize=model.silence.element_size(),
        channels=shape.channels,
        context_channels=shape.in_channels - shape.channels,
        sets=_num_conditions(song),
        reference_frames=len(song.references) * REFERENCE_LATENTS,
    )


def tokens_that_fit(model: LoadedModel, free_bytes: float) -> float:
    """Return how many tokens a step has room for on a device that has so much free, by the formula of the plan."""
    layers = model.dit.layers[:LAYERS_AT_ONCE]
    is_offloaded = layers[0].scale_shift_table.device.type != model.device.type
    to_come = sum(map(weight_bytes, layers)) if is_offloaded else 0
    shape = transformer_shape(model.dit.shape.stack)
    return velocity_tokens(shape, free_bytes=free_bytes - to_come, itemsize=model.silence.element_size())


def _num_conditions(song: Song) -> int:
    """Count the sets of conditions with words; those without take one vector, and no context of their own."""
    is_switched = isinstance(song.task, Cover) and song.task.strength < 1
    return 2 if is_switched or isinstance(song.task, Edit) else 1


def _max_conditions(song: Song) -> int:
    """Count the tokens of words and lyrics at most, a byte each, and a timbre for each reference."""
    lyrics = min(MAX_LYRIC_TOKENS, len(song.lyrics.encode()) + _FRAME_TOKENS)
    return MAX_TEXT_TOKENS + lyrics + max(1, len(song.references))
