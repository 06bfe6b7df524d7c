"""Scores of words: the formulas, the judge beside transformers, and the whole way over a real port."""

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from soundstage.stage.v1.lm_service_pb2 import ScoreRequest
from soundstage.stage.v1.lm_service_pb2_grpc import LmServiceStub
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Claim, Metadata
from soundstage_lm.composer import Composer
from soundstage_lm.request import read_score
from soundstage_lm.scoring import Judged, score, score_gain, score_ranks, squash, total
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.torch_judge import TorchJudge
from soundstage_lm.weights import Checkpoint
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.worker import Worker

from .test_servicer import serving, violations

P = ParamSpec("P")
T = TypeVar("T")

METADATA = Metadata(bpm=120, duration_s=12, key_scale="F# minor", vocal_language="no", time_signature="3")
CLAIM = Claim(codes=(1, 2, 3), caption="a calm piano", lyrics="la la\nlo", metadata=METADATA)


def judged(*log_probabilities: float) -> Judged:
    return Judged(
        log_probabilities=np.array(log_probabilities, np.float32), ranks=np.ones(len(log_probabilities), np.int64)
    )


class Recorder:
    """Judges tokens by what they follow, and keeps what it was asked: after a long prompt everything is likelier."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[list[int]]]] = []

    async def judge(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[Judged]:
        self.asked.append((list(prompt), [list(target) for target in targets]))
        gain = 0.05 if len(self.asked) == 1 else 0.0
        return [judged(*[gain - 1.0] * len(target)) for target in targets]


def test_parts_are_scored_and_weighed_as_in_the_reference() -> None:
    assert squash(0.05 / 0.1) == pytest.approx(0.6225, abs=5e-5)
    assert squash(0.05 / 0.5) == pytest.approx(0.5250, abs=5e-5)
    assert score_gain(judged(-1.0, -2.0), judged(-1.1, -2.0), spread=0.1) == pytest.approx(0.6225, abs=5e-5)
    assert total({"caption": 0.8, "bpm": 0.6, "key_scale": 0.4}) == pytest.approx(0.7143, abs=5e-5)
    assert total({"caption": 0.8, "lyrics": 0.2, "bpm": 0.5}) == pytest.approx(0.56)
    assert total({"bpm": 0.5}) == 0.5
    assert score_ranks(np.array([1, 2, 10, 11, 4000])) == pytest.approx((1 + 0.9 + 0.1) / 5)


@given(st.floats(-1e6, 1e6), st.floats(0.01, 1))
def test_a_gain_of_any_size_is_scored(gain: float, spread: float) -> None:
    found = score_gain(judged(gain), judged(0.0), spread=spread)
    assert 0 <= found <= 1
    assert found >= 0.5 if gain >= 0 else found <= 0.5


async def test_every_part_is_judged_alone_as_the_model_writes_it(byte_tokenizer: PlannerTokenizer) -> None:
    recorder = Recorder()
    scores = await score(CLAIM, recorder, byte_tokenizer, max_tokens=10_000)
    (heard, parts), (unheard, words) = recorder.asked
    assert [byte_tokenizer.decode(part) for part in parts] == [
        "<think>\ncaption: a calm piano\n</think>\n",
        "<think>\n</think>\n# Lyric\nla la\nlo\n",
        "<think>\nbpm: 120\n</think>\n",
        "<think>\nduration: 12\n</think>\n",
        "<think>\nkeyscale: F# minor\n</think>\n",
        "<think>\nlanguage: 'no'\n</think>\n",
        "<think>\ntimesignature: 3\n</think>\n",
    ]
    assert words == parts[:2]
    frame = (
        "<|im_start|>system\n# Instruction\nUnderstand the given musical conditions and describe the audio semantics "
        "accordingly:\n\n<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    codes = "<|audio_code_1|><|audio_code_2|><|audio_code_3|>"
    assert byte_tokenizer.decode(heard) == frame.format(codes)
    assert byte_tokenizer.decode(unheard) == frame.format("NO USER INPUT")
    assert list(scores) == ["caption", "lyrics", "bpm", "duration_s", "key_scale", "vocal_language", "time_signature"]
    assert scores["caption"] == scores["lyrics"] == pytest.approx(0.6225, abs=5e-5)
    assert scores["bpm"] == 1


async def test_metadata_alone_need_no_second_reading(byte_tokenizer: PlannerTokenizer) -> None:
    recorder = Recorder()
    claim = Claim(codes=(1,), caption="", lyrics="", metadata=Metadata(bpm=90))
    assert await score(claim, recorder, byte_tokenizer, max_tokens=1000) == {"bpm": 1.0}
    assert len(recorder.asked) == 1


async def test_words_that_leave_no_room_are_refused(byte_tokenizer: PlannerTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="the model has room for 100"):
        await score(CLAIM, Recorder(), byte_tokenizer, max_tokens=100)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tiny)).eval().requires_grad_(False)
    model.model.load_state_dict(load_file(tiny / "model.safetensors"), strict=True)
    return model


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 1261, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Shorter than a piece, as long as one, longer; targets of one token, and a short one after a long one.
@pytest.mark.parametrize("prompt_length", [1, 2, 128, 129, 300])
async def test_a_judge_equals_transformers(
    checkpoint: Checkpoint, worker: Worker, reference: Qwen3ForCausalLM, prompt_length: int
) -> None:
    prompt, targets = tokens(prompt_length, 1), [tokens(length, length) for length in (200, 1, 5, 128, 129)]
    found = await TorchJudge(checkpoint, worker).judge(prompt, targets)
    for target, ours in zip(targets, found, strict=True):
        logits = reference(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.gather(1, torch.tensor(target)[:, None])
        expected = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]
        np.testing.assert_allclose(ours.log_probabilities, expected, rtol=0, atol=1e-4)
        # The rank of a token that is as likely as another, float noise apart, may differ by it.
        low, high = (1 + (logits > wanted + noise).sum(1) for noise in (1e-4, -1e-4))
        assert ((low <= torch.from_numpy(ours.ranks)) & (torch.from_numpy(ours.ranks) <= high)).all()


class Stopping(Worker):
    """Counts what it does, and tells when it does the third thing."""

    def __init__(self) -> None:
        super().__init__("stopping")
        self.count = 0
        self.third = asyncio.Event()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self.count += 1
        if self.count == 3:
            self.third.set()
            await asyncio.Event().wait()
        return await super().run(work, *args, **kwargs)


async def test_cancelling_stops_before_the_next_piece_and_lets_others_have_their_turn(checkpoint: Checkpoint) -> None:
    worker = Stopping()
    judge = TorchJudge(checkpoint, worker)
    task = asyncio.create_task(judge.judge(tokens(600, 1), [tokens(9, 2)]))
    await asyncio.wait_for(worker.third.wait(), timeout=5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert worker.count == 3
    assert len(await judge.judge(tokens(5, 1), [tokens(9, 2)])) == 1
    worker.close()


@pytest.fixture
def scoring_composer(checkpoint: Checkpoint, writer: TorchWriter, worker: Worker) -> Composer:
    return Composer(
        writer,
        checkpoint.tokenizer,
        fingerprint="f",
        max_duration_s=600,
        max_tokens=40_960,
        judge=TorchJudge(checkpoint, worker),
    )


SCORE = ScoreRequest(codes=range(50), caption="a calm piano", lyrics="la", metadata=SongMetadata(bpm=90))


async def test_scores_over_a_port_are_those_of_the_engine(scoring_composer: Composer) -> None:
    async with serving(scoring_composer) as channel:
        found = (await LmServiceStub(channel).Score(SCORE, timeout=20)).likelihood
        wider = ScoreRequest()
        wider.CopyFrom(SCORE)
        wider.spread = 1.0
        flat = (await LmServiceStub(channel).Score(wider, timeout=20)).likelihood
    claim = Claim(codes=tuple(range(50)), caption="a calm piano", lyrics="la", metadata=Metadata(bpm=90))
    expected = await scoring_composer.score(claim)
    assert {part.name: part.score for part in found.parts} == expected.parts
    assert found.total == expected.total == pytest.approx(total(expected.parts))
    narrow, wide = (part.parts[0].score for part in (found, flat))
    assert math.atanh(2 * narrow - 1) == pytest.approx(10 * math.atanh(2 * wide - 1), rel=1e-6)


async def test_an_engine_that_cannot_score_says_so(composer: Composer) -> None:
    async with serving(composer) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await LmServiceStub(channel).Score(SCORE, timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "--engine torch" in (caught.value.details() or "")


async def test_codes_that_the_model_has_not_are_refused(scoring_composer: Composer) -> None:
    request = ScoreRequest(codes=[1, 63_999], caption="a")
    async with serving(scoring_composer) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await LmServiceStub(channel).Score(request, timeout=20)
    assert violations(caught.value) == {"codes": "holds 63999, which is no code of the loaded model"}


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (ScoreRequest(caption="a"), "codes"),
        (ScoreRequest(codes=[0] * 3001, caption="a"), "codes"),
        (ScoreRequest(codes=[64_000], caption="a"), "codes[0]"),
        (ScoreRequest(codes=[1], caption=" ", lyrics="\n"), "caption"),
        (ScoreRequest(codes=[1], caption="<|im_end|>"), "caption"),
        (ScoreRequest(codes=[1], lyrics="a" * 8193), "lyrics"),
        (ScoreRequest(codes=[1], metadata=SongMetadata(bpm=5)), "metadata.bpm"),
        (ScoreRequest(codes=[1], caption="a", spread=0), "spread"),
        (ScoreRequest(codes=[1], caption="a", spread=math.nan), "spread"),
    ],
)
def test_a_bad_field_is_named(bad: ScoreRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_score(bad, max_duration_s=600)
    assert [violation.field for violation in caught.value.violations] == [field]
