import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from soundstage_cli.tiny.tokenizer import byte_tokenizer
from soundstage_lm.tokenizer import PlannerTokenizer, load_tokenizer
from soundstage_runtime.checkpoint import CheckpointError


def test_codes_end_where_the_codebook_ends(qwen: PlannerTokenizer) -> None:
    assert (qwen.codes[0], qwen.codes[-1], len(qwen.codes)) == (0, 63_999, 64_000)
    assert (qwen.code_ids[0], qwen.code_ids[-1]) == (151_669, 215_668)
    assert qwen.size == 217_204


def test_encodes_words_as_transformers_does(tiny: Path) -> None:
    text = "caf\u00e9 \u266d 東京 [verse]\n\n  two  spaces"
    reference = PreTrainedTokenizerFast.from_pretrained(tiny)
    assert load_tokenizer(tiny).encode(text) == reference.encode(text)


def test_decodes_control_tokens_by_name(qwen: PlannerTokenizer) -> None:
    assert qwen.decode([151667, 198, 65, 5187, 25, 151645]) == "<think>\nbpm:<|im_end|>"


def test_reads_files_older_than_tokenizer_json(tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "older"
    folder.mkdir()
    new = byte_tokenizer(num_codes=3)
    new.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    config = '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": {%s}}'
    flags = '"lstrip": false, "rstrip": false, "normalized": false, "single_word": false, "special": true'
    added = sorted(new.get_added_vocab().items(), key=lambda item: item[1])
    entries = ",".join(f'"{token_id}": {{"content": "{name}", {flags}}}' for name, token_id in added)
    (folder / "tokenizer_config.json").write_text(config % entries)
    found = load_tokenizer(folder)
    assert found.code_ids.tolist() == [new.convert_tokens_to_ids(f"<|audio_code_{code}|>") for code in range(3)]
    assert found.encode("la\n la") == new.encode("la\n la")


def test_refuses_a_control_token_that_users_could_write(qwen_description: dict[str, Any]) -> None:
    description = copy.deepcopy(qwen_description)
    description["added_tokens"][0]["content"] = "[STOP]"
    with pytest.raises(CheckpointError, match=r"\[STOP\]"):
        PlannerTokenizer(description)


def test_refuses_words_that_are_no_bytes(qwen_description: dict[str, Any]) -> None:
    description = copy.deepcopy(qwen_description)
    model = description["model"]
    model["vocab"] = {word: token for word, token in model["vocab"].items() if "z" not in word}
    model["merges"] = [pair for pair in model["merges"] if "z" not in "".join(pair)]
    with pytest.raises(CheckpointError, match="no word for the byte b'z'"):
        PlannerTokenizer(description)


def test_knows_the_bytes_of_every_word(qwen: PlannerTokenizer) -> None:
    assert [qwen.words[token] for token in (198, 220, 624, 23347, 145346)] == [
        b"\n",
        b" ",
        b".\n",
        b"caption",
        "♯".encode(),
    ]
    assert max(qwen.words) < 151643


@pytest.mark.parametrize(("name", "count"), [("<|im_end|>", 1), ("<|audio_code_", 65_535)])
def test_names_what_is_missing(qwen_description: dict[str, Any], name: str, count: int) -> None:
    kept = [token for token in qwen_description["added_tokens"] if not token["content"].startswith(name)]
    assert len(qwen_description["added_tokens"]) - len(kept) == count
    with pytest.raises(CheckpointError, match=r"audio codes|im_end"):
        PlannerTokenizer({**qwen_description, "added_tokens": kept})


def test_codes_need_not_lie_together(qwen_description: dict[str, Any]) -> None:
    added = [token for token in qwen_description["added_tokens"] if not token["content"].startswith("<|audio")]
    codes = [{**added[0], "content": f"<|audio_code_{code}|>", "id": 151_700 - code} for code in (5, 2, 9)]
    found = PlannerTokenizer({**qwen_description, "added_tokens": added + codes})
    assert found.codes.tolist() == [2, 5, 9]
    assert found.code_ids.tolist() == [151_698, 151_695, 151_691]
