"""DitService over real gRPC: a tiny model behind it, or a denoiser that does just what a test wants."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status
from numpy.typing import NDArray

from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseSetup
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.task_pb2 import Cover, Extract, Task
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_dit.adapters import Loan
from soundstage_dit.alignment import Alignment
from soundstage_dit.engine import DitEngine
from soundstage_dit.request import read_song
from soundstage_dit.servicer import warm_up
from soundstage_dit.song import Song
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.tensors import from_proto, to_proto

from .conftest import TURBO, Serving, card_of

if TYPE_CHECKING:
    from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceAsyncStub


class Stuck:
    """A denoiser that does one step and then waits for ever."""

    def __init__(self) -> None:
        self.num_songs = 0
        self.was_left = asyncio.Event()

    async def denoise(self, song: Song, adapters: Loan) -> AsyncGenerator[int | NDArray[np.float32]]:
        self.num_songs += 1
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            self.num_songs -= 1
            self.was_left.set()

    async def tokenize(
        self, latents: AsyncIterator[NDArray[np.float32]], model: str
    ) -> AsyncGenerator[NDArray[np.int64]]:
        async for _ in latents:
            yield np.zeros(1, np.int64)

    async def align(self, song: Song, latents: NDArray[np.float32], adapters: Loan) -> Alignment:
        return Alignment(lines=(), score=0.0)


def setup_of(**fields: object) -> DenoiseSetup:
    """A good setup, with `fields` set."""
    setup = DenoiseSetup(caption="a calm piano", lyrics="la", latent_frames=600, seed=1)
    setup.MergeFrom(DenoiseSetup(**fields))  # pyright: ignore[reportArgumentType]
    return setup


def only(setup: DenoiseSetup) -> Iterator[DenoiseRequest]:
    """The requests of a song without a source."""
    return iter([DenoiseRequest(setup=setup)])


async def collect(stub: "DitServiceAsyncStub", setup: DenoiseSetup) -> list[DenoiseResponse]:
    """All responses of a call."""
    return [response async for response in stub.Denoise(only(setup))]


def chunks_of(latents: NDArray[np.float32], cut: int) -> list[LatentChunk]:
    """Latents [frames, 64] in two runs."""
    return [
        LatentChunk(first_frame=start, tensor=to_proto(latents[start:end]))
        for start, end in ((0, cut), (cut, len(latents)))
    ]


def with_sources(
    setup: DenoiseSetup, source: NDArray[np.float32], references: NDArray[np.float32], *, cut: int
) -> list[DenoiseRequest]:
    """The requests of a song with a source and references, both in two runs."""
    return [
        DenoiseRequest(setup=setup),
        *(DenoiseRequest(source=chunk) for chunk in chunks_of(source, cut)),
        *(DenoiseRequest(reference=chunk) for chunk in chunks_of(references.reshape(-1, 64), cut)),
    ]


async def send(stub: "DitServiceAsyncStub", requests: Sequence[DenoiseRequest]) -> list[DenoiseResponse]:
    """All responses of a call of several requests."""
    return [response async for response in stub.Denoise(iter(requests))]


async def test_progress_comes_once_a_step_and_then_the_latents_in_order(engine: DitEngine) -> None:
    setup = setup_of(options=DiffusionOptions(steps=3))
    async with Serving(engine) as stub:
        responses = await collect(stub, setup)
    progress, chunks = responses[:3], [response.latents for response in responses[3:-1]]
    assert responses[-1].HasField("done")
    assert [(one.progress.step, one.progress.steps) for one in progress] == [(1, 3), (2, 3), (3, 3)]
    assert [(chunk.first_frame, chunk.tensor.shape[0]) for chunk in chunks] == [(0, 256), (256, 256), (512, 88)]
    latents = np.concatenate([from_proto(chunk.tensor, "latents", shape=(None, 64)) for chunk in chunks])
    *_, expected = [event async for event in engine.denoise(read_song(setup, variant="turbo"))]
    assert isinstance(expected, np.ndarray)
    assert np.array_equal(latents, expected)


async def test_warm_up_goes_through(engine: DitEngine) -> None:
    serving = Serving(engine)
    async with serving:
        await warm_up(serving.channel, [TURBO])
    assert engine.num_songs == 0


async def test_all_bad_fields_are_named_at_once(engine: DitEngine) -> None:
    setup = DenoiseSetup(
        caption="<|im_start|>",
        lyrics="</think>",
        metadata=SongMetadata(bpm=1000, vocal_language="martian"),
        codes=[64_000],
        options=DiffusionOptions(steps=50, shift=0),
    )
    async with Serving(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, setup)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)  # pyright: ignore[reportArgumentType]
    assert status is not None
    bad = BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert {violation.field for violation in bad.field_violations} == {
        "caption",
        "lyrics",
        "metadata.bpm",
        "metadata.vocal_language",
        "codes[0]",
        "latent_frames",
        "options.steps",
        "options.shift",
    }


async def test_another_models_request_is_refused(model: LoadedModel, engine: DitEngine) -> None:
    async with Serving(engine, models=[card_of(model)]) as stub:
        await collect(stub, setup_of(model_fingerprint=model.model_fingerprint))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, setup_of(model_fingerprint="0" * 64))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert f"served are: {model.model_fingerprint} (acestep-v15-turbo)" in (caught.value.details() or "")


async def test_a_full_stage_refuses_and_a_cancelled_call_makes_room() -> None:
    stuck = Stuck()
    serving = Serving(stuck, max_in_flight=1)
    async with serving as stub:
        held = stub.Denoise(only(setup_of()))
        assert (await anext(aiter(held))).progress.step == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, setup_of())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        held.cancel()
        await asyncio.wait_for(stuck.was_left.wait(), timeout=5)
        assert (stuck.num_songs, serving.admission.in_flight) == (0, 0)
        assert (await anext(aiter(stub.Denoise(only(setup_of()))))).progress.step == 1


async def test_a_deadline_ends_the_song() -> None:
    stuck = Stuck()
    async with Serving(stuck) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Denoise(only(setup_of()), timeout=0.3):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(stuck.was_left.wait(), timeout=5)
    assert stuck.num_songs == 0


async def test_a_cancelled_call_frees_its_place_on_the_device(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        call = stub.Denoise(only(setup_of(options=DiffusionOptions(steps=20), latent_frames=15_000)))
        await anext(aiter(call))
        assert engine.num_songs == 1
        call.cancel()
        # The next song is answered by the same worker, so the cancelled one's steps are over by then.
        await collect(stub, setup_of(options=DiffusionOptions(steps=1), latent_frames=1))
        assert engine.num_songs == 0


def random_latents(*shape: int) -> NDArray[np.float32]:
    """Some latents."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


COVER = setup_of(
    latent_frames=30,
    source_frames=30,
    reference_count=2,
    task=Task(cover=Cover(strength=0.5)),
    options=DiffusionOptions(steps=2),
)
SOURCE, REFERENCES = random_latents(30, 64), random_latents(2, 750, 64)


async def test_a_source_and_references_reach_the_song(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        responses = await send(stub, with_sources(COVER, SOURCE, REFERENCES, cut=7))
    assert [response.WhichOneof("event") for response in responses] == ["progress", "progress", "latents", "done"]
    latents = from_proto(responses[2].latents.tensor, "latents", shape=(30, 64))
    song = replace(read_song(COVER, variant="turbo"), source=SOURCE, references=tuple(REFERENCES))
    *_, expected = [event async for event in engine.denoise(song)]
    assert isinstance(expected, np.ndarray)
    assert np.array_equal(latents, expected)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (slice(1), "source ended after frame 0; setup.source_frames is 30"),
        (slice(2), "source ended after frame 7; setup.source_frames is 30"),
        (slice(4), "reference ended after frame 7; setup.reference_count x 750 is 1500"),
        (slice(0, 5, 3), "source is missing: message 2 carries reference after 0 frames; setup.source_frames is 30"),
    ],
)
async def test_a_source_that_is_not_what_was_announced_is_refused(sent: slice, message: str) -> None:
    stuck = Stuck()
    async with Serving(stuck) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(stub, with_sources(COVER, SOURCE, REFERENCES, cut=7)[sent])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == message
    assert not stuck.was_left.is_set()


async def test_a_source_nobody_announced_is_refused() -> None:
    request = DenoiseRequest(source=LatentChunk(tensor=to_proto(SOURCE)))
    async with Serving(Stuck()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(stub, [DenoiseRequest(setup=setup_of()), request])
    assert (
        caught.value.details() == "source is one too many: message 2 carries source, after all that the setup announced"
    )


async def test_a_caller_that_stops_in_the_middle_of_its_source_takes_no_place() -> None:
    stuck = Stuck()
    serving = Serving(stuck, max_in_flight=1, idle_timeout_s=0.2)
    async with serving as stub:
        stalled = stub.Denoise()
        for request in with_sources(COVER, SOURCE, REFERENCES, cut=7)[:2]:
            await stalled.write(request)
        # The only place is free for another, who is in the middle of a song when the first is let go.
        other = stub.Denoise(only(setup_of()))
        assert (await anext(aiter(other))).progress.step == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stalled))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stuck.num_songs == 1
        other.cancel()
        await asyncio.wait_for(stuck.was_left.wait(), timeout=5)


@pytest.mark.parametrize(("variant", "is_made"), [("turbo", False), ("sft", False), ("base", True)])
async def test_a_task_is_refused_by_models_that_cannot_do_it(variant: str, is_made: bool) -> None:
    async with Serving(Stuck(), models=[StageModel(variant=variant)]) as stub:
        call = stub.Denoise(only(setup_of(task=Task(extract=Extract()))))
        if is_made:
            assert (await anext(aiter(call))).progress.step == 1
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            expected = f"task.extract is for models of the variants base and xl-base; this one is {variant}"
            assert caught.value.details() == expected


async def test_a_source_too_large_for_the_codes_ends_its_call_alone(engine: DitEngine) -> None:
    huge = np.full_like(SOURCE, 3e38)
    async with Serving(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(stub, with_sources(COVER, huge, REFERENCES, cut=7))
        assert "the source's codes are not finite" in (caught.value.details() or "")
        assert (await send(stub, with_sources(COVER, SOURCE, REFERENCES, cut=7)))[-1].HasField("done")
