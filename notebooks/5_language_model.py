# %% [markdown]
# # A language model: 2:4 and depth
#
# A small Llama learns the help texts of Python by letters. You prune its weights to 2:4 in one shot, by three methods,
# and drop whole blocks. It takes two minutes; a model of yours goes the same way.

# %%
import copy
import pydoc_data.topics

import matplotlib.pyplot as plt
import torch
import transformers

import prunella as pr

torch.manual_seed(0)
text = "\n\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
tokens = torch.tensor(list(text))
config = transformers.LlamaConfig(
    vocab_size=128, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
dense = transformers.LlamaForCausalLM(config)
STEPS = 500
optimizer = torch.optim.AdamW(dense.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
for _ in range(STEPS):
    starts = torch.randint(400_000 - 96, (16,)).tolist()
    batch = torch.stack([tokens[start : start + 96] for start in starts])
    optimizer.zero_grad()
    dense(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    schedule.step()
dense.eval()

calibration = [{"input_ids": tokens[k : k + 128][None]} for k in range(0, 32 * 1000, 1000)]
held_out = tokens[420_000:424_096]
print(pr.metrics.perplexity(dense, held_out, window=128))

# %% [markdown]
# ## 2:4, in one shot
#
# Two of every four weights in a row go. *Magnitude* keeps the larger two. *SparseGPT* lets the other weights of the row
# make up for what is gone. `one_shot` chooses the pattern while it fits the weights (ADMM) and then refines each block.


# %%
def by_solver(how):
    model = copy.deepcopy(dense)
    pr.llm.solve_(model, calibration[0], how, data=calibration)
    return model


models = {
    "dense": dense,
    "magnitude": pr.apply_(
        copy.deepcopy(dense),
        pr.plan(dense, calibration[0], pr.Recipe(pr.magnitude, pr.NM(2, 4)), only=["model.layers.*"]),
    ),
    "SparseGPT": by_solver(pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt)),
    "one_shot": by_solver(pr.llm.one_shot(pr.NM(2, 4))),
}
perplexities = {name: pr.metrics.perplexity(model, held_out, window=128).value for name, model in models.items()}
for name, value in perplexities.items():
    print(f"{name:10} {value:.3f}")

# %% [markdown]
# ## Depth
#
# Blocks differ too. `greedy_blocks` drops the block whose loss is least, by measuring it; `match_stream_` refits what
# is left to the residual stream of the dense model.

# %%
quality = pr.search.agreement(dense, calibration[:8], logits=True)
found = pr.search.greedy_blocks(dense, calibration[0], quality, count=1, data=calibration, among=6)
short = pr.shrink(dense, found.plan)
perplexities["five blocks"] = pr.metrics.perplexity(short, held_out, window=128).value
pr.llm.match_stream_(short, dense, calibration, found.plan)
perplexities["five blocks, matched"] = pr.metrics.perplexity(short, held_out, window=128).value
print(found)
print(f"{perplexities['five blocks']:.3f}, matched {perplexities['five blocks, matched']:.3f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3))
axes.barh(list(perplexities), list(perplexities.values()), color="tab:purple")
axes.invert_yaxis()
axes.set_xlabel("perplexity on held-out text, by letters")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## It writes
#
# The smaller model is an ordinary model of transformers, with its cache.

# %%
prompt = torch.tensor([list(b"The import statement")])
for name, model in {"dense": dense, "2:4": models["one_shot"], "five blocks": short}.items():
    written = model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
    print(f"{name:12} {bytes(written[0].tolist()).decode('ascii', 'replace')!r}")

# %% [markdown]
# Next: [deploy and measure](6_deploy.py).
# More: [one-shot pruning](../docs/llm.md), [depth and width](../docs/llm_structured.md).
