import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.stage.v1.dit_service_pb2 import TokenizeRequest, TokenizeSetup
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.request_stream import CallerStalledError, patient, read_first, read_latents
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
