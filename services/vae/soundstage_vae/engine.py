"""Whole songs through the codec, tile by tile on the worker."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import numpy as np
from numpy.typing import NDArray

from soundstage_runtime.score import SAMPLES_PER_LATENT
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec, draw_noise
from soundstage_vae.stretch import Stretch
from soundstage_vae.tiling import DECODE_CONTEXT, ENCODE_CONTEXT, plan_tiles, touching


class VaeEngine:
    """Streams songs through a codec, several in turns of a tile each. A closed stream asks for no more tiles."""

    def __init__(self, codec: Codec, worker: Worker, *, windows: Sequence[int]) -> None:
        """Decode in windows of the lengths `windows`, one after another, and encode in windows of the last."""
        self._codec, self._worker = codec, worker
        self._windows = windows

    @property
    def fingerprint(self) -> str:
        """Name the loaded model."""
        return self._codec.fingerprint

    async def decode(
        self, latents: AsyncIterator[NDArray[np.float32]], num_frames: int, wanted: range
    ) -> AsyncGenerator[NDArray[np.float32]]:
        """Yield the wanted samples [n, 2] of a song of `num_frames` latents [frames, 64].

        Each tile comes as soon as its latents have. Tiles that hold nothing wanted are not computed.
        """
        stretch = Stretch(latents)
        tiles = plan_tiles(num_frames, windows=self._windows, context=DECODE_CONTEXT)
        for tile in touching(tiles, wanted):
            window = await stretch.read(tile.window_start, tile.window_stop)
            samples = await self._worker.run(self._codec.decode, window)
            yield samples[tile.keep(wanted)]

    async def encode(
        self, audio: AsyncIterator[NDArray[np.float32]], num_samples: int, seed: int | None
    ) -> AsyncGenerator[NDArray[np.float32]]:
        """Yield latents [frames, 64] of `num_samples` samples [n, 2]: drawn with `seed`, or the posterior's mean."""
        stretch = Stretch(audio)
        num_frames = num_samples // SAMPLES_PER_LATENT
        noise = None if seed is None else draw_noise(num_frames, seed)
        for tile in plan_tiles(num_frames, windows=self._windows[-1:], context=ENCODE_CONTEXT):
            # Samples past the last whole frame give no frame of their own, but the last frames hear them.
            end = num_samples if tile.window_stop == num_frames else tile.window_stop * SAMPLES_PER_LATENT
            window = await stretch.read(tile.window_start * SAMPLES_PER_LATENT, end)
            mean, deviation = await self._worker.run(self._codec.encode, window)
            core = slice(tile.core_start - tile.window_start, tile.core_stop - tile.window_start)
            drawn = 0.0 if noise is None else deviation[core] * noise[tile.core_start : tile.core_stop]
            yield mean[core] + drawn

    def close(self) -> None:
        """End the worker; waits for the tile in hand."""
        self._worker.close()
