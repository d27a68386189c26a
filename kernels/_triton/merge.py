"""Merging what tiles leave: batch norm's statistics, and its gradient's sums. In a launch of their own over partials
that lie there, or by the last programs of the GEMM that made them.

Statistics come as (count, mean, M2) of each tile, M2 = Σ(y − mean)², and are merged by Chan, Golub and LeVeque's
formula (1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1), in tile order:
E[y²] − mean² would cancel, and turns negative.

Within a GEMM it takes two rounds (`merge`): of every `TOGETHER` tiles the last program to finish merges their partials,
while others still multiply; of these the last one merges what the rounds left, a sixteenth as much, and settles the
batch norm. That saves a launch, and the end of the GEMM waits for a few kilobytes out of L2. Which program is last is
left to chance; what it does, and in which order, is not: the same bits each run.

An example: 2 groups (real | fake) of 256 tiles each, 256 channels in tiles of 128 columns. Each column tile has rounds
of its own, and merges its own channels.

                       tensor                                    written by
    tiles              values (2, 2, 256, 256), counts (2, 256)  each of the GEMM's 2·256·2 programs
    first round        rounds (2, 2, 16, 256),                   the last of every 16 programs: 2·(2·16) of them, each
                       round_counts (2, 16)                      reading 16 rows of `values` for its 128 channels
    second round       merged (4, 2, 256), the state             the last of each column tile's 2·16: 2 programs, each
                       (or (2, 2, 256), a gradient's means)      reading 16 rows of `rounds` for either group

`tickets` has column tiles · (1 + groups · rounds of a group) counters, here 2·(1 + 2·16) = 66: first the second
round's, one per column tile, then the first's, one per column tile, group and round. All are zero again afterwards.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import cdiv
from kernels._triton.ticket import last_program
from kernels.arguments import check_merge, tickets
from kernels.geometry import Epilogue

TOGETHER = 16
"""Tiles that a program merges in the first round. It loads them as one block, `TOGETHER` rows of `WIDTH` channels; in
csrc/conv_merge.h, which takes 32, each thread adds the rows of its channel one after another."""
WIDTH = 64
"""Channels merged at a time, so that a round needs few registers beside the GEMM's."""


@triton.jit
def merged_statistics(values, counts, first, tiles, plane, c, inside, C: tl.constexpr, BT: tl.constexpr):
    """Count, mean and M2 of channels c, over `tiles` rows of partials from row `first` on, BT at a time."""
    BC: tl.constexpr = c.shape[0]
    count = tl.zeros((1,), tl.float32)
    mean, m2 = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        n = tl.load(counts + first + t, mask=t < tiles, other=0.0)
        at = (first + t)[:, None] * C + c[None, :]
        mask = (t < tiles)[:, None] & inside[None, :]
        means = tl.load(values + at, mask=mask, other=0.0)
        squares = tl.load(values + plane + at, mask=mask, other=0.0)
        n_new = tl.sum(n, 0)
        mean_new = tl.sum(n[:, None] * means, 0) / n_new
        off = means - mean_new[None, :]
        m2_new = tl.sum(squares + n[:, None] * off * off, 0)
        delta, total = mean_new - mean, count + n_new
        mean += delta * (n_new / total)
        m2 += m2_new + delta * delta * (count * n_new / total)
        count = total
    return count, mean, m2


@triton.jit
def merged_sums(values, first, tiles, plane, c, inside, C: tl.constexpr, BT: tl.constexpr):
    """Σg and Σg·x̂ of channels c, over `tiles` rows of partials from row `first` on, BT at a time."""
    BC: tl.constexpr = c.shape[0]
    g, gx = tl.zeros((BT, BC), tl.float32), tl.zeros((BT, BC), tl.float32)
    for start in range(0, tiles, BT):
        t = start + tl.arange(0, BT)
        at = (first + t)[:, None] * C + c[None, :]
        mask = (t < tiles)[:, None] & inside[None, :]
        g += tl.load(values + at, mask=mask, other=0.0)
        gx += tl.load(values + plane + at, mask=mask, other=0.0)
    return tl.sum(g, 0), tl.sum(gx, 0)


@triton.jit
def settle_statistics(
    values, counts, weight, bias, running_mean, running_var, tracked, state, groups, tiles, eps, momentum, c, first_one,
    C: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """mean, rstd, scale and shift of channels c for each group, from its tiles; running statistics, group by group.

    first_one: whether this program is the one that counts the batch in `tracked`.
    """
    inside = c < C
    gamma = tl.load(weight + c, mask=inside, other=0.0)
    beta = tl.load(bias + c, mask=inside, other=0.0)
    for group in range(groups):
        plane = groups * tiles * C
        count, mean, m2 = merged_statistics(values, counts, group * tiles, tiles, plane, c, inside, C, BT)
        rstd = 1 / tl.sqrt_rn(m2 / count + eps)
        scale = gamma * rstd
        at, row = group * C + c, groups * C
        tl.store(state + at, mean, mask=inside)
        tl.store(state + row + at, rstd, mask=inside)
        tl.store(state + 2 * row + at, scale, mask=inside)
        tl.store(state + 3 * row + at, beta - mean * scale, mask=inside)
        if running_mean is not None:
            old_mean = tl.load(running_mean + c, mask=inside, other=0.0)
            old_var = tl.load(running_var + c, mask=inside, other=0.0)
            tl.store(running_mean + c, old_mean + momentum * (mean - old_mean), mask=inside)
            tl.store(running_var + c, old_var + momentum * (m2 / (count - 1) - old_var), mask=inside)
    if tracked is not None and first_one:
        tl.store(tracked, tl.load(tracked) + groups)


@triton.jit
def settle_sums(values, dweight, dbias, means, rows, groups, tiles, c, C: tl.constexpr, BT: tl.constexpr):
    """∂weight = Σg·x̂ and ∂bias = Σg of channels c over all groups, if wanted; Σg/rows and Σg·x̂/rows of each."""
    inside = c < C
    bias_total, weight_total = tl.zeros((c.shape[0],), tl.float32), tl.zeros((c.shape[0],), tl.float32)
    for group in range(groups):
        g_sum, gx_sum = merged_sums(values, group * tiles, tiles, groups * tiles * C, c, inside, C, BT)
        tl.store(means + group * C + c, g_sum / rows, mask=inside)
        tl.store(means + (groups + group) * C + c, gx_sum / rows, mask=inside)
        bias_total += g_sum
        weight_total += gx_sum
    if dweight is not None:
        tl.store(dbias + c, bias_total, mask=inside)
        tl.store(dweight + c, weight_total, mask=inside)


@triton.jit
def merge(
    values, counts, rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged,
    column, group, groups, tile, tiles, rows, eps, momentum,
    C: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """At the end of a GEMM's program, its partials stored: both rounds, by whichever programs come last.

    weight, bias: batch norm's, or in MODE `batch_norm_grad` where their gradients go, or None.
    rows: pixels of a group.
    """
    PART: tl.constexpr = BN if BN < WIDTH else WIDTH
    columns, of = (C + BN - 1) // BN, column // BN
    in_group = (tiles + TOGETHER - 1) // TOGETHER
    mine = tile // TOGETHER
    members = tl.minimum(TOGETHER, tiles - mine * TOGETHER)
    place = group * in_group + mine
    if last_program(tickets + columns + of * groups * in_group + place, members):
        for start in tl.static_range(0, BN, PART):
            c = column + start + tl.arange(0, PART)
            inside, at = c < C, place * C + c
            first, plane = group * tiles + mine * TOGETHER, groups * tiles * C
            if MODE == "statistics":
                count, mean, m2 = merged_statistics(values, counts, first, members, plane, c, inside, C, TOGETHER)
                tl.store(rounds + at, mean, mask=inside)
                tl.store(rounds + groups * in_group * C + at, m2, mask=inside)
                tl.store(round_counts + place + tl.arange(0, 1), count)
            else:
                g, gx = merged_sums(values, first, members, plane, c, inside, C, TOGETHER)
                tl.store(rounds + at, g, mask=inside)
                tl.store(rounds + groups * in_group * C + at, gx, mask=inside)
        if last_program(tickets + of, groups * in_group):
            for start in tl.static_range(0, BN, PART):
                c = column + start + tl.arange(0, PART)
                if MODE == "statistics":
                    settle_statistics(
                        rounds, round_counts, weight, bias, running_mean, running_var, tracked, merged, groups,
                        in_group, eps, momentum, c, (column == 0) & (start == 0), C, TOGETHER,
                    )  # fmt: skip
                else:
                    settle_sums(rounds, weight, bias, merged, rows, groups, in_group, c, C, TOGETHER)


def merge_arguments(epilogue: Epilogue, values: Tensor | None, tiles: int, column_tiles: int, rows: int) -> dict:
    """Arguments of a GEMM kernel for `merge`, and its constants; nothing where the epilogue has no `merge`.

    Raises:
        ValueError: vectors that do not fit, by name.
    """
    names = ("rounds", "round_counts", "tickets", "weight", "bias", "running_mean", "running_var", "tracked", "merged")
    empty = dict.fromkeys(names) | {
        "rows": rows,
        "eps": 0.0,
        "momentum": 0.0,
        "MERGE": False,
        "TOGETHER": TOGETHER,
        "WIDTH": WIDTH,
    }
    if epilogue.merge is None or values is None:
        return empty
    _, groups, _, channels = values.shape
    together = cdiv(tiles, TOGETHER)
    rounds = values.new_empty((2, groups, together, channels))
    check_merge(epilogue.merge, channels, values)
    statistics = epilogue.mode == "statistics"
    given = epilogue.merge._asdict() if statistics else dict(zip(("weight", "bias"), epilogue.merge, strict=True))
    if statistics and rows == 1:
        raise ValueError("a group has 1 value per channel: training-mode batch norm needs at least 2")
    return empty | given | {
        "rounds": rounds, "round_counts": values.new_empty((groups, together)),
        "tickets": tickets(values, column_tiles * (1 + groups * together)),
        "merged": values.new_empty((4 if statistics else 2, groups, channels)), "MERGE": True,
    }  # fmt: skip
