"""A byte-level tokenizer that carries the real special tokens."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
_SPECIAL = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
_PLAIN_ADDED = ("<think>", "</think>")  # added, but not "special", in Qwen3's own tokenizer


def byte_tokenizer(
    *, num_codes: int = 0, appends_end: bool = False, texts: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of 256 bytes, the control tokens, and `num_codes` audio codes.

    With `appends_end` every encoding ends in `<|endoftext|>`, as Qwen3-Embedding's does. The words of `texts` are a
    token each, as common words are in the released tokenizers.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if texts:
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    codes = [f"<|audio_code_{index}|>" for index in range(num_codes)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (*_PLAIN_ADDED, *codes)])
    if appends_end:
        end = tokenizer.token_to_id(END_OF_TEXT)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token=END_OF_TEXT, padding_side="right"
    )
