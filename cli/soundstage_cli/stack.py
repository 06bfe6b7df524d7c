"""The four processes on this machine: started, watched and stopped together."""

import asyncio
import ctypes
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from soundstage_cli.models import Models

STAGES: Final = ("lm", "dit", "vae")
# What a process has unless a variable says otherwise. Teams of threads that share cores must not wait for each other
# with their eyes open for long: see decision 26.
_DEFAULTS: Final = {"SOUNDSTAGE_GATEWAY_HTTP_PORT": "0", "GOMP_SPINCOUNT": "4000"}
_LINES_KEPT: Final = 12
_LINE_BYTES: Final = 1 << 20
_PR_SET_PDEATHSIG: Final = 1
_NOT_TOLD: Final = ("event", "level", "process", "timestamp", "exception")


@dataclass(slots=True, kw_only=True)
class Member:
    """One process: its state is starting, warming, ready, stopped or died."""

    name: str
    state: str = "starting"
    port: int = 0
    process: Process | None = None
    lines: deque[str] = field(default_factory=lambda: deque[str](maxlen=_LINES_KEPT))

    @property
    def is_running(self) -> bool:
        """Whether the process has begun and not ended."""
        return self.process is not None and self.process.returncode is None


class ProcessDiedError(Exception):
    """A process ended that should not have; the message says which, how, and its last words."""


class Stack:
    """Three stages and a gateway. `ports` gives the gateway's, lm's, dit's and vae's, 0 for a free one.

    `settings` are environment variables that all four have besides this process's own; `flags` are of one process
    each. `page` is where the gateway is reached by HTTP: at a free port, unless one of those variables names another.
    """

    def __init__(
        self,
        models: Models,
        *,
        ports: tuple[int, int, int, int] = (0, 0, 0, 0),
        settings: Mapping[str, str] | None = None,
        flags: Mapping[str, Sequence[str]] | None = None,
        on_change: Callable[[Member], None] = lambda _: None,
        on_warning: Callable[[Member, str], None] = lambda _member, _line: None,
        stop_timeout_s: float = 40.0,
    ) -> None:
        given = {"lm": ["--model", models.lm], "dit": ["--model", models.dit], "vae": ["--model", models.vae]}
        self._arguments = {name: [*given.get(name, ()), *(flags or {}).get(name, ())] for name in (*STAGES, "gateway")}
        self._ports: dict[str, int] = dict(zip(("gateway", *STAGES), ports, strict=True))
        self.members = {name: Member(name=name) for name in self._arguments}
        self._settings = settings or {}
        self._on_change = on_change
        self._on_warning = on_warning
        self._stop_timeout_s = stop_timeout_s
        self.page = ""
        self._changed = asyncio.Event()
        self._readers: dict[str, asyncio.Task[None]] = {}

    @property
    def target(self) -> str:
        """The gateway's address."""
        return f"127.0.0.1:{self.members['gateway'].port}"

    async def start(self) -> None:
        """Start all and wait until each is ready; raises ProcessDiedError."""
        for name in STAGES:
            await self.spawn(name)
        await self._wait(lambda: all(self.members[name].port for name in STAGES))
        await self.spawn("gateway")
        await self.wait_until_ready()

    async def spawn(self, name: str) -> None:
        """Start one process, or start it again on the port it had."""
        member = self.members[name]
        arguments = self._arguments[name]
        if name == "gateway":
            arguments = arguments + [
                part for stage in STAGES for part in (f"--{stage}", f"127.0.0.1:{self.members[stage].port}")
            ]
        port = str(member.port or self._ports[name])
        command = [sys.executable, "-m", f"soundstage_{name}", "--log-format", "json", "--port", port, *arguments]
        # A session of its own: Ctrl-C is ours to pass on, in an order that lets songs end.
        member.process = await asyncio.create_subprocess_exec(
            *command,
            stderr=PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,
            preexec_fn=die_with_parent,
            # What matters of gRPC's own log is in ours.
            env={**_DEFAULTS, **os.environ, **self._settings, "GRPC_VERBOSITY": "NONE"},
        )
        self._set_state(member, "starting")
        self._readers[name] = asyncio.create_task(self._read(member, member.process))

    async def wait_until_ready(self) -> None:
        """Wait until every process is ready; raises ProcessDiedError."""
        await self._wait(lambda: all(member.state == "ready" for member in self.members.values()))

    async def watch(self) -> None:
        """Wait for ever; raises ProcessDiedError when a process ends."""
        await self._wait(lambda: False)

    async def stop(self) -> None:
        """End the gateway, which lets songs in flight end, and then the stages; SIGKILL those that take too long."""
        for names in (("gateway",), STAGES):
            running = [self.members[name] for name in names if self.members[name].is_running]
            for member in running:
                self._set_state(member, "stopped")
                self._signal(member, signal.SIGTERM)
            try:
                async with asyncio.timeout(self._stop_timeout_s):
                    await asyncio.gather(*(self._readers[member.name] for member in running))
            except TimeoutError:
                for member in running:
                    self._signal(member, signal.SIGKILL)
                # Their readers went with the time.
                await asyncio.gather(*(member.process.wait() for member in running if member.process is not None))

    async def _read(self, member: Member, process: Process) -> None:
        assert process.stderr is not None
        while not process.stderr.at_eof():
            try:
                line = (await process.stderr.readline()).decode(errors="replace").rstrip()
            except ValueError:
                continue  # longer than any line of ours; what is read so far is dropped
            event = _read_event(line)
            if event.get("level") != "info":
                member.lines.append(_tell(event) or line)
            if member.state == "stopped":
                continue
            if event.get("event") == "listening":
                member.port = event["port"]
                self._set_state(member, "warming")
            elif event.get("event") == "http_listening":
                self.page = f"http://127.0.0.1:{event['port']}"
            elif event.get("event") == "ready":
                self._set_state(member, "ready")
            elif event.get("level") in ("warning", "error"):
                self._on_warning(member, _tell(event))
        await process.wait()
        if member.state != "stopped" and member.process is process:
            self._set_state(member, "died")

    async def _wait(self, is_done: Callable[[], bool]) -> None:
        while not is_done():
            for member in self.members.values():
                if member.state == "died":
                    raise ProcessDiedError(_obituary(member))
            self._changed.clear()
            await self._changed.wait()

    def _set_state(self, member: Member, state: str) -> None:
        member.state = state
        self._changed.set()
        self._on_change(member)

    def _signal(self, member: Member, number: signal.Signals) -> None:
        if member.is_running and member.process is not None:
            member.process.send_signal(number)


def die_with_parent() -> None:
    """In a child: ask for SIGTERM when the parent ends, however it ends. Linux alone can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _read_event(line: str) -> dict[str, Any]:
    """Read a log line; one that is not ours, a traceback's say, is an empty event."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _tell(event: dict[str, Any]) -> str:
    """Write a log event in a line for people."""
    fields = " ".join(f"{name}={value}" for name, value in event.items() if name not in _NOT_TOLD)
    return f"{event.get('event', '')} {fields}".strip()


def _obituary(member: Member) -> str:
    status = member.process.returncode if member.process is not None else None
    how = f"killed by {signal.Signals(-status).name}" if status is not None and status < 0 else f"exit status {status}"
    last = "\n".join(f"  {line}" for line in member.lines if line.strip()) or "  (it said nothing)"
    return f"{member.name} died ({how}). Its last words:\n{last}"
