"""The kernels of a step, forward and backward, as plain functions of tensors: what is measured is what the step runs.

Shapes: T tokens, h width, f MLP width, E local experts, R rows routed to them, V vocabulary, a heads, d head width.
Every function works on CPU and CUDA and in any floating dtype; sums that need it are kept in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name

Tensor = torch.Tensor
Reduce = Callable[[Tensor], Tensor]
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- linear layers: weights are (out, in), main gradients fp32 of the same shape ---


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T``."""
    return x @ weight.t()


def linear_input(g: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the input, ``g W``."""
    return g @ weight


def linear_weight(g: Tensor, x: Tensor, main: Tensor) -> None:
    """Add ``g^T x`` to the main gradient."""
    if x.dtype == main.dtype:
        torch.addmm(main, g.t(), x, out=main)
    else:
        main.add_(g.t() @ x)


def _slices(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Return the rows of every expert that has any."""
    found, begin = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(begin, begin + count)))
        begin += count
    return found


def _fused(x: Tensor) -> bool:
    """Whether one kernel does all experts; on a CPU they are computed one after the other."""
    return x.is_cuda and x.dtype == torch.bfloat16


def ends(counts: Sequence[int], device: torch.device) -> Tensor | None:
    """Return where the rows of each expert end, as one kernel for all experts takes it; None on a CPU.

    From pinned memory, so that the host goes on launching: an ordinary copy waits until the device has done everything.
    """
    if device.type != "cuda":
        return None
    return torch.tensor(counts, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True).cumsum(0, dtype=torch.int32)


def grouped(x: Tensor, weight: Tensor, counts: Sequence[int], last: Tensor | None = None) -> Tensor:
    """Return ``x_e W_e^T`` for the rows of every expert; `weight` is (E, out, in), `counts` the rows of each, `last` their `ends`."""
    if _fused(x):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=last)
    out = x.new_empty((x.shape[0], weight.shape[1]))
    for e, rows in _slices(counts):
        torch.mm(x[rows], weight[e].t(), out=out[rows])
    return out


def grouped_input(g: Tensor, weight: Tensor, counts: Sequence[int], last: Tensor | None = None) -> Tensor:
    """Return the gradient of the rows, ``g_e W_e``."""
    if _fused(g):
        return F.grouped_mm(g, weight, offs=last)
    out = g.new_empty((g.shape[0], weight.shape[2]))
    for e, rows in _slices(counts):
        torch.mm(g[rows], weight[e], out=out[rows])
    return out


def grouped_weight(g: Tensor, x: Tensor, main: Tensor, counts: Sequence[int], last: Tensor | None = None) -> None:
    """Add ``g_e^T x_e`` to the main gradients (E, out, in)."""
    if _fused(g):
        main.add_(F.grouped_mm(g.t(), x, offs=last))
        return
    for e, rows in _slices(counts):
        linear_weight(g[rows], x[rows], main[e])


# --- attention: (batch, heads, sequence, width) ---


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention by the library's fused kernel; narrow values are padded to the keys' width, which it needs on a CPU."""
    width = v.shape[-1]
    if width != q.shape[-1] and not q.is_cuda:
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])[..., :width]


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention as two products with the scores in memory: the oracle of the fused kernel."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype) @ v


def grouped_query(qkv: Tensor, shape: tuple[int, int, int, int], heads: int, core: Core = attention) -> Tensor:
    """Return attention as rows (T, heads d) of projected rows; `shape` is (batch, sequence, heads + 2 kv heads, d)."""
    kv = (shape[2] - heads) // 2
    q, k, v = qkv.view(shape).transpose(1, 2).split([heads, kv, kv], dim=1)
    return core(q, k, v).transpose(1, 2).reshape(shape[0] * shape[1], -1)


def latent(
    q: Tensor, kv: Tensor, rope: Tensor, shape: tuple[int, int, int], widths: tuple[int, int], core: Core = attention
) -> Tensor:  # fmt: skip
    """Return latent attention as rows; `shape` is (batch, sequence, heads), `widths` those of keys without position and values."""
    q, kv = (x.view(*shape, -1) for x in (q, kv))
    k, v = kv.split(list(widths), dim=-1)
    k = torch.cat([k, rope.view(shape[0], shape[1], 1, -1).expand(-1, -1, shape[2], -1)], dim=-1)
    return core(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).reshape(shape[0] * shape[1], -1)


# --- bandwidth-bound kernels ---


def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return RMSNorm of the rows and the reciprocal of their root mean square."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_() / x.shape[-1]
    scale = (square + 1e-6).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


def norm_backward(g: Tensor, x: Tensor, scale: Tensor, weight: Tensor, main: Tensor) -> Tensor:
    """Return the gradient of the rows; add the weight's to `main`."""
    unit = x * scale
    main.add_((g * unit).sum(0))
    scaled = g * weight.float()
    along = (scaled * unit).mean(-1, keepdim=True)
    return scaled.sub_(unit.mul_(along)).mul_(scale).to(x.dtype)


def rotary_table(sequence: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position and frequency, (sequence, 1, width / 2)."""
    frequency = 1e4 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = torch.arange(sequence, device=device)[:, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate_(x: Tensor, table: tuple[Tensor, Tensor], back: bool = False) -> Tensor:
    """Rotate (batch, sequence, heads, width) by its positions in place, or back; return it."""
    cos, sin = table
    one, two = x.chunk(2, dim=-1)
    turned, other = one * cos, two * cos
    other.addcmul_(one, sin, value=-1 if back else 1)
    one.copy_(turned.addcmul_(two, sin, value=1 if back else -1))
    two.copy_(other)
    return x


def swiglu(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``silu(gate) * up`` of (rows, 2f), each row times its routing `weight` if given."""
    gate, up = x.chunk(2, dim=-1)
    out = F.silu(gate).mul_(up)
    return out if weight is None else out.mul_(weight[:, None].to(x.dtype))


def swiglu_backward(g: Tensor, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of (rows, 2f) and of the routing weights."""
    gate, up = x.chunk(2, dim=-1)
    act, out, of_weight = F.silu(gate), torch.empty_like(x), None
    into_gate, into_up = out.chunk(2, dim=-1)
    if weight is not None:
        torch.mul(g, act, out=into_up)
        of_weight = (into_up * up).sum(-1, dtype=torch.float32)
        g = g * weight[:, None].to(x.dtype)
    torch.mul(g, act, out=into_up)
    into_gate.copy_(torch.ops.aten.silu_backward(g * up, gate))
    return out, of_weight


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` of `x`: permute forward, unpermute backward."""
    return x.index_select(0, index)


def sum_copies(x: Tensor, places: Tensor) -> Tensor:
    """Return, for every token, the sum of its copies, which lie at `places` (T, k); a place beyond the end is a dropped copy.

    Unpermute forward, permute backward.
    """
    tokens, copies = places.shape
    if x.shape[0] < tokens * copies:
        x = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return x.index_select(0, places.reshape(-1)).view(tokens, copies, -1).sum(1)


def embed(tokens: Tensor, weight: Tensor, begin: int | None = None) -> Tensor:
    """Return the rows of the tokens; `weight` holds the whole vocabulary, or that from `begin` on and others give zeros."""
    if begin is None:
        return weight.index_select(0, tokens)
    mine = (tokens >= begin) & (tokens < begin + weight.shape[0])
    return weight.index_select(0, torch.where(mine, tokens - begin, 0)).mul_(mine[:, None])


def embed_backward(g: Tensor, tokens: Tensor, main: Tensor, begin: int | None = None) -> None:
    """Add the rows of `g` to the main gradient of their tokens."""
    if begin is None:
        main.index_add_(0, tokens, g.float())
        return
    mine = (tokens >= begin) & (tokens < begin + main.shape[0])
    main.index_add_(0, torch.where(mine, tokens - begin, 0), g.float() * mine[:, None])


def loss(
    logits: Tensor, targets: Tensor, begin: int = 0, largest: Reduce = lambda x: x, summed: Reduce = lambda x: x
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the cross-entropy of every token and the fp32 probabilities.

    `logits` are the columns of the vocabulary from `begin` on; `largest` and `summed` reduce a value per token over the ranks
    that hold the others.
    """
    scores = logits.float()
    scores -= largest(scores.amax(-1))[:, None]
    mine = (targets >= begin) & (targets < begin + logits.shape[1])
    chosen = scores.gather(1, torch.where(mine, targets - begin, 0)[:, None])[:, 0] * mine
    scores.exp_()
    total, chosen = summed(torch.stack([scores.sum(-1), chosen]))
    scores /= total[:, None]
    return total.log() - chosen, scores


def loss_backward(probabilities: Tensor, targets: Tensor, scale: Tensor, dtype: torch.dtype, begin: int = 0) -> Tensor:
    """Return the gradient of the logits when every token's loss counts `scale`; `probabilities` are used up."""
    mine = (targets >= begin) & (targets < begin + probabilities.shape[1])
    probabilities.scatter_add_(1, torch.where(mine, targets - begin, 0)[:, None], -mine[:, None].float())
    return probabilities.mul_(scale).to(dtype)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum: a residual connection forward, its fork backward."""
    return x + y


def route(logits: Tensor, bias: Tensor, top_k: int, scoring: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (T, k) and experts (T, k) of every token, and the scores (T, E) for the auxiliary loss.

    Notes
    -----
    ``softmax``: weights are the probabilities of the chosen experts, scaled to one. ``sigmoid``: likewise of the sigmoids
    (DeepSeek-V3). `bias` moves the choice and not the weights (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024).
    """
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    experts = (scores.detach() + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20), experts, scores


def order(experts: Tensor, count: int, most: int | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return where each copy goes (T, k), the copy in every row, the rows of each expert before dropping, and the copies dropped.

    Rows are sorted by expert; an expert keeps its first `most` copies. A dropped copy goes to the place after the last.
    """
    flat = experts.reshape(-1)
    rows = torch.argsort(flat, stable=True)
    counts = flat.new_zeros(count).scatter_add_(0, flat, torch.ones_like(flat))  # bincount makes a GPU's host wait for the largest
    places = torch.empty_like(rows)
    if most is None:
        places[rows] = torch.arange(len(rows), device=rows.device)
        return places.view(experts.shape), rows, counts, 0
    kept = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[flat[rows]] < most
    places[rows] = torch.where(kept, kept.cumsum(0) - 1, kept.sum())
    rows = rows[kept]
    return places.view(experts.shape), rows, counts, flat.numel() - len(rows)


# --- the optimizer ---


def adamw(
    master: Tensor, first: Tensor, second: Tensor, gradient: Tensor, parameter: Tensor, step: int, lr: float, decay: float = 0.0
) -> None:  # fmt: skip
    """Update master weights and moments by one step of AdamW, and round them into `parameter`; betas 0.9 and 0.95."""
    count = torch.full((), float(step), device=master.device)
    torch._fused_adamw_(
        [master], [gradient], [first], [second], [], [count],
        lr=lr, beta1=0.9, beta2=0.95, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip
    if parameter.data_ptr() != master.data_ptr():
        parameter.copy_(master)
