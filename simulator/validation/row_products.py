"""The datatype of a row's matrix products, in the words of its precision."""

from __future__ import annotations

import re

from simulator.scenario.plan import Dtype
from simulator.validation.row import Row

#: words for Adam's moments in bf16
BF16_MOMENTS = "bf16 moments|moments bf16"
#: words that tell what the optimizer keeps, and nothing about products
_OPTIMIZER = r"\badam|optimi[sz]er|moment|master|states?\b"
#: where one clause ends; also before a width that is the optimizer's: ``fp8 4-bit Adam``
_CLAUSES = rf"[;,+()]| with | and |\s(?=\S*\d\S*(?:[ -]bits?)? (?:{_OPTIMIZER}))"
#: words for a datatype of products; ``64-bit`` is none of 4 bits
_WORDS: dict[Dtype, str] = {"fp4": r"fp4|(?<![\d-])4.?bit|w4a4|e2m1", "fp8": r"fp8|float8|e4m3|w8a8|(?<![\d-])8.?bit"}


def products_of(row: Row) -> Dtype:
    """Return the datatype of a row's matrix products: ``bf16; 4-bit Adam`` multiplies in bf16, ``8-bit`` in fp8."""
    printed = row.default("precision", "bf16", row.text("precision")).lower()
    clauses = [clause.strip() for clause in re.split(_CLAUSES, printed)]
    aside = [clause for clause in clauses if re.search(_OPTIMIZER, clause)]
    for clause in aside:
        if not re.search(rf"fp32|float32|32.?bit|{BF16_MOMENTS}", clause):
            row.assume(f"not modelled: '{clause}' (states of the optimizer as without it)")
    words = " ".join(clause for clause in clauses if clause not in aside)
    found = next((dtype for dtype, pattern in _WORDS.items() if re.search(pattern, words)), None)
    if found:
        return found
    if "fp16" in words and "bf16" not in words:
        return "fp16"
    if not re.search("bf16|bfloat16|fp16", words):
        row.assume(f"not modelled: products in '{printed}' (taken as bf16)")
    return "bf16"
