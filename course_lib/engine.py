"""Engine: the one training loop of the course, on Hugging Face accelerate.

    history = train(model, step, loader, optimizer, Plan(epochs=10), folder=Path("runs/first"))

The same line runs on a CPU, on a GPU, and in several processes under `torchrun` or `accelerate launch`. A step is a
function of the model and one batch that returns named loss terms; their sum is minimised. Three rules make the loop
exact:

    items     The loader's batch is the whole batch. Processes share it evenly, and in a group of `accumulate` batches
              each weighs by its items: many processes or small batches give the gradient of one process and one big
              batch, if the terms are means over items. BatchNorm, and a loss of pairs, see one batch of one process
              only.
    chance    All random numbers follow from (seed, epoch) in a sampler, (seed, epoch, batch, place) in an item of the
              data and (seed, epoch, batch, process) in a step: the generators of Python, NumPy and torch are seeded
              each time. A run that was killed goes on bit for bit, whatever its workers.
    waiting   Loss terms stay on the device. They are read every READ_EVERY optimiser steps, at the end of an epoch and
              before a checkpoint; in between the host never waits (except in fp16, where the gradient scaler asks).
"""

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import recursively_apply, send_to_device
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from course_lib.settings import Count, Positive, RandomSeed, check_settings

READ_EVERY = 50  # optimiser steps from one look at the device to the next
NEVER = torch.iinfo(torch.int64).max  # the step since which a finite term is not finite

Step = Callable[[nn.Module, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How a model is trained, apart from its loss, data and optimiser."""

    epochs: Count
    precision: Literal["no", "bf16", "fp16"] = "no"  # of autocast; weights stay float32
    accumulate: Count = 1  # batches for each optimiser step
    clip: Positive | None = None  # largest norm of the gradient, of all weights together
    seed: RandomSeed = 0
    save_every: Count | None = None  # optimiser steps (and at the end); None: after each epoch
    channels_last: bool = True  # memory format of 4-D weights and inputs
    device: str = "auto"  # see `this_process`; a training may go on elsewhere

    def __post_init__(self):
        check_settings(self)


def this_process(device: str = "auto") -> PartialState:
    """This process among those of torchrun, and its device.

    Args:
        device: "auto", the accelerator if there is one; "cpu", the CPU even so; or the name of an accelerator, "cuda".
    Raises:
        ValueError: it is not here.
    """
    here = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if device not in ("auto", "cpu", here):
        raise ValueError(f'Expected the device "auto", "cpu" or one of this machine, got {device!r}; take "auto".')
    cpu = "cpu" in (device, here)  # accelerate must hear it, or finds no other processes where there are only CPUs
    if (PartialState(cpu).device.type == "cpu") != cpu:
        PartialState._reset_state()  # the state is one for all of Python, and keeps the device that it began with
    return PartialState(cpu)


def train(
    model: nn.Module,
    step: Step,
    loader: DataLoader,
    optimizer: Optimizer,
    plan: Plan,
    *,
    scheduler: LRScheduler | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Mean loss terms of each epoch, with their sum "loss" and the "seconds"; the model is trained in place.

    Afterwards it is still on the device and in training mode. A training whose checkpoint lies in `folder` goes on from
    it.

    Args:
        step: named loss terms (scalars) of one batch, which lies on the device. It may call any method of the model,
            under autocast and DDP too. It does not wait for the device (no `.item()`, no `if tensor:`), draws from
            torch's own generator or from one seeded with `torch.initial_seed()`, and keeps frozen parts so
            (`model.backbone.eval()`).
        loader: batches of a map-style dataset; its samplers draw from torch's own generator or from their `generator`.
        optimizer: over parameters of the model. A loss with weights of its own is made a part of the model.
        scheduler: stepped once after each optimiser step.
        folder: where checkpoints go, see `newest`; None keeps none.
        progress: show a bar, in the main process.
    Raises:
        FloatingPointError: a loss term or a weight is not finite any more; says which, and since when.
        ValueError: loader, optimiser, loss terms or checkpoint do not fit; says what came.
        RuntimeError: several processes were started that do not know of each other.
    """
    settings = _settings(model, loader, optimizer, scheduler, plan)
    this_process(plan.device)  # where accelerate goes on
    AcceleratorState._reset_state()  # the state is one for all of Python, and refuses a second precision
    accelerator = Accelerator(mixed_precision=plan.precision)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate knows "
            f"{accelerator.num_processes}: each would train for itself. Was PartialState() called before? On "
            "CPUs it finds the others only if called as PartialState(cpu=True)."
        )
    if plan.precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            "fp16 needs a GPU, and only a CPU is here, where float32 would silently take its place. Use bf16."
        )
    model.train().to(memory_format=torch.channels_last if plan.channels_last else torch.preserve_format)
    objective, optimizer = accelerator.prepare(_Objective(model, step), optimizer)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": accelerator.scaler}
    run = _Run()
    if folder and (checkpoint := newest(folder)):
        run = _load(checkpoint, model, parts, settings, accelerator.device)
    total = plan.epochs * -(-len(loader.batch_sampler) // plan.accumulate)
    bar = tqdm(total=total, initial=run.steps, unit="step", disable=not (progress and accelerator.is_main_process))
    for epoch in range(run.epoch, plan.epochs):
        batches = _order(loader, plan.seed, epoch, accelerator.num_processes)
        done, since = run.step * plan.accumulate, time.perf_counter() - run.seconds
        arriving = _arriving(loader, batches, done, epoch, plan, accelerator)
        for first in range(done, len(batches), plan.accumulate):
            group = batches[first : first + plan.accumulate]
            optimizer.zero_grad()
            for number, indices in enumerate(group, first):
                batch = next(arriving)
                _seed("step", plan.seed, epoch, number, accelerator.process_index, device=accelerator.device)
                last = indices is group[-1]  # only then do processes exchange gradients
                with nullcontext() if last else accelerator.no_sync(objective):
                    terms = objective(batch)
                    accelerator.backward(sum(terms.values()) * (len(indices) / sum(map(len, group))))
                run.add(terms, len(indices))
            if plan.clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), plan.clip)
            optimizer.step()
            if scheduler and not accelerator.optimizer_step_was_skipped:
                scheduler.step()

            run.step += 1
            run.steps += 1
            bar.update()
            ends = number + 1 == len(batches)
            due = run.steps % plan.save_every == 0 if plan.save_every else ends
            save = folder and (due or run.steps == total)
            if ends or save or run.steps % READ_EVERY == 0:
                row = run.read(model, accelerator, folder)
                run.seconds = time.perf_counter() - since
                bar.set_postfix(epoch=epoch + 1, loss=f"{row['loss']:.4g}")
            if ends:
                history = [*run.history, {**row, "seconds": run.seconds}]
                run = _Run(epoch + 1, steps=run.steps, names=run.names, history=history)
            if save:
                if accelerator.is_main_process:
                    _save(folder, model, parts, settings, run)
                accelerator.wait_for_everyone()
    bar.close()
    return run.history


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a training's folder: a folder with model.safetensors and state.pt; None if none."""
    return max(folder.glob("step-*"), default=None)


class _Objective(nn.Module):
    """Model and step as one module, so that DDP and autocast see whatever the step calls."""

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch):
        terms = self.step(self.model, batch)
        if not terms or any(term.dim() for term in terms.values()):
            came = {name: tuple(term.shape) for name, term in terms.items()}
            raise ValueError(f"A step returns named loss terms that are scalars, but terms of shape {came} came.")
        if "seconds" in terms or ("loss" in terms and len(terms) > 1):
            raise ValueError(
                f'"loss" (the sum) and "seconds" are columns of the history, but the terms {list(terms)} came. '
                "Give them other names."
            )
        return terms


@dataclass
class _Run:
    """Where a training stands, and the sums of its loss terms in this epoch, on the device."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done in this epoch
    steps: int = 0  # and in all
    items: int = 0  # in the sums
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)
    sums: Tensor | int = 0  # t
    since: Tensor | None = None  # t, the step at which each term stopped being finite
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, terms, items):
        """Count in the loss terms of one batch, without waiting for them."""
        self.names = self.names or list(terms)
        if self.names != list(terms):
            raise ValueError(
                f"The loss terms of all batches have the same names, but {self.names} came first and now "
                f"{list(terms)}. Return a zero for a term that a batch does not have."
            )
        values = torch.stack([term.detach().float() for term in terms.values()])
        since = torch.where(values.isfinite(), NEVER, self.step)
        self.items += items
        self.sums = self.sums + items * values
        self.since = since if self.since is None else torch.minimum(self.since, since)

    def read(self, model, accelerator, folder):
        """Means of the loss terms of this epoch over all processes; an error if they or the weights are not finite."""
        kept = folder and newest(folder)
        kept = f"The last checkpoint, {kept}, is from before." if kept else "There is no checkpoint from before."
        since = accelerator.gather(self.since).view(-1, len(self.names)).amin(0).tolist()
        first = min(since)
        if first < NEVER:
            raise FloatingPointError(
                f'Loss term "{self.names[since.index(first)]}" is not finite since step {first + 1} of epoch '
                f"{self.epoch + 1}. {kept} Look at that batch, at divisions, logarithms and square roots of 0 in the "
                "term, and at the learning rate."
            )
        weights = dict(model.named_parameters())
        finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist()
        if not all(finite):
            raise FloatingPointError(
                f'Weight "{[*weights][finite.index(False)]}" is not finite after step {self.step} of epoch '
                f"{self.epoch + 1}, though all loss terms were. {kept} A finite term can have an infinite gradient: a "
                "square root or a norm at 0 is the usual one."
            )
        self.sums = accelerator.reduce(self.sums, "mean")
        means = (self.sums / self.items).tolist()
        return {**dict(zip(self.names, means)), "loss": sum(means)}


def _settings(model, loader, optimizer, scheduler, plan):
    """What must be the same for a training to go on: plan, data, optimiser, scheduler, and the shapes of the model.

    What could not be shared among processes, resumed or kept is refused.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None or not len(loader.batch_sampler):
        raise ValueError(
            "Batches are shared among processes and skipped on resuming, so the loader needs a dataset with "
            "indices, a batch size and at least one batch, which this one does not have."
        )
    ours = set(model.parameters())
    strange = [weight.shape for group in optimizer.param_groups for weight in group["params"] if weight not in ours]
    if strange:
        raise ValueError(
            f"The optimiser holds {len(strange)} parameters that are not the model's, the first of shape "
            f"{tuple(strange[0])}. They would not be kept: build it from this model, and make a loss with "
            "weights a part of it, for example by nn.ModuleDict."
        )
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    found = {
        **asdict(plan),
        "items of the data": len(loader.dataset),
        "batches of the loader": len(loader.batch_sampler),
        "optimizer": type(optimizer).__name__,
        "scheduler": type(scheduler).__name__,
        **optimizer.defaults,
        "lr": rates,
        **{f"model.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    }
    return {name: repr(value) for name, value in found.items() if name != "device"}


def _seed(*key, device=None):
    """Start the generators of Python, NumPy and torch at a number that follows from the key."""
    number = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)  # torch.manual_seed asks every kind of device: 100 us instead of 1
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def _order(loader, seed, epoch, processes):
    """The batches of an epoch as indices into the dataset, the same in every process."""
    _seed("order", seed, epoch)
    for sampler in (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
            generator.manual_seed(torch.initial_seed())
    batches = [list(batch) for batch in loader.batch_sampler]
    uneven = [len(batch) for batch in batches if len(batch) % processes]
    if uneven:
        raise ValueError(
            f"{processes} processes share each batch evenly, but a batch of {uneven[0]} items came. Choose a "
            "batch size that they divide, and drop_last=True."
        )
    return batches


@dataclass
class _Items(Dataset):
    """The items of a dataset, each with random numbers of its own, whoever loads it and after whichever other."""

    dataset: Any
    seed: int
    epoch: int

    def __getitem__(self, ticket):
        number, place, index = ticket
        _seed("item", self.seed, self.epoch, number, place)
        return self.dataset[index]


def _arriving(loader, batches, done, epoch, plan, accelerator):
    """This process's share of the batches that are not done yet, on the device."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    shares = (
        [(number, place, item) for place, item in enumerate(batch) if place * processes // len(batch) == rank]
        for number, batch in enumerate(batches[done:], done)
    )
    same = "collate_fn num_workers worker_init_fn multiprocessing_context prefetch_factor pin_memory timeout".split()
    options = {name: getattr(loader, name) for name in same}

    def place(tensor):
        format = torch.channels_last if plan.channels_last and tensor.dim() == 4 else torch.preserve_format
        return tensor.to(accelerator.device, non_blocking=True, memory_format=format)

    for batch in DataLoader(_Items(loader.dataset, plan.seed, epoch), batch_sampler=shares, **options):
        yield recursively_apply(place, batch)


def _save(folder, model, parts, settings, run):
    """Write a checkpoint whole or not at all, and only then remove the one before it."""
    unfinished, finished = folder / "unfinished", folder / f"step-{run.steps:09d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_model(model, str(unfinished / "model.safetensors"))
    states = {name: part and part.state_dict() for name, part in parts.items()}
    torch.save({"settings": settings, "run": vars(run), **states}, unfinished / "state.pt")
    for file in unfinished.iterdir():
        with open(file, "rb+") as written:
            os.fsync(written.fileno())  # or a power cut may keep the name of a lost file
    unfinished.rename(finished)
    for old in set(folder.glob("step-*")) - {finished}:
        shutil.rmtree(old)


def _load(checkpoint, model, parts, settings, device):
    """Where the training stood; its weights and states are put back into model and parts."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    then = state["settings"]
    changed = [
        f"{name} was {then.get(name)} and is {settings.get(name)}"
        for name in {**then, **settings}
        if then.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} is of another training: {'; '.join(changed[:5])} ({len(changed)} differences). "
            "Name another folder, remove this one, or train as before."
        )
    load_model(model, str(checkpoint / "model.safetensors"))
    for name, part in parts.items():
        if part:
            part.load_state_dict(state[name])
    return _Run(**send_to_device(state["run"], device))
