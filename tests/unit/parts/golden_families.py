"""Model families for the golden masks: their control tokens, tokenizers built from nothing, and their formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import golden_formats as formats
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parents[2] / "golden" / "masks"
# Enough to learn merges from: words with their space, and line breaks with the indentation behind them.
CORPUS = [
    "What is the weather in the town? The weather is clear and the sky is blue.",
    "You are terse. Who wrote this? I wrote this answer for you, and it is the last answer.",
    "Look:\n\n    def f(x):\n        return x\n\n  two spaces\n  and two more\n\n    x = f(x)\n    return x\n",
    '{"name": "get_weather", "arguments": {"city": "the town", "days": 2}}',
]


@dataclass(frozen=True)
class Family:
    """What is known of a model family.

    Attributes:
        write: The golden format, see :mod:`golden_formats`.
        end: The token that ends an assistant turn.
        cue: What stands before an answer; a person's text may contain it too.
        special: Control tokens.
        tags: Added tokens that the family does not flag as special.
        begin: Begin token; empty if the family has none.
        eos: The tokenizer's end token, where it is not ``end``.
        sentencepiece: Spaces as ``\\u2581`` with byte fallback, instead of byte-level BPE.
        bare_offsets: Offsets leave out the leading space of a token.
        real: Name of the same template among the originals that TRL ships, if it is there.
    """

    write: Callable
    end: str
    cue: str
    special: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    begin: str = ""
    eos: str = ""
    sentencepiece: bool = False
    bare_offsets: bool = False
    real: str = ""


MISTRAL_TOOLS = tuple(f"[{side}{kind}]" for kind in ("AVAILABLE_TOOLS", "TOOL_RESULTS") for side in ("", "/"))
QWEN_TAGS = ("<tool_call>", "</tool_call>")
DEEPSEEK = {
    "write": formats.write_deepseek,
    "end": "<｜end▁of▁sentence｜>",
    "cue": "<｜Assistant｜>",
    "tags": (
        "<｜User｜>",
        "<｜Assistant｜>",
        *(f"<｜tool▁{kind}▁{side}｜>" for kind in ("calls", "call", "outputs", "output") for side in ("begin", "end")),
        "<｜tool▁sep｜>",
        "<think>",
        "</think>",
    ),
    "begin": "<｜begin▁of▁sentence｜>",
}
GEMMA = {
    "end": "<end_of_turn>",
    "cue": "<start_of_turn>model\n",
    "special": ("<start_of_turn>",),
    "begin": "<bos>",
    "eos": "<eos>",
}
FAMILIES = {
    "chatml": Family(formats.write_chatml, "<|im_end|>", "<|im_start|>assistant\n", ("<|im_start|>",)),
    "llama2": Family(formats.write_llama2, "</s>", " [/INST]", begin="<s>", sentencepiece=True),
    "llama31": Family(
        formats.write_llama31,
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
        begin="<|begin_of_text|>",
        bare_offsets=True,
        real="llama3_1",
    ),
    "mistral_v01": Family(formats.write_mistral_v01, "</s>", " [/INST]", begin="<s>", sentencepiece=True),
    "mistral_v03": Family(
        formats.write_mistral_v03,
        "</s>",
        "[/INST]",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", *MISTRAL_TOOLS),
        begin="<s>",
        sentencepiece=True,
    ),
    "mistral_tekken": Family(
        formats.write_mistral_tekken,
        "</s>",
        "[/INST]",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]", *MISTRAL_TOOLS),
        begin="<s>",
    ),
    "gemma": Family(formats.write_gemma, **GEMMA, real="gemma"),
    "gemma3": Family(formats.write_gemma, **GEMMA, real="gemma3"),
    "qwen25": Family(
        formats.write_qwen25,
        "<|im_end|>",
        "<|im_start|>assistant\n",
        ("<|im_start|>", "<|endoftext|>"),
        QWEN_TAGS,
        real="qwen2_5",
    ),
    "qwen3": Family(
        formats.write_qwen3,
        "<|im_end|>",
        "<|im_start|>assistant\n",
        ("<|im_start|>", "<|endoftext|>"),
        (*QWEN_TAGS, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        real="qwen3",
    ),
    "phi3": Family(
        formats.write_phi3,
        "<|end|>",
        "<|assistant|>\n",
        ("<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
        real="phi3",
    ),
    "zephyr": Family(formats.write_zephyr, "</s>", "<|assistant|>\n", begin="<s>", sentencepiece=True),
    "tulu": Family(formats.write_tulu, "<|endoftext|>", "<|assistant|>\n", bare_offsets=True),
    "deepseek_r1": Family(**DEEPSEEK, real="deepseek_r1_distill"),
    "deepseek_v3": Family(**DEEPSEEK, real="deepseekv3_training"),
    "command_r": Family(
        formats.write_command_r,
        "<|END_OF_TURN_TOKEN|>",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        begin="<BOS_TOKEN>",
        real="cohere",
    ),
}


@cache
def _train_bytes() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def _train_pieces() -> str:
    """A tokenizer with Llama 2's treatment of spaces: only what the corpus holds has pieces, the rest are bytes."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = [line for text in CORPUS for line in text.splitlines()]
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer.to_str()


def build_tokenizer(name: str, *, strips: bool = False) -> PreTrainedTokenizerFast:
    """Builds a family's tokenizer with its chat template; its control tokens may strip white space on their right."""
    family = FAMILIES[name]
    tokenizer = Tokenizer.from_str(_train_pieces() if family.sentencepiece else _train_bytes())
    control = dict.fromkeys(token for token in (family.begin, family.end, family.eos, *family.special) if token)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=strips) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in family.tags])
    steps = [] if family.sentencepiece else [processors.ByteLevel(trim_offsets=family.bare_offsets)]
    if family.begin:
        begin = (family.begin, tokenizer.token_to_id(family.begin))
        steps.append(processors.TemplateProcessing(single=f"{family.begin} $A", special_tokens=[begin]))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.begin or None,
        eos_token=family.eos or family.end,
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def spell(name: str, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[bytes]:
    """Returns the bytes of the text that every token stands for, worked out from its name alone."""
    # Byte-level BPE names printable bytes by themselves and the others, in order, by the characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}

    def spell_one(token: str) -> bytes:
        if token in tokenizer.added_tokens_encoder:
            return token.encode()
        if not FAMILIES[name].sentencepiece:
            return bytes(byte_of[character] for character in token)
        return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("\u2581", " ").encode()

    first, *rest = (spell_one(token) for token in tokenizer.convert_ids_to_tokens(ids))
    # SentencePiece puts a space before a text; it is none of the text.
    return [first.removeprefix(b" ") if FAMILIES[name].sentencepiece else first, *rest]
