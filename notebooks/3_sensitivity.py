# %% [markdown]
# # Sensitivity and allocation
#
# Layers differ: one bears to lose half of its channels, another one does not. You measure it, and let a solver choose
# how much goes where.

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import prunella as pr

torch.manual_seed(0)
data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(data.target)


def network():
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


dense = network()
optimizer = torch.optim.AdamW(dense.parameters(), lr=2e-3)
for epoch in range(10):
    for rows in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(64):
        optimizer.zero_grad()
        cross_entropy(dense.train()(images[rows]), labels[rows]).backward()
        optimizer.step()
dense.eval()


@torch.no_grad()
def accuracy(model, rows=slice(1500, None)):
    return float((model.eval()(images[rows]).argmax(1) == labels[rows]).float().mean())


def judge(model):
    """What the search looks at: images that the test does not have."""
    return accuracy(model, slice(1200, 1500))


print(f"dense: {accuracy(dense):.1%}")

# %% [markdown]
# ## A scan
#
# Each group is cut alone, to several sizes, and the network is judged. That is the *sensitivity* of the group.

# %%
batches = [images[rows] for rows in torch.arange(512).split(64)]
recipe = pr.Recipe(pr.criteria.group_norm)
space = pr.search.space(dense, batches[0], recipe)
scan = pr.search.scan(space, judge, ratios=(0.25, 0.5, 0.75))
print(scan)

# %%
figure, axes = plt.subplots(figsize=(6, 3.5))
for name, curve in scan.curves.items():
    removed, quality = zip((0.0, scan.base), *curve, strict=True)
    axes.plot(removed, quality, marker="o", label=f"layer {name}")
axes.set_xlabel("removed share of the group")
axes.set_ylabel("accuracy, no recovery")
axes.legend()
plt.show()

# %% [markdown]
# ## An allocation
#
# The knapsack takes these curves as losses and the multiply-adds as weights, and finds the best choice under a budget
# exactly. Uniform takes the same share everywhere.


# %%
def recovered(allocation):
    plan = pr.plan(dense, batches[0], pr.Recipe(pr.criteria.group_norm, allocation=allocation), target=pr.MACs(0.4))
    small = pr.shrink(dense, plan)
    cut = accuracy(small)
    pr.reconstruct(small, dense, batches, plan)
    return plan, cut, accuracy(small)


found = pr.search.knapsack(space, pr.MACs(0.4), scan)
results = {"uniform": recovered(pr.uniform), "knapsack on the scan": recovered(found.allocation)}
for name, (plan, cut, again) in results.items():
    share = plan.after.macs / plan.before.macs
    print(f"{name:22} {share:.0%} of the multiply-adds: {cut:.1%} cut, {again:.1%} recovered")

# %%
figure, axes = plt.subplots(figsize=(6, 3.5))
for place, (name, (plan, _, _)) in enumerate(results.items()):
    shares = [plan.keep[group].float().mean().item() for group in plan.keep]
    axes.bar([k + 0.4 * place for k in range(len(shares))], shares, width=0.38, label=name)
axes.set_xticks([k + 0.2 for k in range(len(plan.keep))], list(plan.keep))
axes.set_ylabel("kept share")
axes.legend()
plt.show()

# %% [markdown]
# Next: [gradual pruning and sparse training](4_sparse_training.py).
# More: [allocation and search](../docs/allocation_search.md).
