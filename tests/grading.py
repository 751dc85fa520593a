"""What tests of release and grade share: a lesson with each kind of exercise, a checkout of it, and 26 students."""

import copy
import os
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
MARKER = "expected_only_outside_7431"
LESSON = """
# %% [markdown]
# # 01 · Small
#
# {{badge}}
#
# **You will**
# 1. soften scores with a temperature;
# 2. find a root, and follow a gradient.
#
# **Time** 12 minutes.

# %% tags=["parameters"]
PROFILE = "mini"
DATA_ROOT = ""
DEVICE = "auto"
SEED = 0

# %% tags=["setup"]
# {{setup}}
import torch
from torch import nn

from course_lib.checks import check, same
from course_lib.lesson import start

lesson = start("01", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## Scores
#
# ### Exercise 01.1 · A softmax (3 points, 5 minutes)
#
# Write `softened(x, t)`: exp of x / t, divided by its sum.
#
# <details><summary>Hint 1</summary>Which axis?</details>

# %% exercise="01.1"
def softened(x, t=1.0):
    '''Probabilities of scores b c at the temperature t.'''
    ### BEGIN SOLUTION
    return (x / t).softmax(-1)
    ### END SOLUTION

# %% check="01.1" points=3
with check("01.1", hint="exp, then divide") as ask:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    of = lambda z: z.exp() / z.exp().sum(-1, keepdim=True)
    came = ask(softened, x)
    assert came is not None, "The result is None."
    same(came, of(x), "softened(x)", {"You did not divide by the sum.": x.exp()})
    for t in (2.0,):
        same(ask(softened, x, t), of(x / t), "softened(x, 2)", {"You ignore t.": of(x)})
### BEGIN HIDDEN TESTS
expected_only_outside_7431 = softened(torch.tensor([[1000.0, 0.0]]))
assert expected_only_outside_7431.isfinite().all()
### END HIDDEN TESTS

# %% [markdown]
# ## Roots and gradients
#
# ### Exercise 01.2 · Halving (2 points, 4 minutes)

# %% exercise="01.2"
def zero_of(f, low, high):
    '''Where f, which rises, is 0, to 0.001.'''
    ### BEGIN SOLUTION
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2
    ### END SOLUTION

# %% check="01.2" points=2
with check("01.2", hint="halve") as ask:
    calls = []

    def rising(v):
        calls.append(v)
        assert 0 <= v <= 2, f"You measured at {v:.3g}, outside of 0 to 2."
        return v - 0.731

    same(ask(zero_of, rising, 0.0, 2.0), 0.731, "zero_of", atol=1e-3)
    assert 0 < len(calls) < 20, "You measured too often, or never."

# %% [markdown]
# ### Exercise 01.3 · A gradient (2 points, 3 minutes)

# %% exercise="01.3"
def small():
    torch.manual_seed(0)
    return nn.Linear(3, 2), {"square": lambda y: y.square().mean()}

RULES = {"square": lambda y: y.square().mean()}

def energy(model, rule, x):
    '''Halves the weights of the model in place; then the rule of its output.'''
    ### BEGIN SOLUTION
    with torch.no_grad():
        for weight in model.parameters():
            weight /= 2
    model.eval()
    return rule(model(x))
    ### END SOLUTION

# %% check="01.3" points=2
with check("01.3", hint="no_grad, then the rule") as ask:
    (net, _), (twin, _) = small(), small()
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = energy(net, RULES["square"], x)
    same(net.weight, twin.weight / 2, "the weights")
    assert not net.training, "eval() is missing"
    loss.backward()
    slope, = torch.autograd.grad((x @ twin.weight.T / 2 + twin.bias / 2).square().mean(), x)
    same(x.grad, slope, "the gradient")

# %%
lesson.finish()
"""
OK = """def softened(x, t=1.0):
    z = x / t
    e = (z - z.max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)
"""
NAIVE = """def softened(x, t=1.0):
    e = (x / t).exp()
    return e / e.sum(-1, keepdim=True)
"""
ROOT_ANSWER = """def zero_of(f, low, high):
    for _ in range(12):
        middle = (low + high) / 2
        if f(middle) < 0:
            low = middle
        else:
            high = middle
    return middle
"""
ENERGY = """RULES = {"square": "mine, and broken"}

def energy(model, rule, x):
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    return rule(model.eval()(x))
"""


def checkout(folder):
    """A checkout of the small lesson."""
    (folder / "notebooks" / "src").mkdir(parents=True)
    (folder / "notebooks" / "src" / "01_small.py").write_text(LESSON.lstrip())
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def cell(notebook, grade_id):
    return next(one for one in notebook.cells if one.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def answered(release, text, number="01-1"):
    notebook = copy.deepcopy(release)
    cell(notebook, f"exercise-{number}").source = text
    return notebook


def students(release, key, book, trace):
    """Name -> (what is sent, points that it earns of 7): the sixteen of the sample course, and ten that attack.

    Args:
        release: the notebook as handed out.
        key: path of the notebook with solutions.
        book: path of the gradebook.
        trace: a path outside of the jail that nobody may write.
    """
    sources = {
        "s01_correct": (OK, 7),
        "s02_overflow": (NAIVE, 2),
        "s03_empty": (None, 0),
        "s04_syntax": ("def softened(x, t=1.0)\n    return x", 0),
        "s05_exit": ("import sys\nsys.exit(0)\n" + OK, 0),
        "s06_os_exit": ("import os\nos._exit(1)\n" + OK, 0),
        "s07_loop": ("while True: pass", 0),
        "s08_allclose": (NAIVE + "torch.allclose = lambda *a, **k: True\ntorch.isfinite = torch.ones_like\n", 2),
        "s09_file": (OK + f"open({str(trace)!r}, 'w').write('x')\n", 3),
        "s10_class": ("import course_lib.checks\ncourse_lib.checks.status = None\n"
                      "class softened:\n    def __new__(c, x, t=1.0): return torch.softmax(x / t, -1)\n", 3),
        "s11_flood": (OK + "print('x' * 50_000_000)\n", 3),
        "n01_fork_bomb": (OK + "import os\nwhile True:\n    os.fork()\n", 3),
        "n02_memory": (OK.replace("z = x / t", "z = x / t; hog = [bytearray(2**28) for _ in range(400)]"), 0),
        "n04_huge": ("def softened(x, t=1.0):\n    print('y' * 10**8)\n    return torch.zeros(10**7)\n", 0),
        "n05_replaced": (NAIVE + "import builtins\n"
                         "for name in ('equal', 'isclose', 'allclose', 'all', 'isfinite'):\n"
                         "    setattr(torch, name, lambda *a, **k: True)\n"
                         "    setattr(torch.Tensor, name, lambda *a, **k: True)\n"
                         "torch.Tensor.__eq__ = lambda *a: True\nbuiltins.all = builtins.abs = lambda *a: True\n", 2),
        "n06_key": (f"import os\ndef softened(x, t=1.0):\n    for top in ({str(key.parents[3])!r}, '/proc', '/etc'):\n"
                    "        for place, _, files in os.walk(top):\n            for name in files:\n"
                    "                text = open(os.path.join(place, name)).read()\n"
                    f"                assert {MARKER[:10]!r} not in text, 'FOUND THE KEY'\n"
                    f"    return eval(open({str(key)!r}).read())\n", 0),
        "n07_parent": (OK + "import os, signal\nfor target in (os.getppid(), 1, -1, 0):\n    try:\n"
                       "        os.kill(target, signal.SIGKILL)\n    except OSError:\n        pass\n", 3),
        "n08_recursion": ("import sys\nsys.setrecursionlimit(10**9)\n"
                          "def softened(x, t=1.0):\n    return softened(x, t)\n", 0),
        "n09_gradebook": (OK + f"import sqlite3\nbook = sqlite3.connect({str(book)!r})\n"
                          "book.execute('update grade set auto_score = 100')\nbook.commit()\n", 3),
    }  # fmt: skip
    found = {name: (answered(release, text) if text else release, points) for name, (text, points) in sources.items()}
    whole = found["s01_correct"][0]
    cell(whole, "exercise-01-2").source, cell(whole, "exercise-01-3").source = ROOT_ANSWER, ENERGY

    tampered = copy.deepcopy(release)
    cell(tampered, "check-01-1").source = "pass"
    cell(tampered, "check-01-1").metadata.nbgrader.points = 100
    found["s12_points"] = tampered, 0
    deleted = answered(release, OK)
    deleted.cells.remove(cell(deleted, "check-01-1"))
    found["s13_deleted"] = deleted, 3
    doubled = answered(release, OK)
    twin = copy.deepcopy(cell(doubled, "exercise-01-1"))
    cell(doubled, "exercise-01-1").source, twin["id"] = NAIVE, "dupl1cat"
    doubled.cells.append(twin)
    found["s14_duplicate"] = doubled, 3
    lost = answered(release, OK)
    for one in lost.cells:
        one.metadata.pop("nbgrader", None)
    found["s15_lost"] = lost, 3
    colab = answered(release, OK)
    for place, one in enumerate(colab.cells):  # ids move to the metadata, and the format is an older one
        one.metadata["id"] = f"colab{place}"
        one.pop("id", None)
    colab.nbformat_minor = 0
    found["s16_colab"] = colab, 3
    found["n03_link"] = key, 0
    found["n10_garbage"] = os.urandom(4096), 0
    return found


def send(folder, sent, name="hw1"):
    """Put what students send into a folder, as nbgrader lays it out."""
    for student, (what, _) in sent.items():
        path = folder / student / name / "01_small.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(what, Path):
            path.symlink_to(what)
        elif isinstance(what, bytes):
            path.write_bytes(what)
        else:
            nbformat.write(what, path)
