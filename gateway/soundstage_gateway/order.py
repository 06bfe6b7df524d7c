"""An order: what a request asks for, checked whole and with every default filled in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from soundstage.music.v1.composer_service_pb2 import PlanSongRequest, PolishSongRequest
from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, PlannerOptions
from soundstage.type.v1.options_pb2 import AdapterUse, DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.task_pb2 import Task
from soundstage_gateway.audio_format import Output, read_output
from soundstage_gateway.canvas import Canvas
from soundstage_gateway.sound import Sound
from soundstage_gateway.splice import Splice
from soundstage_gateway.task import lay_out
from soundstage_runtime.score import CODE_RATE_HZ, DURATION_RANGE_S, INSTRUMENTAL, MAX_REFERENCES
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks

MAX_VARIANTS = 8
MIN_CODES = CODE_RATE_HZ
MODELS = "models/dit/"  # before the name of a diffusion model
ADAPTERS = "adapters/"  # before the id of an adapter, which is what the diffusion stage knows it by
MAX_CODES = int(DURATION_RANGE_S[1]) * CODE_RATE_HZ
_UPLOAD = "send the file with AudioService.UploadAudio and give the asset that it answers, or name a finished song"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A valid request. `seeds` has one entry for every variant; `codes` are the user's own.

    `source` is what the task works on, the sound that `source_name` names; the task's times count from its beginning.
    `splice` is what of it is kept. `references` are names too.
    """

    caption: str
    lyrics: str
    metadata: SongMetadata
    is_planned: bool
    planner: PlannerOptions
    codes: tuple[int, ...]
    task: Task
    source_name: str
    source: Canvas | None
    splice: Splice | None
    references: tuple[str, ...]
    adapters: tuple[AdapterUse, ...]
    diffusion: DiffusionOptions
    model: str
    output: Output
    seeds: tuple[int, ...]


def read_order(
    request: GenerateSongRequest,
    sounds: Mapping[str, Sound | None],
    *,
    draw_seed: Callable[[], int],
    max_variants: int = MAX_VARIANTS,
) -> Order:
    """Check every field and fill in what is left open; raises InvalidRequestError naming all that are bad.

    `sounds` are what the request's source and references name, as far as there is such a thing; None stands for a
    song that has no audio, or not yet.
    """
    checks = Checks()
    check_words(checks, request)
    metadata = checks.metadata(request.metadata)
    checks.sampling(request.planner.sampling, field="planner.sampling")
    checks.diffusion(request.diffusion, field="diffusion")
    check_codes(checks, "codes", request.codes)
    if 0 < len(request.codes) < MIN_CODES:
        checks.refuse("codes", f"has {len(request.codes)} entries; at least {MIN_CODES}, a second of music")
    _check_codes_duration(checks, request)
    checks.task(request.task, field="task")
    source = _find_source(checks, request, sounds)
    references = _find_references(checks, request, sounds)
    adapters = _read_adapters(checks, request.adapters)
    planner = request.planner
    is_planned = not request.codes and not _kind(request) and (planner.enabled or not planner.HasField("enabled"))
    is_free = is_planned and (planner.write_metadata or not planner.HasField("write_metadata"))
    if not (is_free or request.codes or _kind(request) or request.metadata.HasField("duration_s")):
        checks.refuse("metadata.duration_s", "is not set; nobody else chooses it when the planner writes no metadata")
    output = read_output(checks, request.output, can_normalise=False)
    variants = count_variants(request)
    checks.number("variants", variants, 1, max_variants)
    if len(request.seeds) > variants:
        checks.refuse("seeds", f"has {len(request.seeds)} entries for {variants} variants; at most one for each")
    checks.finish()
    layout = lay_out(checks, request.task, source.num_frames) if source else None
    checks.finish()
    if layout:
        metadata.duration_s = layout.canvas.duration_s
    return Order(
        caption=request.caption,
        lyrics=INSTRUMENTAL if request.instrumental else request.lyrics,
        metadata=metadata,
        is_planned=is_planned,
        planner=planner,
        codes=tuple(request.codes),
        task=layout.task if layout else request.task,
        source_name=request.source,
        source=layout.canvas if layout else None,
        splice=layout.splice if layout else None,
        references=references,
        adapters=adapters,
        diffusion=request.diffusion,
        model=request.model,
        output=output,
        seeds=tuple(request.seeds) + tuple(draw_seed() for _ in range(variants - len(request.seeds))),
    )


def _check_codes_duration(checks: Checks, request: GenerateSongRequest) -> None:
    """Refuse a duration that is not the codes' own, up to the part of a code that a planner leaves out."""
    duration_s, codes_s = request.metadata.duration_s, len(request.codes) / CODE_RATE_HZ
    if request.codes and request.metadata.HasField("duration_s") and abs(duration_s - codes_s) >= 1 / CODE_RATE_HZ:
        checks.refuse(
            "metadata.duration_s",
            f"is {duration_s:g}; the codes make {codes_s:g} s: leave it out, or leave out the codes",
        )


def _kind(request: GenerateSongRequest) -> str | None:
    return request.task.WhichOneof("kind")


def count_variants(request: GenerateSongRequest) -> int:
    """Count the variants that a request asks for."""
    return request.variants if request.HasField("variants") else 1


def _find_source(checks: Checks, request: GenerateSongRequest, sounds: Mapping[str, Sound | None]) -> Sound | None:
    """Find the source, and refuse what does not go with the task and it."""
    kind = _kind(request)
    if kind and request.planner.enabled:
        checks.refuse("planner.enabled", "is true; with a task the planner is not asked, so leave it out")
    if request.codes and kind not in (None, "cover"):
        checks.refuse("codes", f"must be empty; task.{kind} works on a source")
    if request.codes and request.task.cover.from_latents:
        checks.refuse("task.cover.from_latents", "is true, and codes have no latents; give a source in their place")
    if not request.source:
        if kind and not (kind == "cover" and request.codes):
            alternative = ", or give codes" if kind == "cover" else ""
            checks.refuse("source", f"is not set, and task.{kind} needs one: {_UPLOAD}{alternative}")
        return None
    if not kind:
        checks.refuse("source", "is set, but task is not; say in task what to do with it, or leave it out")
    if request.codes and kind == "cover":
        checks.refuse("codes", "must be empty when source is set; give one of them")
    if request.metadata.HasField("duration_s"):
        checks.refuse("metadata.duration_s", "must not be set; the song is as long as its source")
    return _find(checks, "source", request.source, sounds)


def _find_references(
    checks: Checks, request: GenerateSongRequest, sounds: Mapping[str, Sound | None]
) -> tuple[str, ...]:
    if len(request.references) > MAX_REFERENCES:
        checks.refuse("references", f"has {len(request.references)} entries; at most {MAX_REFERENCES}")
        return ()
    found: list[str] = []
    for index, name in enumerate(request.references):
        sound = _find(checks, f"references[{index}]", name, sounds)
        if sound and sound.is_silent:
            checks.refuse(f"references[{index}]", f"is {name}, which is silent; give one that can be heard")
        elif sound:
            found.append(name)
    return tuple(found)


def _find(checks: Checks, field: str, name: str, sounds: Mapping[str, Sound | None]) -> Sound | None:
    sound = sounds.get(name)
    if sound is None:
        gone = f"which is not kept here, or no longer: {_UPLOAD}"
        why = "which has no audio: name a song that is completed" if name in sounds else gone
        checks.refuse(field, f"is {name[:80]!r}, {why}")
    return sound


def _read_adapters(checks: Checks, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
    """Check adapters, named "adapters/{id}" or by the id alone; return them by their ids."""
    found = [
        AdapterUse(name=use.name.removeprefix(ADAPTERS), scale=use.scale if use.HasField("scale") else None)
        for use in adapters
    ]
    checks.adapters(found, field="adapters")
    return tuple(found)


def check_words(checks: Checks, request: GenerateSongRequest | PlanSongRequest | PolishSongRequest) -> None:
    """Check what a request says in words."""
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    is_told = isinstance(request, GenerateSongRequest) and _kind(request) is not None
    if not is_told and not request.caption.strip() and not request.lyrics.strip():
        checks.refuse("caption", "is empty, and so is lyrics; say in one of them what to make")
    if not isinstance(request, PolishSongRequest) and request.instrumental and request.lyrics.strip():
        checks.refuse("lyrics", "must be empty when instrumental is true")


def check_codes(checks: Checks, field: str, codes: Sequence[int]) -> None:
    """Check audio codes, if there are any."""
    if len(codes) > MAX_CODES:
        checks.refuse(field, f"has {len(codes)} entries; at most {MAX_CODES}")
    checks.codes(field, codes)
