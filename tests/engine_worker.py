"""What the tests of the engine run in processes of their own.

python tests/engine_worker.py kills FOLDER SEED              a training killed at random, again and again, and resumed
torchrun ... tests/engine_worker.py share FOLDER             one training shared by processes
"""

import os
import random
import signal
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch import nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from course_lib.engine import Plan, train

ITEMS, BATCH = 22, 4  # 6 batches, the last one half as long as the others
PLAN = Plan(epochs=4, accumulate=2, clip=1.0, save_every=2, seed=3)


class Noisy(Dataset):
    """Images that every kind of random number changes each time they are drawn."""

    def __init__(self, noise: float = 0.1):
        generator = torch.Generator().manual_seed(5)
        self.images, self.noise = torch.randn(ITEMS, 3, 6, 6, generator=generator), noise
        self.labels = (self.images.mean((1, 2, 3)) > 0).long()

    def __len__(self):
        return ITEMS

    def __getitem__(self, index):
        chance = torch.rand(1) + np.random.rand() + random.random()
        return self.images[index] + self.noise * chance.float(), self.labels[index]


class Net(nn.Module):
    """A tiny network with a method of its own beside forward, and batch statistics and dropout if asked for."""

    def __init__(self, chance: bool):
        super().__init__()
        norm = nn.BatchNorm2d(4) if chance else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Dropout(0.3 if chance else 0.0))
        self.classifier = nn.Linear(4, 2)

    def features(self, images):
        return self.body(images)


def step(model, batch):
    images, labels = batch
    features = model.features(images)
    return {
        "classes": nn.functional.cross_entropy(model.classifier(features.mean((-2, -1))), labels),
        "size": 0.01 * features.square().mean(),
    }


def training(folder=None, *, chance=True, step=step, plan=PLAN, batch=BATCH, noise=0.1, workers=0, progress=False):
    """History and model of a training from the first line of its script: what is run again after a crash."""
    torch.manual_seed(0)
    model = Net(chance)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01) if chance else torch.optim.SGD(model.parameters(), 0.1, 0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    generator = torch.Generator().manual_seed(9)
    loader = DataLoader(Noisy(noise), batch, shuffle=True, generator=generator, num_workers=workers)
    return train(model, step, loader, optimizer, plan, scheduler=scheduler, folder=folder, progress=progress), model


def outcome(history, model):
    """All that must not depend on an interruption."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in history]
    return {"history": rows, "weights": model.state_dict()}


def fork(task) -> int:
    """Process id of a child that does the task. It shares no state of the engine with its sisters, imports nothing."""
    child = os.fork()
    if child == 0:
        try:
            task()
            os._exit(0)
        finally:
            os._exit(1)  # a child that fails must not go on as its parent
    return child


def ending(child: int) -> int:
    """0 if a child came to its end, minus the signal if one ended it, 1 if it failed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_in_step(call: int, folder: Path) -> None:
    """Train and die in the given call of the step, counted from 0: before, between and within groups of batches."""
    calls = count()

    def dying(model, batch):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(model, batch)

    training(folder, step=dying)


def dying_in_save(save: int, folder: Path) -> None:
    """Train and die in the given save, counted from 0, when half of its last file is written."""
    calls, whole = count(), torch.save

    def dying(state, path):
        whole(state, path)
        if next(calls) == save:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying
    training(folder)


def dying_at_file(event: int, folder: Path) -> None:
    """Train and die before the given operation on files, counted from 0: opened, renamed, removed, listed."""
    events = count()

    def dying(name, arguments):
        if str(folder) in str(arguments[:1]) and next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(dying)
    training(folder)


def dying_anywhere(after: float, folder: Path) -> None:
    """Train and die after so many seconds, in whatever instruction: nobody handles the alarm, so it kills."""
    signal.setitimer(signal.ITIMER_REAL, after)
    training(folder)


def kills(root: Path, seed: int) -> None:
    """Trainings that die, come to their end all the same, and leave what they came to beside an undisturbed one."""
    chance = random.Random(seed)

    def finish(name: str, folder: Path | None) -> None:
        assert ending(fork(lambda: torch.save(outcome(*training(folder)), root / f"{name}.pt"))) == 0, name

    start = time.perf_counter()
    finish("undisturbed", None)
    length = time.perf_counter() - start
    # 24 calls of the step and 6 saves are a whole training. The second death of a training comes after the first.
    deaths = [
        (partial(dying_in_step, chance.randrange(12)), partial(dying_in_step, chance.randrange(12))) for _ in range(3)
    ]
    deaths += [(partial(dying_in_save, chance.randrange(3)), partial(dying_in_save, chance.randrange(3)))]
    deaths += [(partial(dying_anywhere, chance.uniform(0.001, length)),) * 2 for _ in range(2)]
    deaths += [(partial(dying_at_file, event),) for event in range(7, 26)]  # the second save, one by one
    killed = 0
    for trial, ways in enumerate(deaths):
        folder = root / f"trial-{trial}"
        for way in ways:
            killed += ending(fork(partial(way, folder))) < 0
        finish(f"trial-{trial}", folder)
    print(killed)


def share(root: Path) -> None:
    """Half of each batch in each of two processes; the bar goes to the standard error of each."""
    rank = int(os.environ["RANK"])
    result = outcome(*training(root / "run", chance=False, progress=True))
    torch.save(result, root / f"rank-{rank}.pt")

    def poisoned(model, batch):
        terms = step(model, batch)
        return {**terms, "rank": terms["size"] * (float("nan") if rank == 1 else 1.0)}

    try:
        training(chance=False, step=poisoned)
    except FloatingPointError as error:
        (root / f"error-{rank}.txt").write_text(str(error))
    try:
        training(chance=False, batch=3)
    except ValueError as error:
        (root / f"uneven-{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    kills(folder, int(sys.argv[3])) if mode == "kills" else share(folder)
