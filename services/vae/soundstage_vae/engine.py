"""Whole songs through the codec, tile by tile, as the scheduler lets them."""

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from soundstage_runtime.score import SAMPLE_RATE_HZ, SAMPLES_PER_LATENT
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec, draw_noise
from soundstage_vae.scheduler import Order, TileScheduler, Work
from soundstage_vae.stretch import Stretch
from soundstage_vae.tiling import DECODE_CONTEXT, ENCODE_CONTEXT, plan_tiles, touching, usual_cores

_CORES_AT_ONCE: Final = 256


class VaeEngine:
    """Streams songs through a codec. A closed stream asks for no more tiles."""

    def __init__(
        self,
        codec: Codec,
        worker: Worker,
        *,
        windows: Sequence[int],
        batches: Mapping[int, int] | None = None,
        order: Order = "earliest-dry",
    ) -> None:
        """Decode in windows of the lengths `windows`, one after another, and encode in windows of the last.

        Songs that decode at the same time share a forward, up to so many windows of a length as `batches` says.
        """
        self._codec, self._worker, self._windows = codec, worker, windows
        self._scheduler = TileScheduler(worker, order=order)
        self._batches = batches or {}
        # Tiles share a forward where they have the same one: see Work.
        self._decode = lru_cache(_CORES_AT_ONCE)(self._make_decoding)
        self._encode = Work(run=lambda windows: [codec.encode(window) for window in windows])

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
        stretch, stream = Stretch(latents), self._scheduler.open()
        tiles = plan_tiles(num_frames, windows=self._windows, context=DECODE_CONTEXT)
        for tile in touching(tiles, wanted):
            window = await stretch.read(tile.window_start, tile.window_stop)
            decoded = await self._scheduler.run(stream, self._decode(len(window), tile.core), window)
            samples = decoded[tile.keep(wanted)]
            self._scheduler.hand_on(stream, len(samples) / SAMPLE_RATE_HZ)
            yield samples

    async def encode(
        self, audio: AsyncIterator[NDArray[np.float32]], num_samples: int, seed: int | None
    ) -> AsyncGenerator[NDArray[np.float32]]:
        """Yield latents [frames, 64] of `num_samples` samples [n, 2]: drawn with `seed`, or the posterior's mean."""
        stretch, stream = Stretch(audio), self._scheduler.open()
        num_frames = num_samples // SAMPLES_PER_LATENT
        noise = None if seed is None else draw_noise(num_frames, seed)
        for tile in plan_tiles(num_frames, windows=self._windows[-1:], context=ENCODE_CONTEXT):
            # Samples past the last whole frame give no frame of their own, but the last frames hear them.
            end = num_samples if tile.window_stop == num_frames else tile.window_stop * SAMPLES_PER_LATENT
            window = await stretch.read(tile.window_start * SAMPLES_PER_LATENT, end)
            mean, deviation = await self._scheduler.run(stream, self._encode, window)
            core = slice(tile.core.start, tile.core.stop)
            drawn = 0.0 if noise is None else deviation[core] * noise[tile.core_start : tile.core_stop]
            # Nobody listens to latents: after each tile the stream is as one that has just come.
            self._scheduler.hand_on(stream, 0.0)
            yield mean[core] + drawn

    def _make_decoding(self, window_frames: int, core: range) -> Work[NDArray[np.float32]]:
        is_usual = core in usual_cores(window_frames, DECODE_CONTEXT)
        return Work(run=partial(self._codec.decode_batch, core=core), batches=self._batches if is_usual else {})

    def close(self) -> None:
        """End the worker; waits for the tile in hand."""
        self._worker.close()
