"""The checkpoint's tokenizer. Token ids are found by name; none is written in our code."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from soundstage_lm.prompts import Codes, Control, Prompt, code_name
from soundstage_runtime.checkpoint import CheckpointError, read_json
from soundstage_runtime.score import NUM_CODES
from soundstage_runtime.text import is_control_token

_FILE: Final = "tokenizer.json"
_OLDER_FILES: Final = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")
# Byte-level BPE spells printable bytes as themselves and the others, in order, with the characters from 256 on.
_PRINTABLE: Final = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS: Final = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES: Final = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + index): byte for index, byte in enumerate(_OTHERS)
}


class PlannerTokenizer:
    """Words through byte-pair encoding, control tokens and audio codes by name only."""

    def __init__(self, description: dict[str, Any]) -> None:
        """Take what a tokenizer.json holds. Raises CheckpointError when a token is missing or strange."""
        if "added_tokens" not in description or "model" not in description:
            raise CheckpointError(f"{_FILE} is no tokenizer: it has no added_tokens or no model")
        self._ids: dict[str, int] = {token["content"]: token["id"] for token in description["added_tokens"]}
        strange = [name for name in self._ids if not is_control_token(name)]
        if strange:
            raise CheckpointError(f"the tokenizer's added token {strange[0]!r} is not known as a control token")
        self._names = {token_id: name for name, token_id in self._ids.items()}
        # Without added tokens no text can turn into one. It also spares the seconds that 65,535 of them take to set up.
        self._bpe = Tokenizer.from_str(json.dumps({**description, "added_tokens": [], "post_processor": None}))
        vocabulary = self._bpe.get_vocab()
        self.words = {token_id: _bytes(word) for word, token_id in vocabulary.items() if token_id not in self._names}
        self.size = 1 + max([*self._names, *vocabulary.values()])
        self.controls = {control: self.token_id(control) for control in Control}
        missing = {bytes([byte]) for byte in range(256)}.difference(self.words.values())
        if missing:
            raise CheckpointError(f"the tokenizer has no word for the byte {min(missing)!r}: it is not byte-level BPE")
        found = [(code, code_name(code)) for code in range(NUM_CODES)]
        pairs = [(code, self._ids[name]) for code, name in found if name in self._ids]
        if not pairs:
            raise CheckpointError("the tokenizer has no audio codes: this is not a planner's checkpoint")
        self.codes: NDArray[np.int64]  # [codes], audio codes in rising order
        self.code_ids: NDArray[np.int64]  # [codes], their token ids
        self.codes, self.code_ids = np.array(pairs, dtype=np.int64).T.copy()
        self.code_of = dict(zip(self.code_ids.tolist(), self.codes.tolist(), strict=True))

    def token_id(self, name: str) -> int:
        """Return an added token's id; raises CheckpointError when there is none."""
        if name not in self._ids:
            raise CheckpointError(f"the tokenizer has no token {name!r}")
        return self._ids[name]

    def encode(self, text: str) -> list[int]:
        """Encode words; what looks like a control token is just characters."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Encode a prompt, part by part."""
        ids: list[int] = []
        for part in prompt:
            match part:
                case Control():
                    ids.append(self.controls[part])
                case Codes():
                    ids += [self.token_id(code_name(code)) for code in part]
                case str():
                    ids += self.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Turn ids back into text, control tokens as their names."""
        pieces: list[str] = []
        for is_added, run in groupby(ids, key=lambda token_id: token_id in self._names):
            tokens = list(run)
            pieces += [self._names[token_id] for token_id in tokens] if is_added else [self._bpe.decode(tokens)]
        return "".join(pieces)


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files that say how a checkpoint's words become tokens."""
    names = (_FILE,) if (folder / _FILE).is_file() else _OLDER_FILES
    return [folder / name for name in names if (folder / name).is_file()]


def load_tokenizer(folder: Path) -> PlannerTokenizer:
    """Load a checkpoint's tokenizer.json, or have it made from older files. Raises CheckpointError."""
    if (folder / _FILE).is_file():
        return PlannerTokenizer(read_json(folder / _FILE))
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    try:
        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {error}") from error
    return PlannerTokenizer(json.loads(slow.backend_tokenizer.to_str()))


def _bytes(word: str) -> bytes:
    """Read the letters of byte-level BPE; a word of other letters stands for nothing."""
    return bytes(_BYTES[letter] for letter in word) if all(letter in _BYTES for letter in word) else b""
