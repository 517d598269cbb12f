"""A small task for guards: batches for a tiny Llama, training with the Trainer, adapters."""

from copy import deepcopy

import oracles
import torch


def batch(rows=3, length=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def dataset(rows=24, seed=5):
    return [{key: value[0] for key, value in batch(1, seed=seed + row).items()} for row in range(rows)]


def llama(**changes):
    return oracles.make("llama", **changes)


def adapted(model=None, rank=2):
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(deepcopy(model or llama()), config)


def moved(model, size=0.05):
    """The model some way off, so that its answers differ from the reference's."""
    other = deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in other.parameters():
            p += size * torch.randn(p.shape, generator=generator).to(p)
    return other


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trainer(model, folder, callbacks, **options):
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 0.05,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "optim": "sgd", "lr_scheduler_type": "constant", "seed": 1, "data_seed": 1,
    }  # fmt: skip
    evaluated = options.pop("eval_dataset", None)
    arguments = TrainingArguments(**{**settings, **options})
    return Trainer(model, arguments, train_dataset=dataset(), eval_dataset=evaluated, callbacks=callbacks)
