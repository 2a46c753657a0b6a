"""What each rank does with a framework: the same tiny model, the same data, a few steps. Runs in the environment
`frameworks`; every function returns the final weights and whatever else can be compared.

The data is cut so that ranks see, step by step, halves of the batches that one process sees: what SGD makes of it is
defined, and equal but for rounding.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import smdistributed_rs  # noqa: F401  registers the backend

STEPS, BATCH, WIDTH = 4, 8, 12


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.last(torch.tanh(self.first(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


class Data(torch.utils.data.Dataset):
    """Samples in order: ranks take every other one of a batch."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        x = torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))
        return {"x": x, "labels": x[:3].argmax()}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def weights(model: nn.Module) -> list[float]:
    """All parameters, by name."""
    named = sorted((name.removeprefix("module."), p) for name, p in model.named_parameters())
    return [value for _, p in named for value in p.detach().flatten().tolist()]


def batches_of(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    """A rank's part of every batch."""
    data = Data()
    return [collate([data[at] for at in range(step * BATCH + rank, (step + 1) * BATCH, size)]) for step in range(STEPS)]


def my_batches() -> list[dict[str, torch.Tensor]]:
    """This rank's part of every batch."""
    return batches_of(rank(), world())


def folder(name: str = "") -> str:
    """For what a framework writes, removed when this process ends; with a name, the same one for all ranks, which must
    be done with it before one of them ends."""
    found = (
        f"{tempfile.gettempdir()}/smddp-{name}-{os.environ.get('MASTER_PORT', 'one')}" if name else tempfile.mkdtemp()
    )
    atexit.register(shutil.rmtree, found, ignore_errors=True)
    return found


def plain() -> dict:
    """One process, no framework: what all are compared with."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in my_batches():
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return {"weights": weights(model)}


# ---- Hugging Face


def _trainer(**more: object) -> object:
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=folder(),
        per_device_train_batch_size=BATCH // world(),
        max_steps=STEPS,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        average_tokens_across_devices=False,
        **more,
    )
    return InOrder(model=Net(), args=arguments, train_dataset=Data(), eval_dataset=Data(), data_collator=collate)


def trainer(backend: str) -> dict:
    """Trainer on CPU: accelerate refuses unknown backends there, so the group is made first."""
    if world() > 1:
        dist.init_process_group(backend)
    made = _trainer(use_cpu=True)
    made.train()
    found = {"weights": weights(made.model), "eval": made.evaluate()["eval_loss"]}
    if world() > 1:
        found |= {"backend": dist.get_backend(), "distributed": str(made.accelerator.distributed_type)}
        dist.destroy_process_group()
    return found


def _ddp_on_cpu() -> None:
    """Drops the devices that clients made for GPUs give to DDP."""
    original = nn.parallel.DistributedDataParallel.__init__

    def on_cpu(self: nn.Module, *args: object, **kwargs: object) -> None:
        kwargs["device_ids"] = kwargs["output_device"] = None
        original(self, *args, **kwargs)

    nn.parallel.DistributedDataParallel.__init__ = on_cpu


def trainer_on_sagemaker() -> dict:
    """The SageMaker data-parallel path, as SM_FRAMEWORK_PARAMS chooses it: on CPU but for DDP's device_ids."""
    from transformers.utils import is_sagemaker_dp_enabled

    assert is_sagemaker_dp_enabled()
    _ddp_on_cpu()
    made = _trainer()
    assert "smdistributed.dataparallel.torch.torch_smddp" in sys.modules
    made.train()
    predicted = made.predict(Data()).predictions
    found = {"weights": weights(made.model), "eval": made.evaluate()["eval_loss"], "backend": dist.get_backend()}
    found |= {"mode": str(made.args.parallel_mode), "predictions": list(predicted.shape)}
    dist.destroy_process_group()
    return found


def accelerator(backend: str) -> dict:
    """accelerate by itself: prepare, backward, gather_for_metrics, reduce, save_state."""
    from accelerate import Accelerator

    if world() > 1:
        dist.init_process_group(backend)
    made = Accelerator(cpu=True)
    model = Net()
    loader = torch.utils.data.DataLoader(Data(), batch_size=BATCH // world(), collate_fn=collate)
    model, optimizer, loader = made.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    seen = []
    for batch in loader:
        optimizer.zero_grad()
        out = model(**batch)
        made.backward(out["loss"])
        optimizer.step()
        seen += made.gather_for_metrics(batch["labels"]).tolist()
    total = made.reduce(torch.tensor([1.0 + made.process_index]), reduction="sum").item()
    found = {"weights": weights(made.unwrap_model(model)), "labels": sorted(seen), "sum": total}
    found["objects"] = made.gather_for_metrics([made.process_index], use_gather_object=True)
    made.save_state(folder("accelerate"))
    if world() > 1:
        dist.barrier()
        found |= {"backend": dist.get_backend(), "distributed": str(made.distributed_type)}
        dist.destroy_process_group()
    return found


# ---- Lightning


def lightning(backend: str) -> dict:
    """DDPStrategy(process_group_backend=...), with values logged from all ranks, integers among them."""
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict, number: int) -> torch.Tensor:
            loss = self.net(**batch)["loss"]
            self.log("loss", loss, sync_dist=True)
            self.log("number", torch.tensor(number), sync_dist=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    # Lightning's own sampler for several ranks shuffles.
    sampler = torch.utils.data.DistributedSampler(Data(), world(), rank(), shuffle=False)
    loader = torch.utils.data.DataLoader(Data(), batch_size=BATCH // world(), collate_fn=collate, sampler=sampler)
    strategy = DDPStrategy(process_group_backend=backend) if world() > 1 else "auto"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world(),
        strategy=strategy,
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, loader)
    found = {"weights": weights(module.net), "number": float(trainer.callback_metrics["number"])}
    if world() > 1:
        found["backend"] = dist.get_backend()
        found["gathered"] = trainer.strategy.all_gather(torch.tensor(rank())).tolist()
        found["said"] = trainer.strategy.broadcast({"from": rank()})
        dist.destroy_process_group()
    return found


# ---- DeepSpeed


def deepspeed(backend: str, stage: int) -> dict:
    """ZeRO by its stage, with a checkpoint."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // world(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for batch in my_batches():
        loss = engine(**batch)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    saved = folder("deepspeed")
    engine.save_checkpoint(saved)
    engine.load_checkpoint(saved)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        found = {"weights": weights(engine.module), "losses": losses, "backend": dist.get_backend()}
    dist.barrier()
    dist.destroy_process_group()
    return found


# ---- MMEngine


def mmengine(way: str, backend: str) -> dict:
    """Runner with env_cfg's backend. MMEngine takes every smddp for CUDA: it is told otherwise in three places."""
    import mmengine.dist.utils
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    _ddp_on_cpu()
    torch.cuda.set_device = lambda _: None
    comm_device = mmengine.dist.utils.get_comm_device
    for module in [m for name, m in sys.modules.items() if name.startswith("mmengine")]:
        if getattr(module, "get_comm_device", None) is comm_device:
            module.get_comm_device = lambda group=None: torch.device("cpu")

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> dict[str, torch.Tensor]:
            return {"loss": self.net(x, labels)["loss"]}

    runner = Runner(
        model=Model(),
        work_dir=folder(),
        train_dataloader={
            "dataset": Data(),
            "batch_size": BATCH // world() if way != "mpi" else BATCH // int(os.environ["OMPI_COMM_WORLD_SIZE"]),
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": collate,
            "num_workers": 0,
        },
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        launcher=way,
        env_cfg={"dist_cfg": {"backend": backend}},
        default_hooks={"checkpoint": None},
        log_level="ERROR",
    )
    runner.train()
    model = runner.model.module if way != "none" else runner.model
    found = {"weights": weights(model.net)}
    if way != "none":
        found["backend"] = dist.get_backend()
        found["gathered"] = json.loads(json.dumps(mmengine.dist.all_gather_object(rank())))
        dist.destroy_process_group()
    return found
