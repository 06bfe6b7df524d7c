"""Many texts at once, beside transformers and beside themselves alone."""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from soundstage_device.linear import pack_linears
from soundstage_lm.brief import Metadata, Sampling
from soundstage_lm.grammar import Grammar
from soundstage_lm.model.pages import PAGE, count_pages
from soundstage_lm.rules import CodesRule, Rule, ThoughtRule
from soundstage_lm.torch_engine import TorchWriter, WriteError
from soundstage_lm.weights import Checkpoint, load_checkpoint
from soundstage_lm.writer import Constraint, Text, TokenSet
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")

NUM_TEXTS, NUM_CODES = 8, 200
LENGTHS = [7, 300, 33, 64, 150, 12, 129, 65]  # shorter, longer and just as long as pages and pieces
GREEDY = Sampling(temperature=0.0)
THOUGHT = ThoughtRule(keys=("bpm", "duration", "keyscale", "timesignature"), given=Metadata())


class Watched(Worker):
    """Counts steps, says when one is done, and fails the one it is told to."""

    def __init__(self, *, bad_step: int = 0) -> None:
        super().__init__("watched")
        self.bad_step, self.num_steps = bad_step, 0
        self.stepped = asyncio.Event()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self.num_steps += 1
        if self.num_steps == self.bad_step:
            raise MemoryError
        done = await super().run(work, *args, **kwargs)
        self.stepped.set()
        return done


def make_prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


def make_text(number: int, sampling: Sampling = GREEDY, count: int = NUM_CODES) -> Text:
    lengths = [LENGTHS[number % NUM_TEXTS], *([20] if sampling.guidance_scale > 1 else [])]
    prompts = tuple(make_prompt(10 * number + branch, length) for branch, length in enumerate(lengths))
    return Text(prompts=prompts, rule=CodesRule(count=count), sampling=sampling, seed=number, phase=1)


async def write(writer: TorchWriter, text: Text) -> list[int]:
    return [token async for token in writer.write(text)]


async def write_together(writer: TorchWriter, texts: Sequence[Text]) -> list[list[int]]:
    return list(await asyncio.gather(*(write(writer, text) for text in texts)))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tiny)).eval().requires_grad_(False)
    model.model.load_state_dict(load_file(tiny / "model.safetensors"), strict=True)
    return model


def likeliest(reference: Qwen3ForCausalLM, text: Text, tokens: list[int], ids: Sequence[int]) -> list[int]:
    """What a greedy loop over transformers would have written at each place, after the tokens before it."""
    branches = [
        reference(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :, list(ids)]
        for prompt in text.prompts
    ]
    scale = text.sampling.guidance_scale
    guided = branches[-1] + scale * (branches[0] - branches[-1]) if len(branches) > 1 else branches[0]
    return [ids[index] for index in guided.argmax(-1).tolist()]


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])
async def test_eight_greedy_texts_together_equal_transformers_one_by_one(
    writer: TorchWriter, checkpoint: Checkpoint, reference: Qwen3ForCausalLM, scale: float
) -> None:
    texts = [make_text(number, replace(GREEDY, guidance_scale=scale)) for number in range(NUM_TEXTS)]
    for text, tokens in zip(texts, await write_together(writer, texts), strict=True):
        assert len(tokens) == NUM_CODES
        assert tokens == likeliest(reference, text, tokens, checkpoint.tokenizer.code_ids.tolist())
        assert len(set(tokens)) > NUM_CODES // 10  # not the same few for ever, which would prove little


async def test_packed_weights_write_the_same_text(
    tiny: Path, worker: Worker, byte_grammar: Grammar, reference: Qwen3ForCausalLM
) -> None:
    packed = load_checkpoint(tiny, device=torch.device("cpu"), dtype=torch.float32)
    pack_linears(packed.model)
    texts = [make_text(number) for number in range(NUM_TEXTS)]
    for text, tokens in zip(texts, await write_together(TorchWriter(packed, worker, byte_grammar), texts), strict=True):
        assert tokens == likeliest(reference, text, tokens, packed.tokenizer.code_ids.tolist())


async def test_a_seed_gives_the_same_text_alone_and_among_eight(writer: TorchWriter) -> None:
    texts = [make_text(number, Sampling()) for number in range(NUM_TEXTS)]
    together = await write_together(writer, texts)
    assert together == [await write(writer, text) for text in texts]
    assert len({tuple(tokens) for tokens in together}) == NUM_TEXTS


async def test_texts_that_come_and_go_change_no_other(writer: TorchWriter) -> None:
    texts = [make_text(number, Sampling(), count=60) for number in range(NUM_TEXTS)]
    alone = [await write(writer, text) for text in texts]
    generator = random.Random(3)

    async def disturb(number: int) -> None:
        async with aclosing(writer.write(make_text(number, Sampling(), count=90))) as tokens:
            for _ in range(generator.randrange(1, 90)):
                await anext(tokens)

    async def come_late(text: Text) -> list[int]:
        for _ in range(generator.randrange(5)):
            await disturb(generator.randrange(100, 200))
        return await write(writer, text)

    others = [asyncio.create_task(disturb(100 + number)) for number in range(12)]
    assert await asyncio.gather(*map(come_late, texts)) == alone
    await asyncio.gather(*others)
    assert (writer.num_live, writer.num_pages_used) == (0, 0)


@pytest.mark.soak
async def test_a_thousand_closed_texts_leave_nothing(checkpoint: Checkpoint, byte_grammar: Grammar) -> None:
    worker = Watched()
    writer = TorchWriter(checkpoint, worker, byte_grammar)
    codes, thought = make_text(1), replace(make_text(1), rule=THOUGHT)
    assert all(len(text.prompts) == 2 for text in (codes, thought))
    longest = count_pages(300)
    for number in range(1000):
        if number % 3 == 0:  # in the middle of the first prompt
            task = asyncio.create_task(write(writer, codes))
            worker.stepped.clear()
            await worker.stepped.wait()
            assert 0 < writer.num_pages_used < longest
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
        else:
            async with aclosing(writer.write(codes if number % 3 == 1 else thought)) as tokens:
                for _ in range(9):
                    await anext(tokens)
                assert (writer.num_live, writer.num_pages_used) == (1, longest + 1)
        assert (writer.num_live, writer.num_pages_used) == (0, 0)
    assert len(await write(writer, codes)) == NUM_CODES
    worker.close()


async def test_keys_and_values_never_take_more_than_their_budget(
    checkpoint: Checkpoint, worker: Worker, byte_grammar: Grammar
) -> None:
    most = 3 * (count_pages(300 + NUM_CODES) + count_pages(20 + NUM_CODES))
    budget_gb = (most + 0.5) * checkpoint.model.page_bytes / 1e9
    writer = TorchWriter(checkpoint, worker, byte_grammar, kv_cache_gb=budget_gb)
    texts = [make_text(number) for number in range(3 * NUM_TEXTS)]
    seen: list[tuple[int, int]] = []

    async def follow(text: Text) -> list[int]:
        tokens: list[int] = []
        async for token in writer.write(text):
            tokens.append(token)
            seen.append((writer.num_pages_used, writer.num_live))
        return tokens

    found = await asyncio.gather(*map(follow, texts))
    assert [len(tokens) for tokens in found] == [NUM_CODES] * len(texts)  # those that had to wait have not failed
    assert max(pages for pages, _ in seen) <= most
    assert 3 <= max(live for _, live in seen) < len(texts)
    assert writer.num_pages_used == 0


async def test_a_waiting_text_may_leave(checkpoint: Checkpoint, byte_grammar: Grammar) -> None:
    worker = Watched()
    pages = count_pages(300 + NUM_CODES) + count_pages(20 + NUM_CODES)
    budget_gb = (pages + 0.5) * checkpoint.model.page_bytes / 1e9
    writer = TorchWriter(checkpoint, worker, byte_grammar, kv_cache_gb=budget_gb)
    first, second, third = (asyncio.create_task(write(writer, make_text(1))) for _ in range(3))
    await worker.stepped.wait()
    assert writer.num_live == 1
    second.cancel()
    assert len(await third) == NUM_CODES
    assert first.done()
    assert second.cancelled()
    worker.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"rule": CodesRule(count=40_900)}, "room for 40960"), ({"prompts": (make_prompt(0, 900),)}, "cache")],
    ids=["model", "cache"],
)
async def test_a_text_that_can_never_fit_is_refused(
    checkpoint: Checkpoint, worker: Worker, byte_grammar: Grammar, changes: dict[str, object], named: str
) -> None:
    gigabytes = (20_000 if "rule" in changes else 1_000) / PAGE * checkpoint.model.page_bytes / 1e9
    writer = TorchWriter(checkpoint, worker, byte_grammar, kv_cache_gb=gigabytes)
    with pytest.raises(InvalidRequestError, match=named):
        await write(writer, replace(make_text(1), **changes))  # pyright: ignore[reportArgumentType]
    assert writer.num_live == 0


async def test_numbers_that_are_none_end_their_own_text_only(tiny: Path, worker: Worker, byte_grammar: Grammar) -> None:
    broken = load_checkpoint(tiny, device=torch.device("cpu"), dtype=torch.float32)
    poison = 255
    texts = [make_text(number, count=40) for number in range(4)]
    texts = [replace(text, prompts=tuple(tuple(t % poison for t in p) for p in text.prompts)) for text in texts]
    wanted = await write_together(TorchWriter(broken, worker, byte_grammar), texts)
    broken.model.embed_tokens.weight[poison] = torch.nan
    writer = TorchWriter(broken, worker, byte_grammar)
    bad = replace(texts[0], prompts=(texts[0].prompts[0], (*texts[0].prompts[1], poison)))
    *found, error = await asyncio.gather(*(write(writer, text) for text in (*texts, bad)), return_exceptions=True)
    assert found == wanted
    assert isinstance(error, WriteError)
    # And the pages that it left behind do no harm.
    assert await write_together(writer, texts) == wanted


async def test_a_step_that_fails_ends_its_texts_and_no_later_ones(
    checkpoint: Checkpoint, byte_grammar: Grammar
) -> None:
    worker = Watched(bad_step=20)
    writer = TorchWriter(checkpoint, worker, byte_grammar)
    errors = await asyncio.gather(*(write(writer, make_text(n)) for n in range(3)), return_exceptions=True)
    assert [str(error) for error in errors] == ["a step of the planner failed: MemoryError"] * 3
    assert (writer.num_live, writer.num_pages_used) == (0, 0)
    assert len(await write(writer, make_text(0))) == NUM_CODES
    worker.close()


class Forgetful:
    """A constraint with a bug: on second thoughts it allows nothing, but the text goes on."""

    def __init__(self, allowed: TokenSet) -> None:
        self._answers = [allowed, allowed]

    @property
    def allowed(self) -> TokenSet | None:
        return self._answers.pop() if self._answers else None

    def advance(self, token: int) -> None: ...


async def test_a_step_that_cannot_be_planned_ends_its_texts_and_no_later_ones(
    checkpoint: Checkpoint, worker: Worker, byte_grammar: Grammar
) -> None:
    grammar = Mixed(byte_grammar, Forgetful(TokenSet(checkpoint.tokenizer.code_ids)))
    pages = count_pages(7 + 77) + count_pages(20 + 77)
    writer = TorchWriter(checkpoint, worker, grammar, kv_cache_gb=(pages + 0.5) * checkpoint.model.page_bytes / 1e9)
    texts = [make_text(0, count=77), make_text(0, count=30)]  # there is no room for both
    async with asyncio.timeout(10):
        error, tokens = await asyncio.gather(*(write(writer, text) for text in texts), return_exceptions=True)
    assert str(error) == "a step of the planner failed: AssertionError"
    assert isinstance(tokens, list)
    assert len(tokens) == 30
    assert (writer.num_live, writer.num_pages_used) == (0, 0)


async def test_words_without_alternative_cost_no_step(checkpoint: Checkpoint, byte_grammar: Grammar) -> None:
    worker = Watched()
    writer = TorchWriter(checkpoint, worker, byte_grammar)
    given = Metadata(bpm=90, duration_s=10, key_scale="G major")
    tokens = await write(writer, replace(make_text(0), rule=replace(THOUGHT, given=given)))
    assert len(tokens) > 40
    assert worker.num_steps <= 3  # the digit of the time signature, after the prompt
    worker.close()


class Stumbling:
    """A constraint with a bug: it does not take its third token."""

    def __init__(self, allowed: TokenSet) -> None:
        self.allowed = allowed
        self.num_written = 0

    def advance(self, token: int) -> None:
        self.num_written += 1
        if self.num_written == 3:
            raise KeyError(token)


class Mixed:
    """Has a constraint of ours for a text of 77 tokens, and the grammar's for the others."""

    def __init__(self, grammar: Grammar, ours: Constraint) -> None:
        self._grammar, self._ours = grammar, ours

    def begin(self, rule: Rule) -> Constraint:
        return self._ours if rule.max_tokens == 77 else self._grammar.begin(rule)


async def test_a_rule_that_fails_ends_its_own_text_only(
    checkpoint: Checkpoint, worker: Worker, byte_grammar: Grammar
) -> None:
    grammar = Mixed(byte_grammar, Stumbling(TokenSet(checkpoint.tokenizer.code_ids)))
    writer = TorchWriter(checkpoint, worker, grammar)
    texts = [make_text(0, count=77), make_text(1, count=30)]
    error, tokens = await asyncio.gather(*(write(writer, text) for text in texts), return_exceptions=True)
    assert isinstance(error, WriteError)
    assert isinstance(tokens, list)
    assert len(tokens) == 30
    assert (writer.num_live, writer.num_pages_used) == (0, 0)
