"""How the layers of a published row share out over its pipeline stages."""

from __future__ import annotations

import re
from itertools import accumulate

from simulator.errors import ProfileError
from simulator.scenario.model import Model
from simulator.validation.row import Row


def layout_of(row: Row, model: Model, chunks: int) -> str | None:
    """Return how the layers share out over the stages, None for evenly.

    A layout on the row wins. Megatron's recipes for models that do not divide count embedding and head as one layer
    each (Llama 405B, Qwen3-235B, BLOOM), or fill every stage and leave the rest to the last (DeepSeek-V3).
    """
    printed = re.search(r"pp_layout[= ]([^;\s]+)", row.text("overlap_notes"))
    if printed:
        return _checked_layout(expand_layout(printed.group(1)), model, chunks)
    if chunks == 1:
        return None
    if row.has("Aleph-Alpha", "source"):
        # ``pipe_partition_method`` of examples/transformer_example/config.yml @01b9d21, src/scaling/core/.../pipeline_partitioning.py
        row.assume("stages not printed: balanced by parameters, the first ones filled (example of Aleph-Alpha/scaling)")
        table, layer = model.vocab * model.hidden, 4 * model.hidden**2 + 3 * model.hidden * model.ffn
        held = _filled([table, *[layer] * model.layers, table], chunks)
        return "|".join(["E" + _t(held[0] - 1), *map(_t, held[1:-1]), _t(held[-1] - 1) + "L"])
    if model.layers % chunks == 0 and not model.mtp_layers:
        return None
    each = -(-model.layers // chunks)
    rest = model.layers - each * (chunks - 1)
    if row.has("dgxc-benchmarking", "source") and model.latent is not None and (model.layers + 3) % chunks == 0 and each > 2:
        # num_layers_in_first_pipeline_stage and _last_ of NVIDIA/NeMo scripts/performance/llm/pretrain_deepseek_v3.py @0349f23
        row.assume("stages not printed: a layer less in the first, two less and MTP and head in the last (NeMo's script)")
        return "|".join(["E" + _t(each - 1), *[_t(each)] * (chunks - 2), _t(each - 2) + "m" * model.mtp_layers + "L"])
    if model.latent is not None and rest <= 0 < rest + each:
        row.assume("stages not printed: the last with MTP and head alone, the first with what is left over (recipes of DeepSeek-V3 for 32)")
        first = model.layers - each * (chunks - 2)
        return "|".join(["E" + _t(first), *[_t(each)] * (chunks - 2), "m" * model.mtp_layers + "L"])
    if model.latent is not None and rest > 0:
        row.assume("stages not printed: filled in order, the last with the rest, MTP and head (recipes of DeepSeek-V3)")
        return "|".join(["E" + _t(each), *[_t(each)] * (chunks - 2), _t(rest) + "m" * model.mtp_layers + "L"])
    if (model.layers + 2) % chunks == 0 and not model.mtp_layers:
        row.assume("stages not printed: embedding and head count as one layer each")
        each = (model.layers + 2) // chunks
        return "|".join(["E" + _t(each - 1), *[_t(each)] * (chunks - 2), _t(each - 1) + "L"])
    row.assume("stages not printed: balanced by FLOP")
    return "balanced"


def _filled(weights: list[int], stages: int) -> list[int]:
    """Return how many in a row each stage takes so that the heaviest is lightest, each as many as that allows."""
    limit = max(max(weights), -(-sum(weights) // stages))
    while len(taken := _taken(weights, limit)) > stages:
        # the least that lets some stage take one more
        ends = list(accumulate(taken))
        limit = min(sum(weights[end - n : end + 1]) for n, end in zip(taken, ends, strict=True) if end < len(weights))
    return taken


def _taken(weights: list[int], limit: int) -> list[int]:
    """Return how many in a row each stage takes up to `limit`."""
    taken, held = [0], 0
    for weight in weights:
        if held + weight > limit:
            taken, held = [*taken, 0], 0
        taken[-1], held = taken[-1] + 1, held + weight
    return taken


def _t(layers: int) -> str:
    return f"t*{layers}" if layers > 1 else "t" * layers


def expand_layout(text: str) -> str:
    """Return a layout in Megatron's letters without brackets: ``Et*4|(tttt|)*2tmL`` is ``Et*4|t*4|t*4|tmL``."""
    text = re.sub(r"\(([^()]*)\)\*(\d+)", lambda m: m.group(1) * int(m.group(2)), text)
    text = re.sub(r"t\*(\d+)", lambda m: "t" * int(m.group(1)), text)
    return re.sub(r"tt+", lambda m: _t(len(m.group(0))), text)


def _checked_layout(layout: str, model: Model, chunks: int) -> str:
    letters = re.sub(r"t\*(\d+)", lambda m: "t" * int(m.group(1)), layout)
    found = {"layers": letters.count("t"), "MTP layers": letters.count("m"), "chunks": letters.count("|") + 1}
    if found != {"layers": model.layers, "MTP layers": model.mtp_layers, "chunks": chunks}:
        raise ProfileError("printed layout contradicts the model or the stages")
    return layout
