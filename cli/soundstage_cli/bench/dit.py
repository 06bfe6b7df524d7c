"""How long a diffusion step takes: our transformer and diffusers', with the same random weights and inputs.

Rounds alternate, so that whatever else the machine does befalls both alike, and a ratio is taken within each round.
Where both are measured compiled too there are as many rounds again with all of them: who runs out of time while they
are compiled has the others' rounds.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Final, cast

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from torch import Tensor

from soundstage_cli.bench.clock import MOST_KEPT_BYTES, is_enough, synchronize
from soundstage_cli.tiny.dit import original_name
from soundstage_device.budget import keep_freed_memory
from soundstage_device.linear import pack_linears
from soundstage_dit.model.dit import Dit
from soundstage_dit.model.shape import DitShape, StackShape

BASELINE: Final = "diffusers"
BASELINE_COMPILED: Final = "diffusers, compiled"
OURS: Final = "soundstage"
OURS_COMPILED: Final = "soundstage, compiled"
SLIDING: Final = "soundstage, sliding layers alone"
_FRAMES_PER_S: Final = 25
_CONDITIONS: Final = 300  # of words, lyrics and timbre: a song of two verses
_TIME: Final = 0.5
_CHANNELS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A transformer's size, named as in a checkpoint's configuration."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    encoder_hidden_size: int
    sliding_window: int = 128
    in_channels: int = 3 * _CHANNELS
    patch_size: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    @property
    def shape(self) -> DitShape:
        """The same for our transformer."""
        windows = [self.sliding_window if layer % 2 == 0 else None for layer in range(self.num_hidden_layers)]
        return DitShape(
            stack=StackShape(
                width=self.hidden_size,
                mlp_width=self.intermediate_size,
                heads=self.num_attention_heads,
                kv_heads=self.num_key_value_heads,
                head_dim=self.head_dim,
                windows=tuple(windows),
                rope_theta=self.rope_theta,
                eps=self.rms_norm_eps,
            ),
            condition_width=self.encoder_hidden_size,
            in_channels=self.in_channels,
            channels=_CHANNELS,
            patch=self.patch_size,
        )


def _size(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, words: int) -> Size:
    return Size(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        encoder_hidden_size=words,
    )


SIZES: Final = {
    "tiny": _size(64, 128, 2, 4, 2, 16, 64),
    "mid": _size(512, 1536, 8, 8, 4, 64, 512),
    "2B": _size(2048, 6144, 24, 16, 8, 128, 2048),
    "XL": _size(2560, 9728, 32, 32, 8, 128, 2048),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """So many songs of one length in a step."""

    duration_s: int
    songs: int


CASES: Final = (
    Case(duration_s=30, songs=1),
    Case(duration_s=60, songs=1),
    Case(duration_s=240, songs=1),
    Case(duration_s=600, songs=1),
    Case(duration_s=30, songs=8),
)
SLIDING_CASES: Final = (Case(duration_s=60, songs=1), Case(duration_s=600, songs=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How long a step of a case took, the middle of several."""

    engine: str
    duration_s: int
    songs: int
    round: int
    step_s: float

    def __str__(self) -> str:
        return f"{self.engine}, {self.songs} x {self.duration_s} s: {self.step_s:.3g} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, and where."""

    size: str
    cases: Sequence[Case]
    rounds: int
    threads: int
    device: str
    dtype: str
    is_compiled: bool  # both transformers too, compiled


Step = Callable[[], Sequence[Tensor]]  # the velocities of all songs, [frames, channels] each
Steps = dict[tuple[str, Case], Step]  # by the engine and the case


@torch.inference_mode()
def measure(plan: Plan, tell: Callable[[str], None]) -> Iterator[list[Run]]:
    """Yield the runs of each round, the baseline first in each case."""
    torch.set_num_threads(plan.threads)
    keep_freed_memory(MOST_KEPT_BYTES)  # for both
    tell(f"making random weights of size {plan.size}")
    theirs = make_theirs(plan)
    ours = make_ours(theirs, plan)
    pack_linears(ours)
    sliding = make_sliding(theirs, plan)
    pack_linears(sliding)
    steps: Steps = {}
    for case in plan.cases:
        for engine, model in ((BASELINE, theirs), (OURS, ours), (SLIDING, sliding)):
            if engine != SLIDING or case in SLIDING_CASES:
                steps[engine, case] = make_step(model, case, SIZES[plan.size], plan)
    # A rehearsal first: memory is taken, and kernels are made, at first use.
    tell(f"rehearsal: {'; '.join(map(str, _perform(steps, 0, plan.device)))}")
    for number in range(plan.rounds):
        yield _tell_round(_perform(steps, number + 1, plan.device), tell)
    if plan.is_compiled:
        steps |= _compile(theirs, plan, tell)
        for number in range(plan.rounds, 2 * plan.rounds):
            yield _tell_round(_perform(steps, number + 1, plan.device), tell)


def _compile(theirs: AceStepTransformer1DModel, plan: Plan, tell: Callable[[str], None]) -> Steps:
    """Compile both and rehearse their steps; whom the compiler fails is left out."""
    ours = make_ours(theirs, plan)
    ours.compile_layers()
    done: Steps = {}
    for engine, model in ((BASELINE_COMPILED, compile_layers(deepcopy(theirs))), (OURS_COMPILED, ours)):
        tell(f"{engine}: compiling")
        steps: Steps = {(engine, case): make_step(model, case, SIZES[plan.size], plan) for case in plan.cases}
        try:
            tell(f"rehearsal: {'; '.join(map(str, _perform(steps, 0, plan.device)))}")
        except Exception as error:  # theirs to fail in any way: the others are measured all the same
            tell(f"{engine} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        if engine == OURS_COMPILED and not ours.is_compiled:
            tell(f"{engine} is left out: the compiler failed, as the log says")
        else:
            done |= steps
    return done


def _perform(steps: Steps, number: int, device: str) -> list[Run]:
    return [
        Run(engine=engine, round=number, step_s=_clock(step, device), **asdict(case))
        for (engine, case), step in steps.items()
    ]


def _tell_round(runs: list[Run], tell: Callable[[str], None]) -> list[Run]:
    tell(f"round {runs[0].round}: {'; '.join(map(str, runs))}")
    return runs


def make_theirs(plan: Plan) -> AceStepTransformer1DModel:
    """Make diffusers' transformer with random weights."""
    torch.manual_seed(0)
    with torch.device(plan.device):
        theirs = AceStepTransformer1DModel(**asdict(SIZES[plan.size]), audio_acoustic_hidden_dim=_CHANNELS)
    return cast(Any, theirs).to(getattr(torch, plan.dtype)).requires_grad_(False).eval()


def make_ours(theirs: AceStepTransformer1DModel, plan: Plan) -> Dit:
    """Make our transformer with the very weights of theirs."""
    return _build(SIZES[plan.size].shape, _weights(theirs))


def make_sliding(theirs: AceStepTransformer1DModel, plan: Plan) -> Dit:
    """Make a transformer of no other layers than the sliding ones of theirs."""
    shape = SIZES[plan.size].shape
    windows = [(layer, window) for layer, window in enumerate(shape.stack.windows) if window is not None]
    weights = _weights(theirs)
    kept = {name: weight for name, weight in weights.items() if not name.startswith("layers.")}
    for index, (layer, _) in enumerate(windows):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        kept |= {f"layers.{index}.{name}": weight for name, weight in own.items()}
    stack = replace(shape.stack, windows=tuple(window for _, window in windows))
    return _build(replace(shape, stack=stack), kept)


def _weights(theirs: AceStepTransformer1DModel) -> dict[str, Tensor]:
    return {original_name(name): weight for name, weight in theirs.state_dict().items()}


def _build(shape: DitShape, weights: Mapping[str, Tensor]) -> Dit:
    with torch.device("meta"):
        ours = Dit(shape)
    ours.load_state_dict(dict(weights), assign=True)
    return ours.requires_grad_(False).eval()


def compile_layers(model: AceStepTransformer1DModel) -> AceStepTransformer1DModel:
    """Compile its layers for any length: they are alike, so one or two compilations serve all of them."""
    for layer in model.layers:
        layer.compile(dynamic=True)
    return model


def make_step(model: Any, case: Case, size: Size, plan: Plan) -> Step:
    """Bind a transformer to the inputs of a case, which are the same for all."""
    frames, dtype = case.duration_s * _FRAMES_PER_S, getattr(torch, plan.dtype)
    source = torch.Generator().manual_seed(frames)

    def draw(*shape: int) -> Tensor:
        return torch.randn(case.songs, *shape, generator=source).to(plan.device)

    latents, contexts = draw(frames, _CHANNELS), draw(frames, size.in_channels - _CHANNELS).to(dtype)
    words, times = draw(_CONDITIONS, size.encoder_hidden_size).to(dtype), torch.full((case.songs,), _TIME)
    times = times.to(plan.device)
    if isinstance(model, Dit):
        memories = [model.remember(each) for each in words]  # once a song, as when served
        return lambda: model(list(latents), times, list(contexts), memories)
    return lambda: model(
        hidden_states=latents.to(dtype),
        timestep=times.to(dtype),
        timestep_r=times.to(dtype),
        encoder_hidden_states=words,
        context_latents=contexts,
        return_dict=False,
    )[0]


def _clock(step: Step, device: str) -> float:
    taken_s: list[float] = []
    while not is_enough(taken_s):
        start = time.perf_counter()
        step()
        synchronize(device)
        taken_s.append(time.perf_counter() - start)
    return median(taken_s)
