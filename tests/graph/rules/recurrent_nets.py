"""Random networks with recurrent layers: fronts that feed them, states that start them, backs that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

FEATURES, TIME, BATCH = 6, 5, 3
KINDS = ("LSTM", "GRU", "RNN")
FRONTS = ("linear", "convolution", "raw")
STARTS = ("none", "zeros", "ones", "learned", "computed", "fed on")
BACKS = ("last step", "every step", "states", "attention", "cells", "residual", "both directions")


@dataclass(frozen=True)
class Spec:
    """What a network is made of."""

    kind: str = "LSTM"
    layers: int = 1
    both: bool = False
    bias: bool = True
    projection: int = 0
    front: str = "linear"
    start: str = "none"
    back: str = "last step"
    packed: bool = False
    batch_first: bool = True
    nonlinearity: str = "tanh"
    width: int = 7
    hidden: int = 8


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any of them that fit together."""
    kind = draw(st.sampled_from(KINDS))
    packed = draw(st.booleans())
    return Spec(
        kind,
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 3])) if kind == "LSTM" else 0,
        draw(st.sampled_from(FRONTS)),
        draw(st.sampled_from(STARTS)),
        draw(st.sampled_from(BACKS)),
        packed,
        packed or draw(st.booleans()),
        draw(st.sampled_from(["tanh", "relu"])) if kind == "RNN" else "tanh",
    )


class Recurrent(nn.Module):
    """A front, recurrent layers, and a back."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        width = FEATURES if spec.front == "raw" else spec.width
        if spec.front == "linear":
            self.front: nn.Module = nn.Linear(FEATURES, width)
        elif spec.front == "convolution":
            self.front = nn.Sequential(nn.Conv1d(FEATURES, width, 3, padding=1), nn.BatchNorm1d(width), nn.ReLU())
        self.layers = self._layers(width)
        given = spec.projection or spec.hidden
        self.given, self.hidden, self.count = given, spec.hidden, spec.layers * (1 + spec.both)
        if spec.start == "learned":
            self.first = nn.Parameter(torch.randn(self.count, 1, given))
            self.second = nn.Parameter(torch.randn(self.count, 1, spec.hidden)) if spec.kind == "LSTM" else None
        elif spec.start == "computed":
            sizes = (given, spec.hidden) if spec.kind == "LSTM" else (given,)
            self.starts = nn.ModuleList([nn.Linear(FEATURES, size) for size in sizes])
        elif spec.start == "fed on":
            self.encoder = self._layers(width)
        self._back(width, given * (1 + spec.both))

    def _layers(self, width: int) -> nn.Module:
        spec = self.spec
        options = {"nonlinearity": spec.nonlinearity} if spec.kind == "RNN" else {}
        options |= {"proj_size": spec.projection} if spec.kind == "LSTM" else {}
        made: nn.Module = getattr(nn, spec.kind)(
            width,
            spec.hidden,
            num_layers=spec.layers,
            bias=spec.bias,
            batch_first=spec.batch_first,
            bidirectional=spec.both,
            **options,
        )
        return made

    def _back(self, width: int, outputs: int) -> None:
        back = self.spec.back
        if back == "attention":
            self.query = nn.Linear(outputs, 1)
        elif back == "cells":
            self.cell = getattr(nn, f"{self.spec.kind}Cell")(outputs, 9)
        elif back == "residual":
            self.beside = nn.Linear(width, outputs)
        read = {"states": self.count * self.given, "cells": 9, "both directions": outputs // (1 + self.spec.both)}
        self.head = nn.Linear(read.get(back, outputs), 2)

    def forward(self, x: Tensor) -> Any:
        z = self._fed(x)
        output, states = self.layers(self._packed(z), self._start(x, z))
        if isinstance(output, PackedSequence):
            output = pad_packed_sequence(output, batch_first=True)[0]
        if not self.spec.batch_first:
            output, z = output.transpose(0, 1), z.transpose(0, 1)
        return self.head(self._read(output, states, z))

    def _fed(self, x: Tensor) -> Tensor:
        z = x
        if self.spec.front == "linear":
            z = self.front(x).relu()
        elif self.spec.front == "convolution":
            z = self.front(x.transpose(1, 2)).transpose(1, 2)
        return z if self.spec.batch_first else z.transpose(0, 1)

    def _packed(self, z: Tensor) -> Any:
        lengths = torch.arange(TIME - len(z) + 1, TIME + 1).clamp_min(1)
        return pack_padded_sequence(z, lengths, True, enforce_sorted=False) if self.spec.packed else z

    def _start(self, x: Tensor, z: Tensor) -> Any:
        spec, batch = self.spec, x.shape[0]
        if spec.start == "none":
            return None
        if spec.start == "fed on":
            return self.encoder(z)[1]
        if spec.start in {"zeros", "ones"}:
            fill = torch.zeros if spec.start == "zeros" else torch.ones
            made = [fill(self.count, batch, n, dtype=x.dtype) for n in (self.given, self.hidden)]
        elif spec.start == "learned":
            states = [state for state in (self.first, self.second) if state is not None]
            made = [state.expand(-1, batch, -1).contiguous() for state in states]
        else:
            made = [layer(x[:, 0]).unsqueeze(0).repeat(self.count, 1, 1) for layer in self.starts]
        return (made[0], made[1]) if spec.kind == "LSTM" else made[0]

    def _read(self, output: Tensor, states: Any, z: Tensor) -> Tensor:
        back = self.spec.back
        if back == "states":
            last = states[0] if isinstance(states, tuple) else states
            return last.transpose(0, 1).flatten(1)
        if back == "attention":
            weights = F.softmax(self.query(output), 1)
            return (weights * output).sum(1)
        if back == "cells":
            state = None
            for step in range(output.shape[1]):
                state = self.cell(output[:, step], state)
            return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]
        if back == "residual":
            return output + self.beside(z[:, : output.shape[1]])
        if back == "both directions" and self.spec.both:
            return output[..., : self.given] * output[..., self.given :]
        return output[:, -1] if back == "last step" else output
