"""The loop against plain loops, against its own interrupted runs, and against processes that share its batches."""

import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import engine_worker as worker
import pytest
import torch
import torch.nn.functional as F
from engine_worker import ITEMS, Net, Noisy, outcome, step, training
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, OneCycleLR, SequentialLR, StepLR
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from course_lib import engine
from course_lib.engine import Plan, newest, train

WORKER = Path(worker.__file__)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def same(one: dict, other: dict) -> bool:
    """Are history and weights equal to the last bit?"""
    assert one["weights"].keys() == other["weights"].keys()
    equal = (torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())
    return one["history"] == other["history"] and all(equal)


def line(rows: int = 12, batch: int = 4, **of_loader) -> DataLoader:
    """Points of y = 2x - 1."""
    x = torch.linspace(-1, 1, rows)[:, None]
    return DataLoader(TensorDataset(x, 2 * x - 1), batch, **of_loader)


def fit(model, batch):
    return {"error": F.mse_loss(model(batch[0]), batch[1])}


ONCE = Plan(epochs=1)


def run(step=fit, plan=ONCE, loader=None, model=None, rate=0.1, **more):
    model = nn.Linear(1, 1) if model is None else model
    return train(model, step, loader or line(), SGD(model.parameters(), rate), plan, progress=False, **more)


# ---------------------------------------------------------------- what is computed


def test_learns_a_line():
    model = nn.Linear(1, 1)
    history = run(model=model, plan=Plan(epochs=60), rate=0.3)
    assert len(history) == 60 and history[-1]["error"] < 1e-6 < 0.1 < history[0]["error"]
    assert model.weight.item() == pytest.approx(2, abs=1e-3) and model.bias.item() == pytest.approx(-1, abs=1e-3)


def test_agrees_with_a_plain_loop():
    plan = Plan(epochs=3, clip=0.05, seed=3)
    history, model = training(chance=False, plan=plan, noise=0.0)

    torch.manual_seed(0)
    twin, data, rows = Net(False), Noisy(0.0), []
    optimizer = SGD(twin.parameters(), 0.1, 0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    loader = DataLoader(data, 4, shuffle=True, generator=torch.Generator())
    for epoch in range(3):
        sums = Counter()
        for indices in engine._order(loader, 3, epoch, 1):
            terms = step(twin, (torch.stack([data[i][0] for i in indices]), torch.stack([data[i][1] for i in indices])))
            optimizer.zero_grad()
            sum(terms.values()).backward()
            norm = torch.cat([weight.grad.flatten() for weight in twin.parameters()]).norm()
            for weight in twin.parameters():
                weight.grad *= min(1.0, 0.05 / norm.item())
            optimizer.step()
            scheduler.step()
            sums.update({name: len(indices) * term.item() for name, term in terms.items()})
        rows.append({name: value / ITEMS for name, value in sums.items()})
    for weight, expected in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-5)
    for row, expected in zip(history, rows):
        assert list(row) == ["classes", "size", "loss", "seconds"] and row["seconds"] > 0
        assert row["loss"] == row["classes"] + row["size"]
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("small", "accumulate", "big"), [(2, 2, 4), (3, 2, 6), (4, 5, 20), (5, 9, 22)])
def test_accumulated_batches_equal_one_batch(small, accumulate, big):
    """22 items leave the last group, the last batch, or both incomplete: each counts by its items."""
    one = training(chance=False, noise=0.0, batch=small, plan=Plan(epochs=3, accumulate=accumulate))
    other = training(chance=False, noise=0.0, batch=big, plan=Plan(epochs=3))
    for weight, expected in zip(one[1].parameters(), other[1].parameters()):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_means_are_over_items():
    loader = line(rows=10, batch=4)  # the last batch is half as long
    model = nn.Linear(1, 1)
    expected = fit(model, loader.dataset.tensors)["error"].item()
    (row,) = run(model=model, loader=loader, rate=0.0)
    assert row["error"] == pytest.approx(expected, rel=1e-5) and row["loss"] == row["error"]


def test_clip_bounds_the_gradient():
    model = nn.Linear(1, 1)
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    plan = Plan(1, clip=0.5, accumulate=3)
    run(lambda model, batch: {"error": 1e4 * fit(model, batch)["error"]}, plan, model=model, rate=1.0)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_scheduler_steps_with_the_optimiser():
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters(), 1e-3)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    train(
        model, fit, line(), optimizer, Plan(2, accumulate=2), scheduler=scheduler, progress=False
    )  # 3 batches: 2 groups
    assert optimizer.param_groups[0]["lr"] == 1e-3 * 0.5**4


def test_bf16_computes_in_bf16_and_keeps_float32():
    seen = []

    def watched(model, batch):
        terms = fit(model, batch)
        seen.append((torch.is_autocast_enabled("cpu"), model(batch[0]).dtype))
        return terms

    model = nn.Linear(1, 1)
    history = run(watched, Plan(40, precision="bf16"), model=model, rate=0.3)
    assert set(seen) == {(True, torch.bfloat16)} and model.weight.dtype == torch.float32
    assert history[-1]["error"] < 1e-3
    seen.clear()
    run(watched, Plan(1), model=model)  # another precision in the same Python
    assert set(seen) == {(False, torch.float32)}
    model.eval()
    assert model(torch.ones(1, 1)).dtype == torch.float32  # nothing of autocast sticks to the model


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run(plan=Plan(1, precision="fp16"))


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last):
    def watched(model, batch):
        last = dict(memory_format=torch.channels_last)
        assert batch["images"].is_contiguous(**last) == model.weight.is_contiguous(**last) == channels_last
        assert batch["names"] == ["a", "b"] and batch["rows"].is_contiguous()
        return {"mean": model(batch["images"]).mean()}

    data = [{"images": torch.rand(3, 5, 5), "rows": torch.rand(2), "names": name} for name in "ab"]
    run(watched, Plan(1, channels_last=channels_last), DataLoader(data, 2), nn.Conv2d(3, 2, 3))


def test_the_model_trains_in_training_mode():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).eval()
    run(model=model)
    assert model.training and model[0].num_batches_tracked.item() == 3


# ---------------------------------------------------------------- chance


def test_order_follows_from_seed_and_epoch():
    sampler = RandomSampler(range(30), generator=torch.Generator())
    loaders = [
        line(30, shuffle=True),
        line(30, shuffle=True, generator=torch.Generator()),
        DataLoader(range(30), batch_sampler=BatchSampler(sampler, 4, False)),
        DataLoader(range(30), 4, sampler=WeightedRandomSampler(torch.ones(30), 30)),
    ]
    for loader in loaders:
        torch.rand(3)
        orders = {(seed, epoch): engine._order(loader, seed, epoch, 1) for seed in (0, 1) for epoch in (0, 1)}
        assert len({str(order) for order in orders.values()}) == 4
        torch.rand(7)
        assert all(engine._order(loader, *key, 1) == order for key, order in orders.items())


def test_workers_change_nothing():
    plan = Plan(epochs=2, accumulate=2)
    assert same(outcome(*training(plan=plan)), outcome(*training(plan=plan, workers=2)))


def test_seeds_matter_and_an_item_drawn_twice_varies():
    first, again, other = (outcome(*training(plan=Plan(1, seed=seed))) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)
    seen = []

    def watched(model, batch):
        seen.append(batch[0])
        return step(model, batch)

    model = Net(False)
    loader = DataLoader(Noisy(), 4, sampler=[0] * 8)
    train(model, watched, loader, SGD(model.parameters(), 0.1), Plan(2), progress=False)
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 16


# ---------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def undisturbed():
    return outcome(*training())


def test_killed_trainings_end_as_if_undisturbed(tmp_path, undisturbed):
    """Killed in steps, in half a save, before each operation on files, at any time: equal to the last bit."""
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, WORKER, "kills", tmp_path, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    trials = list(tmp_path.glob("trial-*.pt"))
    assert len(trials) == 25 and int(done.stdout) >= 25, "most deaths should have come before the end"
    assert same(undisturbed, torch.load(tmp_path / "undisturbed.pt"))
    for trial in trials:
        assert same(undisturbed, torch.load(trial)), f"seed {seed}, {trial.name}"


class Stop(Exception):
    pass


def stopping(call: int):
    calls = count()

    def stopped(model, batch):
        if next(calls) == call:
            raise Stop
        return step(model, batch)

    return stopped


@settings(max_examples=20, deadline=None)
@given(
    call=st.integers(0, 11),
    save_every=st.none() | st.integers(1, 4),
    accumulate=st.integers(1, 4),
    chance=st.booleans(),
)
def test_a_stopped_training_goes_on(tmp_path_factory, call, save_every, accumulate, chance):
    plan = Plan(epochs=2, save_every=save_every, accumulate=accumulate)
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(Stop):
        training(folder, step=stopping(call), plan=plan, chance=chance)
    assert same(outcome(*training(folder, plan=plan, chance=chance)), outcome(*training(plan=plan, chance=chance)))


SCHEDULES = {
    "several": lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 4), StepLR(optimizer, 2)], [4]),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20),
    "milestones": lambda optimizer: MultiStepLR(optimizer, [3, 7]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", [Adam, lambda weights, rate: SGD(weights, rate, momentum=0.9, nesterov=True)])
def test_optimisers_and_schedulers_go_on(tmp_path, schedule, kind):
    def once(folder, step):
        torch.manual_seed(0)
        model = Net(False)
        groups = [{"params": model.body.parameters(), "lr": 0.01}, {"params": model.classifier.parameters()}]
        optimizer = kind(groups, 0.05)
        loader = DataLoader(Noisy(), 4, shuffle=True)
        return outcome(
            train(
                model,
                step,
                loader,
                optimizer,
                Plan(2, save_every=1),
                scheduler=SCHEDULES[schedule](optimizer),
                folder=folder,
                progress=False,
            ),
            model,
        )

    with pytest.raises(Stop):
        once(tmp_path, stopping(8))
    assert same(once(tmp_path, step), once(None, step))


def test_a_finished_training_is_read_not_repeated(tmp_path, undisturbed):
    history, _ = training(tmp_path)
    again, model = training(tmp_path, step=stopping(0))
    assert again == history and same(outcome(again, model), undisturbed)


def test_checkpoints_come_when_the_plan_says(tmp_path, monkeypatch):
    saved, save = [], engine._save

    def watched(folder, *rest):
        save(folder, *rest)
        assert [path.name for path in folder.iterdir()] == [newest(folder).name]  # the old one and the rest are gone
        saved.append(newest(folder).name)

    monkeypatch.setattr(engine, "_save", watched)
    assert newest(tmp_path) is None and newest(tmp_path / "absent") is None
    run(plan=Plan(2), folder=tmp_path / "epochs")  # 3 steps in an epoch
    run(plan=Plan(3, save_every=4), folder=tmp_path / "steps")
    run(plan=Plan(3))
    assert saved == [f"step-{n:09d}" for n in (3, 6, 4, 8, 9)]


@pytest.mark.parametrize("broken", ["save_model", "torch.save", "os.fsync"])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, undisturbed, broken):
    with pytest.raises(Stop):
        training(tmp_path, step=stopping(10))
    before = {path: path.read_bytes() for path in tmp_path.rglob("step-*/*")}
    assert len(before) == 2

    def full(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(f"course_lib.engine.{broken}", full)
        training(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("step-*/*")} == before
    assert (tmp_path / "unfinished").is_dir()
    assert same(outcome(*training(tmp_path)), undisturbed) and not (tmp_path / "unfinished").exists()


def altered(name, tmp_path):
    """The training that left a checkpoint in tmp_path, but for one thing."""
    model = nn.Sequential(nn.Linear(1, 3 if name == "model" else 2), nn.Linear(3 if name == "model" else 2, 1))
    kind, rate = (Adam if name == "optimizer" else SGD), (0.2 if name == "rate" else 0.1)
    optimizer = kind(model.parameters(), rate, weight_decay=0.1 if name == "decay" else 0.0)
    plan = Plan(3 if name == "plan" else 1)
    scheduler = StepLR(optimizer, 2) if name == "scheduler" else None
    loader = line(rows=16 if name == "data" else 12)
    return train(model, fit, loader, optimizer, plan, scheduler=scheduler, folder=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("plan", "epochs was 1 and is 3 "),
        ("model", r"model.0.weight was \(2, 1\) and is \(3, 1\)"),
        ("optimizer", "optimizer was 'SGD' and is 'Adam'"),
        ("rate", r"lr was \[0.1\] and is \[0.2\]"),
        ("decay", "weight_decay was 0.0 and is 0.1"),
        ("scheduler", "scheduler was 'NoneType' and is 'StepLR'"),
        ("data", "items of the data was 12 and is 16"),
    ],
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path, name, sentence):
    altered("", tmp_path)
    altered("", tmp_path)
    with pytest.raises(ValueError, match=sentence):
        altered(name, tmp_path)


def test_a_checkpoint_of_other_terms_is_refused(tmp_path):
    with pytest.raises(Stop):
        training(tmp_path, step=stopping(7), plan=Plan(2))  # the checkpoint is from between the epochs
    with pytest.raises(ValueError, match=r"\['classes', 'size'\] came first and now \['other'\]"):
        training(tmp_path, step=lambda model, batch: {"other": step(model, batch)["size"]}, plan=Plan(2))


def test_a_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    training(tmp_path)
    torch.save({"settings": Bomb()}, newest(tmp_path) / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        training(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_weights_that_share_memory_go_on(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
            self.other.weight = self.one.weight

        def forward(self, x):
            return self.other(self.one(x))

    torch.manual_seed(0)
    model = Tied()
    run(model=model, folder=tmp_path)
    again = Tied()
    run(model=again, folder=tmp_path)
    assert again.other.weight is again.one.weight and torch.equal(again.one.weight, model.one.weight)


# ---------------------------------------------------------------- not finite


def poisoned(call: int, term: str, value: float):
    """Terms a, b and c; one of them goes bad in one call of the step, the others soon after, through the weights."""
    calls = count()

    def step(model, batch):
        bad = value if next(calls) == call else 1.0
        error = fit(model, batch)["error"]
        return {name: error * (bad if name == term else 1.0) for name in "abc"}

    return step, calls


@pytest.mark.parametrize(("save_every", "name"), [(None, "step-000000006"), (4, "step-000000004")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("term", ["a", "b", "c"])
def test_the_first_term_that_is_not_finite_is_named(tmp_path, term, value, save_every, name):
    step, _ = poisoned(7, term, value)  # the second step of the third epoch
    with pytest.raises(FloatingPointError, match=f'Loss term "{term}" is not finite since step 2 of epoch 3') as error:
        run(step, Plan(5, save_every=save_every), folder=tmp_path)
    kept = newest(tmp_path)
    assert kept.name == name and str(kept) in str(error.value)
    assert all(weight.isfinite().all() for weight in load_file(kept / "model.safetensors").values())


def test_terms_are_looked_at_now_and_then(monkeypatch):
    monkeypatch.setattr(engine, "READ_EVERY", 5)
    step, calls = poisoned(7, "b", float("nan"))
    with pytest.raises(FloatingPointError, match=r'"b" is not finite since step 8 of epoch 1\. There is no checkpoint'):
        run(step, loader=line(rows=100, batch=1))
    assert next(calls) == 10


def test_a_finite_term_with_an_infinite_gradient_is_found(tmp_path):
    """The square root at 0 spoils the weights in the very last step, after which no term is computed."""
    calls = count()

    def rooted(model, batch):
        error = fit(model, batch)["error"]
        return {"error": error, "root": (0 * error).sqrt() if next(calls) == 2 else 0 * error}

    with pytest.raises(FloatingPointError, match='Weight "weight" is not finite after step 3 of epoch 1'):
        run(rooted, folder=tmp_path)
    assert newest(tmp_path) is None


# ---------------------------------------------------------------- waiting


class Waiting(TorchDispatchMode):
    """Counts what makes a host wait for its device: values read into Python, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.masked_select,
            torch.ops.aten._unique2,
        ):
            self.seen[str(func.overloadpacket)] += 1
        return func(*args, **kwargs or {})


class Reading(TorchFunctionMode):
    """Counts the methods that copy values to the host, even where the host is the device."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (
            torch.Tensor.tolist,
            torch.Tensor.item,
            torch.Tensor.cpu,
            torch.Tensor.numpy,
            torch.Tensor.__bool__,
            torch.Tensor.__float__,
            torch.Tensor.__int__,
        ):
            self.seen[func.__name__] += 1
        return func(*args, **kwargs or {})


def waits(batches: int, step=step, **plan) -> Counter:
    """How often the host waits in one epoch of so many batches."""
    model = Net(True)
    data = TensorDataset(torch.rand(2 * batches, 3, 6, 6), torch.arange(2 * batches) % 2)
    optimizer = SGD(model.parameters(), 0.01, momentum=0.9)
    with Waiting() as mode, Reading(mode.seen):
        train(
            model,
            step,
            DataLoader(data, 2),
            optimizer,
            Plan(1, clip=1.0, **plan),
            progress=False,
            scheduler=StepLR(optimizer, 2),
        )
    return mode.seen


@pytest.mark.parametrize("plan", [{}, {"accumulate": 3}, {"precision": "bf16"}])
def test_a_step_never_waits(plan):
    assert 0 < waits(2, **plan)["tolist"] <= 3
    assert waits(40, **plan) == waits(2, **plan)


def test_a_step_that_waits_is_noticed():
    def curious(model, batch):
        terms = step(model, batch)
        terms["size"].item()
        return terms

    assert waits(40, curious)["item"] == 40 + waits(40)["item"]


# ---------------------------------------------------------------- processes


def test_two_processes_equal_one(tmp_path):
    """Half of each batch in each process, by torchrun over gloo; the bar in the first; errors in both."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--redirects",
        "3",
        "--log-dir",
        tmp_path / "log",
        WORKER,
        "share",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    shared = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert same(*shared)
    one = outcome(*training(chance=False))
    for name, expected in one["weights"].items():
        torch.testing.assert_close(shared[0]["weights"][name], expected, rtol=0, atol=1e-6)
    for row, expected in zip(shared[0]["history"], one["history"], strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    bars = [(tmp_path / "log").glob(f"*/attempt_0/{rank}/stderr.log") for rank in (0, 1)]
    bars = [next(bar).read_text() for bar in bars]
    assert "12/12" in bars[0] and "loss=" in bars[0] and bars[1] == ""
    for rank in (0, 1):
        assert 'Loss term "rank" is not finite since step 1 of epoch 1' in (tmp_path / f"error-{rank}.txt").read_text()
        assert "2 processes share each batch evenly, but a batch of 3" in (tmp_path / f"uneven-{rank}.txt").read_text()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    run()  # accelerate settles on one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started, but accelerate knows 1"):
        run()


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["cuda", "tpu", ""])
def test_a_device_that_is_not_here_is_refused(monkeypatch, device):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"Expected the device .* got '{device}'; take \"auto\""):
        engine.this_process(device)
    with pytest.raises(ValueError, match=f"got '{device}'"):
        run(plan=Plan(1, device=device))


def test_the_cpu_is_taken_beside_an_accelerator(monkeypatch):
    """The state of accelerate stays on the device that it began with, unless it is asked for another."""

    class State(engine.PartialState):
        device = None

        def __init__(self, cpu):
            State.device = State.device or torch.device("cpu" if cpu else "cuda")

        @staticmethod
        def _reset_state():
            State.device = None

    monkeypatch.setattr(engine, "PartialState", State)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    found = [engine.this_process(device).device.type for device in ("auto", "cpu", "cpu", "cuda", "auto", "cpu")]
    assert found == ["cuda", "cpu", "cpu", "cuda", "cuda", "cpu"]
    with pytest.raises(ValueError, match="got 'mps'"):
        engine.this_process("mps")


def test_the_device_is_no_part_of_a_training(tmp_path):
    """A training that began on one device goes on on another."""
    with pytest.raises(Stop):
        training(tmp_path, step=stopping(7), plan=Plan(2))
    assert "device" not in torch.load(newest(tmp_path) / "state.pt")["settings"]
    assert same(outcome(*training(tmp_path, plan=Plan(2, device="cpu"))), outcome(*training(plan=Plan(2))))


# ---------------------------------------------------------------- the bar


def test_the_bar_is_shown_when_asked_for(capfd):
    training(progress=False)
    assert capfd.readouterr().err == ""
    training(progress=True)
    assert "12/12" in capfd.readouterr().err


# ---------------------------------------------------------------- what does not fit


def test_wrong_loaders_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(3)

    loaders = DataLoader(Stream(), 2), DataLoader(range(3), batch_size=None), DataLoader(range(3), 4, drop_last=True)
    for loader in loaders:
        model = nn.Linear(1, 1)
        with pytest.raises(ValueError, match="a dataset with indices, a batch size and at least one batch"):
            train(model, fit, loader, SGD(model.parameters(), 0.1), Plan(1), progress=False)


def test_strange_parameters_are_refused():
    loss = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=r"2 parameters that are not the model's, the first of shape \(7, 5\)"):
        train(nn.Linear(1, 1), fit, line(), SGD(loss.parameters(), 0.1), Plan(1), progress=False)


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        (lambda error: {}, "scalars, but terms of shape {} came"),
        (lambda error: {"error": error[None]}, r"scalars, but terms of shape {'error': \(1,\)} came"),
        (lambda error: {"loss": error, "other": error}, '"loss" .the sum. and "seconds" are columns'),
        (lambda error: {"seconds": error}, '"loss" .the sum. and "seconds" are columns'),
    ],
)
def test_wrong_terms_are_refused(terms, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(lambda model, batch: terms(fit(model, batch)["error"]))


def test_terms_keep_their_names():
    names = iter(["one", "two", "three"])
    with pytest.raises(ValueError, match=r"\['one'\] came first and now \['two'\]"):
        run(lambda model, batch: {next(names): fit(model, batch)["error"]})


NAN = float("nan")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"accumulate": 0}, {"clip": 0.0}, {"save_every": 0}, {"clip": NAN}])
def test_plans_above_zero(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be "):
        Plan(**({"epochs": 1} | wrong))
