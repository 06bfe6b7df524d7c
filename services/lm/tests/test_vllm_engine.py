"""The real engine, on the CPU: `make test-vllm`."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from transformers import Qwen3Config, Qwen3ForCausalLM

from soundstage_budget.need import BATCHED_TOKENS
from soundstage_lm.brief import Brief, Metadata, Sampling
from soundstage_lm.composer import Composer
from soundstage_lm.engine import load_composer
from soundstage_lm.grammar import Grammar
from soundstage_lm.rules import CodesRule, ThoughtRule
from soundstage_lm.settings import LmSettings
from soundstage_lm.tokenizer import PlannerTokenizer, load_tokenizer
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.writer import Text
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker

if TYPE_CHECKING:
    from soundstage_lm.vllm_engine.start import VllmOptions
    from soundstage_lm.vllm_engine.writer import VllmWriter

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

GREEDY = Sampling(temperature=0.0)
PAGE_BYTES = 2 * 2 * 2 * 32 * 4 * 32  # keys and values, layers, heads, channels, float32, tokens


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PlannerTokenizer:
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def options(tiny: Path) -> VllmOptions:
    from soundstage_lm.vllm_engine.start import VllmOptions

    return VllmOptions(
        folder=tiny,
        device="cpu",
        dtype="float32",
        max_duration_s=600,
        max_texts=8,
        # A guided text of full length takes 512 pages, and one is the engine's own: what leaks six pages fails.
        kv_cache_bytes=518 * PAGE_BYTES,
        timeout_s=200.0,
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm(options: VllmOptions, tokenizer: PlannerTokenizer, byte_grammar: Grammar) -> AsyncIterator[VllmWriter]:
    from soundstage_lm.vllm_engine.start import start_writer

    writer = await start_writer(options, tokenizer, byte_grammar)
    yield writer
    writer.close()


class Reference:
    """transformers on the same files, with a guidance loop that knows nothing of ours."""

    def __init__(self, folder: Path, codes: Sequence[int]) -> None:
        self._model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(folder)).eval().requires_grad_(False)
        self._model.model.load_state_dict(load_file(folder / "model.safetensors"))
        self._first, self._past_last = codes[0], codes[-1] + 1

    def write(self, text: Text, count: int) -> list[int]:
        """Write greedy codes."""
        caches: list[Any] = [None] * len(text.prompts)
        pending = [list(prompt) for prompt in text.prompts]
        tokens: list[int] = []
        while len(tokens) < count:
            rows: list[torch.Tensor] = []
            for index, ids in enumerate(pending):
                out = self._model(torch.tensor([ids]), past_key_values=caches[index], use_cache=True, logits_to_keep=1)
                caches[index] = out.past_key_values
                rows.append(out.logits[0, -1, self._first : self._past_last])
            scores = rows[0] if len(rows) == 1 else rows[1] + text.sampling.guidance_scale * (rows[0] - rows[1])
            tokens.append(self._first + int(scores.argmax()))
            pending = [tokens[-1:]] * len(pending)
        return tokens

    def largest_residual(self, text: Text) -> float:
        """Measure what flows between the layers."""
        states = self._model(torch.tensor([text.prompts[0]]), output_hidden_states=True).hidden_states[:-1]
        return max(float(state.abs().max()) for state in states)


@pytest.fixture(scope="module")
def reference(tiny: Path, tokenizer: PlannerTokenizer) -> Reference:
    return Reference(tiny, tokenizer.code_ids.tolist())


def codes_text(number: int, *, scale: float = 2.0, count: int = 200, sampling: Sampling = GREEDY) -> Text:
    """A text whose prompts have lengths of their own."""
    source = random.Random(number)
    lengths = [source.randrange(5, 300) for _ in range(1 if scale == 1 else 2)]
    return Text(
        prompts=tuple(tuple(source.randrange(256) for _ in range(length)) for length in lengths),
        rule=CodesRule(count=count),
        sampling=replace(sampling, guidance_scale=scale),
        seed=number,
        phase=1,
    )


async def collect(tokens: AsyncGenerator[int, None]) -> list[int]:
    return [token async for token in tokens]


async def assert_all_memory_is_free(vllm: VllmWriter) -> None:
    """Have a guided text of full length admitted."""
    assert vllm.num_live == 0
    whole = codes_text(0)
    whole = replace(whole, rule=CodesRule(count=vllm.max_tokens - max(map(len, whole.prompts))))
    tokens = vllm.write(replace(whole, prompts=(whole.prompts[0], whole.prompts[0])))
    async with asyncio.timeout(30):
        await anext(tokens)
    await tokens.aclose()
    assert vllm.num_live == 0


async def test_the_model_runner_is_the_newer_one_where_it_can_run(vllm: VllmWriter) -> None:
    import triton.backends

    assert vllm.engine.vllm_config.use_v2_model_runner == ("cpu" in triton.backends.backends)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
async def test_greedy_codes_of_eight_songs_equal_transformers_and_our_own_engine(
    vllm: VllmWriter, writer: TorchWriter, reference: Reference, scale: float
) -> None:
    texts = [codes_text(number, scale=scale) for number in range(8)]
    found = await asyncio.gather(*(collect(vllm.write(text)) for text in texts))
    assert found == [reference.write(text, 200) for text in texts]
    assert found == await asyncio.gather(*(collect(writer.write(text)) for text in texts))
    assert len({tuple(tokens) for tokens in found}) == 8
    assert min(len(set(tokens)) for tokens in found) > 20


async def test_a_seed_gives_the_same_codes_alone_and_in_company(vllm: VllmWriter, writer: TorchWriter) -> None:
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1)
    texts = [codes_text(number, count=60, sampling=sampling) for number in range(8)]
    together = await asyncio.gather(*(collect(vllm.write(text)) for text in texts))
    alone = [await collect(vllm.write(text)) for text in texts]
    assert alone == together
    assert together == await asyncio.gather(*(collect(writer.write(text)) for text in texts))
    assert await collect(vllm.write(replace(texts[0], seed=99))) != together[0]


async def test_thoughts_and_codes_are_written_side_by_side(
    vllm: VllmWriter, writer: TorchWriter, tokenizer: PlannerTokenizer
) -> None:
    rule = ThoughtRule(keys=("bpm", "duration", "keyscale", "timesignature"), given=Metadata(bpm=90))
    thoughts = [replace(codes_text(number, scale=1.0, sampling=Sampling()), rule=rule, phase=0) for number in range(4)]
    texts = [*thoughts, *(codes_text(number, count=40) for number in range(4))]
    found = await asyncio.gather(*(collect(vllm.write(text)) for text in texts))
    assert found == await asyncio.gather(*(collect(writer.write(text)) for text in texts))
    for tokens in found[:4]:
        written = tokenizer.decode(tokens)
        assert written.startswith("<think>\nbpm: 90\nduration: ")
        assert written.endswith("<|im_end|>")


async def test_more_texts_than_the_engine_has_places_wait_their_turn(vllm: VllmWriter, reference: Reference) -> None:
    texts = [codes_text(number, count=number) for number in range(1, 31)]
    found = await asyncio.gather(*(collect(vllm.write(text)) for text in texts))
    assert found == [reference.write(text, number) for number, text in enumerate(texts, start=1)]
    await assert_all_memory_is_free(vllm)


async def test_texts_too_long_to_run_together_run_one_after_the_other(vllm: VllmWriter, reference: Reference) -> None:
    # Their answers are short, but each reserves more than half of the memory.
    prompt = tuple(random.Random(1).randrange(256) for _ in range(5000))
    texts = [replace(codes_text(number, count=5), prompts=(prompt[number:], prompt[:4500])) for number in range(3)]
    found = await asyncio.gather(*(collect(vllm.write(text)) for text in texts))
    assert found == [reference.write(text, 5) for text in texts]


async def test_cancelled_texts_leave_nothing_behind(vllm: VllmWriter, reference: Reference) -> None:
    source = random.Random(3)

    async def listen(text: Text) -> list[int]:
        heard: list[int] = []
        limit = source.choice([0, 1, 2, 30, 1000])
        tokens = vllm.write(text)
        async for token in tokens:
            heard.append(token)
            if len(heard) > limit:
                break
        await tokens.aclose()
        return heard

    async def cancel(text: Text) -> list[int]:
        song = asyncio.create_task(collect(vllm.write(text)))
        await asyncio.wait([song], timeout=source.random() * 0.2)
        song.cancel()
        with pytest.raises(asyncio.CancelledError):
            await song
        return []

    texts = [
        codes_text(number, scale=source.choice([1.0, 2.0]), count=source.choice([3, 60, 2000])) for number in range(60)
    ]
    texts = [text if text.rule.max_tokens < 2000 else replace(text, seed=1) for text in texts]
    found: list[list[int]] = []
    for first in range(0, len(texts), 12):
        group = texts[first : first + 12]
        found += await asyncio.gather(
            *(listen(text) if text.rule.max_tokens < 2000 else cancel(text) for text in group)
        )
    for text, heard in zip(texts, found, strict=True):
        assert heard == reference.write(text, len(heard))
    await assert_all_memory_is_free(vllm)


async def test_a_text_that_could_never_fit_is_refused_in_front(vllm: VllmWriter) -> None:
    long = codes_text(0, count=3)
    for prompts in ([vllm.max_tokens - 2], [5, vllm.max_tokens]):
        text = replace(long, prompts=tuple((65,) * length for length in prompts))
        with pytest.raises(InvalidRequestError, match="the engine holds") as error:
            await collect(vllm.write(text))
        assert [violation.field for violation in error.value.violations] == ["lyrics"]
    await assert_all_memory_is_free(vllm)


async def test_within_a_budget_a_step_reads_no_more_than_was_planned(
    options: VllmOptions, tokenizer: PlannerTokenizer, byte_grammar: Grammar, reference: Reference
) -> None:
    from soundstage_lm.vllm_engine.start import arguments, start_writer

    planned = replace(options, memory_share=0.1)
    assert arguments(options).max_num_batched_tokens == 2 * 8192
    assert arguments(planned).max_num_batched_tokens == BATCHED_TOKENS < 8192
    writer = await start_writer(planned, tokenizer, byte_grammar)
    try:
        assert writer.max_tokens == 8192
        prompt = tuple(random.Random(1).randrange(256) for _ in range(BATCHED_TOKENS))
        half = BATCHED_TOKENS // 2
        texts = [replace(codes_text(n, count=5), prompts=(prompt[: half + n], prompt[: half - n])) for n in range(3)]
        found = await asyncio.gather(*(collect(writer.write(text)) for text in texts))
        assert found == [reference.write(text, 5) for text in texts]
        with pytest.raises(InvalidRequestError, match="the engine holds"):
            await collect(writer.write(replace(texts[0], prompts=(prompt[: half + 1], prompt[:half]))))
    finally:
        writer.close()


async def test_an_empty_text_is_whole_at_once(vllm: VllmWriter) -> None:
    assert await collect(vllm.write(codes_text(0, count=0))) == []


async def test_a_request_without_a_ticket_never_reaches_the_engine(vllm: VllmWriter, reference: Reference) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.inputs import TokensPrompt

    with pytest.raises(VLLMValidationError, match="for Ticket"):
        async for _ in vllm.engine.generate(TokensPrompt(prompt_token_ids=[65]), SamplingParams(), "stranger"):
            pass
    text = codes_text(0, count=3)
    assert await collect(vllm.write(text)) == reference.write(text, 3)


async def test_a_token_that_the_network_lacks_never_reaches_the_engine(
    vllm: VllmWriter, tokenizer: PlannerTokenizer
) -> None:
    for token in (-1, tokenizer.size):
        with pytest.raises(AssertionError):
            await collect(vllm.write(replace(codes_text(0, scale=1.0), prompts=((token,),))))
    await assert_all_memory_is_free(vllm)


async def test_a_partner_that_is_refused_ends_the_song(vllm: VllmWriter) -> None:
    from soundstage_lm.vllm_engine.writer import OutOfStepError

    text = codes_text(0, count=3)
    async with asyncio.timeout(30):
        with pytest.raises(OutOfStepError, match="ended a text early"):
            await collect(vllm.write(replace(text, prompts=(text.prompts[0], ()))))
    await assert_all_memory_is_free(vllm)


async def test_a_partner_that_comes_late_ends_the_song_and_later_the_engine_is_lost(
    options: VllmOptions, tokenizer: PlannerTokenizer, byte_grammar: Grammar, reference: Reference
) -> None:
    """vLLM's own scheduler does not wait for partners: what the processor makes of that, and then of a dead engine."""
    from vllm.v1.engine.async_llm import AsyncLLM

    from soundstage_lm.vllm_engine.start import arguments, make_writer, prove
    from soundstage_lm.vllm_engine.writer import EngineLostError, OutOfStepError

    class LatePartner:
        """Hands an unconditional request over when its partner has been answered."""

        def __init__(self, engine: AsyncLLM) -> None:
            self._engine, self.vllm_config = engine, engine.vllm_config
            self._has_answered = asyncio.Event()

        async def generate(self, prompt: Any, params: Any, name: str) -> AsyncGenerator[Any, None]:
            if name.endswith("unconditional"):
                await self._has_answered.wait()
            async for output in self._engine.generate(prompt, params, name):
                self._has_answered.set()
                yield output

    others = multiprocessing.active_children()
    engine = AsyncLLM.from_engine_args(replace(arguments(options), scheduler_cls=None))
    try:
        late: Any = LatePartner(engine)
        hasty = make_writer(late, tokenizer, byte_grammar)
        with pytest.raises(OutOfStepError, match="not allowed after 0"):
            await collect(hasty.write(codes_text(1)))
        late = LatePartner(engine)
        with pytest.raises(OutOfStepError):
            await prove(make_writer(late, tokenizer, byte_grammar), tokenizer)
        alone = make_writer(engine, tokenizer, byte_grammar)
        text = codes_text(1, scale=1.0, count=20)
        assert await collect(alone.write(text)) == reference.write(text, 20)
        song = alone.write(codes_text(1, scale=1.0, count=2000))
        await anext(song)
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        with pytest.raises(EngineLostError):
            await collect(song)
        assert (hasty.num_live, alone.num_live) == (0, 0)
        assert await alone.died() == "vLLM's engine has died"
    finally:
        engine.shutdown()


async def test_a_start_that_takes_too_long_leaves_no_process(
    options: VllmOptions, tokenizer: PlannerTokenizer, byte_grammar: Grammar
) -> None:
    from soundstage_lm.vllm_engine.start import start_writer

    before = multiprocessing.active_children()
    with pytest.raises(TimeoutError, match="not ready after 2 s"):
        await start_writer(replace(options, timeout_s=2.0), tokenizer, byte_grammar)
    assert multiprocessing.active_children() == before


@pytest.fixture
def arguments_of_the_process(tiny: Path) -> list[str]:
    return ["--model", str(tiny), "--device", "cpu", "--engine", "vllm", "--kv-cache-gb", "0.02"]


async def test_the_planner_on_vllm_plans_what_it_plans_on_torch(
    arguments_of_the_process: list[str], composer: Composer, worker: Worker
) -> None:
    brief = Brief(
        caption="chill lofi beats", lyrics="la la la", metadata=Metadata(duration_s=12), seed=7, sampling=Sampling()
    )
    loaded = await load_composer(load_settings(LmSettings, arguments_of_the_process), worker)
    try:
        found = [piece async for piece in loaded.composer.compose(brief)]
    finally:
        loaded.close()
    assert (loaded.device, loaded.model.dtype) == ("cpu", "float32")
    assert found == [piece async for piece in composer.compose(brief)]


async def test_vllm_that_does_not_start_in_time_leaves_the_work_to_torch(
    arguments_of_the_process: list[str], worker: Worker
) -> None:
    settings = load_settings(LmSettings, [*arguments_of_the_process, "--engine-timeout-s", "0.5"])
    with capture_logs() as logs:
        loaded = await load_composer(settings, worker)
    assert [(log["event"], log["engine"]) for log in logs] == [
        ("engine_chosen", "vllm"),
        ("vllm_did_not_start", "torch"),
    ]
    assert logs[1]["why"] == "not ready after 0.5 s"
    brief = Brief(caption="", lyrics="", metadata=Metadata(duration_s=1), seed=7, sampling=Sampling())
    assert [piece async for piece in loaded.composer.compose(brief)]


async def test_a_residual_stream_beyond_float16_is_served_in_float16(
    options: VllmOptions, tiny: Path, tokenizer: PlannerTokenizer, byte_grammar: Grammar, tmp_path: Path
) -> None:
    from soundstage_lm.vllm_engine.start import start_writer

    folder = tmp_path / "large"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.mlp.up_proj.weight"] *= 50_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference = Reference(folder, tokenizer.code_ids.tolist())
    text = codes_text(2, count=20)
    assert reference.largest_residual(text) > 5 * torch.finfo(torch.float16).max
    writer = await start_writer(replace(options, folder=folder, dtype="float16"), tokenizer, byte_grammar)
    try:
        found = await collect(writer.write(text))
    finally:
        writer.close()
    # Only ties within float16's precision may fall otherwise, and this text has none.
    assert found == reference.write(text, 20)
