"""How long a song's decoding takes: our codec and diffusers' own tiled decode, with the same random weights.

Rounds alternate, so that whatever else the machine does befalls both alike, and a ratio is taken within each round.
On a card diffusers' float32 is what torch makes of it there, which rounds to TF32; ours never does, and is compared
with diffusers' without it too. On a CPU diffusers' codec has its memory as glibc gives it, and then keeps all that is
freed.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from numpy.typing import NDArray
from rich.table import Table

from soundstage_cli.bench.clock import GLIBC_KEEPS_BYTES, MOST_KEPT_BYTES, is_enough
from soundstage_cli.bench.report import Ratio, Report, Spread, name_machine, spread
from soundstage_cli.tiny.vae import write_vae
from soundstage_device.budget import STAGE_KEEPS_BYTES, keep_freed_memory
from soundstage_vae.codec import Codec
from soundstage_vae.tiling import DECODE_CONTEXT, plan_tiles, window_lengths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE: Final = "diffusers"
BASELINE_EXACT: Final = "diffusers, without TF32"
BASELINE_KEPT: Final = "diffusers, memory kept"
OURS: Final = "soundstage"
OURS_COMPILED: Final = "soundstage, compiled"
_KEEPS_BYTES: Final = {BASELINE: GLIBC_KEEPS_BYTES, BASELINE_KEPT: MOST_KEPT_BYTES}  # others as a stage
_FRAMES_PER_S: Final = 25
_FIRST_WINDOW: Final = 32
SIZES: Final = {"real": (128, (1, 2, 4, 8, 16)), "tiny": (8, (1, 1, 1, 1, 1))}  # channels, and multiples of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and where."""

    size: str
    duration_s: int
    windows: Sequence[int]  # the longest window of ours, in latent frames
    rounds: int
    threads: int
    device: str
    dtype: str
    is_compiled: bool  # ours too, compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How long a song took, and its first audio, the middles of several where that is short."""

    engine: str
    round: int
    song_s: float
    first_audio_s: float

    def __str__(self) -> str:
        return f"{self.engine}: {self.song_s:.3g} s, first audio after {self.first_audio_s:.3g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How long an engine takes for a song; `times` are a peer's time to its own in the same round, by peer."""

    engine: str
    song_s: Spread
    times: Mapping[str, Spread]
    first_audio_s: Spread


Decode = Callable[[], Iterator[object]]  # a song, tile by tile


@torch.inference_mode()
def measure(plan: Plan, tell: Callable[[str], None]) -> Iterator[list[Run]]:
    """Yield the runs of each round, the baseline first."""
    torch.set_num_threads(plan.threads)
    tell(f"making random weights of size {plan.size}")
    theirs, ours = make_both(plan)
    latents = np.random.default_rng(0).standard_normal((plan.duration_s * _FRAMES_PER_S, 64)).astype(np.float32)
    columns = torch.from_numpy(latents.T[None].copy()).to(plan.device, getattr(torch, plan.dtype))

    def decode_theirs() -> Iterator[object]:
        yield theirs.decode(columns).sample.float().cpu()

    def decode_exactly() -> Iterator[object]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield theirs.decode(columns).sample.float().cpu()

    codecs = {OURS: ours}
    if plan.is_compiled:
        tell("compiling")
        codecs[OURS_COMPILED] = deepcopy(ours)
        if not codecs[OURS_COMPILED].compile_snakes():
            tell(f"{OURS_COMPILED} is left out: the compiler failed, as the log says")
            del codecs[OURS_COMPILED]
    engines: dict[str, Decode] = {BASELINE: decode_theirs}
    if plan.device == "cpu":
        engines[BASELINE_KEPT] = decode_theirs
    elif plan.dtype == "float32":
        engines[BASELINE_EXACT] = decode_exactly
    for window in plan.windows:
        for name, codec in codecs.items():
            engines[f"{name}, windows to {window}"] = _decoding(codec, latents, window)
    # A rehearsal first: memory is taken, and kernels are made, at first use.
    for number in range(plan.rounds + 1):
        runs = [_clock(name, number, decode) for name, decode in engines.items()]
        tell(f"{f'round {number}' if number else 'rehearsal'}: {'; '.join(map(str, runs))}")
        if number:
            yield runs


def make_both(plan: Plan) -> tuple[Any, Codec]:
    """Make random weights, and give them to diffusers' codec, with its tiling on, and to ours."""
    device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
    channels, multiples = SIZES[plan.size]
    with TemporaryDirectory() as folder:
        write_vae(Path(folder), channels=channels, multiples=multiples)
        ours = Codec(Path(folder), device=device, dtype=dtype)
        theirs: Any = AutoencoderOobleck.from_pretrained(folder)
    theirs.requires_grad_(False).to(device, dtype).enable_tiling()
    return theirs, ours


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    songs_s = {(run.engine, run.round): run.song_s for run in runs}
    engines = list(dict.fromkeys(run.engine for run in runs))
    baselines = [engine for engine in engines if engine in (BASELINE, BASELINE_EXACT, BASELINE_KEPT)]
    summaries: list[Summary] = []
    for engine in engines:
        own = [run for run in runs if run.engine == engine]
        peers = [] if engine in baselines else baselines
        summaries.append(
            Summary(
                engine=engine,
                song_s=spread([run.song_s for run in own]),
                times={peer: spread([songs_s[peer, run.round] / run.song_s for run in own]) for peer in peers},
                first_audio_s=spread([run.first_audio_s for run in own]),
            )
        )
    return summaries


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    peers = list(dict.fromkeys(peer for one in summaries for peer in one.times))
    table = Table(title="decoding a song: median (least–most)")
    for heading in ("engine", "song, s", "first audio, s", *(f"times as fast as {peer}" for peer in peers)):
        table.add_column(heading, justify="left" if heading == "engine" else "right", overflow="fold")
    for one in summaries:
        times = [str(one.times.get(peer, "")) for peer in peers]
        table.add_row(one.engine, str(one.song_s), str(one.first_audio_s), *times)
    return table


def make_report(plan: Plan, runs: Sequence[Run]) -> Report:
    """Sum up the rounds and lay them out."""
    summaries = summarize(runs)
    return Report(
        name=f"vae-{plan.size}-{plan.device}-{plan.dtype}-{plan.duration_s}s",
        facts={
            "machine": name_machine(plan.device, plan.threads),
            "size": plan.size,
            "dtype": plan.dtype,
            "duration_s": plan.duration_s,
        },
        ratios=[
            Ratio(case=one.engine, peer=peer, times=times) for one in summaries for peer, times in one.times.items()
        ],
        summaries=summaries,
        runs=runs,
        table=make_table(summaries),
        draw=lambda figure: _draw(figure, summaries),
    )


def _decoding(codec: Codec, latents: NDArray[np.float32], window: int) -> Decode:
    tiles = plan_tiles(len(latents), windows=window_lengths(_FIRST_WINDOW, window), context=DECODE_CONTEXT)

    def decode() -> Iterator[object]:
        for tile in tiles:
            yield codec.decode(latents[tile.window_start : tile.window_stop], tile.core)

    return decode


def _clock(engine: str, number: int, decode: Decode) -> Run:
    songs_s: list[float] = []
    firsts_s: list[float] = []
    keep_freed_memory(_KEEPS_BYTES.get(engine, STAGE_KEEPS_BYTES))
    while not is_enough(songs_s):
        start, came_s = time.perf_counter(), list[float]()
        for _ in decode():  # each tile lies in the CPU's memory when it comes
            came_s.append(time.perf_counter() - start)
        songs_s.append(came_s[-1])
        firsts_s.append(came_s[0])
    return Run(engine=engine, round=number, song_s=median(songs_s), first_audio_s=median(firsts_s))


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    names = [one.engine for one in summaries]
    axes.barh(names, [one.song_s.median for one in summaries], label="the whole song")
    axes.barh(names, [one.first_audio_s.median for one in summaries], label="the first audio")
    axes.set(xlabel="seconds until decoded")
    axes.invert_yaxis()
    axes.legend()
