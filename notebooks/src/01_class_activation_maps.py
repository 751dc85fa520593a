# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Class activation maps
#
# {{badge}}
#
# **You will**
# 1. write the class activation map (CAM) in one line, and prove that it is the network's own answer, spread over the image;
# 2. turn a map into a heatmap and a heatmap into a box, and meet the choices that hide in both steps;
# 3. measure a map by weakly supervised localisation, beside baselines that have never looked at the image.
#
# **Time** 60 minutes to work through; about a minute on a CPU, less on a GPU.
# **Before** [00 Tour](00_tour.ipynb).
#
# **Source** Zhou, Khosla, Lapedriza, Oliva, Torralba: *Learning Deep Features for Discriminative Localization*, CVPR 2016.
# The measures are those of Choe et al.: *Evaluating Weakly Supervised Object Localization Methods Right*, CVPR 2020.

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": minutes on a CPU · "paper": the real
# benchmark, on a GPU
PROFILE = "mini"
# "" finds the data folder; with "paper" it holds ILSVRC 2012 in the folder ilsvrc2012
DATA_ROOT = ""
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
from itertools import islice

import ipywidgets
import numpy as np
import timm
import torch
from IPython.display import Markdown, display
from scipy import ndimage
from torchvision.models import densenet121
from torchvision.transforms.v2 import functional as transforms

from course_lib import backbones, maps
from course_lib.worlds import photographs as fetch, minis, scenes
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.images import load
from course_lib.data.miniature import fingerprint
from course_lib.evaluate.localization import HEATMAP_THRESHOLDS, MaxBoxAcc, PxAP, iou
from course_lib.show import plots, widgets
from course_lib.checks import check, expect_error, same
from course_lib.lesson import start

lesson = start("01", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## A first heatmap
#
# A photograph, a network that was trained to *name* photographs, and where it found the name:

# %%
network = backbones.create("tf_efficientnet_lite0").to(lesson.device)
names = [name for _, name in backbones.imagenet_classes()]
weight = network.classifier.weight.detach()                               # 1000 1280
bias = network.classifier.bias.detach()                                   # 1000

def look(images):
    """Feature map and logits of square images, uint8."""
    with torch.inference_mode():
        features = network.features(network.normalise(images.to(lesson.device)))
        return features, network.classifier(features.mean((2, 3)))  # b 1280 7 7, b 1000

def example(name):
    """One of the example photographs, 224 x 224."""
    return transforms.resize(load(fetch.example(name, lesson.data)), [224, 224])

cat = example("chelsea")
features, logits = look(cat[None])
label = logits[0].argmax().item()
heat = maps.heatmap(maps.cam(features, weight[[label]]), 224)[0, 0].cpu()
titles = ["the photograph", f"“{names[label]}”: seen here"]
plots.show(plots.grid([cat, plots.overlay(cat, heat)], titles, columns=2, side=3,
                      title="Trained to say what, the network also knows where"),
           alt="Left a photograph of a cat's face. Right the same photograph under a "
               f"heatmap of the class {names[label]}: it is brightest on the face of "
               "the cat.")

# %% [markdown]
# The rest of this lesson is about what that picture is, how it is made, and how far it can be trusted.
#
# ## The idea
#
# The network ends in **global average pooling** and **one linear layer**. The logit of class $c$ is a weighted sum of
# channels, each averaged over the positions $(x, y)$:
#
# $$\text{logit}_c = \sum_k w_{ck} \Big( \frac{1}{hw} \sum_{x,y} F_k(x, y) \Big) + b_c .$$
#
# Both sums are linear, so they may change places. First weigh, then average:
#
# $$\text{logit}_c = \frac{1}{hw} \sum_{x,y} \underbrace{\sum_k w_{ck}\, F_k(x, y)}_{M_c(x, y)} + b_c .$$
#
# $M_c$ is the **class activation map** (Zhou et al., Eq. 2): what each position contributes to the logit. No gradient, no
# training, one matrix product.

# %% [markdown]
# ### Exercise 01.1 · The map (2 points, 5 minutes)
#
# Write `class_map(features, weight)`: the maps of **all** classes for **all** images.
#
# | argument | shape | |
# |---|---|---|
# | `features` | `b k h w` | the last feature map |
# | `weight` | `c k` | rows of the linear layer |
# | *returns* | `b c h w` | $M_c(x, y) = \sum_k w_{ck} F_k(x, y)$: no bias, no ReLU, no scaling |
#
# <details><summary>Hint 1</summary>Which axis do the two arguments share? It is summed over, and disappears.</details>
# <details><summary>Hint 2</summary><code>torch.einsum</code> takes the names of the axes: those of each input, an arrow, those of the
# result. A name that stands only before the arrow is summed over.</details>
# <details><summary>Hint 3</summary>Another sum over a shared axis: three shops have prices of two goods, and four
# customers have lists. What does each list cost in each shop?
#
# ```python
# prices = torch.tensor([[1., 2.], [2., 1.], [3., 3.]])             # shop, good
# lists = torch.tensor([[1., 0.], [0., 1.], [1., 1.], [2., 0.]])    # customer, good
# torch.einsum("sg,lg->ls", prices, lists)[2]                       # tensor([3., 3., 6.])
# ```
# </details>

# %% exercise="01.1"
def class_map(features, weight):
    """Maps M_c = sum_k w_ck F_k of all classes: features b k h w, weight c k -> b c h
    w."""
    ### BEGIN SOLUTION
    return torch.einsum("bkhw,ck->bchw", features, weight)
    ### END SOLUTION

# %% check="01.1" points=2
with check("01.1", hint="einsum over the shared axis k") as ask:
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(2, 5, 3, 4, generator=generator)                   # b k h w
    w = torch.randn(7, 5, generator=generator)                            # c k
    right = maps.cam(some, w)                                     # the library's answer
    same(ask(class_map, some, w), right, "class_map(features, weight)", axes="b c h w",
         suspects={"You averaged over the channels: Eq. 2 sums them. The average "
                   "belongs to the positions, and comes later.": lambda: right / 5,
                   "You cut off the negative values (ReLU). Negative evidence is part "
                   "of the map: without it the mean is not the logit.":
                       lambda: right.relu(),
                   "You pooled the features first, so every position has the same "
                   "value: weigh first, average later.":
                       lambda: right.mean((2, 3), keepdim=True).expand_as(right),
                   "The axes are in the order c b h w: images come first.":
                       lambda: right.transpose(0, 1),
                   "You normalised the weights over the classes. They are used as they "
                   "are.": lambda: maps.cam(some, w.softmax(0))})
### BEGIN HIDDEN TESTS
one = class_map(torch.ones(1, 3, 1, 1), torch.tensor([[1.0, 2.0, -4.0]]))
assert one.shape == (1, 1, 1, 1) and one.item() == -1
empty = class_map(torch.zeros(0, 4, 2, 2), torch.ones(3, 4))
assert empty.shape == (0, 3, 2, 2), "an empty batch is a batch"
### END HIDDEN TESTS

# %% [markdown]
# ## The map is the answer
#
# If the derivation holds, then for every class of every image
#
# $$\text{mean}_{x,y}\, M_c + b_c = \text{logit}_c .$$
#
# *Before you run the cell:* for how many of the 1000 classes will this hold, and how exactly? (The library's `maps.cam` is
# your `class_map`; from here on the lesson uses it, whether or not you have written yours yet.)

# %%
four = torch.stack([example(name)
                    for name in ("chelsea", "coffee", "motorcycle_left", "china")])
features, logits = look(four)
cams = maps.cam(features, weight)                                         # 4 1000 7 7
gap = (cams.mean((2, 3)) + bias - logits).abs().max().item()
print(f"{logits.numel()} logits between {logits.min():.2f} and {logits.max():.2f}; "
      f"largest deviation {gap:.1e}")
assert gap < 1e-4
lesson.record("largest |mean(map) + bias - logit|", gap,
              note="4000 logits, float32 rounding")

# %% [markdown]
# For **all** of them, up to rounding. A CAM of this network is no illustration and no approximation: it *is* the logit, laid
# out over the image. Keep the identity in mind; it is the best test a map can have.
#
# ## One photograph, many maps
#
# The features are computed once; each class has its own weights, and so its own map. Here are two objects in one scene. (It was
# picked because both are among the five first guesses of the network.)

# %%
photos = fetch.photographs(lesson.data)
world = scenes.photo_world(photos, "wnid", SEED)
by_file = {photo.file.split("/")[-1]: (index, photo)
           for index, photo in world.items["val"]}
pairs = [pair.split() for pair in (                     # the first that is there
    "tiger violin", "elephant garbagetruck", "lion corn", "duck wombat",
    "lobster orange", "badger basketball", "mantis camera_35mm", "pelican lemon",
    "firetruck sliced_orange", "bison guitar2")]
picks = next([by_file[f"{name}.png"] for name in pair] for pair in pairs
             if by_file.keys() >= {f"{name}.png" for name in pair})
scene = scenes.compose(world, "val", picks, (224, 224), np.random.default_rng(8))
picture = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)
scene_features, scene_logits = look(picture[None])
print("top 5:", ", ".join(names[i] for i in scene_logits[0].topk(5).indices))
first, second = [dict(backbones.imagenet_classes())[photo.wnid] for _, photo in picks]
shown = [first, second, "teapot"]
rows = [names.index(name) for name in shown]
heat = maps.heatmap(maps.cam(scene_features, weight[rows]), 224)[0].cpu()
plots.show(plots.grid([picture, *[plots.overlay(picture, h) for h in heat]],
                      ["the scene", *shown],
                      title="Same features, other weights: each class finds its own "
                            "object; an absent class finds something, too"),
           alt=f"A scene with two objects, {first} and {second}, and three heatmaps: "
               "each class is bright on its own object, and that of teapot, which is "
               "not there, is bright somewhere as well.")

# %% [markdown]
# The third map deserves a second look. There is no teapot, yet its heatmap has a bright spot, since every heatmap is stretched
# until its maximum is 1. **A heatmap shows where, never whether.** The raw maps know better:

# %%
raw = maps.cam(scene_features, weight[rows])[0]                           # 3 7 7
for name, m, row in zip(shown, raw, rows):
    print(f"{name:8} logit {scene_logits[0, row]:6.2f}   raw map {m.min():6.2f} to "
          f"{m.max():6.2f}")
# first, second
on = torch.from_numpy(np.stack([scene.instances == 1, scene.instances == 2]))
for name, h in zip(shown, heat):
    print(f"{name:8} mean heat on the {first} {h[on[0]].mean():.2f}, on the {second} "
          f"{h[on[1]].mean():.2f}")
assert (heat[0][on[0]].mean() > heat[0][on[1]].mean()
        and heat[1][on[1]].mean() > heat[1][on[0]].mean())
assert scene_logits[0, rows[2]] < scene_logits[0, rows[:2]].min()

# %% [markdown]
# ## From a map to a heatmap
#
# A map has 7 × 7 raw values. To lay it over the photograph it is **enlarged** and then **scaled** to 0..1. Each step is a
# choice that changes boxes and figures later on:
#
# * enlarge first, scale second: bicubic interpolation overshoots, so the other order leaves the range;
# * scale each map **by itself**: a batch may not change what one image shows;
# * a constant map has nothing to show: it becomes all zeros, never 0/0.
#
# ### Exercise 01.2 · Min-max (2 points, 8 minutes)
#
# Write `scaled(raw)`: for each map of `b c h w` by itself $(M - \min M) / (\max M - \min M)$, and zeros where a map is
# constant.
#
# <details><summary>Hint 1</summary>Over which of the four axes do you look for the minimum, if each map counts by itself? What
# is 0 / 0, and what could you divide 0 by instead?</details>
# <details><summary>Hint 2</summary><code>amin</code> and <code>amax</code> take several axes at once, and <code>keepdim=True</code> keeps the result
# broadcastable. <code>torch.where(condition, a, b)</code> chooses value by value, so it can put 1 in the place of a spread of
# 0.</details>
# <details><summary>Hint 3</summary>Another quotient, row by row: the share of each number in its row. The second row is empty.
#
# ```python
# counts = torch.tensor([[1., 3.], [0., 0.]])
# total = counts.sum(1, keepdim=True)                               # 2 1
# counts / total.where(total > 0, 1)        # tensor([[0.2500, 0.7500], [0.0000, 0.0000]])
# ```
# </details>

# %% exercise="01.2"
def scaled(raw):
    """Each map of b c h w scaled to 0..1 by itself; constant maps give zeros."""
    ### BEGIN SOLUTION
    low, high = raw.amin((-2, -1), keepdim=True), raw.amax((-2, -1), keepdim=True)
    spread = high - low
    return (raw - low) / torch.where(spread == 0, 1, spread)
    ### END SOLUTION

# %% check="01.2" points=2
with check("01.2", hint="amin and amax over the last two axes") as ask:
    given = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    given *= torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    scale = lambda x: maps.heatmap(x, x.shape[-2:])               # the library's answer
    right, peak = scale(given), given.flatten(2).max(2).values[..., None, None]
    same(ask(scaled, given), right, "scaled(raw)", axes="b c h w", suspects={
        "You took the minimum and maximum of the whole batch: then one image changes "
        "what another one shows.": lambda: scale(given.view(1, 24, 5)).view_as(given),
        "You took them over the channels too: each map of an image has its own minimum "
        "and maximum.": lambda: scale(given.view(2, 12, 5)).view_as(given),
        "You divided by the maximum only: subtract the minimum first, and divide by "
        "the difference of the two.": lambda: given / peak,
        "You cut off the negative values first (as Grad-CAM does). Here the lowest "
        "value becomes 0, whatever its sign.": lambda: scale(given.relu()),
        "You subtracted the minimum, but divided by the maximum as it was before.":
            lambda: given / peak + (right - given / peak).amax((2, 3), keepdim=True)})
    mixed, want = given.clone(), right.clone()
    mixed[0, 1], want[0, 1] = 3.0, 0.0                          # one map is constant
    came = ask(scaled, mixed)
    assert not came.isnan().any(), ("A constant map gave NaN: 0 / 0. It should give "
                                    "zeros.")
    assert not came[0, 1].any(), ("A constant map should give zeros, but "
                                  f"{came[0, 1].max():.3g} came.")
    same(came, want, "scaled(raw) with one constant map", axes="b c h w", suspects={
        "One constant map emptied all others: only the constant one becomes zeros.":
            0 * want,
        "One constant map emptied those of its image: only itself becomes zeros.":
            want * torch.tensor([0.0, 1.0])[:, None, None, None]})
### BEGIN HIDDEN TESTS
three = torch.tensor([-2.0, 0.0, 2.0]).view(1, 1, 1, 3)
assert torch.equal(scaled(three), torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
assert torch.equal(scaled(torch.zeros(1, 2, 3, 3)), torch.zeros(1, 2, 3, 3))
### END HIDDEN TESTS

# %% [markdown]
# ## From a heatmap to a box
#
# Zhou et al. keep the pixels above 20 % of the maximum and take the box around the **largest connected region**. Turn the
# threshold (this figure needs no kernel):

# %%
heat = maps.heatmap(maps.cam(scene_features, weight[rows[:1]]), 224)[0, 0].cpu()
truth = scene.boxes[0]

def at(threshold):
    box = maps.box(heat, threshold)
    kept = (heat > threshold * heat.max()).to(torch.uint8)
    return plots.grid([plots.overlay(picture, heat), picture],
                      ["heatmap and box", "pixels above the threshold"], columns=2,
                      side=2.8, masks=[torch.zeros_like(kept), kept], boxes=[truth] * 2,
                      predicted=[box] * 2)

def describe(threshold):
    box = tuple(maps.box(heat, threshold).tolist())
    return (f"Heatmap of the {first}; its box at threshold {threshold} is {box}, the "
            f"true one {truth.tolist()}.")

widgets.flipbook(at, [round(0.1 * i, 1) for i in range(10)],
                 label="threshold, share of the maximum", alt=describe)

# %% [markdown]
# ### Exercise 01.3 · The box (3 points, 15 minutes)
#
# Write `region_box(heatmap, threshold)`: keep the pixels **above** `threshold` × the maximum, find the largest connected
# region (diagonal neighbours count as connected) and return its box `(x0, y0, x1, y1)` as four ints. `x1` and `y1` lie one past
# the last pixel, so that `x1 - x0` is the width.
#
# `ndimage.label(mask, np.ones((3, 3)))` gives an array with a number for each region (0 is outside) and how many there are.
#
# <details><summary>Hint 1</summary><code>np.bincount(regions.ravel())</code> counts the pixels of each number. Which entry must not
# win?</details>
# <details><summary>Hint 2</summary>Leave out the entry of 0 before you take <code>argmax</code>, and mind that the places then begin one
# number later. <code>np.nonzero</code> of the mask of one region gives the rows first (that is <i>y</i>), then the columns.</details>
# <details><summary>Hint 3</summary>Another search for the most frequent number, without the zeros (no answer) among votes; and
# where it stands:
#
# ```python
# votes = np.array([[0, 0, 2], [0, 1, 2]])
# count = np.bincount(votes.ravel())        # 3 without answer, 1 for "1", 2 for "2"
# count[0] = 0
# rows, columns = np.nonzero(votes == count.argmax())
# (rows.tolist(), columns.tolist())                                 # ([0, 1], [2, 2])
# ```
# </details>

# %% exercise="01.3"
def region_box(heatmap, threshold):
    """Box (x0, y0, x1, y1) of the largest region of an H W array above threshold *
    maximum."""
    ### BEGIN SOLUTION
    heatmap = np.asarray(heatmap)
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    rows, columns = np.nonzero(regions == largest)
    return (int(columns.min()), int(rows.min()), int(columns.max()) + 1,
            int(rows.max()) + 1)
    ### END SOLUTION

# %% check="01.3" points=3
with check("01.3", hint="threshold, label, largest, box") as ask:
    toy = np.zeros((12, 16))
    toy[0, 1:3] = toy[0, 15] = toy[2, 8:15] = 1.2               # three small regions,
    toy[2:4, 1:4] = 2.0                                         # the hottest one,
    toy[5:10, 7:13] = toy[4, 6] = 1.5                # the largest, touching at a corner
    toy[5:8, 13:] = 1.0, 0.7, 0.3                               # and its slope
    same(ask(region_box, toy, 0.5), (6, 4, 13, 10), "region_box(toy, 0.5)", suspects={
        "That is the box around everything above the threshold: only the largest "
        "connected region counts.": (1, 0, 16, 10),
        "Rows and columns are exchanged: x runs along columns, and np.nonzero gives "
        "the rows first.": (4, 6, 10, 13),
        "x1 and y1 are the last pixels themselves: they should lie one past them.":
            (6, 4, 12, 9),
        "The last two numbers are width and height: (x0, y0, x1, y1) is asked for.":
            (6, 4, 7, 6),
        "Pixels that touch at a corner belong together: label needs np.ones((3, 3)).":
            (7, 5, 13, 10), "A pixel at the threshold itself was kept: above means >.":
            (6, 4, 14, 10),
        "That is the hottest region. The largest one counts, whoever has the peak.":
            (1, 2, 4, 4),
        "That is region 1, the first. The largest one counts.": (1, 0, 3, 1),
        "That is the region before the largest one. Regions are numbered from 1: is "
        "a + 1 missing?": (8, 2, 15, 3),
        "That is the whole image: did the background win? Region 0 is outside.":
            (0, 0, 16, 12),
        "The threshold is a share of the maximum, which is 2 here: you used it as an "
        "absolute value.": (6, 4, 15, 10),
        "The threshold is a share of the maximum: you took that of the mean.":
            (6, 4, 16, 10)})
### BEGIN HIDDEN TESTS
ring = np.zeros((9, 9)); ring[1:8, 1:8] = 1.0; ring[3:6, 3:6] = 0.0
assert region_box(ring, 0.5) == (1, 1, 8, 8)
edge = np.zeros((5, 5)); edge[0, 0] = edge[1, 1] = 2.0
assert region_box(edge, 0.9) == (0, 0, 2, 2)
assert region_box(np.array([[0.0, 0.5, 1.0]]),
                  0.5) == (2, 0, 3, 1), "above means >, not >="
### END HIDDEN TESTS

# %% [markdown]
# Now with your hands: choose a class and a threshold. (`maps.box` follows the benchmark to the letter: 8-bit levels, holes
# filled, and at the border x1, y1 stay inside the image.)

# %% tags=["widget"]
guesses = scene_logits[0].topk(6).indices.tolist()
choices = {names[i]: i for i in dict.fromkeys([*rows, *guesses])}

def steer(label, threshold):
    heat = maps.heatmap(maps.cam(scene_features, weight[[label]]), 224)[0, 0].cpu()
    title = f"{names[label]}: logit {scene_logits[0, label]:.2f}"
    return plots.grid([plots.overlay(picture, heat)], [title], boxes=[scene.boxes],
                      predicted=[maps.box(heat, threshold)], columns=1, side=3.6)

steering = widgets.live(steer,
                        alt=lambda label, threshold: f"Heatmap of {names[label]} on "
                                                     f"{first} and {second}, with its "
                                                     f"box, threshold {threshold:.2f}.",
                        label=ipywidgets.Dropdown(options=choices, description="class"),
                        threshold=ipywidgets.FloatSlider(
                            0.2, min=0.0, max=0.95, step=0.05, continuous_update=False))
steering

# %%
steering.children[1].value = 0.5                 # what a hand does; the picture answers
assert "threshold 0.50" in steering.children[2].value

# %% [markdown]
# ## A wrong map that looks right
#
# DenseNet ends in a batch normalisation and then a ReLU, and in torchvision that ReLU is no module: it is a line inside
# `forward`. Whoever takes "the output of the last block" gets the values **before** it, and a map that looks like any other.
# The weights here are random, as nothing can be downloaded for certain; the identity does not mind.
#
# *Before you run the cell:* which of the two maps is the logit's, and how could you tell without knowing the code?

# %%
densenet = densenet121(weights=None, num_classes=10).eval().requires_grad_(False)
image = picture[None] / 255
with torch.inference_mode():
    answer = densenet(image)
    proper, linear = backbones.split_classifier(densenet)
    taps = {"the last block": densenet.features(image),
            "after the hidden ReLU": proper(image)}
tapped = [maps.cam(tap, linear.weight) for tap in taps.values()]         # 1 10 7 7 each
off = [(m.mean((2, 3)) + linear.bias - answer).abs().max().item() for m in tapped]
for (name, tap), d in zip(taps.items(), off):
    print(f"{name:22} smallest value {tap.min():5.2f}   |mean(map) + bias - logit| up "
          f"to {d:.1e}")
plots.show(plots.grid(
    [picture] * 2, [f"{name}\noff by {d:.1e}" for name, d in zip(taps, off)],
    heatmaps=[maps.heatmap(m, 224)[0, 0] for m in tapped], columns=2, side=2.8,
    title="Both look like maps; only the identity tells them apart"),
           alt="Two heatmaps of an untrained DenseNet on the scene with two objects, "
               "made before and after its hidden ReLU. They differ, but nothing in the "
               "pictures says which one is right.")
assert off[0] > 1e-2 > 1e-4 > off[1]
lesson.record("identity of a DenseNet without its ReLU: off by", off[0],
              note="with it: rounding")

# %% [markdown]
# `backbones.split_classifier` runs this test on every network it takes apart, and refuses those for which CAM is not defined,
# since they do not end in pooling and one linear layer:

# %%
for unsuitable in ("vgg11", "convnext_atto", "mobilenetv3_small_050"):
    with expect_error(ValueError):
        backbones.split_classifier(timm.create_model(unsuitable))

# %% [markdown]
# ## How good is a map?
#
# A picture convinces; a number compares. In **weakly supervised localisation** the box read from a map is held against the
# box that a person drew (here: that the mask gives). It counts if their intersection over union (IoU) is at least 0.5.
#
# | measure | question |
# |---|---|
# | GT-known | the true class is given: is the box right, at the threshold 0.2 of the CAM paper? |
# | MaxBoxAcc | the same at the best threshold, **one for all images** |
# | MaxBoxAccV2 | the same for IoU 0.3, 0.5 and 0.7, any region may match; mean of the three |
# | top-1 localisation | is the box right **and** the predicted class as well? |
# | PxAP | average precision of the heatmap's pixels against the mask |
#
# And beside each of them two **baselines that have never looked at the image**: a box in its centre, and the whole image. A
# map that is no better than these has localised nothing. A third row is a **control**: the sum of all channels, with no class
# in it at all.
#
# *Before you run the cell:* objects in photographs tend to be large and central. What do you expect of the centred box?

# %%
root = lesson.data / "ilsvrc2012"
if lesson.profile != "paper":
    root = minis.mini_ilsvrc(lesson.data, seed=SEED)
data = Ilsvrc(root, "val")
print(data)
scores = {"CAM": (MaxBoxAcc(), PxAP()), "no class": (MaxBoxAcc(), PxAP())}
for batch in islice(data.batches(batch_size=16),
                    lesson.choose(smoke=3, mini=None, paper=None)):
    features, logits = look(batch.images)
    # b 1 1280: of each image's class
    own = weight[batch.labels.to(lesson.device)][:, None]
    raw = {"CAM": maps.weighted_map(features, own)[:, 0],
           "no class": features.sum(1)}  # b 7 7
    for name, (boxes, pixels) in scores.items():
        heat = maps.heatmap(raw[name], 224).cpu()
        boxes.accumulate(heat, batch.boxes, logits.argmax(1).cpu() == batch.labels)
        if batch.masks is not None:
            pixels.accumulate(heat, batch.masks)
cam, no_class = (boxes.compute() for boxes, _ in scores.values())
display(Markdown(cam.table()))

# %%
figure = plots.curve(HEATMAP_THRESHOLDS,
                     {"CAM": 100 * cam.single[1], "no class": 100 * no_class.single[1]},
                     best=True, xlabel="threshold, share of the heatmap's maximum",
                     ylabel="GT-known localisation, % of images",
                     title=f"CAM localises {cam.max_box_acc:.0%} at its best "
                           f"threshold, {cam.gt_known:.0%} at 0.2",
                     baselines={"best centred box": 100 * cam.centre_best,
                                "whole image": 100 * cam.whole_image})
plots.show(figure,
           alt="Localisation accuracy over the threshold. CAM peaks at "
               f"{cam.max_box_acc:.0%} near {cam.best_threshold:.2f}, the sum of all "
               f"channels at {no_class.max_box_acc:.0%}; the best centred box reaches "
               f"{cam.centre_best:.0%}, the whole image {cam.whole_image:.0%}.")

# %% [markdown]
# Three things to read from this curve:
#
# 1. **The threshold decides as much as the method.** Two maps may change places between 0.2 and the best threshold: always
#    ask for the whole curve. The best threshold is chosen on the images it is scored on, so it flatters every method alike.
# 2. **The control is good, too.** On pictures with one object, "where is anything at all?" is most of the answer. Localisation
#    measures *where*; it cannot show that a map explains *why this class*.
# 3. **The baselines are not zero**, and they depend on the data: never compare percentages from different data sets.
#
# Here are the last images, at the best threshold:

# %%
last = maps.heatmap(raw["CAM"], 224).cpu()[:8]
found, true = maps.box(last, cam.best_threshold), batch.boxes[:8]
hits = [iou(box[None], truth).max().item() for box, truth in zip(found, true)]
labels = [names[label] for label in batch.labels[:8]]
plots.show(plots.grid(batch.images[:8],
                      [f"{name}\nIoU {hit:.2f}" for name, hit in zip(labels, hits)],
                      heatmaps=last, boxes=true, predicted=list(found),
                      title="CAM of the true class, its box and the true one"),
           alt="Scenes under their heatmaps with a solid true and a dashed predicted "
               "box. Intersections over union: "
           + ", ".join(f"{n} {hit:.2f}" for n, hit in zip(labels, hits)) + ".")

# %% [markdown]
# ## What was measured
#
# The papers' figures belong to real ILSVRC photographs and other networks; they stand beside ours for orientation, not for
# comparison. The scenes of one photograph are not independent of each other, so differences of a few points mean little here.

# %%
percent = {"class accuracy": cam.accuracy,
           "GT-known localisation, threshold 0.2": cam.gt_known,
           "MaxBoxAcc": cam.max_box_acc, "MaxBoxAccV2": cam.max_box_acc_v2,
           "MaxBoxAcc of the sum of all channels": no_class.max_box_acc,
           "baseline: best centred box": cam.centre_best,
           "baseline: centred half of the image": cam.centre_half,
           "baseline: whole image": cam.whole_image}
lesson.record("images", cam.images)
lesson.record("best threshold of CAM", cam.best_threshold)
for name, value in percent.items():
    lesson.record(name, 100 * value, "%")
lesson.record("top-1 localisation error, best threshold", 100 * (1 - cam.top1_best),
              "%", paper=56.2,
              note="paper: ResNet-50 on ILSVRC val (Shen et al., Table 1)")
lesson.record("top-1 localisation error, threshold 0.2", 100 * (1 - cam.top1), "%")
if data.photos[0].mask:
    for name, (_, pixels) in scores.items():
        lesson.record(f"PxAP, {name}", 100 * pixels.compute(), "%")
assert cam.max_box_acc > max(cam.centre_best,
                             cam.whole_image), "worse than those who never looked"
assert cam.top1_best <= min(cam.max_box_acc, cam.accuracy)
lesson.finish(fingerprint=fingerprint(root))

# %% [markdown]
# ## You can now
# - write CAM in one line, for all classes at once, and say why its mean plus the bias *is* the logit;
# - use that identity to expose a map taken from the wrong place;
# - go from a map to a heatmap to a box, and name the choices on the way;
# - measure localisation with its baselines, and say what it cannot show.
#
# **To go deeper** · Add the same number to one weight of **all** classes: do the predictions change? Does the map? (Lesson 02
# comes back to this.) · In Table 1 of Shen et al. CAM does worse on the three DenseNets (62.4, 62.3, 62.5 % error) than on
# ResNet-18 (59.5), a much weaker network. Which mistake of this lesson could do that, and how would you find out?
#
# **Where things are** · `maps.cam` (Zhou et al., Eq. 2), `maps.heatmap`, `maps.box` in `course_lib/maps.py`; all thresholds in one
# pass in `course_lib/components.py`; the measures in `course_lib/evaluate/localization.py`.
#
# {{next}}
