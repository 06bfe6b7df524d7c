"""Adapters against PEFT on diffusers' transformer, against weights with the change added, and beside one another."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from peft import LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from soundstage_dit.adapter_file import AdapterFile, AdapterFileError, adaptable, find_files, read_adapter
from soundstage_dit.model.adapter import Adaptation, Kronecker, LowRank
from soundstage_dit.weights import LoadedModel

CPU = torch.device("cpu")
TOLERANCE = 1e-5
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TO_ORIGINAL = (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "o_proj"))
LAYER = "layers.1.self_attn.q_proj"  # 64 to 64


def read(path: Path, model: LoadedModel) -> AdapterFile:
    """Read an adapter for the model."""
    weights, config = find_files(path)
    return read_adapter(weights, config, model.dit, device=CPU, dtype=torch.float32)


def to_original(text: str) -> str:
    """Rename layers from diffusers' names to the released checkpoints'."""
    for theirs, ours in TO_ORIGINAL:
        text = text.replace(theirs, ours)
    return text


def train(pipe: AceStepPipeline, config: PeftConfig, folder: Path, *, seed: int = 0) -> torch.nn.Module:
    """Give diffusers' transformer a random adapter with PEFT, and save that for the original layout."""
    adapted = get_peft_model(copy.deepcopy(pipe.transformer), config)
    source = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "lokr_" in name:
            weight.data.normal_(std=0.15, generator=source)
    adapted.save_pretrained(str(folder))
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({to_original(name): tensor for name, tensor in load_file(weights).items()}, weights)
    settings.write_text(to_original(settings.read_text(encoding="utf-8")), encoding="utf-8")
    return adapted.eval()


def draw(seed: int, frames: int = 75) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [frames, 64], context [frames, 128], conditions [20, 64]."""
    source = torch.Generator().manual_seed(seed)
    return (
        torch.randn(frames, 64, generator=source),
        torch.randn(frames, 128, generator=source),
        torch.randn(20, 64, generator=source),
    )


@torch.inference_mode()
def velocities(
    model: LoadedModel, songs: list[tuple[Tensor, Tensor, Tensor]], adaptations: list[tuple[Adaptation, ...]]
) -> list[Tensor]:
    """What songs in one batch, each with its adapters, are led by."""
    return model.dit(
        [latents for latents, _, _ in songs],
        torch.linspace(0.9, 0.3, len(songs)),
        [context for _, context, _ in songs],
        [model.dit.remember(words, own) for (_, _, words), own in zip(songs, adaptations, strict=True)],
        adaptations,
    )


@torch.inference_mode()
def velocity_of_diffusers(transformer: torch.nn.Module, song: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The same of one song from diffusers' transformer."""
    latents, context, words = song
    at = torch.tensor([0.9])
    return transformer(
        hidden_states=latents[None],
        timestep=at,
        timestep_r=at,
        encoder_hidden_states=words[None],
        context_latents=context[None],
        return_dict=False,
    )[0][0]


@pytest.mark.parametrize(
    ("config", "kind", "rank"),
    [
        (LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION), "lora", 8),
        (LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=[*ATTENTION, "gate_proj"]), "lora", 4),
        (
            LoraConfig(
                r=4,
                lora_alpha=8,
                target_modules=["to_q", "up_proj", "down_proj", "condition_embedder"],
                rank_pattern={"layers.1.self_attn.to_q": 6, "^layers.2.mlp.up_proj": 2},
                alpha_pattern={"cross_attn.to_q": 20},
            ),
            "lora",
            6,
        ),
        (LoKrConfig(r=16, alpha=8, target_modules=ATTENTION), "lokr", 16),
        (LoKrConfig(r=2, alpha=3, decompose_both=True, target_modules=[*ATTENTION, "down_proj"]), "lokr", 2),
    ],
    ids=["reference", "rank-stabilised", "patterns", "lokr-whole", "lokr-factored"],
)
def test_an_adapter_that_peft_saved_does_what_peft_does(
    model: LoadedModel, pipeline: AceStepPipeline, tmp_path: Path, config: PeftConfig, kind: str, rank: int
) -> None:
    adapted = train(pipeline, config, tmp_path)
    file = read(tmp_path, model)
    song = draw(1)
    [ours] = velocities(model, [song], [(Adaptation(deltas=file.deltas, scale=1.0),)])
    theirs, plain = (velocity_of_diffusers(transformer, song) for transformer in (adapted, pipeline.transformer))
    assert (file.kind, file.rank) == (kind, rank)
    assert (theirs - plain).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_diffusers_loses_the_alpha_that_we_keep(model: LoadedModel, pipeline: AceStepPipeline, tmp_path: Path) -> None:
    train(pipeline, LoraConfig(r=8, lora_alpha=16, target_modules=ATTENTION), tmp_path)
    file = read(tmp_path, model)
    halved = copy.deepcopy(pipeline.transformer)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for theirs, ours in TO_ORIGINAL:
        bare = {name.replace(ours, theirs): tensor for name, tensor in bare.items()}
    halved.load_lora_adapter(bare, prefix=None)
    song = draw(1)
    full, half = (velocities(model, [song], [(Adaptation(deltas=file.deltas, scale=scale),)])[0] for scale in (1, 0.5))
    theirs = velocity_of_diffusers(halved, song)
    torch.testing.assert_close(half, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert (full - theirs).abs().max() > 0.05


def lora(rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """down [rank, 64] and up [64, rank]."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 64, generator=source), torch.randn(64, rank, generator=source)


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write a single file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    "prefix", ["", "decoder.", "diffusion_model.", "diffusion_model.decoder.", "base_model.model.decoder."]
)
@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ],
)
def test_a_single_file_is_read_with_every_spelling_of_its_names(
    model: LoadedModel, tmp_path: Path, prefix: str, down: str, up: str
) -> None:
    a, b = lora()
    tensors = {f"{prefix}{LAYER}.{down}": a, f"{prefix}{LAYER}.{up}": b, f"{prefix}{LAYER}.alpha": torch.tensor(6.0)}
    file = read(save(tensors, tmp_path / "one.safetensors"), model)
    delta = file.deltas[LAYER]
    assert isinstance(delta, LowRank)
    assert (file.kind, file.rank, list(file.deltas)) == ("lora", 3, [LAYER])
    torch.testing.assert_close(delta.up @ delta.down, 2 * b @ a)


def test_without_alpha_a_single_file_works_at_full_strength(model: LoadedModel, tmp_path: Path) -> None:
    a, b = lora()
    file = read(
        save({f"{LAYER}.lora_A.weight": a.half(), f"{LAYER}.lora_B.weight": b.half()}, tmp_path / "a.safetensors"),
        model,
    )
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(file.deltas[LAYER](x), x @ (b.half().float() @ a.half().float()).T)


def lokr_parts(*, is_factored: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of a LoKr for a layer of 128 by 64, and the change that they make at scale 1."""
    source = torch.Generator().manual_seed(5)
    w1 = torch.randn(4, 8, generator=source)
    w2_a, w2_b = torch.randn(32, 2, generator=source), torch.randn(2, 8, generator=source)
    parts = {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b} if is_factored else {"lokr_w2": w2_a @ w2_b}
    return {"lokr_w1": w1} | parts, torch.kron(w1, w2_a @ w2_b)


@pytest.mark.parametrize(
    ("is_factored", "alpha", "header", "scale"),
    [
        (True, 6.0, {}, 3.0),
        (True, None, {}, 1.0),
        (False, 6.0, {"lokr_config": json.dumps({"linear_dim": 4, "linear_alpha": 1})}, 1.5),
        (False, None, {"lokr_config": json.dumps({"linear_dim": 4, "linear_alpha": 8})}, 2.0),
        (False, 6.0, {}, 1.0),  # LyCORIS writes alpha = rank here, and the rank nowhere
    ],
)
def test_a_lokr_of_lycoris_adds_its_kronecker_product(
    model: LoadedModel, tmp_path: Path, is_factored: bool, alpha: float | None, header: dict[str, str], scale: float
) -> None:
    parts, change = lokr_parts(is_factored=is_factored)
    tensors = {f"lycoris_layers_2_mlp_gate_proj.{name}": part for name, part in parts.items()}
    if alpha is not None:
        tensors["lycoris_layers_2_mlp_gate_proj.alpha"] = torch.tensor(alpha)
    file = read(save(tensors, tmp_path / "lokr.safetensors", header), model)
    delta = file.deltas["layers.2.mlp.gate_proj"]
    assert isinstance(delta, Kronecker)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(delta(x), x @ (scale * change).T, atol=1e-4, rtol=1e-5)


def test_a_directory_of_the_references_trainer_is_read(model: LoadedModel, tmp_path: Path) -> None:
    parts, change = lokr_parts(is_factored=False)
    save(
        {f"lycoris_layers_0_mlp_up_proj.{name}": part for name, part in parts.items()},
        tmp_path / "lokr_weights.safetensors",
    )
    (tmp_path / "lokr_config.json").write_text(json.dumps({"linear_dim": 8, "linear_alpha": 4}), encoding="utf-8")
    delta = read(tmp_path, model).deltas["layers.0.mlp.up_proj"]
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(delta(x), x @ (0.5 * change).T, atol=1e-4, rtol=1e-5)


A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"layers.9.self_attn.q_proj.lora_A.weight": torch.ones(3, 64)},
            "layers.9.self_attn.q_proj.lora_A.weight fits",
        ),
        ({"time_embed.linear_1.lora_A.weight": torch.ones(3, 64)}, "time_embed.linear_1.lora_A.weight fits no layer"),
        ({"something": torch.ones(1)}, "something fits no layer"),
        ({f"{LAYER}.lora_B.bias": torch.ones(64)}, f"{LAYER}.lora_B.bias fits no layer"),
        ({f"{LAYER}.dora_scale": torch.ones(64, 1)}, f"{LAYER}.dora_scale: DoRA is not supported"),
        ({f"{LAYER}.lora_magnitude_vector.weight": torch.ones(64)}, "DoRA is not supported"),
        ({f"{LAYER}.lora_down.weight": torch.ones(3, 64)}, f"{LAYER} has lora_down twice"),
        ({A: torch.ones(3, 32)}, f"{LAYER}: the adapter is for a layer of [64, 32], and this model's is [64, 64]"),
        ({A: torch.ones(4, 64)}, f"{LAYER}: lora_up and lora_down of [64, 3] and [4, 64]"),
        ({A: torch.ones(3, 64, 1)}, f"{LAYER}: lora_up and lora_down"),
        ({A: None}, f"{LAYER} lacks lora_down"),
        ({A: torch.full((3, 64), torch.nan)}, f"{LAYER}: what the adapter adds is not finite in float32"),
        ({f"{LAYER}.alpha": torch.ones(3)}, f"{LAYER}: alpha is [3]; one number is wanted"),
        ({f"{LAYER}.lokr_w1": torch.ones(2, 2)}, f"{LAYER} lacks lokr_w2_a"),
        ({"layers.0.mlp.up_proj.lokr_w1": torch.ones(2, 2)}, "holds lokr and lora; one kind is wanted"),
        ({A: None, B: None}, "holds no tensors; one kind is wanted"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    model: LoadedModel, tmp_path: Path, change: dict[str, Tensor | None], says: str
) -> None:
    a, b = lora()
    tensors = {name: tensor for name, tensor in ({A: a, B: b} | change).items() if tensor is not None}
    with pytest.raises(AdapterFileError) as caught:
        read(save(tensors, tmp_path / "bad.safetensors"), model)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora is 'True'"),
        ({"r": 0}, "r is '0'"),
        ({"r": 8, "lora_alpha": 8}, f"{LAYER} has rank 3, but its configuration says 8"),
        ({"rank_pattern": {"(q|k)_proj": 4}}, "rank_pattern.(q|k)_proj"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    model: LoadedModel, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    a, b = lora()
    save({A: a, B: b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AdapterFileError) as caught:
        read(tmp_path, model)
    assert says in caught.value.message


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.safetensors", "."])
def test_pickles_and_torn_files_are_refused(model: LoadedModel, tmp_path: Path, name: str) -> None:
    torch.save({A: torch.ones(3, 64)}, tmp_path / ("adapter_model.bin" if name == "." else name))
    with pytest.raises(AdapterFileError, match=r"safetensors"):
        read(tmp_path / name, model)


def adaptations(model: LoadedModel, seed: int) -> tuple[Adaptation, ...]:
    """Adapters of a seed's own rank in every layer that can have one."""
    source = torch.Generator().manual_seed(seed)

    def low_rank(linear: torch.nn.Linear) -> LowRank:
        down, up = (
            torch.randn(size, generator=source) * 0.1
            for size in ((seed, linear.in_features), (linear.out_features, seed))
        )
        return LowRank(down=down, up=up)

    def kronecker(linear: torch.nn.Linear) -> Kronecker:
        left, right = (
            torch.randn(2, 4, generator=source),
            torch.randn(linear.out_features // 2, linear.in_features // 4, generator=source),
        )
        return Kronecker(left=left * 0.1, right=right * 0.1)

    make: Callable[[torch.nn.Linear], LowRank | Kronecker] = kronecker if seed % 2 else low_rank
    return (Adaptation(deltas={name: make(linear) for name, linear in adaptable(model.dit).items()}, scale=0.5 * seed),)


def test_songs_with_unlike_adapters_in_one_batch_are_each_as_alone(model: LoadedModel) -> None:
    own = [adaptations(model, 2), (), adaptations(model, 3), adaptations(model, 1) + adaptations(model, 4)]
    songs = [draw(index, frames=40 + 17 * index) for index in range(len(own))]
    times = torch.linspace(0.9, 0.3, len(songs))
    together = velocities(model, songs, own)
    with torch.inference_mode():
        for velocity, (latents, context, words), mine, at in zip(together, songs, own, times, strict=True):
            memory = model.dit.remember(words, mine)
            [alone] = model.dit([latents], at[None], [context], [memory], [mine])
            torch.testing.assert_close(velocity, alone, atol=TOLERANCE, rtol=TOLERANCE)
            if mine:
                [plain] = model.dit([latents], at[None], [context], [model.dit.remember(words)])
                assert (velocity - plain).abs().max() > 0.1


def test_a_song_without_adapters_is_the_same_to_the_bit_beside_one_that_has_some(model: LoadedModel) -> None:
    songs = [draw(0), draw(1), draw(2)]
    plain = velocities(model, songs, [(), (), ()])
    beside = velocities(model, songs, [(), adaptations(model, 2), ()])
    assert torch.equal(plain[0], beside[0])
    assert torch.equal(plain[2], beside[2])
    assert not torch.equal(plain[1], beside[1])
    assert all(map(torch.equal, plain, velocities(model, songs, [(), (), ()])))


def test_several_adapters_add_up_at_their_scales_and_leave_the_weights_alone(model: LoadedModel) -> None:
    own = adaptations(model, 2) + adaptations(model, 3)
    changed = copy.deepcopy(model.dit)
    for name, linear in adaptable(changed).items():
        for adaptation in own:
            linear.weight.data += adaptation.scale * adaptation.deltas[name](torch.eye(linear.in_features)).T
    weights = {name: linear.weight.clone() for name, linear in adaptable(model.dit).items()}
    song = draw(0)
    [velocity] = velocities(model, [song], [own])
    [merged] = velocities(replace(model, dit=changed), [song], [()])
    torch.testing.assert_close(velocity, merged, atol=3 * TOLERANCE, rtol=TOLERANCE)
    assert all(torch.equal(weights[name], linear.weight) for name, linear in adaptable(model.dit).items())
