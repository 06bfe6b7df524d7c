from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soundstage_lm.brief import Metadata, Sampling
from soundstage_lm.grammar import Grammar
from soundstage_lm.rules import CodesRule, Rule, ThoughtRule
from soundstage_lm.sampling import draw, guide, penalize, uniform
from soundstage_lm.tokenizer import PlannerTokenizer, load_tokenizer
from soundstage_lm.vllm_engine.forcing import Forcing, Row
from soundstage_lm.vllm_engine.ticket import Role, Ticket, from_extra_args, to_extra_args

GREEDY = Sampling(temperature=0.0)
GUIDED = Ticket(text="a", role="conditional", rule=CodesRule(count=3), sampling=GREEDY, seed=7, phase=1)
ALONE = replace(GUIDED, text="b", role="alone")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PlannerTokenizer:
    return load_tokenizer(tiny)


@pytest.fixture
def halt(tokenizer: PlannerTokenizer) -> int:
    return tokenizer.token_id("<|endoftext|>")


@pytest.fixture
def forcing(tokenizer: PlannerTokenizer, halt: int) -> Forcing:
    return Forcing(Grammar(tokenizer, max_duration_s=600), halt=halt)


def rows(*members: tuple[Ticket, Role, int]) -> list[Row]:
    return [
        Row(index=index, ticket=replace(ticket, role=role), num_written=num_written)
        for index, (ticket, role, num_written) in enumerate(members)
    ]


def random_logits(tokenizer: PlannerTokenizer, num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, tokenizer.size, generator=torch.Generator().manual_seed(seed))


def left_over(logits: Tensor) -> list[int]:
    """Read the one token that each row has been left with."""
    assert (logits > float("-inf")).sum(1).tolist() == [1] * len(logits)
    return logits.argmax(1).tolist()


def test_both_requests_are_left_the_guided_code(forcing: Forcing, tokenizer: PlannerTokenizer) -> None:
    forcing.begin(GUIDED)
    logits = random_logits(tokenizer, 2)
    first, last = int(tokenizer.code_ids[0]), int(tokenizer.code_ids[-1])
    guided = 2 * logits[1, first : last + 1] - logits[0, first : last + 1]
    forcing.force(logits, rows((GUIDED, "unconditional", 0), (GUIDED, "conditional", 0)))
    assert left_over(logits) == [first + int(guided.argmax())] * 2


def test_the_draw_is_that_of_every_engine(forcing: Forcing, tokenizer: PlannerTokenizer) -> None:
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.3)
    ticket = replace(GUIDED, sampling=sampling)
    forcing.begin(ticket)
    written: list[int] = []
    codes = torch.from_numpy(tokenizer.code_ids)
    for step in range(3):
        logits = random_logits(tokenizer, 2, seed=step)
        chosen = guide(logits[0, codes], logits[1, codes], sampling.guidance_scale)
        is_written = torch.isin(codes, torch.tensor(written, dtype=torch.int64))
        index = draw(penalize(chosen, is_written, 1.3), sampling, uniform(ticket.seed, ticket.phase, step))
        written.append(int(codes[index]))
        forcing.force(logits, rows((ticket, "conditional", step), (ticket, "unconditional", step)))
        assert left_over(logits) == [written[-1]] * 2


@pytest.mark.parametrize(
    "members",
    [
        [(GUIDED, "conditional", 0)],
        [(GUIDED, "unconditional", 0)],
        [(GUIDED, "conditional", 0), (GUIDED, "unconditional", 1)],
        [(GUIDED, "conditional", 0), (GUIDED, "unconditional", -5)],
        [(GUIDED, "conditional", 2), (GUIDED, "unconditional", 2)],
        [(replace(GUIDED, text="never begun"), "conditional", 0)],
    ],
)
def test_a_text_out_of_step_is_halted_and_others_go_on(
    forcing: Forcing, tokenizer: PlannerTokenizer, halt: int, members: Sequence[tuple[Ticket, Role, int]]
) -> None:
    forcing.begin(GUIDED)
    forcing.begin(ALONE)
    logits = random_logits(tokenizer, len(members) + 1)
    forcing.force(logits, rows(*members, (ALONE, "alone", 0)))
    *halted, other = left_over(logits)
    assert halted == [halt] * len(members)
    assert other in tokenizer.code_ids


def test_logits_that_are_no_numbers_halt_the_text(forcing: Forcing, tokenizer: PlannerTokenizer, halt: int) -> None:
    forcing.begin(GUIDED)
    logits = random_logits(tokenizer, 2)
    logits[1] = float("nan")
    forcing.force(logits, rows((GUIDED, "conditional", 0), (GUIDED, "unconditional", 0)))
    assert left_over(logits) == [halt, halt]


def test_a_whole_text_is_halted(forcing: Forcing, tokenizer: PlannerTokenizer, halt: int) -> None:
    forcing.begin(ALONE, written=[int(token) for token in tokenizer.code_ids[:3]])
    logits = random_logits(tokenizer, 1)
    forcing.force(logits, rows((ALONE, "alone", 3)))
    assert left_over(logits) == [halt]


def test_rows_of_prompts_being_read_are_left_alone(forcing: Forcing, tokenizer: PlannerTokenizer) -> None:
    forcing.begin(GUIDED)
    logits = random_logits(tokenizer, 2)
    before = logits.clone()
    forcing.force(logits, rows((GUIDED, "conditional", -9), (GUIDED, "unconditional", -2)))
    assert logits.equal(before)


def test_a_text_that_was_put_aside_goes_on_where_it_was(tokenizer: PlannerTokenizer, halt: int) -> None:
    grammar = Grammar(tokenizer, max_duration_s=600)
    ticket = replace(ALONE, rule=CodesRule(count=9), sampling=Sampling(repetition_penalty=2.0))
    straight, resumed = (Forcing(grammar, halt=halt) for _ in range(2))
    straight.begin(ticket)
    tokens: list[int] = []
    for step in range(9):
        if step == 5:
            resumed.begin(ticket, tokens)
        logits = random_logits(tokenizer, 1, seed=step)
        again = logits.clone()
        straight.force(logits, rows((ticket, "alone", step)))
        if step >= 5:
            resumed.force(again, rows((ticket, "alone", step)))
            assert again.equal(logits)
        tokens += left_over(logits)
    assert len(set(tokens)) > 3


def test_texts_that_are_gone_are_forgotten(forcing: Forcing, tokenizer: PlannerTokenizer, halt: int) -> None:
    forcing.begin(GUIDED)
    forcing.begin(ALONE)
    forcing.keep({"b"})
    logits = random_logits(tokenizer, 3)
    forcing.force(logits, rows((GUIDED, "conditional", 0), (GUIDED, "unconditional", 0), (ALONE, "alone", 0)))
    *gone, kept = left_over(logits)
    assert gone == [halt, halt]
    assert kept != halt


@pytest.mark.parametrize(
    "rule",
    [
        CodesRule(count=3000),
        ThoughtRule(keys=("bpm", "keyscale"), given=Metadata(bpm=90, caption="東京 🎵")),
        ThoughtRule(keys=(), given=Metadata(duration_s=30.5), has_lyrics=True),
    ],
)
def test_a_ticket_arrives_as_it_was_sent(rule: Rule) -> None:
    ticket = replace(GUIDED, rule=rule, seed=2**64 - 1)
    assert from_extra_args(to_extra_args(ticket)) == ticket


@pytest.mark.parametrize("extra_args", [None, {}, {"soundstage": {}}, {"soundstage": {"text": "a", "role": "boss"}}])
def test_a_request_without_a_good_ticket_is_refused(extra_args: dict[str, object] | None) -> None:
    with pytest.raises(ValueError, match="validation error"):
        from_extra_args(extra_args)
