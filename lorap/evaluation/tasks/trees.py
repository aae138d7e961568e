"""The choices of one question as a tree of tokens, so that a model reads what they share once.

All choices of a question begin alike, and often go on alike for a while. Each distinct beginning is one node. A node attends to
the nodes above it and to itself, and its position is its depth, so the model computes in it exactly what it would compute at the
end of that beginning alone. The last token of a choice predicts nothing that is asked for and is no node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoded:
    """The choices of one question as tokens.

    Args:
        ids: all tokens of each choice.
        starts: where in them the continuation begins; at least 1.
        truncated: whether tokens were left out at the beginning, because the model reads no more at once.
    """

    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    truncated: bool = False


@dataclass(frozen=True)
class Tree:
    """Choices in one tree.

    Args:
        tokens: of each node, a parent before its children.
        parents: index of the node above; -1 at a root.
        depths: tokens above the node.
        edges: (node, token): each prediction that is asked for, once.
        paths: for each choice, the indices of its edges.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    paths: tuple[tuple[int, ...], ...]

    def visible(self) -> NDArray[np.bool_]:
        """(nodes, nodes): which nodes (columns) each node (rows) attends to."""
        found = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[node] |= found[parent]
        return found


def build_prefix_tree(encoded: Encoded) -> Tree:
    """One tree of all choices."""
    nodes: dict[tuple[int, int], int] = {}
    depths: list[int] = []
    edges: dict[tuple[int, int], int] = {}
    paths = []
    for ids, start in zip(encoded.ids, encoded.starts, strict=True):
        node, path = -1, []
        for place, token in enumerate(ids):
            if place >= start:
                path.append(edges.setdefault((node, token), len(edges)))
            if place < len(ids) - 1:
                node = nodes.setdefault((node, token), len(nodes))
                if node == len(depths):
                    depths.append(place)
        paths.append(tuple(path))
    parents, tokens = zip(*nodes, strict=True)
    return Tree(tokens, parents, tuple(depths), tuple(edges), tuple(paths))


def build_separate_sequences(encoded: Encoded) -> list[Tree]:
    """A tree for each choice: nothing is shared, and a tree is a plain text."""
    return [
        build_prefix_tree(Encoded((ids,), (start,))) for ids, start in zip(encoded.ids, encoded.starts, strict=True)
    ]


def batches(trees: Sequence[Tree], batch_tokens: int) -> list[list[int]]:
    """Indices of trees that are read together, the largest first.

    No batch has more than ``batch_tokens`` tokens, padding included, unless it is one tree. From a quarter of that on, where
    more tokens hardly make a forward pass more efficient, a batch takes no tree that would be padded by more than a 16th.
    """
    found: list[list[int]] = []
    width = 0
    for index in sorted(range(len(trees)), key=lambda index: len(trees[index].tokens), reverse=True):
        size = len(trees[index].tokens)
        held = width * len(found[-1]) if found else 0
        if not found or held + width > batch_tokens or (16 * size < 15 * width and 4 * held >= batch_tokens):
            found.append([])
            width = size
        found[-1].append(index)
    return found
