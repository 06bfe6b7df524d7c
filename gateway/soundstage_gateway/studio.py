"""The studio: songs in the making, and those that are done."""

import asyncio
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import grpc
import structlog

from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_CANCELLED,
    SONG_STATE_COMPLETED,
    SONG_STATE_FAILED,
    SONG_STATE_RUNNING,
    STAGE_VAE,
    Accepted,
    Completed,
    GenerateSongRequest,
    GenerateSongResponse,
    Song,
    SongVariant,
    Stage,
)
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.tensor_pb2 import Tensor
from soundstage_gateway.assets import Assets
from soundstage_gateway.audio_file import Samples, clamp
from soundstage_gateway.codec import decode, encode
from soundstage_gateway.log import Log
from soundstage_gateway.material import Material, let_go, load_source
from soundstage_gateway.metrics import Metrics
from soundstage_gateway.models import choose_models
from soundstage_gateway.order import MAX_VARIANTS, Order, count_variants, read_order
from soundstage_gateway.shelf import Shelf
from soundstage_gateway.song_errors import (
    SongCancelledError,
    SongFailedError,
    SongUnknownError,
    SongWaitsError,
    first_error,
    write_error,
)
from soundstage_gateway.sound import OpenSound
from soundstage_gateway.splice import Splice
from soundstage_gateway.stages import Stages
from soundstage_gateway.store import PREFIX, KeptSong, Store
from soundstage_gateway.tape import Tape, Tapes
from soundstage_gateway.variant import Heard, Variant
from soundstage_runtime.admission import Admission
from soundstage_runtime.call import detach, name_song
from soundstage_runtime.pcm import FRAMES_PER_CHUNK
from soundstage_runtime.score import LATENT_CHANNELS, MAX_REFERENCES, SAMPLE_RATE_HZ, SAMPLES_PER_LATENT
from soundstage_runtime.validation import Checks

_log = structlog.get_logger()

_SWEEP_S: Final = 60.0
_RESUME_S: Final = 1.0
_PASSING: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)
_VARIANT: Final = re.compile(f"[0-{MAX_VARIANTS - 1}]")


@dataclass(slots=True, kw_only=True)
class Making:
    """A song in the making."""

    kept: KeptSong
    order: Order
    material: Material
    fingerprints: Mapping[Stage.ValueType, str]
    places: AsyncExitStack
    log: Log = field(default_factory=Log)
    work: asyncio.Task[None] = field(init=False)
    end: asyncio.Task[None] = field(init=False)


class Studio:
    """Makes songs, `admission` of them at once, and keeps them for `keep_s`."""

    def __init__(
        self,
        stages: Stages,
        admission: Admission,
        assets: Assets,
        store: Store,
        tapes: Tapes,
        shelf: Shelf,
        metrics: Metrics,
        *,
        keep_s: float,
    ) -> None:
        self._stages = stages
        self._admission = admission
        self._assets = assets
        self._store = store
        self._tapes = tapes
        self._shelf = shelf
        self._metrics = metrics
        self._keep_s = keep_s
        self._makings: dict[str, Making] = {}
        self._waiting: dict[str, KeptSong] = {}  # written down, and not begun, or not again
        self._sweeping: asyncio.Task[None] | None = None
        self._resuming: asyncio.Task[None] | None = None

    @property
    def max_variants(self) -> int:
        """The most variants of one song: more than there are places could never be made."""
        return min(MAX_VARIANTS, self._admission.limit)

    async def open(self) -> None:
        """Begin again what a process before this one has not ended."""
        await self._store.open()
        self._waiting = {kept.name: kept for kept in await self._store.running()}
        self._sweeping = asyncio.create_task(self._sweep_often())
        left = [name for name in list(self._waiting) if not await self._resume(name)]
        self._resuming = asyncio.create_task(self._resume_often(left))

    async def close(self) -> None:
        """Stop all songs; those that are detached are begun again when the studio opens again."""
        for task in (self._sweeping, self._resuming):
            if task is not None:
                task.cancel()
        for making in list(self._makings.values()):
            await self._stop(making, for_good=not making.kept.is_detached)
        self._tapes.close()
        await self._store.close()

    async def begin(
        self, request: GenerateSongRequest, *, request_id: str | None = None, is_detached: bool = False
    ) -> Making:
        """Accept a song and begin it; raises ServiceError, InvalidRequestError naming every bad field."""
        async with AsyncExitStack() as places:
            name = f"{PREFIX}{uuid.uuid4().hex}"
            try:
                order, fingerprints, material = await self._accept(name, request, places)
            except BaseException:
                self._store.discard(name)
                raise
            song = Song(name=name, state=SONG_STATE_RUNNING, variants=[SongVariant(seed=seed) for seed in order.seeds])
            song.request.CopyFrom(request)
            song.request.seeds[:] = order.seeds
            song.create_time.GetCurrentTime()
            song.expire_time.FromNanoseconds(song.create_time.ToNanoseconds() + round(self._keep_s * 1e9))
            kept = KeptSong(song=song, request_id=request_id, is_detached=is_detached)
            kept.model_fingerprint = fingerprints[STAGE_VAE]
            making = Making(kept=kept, order=order, material=material, fingerprints=fingerprints, places=places)
            self._waiting[name] = kept
            try:
                await self._store.add(kept)
            except BaseException as error:
                if is_detached and isinstance(error, asyncio.CancelledError):
                    self._start(making)  # it outlives its call, and whoever asks again finds it
                else:
                    self._waiting.pop(name, None)
                    await self._store.remove(name)
                raise
            if not self._start(making):
                raise SongCancelledError("the song was cancelled before it was begun")
            return making

    async def _accept(
        self, name: str, request: GenerateSongRequest, places: AsyncExitStack
    ) -> tuple[Order, dict[Stage.ValueType, str], Material]:
        """Take a place for each variant, then read the order, choose the models, and gather what they need.

        What is gathered already is used again. Raises ServiceError.
        """
        await places.enter_async_context(self._admission.enter(min(count_variants(request), self.max_variants)))
        folder = self._store.folder_of(name)
        material = Material.read(folder)
        sounds = {} if material else await self._find_sounds(request)
        known = material.sounds if material else sounds
        order = read_order(request, known, draw_seed=lambda: secrets.randbits(32), max_variants=self.max_variants)
        fingerprints = await choose_models(self._stages, order)
        if material is None:
            found = {sound: opened for sound, opened in sounds.items() if opened}
            material = await Material.gather(folder, order, found)
        return order, fingerprints, material

    async def find(self, name: str) -> KeptSong:
        """Return a song; raises SongUnknownError."""
        making = self._makings.get(name)
        kept = making.kept if making else self._waiting.get(name) or await self._store.find(name)
        if kept is None:
            raise SongUnknownError(
                f"song is {name[:64]!r}, which is not kept here, or no longer; "
                "give a name from `accepted` or from ListSongs"
            )
        return kept

    async def find_variant(self, name: str, variant: int) -> KeptSong:
        """Return a song that has such a variant; raises SongUnknownError, InvalidRequestError."""
        kept = await self.find(name)
        if variant >= len(kept.song.variants):
            checks = Checks()
            checks.refuse("variant", f"is {variant}; {name} has variants 0 to {len(kept.song.variants) - 1}")
            checks.finish()
        return kept

    async def find_request(self, request_id: str) -> KeptSong | None:
        """Return the song that a request has begun before; None when it has not."""
        kept = await self._store.find_request(request_id)
        return await self.find(kept.name) if kept else None

    async def page(self, size: int, *, before: int | None) -> tuple[list[KeptSong], int | None]:
        """Return a page of songs as Store.page does."""
        page, last = await self._store.page(size, before=before)
        known = self._waiting | {name: making.kept for name, making in self._makings.items()}
        return [known.get(kept.name, kept) for kept in page], last

    async def watch(self, name: str, *, after: int | None = None) -> AsyncGenerator[GenerateSongResponse, None]:
        """Yield a song's events but its audio; raises ServiceError, at the end the song's own."""
        kept = await self.find(name)
        async with aclosing(self._log_of(kept).follow(after)) as events:
            async for event in events:
                yield event

    async def cancel(self, name: str) -> KeptSong:
        """Stop a song, if it is still made, and return what is left of it; raises SongUnknownError."""
        kept = await self.find(name)
        if name in self._makings:
            await self.stop(self._makings[name])
        elif self._waiting.pop(name, None):
            kept.song.state = SONG_STATE_CANCELLED
            await self._write_end(kept)
        return kept

    async def stop(self, making: Making) -> None:
        """Stop a song that is still made."""
        if making.kept.name in self._makings:
            await self._stop(making, for_good=True)

    async def delete(self, name: str) -> None:
        """Stop a song and forget it; raises SongUnknownError."""
        await self.cancel(name)
        self._makings.pop(name, None)
        self._tapes.remove(name)
        self._shelf.remove(name)
        await self._store.remove(name)

    @asynccontextmanager
    async def tape(self, name: str, variant: int) -> AsyncGenerator[Tape, None]:
        """Hold a variant's tape as soon as it can be played; raises ServiceError."""
        kept = await self.find_variant(name, variant)
        if not kept.song.variants[variant].frame_count:
            async with aclosing(self.watch(name)) as events:
                async for event in events:
                    if event.HasField("completed") and event.variant == variant:
                        break

        async def decode_range(start: int, stop: int) -> AsyncGenerator[Samples, None]:
            try:
                latents = await asyncio.to_thread(self._store.read_latents, name, variant)
                folder = self._store.folder_of(name)
                splice = Splice.read(folder)
                source = load_source(folder) if splice else None
            except FileNotFoundError as error:
                raise SongUnknownError(f"{name} is not kept any more") from error
            async with aclosing(decode(self._stages, latents, kept.model_fingerprint, start, stop)) as pieces:
                async for piece in pieces:
                    yield piece if splice is None or source is None else splice.apply(piece, source, start)
                    start += len(piece)

        with self._tapes.hold(name, variant, kept.song.variants[variant].frame_count, decode_range) as tape:
            yield tape

    async def find_peak(self, name: str, variant: int, tape: Tape) -> float:
        """Return the peak of a whole variant, and note it for the next time; raises ServiceError."""
        peak = (await self.find(name)).peaks[variant]
        if peak is None:
            peak = await tape.find_peak()
            kept = await self.find(name)
            kept.peaks[variant] = peak
            await self._store.update(kept)
        return peak

    def _start(self, making: Making) -> bool:
        """Begin a song that waits; False where it does not any more, as it was cancelled or deleted."""
        if not self._waiting.pop(making.kept.name, None):
            return False
        name_song(making.kept.name)
        if making.kept.is_detached:
            detach()
        making.places = making.places.pop_all()
        self._makings[making.kept.name] = making
        making.kept.handles = [""] * len(making.order.seeds)
        making.kept.peaks = [None] * len(making.order.seeds)
        accepted = Accepted(song=making.kept.name, seeds=making.order.seeds, songs_in_flight=self._admission.in_flight)
        making.log.append(GenerateSongResponse(accepted=accepted))
        making.work = asyncio.create_task(self._make(making))
        making.end = asyncio.create_task(self._conclude(making))
        return True

    async def _resume(self, name: str) -> bool:
        """Begin a song of an earlier process again, with its seeds; False where that may go better later."""
        kept, error = self._waiting.get(name), None
        if kept is None:
            return True
        if kept.is_detached:
            try:
                async with AsyncExitStack() as places:
                    order, fingerprints, material = await self._accept(name, kept.song.request, places)
                    self._start(
                        Making(kept=kept, order=order, material=material, fingerprints=fingerprints, places=places)
                    )
                return True
            except Exception as failure:
                error = first_error(failure)
                if error.code in _PASSING:
                    return False
        if self._waiting.pop(name, None):
            kept.song.state = SONG_STATE_FAILED if error else SONG_STATE_CANCELLED
            if error:
                kept.song.error.CopyFrom(write_error(error))
            await self._write_end(kept)
        return True

    async def _resume_often(self, names: list[str]) -> None:
        """Begin songs again as soon as the stages are there and there is room."""
        while names:
            await asyncio.sleep(_RESUME_S)
            names = [name for name in names if not await self._resume(name)]

    async def _make(self, making: Making) -> None:
        """Run the variants side by side; the first error ends them all."""
        started_s = time.monotonic()
        source = await self._hear_source(making)
        async with asyncio.TaskGroup() as group:
            for number in range(len(making.order.seeds)):
                group.create_task(self._make_variant(making, number, source))
        # A place is likely to be free again after one song's share of the time all places take.
        self._admission.retry_after_s = max(0.5, (time.monotonic() - started_s) / self._admission.limit)

    async def _conclude(self, making: Making) -> None:
        """Wait for a song's end, however it ends, and write it down."""
        await asyncio.wait({making.work})
        await making.places.aclose()
        kept, error = making.kept, None
        kept.events = making.log.events
        if making.work.cancelled():
            kept.song.state, error = SONG_STATE_CANCELLED, SongCancelledError("the song was cancelled")
        elif failure := making.work.exception():
            error = first_error(failure)
            kept.song.state = SONG_STATE_FAILED
            kept.song.error.CopyFrom(write_error(error))
        else:
            kept.song.state = SONG_STATE_COMPLETED
        is_written = True
        if kept.name in self._makings:  # else it is stopped for now, and begun again later
            try:
                await self._write_end(kept)
            except Exception:  # a full disk, say: this process still knows the song, and the next begins it again
                _log.exception("song_not_written", song=kept.name)
                is_written = False
        making.log.close(error)
        if is_written:
            self._makings.pop(kept.name, None)

    async def _write_end(self, kept: KeptSong) -> None:
        """Write down how a song has ended, and let go what it does not need any more."""
        self._metrics.count_song(kept.song)
        can_be_played = any(variant.frame_count for variant in kept.song.variants)
        let_go(self._store.folder_of(kept.name), keeps_splice=can_be_played)
        await self._store.update(kept)

    async def _make_variant(self, making: Making, number: int, source: Heard) -> None:
        order, kept = making.order, making.kept
        variant = Variant(
            order,
            order.seeds[number],
            source=source,
            references=making.material.references(order, number),
            stages=self._stages,
            fingerprints=making.fingerprints,
        )
        card = kept.song.variants[number]
        async with aclosing(variant.events()) as events:
            async for event in events:
                event.variant = number
                if event.HasField("plan"):
                    card.plan.CopyFrom(event.plan)
                making.log.append(event)
        first = variant.latents[0].tensor
        num_latents = sum(chunk.tensor.shape[0] for chunk in variant.latents)
        data = b"".join(chunk.tensor.data for chunk in variant.latents)
        latents = Tensor(data_type=first.data_type, shape=[num_latents, LATENT_CHANNELS], data=data)
        await asyncio.to_thread(self._store.write_latents, kept.name, number, latents)
        kept.handles[number] = variant.handle
        card.frame_count = num_latents * SAMPLES_PER_LATENT
        card.timings.extend(variant.timings)
        metadata = SongMetadata()
        metadata.CopyFrom(variant.metadata)
        metadata.duration_s = card.frame_count / SAMPLE_RATE_HZ
        completed = Completed(
            song=kept.name,
            seed=variant.seed,
            metadata=metadata,
            timings=variant.timings,
            frame_count=card.frame_count,
        )
        making.log.append(GenerateSongResponse(variant=number, completed=completed))

    async def _stop(self, making: Making, *, for_good: bool) -> None:
        """End a song's task and wait for it. A song that is not stopped for good stays as running in the store."""
        if not for_good:
            self._makings.pop(making.kept.name, None)
        making.work.cancel()
        await asyncio.wait({making.end})

    def _log_of(self, kept: KeptSong) -> Log:
        """Return the log that a song writes, or the one it has left."""
        if kept.name in self._makings:
            return self._makings[kept.name].log
        if kept.song.state == SONG_STATE_RUNNING:
            raise SongWaitsError(f"{kept.name} waits until it is begun", retry_after_s=_RESUME_S)
        log = Log()
        log.events = kept.events
        error = kept.song.error
        if kept.song.state == SONG_STATE_FAILED:
            failed = SongFailedError(error.message, metadata={"song_reason": error.reason})
            failed.code = next(code for code in grpc.StatusCode if code.value[0] == error.code)
            log.close(failed)
        elif kept.song.state == SONG_STATE_CANCELLED:
            log.close(SongCancelledError("the song was cancelled"))
        else:
            log.close()
        return log

    async def _find_sounds(self, request: GenerateSongRequest) -> dict[str, OpenSound | None]:
        """Find what a request's source and references name: assets, and songs; None for one without audio."""
        found: dict[str, OpenSound | None] = {}
        for name in {request.source, *request.references[:MAX_REFERENCES]}:
            if name.startswith(PREFIX):
                with suppress(SongUnknownError):  # refused as an asset is: by the field that names it
                    found[name] = await self._open_song(name)
            elif asset := self._assets.find(name):
                found[name] = OpenSound.of(asset)
        return found

    async def _open_song(self, name: str) -> OpenSound | None:
        """Find a song's variant, to be heard as a file of it would be; None while it is not made.

        Raises SongUnknownError.
        """
        song, _, variant = name.partition("/variants/")
        variants = (await self.find(song)).song.variants
        number = int(variant or 0) if _VARIANT.fullmatch(variant or "0") else MAX_VARIANTS
        if number >= len(variants):
            raise SongUnknownError(f"{song[:64]!r} has no variant {variant[:16]!r}")
        if not variants[number].frame_count:
            return None

        async def read(start: int, stop: int) -> AsyncGenerator[Samples, None]:
            async with self.tape(song, number) as tape, aclosing(tape.read(start, stop)) as pieces:
                async for piece in pieces:
                    yield clamp(piece)

        return OpenSound(num_frames=variants[number].frame_count, read=read)

    async def _hear_source(self, making: Making) -> Heard:
        """Encode the source, once for all variants."""
        order, canvas = making.order, making.order.source
        if canvas is None or making.material.sounds[order.source_name].is_silent:
            return Heard()
        started_s = time.monotonic()
        latents = await encode(
            self._stages,
            canvas.pieces(making.material.source(), FRAMES_PER_CHUNK),
            canvas.num_frames,
            model_fingerprint=making.fingerprints[STAGE_VAE],
        )
        return Heard(latents=tuple(latents), took_s=time.monotonic() - started_s)

    async def sweep(self) -> None:
        """Forget what has expired, and what there is no room for."""
        now_s = time.time()
        for kept in list(self._waiting.values()):
            if kept.song.expire_time.ToMilliseconds() / 1000 <= now_s:
                await self.delete(kept.name)
        for name in await self._store.sweep(now_s):
            self._tapes.remove(name)
            self._shelf.remove(name)
            _log.info("song_forgotten", song=name)

    async def _sweep_often(self) -> None:
        while True:
            try:
                await self.sweep()
            except Exception:  # a locked database, say, may do next time
                _log.exception("sweep_failed")
            await asyncio.sleep(_SWEEP_S)
