"""How people write the names of models."""

from __future__ import annotations

import re

from simulator.validation.row import Row

#: other spellings -> the name that rules and shipped models go by; ``\1`` and ``\2`` are versions and sizes. Names that are written so
#: already stay as they are
_SPELLINGS = (
    (r"deep[ _-]?seek[ _-]?v(\d)", r"DeepSeek-V\1"),
    (r"kimi[ _-]?k(\d)", r"Kimi-K\1"),
    (r"gpt[ _-]?oss[ _-]?(\d+)b", r"GPT-OSS \1B"),
    (r"gpt-?3[ _-](\d+(?:\.\d+)?)b", r"GPT-3 \1B"),
    (r"qwen[ _-]?3[ _-](\d+)b[ _-]a(\d+)b", r"Qwen3-\1B-A\2B"),
    (r"mixtral[ _-]8x(\d+)b[ _-]g(\d)t(\d)", r"Mixtral-8x\1B-G\2T\3"),
    (r"mixtral[ _-]8x(\d+)b(?!.*g\dt\d)", r"Mixtral 8x\1B"),
    (r"nemotron[ _-]?([34])[ _-](\d+)b", r"Nemotron-\1 \2B"),
    (r"(?:meta[ _-])?llama[ _-]?([234](?:\.\d)?)[ _-](\d+)b", r"Llama-\1 \2B"),
)
#: beginning of the names of GPT-2, GPT-3 and models of their layers; GPT-OSS has none of these
GPT = r"GPT(?![ _-]?(?i:oss))"
#: beginning of the names of models whose every query has its own key and value, and whose MLP is four times as wide as they are
_PLAIN = rf"{GPT}|BLOOM|MPT|MT-NLG"
#: beginning of the names of models whose heads divide the hidden width, as config.json of each size says; Qwen3, Gemma-3, GPT-OSS,
#: Minitron and others set the width of a head apart
_WHOLE_HEADS = rf"{_PLAIN}|LLaMA-1 |Llama-[234](?:\.\d)?(?:[ -](?:Maverick|Scout))?[ -]\d+B|Nemotron-4 "
#: beginning of a model's name -> vocabulary of its usual tokenizer, as its software pads it
_VOCABULARIES = {
    GPT: 51200,  # 50,257 of GPT-2, padded by Megatron for eight tensor-parallel ranks
    r"LLaMA(?![ _-]?[2-9]\b)": 32000,
    "Llama-2": 32000,
    "Llama-3": 128256,
    "Llama-4": 202048,
    r"Qwen3(?!\.)": 151936,
    "DeepSeek-V3": 129280,
    "Mixtral-8x22B-G8T8": 32768,
    "MPT": 50368,
    "Nemotron-4": 256000,
    "Tencent Hunyuan 3": 120832,
}
#: whose repository a name is in; what begins with a digit is a size: ``Llama/13B``
_OWNER = r"^[\w.-]+/(?=[A-Za-z])"


def canonical(name: str) -> str:
    """Return the name of a model as rules and shipped models spell it: ``deepseek-ai/DeepSeek-V3`` is ``DeepSeek-V3``."""
    name = re.sub(_OWNER, "", name)
    for pattern, usual in _SPELLINGS:
        if re.match(pattern, name, re.IGNORECASE):
            return re.sub(rf"^{pattern}", usual, name, flags=re.IGNORECASE)
    return name


def usual_vocab(name: str) -> int | None:
    """Return the vocabulary of a model's usual tokenizer, None where its name tells none."""
    return next((size for start, size in _VOCABULARIES.items() if re.match(start, name)), None)


def plain(name: str) -> bool:
    """Return whether every query of a model has its own key and value and its MLP is four times as wide as it, by its name."""
    return re.match(_PLAIN, name) is not None


def whole_heads(name: str) -> bool:
    """Return whether a model's name tells that its heads are as wide as ``hidden / heads``."""
    return re.match(_WHOLE_HEADS, name) is not None


def named(row: Row) -> Row:
    """Return the row with the usual name of its model; another spelling is one of its assumptions."""
    printed = row.text("model")
    usual = canonical(printed)
    if usual == printed:
        return row
    row = row.replaced({"model": usual})
    row.assume(f"model printed as {printed}: {usual}")
    return row
