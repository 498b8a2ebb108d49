"""Several examples in one sequence, so that no computing is spent on padding. Pure.

Best-fit decreasing: the longest first, each into the sequence that it leaves the least room in. At most 11/9·OPT + 1
sequences (Johnson et al. 1974), and within a per cent of the optimum on real length distributions.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in groups whose lengths add up to at most ``capacity`` tokens. O(n log capacity), deterministic.

    Every index is in exactly one group. ValueError for a length that is negative or above ``capacity``."""
    for length in lengths:
        if not 0 <= length <= capacity:
            raise ValueError(f"a length of {length} does not fit into sequences of {capacity}")
    groups: list[list[int]] = []
    rooms = _Rooms(capacity)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = rooms.smallest(lengths[index])
        if room is None:
            group, room = len(groups), capacity
            groups.append([])
        else:
            group = rooms.take(room)
        groups[group].append(index)
        rooms.put(room - lengths[index], group)
    return groups


class _Rooms:
    """Groups by the room that is left in them: a binary tree over 0…capacity that finds the smallest room that is enough."""

    def __init__(self, capacity: int) -> None:
        self._leaves = 1 << capacity.bit_length()
        self._some = bytearray(2 * self._leaves)
        self._groups: dict[int, list[int]] = {}

    def put(self, room: int, group: int) -> None:
        self._groups.setdefault(room, []).append(group)
        node = self._leaves + room
        while node and not self._some[node]:
            self._some[node] = 1
            node //= 2

    def take(self, room: int) -> int:
        group = self._groups[room].pop()
        node = self._leaves + room
        if not self._groups[room]:
            self._some[node] = 0
            while node > 1 and not self._some[node ^ 1]:
                node //= 2
                self._some[node] = 0
        return group

    def smallest(self, enough: int) -> int | None:
        node = self._leaves + enough
        while not self._some[node]:
            # Up to the first right-hand neighbour that has something, then down to its leftmost leaf.
            while node & 1 and node > 1:
                node //= 2
            if node <= 1:
                return None
            node += 1
        while node < self._leaves:
            node = 2 * node if self._some[2 * node] else 2 * node + 1
        return node - self._leaves
