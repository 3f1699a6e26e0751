# %% [markdown]
# # What coupling is
#
# A channel is not in one layer. It is made by one layer, passes through others, and is read by the next ones. If you
# remove it in one place, you must remove it everywhere. A set of such places is a *group*. You will see groups in a
# residual network, and see that the smaller network is exact.

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import nn

import prunella as pr
from prunella.graph.solve.groups import couple

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.blocks(torch.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


net, x = Net().eval(), torch.randn(2, 3, 16, 16)

# %% [markdown]
# ## The groups
#
# `couple`, which every plan begins with, runs the model once and finds what belongs together. The stem and the second
# convolution of every block write to one stream, because of the additions: they are one group. The first convolution of
# a block has a group of its own.

# %%
for group in couple(net, x).groups:
    print(f"{group.name}: {group.size} units")
    made = [member.entity for member in group.members if member.role == "out"]
    read = [member.entity for member in group.members if member.role == "in"]
    print(f"    made by {', '.join(made)}; read by {', '.join(read)}; {len(group.members)} places in all")

# %% [markdown]
# ## Smaller, and the same function
#
# Set the removed channels to zero in every place of their group, and the network computes what the smaller one does.
# The tool checks it itself before it returns the model. Here you check it again.

# %%
plan = pr.plan(net, x, pr.Recipe(pr.magnitude), target=pr.MACs(0.5))
small = pr.shrink(net, plan)
masked = pr.apply_(copy.deepcopy(net), plan)
difference = (small(x) - masked(x)).abs().max()
print(plan)
print(f"largest difference between the smaller and the masked network: {difference:.1e}")
print("head reads", small.head.in_features, "channels, the stem makes", small.stem.out_channels)

# %% [markdown]
# ## What was cut where

# %%
widths = {name: module.out_channels for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
kept = {name: module.out_channels for name, module in small.named_modules() if isinstance(module, nn.Conv2d)}
figure, axes = plt.subplots(figsize=(6, 3))
axes.bar(list(widths), list(widths.values()), color="lightgray", label="dense")
axes.bar(list(kept), list(kept.values()), color="tab:purple", label="kept")
axes.tick_params(axis="x", rotation=60)
axes.set_ylabel("channels")
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# The layers of the stream keep the same channels: stem, and the second convolution of both blocks. That is coupling.
#
# Next: [sensitivity and allocation](3_sensitivity.py).
