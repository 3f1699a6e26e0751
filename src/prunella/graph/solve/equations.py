"""Solve the relations of a recorded run: which atoms are equal, and which are frozen.

Equal atoms are joined (connected components). Each conjunction (a view that factors an axis) is resolved: one factor
may lose positions, the others are frozen. A frozen factor decides first, then the factor that is the batch of a product
(attention heads), then the longer factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunella.graph.data import Ints, Kind
from prunella.graph.solve.labels import And, Ledger, Reason

_BIT = {"norm": 1, "choice": 2, "route": 4, "lookup": 8, "output": 16}
_KINDS: dict[int, Kind] = {1: "width", 4: "expert", 6: "expert", 8: "vocabulary", 24: "vocabulary"}
"""Soft reasons of a unit (bits) -> kind of the unit."""
Mark = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


class Equations:
    """The components of a ledger: `part` is the component of each atom, `fixed` marks the frozen components."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.pending: list[And] = list(ledger.ands)
        self.settled: list[Ints] = []
        self.soft = True
        self.resolve()

    def join(self) -> None:
        """Connected components of equal atoms, and which of them are frozen."""
        a = np.concatenate([np.zeros(1, np.int64), *(e[0] for e in self.ledger.edges)])
        b = np.concatenate([np.zeros(1, np.int64), *(e[1] for e in self.ledger.edges)])
        n = self.ledger.size
        self.part = connected_components(coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(n, n)), False)[1]
        self.part = self.part.astype(np.int64)
        self.fixed: Mark = np.zeros(int(self.part.max()) + 1, dtype=bool)
        self.fixed[self.part[0]] = True
        for atoms, reason in self.ledger.frozen:
            if self.soft or not reason.soft:
                self.fixed[self.part[atoms]] = True
        self.hard: Mark = np.zeros_like(self.fixed)
        self.hard[self.part[0]] = True
        for atoms, reason in self.ledger.frozen:
            if reason.soft != "norm":
                self.hard[self.part[atoms]] = True
        for atoms in () if self.soft else self.settled:
            self.fixed[self.part[atoms]] = True

    def kinds(self) -> dict[int, Kind]:
        """Kinds of the components that are the batch of a product, or that only soft reasons freeze."""
        kinds: dict[int, Kind] = {}
        for atoms in self.ledger.batched:
            kinds |= dict.fromkeys(self._parts(atoms), "head")
        reasons = self._reasons()
        for bits, kind in _KINDS.items():
            kinds |= dict.fromkeys(np.flatnonzero(reasons == bits).tolist(), kind)
        return kinds

    def refuse(self) -> None:
        """Freeze components whose soft reasons form no kind of unit, such as a choice without a route."""
        reasons = self._reasons()
        wrong = (reasons > 0) & ~np.isin(reasons, list(_KINDS))
        for atoms, reason in list(self.ledger.frozen):
            if reason.soft and wrong[self.part[atoms]].any():
                self.freeze(atoms[wrong[self.part[atoms]]], reason)

    def relate(self, tables: Iterable[Ints], outputs: Iterable[Ints]) -> None:
        """Relate each output for tokens with each table that an input indexes, if both have as many positions."""
        reasons, ends = self._reasons(), list(outputs)
        for table in tables:
            for end in ends:
                alone = len(end) == len(table) and bool((reasons[self.part[end]] == _BIT["output"]).all())
                if alone and not self.stays(end).any() and not self.stays(table).any():
                    self.ledger.edges.append((table, end))
        self.join()

    def _reasons(self) -> Ints:
        """The soft reasons of each component, one bit each."""
        bits = np.zeros(len(self.fixed), dtype=np.int64)
        for atoms, reason in self.ledger.frozen:
            if reason.soft:
                parts = self.part[atoms]
                bits[parts] |= _BIT[reason.soft]
        return bits

    def _parts(self, atoms: Ints) -> list[int]:
        return [int(part) for part in np.unique(self.part[atoms])]

    def stays(self, atoms: Ints) -> Mark:
        """Which atoms are frozen."""
        mark: Mark = self.fixed[self.part[atoms]]
        return mark

    def resolve(self) -> None:
        """Decide every conjunction."""
        self.join()
        while self.pending:
            if not self._forced():
                self._choose()
            self.join()

    def _forced(self) -> bool:
        changed = False
        for node in list(self.pending):
            frozen = self.stays(node.whole)
            if any((frozen & ~self.stays(f)).any() for f in node.factors):
                for factor in node.factors:
                    self.freeze(factor[frozen], self.reason(node.whole[frozen]))
                changed = True
            live = [f for f in node.factors if not self.stays(f).all()]
            if len(live) <= 1:
                self.pending.remove(node)
                changed = True
                live = live or self._normed(node)
                self.settled += [f for f in node.factors if not live or f is not live[0]]
                if live:
                    self.ledger.edges.append((node.whole, live[0]))
                else:
                    self.freeze(node.whole, self.reason(np.concatenate(node.factors)))
        return changed

    def _normed(self, node: And) -> list[Ints]:
        """The single factor that only norms freeze, if there is one: it may lose positions of a width."""
        factors = [f for f in node.factors if not self.hard[self.part[f]].any()]
        return factors if len(factors) == 1 else []

    def _choose(self) -> None:
        batch = np.zeros_like(self.fixed)
        for atoms in self.ledger.batched:
            batch[self.part[atoms]] = True
        heads = [n for n in self.pending if any(batch[self.part[f]].any() for f in n.factors)]
        for node in self._apart(heads or self.pending):
            live = [f for f in node.factors if not self.stays(f).all()]
            best = max(
                live, key=lambda f: (bool(batch[self.part[f]].any()), len(np.unique(self.part[f]))), default=None
            )
            for factor in live:
                if factor is not best:
                    self.freeze(
                        factor, Reason("the same view factors into another axis, which is the one that can be pruned")
                    )

    def _apart(self, nodes: list[And]) -> Iterator[And]:
        """The first node, and each later node without a shared component with earlier ones."""
        taken = np.zeros_like(self.fixed)
        for node in nodes:
            parts = self.part[np.concatenate([node.whole, *node.factors])]
            parts = parts[~self.fixed[parts]]
            if not taken[parts].any():
                yield node
            taken[parts] = True

    def lift(self) -> None:
        """Release what only soft reasons freeze. Resolved conjunctions do not change."""
        self.soft = False
        self.join()

    def freeze(self, atoms: Ints, reason: Reason) -> None:
        """Freeze these atoms."""
        if len(atoms):
            self.ledger.frozen.append((atoms, replace(reason, soft="")))
            self.fixed[self.part[atoms]] = True

    def reason(self, atoms: Ints) -> Reason:
        """Why these atoms are frozen: the first reason of their components; hard reasons come before soft ones.

        A reason of the first example that freezes all of them comes first. A reason of a further example comes next,
        because those of the first example may freeze only a part.
        """
        components = np.zeros_like(self.fixed)
        components[self.part[atoms]] = True
        marked = [(self.part[frozen], reason) for frozen, reason in self.ledger.frozen]
        causes = [(parts, reason) for parts, reason in marked if components[parts].any()]
        if causes:
            hard = [(parts, reason) for parts, reason in causes if not reason.soft] or causes
            alone = (reason for parts, reason in hard if not reason.example and np.isin(self.part[atoms], parts).all())
            further = (reason for _, reason in hard if reason.example and not reason.soft)
            return next(alone, None) or next(further, hard[0][1])
        return Reason("it meets a tensor that is always kept" if components[self.part[0]] else "it is always kept")
