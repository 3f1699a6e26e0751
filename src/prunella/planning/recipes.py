"""Named papers as compositions of parts, in order of increasing complexity.

`named("fpgm")` is the recipe of that name; `named("taylor")`, the name of a criterion, is that criterion with the
defaults of `Recipe`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prunella import criteria
from prunella.allocation import Normalize, erk, global_, lamp, per_round, uniform
from prunella.errors import RequestError, suggesting
from prunella.granularity import NM, Channel, Element, Expert, Head, Width
from prunella.planning.recipe import Recipe
from prunella.registry.method import REGISTRY, find, recipe


@recipe(source="Han et al. 2015, arXiv:1506.02626")
def global_magnitude() -> Recipe:
    """Single weights by magnitude, one ranking over all layers.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.global_magnitude(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: single weights after training, up to about 90 %; the baseline to beat. Avoid: very high sparsity, where it
    empties layers: take `lamp_magnitude` or `erk_magnitude`.
    """
    return Recipe(criteria.magnitude, Element(), global_)


@recipe(source="Evci et al. 2020, arXiv:1911.11134")
def erk_magnitude() -> Recipe:
    """Single weights by magnitude, densities by Erdos-Renyi-Kernel.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.erk_magnitude(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: masks at 90 % and more, where small layers must stay dense. Avoid: structure, or when multiply-adds are the
    budget: the early layers stay dense.
    """
    return Recipe(criteria.magnitude, Element(), erk)


@recipe(source="Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134")
def erk_random() -> Recipe:
    """Single weights at random, densities by Erdos-Renyi-Kernel: the masks from which dynamic sparse training starts.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.erk_random(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: the first masks of `DropGrow` with `set_` or `rigl`, and as its static control. Avoid: a trained network, whose
    important weights it removes too.
    """
    return Recipe(criteria.random, Element(), erk)


@recipe(source="Frankle and Carbin 2019, arXiv:1803.03635")
def ticket_magnitude() -> Recipe:
    """Single weights by magnitude within each layer, the last layer at half the rate: one round of a lottery ticket.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.ticket_magnitude(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: the masks of tickets at any sparsity; `imp` calls it round by round. Avoid: networks whose layers differ much
    in what they can spare: take `global_magnitude`.
    """
    return Recipe(criteria.magnitude, Element(), per_round)


@recipe(source="Lee et al. 2021, arXiv:2010.07611")
def lamp_magnitude() -> Recipe:
    """Single weights by layer-adaptive magnitude: the allocation of LAMP on the absolute value.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.lamp_magnitude(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: masks at high sparsity without a knob to tune. Avoid: structured units: its keys are made for single weights.
    """
    return Recipe(criteria.magnitude, Element(), lamp)


@recipe(source="Sun et al. 2023, arXiv:2306.11695")
def wanda_rows() -> Recipe:
    """Wanda as in the paper: weights of one output row compared, the same number from every row. Data: no labels.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> plan = pr.plan(model, x, pr.recipes.wanda_rows(), target=pr.Sparsity(0.5), data=[x])
        >>> plan.masks["0.weight"].sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]

    Use: language models in one shot, up to about 50 %. Avoid: 60 % and more without reconstruction.
    """
    return Recipe(criteria.wanda, Element(per_row=True), uniform)


@recipe(source="Sun et al. 2023, arXiv:2306.11695")
def wanda_2_4() -> Recipe:
    """Wanda in the pattern of sparse tensor cores: 2 kept of every 4 along the input. Data: no labels.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> plan = pr.plan(model, x, pr.recipes.wanda_2_4(), data=[x])
        >>> plan.masks["0.weight"].sum(1).tolist()
        [2, 2, 2, 2, 2, 2, 2, 2]

    Use: sparse tensor cores, in one shot, with some unlabeled text. Avoid: machines without kernels for 2:4: the zeros
    are multiplied there.
    """
    return Recipe(criteria.wanda, NM(2, 4), uniform)


@recipe(source="Li et al. 2017, arXiv:1608.08710")
def l1_filter() -> Recipe:
    """Filters by their L1 norm, the same fraction of every group.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.l1_filter(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: the simplest structured baseline, no data. Avoid: high reductions: every group loses the same fraction,
    regardless of its importance.
    """
    return Recipe(criteria.magnitude, Channel(), uniform)


@recipe(source="He et al. 2019, arXiv:1811.00250")
def fpgm() -> Recipe:
    """Filters nearest to the geometric median of their layer, the same fraction of every group.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.fpgm(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: filters without data, in layers with many similar filters. Avoid: groups with a few wide outliers, whose
    distance hides their importance.
    """
    return Recipe(criteria.geometric_median, Channel(), uniform)


@recipe(source="Liu et al. 2017, arXiv:1708.06519")
def network_slimming() -> Recipe:
    """Channels by the scale of their batch normalization, one threshold for the network.

    The paper trains with an L1 penalty on the scales first. A tenth of each group is kept, so that no layer collapses.

    Use: networks that were trained with an L1 penalty on the scales. Avoid: networks without batch normalization, or
    trained without the penalty.
    """
    return Recipe(criteria.bn_scale, Channel(), global_, min_density=0.1)


@recipe(source="Fang et al. 2023, arXiv:2301.12900")
def group_l2() -> Recipe:
    """Channels and heads by the norm of everything that is coupled to them, compared after division by the mean.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.group_l2(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: a fair ranking over the full network without data. Avoid: networks whose norms were folded into the weights:
    scales of layers then differ for no reason.
    """
    allocation = partial(global_, normalize=Normalize.MEAN)
    return Recipe(criteria.group_norm, (Channel(), Head()), allocation, min_density=0.1)


@recipe(source="Molchanov et al. 2019, arXiv:1906.10771; Michel et al. 2019, arXiv:1905.10650")
def taylor_fo() -> Recipe:
    """Channels and heads by the squared first-order change of the loss, one ranking. Data: batches and a loss.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> plan = pr.plan(model, x, pr.recipes.taylor_fo(), target=pr.Sparsity(0.5), data=[x], loss=loss)
        >>> print(plan.outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: channels and heads when a few labeled batches are at hand and all layers are ranked together. Avoid: no loss
    at hand, or batches too few to average over.
    """
    return Recipe(criteria.taylor, (Channel(), Head()), global_)


@recipe(source="Lee et al. 2019, arXiv:1810.02340")
def snip_global() -> Recipe:
    """SNIP as in the paper: single weights, one ranking, layers may empty. Data: batches and a loss.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> plan = pr.plan(model, x, pr.recipes.snip_global(), target=pr.Sparsity(0.5), data=[x], loss=loss)
        >>> print(plan.outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: one cut before training. Avoid: beyond about 95 %: `iterative_snip` and `force` take many rounds.
    """
    return Recipe(criteria.snip, Element(), global_, min_units=0)


@recipe(source="Wang et al. 2020, arXiv:2002.07376")
def grasp_global() -> Recipe:
    """GraSP as in the paper: single weights, one ranking, layers may empty. Data: few batches and a loss.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> plan = pr.plan(model, x, pr.recipes.grasp_global(), target=pr.Sparsity(0.5), data=[x], loss=loss)
        >>> print(plan.outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: one cut before training at high sparsity. Avoid: much data at once: the graphs of all batches are kept.
    """
    return Recipe(criteria.grasp, Element(), global_, min_units=0)


@recipe(source="Tanaka et al. 2020, arXiv:2006.05467")
def synflow_global() -> Recipe:
    """SynFlow in a single round: single weights, one ranking, layers may empty. Data: none.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.synflow_global(), target=pr.Sparsity(0.5)).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: to see why the paper takes a hundred rounds. Avoid: pruning with it: take `synflow_rounds`.
    """
    return Recipe(criteria.synflow, Element(), global_, min_units=0)


@recipe(source="Ma et al. 2023, arXiv:2305.11627", status="stable")
def llm_pruner() -> Recipe:
    """Heads and neurons of a transformer by the absolute first-order change of the loss, the same share of each layer.

    Query, key, value and output slices go together, and so do gate, up and down. The paper takes the gradient of a few
    short texts, leaves the first and last blocks dense (skip=) and recovers with LoRA. Data: batches and a loss.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> loss = lambda model, batch: model(batch).square().mean()
        >>> plan = pr.plan(model, x, pr.recipes.llm_pruner(), target=pr.Sparsity(0.5), data=[x], loss=loss)
        >>> print(plan.outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: language models that have to stay in an ordinary format. Avoid: beyond about a fifth without recovery.
    """
    return Recipe(criteria.taylor_abs, (Channel(), Head()), uniform, equal_widths=True)


@recipe(source="An et al. 2024, arXiv:2312.11983 (WIFV, the same share of every layer)", status="stable")
def flap() -> Recipe:
    """Heads and neurons of a transformer by the fluctuation of their readers' inputs, the same share of each layer.

    Removed units are replaced by their means: plan and shrink a model `with_biases`, then `fold_means`; or refit by
    `match_stream_`. The paper's other form, whose layers differ in width, is `flap_global`. Data: no labels.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> print(pr.plan(model, x, pr.recipes.flap(), target=pr.Sparsity(0.5), data=[x]).outcome)
        asked sparsity=0.5, got sparsity=0.5

    Use: language models without training. Avoid: without either compensation.
    """
    return Recipe(criteria.fluctuation, (Channel(), Head()), uniform, equal_widths=True)


@recipe(source="An et al. 2024, arXiv:2312.11983 (WIFV, adaptive over layers)")
def flap_global() -> Recipe:
    """Heads and neurons by fluctuation, standardized in each group and ranked together: layers differ in width.

    No group loses more than nine tenths. Removed units are replaced by their means, as in `flap`. Data: no labels.

    Use: the better form of FLAP if layers may differ. Avoid: if plain `from_pretrained` has to read the result.
    """
    allocation = partial(global_, normalize=Normalize.STANDARD)
    return Recipe(criteria.fluctuation, (Channel(), Head()), allocation, min_density=0.1)


@recipe(source="Muralidharan et al. 2024, arXiv:2407.14679")
def minitron() -> Recipe:
    """Neurons, heads (key-value groups) and the residual stream by the size of their activations, the same share each.

    One pass without labels ranks all three: root mean square where the layers that read a unit multiply it; the paper
    takes norms over the batch and means over positions. For its depth, `block_influence` or `greedy_blocks`. The paper
    distills afterwards: `distill_lm_`. Data: no labels.

    Use: a smaller model of the same architecture, recovered on much text. Avoid: without recovery.
    """
    return Recipe(criteria.activation_norm, (Channel(), Head(), Width()), uniform, equal_widths=True)


@recipe(source="Lasby et al. 2025, arXiv:2510.13999")
def reap_experts() -> Recipe:
    """Experts of a mixture by their contribution to the tokens routed to them, the same share of each layer.

    The router chooses among the kept experts. Data: no labels.

    Use: mixtures in one shot. Avoid: fewer tokens than a few hundred for each expert.
    """
    return Recipe(criteria.reap, Expert(), uniform, equal_widths=True)


def named(name: str) -> Recipe:
    """The recipe of that name, or the criterion of that name with the defaults. Errors: RequestError, with near names.

    A criterion's default granularity is `Channel()`, its default allocation `uniform`.

    Example:

        >>> import prunella as pr
        >>> pr.recipes.named("fpgm") == pr.recipes.fpgm()
        True
    """
    method = find(name)
    if method.kind == "recipe":
        recipe = method.function()
        assert isinstance(recipe, Recipe)
        return recipe
    if method.kind == "criterion":
        return Recipe(method.function)
    known = sorted(m.name for m in REGISTRY.values() if m.kind in ("recipe", "criterion"))
    raise RequestError(f"{name} is of kind {method.kind}, not a recipe or a criterion", f"known are {', '.join(known)}")


__all__ = [
    "erk_magnitude",
    "erk_random",
    "flap",
    "flap_global",
    "fpgm",
    "global_magnitude",
    "grasp_global",
    "group_l2",
    "l1_filter",
    "lamp_magnitude",
    "llm_pruner",
    "minitron",
    "named",
    "network_slimming",
    "reap_experts",
    "snip_global",
    "synflow_global",
    "taylor_fo",
    "ticket_magnitude",
    "wanda_2_4",
    "wanda_rows",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
