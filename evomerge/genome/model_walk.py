"""slerp's walk along the edges of the complete graph of models."""

from __future__ import annotations

from itertools import pairwise


def walk(n: int) -> tuple[tuple[int, int], ...]:
    """The complete graph's n (n - 1) / 2 edges, each once, each from where the last one ended.

    An odd number of nodes has such a round (Euler 1736): two nodes p, q join one of the nodes below
    p by 0 p 1 q 2 p … q (p-1) p q 0. An even number has none, so the last node is joined in pairs,
    0 n 1, 2 n 3, …, with a jump after each: the fewest that are possible.
    """
    path = [0]
    for p in range(1, n - 1, 2):
        for i in range(p - 1):
            path += [p + i % 2, i + 1]
        path += [p, p + 1, 0]
    edges = list(pairwise(path))
    if n % 2 == 0:
        last = n - 1
        for i in range(last):
            edge = (i, last) if i % 2 == 0 else (last, i)
            edges.append(edge)
    return tuple(edges)
