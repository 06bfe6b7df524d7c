"""The three stages as the gateway sees them: channels, calls that tell their errors, and who they are."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar, cast

import grpc
import grpc.aio

from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, STAGE_VAE, Stage
from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceStub
from soundstage.stage.v1.lm_service_pb2_grpc import LmServiceStub
from soundstage.stage.v1.stage_service_pb2 import DescribeRequest, DescribeResponse
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceStub
from soundstage.stage.v1.vae_service_pb2_grpc import VaeServiceStub
from soundstage_runtime.call import next_hop
from soundstage_runtime.errors import StageUnavailableError, from_rpc
from soundstage_runtime.serve import CHANNEL_OPTIONS

NAMES: Final = {STAGE_LM: "lm", STAGE_DIT: "dit", STAGE_VAE: "vae"}
_DESCRIBE_TIMEOUT_S = 5.0

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """gRPC targets of the stages, `host:port`."""

    lm: str
    dit: str
    vae: str


class Stages:
    """Open channels to the stages. A stage that is away is tried again at every call."""

    def __init__(self, targets: Targets) -> None:
        self._channels = {
            stage: grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            for stage, target in ((STAGE_LM, targets.lm), (STAGE_DIT, targets.dit), (STAGE_VAE, targets.vae))
        }
        self.lm = LmServiceStub(self._channels[STAGE_LM])
        self.dit = DitServiceStub(self._channels[STAGE_DIT])
        self.vae = VaeServiceStub(self._channels[STAGE_VAE])

    async def describe(self, stage: Stage.ValueType) -> DescribeResponse:
        """Ask a stage what it serves; raises StageUnavailableError when it does not answer."""
        hop = next_hop()
        is_ours = hop.timeout_s is None or hop.timeout_s > _DESCRIBE_TIMEOUT_S
        timeout_s = _DESCRIBE_TIMEOUT_S if is_ours else hop.timeout_s
        try:
            return await StageServiceStub(self._channels[stage]).Describe(
                DescribeRequest(), timeout=timeout_s, metadata=hop.metadata
            )
        except grpc.aio.AioRpcError as error:
            if is_ours and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                message = f"the {NAMES[stage]} stage: no answer within {_DESCRIBE_TIMEOUT_S:g} s"
                raise StageUnavailableError(message, metadata={"stage": NAMES[stage]}, retry_after_s=5) from error
            raise from_rpc(NAMES[stage], error) from error

    async def close(self) -> None:
        """Close the channels; calls in flight are cancelled."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))


async def ask(
    stage: Stage.ValueType, method: Callable[..., object], request: Request | AsyncIterable[Request], _: type[Response]
) -> AsyncGenerator[Response, None]:
    """Call a streaming method of a stage with the current ids and deadline.

    Leaving the iteration, for whatever reason, cancels the call. Raises what `from_rpc` makes of a failed call.
    """
    hop = next_hop()
    call = cast(
        "grpc.aio.UnaryStreamCall[Request, Response]", method(request, timeout=hop.timeout_s, metadata=hop.metadata)
    )
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc(NAMES[stage], error) from error
    finally:
        call.cancel()


async def ask_once(stage: Stage.ValueType, method: Callable[..., Awaitable[Response]], request: object) -> Response:
    """Call a method of a stage that answers once. Raises what `from_rpc` makes of a failed call."""
    hop = next_hop()
    try:
        return await method(request, timeout=hop.timeout_s, metadata=hop.metadata)
    except grpc.aio.AioRpcError as error:
        raise from_rpc(NAMES[stage], error) from error
