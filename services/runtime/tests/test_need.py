"""What is counted of memory on a card, where nothing could be measured: that it is there, and for what."""

import pytest

from soundstage_budget.models import LMS, VAE
from soundstage_budget.need import BATCHED_TOKENS, context_bytes, need_lm, need_vae
from soundstage_budget.tiers import LM_SIZES, LmSize

MIB = 1 << 20


@pytest.mark.parametrize("variant", LM_SIZES)
def test_vllm_is_planned_with_what_it_reads_in_a_step_and_its_graphs(variant: LmSize) -> None:
    model = LMS[variant]
    vllm, torch = (
        need_lm(model, dtype="bfloat16", max_batch=8, max_duration_s=600, on_card=True, engine=engine)
        for engine in ("vllm", "torch")
    )
    assert vllm.context == torch.context == context_bytes(on_card=True)  # the process that starts it has none
    assert vllm.weights == model.parameters * 2 < torch.weights
    inner = BATCHED_TOKENS * 3 * model.shape.mlp_width * 2
    logits = 16 * model.vocabulary * (2 + 4)
    assert vllm.activations > inner + logits
    assert vllm.workspace >= 512 * MIB
    assert vllm.kv < torch.kv  # no room for a judge


def test_an_offloaded_codec_has_one_half_on_the_card() -> None:
    whole, half = (
        need_vae(VAE, dtype="float32", window_frames=64, max_batch=1, max_duration_s=600, offload=offload, on_card=True)
        for offload in ("none", "model")
    )
    assert half.weights == max(VAE.encoder_parameters, VAE.decoder_parameters) * 4
    assert whole.weights == (VAE.encoder_parameters + VAE.decoder_parameters) * 4
