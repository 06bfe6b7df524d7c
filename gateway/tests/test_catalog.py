"""What the gateway says of itself and its stages."""

import grpc
import grpc.aio
import pytest

from soundstage.music.v1.catalog_service_pb2 import GetCapabilitiesRequest, ListModelsRequest
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub
from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, STAGE_VAE

from .conftest import Deploy


async def test_capabilities_name_the_limits_and_the_reachable_stages(deploy: Deploy) -> None:
    async with deploy(max_duration_s=240, max_songs=5) as deployment:
        await deployment.servers["dit"].stop()
        answer = await CatalogServiceStub(deployment.channel).GetCapabilities(GetCapabilitiesRequest())
    assert [(state.stage, state.reachable) for state in answer.stages] == [
        (STAGE_LM, True),
        (STAGE_DIT, False),
        (STAGE_VAE, True),
    ]
    assert (answer.max_duration_s, answer.max_songs_in_flight, answer.songs_in_flight) == (240, 5, 0)
    assert len(answer.key_scales) == 70
    assert len(answer.vocal_languages) == 51


async def test_models_come_in_pages(deploy: Deploy) -> None:
    async with deploy() as deployment:
        stub = CatalogServiceStub(deployment.channel)
        first = await stub.ListModels(ListModelsRequest(page_size=2))
        second = await stub.ListModels(ListModelsRequest(page_size=2, page_token=first.next_page_token))
    names = [model.name for model in (*first.models, *second.models)]
    assert names == ["models/lm/lm-model", "models/dit/dit-model", "models/vae/vae-model"]
    assert second.next_page_token == ""


async def test_a_bad_page_is_refused(deploy: Deploy) -> None:
    async with deploy() as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CatalogServiceStub(deployment.channel).ListModels(
                ListModelsRequest(page_size=101, page_token="9" * 5000)
            )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "page_size" in str(caught.value.details())
    assert "page_token" in str(caught.value.details())
