"""A gateway over real gRPC, and stages that answer without a model."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from numpy.typing import NDArray

from soundstage.stage.v1 import (
    dit_service_pb2_grpc,
    lm_service_pb2_grpc,
    stage_service_pb2_grpc,
    vae_service_pb2_grpc,
)
from soundstage.stage.v1.dit_service_pb2 import (
    Adapter,
    AlignRequest,
    AlignResponse,
    DenoiseDone,
    DenoiseProgress,
    DenoiseQueued,
    DenoiseRequest,
    DenoiseResponse,
    ListAdaptersRequest,
    ListAdaptersResponse,
    LoadAdapterRequest,
    LoadAdapterResponse,
    TokenizeRequest,
    TokenizeResponse,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)
from soundstage.stage.v1.lm_service_pb2 import (
    CodeChunk,
    ComposePlan,
    ComposeRequest,
    ComposeResponse,
    DraftRequest,
    DraftResponse,
    PolishRequest,
    PolishResponse,
    ScoreRequest,
    ScoreResponse,
    UnderstandRequest,
    UnderstandResponse,
)
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse
from soundstage.type.v1.score_pb2 import ORIGIN_LM, Likelihood, LikelihoodPart, LyricLine, PlanField, SongText
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from soundstage_gateway.assets import Assets
from soundstage_gateway.http.app import Api
from soundstage_gateway.http.door import HttpDoor
from soundstage_gateway.keys import Keys
from soundstage_gateway.metrics import Metrics
from soundstage_gateway.servicer import offer, warm_up
from soundstage_gateway.shelf import Shelf
from soundstage_gateway.stages import Stages, Targets
from soundstage_gateway.store import Store
from soundstage_gateway.studio import Studio
from soundstage_gateway.tape import Tapes
from soundstage_runtime import pcm, tensors
from soundstage_runtime.admission import Admission
from soundstage_runtime.call import REQUEST_ID_KEY, SONG_KEY
from soundstage_runtime.serve import Server, Service
from soundstage_runtime.stage import StageServicer

Context = grpc.aio.ServicerContext[Any, Any]
Latents = NDArray[np.float32]  # [frames, 64]
Samples = NDArray[np.float32]  # [frames, 2]
STEPS = 3


async def read_run(requests: AsyncIterator[DenoiseRequest], num_frames: int) -> Latents:
    """Read chunks that leave no gap until they are `num_frames`."""
    found: list[Latents] = []
    length = 0
    while length < num_frames:
        request = await anext(requests)
        chunk = request.source if request.HasField("source") else request.reference
        assert chunk.first_frame == length
        found.append(tensors.from_proto(chunk.tensor, "latents", shape=(None, 64)))
        length += len(found[-1])
    assert length == num_frames
    return np.concatenate(found)


@dataclass
class Steady:
    """A stage that does its part at once, and notes what it was asked and with what."""

    name: str
    requests: list[Any] = field(default_factory=list[Any])
    sources: list[Latents | None] = field(default_factory=list["Latents | None"])
    references: list[Latents | None] = field(default_factory=list["Latents | None"])
    audio: list[Samples] = field(default_factory=list["Samples"])
    metadata: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    remaining_s: list[float | None] = field(default_factory=list[float | None])
    variant: str = "fake"
    adapters: set[str] = field(default_factory=set[str])
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        self.metadata.append({key: str(metadata.get(key, "")) for key in (REQUEST_ID_KEY, SONG_KEY)})
        self.remaining_s.append(context.time_remaining())

    async def between(self) -> None:
        """Called in the middle of the work."""

    async def Compose(self, request: ComposeRequest, context: Context) -> AsyncIterator[ComposeResponse]:
        self.requests.append(request)
        self.note(context)
        plan = ComposePlan(metadata=request.metadata)
        if not request.metadata.HasField("duration_s"):
            plan.metadata.duration_s = 12
        plan.metadata.bpm = 120
        field = PlanField(name="bpm", value="120", origin=ORIGIN_LM)
        plan.fields.append(field)
        if request.rewrite_caption or not request.HasField("rewrite_caption"):
            plan.caption = f"rewritten: {request.caption}"
        if request.write_codes or not request.HasField("write_codes"):
            plan.code_count = int(plan.metadata.duration_s * 5)
        yield ComposeResponse(field=field)
        yield ComposeResponse(plan=plan)
        await self.between()
        for first in range(0, plan.code_count, 5):
            codes = [(request.seed + code) % 64000 for code in range(first, min(first + 5, plan.code_count))]
            yield ComposeResponse(codes=CodeChunk(first_code=first, codes=codes))

    async def Align(self, request: AlignRequest, context: Context) -> AlignResponse:
        self.note(context)
        # It sings the handle that it is asked for.
        lines = [LyricLine(text="[verse]", end_s=1), LyricLine(text=request.handle, start_s=83.456, end_s=84)]
        return AlignResponse(lines=lines, score=0.5)

    async def ListAdapters(self, request: ListAdaptersRequest, context: Context) -> ListAdaptersResponse:
        return ListAdaptersResponse(adapters=[Adapter(name=name, kind="lora") for name in sorted(self.adapters)])

    async def LoadAdapter(self, request: LoadAdapterRequest, context: Context) -> LoadAdapterResponse:
        self.requests.append(request)
        self.adapters.add(request.name)
        return LoadAdapterResponse(adapter=Adapter(name=request.name, kind="lora", rank=8, size_bytes=1024))

    async def UnloadAdapter(self, request: UnloadAdapterRequest, context: Context) -> UnloadAdapterResponse:
        if request.name not in self.adapters:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"name is {request.name!r}, which is not loaded")
        self.adapters.remove(request.name)
        return UnloadAdapterResponse()

    async def Denoise(
        self, request_iterator: AsyncIterator[DenoiseRequest], context: Context
    ) -> AsyncIterator[DenoiseResponse]:
        request = (await anext(request_iterator)).setup
        self.requests.append(request)
        self.note(context)
        for chunks, frames in (
            (self.sources, request.source_frames),
            (self.references, 750 * request.reference_count),
        ):
            chunks.append(await read_run(request_iterator, frames) if frames else None)
        yield DenoiseResponse(queued=DenoiseQueued(position=2, wait_s=1.5))
        for step in range(STEPS):
            yield DenoiseResponse(progress=DenoiseProgress(step=step + 1, steps=STEPS))
            if step == 0:
                await self.between()
        frames = np.arange(request.latent_frames, dtype=np.float32)[:, None] + request.seed % 1000
        latents = np.repeat(frames, 64, axis=1)
        for chunk in tensors.latent_chunks(latents, DATA_TYPE_FLOAT32):
            yield DenoiseResponse(latents=chunk)
        yield DenoiseResponse(done=DenoiseDone(handle=f"song-of-seed-{request.seed}"))

    async def Decode(
        self, request_iterator: AsyncIterator[DecodeRequest], context: Context
    ) -> AsyncIterator[DecodeResponse]:
        self.note(context)
        setup = (await anext(request_iterator)).setup
        self.requests.append(setup)
        frame, stop = setup.first_frame, setup.first_frame + setup.frame_count
        heard = [request.latents.tensor async for request in request_iterator]
        latents = np.concatenate([tensors.from_proto(tensor, "latents", shape=(None, 64)) for tensor in heard])
        assert len(latents) == setup.latent_frames
        # Every sample of a latent frame is that frame's first channel, in steps of S16, so that order and content can
        # be checked.
        samples = np.repeat(latents[:, :1] / np.float32(32_767), 1920, axis=0).repeat(2, axis=1)
        for chunk, peak in pcm.audio_chunks(samples[frame:stop], first_frame=frame, sample_format=setup.sample_format):
            yield DecodeResponse(audio=chunk, peak=peak)
            await self.between()

    async def Encode(
        self, request_iterator: AsyncIterator[EncodeRequest], context: Context
    ) -> AsyncIterator[EncodeResponse]:
        self.note(context)
        setup = (await anext(request_iterator)).setup
        self.requests.append(setup)
        heard: list[Samples] = []
        async for request in request_iterator:
            assert request.audio.first_frame == sum(map(len, heard))
            heard.append(pcm.from_bytes(request.audio.data, setup.sample_format))
        await self.between()
        self.audio.append(np.concatenate(heard))
        assert len(self.audio[-1]) == setup.frame_count
        # Latent frame n holds the value n everywhere.
        values = np.repeat(np.arange(setup.frame_count // 1920, dtype=np.float32)[:, None], 64, axis=1)
        for chunk in tensors.latent_chunks(values, DATA_TYPE_FLOAT32):
            yield EncodeResponse(latents=chunk)

    async def Tokenize(self, request_iterator: AsyncIterator[TokenizeRequest], context: Context) -> TokenizeResponse:
        self.note(context)
        codes: list[int] = []
        async for request in request_iterator:
            if request.HasField("setup"):
                self.requests.append(request.setup)
                continue
            latents = tensors.from_proto(request.latents.tensor, "latents", shape=(None, 64))
            codes += [int(value) for value in latents[:, 0] if value % 5 == 0]
        await self.between()
        return TokenizeResponse(codes=codes)

    async def Understand(self, request: UnderstandRequest, context: Context) -> UnderstandResponse:
        self.requests.append(request)
        self.note(context)
        await self.between()
        return UnderstandResponse(text=SongText(caption=f"{len(request.codes)} codes"))

    async def Draft(self, request: DraftRequest, context: Context) -> DraftResponse:
        self.requests.append(request)
        self.note(context)
        await self.between()
        return DraftResponse(text=SongText(caption=request.query.upper(), genres="pop"))

    async def Polish(self, request: PolishRequest, context: Context) -> PolishResponse:
        self.requests.append(request)
        self.note(context)
        await self.between()
        return PolishResponse(text=SongText(caption=request.caption.upper(), metadata=request.metadata))

    async def Score(self, request: ScoreRequest, context: Context) -> ScoreResponse:
        self.requests.append(request)
        self.note(context)
        await self.between()
        return ScoreResponse(likelihood=Likelihood(total=0.25, parts=[LikelihoodPart(name="caption", score=0.25)]))


class Stuck(Steady):
    """A stage that begins and never ends, and notes when it is cancelled."""

    async def between(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


class Broken(Steady):
    """A stage with a bug."""

    async def between(self) -> None:
        raise RuntimeError("a secret of the implementation")


_ADD: dict[str, Callable[[Any, grpc.aio.Server], None]] = {
    "lm": lm_service_pb2_grpc.add_LmServiceServicer_to_server,
    "dit": dit_service_pb2_grpc.add_DitServiceServicer_to_server,
    "vae": vae_service_pb2_grpc.add_VaeServiceServicer_to_server,
}


def serve_stage(stage: Steady, *, port: int = 0, max_duration_s: float = 600.0) -> Server:
    """A server for a fake stage."""
    model = StageModel(
        name=f"{stage.name}-model", variant=stage.variant, model_fingerprint=f"{stage.name}-print", dtype="f4"
    )
    card = StageServicer(
        stage.name,
        models=[model],
        device="cpu",
        admission=Admission("calls", limit=4),
        max_duration_s=max_duration_s,
    )
    return Server(
        [
            Service(name=stage.name, add=lambda server: _ADD[stage.name](stage, server)),
            Service(
                name="stage", add=lambda server: stage_service_pb2_grpc.add_StageServiceServicer_to_server(card, server)
            ),
        ],
        port=port,
    )


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Deployment:
    """A running gateway, its stages by name, and a channel to it."""

    channel: grpc.aio.Channel
    port: int
    stages: dict[str, Steady]
    servers: dict[str, Server]
    assets: Assets
    uploads: Admission
    studio: Studio
    store: Store
    listeners: Admission
    shelf: Shelf
    door: HttpDoor
    http: str


Deploy = Callable[..., AbstractAsyncContextManager[Deployment]]


@pytest.fixture
def deploy(tmp_path: Path) -> Deploy:
    """Start a gateway before stages; a stage that is not given is Steady, and one that is `late` is not started."""

    @asynccontextmanager
    async def start(
        *stages: Steady,
        max_songs: int = 16,
        max_duration_s: float = 600.0,
        stall_timeout_s: float = 60.0,
        asset_limit_bytes: int = 64 << 20,
        max_listeners: int = 64,
        max_watchers: int = 64,
        shelf_limit_bytes: int = 64 << 20,
        keys_file: Path | None = None,
        hls_idle_s: float = 60.0,
        keep_s: float = 3600.0,
        store_limit_bytes: int = 64 << 20,
        tape_limit_bytes: int = 64 << 20,
        make_store: Callable[..., Store] = Store,
        late: str = "",
        **door_options: Any,
    ) -> AsyncGenerator[Deployment, None]:
        by_name = {name: Steady(name) for name in ("lm", "dit", "vae")} | {stage.name: stage for stage in stages}
        port = free_port()
        servers = {
            name: serve_stage(stage, port=port if name == late else 0, max_duration_s=max_duration_s)
            for name, stage in by_name.items()
        }
        for name, server in servers.items():
            if name != late:
                await server.start()
        ports = {name: f"127.0.0.1:{server.port or port}" for name, server in servers.items()}
        gateway_stages = Stages(Targets(lm=ports["lm"], dit=ports["dit"], vae=ports["vae"]))
        assets, uploads = Assets(asset_limit_bytes), Admission("uploads", limit=2)
        admission, listeners = Admission("songs", limit=max_songs), Admission("listeners", limit=max_listeners)
        watchers = Admission("watchers", limit=max_watchers)
        metrics = Metrics([admission, listeners, watchers, uploads])
        keys = Keys(keys_file) if keys_file else None
        store = make_store(tmp_path / "songs", limit_bytes=store_limit_bytes)
        tapes = Tapes(tmp_path / "tapes", limit_bytes=tape_limit_bytes)
        shelf = Shelf(tmp_path / "shelf", limit_bytes=shelf_limit_bytes)
        studio = Studio(gateway_stages, admission, assets, store, tapes, shelf, metrics, keep_s=keep_s)
        await studio.open()
        offered = offer(
            studio,
            gateway_stages,
            assets,
            metrics,
            songs=admission,
            listeners=listeners,
            watchers=watchers,
            uploads=uploads,
            stall_timeout_s=stall_timeout_s,
        )
        gateway = Server(
            offered.services(),
            warm_up=partial(warm_up, key=keys.own if keys else ""),
            check=keys.check if keys else None,
            observe=metrics.count_call,
        )
        await gateway.start()
        api = Api(offered, studio, shelf, keys, metrics, stall_timeout_s=stall_timeout_s, hls_idle_s=hls_idle_s)
        door = HttpDoor(api, **door_options)
        await door.open()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
                yield Deployment(
                    channel=channel,
                    port=gateway.port,
                    stages=by_name,
                    servers=servers,
                    assets=assets,
                    uploads=uploads,
                    studio=studio,
                    store=store,
                    listeners=listeners,
                    shelf=shelf,
                    door=door,
                    http=f"http://127.0.0.1:{door.port}",
                )
        finally:
            await asyncio.gather(gateway.stop(), door.close())
            await api.close()
            await studio.close()
            await gateway_stages.close()
            for server in servers.values():
                if server.port:
                    await server.stop()

    return start
