"""The Trainer of transformers: gradual masks with distillation, then LoRA on the sparse model, merged. A minute.

The digits are texts here: 64 pixels are 64 tokens of 17 grey values.
"""

from __future__ import annotations

import copy

import torch
from parts import digits, options
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import prunella as pr


def texts(data: TensorDataset) -> list[dict[str, object]]:
    images, labels = data.tensors
    tokens = (images * 16).long().flatten(1)
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(tokens, labels, strict=True)]


def main() -> None:
    given = options(__doc__)
    train, test = (texts(part) for part in digits())
    config = BertConfig(
        vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=10,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    dense = BertForSequenceClassification(config)

    def fit(model: torch.nn.Module, steps: int, lr: float, *callbacks: object) -> Trainer:
        arguments = TrainingArguments(
            str(given.out), max_steps=2 if given.quick else steps, learning_rate=lr, per_device_train_batch_size=32,
            report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=train, callbacks=list(callbacks))
        trainer.train()
        return trainer

    def right(model: torch.nn.Module) -> float:
        tokens, labels = torch.stack([x["input_ids"] for x in test]), torch.tensor([x["labels"] for x in test])
        with torch.no_grad():
            return float((model.eval()(input_ids=tokens).logits.argmax(1) == labels).float().mean())

    fit(dense, 600, 1e-3)
    sparse = copy.deepcopy(dense)
    gradual = pr.integrations.Gradual(
        pr.Recipe(granularity=pr.Element()), pr.Sparsity(0.7), {"input_ids": train[0]["input_ids"][None]}, steps=0.7
    )
    pruning = pr.integrations.TrainerPruning(gradual, distillation=pr.integrations.Distillation(dense, alpha=0.5))
    fit(sparse, 200, 5e-4, pruning)
    pruned = right(sparse)

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(sparse, LoraConfig(r=4, target_modules=["query", "value"]))
    pr.recovery.mask_adapters_(adapted)  # what was pruned stays pruned
    fit(adapted, 100, 1e-3)
    pr.recovery.merge_adapters_(adapted)
    plain = adapted.get_base_model()
    zeros = float((plain.bert.encoder.layer[0].attention.self.query.weight == 0).float().mean())
    print(f"accuracy {right(dense):.3f} dense, {pruned:.3f} pruned, {right(plain):.3f} with adapters merged")
    print(f"{zeros:.0%} of a query matrix are zero")


if __name__ == "__main__":
    main()
