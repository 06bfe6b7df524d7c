"""Material: what a song is made from of its source and its references, in the song's folder until it is made."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final, Self

import numpy as np

from soundstage_gateway.audio_file import Samples, is_silent
from soundstage_gateway.disk import tell_full_disk
from soundstage_gateway.hearing import REFERENCE_FRAMES, reference_windows
from soundstage_gateway.order import Order
from soundstage_gateway.sound import OpenSound, Sound
from soundstage_gateway.splice import Splice
from soundstage_runtime.score import CHANNELS
from soundstage_runtime.validation import Checks

_SOURCE: Final = "source.npy"
_REFERENCES: Final = "references.npy"
_SOUNDS: Final = "sounds.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What is known of the sounds that a song names; their samples, as far as they are needed, stay in its folder."""

    folder: Path
    sounds: Mapping[str, Sound]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Find what `gather` has written; None when there is nothing, or not all."""
        file = folder / _SOUNDS
        if not file.exists():
            return None
        sounds = {name: Sound(**sound) for name, sound in json.loads(file.read_text()).items()}
        return cls(folder=folder, sounds=sounds)

    @classmethod
    async def gather(cls, folder: Path, order: Order, sounds: Mapping[str, OpenSound]) -> Self:
        """Write what an order needs of the sounds that it names; raises ServiceError."""
        known = {name: Sound(num_frames=sound.num_frames, is_silent=sound.is_silent) for name, sound in sounds.items()}
        if order.source or order.references:
            folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  as quick as all its callers' ways
            with tell_full_disk("a song's source"):
                if order.source:
                    is_quiet = await _write_source(folder / _SOURCE, sounds[order.source_name])
                    known[order.source_name] = replace(known[order.source_name], is_silent=is_quiet)
                if order.splice:
                    order.splice.write(folder)
                if order.references:
                    await _write_references(folder / _REFERENCES, order, [sounds[name] for name in order.references])
                # It comes last, and says that all is there.
                notes = {name: asdict(sound) for name, sound in known.items()}
                (folder / _SOUNDS).write_text(json.dumps(notes))
        return cls(folder=folder, sounds=known)

    def source(self) -> Samples:
        """Return the source's samples [n, 2]."""
        return load_source(self.folder)

    def references(self, order: Order, variant: int) -> Sequence[Samples]:
        """Return what a variant hears of each reference, its windows [n, 2] one behind another."""
        if not order.references:
            return ()
        return list(np.load(self.folder / _REFERENCES, mmap_mode="r")[:, variant])


def load_source(folder: Path) -> Samples:
    """Return the samples of a song's source; they stay on disk."""
    return np.load(folder / _SOURCE, mmap_mode="r")


def let_go(folder: Path, *, keeps_splice: bool) -> None:
    """Delete what a song that has ended needs no more; its splice needs the source."""
    names = [_SOUNDS, _REFERENCES]
    if not (keeps_splice and Splice.read(folder)):
        Splice.remove(folder)
        names.append(_SOURCE)
    for name in names:
        (folder / name).unlink(missing_ok=True)


async def _write_source(path: Path, sound: OpenSound) -> bool:
    """Write a sound as it is read; return whether nothing can be heard in it."""
    with path.open("wb") as file:
        _write_header(file, (sound.num_frames, CHANNELS))
        return await _write(file, sound.read(0, sound.num_frames))


async def _write_references(path: Path, order: Order, sounds: Sequence[OpenSound]) -> None:
    """Write what each variant hears of each sound; raises InvalidRequestError where that is nothing."""
    checks = Checks()
    with path.open("wb") as file:
        _write_header(file, (len(sounds), len(order.seeds), REFERENCE_FRAMES, CHANNELS))
        for index, sound in enumerate(sounds):
            heard = [await _write(file, reference_windows(sound, seed=seed + (index << 32))) for seed in order.seeds]
            if all(heard):
                checks.refuse(
                    f"references[{index}]", f"is {order.references[index]}, which is silent; give one that can be heard"
                )
    checks.finish()


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """Begin a file as numpy.save does, for samples that follow."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


async def _write(file: BinaryIO, pieces: AsyncGenerator[Samples, None]) -> bool:
    """Write pieces [n, 2] as they come; return whether nothing can be heard in any."""
    is_quiet = True
    async with aclosing(pieces):
        async for piece in pieces:
            is_quiet = is_quiet and is_silent(piece)
            await asyncio.to_thread(file.write, np.ascontiguousarray(piece).data)
    return is_quiet
