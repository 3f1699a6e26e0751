"""A language model on the command line: masks, depth, neurons; then `eval` and `chat`. Two minutes.

A small model with a tokenizer of its own learns the help texts of Python first; give --model for one of yours.
"""

from __future__ import annotations

import io
import pydoc_data.topics
import sys
from pathlib import Path

import torch
from parts import options

from prunella.cli import main as prunella


def tiny_model(folder: Path, text: Path, steps: int) -> None:
    """A Llama of four blocks, trained on the text."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(text)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    ))  # fmt: skip
    tokens = torch.tensor(fast(text.read_text(), verbose=False).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (16,)).tolist()
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def line(*words: str) -> None:
    """One line of the command line."""
    print(f"\n$ prunella {' '.join(words)}", flush=True)
    try:
        prunella(words)
    except SystemExit as ended:
        if ended.code:
            raise


def main() -> None:
    given = options(__doc__)
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    train, other = given.out / "train.txt", given.out / "other.txt"
    train.write_text(topics[:200_000])
    other.write_text(topics[200_000:240_000])
    dense = str(given.out / "dense")
    tiny_model(Path(dense), train, 3 if given.quick else 400)
    text = ("--data", str(train), "--text", str(other), "--nsamples", "4" if given.quick else "32", "--seqlen", "64",
            "--eval-samples", "2" if given.quick else "16", "--eval-seqlen", "128")  # fmt: skip
    steps = "2" if given.quick else "100"
    line("llm", dense, "--pattern", "2:4", *text, "-o", str(given.out / "masks"))
    line("llm", dense, "--granularity", "depth", "--target", "params=0.85", "--recover", f"match,lora:{steps}", *text,
         "-o", str(given.out / "depth"))  # fmt: skip
    line("llm", dense, "--granularity", "channel", "--target", "params=0.85", *text, "-o", str(given.out / "width"))
    line("eval", str(given.out / "depth"), "--data", str(other), "--eval-seqlen", "128")
    sys.stdin = io.StringIO("The import statement\n")
    line("chat", str(given.out / "depth"), "--new", "30")


if __name__ == "__main__":
    main()
