# %% [markdown]
# # First pruning
#
# You train a small network on the digits of scikit-learn, cut half of its multiply-adds, and see what it cost.
# It takes about a minute on a laptop.

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
train, test = slice(0, 1500), slice(1500, None)

# %% [markdown]
# ## A network and its training
#
# Nothing here is of prunella: it is your network and your loop.


# %%
def network(width=32):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def fit(model, epochs, lr=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            optimizer.zero_grad()
            cross_entropy(model.train()(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return float((model.eval()(images[test]).argmax(1) == labels[test]).float().mean())


dense = fit(network(), epochs=12)
print(f"dense: {accuracy(dense):.1%}")

# %% [markdown]
# ## One call
#
# `prune` measures what each cut costs, cuts channels to half of the multiply-adds, and refits what is left by least
# squares. It needs inputs, and no labels. It changes a copy.

# %%
batches = [images[rows] for rows in torch.arange(512).split(64)]
pruned = pr.prune(dense, batches[0], target=pr.MACs(0.5), data=batches)
print(pruned)
print(f"pruned: {accuracy(pruned.model):.1%}")

# %% [markdown]
# ## What became of each layer

# %%
print(pruned.plan)

# %%
before = [m.out_channels for m in dense if isinstance(m, nn.Conv2d)]
after = [m.out_channels for m in pruned.model if isinstance(m, nn.Conv2d)]
figure, axes = plt.subplots(figsize=(5, 3))
axes.bar([0, 1], before, color="lightgray", label="dense")
axes.bar([0, 1], after, color="tab:purple", label="kept")
axes.set_xticks([0, 1], ["first convolution", "second convolution"])
axes.set_ylabel("channels")
axes.legend()
plt.show()

# %% [markdown]
# ## The plain way, for comparison
#
# Magnitude cuts the channels with the smallest weights. Without recovery the network forgets much of what it knew; a
# little training brings it back.

# %%
plan = pr.plan(dense, batches[0], pr.Recipe(pr.magnitude), target=pr.MACs(0.5))
cut = pr.shrink(dense, plan)
rows = {"dense": accuracy(dense), "cut by magnitude": accuracy(cut)}
rows["trained for 3 epochs"] = accuracy(fit(cut, epochs=3, lr=1e-3))
rows["prune, no labels"] = accuracy(pruned.model)
figure, axes = plt.subplots(figsize=(5, 3))
axes.barh(list(rows), list(rows.values()), color=["lightgray", "tab:red", "tab:orange", "tab:purple"])
axes.set_xlabel("accuracy")
axes.set_xlim(0, 1)
plt.show()
for name, value in rows.items():
    print(f"{name:22} {value:.1%}")

# %% [markdown]
# ## It is an ordinary module
#
# It is saved with its plan, and loaded again without your class if you export it.

# %%
print(pruned.model)
print(pr.report(dense, pruned.model, batches[0], rounds=5))

# %% [markdown]
# Next: [what coupling is](2_coupling.py), or [the jobs](../docs/jobs.md).
