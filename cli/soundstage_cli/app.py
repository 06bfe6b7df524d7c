"""The `soundstage` command."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.live import Live

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.options_pb2 import DiffusionOptions, Guidance
from soundstage_budget.admit import BudgetsDoNotAddUpError
from soundstage_cli import options
from soundstage_cli.adapters import app as adapters_app
from soundstage_cli.align import app as align_app
from soundstage_cli.audio import app as audio_app
from soundstage_cli.audio import write_audio
from soundstage_cli.bench.command import app as bench_app
from soundstage_cli.compose import app as compose_app
from soundstage_cli.compose import read_request
from soundstage_cli.demo import DemoFailedError, run_demo
from soundstage_cli.doctor import app as doctor_app
from soundstage_cli.generate import generate as make_song
from soundstage_cli.generate import send_files
from soundstage_cli.models import Models, ModelsError, find_models
from soundstage_cli.output import (
    BitRate,
    EncodingName,
    FadeIn,
    FadeOut,
    Gain,
    Mono,
    OutputName,
    SampleFormatName,
    SampleRate,
    check_writable,
    read_ending,
    read_output,
)
from soundstage_cli.play import app as play_app
from soundstage_cli.profile import app as profile_app
from soundstage_cli.sharing import Flags, GpuMemory, check_budgets, share_memory
from soundstage_cli.sinks import AudioFile, Pipe
from soundstage_cli.songs import app as songs_app
from soundstage_cli.stack import Member, ProcessDiedError, Stack
from soundstage_cli.take import Take
from soundstage_cli.task import read_adapters, read_sampler, read_task
from soundstage_cli.upload import check_file, naming_files
from soundstage_cli.view import show_stack, show_timeline

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Music in stages.")
models_app = typer.Typer(no_args_is_help=True, help="Checkpoints on this machine.")
app.add_typer(align_app)
app.add_typer(audio_app)
app.add_typer(play_app)
app.add_typer(songs_app, name="songs")
app.add_typer(compose_app)
app.add_typer(doctor_app)
app.add_typer(profile_app)
app.add_typer(models_app, name="models")
app.add_typer(adapters_app, name="adapters")
app.add_typer(bench_app, name="bench")

PORT: Final = options.whole(0, 65535)

console = Console(stderr=True)


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def up(
    models: Annotated[Path | None, typer.Option(help="directory in the hub's layout; else the hub is asked")] = None,
    lm: Annotated[str | None, typer.Option(help="language model: directory, or hub id owner/name/folder")] = None,
    dit: Annotated[str | None, typer.Option(help="diffusion models, likewise: several with commas")] = None,
    vae: Annotated[str | None, typer.Option(help="decoder, likewise")] = None,
    port: Annotated[int, typer.Option(parser=PORT, help="the gateway's port; 0 takes a free one")] = 50050,
    lm_port: Annotated[int, typer.Option(parser=PORT, help="0 takes a free one")] = 0,
    dit_port: Annotated[int, typer.Option(parser=PORT, help="0 takes a free one")] = 0,
    vae_port: Annotated[int, typer.Option(parser=PORT, help="0 takes a free one")] = 0,
    http_port: Annotated[
        int | None,
        typer.Option(
            parser=PORT,
            envvar="SOUNDSTAGE_GATEWAY_HTTP_PORT",
            help="the page's port; else 50080, or a free one beside --port 0",
        ),
    ] = None,
    gpu_memory: GpuMemory = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SOUNDSTAGE_GATEWAY_DATA_DIR", help="folder to keep songs in; else they are gone when this ends"
        ),
    ] = None,
) -> None:
    """Start the three stages and the gateway, and keep them until Ctrl-C."""
    try:
        found = find_models(models)
    except ModelsError as error:
        raise typer.BadParameter(str(error), param_hint="--models") from error
    if http_port is None:
        http_port = 50080 if port else 0
    wanted = {"--port": port, "--http-port": http_port}
    check_ports({**wanted, "--lm-port": lm_port, "--dit-port": dit_port, "--vae-port": vae_port})
    chosen = Models(lm=lm or found.lm, dit=dit or found.dit, vae=vae or found.vae)
    settings = {"SOUNDSTAGE_GATEWAY_HTTP_PORT": str(http_port)}
    if data_dir is None:
        console.print("songs are kept until this ends; with --data-dir DIR they outlast it", highlight=False)
    else:
        settings["SOUNDSTAGE_GATEWAY_DATA_DIR"] = str(data_dir)
    try:
        if gpu_memory is None:
            check_budgets(os.environ)
        flags = share_memory(console, gpu_memory, chosen, os.environ) if gpu_memory is not None else {}
        asyncio.run(_up(chosen, (port, lm_port, dit_port, vae_port), settings, flags))
    except (BudgetsDoNotAddUpError, ModelsError, ProcessDiedError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def check_ports(ports: Mapping[str, int]) -> None:
    """Refuse a port that is taken or asked for twice, before models are loaded for it; 0 is always free."""
    asked: dict[int, str] = {}
    for hint, port in ports.items():
        check_port(hint, port)
        if port and port in asked:
            message = f"is {port}, as {asked[port]} is; give another, or 0 for a free one"
            raise typer.BadParameter(message, param_hint=hint)
        asked[port] = hint


def check_port(hint: str, port: int) -> None:
    """Refuse a port where something listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"is {port}, where something listens already; give another, or 0 for a free one"
            raise typer.BadParameter(message, param_hint=hint) from error


async def _up(models: Models, ports: tuple[int, int, int, int], settings: Mapping[str, str], flags: Flags) -> None:
    with Live(console=console, auto_refresh=False) as live:

        def show(member: Member) -> None:
            if console.is_terminal:
                live.update(show_stack(stack), refresh=True)
            else:
                console.print(f"{member.name} {member.state} (pid {member.process.pid if member.process else '-'})")

        stack = Stack(
            models,
            ports=ports,
            settings=settings,
            flags=flags,
            on_change=show,
            on_warning=lambda member, line: console.print(f"{member.name}: {line}", markup=False, highlight=False),
        )
        ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        life = asyncio.create_task(_live(stack))
        end = asyncio.create_task(ended.wait())
        try:
            await asyncio.wait({life, end}, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                life.result()
        finally:
            life.cancel()
            end.cancel()
            await stack.stop()


async def _live(stack: Stack) -> None:
    await stack.start()
    print(f"soundstage is ready at {stack.target}\nlisten at {stack.page}", flush=True)
    await stack.watch()


@app.command()
def generate(
    caption: options.Caption = "",
    lyrics_file: options.LyricsFile = None,
    output: OutputName = "song.wav",
    request_file: Annotated[
        typer.FileText | None,
        typer.Option("--request", encoding="utf-8", help="a request in JSON, as `plan -o` writes; options add to it"),
    ] = None,
    duration: options.Duration = None,
    seed: options.Seed = None,
    variants: Annotated[int, typer.Option(parser=options.whole(1, 8), help="how many songs")] = 1,
    bpm: options.Bpm = None,
    key: options.Key = None,
    time_signature: options.TimeSignature = None,
    language: options.Language = None,
    instrumental: options.Instrumental = False,
    plan: Annotated[bool, typer.Option(help="let the language model plan the song")] = True,
    rewrite_caption: Annotated[bool, typer.Option(help="let it write a caption of its own")] = True,
    steps: options.Steps = None,
    shift: options.Shift = None,
    sampler: options.SamplerName = None,
    guidance_scale: options.GuidanceScale = None,
    adapter: options.Adapters = None,
    task: options.TaskName = None,
    source: options.Source = None,
    reference: options.References = None,
    start: options.Start = None,
    end: options.End = None,
    track: options.Tracks = None,
    strength: options.Strength = None,
    mode: options.Mode = None,
    source_caption: options.SourceCaption = "",
    source_lyrics_file: options.SourceLyricsFile = None,
    mix_caption: options.MixCaption = "",
    model: options.Model = "",
    encoding: EncodingName = None,
    sample_format: SampleFormatName = None,
    sample_rate: SampleRate = None,
    mono: Mono = False,
    bit_rate: BitRate = None,
    gain: Gain = 0.0,
    fade_in: FadeIn = 0.0,
    fade_out: FadeOut = 0.0,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Make a song and write it while it is being decoded. It outlives a lost connection; Ctrl-C cancels it."""
    if output == "-" and variants != 1:
        raise typer.BadParameter("a pipe takes one variant", param_hint="--variants")
    written = read_output(
        output,
        encoding=encoding,
        sample_format=sample_format,
        sample_rate=sample_rate,
        mono=mono,
        bit_rate=bit_rate,
        gain=gain,
        fade_in=fade_in,
        fade_out=fade_out,
    )
    options.check_words("CAPTION", caption)
    for hint, words in (("--source-caption", source_caption), ("--mix-caption", mix_caption), ("--model", model)):
        options.check_words(hint, words)
    references = reference or []
    for hint, path in (("--source", source), *(("--reference", path) for path in references)):
        if path is not None:
            check_file(hint, path)
    request = read_request(request_file, hint="--request") if request_file else GenerateSongRequest()
    request.MergeFrom(
        GenerateSongRequest(
            caption=caption,
            lyrics=options.read_lyrics(lyrics_file),
            instrumental=instrumental,
            metadata=options.read_metadata(
                duration=duration, bpm=bpm, key=key, time_signature=time_signature, language=language
            ),
            output=written,
            diffusion=DiffusionOptions(
                steps=steps,
                shift=shift,
                sampler=read_sampler(sampler),
                guidance=None if guidance_scale is None else Guidance(scale=guidance_scale),
            ),
            adapters=read_adapters(adapter or []),
            model=model,
            task=read_task(
                task,
                start=start,
                end=end,
                track=track,
                strength=strength,
                mode=mode,
                source_caption=source_caption,
                source_lyrics_file=options.read_lyrics(source_lyrics_file, hint="--source-lyrics-file"),
                mix_caption=mix_caption,
            ),
        )
    )
    if request.HasField("task") and source is None and not request.source:
        raise typer.BadParameter(f"is not given; --task {task} works on a file", param_hint="--source")
    if not plan:
        request.planner.enabled = False
    if not rewrite_caption:
        request.planner.rewrite_caption = False
    request.variants = variants
    if seed is not None:
        request.seeds[:] = [(seed + variant) % 2**32 for variant in range(variants)]
    files = [] if output == "-" else [AudioFile(path) for path in name_files(Path(output), variants)]

    async def make() -> Take:
        sent = await send_files(gateway, request, source, references)
        with ExitStack() as stack, naming_files(sent):
            for file in files:
                stack.enter_context(file)
            return await make_song(console, gateway, request, files or [Pipe(sys.stdout.buffer)])

    show_timeline(console, write_audio(gateway, output, make(), files))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="the WAV file to write")] = Path("demo.wav"),
    models: Annotated[Path, typer.Option(help="where the tiny checkpoints are kept")] = Path(".demo/models"),
) -> None:
    """Make a 20 s song with four processes on tiny random models, and draw when what happened."""
    read_ending(output, ["wav"])
    check_writable(output)
    try:
        run_demo(console, output=output, models=models)
    except (DemoFailedError, ModelsError, ProcessDiedError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error


def name_files(path: Path, count: int) -> list[Path]:
    """Name a file for every variant: song.wav, or song-1.wav, song-2.wav and so on."""
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{number + 1}") for number in range(count)]


@models_app.command()
def tiny(folder: Annotated[Path, typer.Argument(help="where to write; made if need be")]) -> None:
    """Write small random checkpoints in both layouts: for tests and demos, they make noise."""
    from soundstage_cli.tiny.checkpoints import write_tiny

    try:
        made = write_tiny(folder)
    except OSError as error:
        raise typer.BadParameter(
            f"is {str(folder)!r}, which cannot be written: {error}", param_hint="FOLDER"
        ) from error
    for path in made:
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
