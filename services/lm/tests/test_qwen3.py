"""Our decoder beside transformers' on the same weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from soundstage_lm.model.cache import Span
from soundstage_lm.model.pages import PAGE, PagePool, Row
from soundstage_lm.model.qwen3 import Qwen3
from soundstage_lm.weights import Checkpoint, load_checkpoint

# Two ways of adding the same float32 numbers: logits reach 7, and differences of 1e-5 were seen.
TOLERANCE = 5e-5
SHORT, LONG = 9, 70
STEPS = PAGE + 10  # crosses a page in either row


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(Qwen3Config.from_pretrained(tiny)).eval().requires_grad_(False)
    model.model.load_state_dict(load_file(tiny / "model.safetensors"), strict=True)
    return model


def random_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(0, 1261, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Qwen3, prompts: Sequence[list[int]], steps: Sequence[int], *, piece: int = 1000) -> Tensor:
    """Logits [1 + steps, rows, vocabulary] after the prompts, read in pieces, and after every step."""
    pool, rows = PagePool(16), [Row() for _ in prompts]
    cache, lengths = model.make_cache(pool.num_pages), [0] * len(prompts)

    def span(row: int, tokens: Sequence[int]) -> Span:
        cache.clear(pool.grow(rows[row], lengths[row] + len(tokens)))
        lengths[row] += len(tokens)
        return Span(tokens=tuple(tokens), start=lengths[row] - len(tokens), pages=tuple(rows[row].pages))

    last: list[Tensor] = []
    for row, prompt in enumerate(prompts):
        pieces = [prompt[first : first + piece] for first in range(0, len(prompt), piece)]
        last.append([model.read(cache, [span(row, tokens)])[0] for tokens in pieces][-1])
    hidden = [torch.stack(last)]
    for token in steps:
        hidden.append(model.read(cache, [span(row, [token]) for row in range(len(prompts))]))
    return torch.stack(hidden) @ model.embed_tokens.weight.T


def test_rows_of_unequal_length_equal_transformers_one_by_one(
    checkpoint: Checkpoint, reference: Qwen3ForCausalLM
) -> None:
    prompts, steps = [random_tokens(LONG, 1), random_tokens(SHORT, 2)], random_tokens(STEPS, 3)
    found = run(checkpoint.model, prompts, steps)
    for row, prompt in enumerate(prompts):
        wanted = reference(torch.tensor([prompt + steps])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(found[:, row], wanted, rtol=0, atol=TOLERANCE)


def test_rows_equal_transformers_padded_batch(checkpoint: Checkpoint, reference: Qwen3ForCausalLM) -> None:
    long, short = random_tokens(LONG, 1), random_tokens(SHORT, 2)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[1, : LONG - SHORT] = 0
    ids = torch.tensor([long, [256] * (LONG - SHORT) + short])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    wanted = reference(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(run(checkpoint.model, [long, short], [])[0], wanted, rtol=0, atol=TOLERANCE)


def test_a_row_does_not_feel_its_neighbour(checkpoint: Checkpoint) -> None:
    prompt, steps = random_tokens(SHORT, 4), random_tokens(20, 5)
    beside = [run(checkpoint.model, [random_tokens(LONG, seed), prompt], steps)[:, 1] for seed in (6, 7)]
    assert torch.equal(beside[0], beside[1])


def test_bfloat16_is_as_near_to_float32_as_transformers_is(tiny: Path, reference: Qwen3ForCausalLM) -> None:
    model = load_checkpoint(tiny, device=torch.device("cpu"), dtype=torch.bfloat16).model
    prompt, steps = random_tokens(LONG, 1), random_tokens(STEPS, 3)
    ids = torch.tensor([prompt + steps])
    exact = reference(ids).logits[0, LONG - 1 :]
    rough = Qwen3ForCausalLM(reference.config).eval()
    rough.load_state_dict(reference.state_dict())
    torch.nn.Module.to(rough, torch.bfloat16)  # theirs is typed for its decorator, not for its arguments
    theirs = rough(ids).logits[0, LONG - 1 :].detach().float()
    ours = run(model, [prompt], steps)[:, 0].float()
    # Both round at every operation, at slightly different places: their errors are alike, not equal.
    assert (ours - exact).square().mean() < 1.5 * (theirs - exact).square().mean()


def test_a_prompt_in_pieces_is_the_prompt(checkpoint: Checkpoint) -> None:
    prompts, steps = [random_tokens(2 * PAGE + 9, 1), random_tokens(SHORT, 2)], random_tokens(5, 3)
    whole = run(checkpoint.model, prompts, steps)
    for piece in (1, 16, PAGE):
        torch.testing.assert_close(run(checkpoint.model, prompts, steps, piece=piece), whole, rtol=0, atol=TOLERANCE)


def test_float16_holds_what_overflows_it(tiny: Path, tmp_path: Path, reference: Qwen3ForCausalLM) -> None:
    # As in the released planners: an early MLP writes about 2e6 to one channel of the residual stream.
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    weights["model.layers.0.mlp.up_proj.weight"] *= 450
    weights["model.layers.0.mlp.down_proj.weight"][3] *= 450
    huge = Qwen3ForCausalLM(reference.config).eval().requires_grad_(False)
    huge.load_state_dict(weights)
    prompt = torch.tensor([random_tokens(LONG, 1)])
    residual = huge.model(prompt, output_hidden_states=True).hidden_states[1]
    assert residual.abs().max() > 1e6
    half = Qwen3ForCausalLM(reference.config).eval()
    half.load_state_dict(weights)
    torch.nn.Module.to(half, torch.float16)
    assert not half(prompt).logits.isfinite().all()
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in huge.model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_checkpoint(tmp_path, device=torch.device("cpu"), dtype=torch.float16).model
    found, wanted = run(model, prompt.tolist(), []).float()[0, 0], huge(prompt).logits[0, -1]
    # float16 has 11 bits: each rounding is off by up to 5e-4, and two layers round a few dozen times.
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(1e-2 * wanted.abs().max()))
