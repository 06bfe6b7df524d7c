"""vLLM's processes, from options to a writer that has proved itself."""

import asyncio
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from soundstage_budget.engine_choice import DtypeChoice
from soundstage_budget.need import BATCHED_TOKENS
from soundstage_lm.brief import Metadata, Sampling
from soundstage_lm.grammar import Grammar
from soundstage_lm.prompts import Control, codes_prompt, unguided_prompt
from soundstage_lm.rules import CodesRule
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.vllm_engine.plugin import ARCHITECTURE
from soundstage_lm.vllm_engine.processor import HALT, MAX_DURATION
from soundstage_lm.vllm_engine.writer import VllmWriter
from soundstage_lm.weights import read_config
from soundstage_lm.writer import Text

_LONGEST: Final = 8192  # tokens of one text: the codes of 600 s, and as much again for words
_LEAST_SHARE: Final = 0.05
_PAGE: Final = 32  # tokens; the least that all of vLLM's attention kernels take
_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """What to start: `device` is "cpu" or the number of a CUDA device."""

    folder: Path
    device: str
    dtype: DtypeChoice
    max_duration_s: int
    max_texts: int
    kv_cache_bytes: int
    timeout_s: float
    memory_share: float = 0.0  # of the device, that must be free; 0 for no budget


async def start_writer(options: VllmOptions, tokenizer: PlannerTokenizer, grammar: Grammar) -> VllmWriter:
    """Start vLLM and have it write a guided text. Raises whatever went wrong, and leaves no process behind."""
    mine = set(multiprocessing.active_children())
    starting = asyncio.create_task(asyncio.to_thread(_start, arguments(options), options.device))
    try:
        engine = await asyncio.wait_for(asyncio.shield(starting), options.timeout_s)
    except TimeoutError as error:
        if starting.done():
            raise
        for process in set(multiprocessing.active_children()) - mine:
            process.kill()  # whereupon the thread ends as well
        await asyncio.wait([starting])
        raise TimeoutError(f"not ready after {options.timeout_s:g} s") from error
    writer = make_writer(engine, tokenizer, grammar)
    try:
        async with asyncio.timeout(options.timeout_s):
            await prove(writer, tokenizer)
    except BaseException:
        writer.close()
        raise
    return writer


def make_writer(engine: AsyncLLM, tokenizer: PlannerTokenizer, grammar: Grammar) -> VllmWriter:
    """Make the front of a started engine."""
    return VllmWriter(engine, grammar, halt=tokenizer.token_id(HALT), end=tokenizer.controls[Control.END])


async def prove(writer: VllmWriter, tokenizer: PlannerTokenizer) -> None:
    """Write a short guided text; the writer raises unless both requests hold the same allowed tokens."""
    prompts = [codes_prompt("a first text", "la la la", Metadata(bpm=120)), unguided_prompt("")]
    text = Text(
        prompts=tuple(tuple(tokenizer.encode_prompt(prompt)) for prompt in prompts),
        rule=CodesRule(count=8),
        sampling=Sampling(),
        seed=0,
        phase=0,
    )
    async for _ in writer.write(text):
        pass


def arguments(options: VllmOptions) -> AsyncEngineArgs:
    """Say to vLLM what the options mean. Raises ValueError when the memory is too small for any text."""
    config = read_config(options.folder / "config.json")
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * _BYTES[options.dtype]
    # A guided text of full length has to fit, beside the page that is the engine's own.
    fitting = (options.kv_cache_bytes // (token_bytes * _PAGE) - 1) // 2 * _PAGE
    longest = min(_LONGEST, config.max_position_embeddings, fitting)
    if longest <= _PAGE:
        raise ValueError(f"{options.kv_cache_bytes} bytes for keys and values hold no text of this model")
    is_cpu = options.device == "cpu"
    return AsyncEngineArgs(
        model=str(options.folder),
        skip_tokenizer_init=True,
        hf_overrides={"architectures": [ARCHITECTURE]},
        generation_config="vllm",
        dtype=options.dtype,
        max_model_len=longest,
        # Both prompts of a text in one step; where memory is planned, as long as the plan says.
        max_num_batched_tokens=min(2 * longest, BATCHED_TOKENS) if options.memory_share else 2 * longest,
        max_num_seqs=2 * options.max_texts,
        block_size=_PAGE,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        # Only asks that much to be free: the cache is the line above.
        gpu_memory_utilization=max(_LEAST_SHARE, options.memory_share),
        enable_prefix_caching=False,
        async_scheduling=False,
        enforce_eager=is_cpu,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        scheduler_cls="soundstage_lm.vllm_engine.scheduler.PairScheduler",
        logits_processors=["soundstage_lm.vllm_engine.processor:TextProcessor"],
        additional_config={MAX_DURATION: options.max_duration_s},
        seed=0,
    )


def _start(engine: AsyncEngineArgs, device: str) -> AsyncLLM:
    # Forked, the engine would inherit gRPC's threads in whatever state they are.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if device != "cpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(device)] if visible else device
    return AsyncLLM.from_engine_args(engine)
