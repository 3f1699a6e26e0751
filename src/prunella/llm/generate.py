"""Text written by a language model: the likeliest tokens, or drawn by their probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.io.load import import_transformers
from prunella.model.rng import seeded
from prunella.model.state import mode
from prunella.model.unwrap import unwrap


@torch.no_grad()
def continued(model: nn.Module, prompt: Tensor, *, new: int = 64, temperature: float = 0.0, seed: int = 0) -> Tensor:
    """The tokens `(written,)` that a model of transformers writes behind a prompt `(1, tokens)`.

    temperature: 0 takes the likeliest token each time; above 0 each token is drawn from `softmax(logits / T)`. seed: of
    the draws; the caller's generators are as before. The text ends at `new` tokens, at the model's end of text, or
    where its positions end. Errors: NotSupported for a model that cannot generate, RequestError for numbers out of
    range or a prompt as long as the positions.
    """
    root: Any = unwrap(model)
    if not hasattr(root, "generate") or not hasattr(root, "generation_config"):
        why = f"{type(root).__name__} has no generate()"
        raise NotSupported("the model cannot write text", why, "give a language model of transformers")
    if new < 1 or not 0 <= temperature < float("inf"):
        why = f"got {new} tokens and temperature {temperature:g}"
        raise RequestError("no text can be written", why, "at least 1 token, a temperature from 0 up")
    limit = getattr(root.config, "max_position_embeddings", None)
    room = limit - prompt.shape[1] if isinstance(limit, int) else new
    if room < 1:
        why = f"the prompt has {prompt.shape[1]} tokens, the model {limit} positions"
        raise RequestError("there is no room to write", why, "give a shorter prompt")
    config = _generation(root, min(new, room), temperature)
    tokens = prompt.to(next(root.parameters()).device)
    with mode(root, training=False), seeded(seed):
        written = root.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    result: Tensor = written[0, prompt.shape[1] :].cpu()
    return result


def _generation(root: Any, new: int, temperature: float) -> Any:
    """How to generate, with nothing of the model's own settings but where a text ends."""
    ends = root.generation_config.eos_token_id
    ends = getattr(root.config, "eos_token_id", None) if ends is None else ends
    first = ends[0] if isinstance(ends, list) and ends else ends
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return import_transformers().GenerationConfig(
        max_new_tokens=new, eos_token_id=ends, pad_token_id=0 if first is None else first, **drawn
    )
