"""What the gateway says of itself and its stages."""

import grpc
import grpc.aio
import pytest

from soundstage.music.v1.catalog_service_pb2 import (
    GetCapabilitiesRequest,
    ListAdaptersRequest,
    ListModelsRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub
from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, STAGE_VAE, GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.options_pb2 import AdapterUse

from .conftest import Deploy, Steady


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


@pytest.mark.parametrize(
    ("variant", "tasks"),
    [
        ("turbo", ["cover", "repaint", "edit"]),
        ("sft-stems", ["cover", "repaint", "lego", "edit"]),
        ("xl-base", ["cover", "repaint", "extract", "lego", "complete", "edit"]),
    ],
)
async def test_tasks_are_those_that_the_loaded_model_can_do(deploy: Deploy, variant: str, tasks: list[str]) -> None:
    async with deploy(Steady("dit", variant=variant)) as deployment:
        stub = CatalogServiceStub(deployment.channel)
        assert (await stub.GetCapabilities(GetCapabilitiesRequest())).tasks == tasks
        await deployment.servers["dit"].stop()
        assert (await stub.GetCapabilities(GetCapabilitiesRequest())).tasks == []


async def test_adapters_are_loaded_listed_in_pages_and_unloaded(deploy: Deploy) -> None:
    async with deploy() as deployment:
        stub = CatalogServiceStub(deployment.channel)
        for name in ("b", "c", "a"):
            answer = await stub.LoadAdapter(LoadAdapterRequest(adapter=f"adapters/{name}", path=f"{name}.safetensors"))
        assert (answer.adapter.name, answer.adapter.kind, answer.adapter.rank) == ("adapters/a", "lora", 8)
        assert answer.adapter.size_bytes == 1024
        asked = deployment.stages["dit"].requests
        assert [(request.name, request.path) for request in asked[:1]] == [("b", "b.safetensors")]
        first = await stub.ListAdapters(ListAdaptersRequest(page_size=2))
        second = await stub.ListAdapters(ListAdaptersRequest(page_size=2, page_token=first.next_page_token))
        assert [adapter.name for adapter in first.adapters] == ["adapters/a", "adapters/b"]
        assert [adapter.name for adapter in second.adapters] == ["adapters/c"]
        assert second.next_page_token == ""
        await stub.UnloadAdapter(UnloadAdapterRequest(adapter="adapters/b"))
        left = (await stub.ListAdapters(ListAdaptersRequest())).adapters
        assert [adapter.name for adapter in left] == ["adapters/a", "adapters/c"]


async def test_an_adapter_is_loaded_for_the_model_that_is_named(deploy: Deploy) -> None:
    async with deploy() as deployment:
        wanted = LoadAdapterRequest(adapter="adapters/a", path="a", model="models/dit/base")
        await CatalogServiceStub(deployment.channel).LoadAdapter(wanted)
        [asked] = deployment.stages["dit"].requests
    assert (asked.name, asked.model) == ("a", "base")


async def test_the_stages_refusal_reaches_the_client(deploy: Deploy) -> None:
    async with deploy() as deployment:
        stub = CatalogServiceStub(deployment.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UnloadAdapter(UnloadAdapterRequest(adapter="adapters/a"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "the dit stage: name is 'a', which is not loaded"
        await deployment.servers["dit"].stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListAdapters(ListAdaptersRequest())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_song_may_name_an_adapter_as_the_catalog_does(deploy: Deploy) -> None:
    uses = [AdapterUse(name="adapters/a", scale=0.5), AdapterUse(name="b")]
    request = GenerateSongRequest(caption="calm", codes=range(5), adapters=uses)
    async with deploy(Steady("dit", adapters={"a", "b"})) as deployment:
        async for _ in SongServiceStub(deployment.channel).GenerateSong(request):
            pass
        [asked] = deployment.stages["dit"].requests
    assert list(asked.adapters) == [AdapterUse(name="a", scale=0.5), AdapterUse(name="b")]


@pytest.mark.parametrize("name", ["", "a", "adapters/", "adapters/a/b", "adapters/" + "a" * 65, "models/a"])
async def test_a_bad_adapter_name_is_refused(deploy: Deploy, name: str) -> None:
    async with deploy() as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CatalogServiceStub(deployment.channel).LoadAdapter(LoadAdapterRequest(adapter=name, path="a"))
        assert deployment.stages["dit"].requests == []
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "adapter is" in str(caught.value.details())
    assert "must be adapters/ and 1 to 64" in str(caught.value.details())


async def test_a_bad_page_of_adapters_is_refused(deploy: Deploy) -> None:
    async with deploy() as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await CatalogServiceStub(deployment.channel).ListAdapters(ListAdaptersRequest(page_size=101))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
