"""The caveats of a plan, printed first: operations of unknown cost, and weights that masks and cuts do not reach."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from prunella.graph.data import Frozen, Graph, ReasonKind
from prunella.measure.text import percent

_SHOWN = 3
NOT_COUNTED = "not counted in MACs"


def weights_of(graph: Graph) -> list[str]:
    """The weights of the model: parameters of two axes or more, as `metrics.count` counts them."""
    return [entity.name for entity in graph.entities.values() if entity.parameter and len(entity.shape) > 1]


def not_counted(uncounted: Mapping[str, int], hidden: Mapping[str, Collection[str]], sizes: Mapping[str, int]) -> str:
    """The operations with unknown multiply-adds, with the share of the parameters that they read; empty if none.

    sizes: elements of every parameter of the model.
    """
    total = sum(sizes.values()) or 1
    parts = []
    for name, calls in uncounted.items():
        read = sum(sizes.get(parameter, 0) for parameter in hidden.get(name, ()))
        of = f"which reads {percent(read / total)} of the parameters" if read else "which reads no parameters"
        parts.append(f"{name} ({calls} {'call' if calls == 1 else 'calls'}), {of}")
    return f"{NOT_COUNTED}: {'; '.join(parts)}" if parts else ""


def uncounted_work(graph: Graph) -> str:
    """`not_counted` for a graph."""
    sizes = {entity.name: graph.numel(entity.name) for entity in graph.entities.values() if entity.parameter}
    return not_counted(graph.uncounted, graph.hidden, sizes)


UNREGISTERED = "multiplied, but no parameters of the model"


def not_registered(unregistered: Mapping[str, int], total: float) -> str:
    """The weights that no module registers, with their share of all multiply-adds; empty if there are none."""
    if not unregistered:
        return ""
    names = sorted(unregistered, key=lambda name: -unregistered[name])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    share = percent(sum(unregistered.values()) / (total or 1))
    where = f"{', '.join(names[:_SHOWN])}{more}, {share} of the MACs"
    return f"{UNREGISTERED}: {where}; params and bytes leave them out (nn.ModuleList or nn.ParameterList holds such)"


def unregistered_work(graph: Graph) -> str:
    """`not_registered` for a graph."""
    return not_registered(graph.unregistered, graph.macs())


def uncovered_weights(graph: Graph, covered: Collection[str]) -> str:
    """The weights outside the covered ones, with their share of all weights; empty if there are none."""
    sizes = {name: graph.numel(name) for name in weights_of(graph)}
    left = sorted((name for name in sizes if name not in covered), key=lambda name: -sizes[name])
    if not left:
        return ""
    share = percent(sum(sizes[name] for name in left) / (sum(sizes.values()) or 1))
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return f"not covered by the sparsity: {', '.join(left[:_SHOWN])}{more}, {share} of all weights"


def of_graph(graph: Graph) -> list[str]:
    """Caveats of any plan by this graph: operations of unknown cost, and weights that masks and cuts do not reach."""
    known = {layer.entity for layer in graph.layers} | {m.entity for group in graph.groups for m in group.members}
    return list(lines(uncounted_work(graph), unregistered_work(graph), uncovered_weights(graph, known)))


def unmaskable(graph: Graph) -> Iterable[Frozen]:
    """The weights that masks do not cover, with the operation that reads them."""
    layers = {layer.entity for layer in graph.layers}
    for name in weights_of(graph):
        if name not in layers:
            operation, where = graph.readers.get(name, ("", ""))
            reason = f"masks do not cover weights that {operation} reads" if operation else _UNREAD
            reason = graph.shared.get(name, reason)
            yield Frozen(name, 0, graph.entities[name].shape[0], reason, where, ReasonKind.OPERATION)


_UNREAD = "no operation of this run reads it"


def lines(*texts: str) -> tuple[str, ...]:
    """The non-empty lines."""
    return tuple(filter(None, texts))
