# %% [markdown]
# # Deploy and measure
#
# A smaller number of multiply-adds is a promise; a shorter time is a fact. You measure a pruned network beside the
# dense one, export it, and try sparse kernels. The tool says so where this device gains nothing.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import prunella as pr
from prunella.app.backends import bench_pair

torch.manual_seed(0)
torch.set_num_threads(1)
dense = nn.Sequential(
    nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
).eval()  # fmt: skip
x = torch.randn(1, 3, 32, 32)

# %% [markdown]
# ## Time against multiply-adds
#
# Both networks run in turn, so that other work on the machine meets both. The bar is the ratio, with its interval.

# %%
ratios, speed, low, high = (0.75, 0.5, 0.25), [], [], []
for ratio in ratios:
    recipe = pr.Recipe(pr.criteria.group_norm, round_to=8)  # widths that kernels like
    small = pr.shrink(dense, pr.plan(dense, x, recipe, target=pr.MACs(ratio)))
    timed = bench_pair(dense, small, x, backends=("eager",), threads=(1,), rounds=15)
    print(f"{ratio:.0%} of the multiply-adds: {timed.verdict}")
    row = timed.rows[0].ratio
    speed.append(row.value)
    low.append(max(0.0, row.value - row.low))
    high.append(max(0.0, row.high - row.value))

# %%
figure, axes = plt.subplots(figsize=(5, 3))
axes.errorbar(ratios, speed, yerr=[low, high], marker="o", color="tab:purple", label="measured")
axes.plot(ratios, [1 / ratio for ratio in ratios], color="lightgray", label="if time were multiply-adds")
axes.set_xlabel("share of the multiply-adds")
axes.set_ylabel("times as fast as dense")
axes.invert_xaxis()
axes.legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Export
#
# The file holds the smaller network alone, with a free batch size. It is checked against the module when it is written.

# %%
folder = Path(tempfile.mkdtemp())
print(pr.export(small, folder / "small.pt2", inputs=x))

# %% [markdown]
# ## Zeros, with kernels for them
#
# Scattered zeros save nothing in ordinary kernels. `pr.sparse` times sparse kernels against dense ones for each layer
# and keeps what is quicker, so that no model gets slower.

# %%
mlp = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)).eval()
tokens = torch.randn(64, 512)
plan = pr.plan(mlp, tokens, pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.9))
pr.finalize(pr.apply_(mlp, plan))
quick = pr.sparse(mlp, tokens, seconds=0.5)
print(pr.runtime.sparsified(quick))
with torch.inference_mode():
    print("largest difference of the outputs:", float((quick(tokens) - mlp(tokens)).abs().max()))

# %% [markdown]
# More: [deployment](../docs/deployment.md), [sparse inference](../docs/sparse_inference.md).
