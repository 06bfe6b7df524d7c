"""soundstage adapters, against a gateway that keeps names only."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from typer.testing import CliRunner

from soundstage.music.v1.catalog_service_pb2 import (
    Adapter,
    GetCapabilitiesResponse,
    ListAdaptersRequest,
    ListAdaptersResponse,
    ListModelsResponse,
    LoadAdapterRequest,
    LoadAdapterResponse,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)
from soundstage.music.v1.catalog_service_pb2_grpc import (
    CatalogServiceServicer,
    add_CatalogServiceServicer_to_server,
)
from soundstage_cli.app import app


class Keeping(CatalogServiceServicer):
    """A gateway that keeps adapters, and lists one a page."""

    def __init__(self) -> None:
        self.paths: dict[str, str] = {}

    def GetCapabilities(self, request: object, context: grpc.ServicerContext) -> GetCapabilitiesResponse:
        raise NotImplementedError

    def ListModels(self, request: object, context: grpc.ServicerContext) -> ListModelsResponse:
        raise NotImplementedError

    def ListAdapters(self, request: ListAdaptersRequest, context: grpc.ServicerContext) -> ListAdaptersResponse:
        page = int(request.page_token or 0)
        cards = [Adapter(name=name, kind="lora", rank=8, size_bytes=1_500_000) for name in sorted(self.paths)]
        is_last = page + 1 >= len(cards)
        return ListAdaptersResponse(adapters=cards[page : page + 1], next_page_token="" if is_last else str(page + 1))

    def LoadAdapter(self, request: LoadAdapterRequest, context: grpc.ServicerContext) -> LoadAdapterResponse:
        self.paths[request.adapter] = request.path
        return LoadAdapterResponse(adapter=Adapter(name=request.adapter, kind="lokr", rank=4, size_bytes=2000))

    def UnloadAdapter(self, request: UnloadAdapterRequest, context: grpc.ServicerContext) -> UnloadAdapterResponse:
        if request.adapter not in self.paths:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.adapter} is not loaded")
        del self.paths[request.adapter]
        return UnloadAdapterResponse()


@pytest.fixture
def catalog() -> Keeping:
    """What the gateway keeps."""
    return Keeping()


@pytest.fixture
def gateway(catalog: Keeping) -> Iterator[str]:
    """The address of a gateway."""
    server = grpc.server(ThreadPoolExecutor(1))
    add_CatalogServiceServicer_to_server(catalog, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    ended: threading.Event = server.stop(None)
    ended.wait()


def test_adapters_are_loaded_listed_and_unloaded(catalog: Keeping, gateway: str) -> None:
    none = CliRunner().invoke(app, ["adapters", "list", "--gateway", gateway])
    assert (none.stdout, "no adapter is loaded" in none.stderr) == ("", True)
    loaded = CliRunner().invoke(app, ["adapters", "load", "piano", "piano.safetensors", "--gateway", gateway])
    assert (loaded.exit_code, loaded.stdout) == (0, "piano  lokr, rank 4, 0.002 MB\n")
    CliRunner().invoke(app, ["adapters", "load", "adapters/drums", "drums", "--gateway", gateway])
    assert catalog.paths == {"adapters/piano": "piano.safetensors", "adapters/drums": "drums"}
    listed = CliRunner().invoke(app, ["adapters", "list", "--gateway", gateway])
    assert listed.stdout == "drums  lora, rank 8, 1.5 MB\npiano  lora, rank 8, 1.5 MB\n"
    assert CliRunner().invoke(app, ["adapters", "unload", "piano", "--gateway", gateway]).exit_code == 0
    assert list(catalog.paths) == ["adapters/drums"]


def test_a_refusal_is_an_error_in_words(gateway: str) -> None:
    done = CliRunner().invoke(app, ["adapters", "unload", "piano", "--gateway", gateway])
    assert done.exit_code == 1
    assert "adapters/piano is not loaded" in done.stderr
