"""The mean attention over heads as two Triton kernels, for half precision on a GPU: the logits
never leave the chip.

The first kernel finds the logarithm of each row's sum of exponentials, head by head (the online
softmax of FlashAttention, Dao et al. 2022, without its product with the values). The second
computes a tile of the logits again for each head and adds the normalised exponentials, so that only
the mean [B, N, T] is written. The keys of a prompt need only the second. Shape letters as in
:mod:`dd.attention.maths`. Triton reads annotations: ``int`` would make a size 32 bits wide, while
``tl.tensor`` takes the width from the value.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
WHOLE = 128  # most columns that one tile holds: enough for the keys of a prompt


@triton.jit
def _log_sums(
    q: tl.tensor,
    k: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    pixels: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_t: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """out [B, H, N] = log2 sum_T 2**(factor * q k^T)"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    d = tl.arange(0, WIDTH)
    q_at = q + sample * q_b + head * q_h + rows[:, None] * q_n + d[None, :]
    query = tl.load(q_at, mask=(rows[:, None] < pixels) & (d[None, :] < width), other=0.0)
    k_at = k + sample * k_b + head * k_h + d[:, None]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, length, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        key = tl.load(
            k_at + columns[None, :] * k_t,
            mask=(columns[None, :] < length) & (d[:, None] < width),
            other=0.0,
        )
        logits = tl.where(columns[None, :] < length, tl.dot(query, key) * factor, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        highest = higher
    tl.store(
        out + tl.program_id(1).to(tl.int64) * pixels + rows,
        highest + tl.log2(total),
        mask=rows < pixels,
    )


@triton.jit
def _mean(
    q: tl.tensor,
    k: tl.tensor,
    log_sums: tl.tensor,
    out: tl.tensor,
    share: tl.tensor,
    heads: tl.tensor,
    pixels: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    factor: tl.tensor,
    q_b: tl.tensor,
    q_h: tl.tensor,
    q_n: tl.tensor,
    k_b: tl.tensor,
    k_h: tl.tensor,
    k_t: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """out [B, N, T] = (out if ADD) + share * sum_H 2**(factor * q k^T - log_sums); with WHOLE one
    tile holds all columns"""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sample = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, WIDTH)
    q_at = q + sample * q_b + rows[:, None] * q_n + d[None, :]
    k_at = k + sample * k_b + columns[None, :] * k_t + d[:, None]
    q_inside = (rows[:, None] < pixels) & (d[None, :] < width)
    k_inside = (columns[None, :] < length) & (d[:, None] < width)
    sums_at = log_sums + sample * heads * pixels + rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for head in range(heads):
        query = tl.load(q_at + head * q_h, mask=q_inside, other=0.0)
        key = tl.load(k_at + head * k_h, mask=k_inside, other=0.0)
        logits = tl.dot(query, key) * factor
        if WHOLE:
            logits = tl.where(columns[None, :] < length, logits, float("-inf"))
            powers = tl.exp2(logits - tl.max(logits, 1)[:, None])
            total += powers / tl.sum(powers, 1)[:, None]
        else:
            log_sum = tl.load(sums_at + head * pixels, mask=rows < pixels, other=0.0)
            total += tl.exp2(logits - log_sum[:, None])
    total = total * share
    at = out + sample * pixels * length + rows[:, None].to(tl.int64) * length + columns[None, :]
    inside = (rows[:, None] < pixels) & (columns[None, :] < length)
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total, mask=inside)


def mean_attention(
    q_BHND: torch.Tensor,
    k_BHTD: torch.Tensor,
    scale: float,
    out_BNT: torch.Tensor,
    add: bool,
    weight: int = 1,
) -> None:
    """Write ``weight`` times the mean over heads of softmax(Q K^T * scale) to ``out_BNT``
    (float32, contiguous), or add it to its content."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BHND, k_BHTD))
    (batch, heads, pixels, width), length = q.shape, k.shape[2]
    sizes = (heads, pixels, length, width, scale * LOG2_E, *q.stride()[:3], *k.stride()[:3])
    padded, whole = max(16, triton.next_power_of_2(width)), length <= WHOLE
    rows, columns, how = _tile(padded, length)
    log_sums = out_BNT  # a placeholder: not read if a tile holds a whole row
    with torch.cuda.device_of(q):
        if not whole:
            log_sums = torch.empty(batch, heads, pixels, dtype=torch.float32, device=q.device)
            tiles = (triton.cdiv(pixels, rows), batch * heads)
            _log_sums[tiles](
                q, k, log_sums, *sizes, ROWS=rows, COLUMNS=columns, WIDTH=padded, **how
            )
        grid = (triton.cdiv(length, columns), triton.cdiv(pixels, rows), batch)
        tile = {"ROWS": rows, "COLUMNS": columns, "WIDTH": padded, "WHOLE": whole, **how}
        _mean[grid](q, k, log_sums, out_BNT, weight / heads, *sizes, ADD=add, **tile)


def _tile(width: int, length: int) -> tuple[int, int, dict[str, int]]:
    """Rows and columns of a tile and the launch's options, within the 99 KiB of shared memory of
    any GPU since Ampere."""
    if length <= WHOLE:
        columns = max(16, triton.next_power_of_2(length))
        return 32 if width > 128 else 64, columns, {"num_warps": 4, "num_stages": 1}
    return 64, 64, {"num_warps": 4, "num_stages": 3 if width <= 64 else 2 if width <= 128 else 1}
