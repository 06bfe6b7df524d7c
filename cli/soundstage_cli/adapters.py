"""adapters: list, load and unload the adapters of the diffusion model."""

from typing import Annotated

import typer

from soundstage.music.v1.catalog_service_pb2 import (
    Adapter,
    ListAdaptersRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub
from soundstage_cli import options
from soundstage_cli.channel import open_channel
from soundstage_cli.compose import ask, console

app = typer.Typer(no_args_is_help=True, help="Adapters of the diffusion model: LoRA and LoKr.")

Name = Annotated[str, typer.Argument(help="what songs call it: `generate --adapter NAME`")]


@app.command("list")
def list_adapters(gateway: options.Gateway = options.GATEWAY) -> None:
    """List the adapters that are loaded: name, kind, rank and size."""

    async def call() -> list[Adapter]:
        found: list[Adapter] = []
        page_token = ""
        async with open_channel(gateway) as channel:
            while True:
                request = ListAdaptersRequest(page_token=page_token)
                page = await CatalogServiceStub(channel).ListAdapters(request)
                found += page.adapters
                page_token = page.next_page_token
                if not page_token:
                    return found

    adapters = ask(gateway, call())
    for adapter in adapters:
        print(_tell(adapter))
    if not adapters:
        console.print("no adapter is loaded: `soundstage adapters load NAME PATH` loads one", highlight=False)


@app.command()
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="file or directory, below the diffusion stage's --adapter-dir")],
    model: Annotated[str, typer.Option(help="the diffusion model it is for, by name; the first by default")] = "",
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Load an adapter that lies on the diffusion stage's machine."""
    options.check_words("NAME", name)
    options.check_words("PATH", path)

    async def call() -> Adapter:
        async with open_channel(gateway) as channel:
            request = LoadAdapterRequest(adapter=_full(name), path=path, model=model)
            return (await CatalogServiceStub(channel).LoadAdapter(request)).adapter

    print(_tell(ask(gateway, call())))


@app.command()
def unload(name: Name, gateway: options.Gateway = options.GATEWAY) -> None:
    """Forget an adapter; songs that are being made with it keep it."""
    options.check_words("NAME", name)

    async def call() -> None:
        async with open_channel(gateway) as channel:
            await CatalogServiceStub(channel).UnloadAdapter(UnloadAdapterRequest(adapter=_full(name)))

    ask(gateway, call())
    console.print(f"unloaded {name}", markup=False, highlight=False)


def _full(name: str) -> str:
    return f"adapters/{name.removeprefix('adapters/')}"


def _tell(adapter: Adapter) -> str:
    name = adapter.name.removeprefix("adapters/")
    return f"{name}  {adapter.kind}, rank {adapter.rank}, {adapter.size_bytes / 1e6:.3g} MB"
