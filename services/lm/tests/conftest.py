import base64
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from soundstage_cli.tiny.lm import write_lm
from soundstage_lm.composer import Composer
from soundstage_lm.grammar import Grammar
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.weights import Checkpoint, load_checkpoint
from soundstage_runtime.worker import Worker


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the released layout."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-lm"
    write_lm(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny: Path) -> Checkpoint:
    return load_checkpoint(tiny, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test")
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def byte_tokenizer(checkpoint: Checkpoint) -> PlannerTokenizer:
    return checkpoint.tokenizer


@pytest.fixture(scope="session")
def byte_grammar(checkpoint: Checkpoint) -> Grammar:
    return Grammar(checkpoint.tokenizer, max_duration_s=600)


@pytest.fixture
def writer(checkpoint: Checkpoint, worker: Worker, byte_grammar: Grammar) -> TorchWriter:
    return TorchWriter(checkpoint, worker, byte_grammar)


@pytest.fixture
def composer(checkpoint: Checkpoint, writer: TorchWriter) -> Composer:
    return Composer(writer, checkpoint.tokenizer, fingerprint="f", max_duration_s=600, max_tokens=40_960)


@pytest.fixture(scope="session")
def qwen_description() -> dict[str, Any]:
    """Qwen3's tokenizer.json with the planner's added tokens, in so far as the tests' texts need it.

    data/qwen_ranks_excerpt.tiktoken holds those of Qwen's public byte-pair ranks (Apache-2.0) that are substrings of
    the texts: no other rank can take part in encoding them, so the ids are those of the whole vocabulary.
    """
    lines = (Path(__file__).parent / "data" / "qwen_ranks_excerpt.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    added = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<think>": 151667,
        "</think>": 151668,
    }
    added |= {f"<|audio_code_{code}|>": 151669 + code for code in range(65_535)}
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": name, **flags} for name, token_id in added.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {_spell(token): rank for token, rank in ranks.items()},
            "merges": [[_spell(part) for part in parts] for parts in _merges(ranks)],
        },
    }


@pytest.fixture(scope="session")
def qwen(qwen_description: dict[str, Any]) -> PlannerTokenizer:
    return PlannerTokenizer(qwen_description)


def _merges(ranks: dict[bytes, int]) -> Iterator[list[bytes]]:
    """Ranks say what a token is, a BPE model wants to know of which two it is made."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = pairs.index(min(pairs))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts


def _spell(token: bytes) -> str:
    """Write bytes in the letters of byte-level BPE: printable bytes as themselves, the others from 256 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return "".join(chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in token)
