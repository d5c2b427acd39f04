"""From attention to class heat maps (Dataset Diffusion, sections on class-prompt attention and
self-attention exponentiation). Pure functions on tensors; :mod:`dd.attention.recorder`
feeds them.

Shape letters: B samples, H heads, N pixels (r*r), T text positions, D width of a head, K classes, P
powers.
"""

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TypeAlias

import torch
import torch.nn.functional as F

# few, larger kernels on a GPU; on a CPU as much as its cache holds
AT_ONCE = {"cuda": 2**26, "cpu": 2**22}
FUSED_ON = {"cuda"}
# products of these are exact in float32, so the kernels lose nothing
HALF = (torch.float16, torch.bfloat16)
WIDEST = 256  # the widest head whose tiles fit into a GPU's shared memory


def split_heads(x_BNC: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, H*D] -> [B, H, N, D]."""
    batch, length, width = x_BNC.shape
    return x_BNC.unflatten(2, (heads, width // heads)).transpose(1, 2)


def mean_attention(
    q_BHND: torch.Tensor,
    k_BHTD: torch.Tensor,
    scale: float,
    onto: torch.Tensor | None = None,
    weight: int = 1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``weight`` times the mean over heads of softmax(Q K^T * scale), float32 [B, N, T]; each row
    sums to ``weight``. With ``onto`` [B, N, T] it is added to that, and ``onto`` is returned.
    ``mask``: see :class:`dd.attention.observer.Attended`.

    Uses :mod:`dd.attention.fused` in half precision on a GPU if Triton works and there is no mask,
    else :func:`mean_attention_by_heads`.
    """
    device, width = q_BHND.device, q_BHND.shape[3]
    made_for = device.type in FUSED_ON and q_BHND.dtype in HALF and width <= WIDEST
    if made_for and mask is None and (fused := _fused(device, q_BHND.dtype, width)) is not None:
        sizes = q_BHND.shape[0], q_BHND.shape[2], k_BHTD.shape[2]
        out = torch.empty(sizes, dtype=torch.float32, device=device) if onto is None else onto
        fused.mean_attention(q_BHND, k_BHTD, scale, out, onto is not None, weight)
        return out
    total = mean_attention_by_heads(q_BHND, k_BHTD, scale, mask)
    total = total if weight == 1 else total.mul_(weight)
    return total if onto is None else onto.add_(total)


def mean_attention_by_heads(
    q_BHND: torch.Tensor,
    k_BHTD: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    weights_BHN: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`mean_attention`, with as many heads at a time as fit into ``AT_ONCE`` bytes (at least
    one), so that a large head dimension is never held whole. ``weights_BHN``: weights of the heads
    at each pixel, instead of their mean (:func:`dd.attention.weights.head_weights`)."""
    batch, heads, pixels, _ = q_BHND.shape
    each = 4 * batch * pixels * k_BHTD.shape[2]
    count = max(1, AT_ONCE.get(q_BHND.device.type, AT_ONCE["cuda"]) // each)
    bias = additive(mask)

    def summed(first: int) -> torch.Tensor:
        q, k = (x[:, first : first + count].float() for x in (q_BHND, k_BHTD))
        logits = torch.matmul(q * scale, k.transpose(2, 3))
        if bias is not None:
            logits += bias[:, first : first + count] if bias.shape[1] > 1 else bias
        probs = logits.softmax(-1)
        if weights_BHN is not None:
            probs *= weights_BHN[:, first : first + count, :, None]
        return probs.sum(1) if probs.shape[1] > 1 else probs[:, 0]

    total = summed(0)
    for first in range(count, heads, count):
        total.add_(summed(first))
    return total.div_(heads) if weights_BHN is None else total


@cache
def _fused(device: torch.device, dtype: torch.dtype, width: int) -> ModuleType | None:
    """:mod:`dd.attention.fused`, or None (with one warning) where its kernels do not run; tried
    with heads of this kind."""
    try:
        from dd.attention import fused

        for length in (77, 256):
            q, k = (torch.zeros(1, 1, n, width, dtype=dtype, device=device) for n in (16, length))
            for add in (False, True):
                fused.mean_attention(q, k, 1.0, torch.zeros(1, 16, length, device=device), add)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # no Triton, no C compiler, a GPU that is too old: each has its own message
        said = " ".join(str(error).split())[:300]
        warnings.warn(
            "attention is read without the fused kernel, which does not run here for heads of "
            f"{width} in {dtype} ({type(error).__name__}: {said}). Results are the same; large "
            "batches take longer to read. The kernel needs the package triton and a C compiler",
            stacklevel=2,
        )
        return None
    return fused


def additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of attention as float32 to add to its logits; in a boolean mask, True is kept."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def mean_columns(
    q_BHND: torch.Tensor,
    k_BHTD: torch.Tensor,
    columns_BTK: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    weights_BHN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over heads (or their sum with ``weights_BHN``) of softmax(Q K^T * scale) V for thin V,
    float32 [B, N, K], by torch's fused attention in float32: no [N, T] matrix is held.

    If V has 1/n on each of the n tokens of a class, this is the mean attention to the class. If the
    columns of V are maps, it is one application of the attention to them.
    """
    q, k, v = q_BHND.float(), k_BHTD.float(), columns_BTK.float()[:, None]
    number = v.shape[3]
    v = F.pad(v, (0, -number % q.shape[3]))  # fused kernels need values as wide as a head
    bias, width, found = additive(mask), q.shape[3], []
    for first in range(0, v.shape[3], width):
        values = v[..., first : first + width].expand(-1, q.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=bias, scale=scale)
        weighed = out.mean(1) if weights_BHN is None else (out * weights_BHN[..., None]).sum(1)
        found.append(weighed)
    return torch.cat(found, 2)[..., :number]


def joint_means(
    q_BHND: torch.Tensor,
    k_BHTD: torch.Tensor,
    image: slice,
    columns_BTK: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over heads of joint attention, whose keys are the pixels (``image``) and the words, in
    float32: the softmax over the pixels' keys alone [B, N, N], and :func:`mean_columns` of the
    softmax over all keys [B, N, K]. Both come from the same exponentials, some heads at a time as
    in :func:`mean_attention_by_heads`."""
    batch, heads, pixels, _ = q_BHND.shape
    each = 4 * batch * pixels * k_BHTD.shape[2]
    count = max(1, AT_ONCE.get(q_BHND.device.type, AT_ONCE["cuda"]) // each)
    bias, columns = additive(mask), columns_BTK.float()[:, None]
    own = words = None
    for first in range(0, heads, count):
        q, k = (x[:, first : first + count].float() for x in (q_BHND, k_BHTD))
        logits = torch.matmul(q * scale, k.transpose(2, 3))
        if bias is not None:
            logits += bias[:, first : first + count] if bias.shape[1] > 1 else bias
        powers = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        to_words = (powers @ columns).div_(powers.sum(-1, keepdim=True)).sum(1)
        among = powers[..., image]
        sums = among.sum(-1, keepdim=True)
        if bool((sums < 1e-30).any()):  # words outweigh pixels by e**69
            among = torch.matmul(q * scale, k[:, :, image].transpose(2, 3))
            if bias is not None:
                own_bias = bias[..., image]
                among += own_bias[:, first : first + count] if bias.shape[1] > 1 else own_bias
            among = among.softmax(-1)
        else:
            among = among.div_(sums)
        own = among.sum(1) if own is None else own.add_(among.sum(1) if count > 1 else among[:, 0])
        words = to_words if words is None else words.add_(to_words)
    if own is None or words is None:
        raise ValueError("attention without a head")
    return own.div_(heads), words.div_(heads)


def indicators(spans: list[list[list[int]]], length: int, first: int = 0) -> torch.Tensor:
    """V of :func:`mean_columns` for the tokens of each class of each sample: [B, ``length``, K],
    1/n at ``first`` + position; zero columns where a sample has fewer classes than another."""
    columns = torch.zeros(len(spans), length, max(map(len, spans)))
    for i, classes in enumerate(spans):
        for k, positions in enumerate(classes):
            columns[i, [first + p for p in positions], k] = 1 / len(positions)
    return columns


def pool(attention_BNN: torch.Tensor, factor: int) -> torch.Tensor:
    """Image-image attention of side r, reduced to side r / ``factor``: the mean over the pixels of
    a patch of what they give to all pixels of another patch. Rows still sum to 1."""
    if factor == 1:
        return attention_BNN
    side = round(attention_BNN.shape[1] ** 0.5)
    small = side // factor
    patches = attention_BNN.unflatten(2, (small, factor, small, factor)).sum((3, 5))
    patches = patches.unflatten(1, (small, factor, small, factor)).mean((2, 4))
    return patches.flatten(3, 4).flatten(1, 2)


def enlarge(maps_KN: torch.Tensor, factor: int) -> torch.Tensor:
    """Square maps [K, r*r], with each pixel enlarged to a patch of ``factor`` x ``factor``."""
    side = round(maps_KN.shape[1] ** 0.5)
    grid = maps_KN.unflatten(1, (side, side))
    return grid.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1)


def shrink(maps_KN: torch.Tensor, factor: int) -> torch.Tensor:
    """Square maps [K, r*r] averaged over patches of ``factor`` x ``factor`` pixels."""
    small = round(maps_KN.shape[1] ** 0.5) // factor
    return maps_KN.unflatten(1, (small, factor, small, factor)).mean((2, 4)).flatten(1)


def class_maps(cross_NT: torch.Tensor, spans: list[list[int]]) -> torch.Tensor:
    """One map per class = mean over the tokens of its words: [N, T], K lists of positions -> [K,
    N]."""
    return torch.stack([cross_NT[:, positions].mean(1) for positions in spans])


def resize_maps(maps_KN: torch.Tensor, resolution: int) -> torch.Tensor:
    """Bicubic resize of square maps [K, r*r] to [K, resolution**2]."""
    side = int(maps_KN.shape[1] ** 0.5)
    if side == resolution:
        return maps_KN
    grid, size = maps_KN.view(1, -1, side, side), (resolution, resolution)
    return F.interpolate(grid, size=size, mode="bicubic", align_corners=False).flatten(2)[0]


Spread: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # maps [K, N] -> A_S applied to each


def exponentiate(
    self_NN: torch.Tensor | Spread, maps_KN: torch.Tensor, max_power: int
) -> torch.Tensor:
    """(A_S)^k A_C for k = 0 ... max_power as float64 [K, P, N] on the CPU: k products with thin
    matrices, never a matrix power. A_S is a matrix, or a function that applies it to maps.

    Each row of A_S sums to 1, so a constant passes through it unchanged. The mean of each map is
    therefore split off and only the rest is multiplied. The contrast of a map may be a thousandth
    of its level; multiplying the whole map would lose these three digits to rounding.
    """
    mean_K1 = maps_KN.mean(1, keepdim=True)
    means, rests = [mean_K1], [maps_KN - mean_K1]
    for _ in range(max_power):
        last = rests[-1]
        rest_KN = (self_NN @ last.T).T if isinstance(self_NN, torch.Tensor) else self_NN(last)
        drift_K1 = rest_KN.mean(1, keepdim=True)
        means.append(means[-1] + drift_K1)
        rests.append(rest_KN - drift_K1)
    return torch.stack(rests, 1).cpu().double() + torch.stack(means, 1).cpu().double()


def refine(
    maps_KN: torch.Tensor, self_NN: torch.Tensor | Spread, side: int, max_power: int
) -> torch.Tensor:
    """Refined heat of the class maps of one sample at the self-attention's resolution r = ``side``:
    float64 [K, P, r, r]."""
    spread = exponentiate(self_NN, resize_maps(maps_KN, side), max_power)
    return spread.unflatten(-1, (side, side))
