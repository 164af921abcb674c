"""What a published row computes again in its backward, from the words of sources and users."""

from __future__ import annotations

import re
from typing import get_args

from simulator.scenario.model import Model
from simulator.scenario.plan import EVERY_OTHER_PRODUCT, Module
from simulator.validation.row import Row
from simulator.validation.row_kernels import TRACED

#: modules, whether whole layers are, and the share of the layers
Recompute = tuple[str, tuple[Module, ...], float]
_NONE: Recompute = ("none", ("core_attn",), 1.0)
#: other words for modules
_WORDS: dict[str, Module] = {"rmsnorm": "layernorm", "norm": "layernorm", "attention": "core_attn", "mla_up": "mla_up_proj"}
#: how people write that nothing, or every layer, is computed again
_OFF = r"(?:none|no|false|off|disabled|n/a|-)"
_ON = r"(?:yes|true|on|uniform|every[ _]layer|(?:activation|gradient) (?:checkpointing|recomput\w*)|remat)"


def recompute_of(row: Row, model: Model) -> Recompute:
    """Return what a published row computes again, the modules that are, and the share of the layers."""
    printed = row.default("recompute", "none", row.text("recompute"))
    if row.has(TRACED, "source"):
        # the configurations say use_checkpoint; with recompute their products would need 99 % of the peak
        row.assume("no recompute: stages take as long per layer as the last one, which never recomputes in this source's own model")
        return _NONE
    if re.fullmatch(_OFF, printed, re.IGNORECASE):
        return _NONE
    if "default:" in printed and row.has("full_iteration", "overlap_notes"):
        # NVIDIA-NeMo/Megatron-Bridge pull request 3983: recompute_modules=[], which sets granularity but leaves nothing to do again
        row.assume("recompute: none, which the recipe with a full-iteration CUDA graph lists")
        return _NONE
    share = _share(row, model, printed)
    if share is not None:
        return ("full", ("core_attn",), share) if share else _NONE
    if re.fullmatch(_ON, printed, re.IGNORECASE):
        row.assume(f"recompute '{printed}': whole layers, all of them")
        return "full", ("core_attn",), 1.0
    modules = _modules(row, printed)
    if modules:
        return "selective", modules, 1.0
    if "per-op SAC" in printed or (printed == "selective" and row.has("torchtitan", "source")):
        # of each layer's products it keeps the first, third, fifth ...: q, v, gate and down; and attention and what is reduce-scattered
        # what selective means in its train_configs: selective_ac_option = 'op' (torchtitan/models/llama3/train_configs/llama3_8b.toml)
        row.assume("recompute of every other product: output projection, one of gate and up, and all that is no product (torchtitan)")
        return "selective", EVERY_OTHER_PRODUCT, 1.0
    if printed == "selective":
        row.assume("recompute of core_attn: what selective means where Megatron's modules are not listed")
        return "selective", ("core_attn",), 1.0
    row.assume(f"not modelled: recompute '{printed}' (taken as norms only)")
    return "selective", ("layernorm",), 1.0


def _modules(row: Row, printed: str) -> tuple[Module, ...]:
    """Return the modules that a cell lists, in brackets or bare; what else it lists is not modelled."""
    listed = re.search(r"\((?:default:)?([^)]*)\)", printed)
    text = listed.group(1) if listed else re.sub(r"^selective\W*", "", printed)
    words = [word.strip() for word in re.split("[,;+]", text)]
    found = [_WORDS.get(word.lower(), word) for word in words]
    modules = tuple(word for word in found if word in get_args(Module))
    for word in found:
        if modules and word not in modules:
            row.assume(f"not modelled: recompute of {word}")
    return modules


def _share(row: Row, model: Model, printed: str) -> float | None:
    """Return the share of the layers of which all is computed again, None where the row says something else.

    Notes
    -----
    Where a source prints hardware and model utilisation and no fraction: a third of the FLOP of a step are forward, so they differ
    by a third of what is computed again, ``share = 3 (HFU / MFU - 1)``.
    """
    utilisation = [re.search(rf"\b{name}=(\d*\.?\d+)", row.text("other_metrics")) for name in ("mfu", "hfu")]
    if all(utilisation) and "fraction not stated" in printed:
        mfu, hfu = (float(found.group(1)) for found in utilisation if found)
        share = min(1.0, max(0.0, 3 * (hfu / mfu - 1)))
        row.assume(f"recompute of {100 * share:.0f} % of the layers: a third of it is how far hardware utilisation exceeds the model's")
        return share
    if "every 2nd layer" in printed:
        return 0.5
    part = re.fullmatch(r"(\d+)\s*/\s*(\d+)|(\d+)\s*%", printed)
    if part:
        above, below, percent = part.groups()
        return min(1.0, int(percent) / 100 if percent else int(above) / max(int(below), 1))
    block = re.match(r"full\W*block\D*(\d+)", printed)
    if block:
        return min(1.0, int(block.group(1)) * row.need("pp") * (row.whole("vpp") or 1) / model.layers)
    return 1.0 if printed.startswith("full") else None
