import asyncio
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from soundstage_lm.brief import Brief, CodeRun, Field, Metadata, Plan, Sampling
from soundstage_lm.composer import Composer
from soundstage_lm.grammar import Grammar
from soundstage_lm.model.pages import PAGE
from soundstage_lm.prompts import codes_prompt, metadata_prompt, render, unguided_prompt
from soundstage_lm.rules import ThoughtRule
from soundstage_lm.sampling import draw, uniform
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.weights import Checkpoint
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.score import KEY_SCALES, TIME_SIGNATURES
from soundstage_runtime.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")

FIXED = Metadata(bpm=90, key_scale="G major", time_signature="4", duration_s=30.5)
BRIEF = Brief(
    caption="chill lofi beats",
    lyrics="la la la",
    metadata=FIXED,
    seed=7,
    sampling=Sampling(),
    rewrite_caption=False,
    detect_language=False,
)
GREEDY = Sampling(temperature=0.0)


class Counting(Worker):
    """Counts the steps that ran."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.num_steps = 0

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def count() -> T:
            self.num_steps += 1
            return work(*args, **kwargs)

        return await super().run(count)


class Reference:
    """transformers on the same files: whole rendered prompts, a full forward for every token of either branch."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self.model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder)).eval().requires_grad_(False)
        self.model.model.load_state_dict(load_file(folder / "model.safetensors"))

    def logits(self, prompt: str, tokens: list[int]) -> torch.Tensor:
        ids = self.tokenizer.encode(prompt) + tokens
        return self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]

    def write_codes(
        self, prompts: Sequence[str], scale: float, count: int, pick: Callable[[torch.Tensor, int], int]
    ) -> list[int]:
        first = self.tokenizer.convert_tokens_to_ids("<|audio_code_0|>")
        tokens: list[int] = []
        while len(tokens) < count:
            conditional, unconditional = (self.logits(prompt, tokens)[first:] for prompt in prompts)
            guided = unconditional + scale * (conditional - unconditional)
            tokens.append(first + pick(guided, len(tokens)))
        return [token - first for token in tokens]


def make_composer(checkpoint: Checkpoint, writer: TorchWriter, **changes: int) -> Composer:
    limits = {"max_duration_s": 600, "max_tokens": 40_960} | changes
    return Composer(
        writer,
        checkpoint.tokenizer,
        fingerprint="f",
        max_duration_s=limits["max_duration_s"],
        max_tokens=limits["max_tokens"],
    )


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Reference:
    return Reference(tiny)


async def compose(composer: Composer, brief: Brief) -> tuple[Plan, list[int]]:
    pieces = [piece async for piece in composer.compose(brief)]
    pieces = [piece for piece in pieces if not isinstance(piece, Field)]
    assert isinstance(pieces[0], Plan)
    runs = [piece for piece in pieces if isinstance(piece, CodeRun)]
    assert len(runs) == len(pieces) - 1
    codes: list[int] = []
    for run in runs:
        assert run.first_code == len(codes)
        codes += run.codes
    return pieces[0], codes


@pytest.mark.parametrize(
    ("caption", "lyrics", "negative", "scale"),
    [
        ("chill lofi beats", "la la la", "", 2.0),
        ("drum'n'bass, 東京", "[verse]\nneon in the rain\n[chorus]\nrun", "low quality, distorted", 3.5),
        ("", "[Instrumental]", "NO USER INPUT", 1.5),
    ],
)
async def test_greedy_guided_codes_equal_transformers(
    composer: Composer, reference: Reference, caption: str, lyrics: str, negative: str, scale: float
) -> None:
    sampling = replace(GREEDY, guidance_scale=scale, negative_prompt=negative)
    brief = replace(BRIEF, caption=caption, lyrics=lyrics, sampling=sampling)
    _, codes = await compose(composer, brief)
    prompts = [render(codes_prompt(caption, lyrics, FIXED)), render(unguided_prompt(negative))]
    assert len(codes) == 152 > PAGE
    assert codes == reference.write_codes(prompts, scale, 152, lambda logits, _: int(logits.argmax()))


async def test_every_code_has_its_own_draw(composer: Composer, reference: Reference) -> None:
    _, codes = await compose(composer, BRIEF)
    prompts = [render(codes_prompt(BRIEF.caption, BRIEF.lyrics, FIXED)), render(unguided_prompt(""))]

    def pick(logits: torch.Tensor, position: int) -> int:
        return draw(logits, BRIEF.sampling, uniform(BRIEF.seed, 1, position))

    assert codes == reference.write_codes(prompts, BRIEF.sampling.guidance_scale, 152, pick)


async def test_greedy_metadata_equals_transformers(
    composer: Composer, checkpoint: Checkpoint, reference: Reference
) -> None:
    fixed = Metadata(bpm=90, duration_s=10)
    plan, _ = await compose(composer, replace(BRIEF, metadata=fixed, sampling=GREEDY))
    prompt = render(metadata_prompt(BRIEF.caption, BRIEF.lyrics))
    rule = ThoughtRule(keys=("bpm", "duration", "keyscale", "timesignature"), given=fixed)
    writing, tokens = Grammar(checkpoint.tokenizer, max_duration_s=600).begin(rule), list[int]()
    while allowed := writing.allowed:
        scores = reference.logits(prompt, tokens)[torch.from_numpy(allowed.ids)]
        tokens.append(int(allowed.ids[int(scores.argmax())]))
        writing.advance(tokens[-1])
    text = reference.tokenizer.decode(tokens)
    wanted = f"keyscale: {plan.metadata.key_scale}\ntimesignature: {plan.metadata.time_signature}\n<|im_end|>"
    assert text == "<think>\nbpm: 90\nduration: 10\n" + wanted


async def test_writes_what_the_user_left_open(composer: Composer) -> None:
    plan, codes = await compose(composer, replace(BRIEF, metadata=Metadata(bpm=111, vocal_language="fr")))
    assert (plan.metadata.bpm, plan.metadata.vocal_language) == (111, "fr")
    assert plan.metadata.key_scale in KEY_SCALES
    assert plan.metadata.time_signature in TIME_SIGNATURES
    assert plan.metadata.duration_s in range(10, 601)
    assert len(codes) == plan.code_count == 5 * (plan.metadata.duration_s or 0)


async def test_complete_metadata_is_taken_as_it_is(checkpoint: Checkpoint, byte_grammar: Grammar) -> None:
    worker = Counting()
    writer = TorchWriter(checkpoint, worker, byte_grammar)
    composer = make_composer(checkpoint, writer)
    plan, codes = await compose(composer, replace(BRIEF, metadata=replace(FIXED, duration_s=1.3)))
    worker.close()
    assert (plan.metadata, plan.code_count) == (replace(FIXED, duration_s=1.3), 6)
    assert [(field.name, field.value) for field in plan.fields if field.is_given] == [
        ("bpm", "90"),
        ("duration_s", "1"),
        ("key_scale", "G major"),
        ("time_signature", "4"),
    ]
    assert len(codes) == 6
    prompts = (codes_prompt(BRIEF.caption, BRIEF.lyrics, plan.metadata), unguided_prompt(""))
    num_tokens = sum(len(checkpoint.tokenizer.encode_prompt(prompt)) for prompt in prompts)
    assert worker.num_steps == -(-num_tokens // 128) + 5  # no thought; the step that reads the last piece draws


async def test_codes_come_a_second_at_a_time(composer: Composer) -> None:
    metadata = replace(FIXED, duration_s=2.5)
    pieces = [piece async for piece in composer.compose(replace(BRIEF, metadata=metadata))]
    assert [len(piece.codes) for piece in pieces if isinstance(piece, CodeRun)] == [5, 5, 2]


async def test_a_seed_gives_the_same_song_alone_or_in_company(composer: Composer) -> None:
    brief = replace(BRIEF, metadata=Metadata(duration_s=12))
    alone = await compose(composer, brief)
    company = [replace(brief, seed=seed, caption=f"song {seed}") for seed in (1, 2, 3)]
    together = await asyncio.gather(*(compose(composer, song) for song in (company[0], brief, *company[1:])))
    assert together[1] == alone


async def test_another_seed_gives_other_codes(composer: Composer) -> None:
    found = [await compose(composer, replace(BRIEF, seed=seed)) for seed in (7, 8)]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    "changed",
    [
        replace(BRIEF, caption="loud metal"),
        replace(BRIEF, lyrics="da da da"),
        replace(BRIEF, metadata=replace(FIXED, bpm=91)),
        replace(BRIEF, metadata=replace(FIXED, vocal_language="fr")),
        replace(BRIEF, sampling=Sampling(guidance_scale=1.0)),
        replace(BRIEF, sampling=Sampling(negative_prompt="noise")),
        replace(BRIEF, sampling=Sampling(temperature=0.4)),
        replace(BRIEF, sampling=Sampling(top_k=3)),
        replace(BRIEF, sampling=Sampling(top_p=0.3)),
        replace(BRIEF, sampling=Sampling(repetition_penalty=1.5)),
    ],
)
async def test_every_part_of_the_brief_reaches_the_model(composer: Composer, changed: Brief) -> None:
    assert (await compose(composer, changed))[1] != (await compose(composer, BRIEF))[1]


async def test_repetition_penalty_avoids_written_codes(composer: Composer) -> None:
    distinct = [
        len(set((await compose(composer, replace(BRIEF, sampling=replace(GREEDY, repetition_penalty=penalty))))[1]))
        for penalty in (1.0, 2.0)
    ]
    assert distinct[0] < distinct[1]


async def test_a_closed_song_takes_no_step_and_leaves_no_cache(checkpoint: Checkpoint, byte_grammar: Grammar) -> None:
    worker = Counting()
    writer = TorchWriter(checkpoint, worker, byte_grammar)
    composer = make_composer(checkpoint, writer)
    pieces = composer.compose(BRIEF)
    for _ in range(3):
        await anext(pieces)
    assert writer.num_live == 1
    steps = worker.num_steps
    await pieces.aclose()
    await worker.run(gc.collect)
    assert worker.num_steps <= steps + 2  # the one it was in, and the collector's
    assert (writer.num_live, writer.num_pages_used) == (0, 0)
    worker.close()


async def test_a_cancelled_song_finishes_at_most_the_step_it_is_in(
    checkpoint: Checkpoint, byte_grammar: Grammar
) -> None:
    worker = Counting()
    writer = TorchWriter(checkpoint, worker, byte_grammar)
    composer = make_composer(checkpoint, writer)
    has_begun = asyncio.Event()

    async def listen() -> None:
        async for _ in composer.compose(BRIEF):
            has_begun.set()

    song = asyncio.create_task(listen())
    await has_begun.wait()
    steps = worker.num_steps
    song.cancel()
    with pytest.raises(asyncio.CancelledError):
        await song
    await worker.run(gc.collect)
    assert worker.num_steps <= steps + 2  # the one it was in, and the collector's
    assert (writer.num_live, writer.num_pages_used) == (0, 0)
    worker.close()


async def test_words_that_leave_no_room_for_the_song_are_refused(checkpoint: Checkpoint, writer: TorchWriter) -> None:
    composer = make_composer(checkpoint, writer, max_duration_s=60, max_tokens=1000)
    with pytest.raises(InvalidRequestError, match="leave room for") as error:
        await compose(composer, replace(BRIEF, lyrics="la " * 300))
    assert [violation.field for violation in error.value.violations] == ["lyrics"]
    assert writer.num_live == 0
