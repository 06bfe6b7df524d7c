"""The stack, with processes that need no model."""

import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soundstage_cli.app import app
from soundstage_cli.models import Models
from soundstage_cli.stack import Member, ProcessDiedError, Stack

MODELS = Models(lm="a", dit="b", vae="c")
READY = """
import json, signal, sys, time
def say(**event):
    print(json.dumps(event), file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, lambda *_: (say(event="ended"), sys.exit(0)))
{before}
say(event="checked", level="warning", arguments=sys.argv[1:])
say(event="listening", port=4000 + {number})
say(event="ready")
signal.pause()
"""

Fake = Callable[..., None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a script in the place of a process; the others come up at once and wait to be ended."""

    def write(name: str, script: str) -> None:
        package = tmp_path / f"soundstage_{name}"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()  # else the real package, further down the path, would win
        (package / "__main__.py").write_text(script)

    for number, name in enumerate(("lm", "dit", "vae", "gateway")):
        write(name, READY.format(before="", number=number))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


async def test_the_gateway_is_told_where_the_stages_are(fake: Fake) -> None:
    told: dict[str, str] = {}

    def hear(member: Member, line: str) -> None:
        told[member.name] = line

    stack = Stack(MODELS, ports=(7, 0, 0, 0), on_warning=hear)
    await stack.start()
    assert stack.target == "127.0.0.1:4003"
    await stack.stop()
    for argument in ("'--lm', '127.0.0.1:4000'", "'--dit', '127.0.0.1:4001'", "'--vae', '127.0.0.1:4002'", "'7'"):
        assert argument in told["gateway"]
    assert "'--model', 'b'" in told["dit"]


async def test_threads_that_share_cores_spin_little_unless_told_otherwise(fake: Fake) -> None:
    fake("vae", READY.format(before='import os; say(event=os.environ["GOMP_SPINCOUNT"], level="warning")', number=2))
    for settings, count in (({}, "4000"), ({"GOMP_SPINCOUNT": "77"}, "77")):
        words: list[str] = []
        stack = Stack(MODELS, settings=settings, on_warning=lambda _, line, words=words: words.extend(line.split()))
        await stack.start()
        await stack.stop()
        assert count in words


async def test_the_gateway_ends_before_the_stages(fake: Fake) -> None:
    states: list[tuple[str, str]] = []
    stack = Stack(MODELS, on_change=lambda member: states.append((member.name, member.state)))
    await stack.start()
    await stack.stop()
    assert [name for name, state in states if state == "stopped"] == ["gateway", "lm", "dit", "vae"]
    assert all(member.process and member.process.returncode == 0 for member in stack.members.values())


async def test_a_line_longer_than_any_of_ours_is_survived(fake: Fake) -> None:
    fake("dit", READY.format(before="print('x' * 3_000_000, file=sys.stderr)", number=1))
    stack = Stack(MODELS)
    await stack.start()
    await stack.stop()


async def test_a_process_that_cannot_start_is_named_with_its_last_words(fake: Fake) -> None:
    fake("vae", "import sys; sys.exit('soundstage_vae: no such model')")
    stack = Stack(MODELS)
    with pytest.raises(ProcessDiedError, match=r"vae died \(exit status 1\)[^$]*soundstage_vae: no such model"):
        await stack.start()
    await stack.stop()
    assert not any(member.is_running for member in stack.members.values())


async def test_a_process_that_only_broke_a_line_said_nothing(fake: Fake) -> None:
    fake("vae", "import sys; sys.exit('\\n')")
    stack = Stack(MODELS)
    with pytest.raises(ProcessDiedError, match="it said nothing"):
        await stack.start()
    await stack.stop()


def test_a_demo_whose_models_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    models = tmp_path / "file" / "models"
    done = CliRunner().invoke(app, ["demo", "--models", str(models), "-o", str(tmp_path / "demo.wav")])
    assert (done.exit_code, "--models is" in done.stderr, "cannot be written" in done.stderr) == (1, True, True)


async def test_a_process_that_is_killed_later_is_noticed(fake: Fake) -> None:
    stack = Stack(MODELS)
    await stack.start()
    process = stack.members["lm"].process
    assert process is not None
    process.send_signal(signal.SIGKILL)
    with pytest.raises(ProcessDiedError, match=r"lm died \(killed by SIGKILL\)"):
        await stack.watch()
    await stack.stop()


async def test_a_process_that_does_not_end_is_killed_and_gone_when_the_stack_has_stopped(fake: Fake) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    for number, name in ((1, "dit"), (3, "gateway")):
        fake(name, READY.format(before=deaf, number=number))
    stack = Stack(MODELS, stop_timeout_s=0.1)
    await stack.start()
    await stack.stop()
    for name in ("dit", "gateway"):
        process = stack.members[name].process
        assert process is not None
        assert process.returncode == -signal.SIGKILL
    assert not any(member.is_running for member in stack.members.values())


@pytest.mark.parametrize("arguments", [["--data-dir", "kept"], []])
def test_the_gateway_is_told_where_songs_are_kept(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.delenv("SOUNDSTAGE_GATEWAY_DATA_DIR", raising=False)
    fake("gateway", "import os, sys; sys.exit('keeps in ' + os.environ.get('SOUNDSTAGE_GATEWAY_DATA_DIR', 'nothing'))")
    done = CliRunner().invoke(app, ["up", "--port", "0", "--http-port", "0", *arguments])
    assert f"keeps in {arguments[-1] if arguments else 'nothing'}" in done.stderr
    assert ("songs are kept until this ends" in done.stderr) == (not arguments)


def test_two_servers_on_one_port_are_refused_before_anything_starts(unused_tcp_port: int) -> None:
    port = str(unused_tcp_port)
    done = CliRunner().invoke(app, ["up", "--port", port, "--lm-port", port])
    assert (done.exit_code, f"--lm-port: is {port}, as --port is" in done.stderr) == (2, True)


async def test_processes_do_not_outlive_a_killed_parent(fake: Fake, tmp_path: Path) -> None:
    script = (
        "import asyncio\nfrom soundstage_cli.models import Models\nfrom soundstage_cli.stack import Stack\n"
        "async def main():\n"
        "    stack = Stack(Models(lm='a', dit='b', vae='c'))\n"
        "    await stack.start()\n"
        "    print(*[member.process.pid for member in stack.members.values()], flush=True)\n"
        "    await stack.watch()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    assert len((await parent.stdout.readline()).split()) == 4
    parent.kill()
    async with asyncio.timeout(10):
        await parent.stdout.read()  # they hold its other end: it ends when the last of them has
    await parent.wait()
