import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest, TokenizeRequest, TokenizeSetup
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.request_stream import (
    Announced,
    CallerStalledError,
    patient,
    read_first,
    read_latents,
    read_parts,
)
from soundstage_runtime.tensors import to_proto

LATENTS = np.arange(40 * 64, dtype=np.float32).reshape(40, 64)
cuts = st.lists(st.integers(1, 39), unique=True, max_size=8).map(lambda inner: [0, *sorted(inner), 40])


def runs(ends: Sequence[int]) -> list[TokenizeRequest]:
    """LATENTS in runs that end at `ends`."""
    return [
        TokenizeRequest(latents=LatentChunk(first_frame=start, tensor=to_proto(LATENTS[start:stop])))
        for start, stop in pairwise(ends)
    ]


async def stream(requests: Sequence[TokenizeRequest]) -> AsyncIterator[TokenizeRequest]:
    for request in requests:
        yield request


async def read(requests: Sequence[TokenizeRequest]) -> list[np.ndarray]:
    return [run async for run in read_latents(stream(requests), len(LATENTS))]


@given(cuts)
def test_runs_without_a_gap_are_the_song(ends: list[int]) -> None:
    assert np.array_equal(np.concatenate(asyncio.run(read(runs(ends)))), LATENTS)


@given(cuts, st.data())
def test_a_run_that_is_lost_sent_twice_or_early_is_refused(ends: list[int], data: st.DataObject) -> None:
    sent = runs(ends)
    index = data.draw(st.integers(0, len(sent) - 1))
    lost = sent[:index] + sent[index + 1 :]
    for wrong in (lost, [*sent[: index + 1], *sent[index:]], [*sent[index:], *sent[:index]]):
        if wrong != sent:
            with pytest.raises(InvalidRequestError):
                asyncio.run(read(wrong))


async def test_the_setup_comes_first() -> None:
    setup = TokenizeRequest(setup=TokenizeSetup(latent_frames=40))
    requests = stream([setup, *runs([0, 40])])
    assert await read_first(requests) == setup
    assert [len(run) async for run in read_latents(requests, 40)] == [40]


async def test_a_caller_has_its_time_for_every_request() -> None:
    async def stall() -> AsyncIterator[TokenizeRequest]:
        yield runs([0, 40])[0]
        await asyncio.Event().wait()

    requests = patient(stall(), timeout_s=0.05)
    assert (await anext(requests)).WhichOneof("part") == "latents"
    with pytest.raises(CallerStalledError, match=r"no request came for 0\.05 s"):
        await anext(requests)


REFERENCES = LATENTS[::-1][:20]
ANNOUNCED = (
    Announced(name="source", num_frames=40, length_field="setup.source_frames"),
    Announced(name="reference", num_frames=20, length_field="setup.reference_count x 10"),
)


def sources(*ends: int) -> list[DenoiseRequest]:
    """LATENTS as a source, in runs that end at `ends`."""
    return [DenoiseRequest(source=run.latents) for run in runs((0, *ends))]


def references(*ends: int) -> list[DenoiseRequest]:
    """REFERENCES, in runs that end at `ends`."""
    return [
        DenoiseRequest(reference=LatentChunk(first_frame=start, tensor=to_proto(REFERENCES[start:stop])))
        for start, stop in pairwise((0, *ends))
    ]


async def read_both(requests: Sequence[DenoiseRequest]) -> list[np.ndarray]:
    async def stream() -> AsyncIterator[DenoiseRequest]:
        for request in requests:
            yield request

    return await read_parts(stream(), ANNOUNCED)


async def test_parts_are_read_one_after_another() -> None:
    source, reference = await read_both([*sources(7, 40), *references(10, 20)])
    assert np.array_equal(source, LATENTS)
    assert np.array_equal(reference, REFERENCES)


async def test_parts_of_no_length_need_no_message() -> None:
    async def nothing() -> AsyncIterator[DenoiseRequest]:
        return
        yield

    parts = await read_parts(nothing(), [Announced(name="source", num_frames=0, length_field="setup.source_frames")])
    assert [part.shape for part in parts] == [(0, 64)]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "source ended after frame 0; setup.source_frames is 40"),
        (sources(7), "source ended after frame 7; setup.source_frames is 40"),
        (sources(40), "reference ended after frame 0; setup.reference_count x 10 is 20"),
        (
            [*sources(7), *references(20)],
            "source is missing: message 3 carries reference after 7 frames; setup.source_frames is 40",
        ),
        (
            [*sources(40), *references(10), *sources(7)],
            "reference is missing: message 4 carries source after 10 frames; setup.reference_count x 10 is 20",
        ),
        (
            [*sources(40), *references(20), *references(10)],
            "reference is one too many: message 4 carries reference, after all that the setup announced",
        ),
        (
            [*sources(40), *references(20), DenoiseRequest()],
            "part is one too many: message 4 carries nothing, after all that the setup announced",
        ),
        ([DenoiseRequest()], "source is missing: message 2 carries nothing; every later one carries it"),
        (sources(40)[0:1] * 2, "reference is missing: message 3 carries source after 0 frames; setup.reference_count"),
        (sources(7, 40)[1:], "source.first_frame is 7; must be 0, where the last chunk ended"),
    ],
)
async def test_parts_that_are_short_long_or_swapped_are_refused(requests: list[DenoiseRequest], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await read_both(requests)
    assert caught.value.message.startswith(message)
