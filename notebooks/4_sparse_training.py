# %% [markdown]
# # Gradual pruning and sparse training
#
# Three ways to end with nine of ten weights at zero: all at once, gradually while you train, and sparse from the first
# step with weights that are dropped and grown (RigL).

# %%
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import prunella as pr

data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(data.target)
STEPS = 480


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def batches(steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randint(1500, (64,), generator=generator)


@torch.no_grad()
def accuracy(model):
    return float((model(images[1500:]).argmax(1) == labels[1500:]).float().mean())


def zeros(model):
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def train(model, on_step=lambda optimizer: lambda: None, steps=STEPS):
    """Returns the accuracy and the share of zeros every 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step, history = on_step(optimizer), []
    for number, rows in enumerate(batches(steps)):
        optimizer.zero_grad()
        cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        step()
        if number % 20 == 19:
            history.append((number + 1, accuracy(model), zeros(model)))
    return history


# %% [markdown]
# ## All at once
#
# The network is trained, cut by magnitude, and not trained on.

# %%
target, x = pr.Sparsity(0.9), images[:2]
once = network()
histories = {"at once": train(once)}
pr.apply_(once, pr.plan(once, x, pr.Recipe(pr.magnitude, pr.Element()), target=target))
print(f"at once: {zeros(once):.0%} zeros, {accuracy(once):.1%}")
histories["at once"].append((STEPS + 20, accuracy(once), zeros(once)))

# %% [markdown]
# ## Gradually
#
# `Pruner` raises the sparsity along a cubic curve and keeps pruned weights at zero after each step of the optimizer,
# its momentum included. It is one line in your loop.

# %%
gradual = network()


def gradually(optimizer):
    recipe = pr.Recipe(pr.magnitude, pr.Element())
    pruner = pr.Pruner(gradual, optimizer, recipe=recipe, target=target, inputs=x, steps=360, every=20)
    return pruner.step


histories["gradual"] = train(gradual, gradually)
print(f"gradual: {zeros(gradual):.0%} zeros, {accuracy(gradual):.1%}")

# %% [markdown]
# ## Sparse from the start
#
# RigL never has more than a tenth of the weights. Every 20 steps it drops the smallest ones and grows as many where the
# gradient is largest.

# %%
sparse = network()
pr.apply_(sparse, pr.plan(sparse, x, pr.recipes.erk_random(), target=target))


def dropping_and_growing(optimizer):
    return pr.train.DropGrow(sparse, optimizer, rule=pr.train.rigl(alpha=0.3), steps=360, every=20).step


histories["RigL"] = train(sparse, dropping_and_growing)
print(f"RigL: {zeros(sparse):.0%} zeros, {accuracy(sparse):.1%}")

# %%
figure, (upper, lower) = plt.subplots(2, figsize=(6, 5), sharex=True)
for name, history in histories.items():
    steps, right, share = zip(*history, strict=True)
    upper.plot(steps, right, label=name)
    lower.plot(steps, share, label=name)
upper.set_ylabel("accuracy")
upper.set_ylim(0.5, 1)
upper.legend()
lower.set_ylabel("share of zeros")
lower.set_xlabel("step")
plt.show()

# %% [markdown]
# Next: [a language model: 2:4 and depth](5_language_model.py). More: [in training loops](../docs/training_loops.md).
