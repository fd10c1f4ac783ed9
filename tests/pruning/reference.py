"""The mathematics of oViT written straight from the paper in float64 numpy, as slowly as clarity asks.

Shares no code with the solver: the Fisher matrix is formed, restricted and inverted again at every step (eq. 2 and 5 of
arXiv 2210.09223), blocks come from `numpy.array_split`, layouts from index arithmetic.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def layout(shape: tuple[int, ...], pattern: str | dict[str, list[int]]) -> list[int]:
    """Flat indices of a weight in the order in which it is cut into blocks."""
    index = np.arange(int(np.prod(shape))).reshape(shape)
    if pattern == "unstructured":
        return list(index.ravel())
    if len(shape) > 2:
        index = np.moveaxis(index, 1, -1)
    rows = index.reshape(shape[0], -1) if len(shape) > 1 else index.reshape(1, -1)
    if isinstance(pattern, str):
        return list(rows.ravel())
    height, width = pattern["block"]
    return [
        rows[top + i, left + j]
        for top in range(0, rows.shape[0], height)
        for left in range(0, rows.shape[1], width)
        for i in range(height)
        for j in range(width)
    ]


def group_of(pattern: str | dict[str, list[int]]) -> int:
    if pattern == "unstructured":
        return 1
    return int(pattern.split(":")[1]) if isinstance(pattern, str) else pattern["block"][0] * pattern["block"][1]


def blocks(shape: tuple[int, ...], pattern: str | dict[str, list[int]], block: int) -> list[list[int]]:
    """Flat indices of every Fisher block."""
    group = group_of(pattern)
    groups = np.array(layout(shape, pattern)).reshape(-1, group)
    count = int(np.ceil(len(groups) / (block // group)))
    return [list(part.ravel()) for part in np.array_split(groups, count)]


def fisher(gradients: Array, damp: float) -> Array:
    """damp I + mean of g g^T for gradients [N, B]."""
    size = gradients.shape[1]
    return damp * np.eye(size) + sum((np.outer(g, g) for g in gradients), np.zeros((size, size))) / max(
        len(gradients), 1
    )


def group_error(F: Array, w: Array, Q: list[int]) -> float:
    """rho_Q = 1/2 w_Q^T (H_QQ)^-1 w_Q."""
    if not Q:
        return 0.0
    H = np.linalg.inv(F)
    return float(w[Q] @ np.linalg.solve(H[np.ix_(Q, Q)], w[Q]) / 2)


def joint(F: Array, w: Array, Q: list[int]) -> Array:
    """Survivors from the primal: w_R + F_RR^-1 F_RQ w_Q; zeros in Q."""
    R = [i for i in range(len(w)) if i not in set(Q)]
    out = np.zeros_like(w)
    if R:
        out[R] = w[R] + (np.linalg.solve(F[np.ix_(R, R)], F[np.ix_(R, Q)] @ w[Q]) if Q else 0)
    return out


@dataclass
class Course:
    """A greedy run: removed units in order, and the error after each."""

    units: list[list[int]]
    errors: list[float]


def greedy(F: Array, w: Array, dead: list[int], unit: int = 1, keep: int = 0, group: int = 0) -> Course:
    """Remove the unit of least increase again and again; for N:M (`group` > 0) until every group has only `keep`."""
    gone, course = list(dead), Course([], [])
    units = [list(range(i, i + unit)) for i in range(0, len(w), unit)]
    units = [each for each in units if not set(each) <= set(dead)]
    while units:
        R = [i for i in range(len(w)) if i not in set(gone)]
        H, now = np.linalg.inv(F[np.ix_(R, R)]), joint(F, w, gone)
        best, best_cost = None, np.inf
        for candidate in units:
            left = [i for i in candidate if i not in set(gone)]
            if group and sum(i // group == candidate[0] // group for i in R) <= keep:
                continue
            at = [R.index(i) for i in left]
            cost = now[left] @ np.linalg.solve(H[np.ix_(at, at)], now[left]) / 2
            if cost < best_cost:
                best, best_cost = candidate, cost
        if best is None:
            break
        units.remove(best)
        gone += [i for i in best if i not in set(gone)]
        course.units.append(best)
        course.errors.append(group_error(F, w, [i for i in gone if i not in set(dead)]))
    return course


def prune(
    weights: list[Array],
    gradients: list[Array],
    *,
    sparsity: float | None,
    scope: str = "global",
    pattern: str | dict[str, list[int]] = "unstructured",
    masks: list[NDArray[np.bool_]] | None = None,
    block: int = 48,
    damp: float = 1e-6,
    rule: str = "cumulative",
) -> tuple[list[NDArray[np.bool_]], list[Array]]:
    """oViT on plain arrays: masks (True = kept) and weights."""
    kept = [np.ones(w.shape, dtype=bool) if masks is None else masks[i].copy() for i, w in enumerate(weights)]
    unit = group_of(pattern) if isinstance(pattern, dict) else 1
    keep, group = map(int, pattern.split(":")) if isinstance(pattern, str) and ":" in pattern else (0, 0)
    parts = []  # (tensor, indices, F, w, dead, course)
    for t, weight in enumerate(weights):
        for indices in blocks(weight.shape, pattern, block):
            alive = kept[t].ravel()[indices]
            w = np.where(alive, weight.ravel()[indices], 0.0)
            F = fisher(np.where(alive, gradients[t].reshape(len(gradients[t]), weight.size)[:, indices], 0.0), damp)
            dead = list(np.flatnonzero(~alive))
            parts.append((t, indices, F, w, dead, greedy(F, w, dead, unit, keep, group)))
    taken = [len(part[5].units) for part in parts] if group else _allocate(parts, kept, sparsity, scope, rule, unit)
    out = [np.where(mask, weight, 0.0) for mask, weight in zip(kept, weights, strict=True)]
    for (t, indices, F, w, dead, course), count in zip(parts, taken, strict=True):
        Q = [i for each in course.units[:count] for i in each if i not in set(dead)]
        if Q:
            out[t].ravel()[indices] = joint(F, w, dead + Q)
            kept[t].ravel()[np.array(indices)[Q]] = False
    return kept, out


def prune_once(
    method: str,
    weights: list[Array],
    gradients: list[Array],
    *,
    sparsity: float | None,
    scope: str = "global",
    pattern: str | dict[str, list[int]] = "unstructured",
    masks: list[NDArray[np.bool_]] | None = None,
    block: int = 48,
    damp: float = 1e-6,
    update: str = "joint",
) -> tuple[list[NDArray[np.bool_]], list[Array]]:
    """The methods that score each unit alone (obert, mfac, obd, grad_weight): masks (True = kept) and weights."""
    kept = [np.ones(w.shape, dtype=bool) if masks is None else masks[i].copy() for i, w in enumerate(weights)]
    out = [np.where(mask, weight, 0.0) for mask, weight in zip(kept, weights, strict=True)]
    unit = group_of(pattern) if isinstance(pattern, dict) else 1
    parts = []  # (tensor, indices, F, H, w)
    entries = []  # (cost, order, tensor, flat indices of the unit)
    for t, weight in enumerate(weights):
        for indices in blocks(weight.shape, pattern, block):
            alive = kept[t].ravel()[indices]
            w, g = out[t].ravel()[indices], gradients[t].reshape(len(gradients[t]), weight.size)[:, indices]
            F = fisher(np.where(alive, g, 0.0), damp)
            H = mfac_inverse(np.where(alive, g, 0.0), damp) if method == "mfac" else np.linalg.inv(F)
            parts.append((t, indices, F, H, w))
            for start in range(0, len(indices), unit):
                G = list(range(start, start + unit))
                if alive[G].any():
                    flat = [indices[i] for i in G]
                    entries.append((unit_cost(method, F, H, w, g, G), len(entries), t, flat))
    if isinstance(pattern, str) and ":" in pattern:
        gone = _lowest_of_groups(entries, kept, pattern)
    else:
        gone = []
        for members in [range(len(kept))] if scope == "global" else [[t] for t in range(len(kept))]:
            total = sum(kept[t].size for t in members) // unit
            mine = sorted(entry for entry in entries if entry[2] in members)
            gone += mine[: max(0, round((sparsity or 0.0) * total) - (total - len(mine)))]
    for t, indices, F, H, w in parts:
        units = [[indices.index(i) for i in flat] for _, _, tensor, flat in gone if tensor == t and flat[0] in indices]
        Q = [i for each in units for i in each]
        dead = list(np.flatnonzero(~kept[t].ravel()[indices]))
        new = w.copy()
        if Q and method in ("obert", "mfac") and update == "joint":
            new = joint(F, w, dead + [i for i in Q if i not in dead])
        elif method in ("obert", "mfac") and update == "independent":
            for G in units:
                new = new - H[:, G] @ np.linalg.solve(H[np.ix_(G, G)], w[G])
        new[Q + dead] = 0.0
        out[t].ravel()[indices] = new
        kept[t].ravel()[np.array(indices)[Q]] = False
    return kept, out


def unit_cost(method: str, F: Array, H: Array, w: Array, g: Array, G: list[int]) -> float:
    """What removing unit G alone costs (specs/second-order.md, section 2)."""
    if method == "obd":
        return float(sum(w[i] ** 2 * F[i, i] / 2 for i in G))
    if method == "grad_weight":
        return float(sum(abs(w[i] * gradient[i]) for i in G for gradient in g))
    return float(w[G] @ np.linalg.solve(H[np.ix_(G, G)], w[G]) / 2)


def mfac_inverse(gradients: Array, damp: float) -> Array:
    """H from the recursion of M-FAC: H x = x / damp - sum_j (Hg_j . x) / denominator_j Hg_j."""
    H = np.eye(gradients.shape[1]) / damp
    seen: list[tuple[Array, float]] = []
    for g in gradients:
        Hg = g / damp
        for other, denominator in seen:
            Hg = Hg - other * (other @ g) / denominator
        seen.append((Hg, len(gradients) + g @ Hg))
    for Hg, denominator in seen:
        H = H - np.outer(Hg, Hg) / denominator
    return H


def _lowest_of_groups(entries: list, kept: list, pattern: str) -> list:
    """Under keep:group, what each group of consecutive weights still has to lose."""
    keep, group = map(int, pattern.split(":"))
    gone = []
    for t, mask in enumerate(kept):
        order = layout(mask.shape, pattern)
        for start in range(0, len(order), group):
            members = order[start : start + group]
            mine = sorted(entry for entry in entries if entry[2] == t and entry[3][0] in members)
            gone += mine[: max(0, len(mine) - keep)]
    return gone


def _allocate(parts: list, kept: list, sparsity: float | None, scope: str, rule: str, unit: int) -> list[int]:
    """Units each block loses: sort (rank, block, step), take the first."""
    assert sparsity is not None
    taken = [0] * len(parts)
    for members in [range(len(kept))] if scope == "global" else [[t] for t in range(len(kept))]:
        total = sum(kept[t].size for t in members) // unit
        mine = [b for b, part in enumerate(parts) if part[0] in members]
        present = total - sum(len(parts[b][5].units) for b in mine)
        entries = []
        for b in mine:
            errors = np.array(parts[b][5].errors)
            if rule == "marginal":
                errors = np.maximum.accumulate(np.diff(errors, prepend=0.0)) if len(errors) else errors
            else:
                errors = errors / len(parts[b][1])  # a weight, since blocks differ in size
            entries += [(error, b, step) for step, error in enumerate(errors)]
        for _, b, _ in sorted(entries)[: max(0, round(sparsity * total) - present)]:
            taken[b] += 1
    return taken
