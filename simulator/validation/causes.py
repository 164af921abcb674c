"""Why published rows are off, as far as that is known: read by the page of accuracy, never by a prediction."""

from __future__ import annotations

import re

#: pattern of the row's id -> what the prediction lacks, or what is odd about the measurement
_CAUSES = {
    r"^sc21-t2-zero-3": "DeepSpeed's ZeRO-3 of 2021: gathers matrix by matrix, still priced at the bandwidth of a ring, which they miss",
    r"^mbridge-26\.02-qwen3_30b-h100": "overlapped pairs on twelve virtual stages without CUDA graphs, twice as slow as the next recipe, "
    "which gave both up (NVIDIA-NeMo/Megatron-Bridge pull request 2477); for Qwen3-235B its authors name the host (pull request 1760)",
    r"^mbridge-26\.02-gptoss120b-b300": "all-to-alls between hosts as slow as those of B200, whose adapters have half the rate",
    r"^mbridge-26\.06\.01-gptoss": "a known regression of that release",
    r"^dgxc-v25\.05\.05-dsv3-gb200": "an early port to GB200, scores in memory: later releases run the same model three times as fast",
    r"^mlm-recipe-qwen3_235b-h100": "measured again at 302 instead of 214 TFLOP/s: NVIDIA/Megatron-LM pull request 5728",
    r"^vtrain-s-": "no measured step: the sum of one trace's kernels and gaps, in which the host launched at a speed of its own",
    r"^mpt-.*h100": "Triton's FlashAttention of early 2023, written for the A100, on an H100",
}


def cause(row: str) -> str:
    """Return the known cause for a row, or that there is none."""
    return next((text for pattern, text in _CAUSES.items() if re.search(pattern, row)), "not found")
