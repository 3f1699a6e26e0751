"""Prune a model that is larger than the memory of the process: a Llama of 3 GB under an address space of 2 GB.

    python benchmarks/streaming.py [--gigabytes 3] [--limit 2] [--method wanda] [--folder /somewhere]

A synthetic Llama of wide layers is written shard by shard: float32, random, from one table of values, so that it takes
seconds. A process with RLIMIT_AS then shows that the full model cannot be had there, and prunes it to 2:4 block by
block. The limit counts everything: libraries (about 0.8 GB of it), stacks, files that are mapped. The result is checked
shard by shard. Needs twice the gigabytes on disk, which are freed at the end. Figures go to results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunella.io.files import write_atomic
from prunella.io.tensor_file import INDEX, read_folder
from prunella.llm.streaming.shards import shard_name, write_shard

RESULTS = Path(__file__).parent / "results" / "streaming.json"


def config(width: int, blocks: int, vocabulary: int = 1024) -> dict[str, Any]:
    """A Llama whose matrices are all `width` by `width`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": width,
        "num_hidden_layers": blocks, "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
        "vocab_size": vocabulary, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
    }  # fmt: skip


def write_model(folder: Path, *, width: int, blocks: int) -> int:
    """Write it shard by shard; how many bytes of weights it has."""
    made = config(width, blocks)
    folder.mkdir(parents=True)
    table = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) / width**0.5
    places: dict[str, str] = {}
    for number in range(blocks + 1):
        name = shard_name(number + 1, blocks + 1)
        shard = _block(number, width, table) if number < blocks else _rest(made, table)
        write_shard(folder / name, shard)
        places |= dict.fromkeys(shard, name)
    (folder / "config.json").write_text(json.dumps(made))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(stored.size for stored in read_folder(folder).values())


def _block(number: int, width: int, table: Tensor) -> dict[str, Tensor]:
    prefix, made = f"model.layers.{number}", {}
    for k, name in enumerate(("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")):
        made[f"{prefix}.{name}_proj.weight"] = _values((width, width), table, 7 * number + k)
    made[f"{prefix}.mlp.down_proj.weight"] = _values((width, width), table, 7 * number + 6)
    for name in ("input_layernorm", "post_attention_layernorm"):
        made[f"{prefix}.{name}.weight"] = torch.ones(width)
    return made


def _rest(made: dict[str, Any], table: Tensor) -> dict[str, Tensor]:
    shape = (made["vocab_size"], made["hidden_size"])
    embedding, head = (_values(shape, table, 10**6 + k) for k in range(2))
    norm = torch.ones(made["hidden_size"])
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": norm}


def _values(shape: tuple[int, int], table: Tensor, seed: int) -> Tensor:
    """The table again and again, each matrix from another place on."""
    size = shape[0] * shape[1]
    shift = seed * 7919 % len(table)
    return table.roll(shift).repeat(-(-size // len(table)))[:size].reshape(shape).contiguous()


LIMITED = """
import json, resource, sys
source, output, limit, size, method = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from functools import partial
import torch
import prunella as pr
from prunella.io.load import import_module
import_module("transformers").LlamaForCausalLM  # what the libraries take is taken
try:
    torch.empty(size, dtype=torch.uint8)
    sys.exit("the full model fits under this limit: nothing is shown")
except (RuntimeError, MemoryError):
    pass
data = [{"input_ids": torch.randint(0, 1024, (1, 64), generator=torch.Generator().manual_seed(k))} for k in range(4)]
wanda = partial(pr.solvers.by_score, score=pr.wanda)
solvers = {"wanda": wanda, "sparsegpt": pr.solvers.sparsegpt, "admm": pr.solvers.admm}
def told(step):
    print(step, file=sys.stderr, flush=True)
found = pr.llm.solve_folder(
    source, output, pr.llm.OneShot(pr.NM(2, 4), method=solvers[method]), data=data, memory=limit, on_block=told
)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "predicted_bytes": found.peak.bytes, "most_resident_bytes": found.most, "seconds": found.seconds,
    "most_address_space_bytes": int(status["VmPeak"].split()[0]) * 1024, "sparsity": found.solving.sparsity,
}))
"""


def prune(source: Path, output: Path, *, limit: int, size: int, method: str) -> dict[str, Any]:
    """Prune in a process with this much address space; what it said."""
    words = [sys.executable, "-c", LIMITED, str(source), str(output), str(limit), str(size), method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def check(source: Path, output: Path) -> None:
    """Every tensor is there, those of the blocks 2:4, the others as they were."""
    before, after = read_folder(source), read_folder(output)
    assert before.keys() == after.keys()
    for name, stored in after.items():
        value = stored.read()
        if name.endswith("_proj.weight"):
            assert bool((value.view(-1, 4) == 0).sum(1).eq(2).all()), name
        else:
            assert value.equal(before[name].read()), name


def main() -> None:
    """Write the model, prune it under the limit, check it, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--method", default="wanda", choices=["wanda", "sparsegpt", "admm"])
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    blocks = int(-(-options.gigabytes * 1e9 // (7 * options.width**2 * 4)))
    if shutil.disk_usage(folder).free < 2.5e9 * options.gigabytes:
        sys.exit(f"{folder} does not have {2.5 * options.gigabytes:.0f} GB free")
    try:
        start = time.perf_counter()
        size = write_model(folder / "in", width=options.width, blocks=blocks)
        written = time.perf_counter() - start
        limit = int(options.limit * 1e9)
        found = prune(folder / "in", folder / "out", limit=limit, size=size, method=options.method)
        check(folder / "in", folder / "out")
    finally:
        shutil.rmtree(folder)
    found = {"weights_bytes": size, "limit_bytes": limit, "blocks": blocks, "width": options.width,
             "method": options.method, "writing_s": written, "torch": torch.__version__, **found}  # fmt: skip
    write_atomic(RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
