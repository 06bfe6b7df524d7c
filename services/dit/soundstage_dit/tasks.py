"""What a task shows the transformer: from a Song to its conditions on the device."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.song import Cover, Edit, Lego, Repaint, Song, TextToMusic
from soundstage_dit.trajectory import Conditions, Prepared
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import ServiceError

_MADE, _KEPT, _LEFT_TO_THE_MODEL = 1.0, 0.0, 2.0


class SourceError(ServiceError):
    """A source led to numbers that are not finite."""

    reason = "SOURCE_FAILED"


def prepare(song: Song, model: LoadedModel, adaptations: Sequence[Adaptation] = ()) -> Prepared:
    """Encode a song's words, codes and sources. One song at a time, so that none changes another.

    Raises SourceError.
    """

    def under(context: Tensor, words: Tensor) -> Conditions:
        return Conditions(
            context=context, memory=model.dit.remember(words, adaptations), adaptations=tuple(adaptations)
        )

    source = source_of(song, model)
    context = context_of(song, source, model)
    is_guided = song.diffusion.guidance.scale > 1
    # One token is no words at all, however many the words are: attention to equal tokens is equal to each.
    prepared = Prepared(
        channels=model.channels,
        conditional=under(context, model.conditioner.encode(song)),
        unconditional=under(context, model.null_condition) if is_guided else None,
        source=source if isinstance(song.task, Cover | Repaint | Edit) else None,
    )
    match song.task:
        case Edit(source_caption=caption, source_lyrics=lyrics):
            told = replace(song, caption=caption, lyrics=lyrics)
            return replace(prepared, told=under(context, model.conditioner.encode(told)))
        case Cover(strength=strength) if strength < 1:
            alone = replace(song, task=TextToMusic(), codes=(), source=None)
            bare = context_of(alone, source_of(alone, model), model)
            return replace(
                prepared,
                words=under(bare, model.conditioner.encode(alone)),
                words_unconditional=under(bare, model.null_condition) if is_guided else None,
            )
        case _:
            return prepared


def source_of(song: Song, model: LoadedModel) -> Tensor:
    """Return the latents a song is made over, [frames, channels], float32: of its codes, else its source, else silence.

    Frames beyond the codes get silence, from its first frame on.
    """
    if song.codes:
        codes = torch.tensor(song.codes, device=model.device)
        hints: Tensor = model.code_decoder(codes)[: song.num_frames]
        return torch.cat([hints, silence_of(model, song.num_frames - len(hints))]).float()
    if song.source is not None:
        return torch.from_numpy(song.source).to(model.device)
    return silence_of(model, song.num_frames).float()


def context_of(song: Song, source: Tensor, model: LoadedModel) -> Tensor:
    """Return what the transformer is shown of a source [frames, channels], and of what to make: [frames, 2 x channels].

    Raises SourceError.
    """
    shown = _shown(song, source, model).to(model.silence.dtype)
    return torch.cat([shown, _mask(song, shown)], dim=-1)


def silence_of(model: LoadedModel, num_frames: int) -> Tensor:
    """Return silence [frames, channels]; where there is no more of it, it begins anew."""
    return model.silence[torch.arange(num_frames, device=model.device) % len(model.silence)]


def _shown(song: Song, source: Tensor, model: LoadedModel) -> Tensor:
    match song.task:
        case Cover(from_latents=False) if not song.codes:
            return _melody(source, model)
        case Edit(context="codes"):
            return _melody(source, model)
        case Edit(context="silence"):
            return silence_of(model, len(source))
        case Repaint(start=start, end=end):
            return torch.cat([source[:start], silence_of(model, end)[start:].float(), source[end:]])
        case _:
            return source


def _melody(source: Tensor, model: LoadedModel) -> Tensor:
    """Send a source [frames, channels] through the codes and back, which leaves its melody."""
    codes = model.code_encoder(source, model.silence)
    if (codes < 0).any():
        raise SourceError("the source's codes are not finite: its latents are too large, or float16 is too narrow")
    return model.code_decoder(codes)[: len(source)]


def _mask(song: Song, shown: Tensor) -> Tensor:
    if not song.diffusion.is_mask_explicit:
        return torch.full_like(shown, _LEFT_TO_THE_MODEL)
    match song.task:
        case Repaint(start=start, end=end) | Lego(start=int(start), end=int(end)):
            mask = torch.full_like(shown, _KEPT)
            mask[start:end] = _MADE
            return mask
        case _:
            return torch.full_like(shown, _MADE)
