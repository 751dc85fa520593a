# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Image retrieval: from classes to neighbours
#
# {{badge}}
#
# **You will**
# 1. write two measures of a rank list, Recall@K and MAP@R, and find out what each of them does not see;
# 2. train an embedding on some species, choose the epoch on others, and measure it on others still;
# 3. take the worst rank lists apart, and test whether the map of a pair is about the pair.
#
# **Time** 75 minutes to work through; about two minutes of computing on a CPU the first time, less on a GPU.
# **Before** [02 Dist-CAM](02_dist_cam.ipynb) and [03 Learning the metric](03_learning_the_metric.ipynb).
#
# **Sources** Shen et al.: *Distance-Based Class Activation Map for Metric Learning* · Oh Song et al.: *Deep Metric Learning via
# Lifted Structured Feature Embedding*, CVPR 2016 (the protocol) · Musgrave et al.: *A Metric Learning Reality Check*, ECCV 2020
# (the measures, and what goes wrong in comparisons) · Radovanović et al.: *Hubs in Space*, JMLR 2010.

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": minutes on a CPU · "paper": "mini", trained
# for longer
PROFILE = "mini"
# "" finds the data folder; CUB-200-2011 itself is for the command, see the end
DATA_ROOT = ""
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
import ipywidgets
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import backbones, engine, maps
from course_lib.cache import cached
from course_lib.worlds import minis
from course_lib.data.cub import Cub
from course_lib.data.miniature import fingerprint
from course_lib.evaluate import controls, ranking
from course_lib.metric_learning import losses, rules
from course_lib.metric_learning.features import extract, tail, trunk
from course_lib.metric_learning.learner import (EMBEDDING_LOSSES, BalancedBatches,
                                                Learner, embedding)
from course_lib.show import plots, widgets
from course_lib.checks import check, same, yours
from course_lib.lesson import start

lesson = start("05", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## Words
#
# {{words}}
#
# ## No list of classes
#
# A classifier knows the names that it was given. It gives one of them to every image, also to a bird that is not on its list.
# **Retrieval** asks another question: *which images show the same thing as this one?* It needs no list of classes. It needs
# distances only, and its answer is a **rank list**: all other images, nearest first.
#
# The protocol of CUB-200-2011 tests this on new classes. The training sees the first half of the species. In the second half
# every image is a **probe** once, and all the others are its **gallery**.
#
# Our miniature has the same layout. Two things make it easier than the benchmark:
#
# * A class is, as a rule, **one photograph** in eight scenes. To find "the same species" is to find the same animal on another
#   background, in another size, mirrored or turned. That is close to the detection of copies.
# * Classes differ much. They are called species here, though some are more than that (*Fly*, *Murray mussel*).
#
# A few images are grey, as in the benchmark.

# %%
side = lesson.choose(smoke=96, mini=224, paper=224)
root = minis.mini_cub(lesson.data, seed=SEED)
data = fingerprint(root)
known, unseen = Cub(root, "train"), Cub(root, "test")
labels, species = unseen.labels, unseen.classes
before = backbones.create("tf_efficientnet_lite0").to(lesson.device,
                                                      memory_format=torch.channels_last)

def trunk_of(images, name):
    """Features in front of the last block: made once, they serve every network of this
    lesson."""
    return extract(lambda batch: trunk(before, batch), images, (side, side),
                   device=lesson.device, keep=data, name=f"05 trunk, {name}")

known_t, unseen_t = trunk_of(known, "training"), trunk_of(unseen, "test")
print(known, unseen, tuple(unseen_t.shape), sep="\n")

# %% [markdown]
# ### What the backbone has seen before
#
# The test species are new for *our* training. They are not new for the backbone: it was trained on the 1000 classes of ImageNet.
# How many of the test species are such a class, by name?

# %%
imagenet = ImageNetInfo()
classes = {name.strip().lower() for index in range(imagenet.num_classes())
           for name in imagenet.index_to_description(index).split(",")}
seen_before = [name for name in species if name.lower() in classes]
print(*seen_before[:8], "...", sep=", ")
lesson.claim(f"{len(seen_before)} of {len(species)} test species have the name of an "
             "ImageNet class: for the backbone they are not new.", len(seen_before) > 9)

# %% [markdown]
# The same holds for CUB-200-2011, whose birds are in ImageNet, too. So "never seen" means in this lesson: never seen by the
# training of the metric.

# %%
def look(network, features):
    """Last feature maps, n 1280 h w, from features of the trunk."""
    network.eval()
    with torch.inference_mode():
        return torch.cat([tail(network, part.to(lesson.device)).cpu()
                          for part in features.split(32)])

def by_direction(features):
    """Cosine distances of all pairs, 0..2: n k -> n n."""
    unit = F.normalize(features, dim=1)
    return 1 - unit @ unit.T

# Images of the test as the network sees them, squashed to squares.
photos = torch.stack([transforms.resize(image, [224, 224], antialias=True)
                      for image, _ in unseen])
found = look(before, unseen_t)                                            # 424 1280 7 7
pooled = found.mean((2, 3))
raw = {"maps": found, "pooled": pooled, "rows": F.normalize(pooled, dim=1),
       "distance": by_direction(pooled)}
others = ~torch.eye(len(unseen), dtype=torch.bool)   # whom a probe may be compared with

# %% [markdown]
# ### A first rank list
#
# The network was trained to name classes, not to compare images. We take the probe in the **middle**: half of all probes have a
# better list.
#
# *Prediction 05.a:* how many of its first six answers are right?

# %% tags=["prediction"]
lesson.predict("05.a", None)  # your guess, 0 to 6

# %%
def first_right(distance):
    """Rank of the first right answer of every probe, from 1."""
    order = rules.ranked(distance, others, len(labels))
    return 1 + (labels[order] == labels[:, None]).int().argmax(1)

def answer(probe, state, weights=None, k=6):
    """The rank list of a probe, as arguments of `plots.rank_list`; with maps by
    `weights(state, images, partners)`."""
    order = rules.ranked(state["distance"][[probe]], others[[probe]], k)[0]
    heat = [None] * (k + 1)
    if weights is not None:                 # each image against its partner in the pair
        images, partners = (torch.tensor([probe, *order]),
                            torch.tensor([order[0], *[probe] * k]))
        heat = maps.heatmap(weights(state, images, partners), 224)
    return {"probe": photos[probe], "gallery": photos[order],
            "correct": labels[order] == labels[probe],
            "distances": state["distance"][probe, order], "probe_heatmap": heat[0],
            "heatmaps": None if weights is None else heat[1:],
            "names": [species[label][:15] for label in labels[order]],
            "probe_name": species[labels[probe]][:15]}

def describe(page):
    return plots.rank_list_alt(f"a probe, {page['probe_name']}", page["correct"],
                               page["distances"])

# %%
by_precision = ranking.retrieval(raw["rows"], labels).average_precision.argsort()
page = answer(by_precision[len(labels) // 2].item(), raw)       # the worst come first
right = int(page["correct"].sum())
lesson.outcome("05.a", right)
plots.show(plots.rank_list(**page, title=f"{right} of the first 6 are right"),
           alt=describe(page))

# %% [markdown]
# One probe is an anecdote. We need numbers for whole rank lists.
#
# ### Exercise 05.1 · Recall@K (2 points, 10 minutes)
#
# The usual measure of retrieval asks: **is there at least one right answer among the first K?**
#
# $$\text{Recall@}K = \frac{1}{|Q|} \sum_{i \in Q} \Big[\, \exists\, j \in N_K(i):\; y_j = y_i \Big]$$
#
# $N_K(i)$ are the $K$ nearest **others** of image $i$, never $i$ itself. $Q$ are the images that have another one of their
# class: an image without a match cannot find one, and does not count. (Elsewhere *recall* is the share of all matches that was
# found. This measure has the same name and another meaning.)
#
# Write `recall_at_k(distance, labels, k)` with `distance` `n n`; the result is a share in 0..1.
#
# <details><summary>Hint 1</summary>No image may find itself. A copy of an image is at distance 0, too: is the first of a sorted
# list always the image itself? How else do you know its place in a row of <code>distance</code>?</details>
# <details><summary>Hint 2</summary>In a copy of <code>distance</code>, put infinity on the diagonal. <code>.topk(k, largest=False).indices</code> are
# then the nearest others, <code>n k</code>, and <code>labels[...]</code> of these indices are their classes. Which images have another one of their
# class? Average over these.</details>
# <details><summary>Hint 3</summary>One row by hand, for image 1 of four, which has class 4. Its own place is masked.
#
# ```python
# row, kinds = torch.tensor([3.0, torch.inf, 1.0, 2.0]), torch.tensor([5, 4, 7, 4])
# near = row.topk(2, largest=False).indices                            # 2, 3
# (kinds[near] == 4).tolist()                                          # [False, True]
# ```
# Is one of the two right? Then this image is a hit.</details>

# %% exercise="05.1"
def recall_at_k(distance, labels, k):
    """Share of the images that have a match which find one among their k nearest
    others: distance n n, labels n."""
    ### BEGIN SOLUTION
    itself = torch.eye(len(labels), dtype=torch.bool)
    nearest = distance.masked_fill(itself,
                                   torch.inf).topk(k, largest=False).indices  # n k
    hit = (labels[nearest] == labels[:, None]).any(1)
    return hit[(labels[:, None] == labels).sum(1) > 1].float().mean()
    ### END SOLUTION

# %% check="05.1" points=2
with check("05.1", hint="Infinity on the diagonal, topk, any.") as ask:
    kinds = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4])   # 4: no match
    spots = torch.randn(14, 3, generator=torch.Generator().manual_seed(332))
    spots += 0.5 * kinds[:, None]
    spots[4] = spots[5] + 0.001           # nearly a copy, of another class; and the
    gaps = torch.cdist(spots, spots, compute_mode="donot_use_mm_for_euclid_dist")
    gaps += 0.01 * torch.eye(14)            # diagonal is not quite 0, by rounding
    for depth in (2, 1, 3):
        # the library's answer; wrong ones, for 2:
        same(ask(recall_at_k, gaps, kinds, depth),
             ranking.retrieval(spots, kinds, (depth,)).recall[depth],
             f"recall_at_k(..., {depth})", {} if depth != 2 else {
            "Every image found itself: put infinity on the diagonal.": 1,
            "You dropped the first of the sorted images. It need not be the image "
            "itself: a copy of it may stand there. Exclude it by its index.": 10 / 13,
            "You looked at K + 1 images: without the image itself, K are left to take.":
                9 / 13,
            "You excluded twice: the image itself, and then the nearest one of the "
            "others.": 6 / 13,
            "You averaged over all images: one without a match does not count.": 8 / 14,
            "This is the share of right ones among the first K: is there one at all?":
                4 / 13,
            "This is the share of the matches that were found: was one found at all?":
                19 / 78,
            "These are the farthest images: topk takes the largest unless told "
            "otherwise.": 2 / 13,
            "Only the K-th neighbour was looked at: any of the first K counts.": 5 / 13,
            "All of the first K must be right in yours: one is enough.": 0,
            "You counted the hits: divide by the number of images.": 8,
            "This is in percent: a share lies in 0..1.": 800 / 13})
### BEGIN HIDDEN TESTS
assert [float(recall_at_k(torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]]),
                          torch.tensor([0, 1, 0]), k)) for k in (1, 2)] == [0.5, 1]
### END HIDDEN TESTS

# %% [markdown]
# The measures of the backbone as it is:

# %%
def library_recall(distance, labels, k):
    return ranking.retrieval_by_distance(distance, labels, (k,)).recall[k]

recall = yours("05.1", recall_at_k, library_recall)
for k in ranking.KS:
    print(f"Recall@{k}  {recall(raw['distance'], labels, k):.1%}")

# %% [markdown]
# ### Exercise 05.2 · MAP@R (3 points, 12 minutes)
#
# Recall@K stops at the first right answer. Compare a probe whose seven matches stand at ranks 1 to 7 with one whose second match
# stands at rank 300: Recall@1 gives both the same. Let $R$ be the number of a probe's matches, and look at the first $R$ places
# only. A perfect list has nothing but right answers there. **R-precision** is the share of right ones among them. **MAP@R** also
# asks where they stand:
#
# $$\text{MAP@}R = \frac{1}{|Q|} \sum_{i \in Q} \frac{1}{R_i} \sum_{r=1}^{R_i} [\text{the } r\text{-th is right}]\; P_i(r),
# \qquad P_i(r) = \frac{\text{right ones among the first } r}{r}$$
#
# Write `map_at_r(distance, labels)`. As before no image finds itself, and images without a match do not count. $R_i$ differs
# from image to image.
#
# <details><summary>Hint 1</summary>Take one image, with R matches. How many spots of its list count? What is the precision at
# each of them, and at which of them is it added?</details>
# <details><summary>Hint 2</summary>A loop over the images is a fine first answer: sort the others, take the first R, mark the
# right ones with 1. <code>cumsum</code> of the marks counts the right ones so far; divided by the ranks it is the precision. For all images
# at once, sort whole rows and mark what is right *and* has a rank of at most R.</details>
# <details><summary>Hint 3</summary>A ball game: the share of games won so far, after each game, and its mean over the games that
# were won. (By which number is MAP@R divided?)
#
# ```python
# won = torch.tensor([1, 0, 1, 1])
# share = won.cumsum(0) / torch.arange(1, 5)                           # 1, 0.5, 0.67, 0.75
# (won * share).sum() / won.sum()                                      # tensor(0.8056)
# ```
# </details>

# %% exercise="05.2"
def map_at_r(distance, labels):
    """Mean average precision at R of all images that have a match: distance n n, labels
    n -> share in 0..1."""
    ### BEGIN SOLUTION
    itself = torch.eye(len(labels), dtype=torch.bool)
    # n n, itself last
    order = distance.masked_fill(itself, torch.inf).argsort(dim=1, stable=True)
    matches = (labels[:, None] == labels).sum(1, keepdim=True) - 1     # R of each image
    rank = torch.arange(1, len(labels) + 1)
    hit = (labels[order] == labels[:, None]) & (rank <= matches)
    precision = hit.cumsum(1) / rank
    return ((hit * precision).sum(1, keepdim=True) / matches)[matches > 0].mean()
    ### END SOLUTION

# %% check="05.2" points=3
with check("05.2",
           hint="The first R spots; precision where it is right; divided by R.") as ask:
    kinds = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4])   # 4: no match
    for draw in (332, 1, 2, 3):
        spots = torch.randn(14, 3, generator=torch.Generator().manual_seed(draw))
        spots += 0.5 * kinds[:, None]
        spots[4] = spots[5] + 0.001        # nearly a copy, of another class
        gaps = torch.cdist(spots, spots, compute_mode="donot_use_mm_for_euclid_dist")
        # the library's answer; wrong ones, for the first draw:
        same(ask(map_at_r, gaps + 0.01 * torch.eye(14), kinds),
             ranking.retrieval(spots, kinds).map_at_r, "map_at_r(...)",
             {} if draw != 332 else {
            "This is R-precision: weigh each right answer by the precision at its "
            "place.": 0.294872,
            "You divided by the number of right ones among the first R: divide by R.":
                0.455128,
            "You went through the whole list: only the first R spots count.": 0.391370,
            "You averaged the precision over all R spots: it counts only at right "
            "answers.": 0.258547,
            "Every image found itself: put infinity on the diagonal.": 0.495727,
            "You dropped the first of the sorted images: exclude the image itself by "
            "its index.": 0.288462,
            "You took the same R for all images: it is the number of matches of each.":
                0.166667,
            "R counts the image itself: it is the number of its *other* images.":
                0.158654,
            "You averaged over all images: one without a match does not count.":
                0.172619,
            "You divided all sums by the sum of all R: average over the images last.":
                0.203125,
            "This looks at the first right answer only: all right ones count.":
                0.448718,
            "Your ranks are one too large: they start from 1.": 0.113248})
### BEGIN HIDDEN TESTS
line = torch.tensor([0.0, 1, 3, 7, 15])
assert abs(float(map_at_r((line[:, None] - line).abs(), torch.tensor([0, 1, 0, 1, 0])))
           - 0.15) < 1e-4
### END HIDDEN TESTS

# %% [markdown]
# Four lists for a probe with $R = 4$ matches; 1 is right.
#
# *Prediction 05.b:* which list has the **second** highest MAP@R: 1000, 0001, 1100 or 0011?

# %% tags=["prediction"]
lesson.predict("05.b", None)  # your guess, such as "0011"

# %%
def library_map_at_r(distance, labels):
    return ranking.retrieval_by_distance(distance, labels).map_at_r

mean_precision = yours("05.2", map_at_r, library_map_at_r)
def one_list(places):
    """MAP@R of a probe whose first four answers are right (1) or wrong (0)."""
    kinds = [0, *(0 if place == "1" else 1 for place in places),
             *[0] * places.count("0")]                   # missed matches come last
    row = torch.arange(len(kinds)).float()               # distances from the probe
    found = ranking.retrieval_by_distance(row.expand(len(row), -1),
                                          torch.tensor(kinds))
    return found.average_precision[0].item()

lines = ["| first four places | Recall@1 | Recall@4 | MAP@R |", "|---|---|---|---|"]
value = {places: one_list(places) for places in ("1000", "0001", "1100", "0011")}
for places, precision in value.items():
    lines.append(f"| {places} | {places[0]} | {max(places)} | {precision:.2f} |")
display(Markdown("\n".join(lines)))
lesson.outcome("05.b", sorted(value, key=value.get)[-2])
print(f"MAP@R of the backbone: {mean_precision(raw['distance'], labels):.1%}")

# %% [markdown]
# Recall@4 gives all four lists the same. MAP@R tells them apart, and one right answer at the first place counts more than two at
# the last ones.
#
# ## Length or direction?
#
# The paper compares pooled features by their $L_1$ distance. Most work on retrieval compares **directions**, by the cosine. The
# length of a feature says how much there is to see, how large and how bright it is. That has little to do with *what* it is. For
# features of length 1, the Euclidean distance and the cosine give the same order:
#
# $$|\hat a - \hat b|^2 = |\hat a|^2 + |\hat b|^2 - 2\, \hat a \cdot \hat b = 2 - 2 \cos(a, b) .$$
#
# *Prediction 05.c:* by how many points does Recall@1 change if the length is left away?

# %% tags=["prediction"]
lesson.predict("05.c", None)  # your guess, in points, with its sign

# %%
assert torch.allclose(torch.cdist(raw["rows"], raw["rows"]).square(),
                      2 * raw["distance"], atol=1e-4)
results = {"pooled, Euclidean": ranking.retrieval(pooled, labels, ranking.KS),
           "pooled, cosine": ranking.retrieval(raw["rows"], labels, ranking.KS)}

def table():
    columns = [*(f"Recall@{k}" for k in ranking.KS), "R-precision", "MAP@R"]
    lines = [f"| compared | {' | '.join(columns)} |", "|---" * 7 + "|"]
    for name, found in results.items():
        values = (*found.recall.values(), found.r_precision, found.map_at_r)
        lines.append(f"| {name} | "
                     f"{' | '.join(f'{100 * value:.1f} %' for value in values)} |")
    display(Markdown("\n".join(lines)))

table()

# %%
plain, cosine = results.values()
rise = {"MAP@R": 100 * (cosine.map_at_r - plain.map_at_r),
        "Recall@1": 100 * (cosine.recall[1] - plain.recall[1])}
lesson.outcome("05.c", rise["Recall@1"], "points")
lesson.claim(f"Without the length MAP@R rises by {rise['MAP@R']:.1f} points, while "
             f"Recall@1 changes by {rise['Recall@1']:+.1f}: the first answer was right "
             "already, the later ones were not.",
             rise["MAP@R"] > 1.5 and abs(rise["Recall@1"]) < 1.5)
length = pooled.norm(dim=1)
print(f"lengths of the pooled features: {length.min():.1f} to {length.max():.1f}")

# %% [markdown]
# ## Hubs: images that answer everybody
#
# Count for each image in how many lists it stands among the first $k$. This count is $N_k$. Every list has $k$ places, so the
# mean of $N_k$ is $k$. But some images stand in far more lists: they are **hubs**. A species has eight images here, so an image can be
# right in seven lists. In every further list it is a wrong answer. Radovanović et al. found two causes: many dimensions, and a place near the centre of the data. A point near the centre is near
# to everything.
#
# ### Exercise 05.3 · An experiment: what makes hubs smaller? (3 points, 15 minutes)
#
# Compare three distances on the same features: the Euclidean distance, the cosine, and the cosine after the mean feature of the
# data was subtracted ("centred"). Write `hub_trial(features, k)`. It returns two things:
#
# * a dict with the largest $N_k$ under `"Euclidean"`, `"cosine"` and `"cosine, centred"`;
# * your conclusion: the name of the distance whose largest hub is the smallest.
#
# No image stands in its own list. Try your function on features of your own before you run the check: points around the centre,
# points of different lengths, points far from the origin. Which distance wins where?
#
# <details><summary>Hint 1</summary>What do the rows of a list of neighbours say, and what do its entries say? Whom do you count, the
# one who has the list or the ones who stand in it?</details>
# <details><summary>Hint 2</summary>Make the three versions of the features first: as they are, of length 1, and of length 1 after
# the mean over images was subtracted. For features of length 1 the order by Euclidean distance is that of the cosine, so one
# distance (<code>torch.cdist</code>) serves all three. Mask the diagonal, take the k smallest of each row, and count how often each index
# occurs.</details>
# <details><summary>Hint 3</summary>A count of votes: three voters name two of four candidates each.
#
# ```python
# ballots = torch.tensor([[0, 2], [2, 1], [2, 0]])
# votes = (ballots[..., None] == torch.arange(4)).sum((0, 1))          # 2, 1, 3, 0
# (int(votes.amax()), int(votes.argmax()))                             # (3, 2)
# ```
# </details>

# %% exercise="05.3"
def hub_trial(features, k):
    """Largest N_k by distance, and the name of the distance with the smallest one:
    features n d."""
    ### BEGIN SOLUTION
    centred = features - features.mean(0)
    views = {"Euclidean": features, "cosine": F.normalize(features, dim=1),
             "cosine, centred": F.normalize(centred, dim=1)}
    largest = {}
    for name, view in views.items():
        distance = torch.cdist(view, view)
        distance.fill_diagonal_(torch.inf)
        near = distance.topk(k, largest=False).indices                   # n k
        largest[name] = near.flatten().bincount().max().item()
    return largest, min(largest, key=largest.get)
    ### END SOLUTION

# %% check="05.3" points=3
with check("05.3", hint="Three versions; k nearest others; count them.") as ask:
    rolls = torch.Generator().manual_seed(1)
    drawn = torch.randn(60, 16, generator=rolls)
    sizes = torch.linspace(0.5, 3, 60)[:, None]
    flower = torch.rand(60, 2, generator=rolls) - 0.5
    for spots in (drawn * sizes + 2, F.normalize(drawn, dim=1) * sizes, flower):
        wanted = ranking.largest_hubs(spots, 5)
        told = ask(hub_trial, spots, 5)
        twofold = isinstance(told, tuple | list) and len(told) == 2
        assert twofold and getattr(told[0], "keys", set)() == wanted.keys(), \
            f"Return two things: a dict of {', '.join(map(repr, wanted))}, and a name."
        flat = F.normalize(spots, dim=1)
        shifted, by_row = flat - flat.mean(0), spots - spots.mean(1, keepdim=True)
        top_of = lambda x, k: ranking.k_occurrence(x, k).max().item()
        ahead = [wanted["Euclidean"], wanted["cosine"]]
        same([float(told[0][name]) for name in wanted], list(wanted.values()),
             "largest N_k: Euclidean, cosine, centred", {
            "Every image stands in its own list: put infinity on the diagonal.":
                [1 + value for value in ranking.largest_hubs(spots, 4).values()],
            "You looked at k + 1 images: without the image itself, k are left.":
                list(ranking.largest_hubs(spots, 6).values()),
            "You counted the places of each list, which are k. Count how often each "
            "image stands in a list.": [5, 5, 5],
            "Subtract the mean first and scale to length 1 then: after scaling, the "
            "mean is another one.": [*ahead, top_of(shifted, 5)],
            "You subtracted each image's own mean: it is the mean over images.":
                [*ahead, top_of(F.normalize(by_row, dim=1), 5)],
            "After subtracting the mean, scale to length 1: it is a cosine again.":
                [*ahead, top_of(spots - spots.mean(0), 5)]})
        assert told[1] != max(wanted, key=wanted.get), \
            "Your conclusion names the distance with the largest hub, not the smallest."
        assert wanted.get(told[1]) == min(wanted.values()), \
            f"Your conclusion is {told[1]!r}; your own numbers name another distance."
### BEGIN HIDDEN TESTS
rays = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
rays = F.normalize(rays, dim=1) * torch.tensor([1.0] + [3.0] * 59)[:, None]
assert hub_trial(rays, 5)[0]["Euclidean"] == 59
### END HIDDEN TESTS

# %%
def largest_hubs(features, k):
    return ranking.largest_hubs(features, k), None

trial_of = yours("05.3", hub_trial, largest_hubs)
places = 7                                   # as many as a probe has matches
hubs = {"backbone": trial_of(pooled, places)[0]}
lesson.claim("The largest hub of the backbone's features stands in "
             f"{hubs['backbone']['Euclidean']} of {len(labels)} lists by the Euclidean "
             f"distance, in {hubs['backbone']['cosine']} by the cosine; the mean is "
             f"{places}.",
             hubs["backbone"]["Euclidean"] > hubs["backbone"]["cosine"] + 3)

# %% [markdown]
# ## An embedding, trained on other species
#
# A linear layer takes the place of the classifier. It makes an **embedding** of length 1,
#
# $$e = \frac{A\,q + a}{|A\,q + a|} ,$$
#
# from the pooled feature $q$ of the last block. Trained are the last block and $A, a$. Two losses are compared:
#
# * **triplet**: the batch-hard triplets of lesson 03, with a margin of 0.1;
# * **proxy**: every species of the training has a vector, its **proxy**, which is learnt along. The loss is the cross-entropy of
#   the cosines to all proxies (lesson 03's prototype softmax, with prototypes that are parameters). It needs no triplets: each
#   image is compared with every species in every step.
#
# ### Who chooses the epoch?
#
# Training has no natural end. Somebody has to choose the epoch. If the **test** chooses, the test figure is no longer one of unseen
# data. Musgrave et al. found this in many papers. So a third of the training species is put aside: these
# **validation** species choose. The test is measured after every epoch as well, but only to see what its choice would have been.

# %%
dice = torch.Generator().manual_seed(SEED)
aside = torch.randperm(len(known.classes), generator=dice)[: len(known.classes) // 3]
valid = torch.isin(known.labels, aside)
fitted, fit_labels = known.labels[~valid].unique(return_inverse=True)
parts = {"training": (known_t[~valid], known.labels[~valid]),
         "validation": (known_t[valid], known.labels[valid]),
         "test": (unseen_t, labels)}
epochs = lesson.choose(smoke=2, mini=8, paper=24)

def proxy_terms(student, pooled, labels):
    e = embedding(student.backbone, pooled)
    loss = losses.prototype_softmax(e, labels, student.proxies, "cosine", scale=16.0)
    return {"proxy": loss}

def triplet_terms(student, pooled, labels):
    e = embedding(student.backbone, pooled)
    return {"triplet": EMBEDDING_LOSSES["triplet"](e, labels)}

TERMS = {"triplet": triplet_terms, "proxy": proxy_terms}

# %%
def fresh(loss):
    """A learner that starts from the backbone, and its optimiser."""
    network = backbones.create("tf_efficientnet_lite0", num_classes=512)
    student = Learner(network, TERMS[loss], len(fitted), last_block=True)
    network.classifier.requires_grad_(True)                        # its layer is A, a
    weights = [w for w in student.parameters() if w.requires_grad]
    student.proxies = nn.Parameter(torch.randn(len(fitted), 512))
    groups = [{"params": weights}, {"params": [student.proxies], "lr": 1e-2}]
    return (student.to(lesson.device),
            torch.optim.AdamW(groups, 1e-3, weight_decay=1e-4))

def embedded(network, features):
    """Embeddings, n 512, from features of the trunk."""
    pooled = look(network, features).mean((2, 3))
    with torch.inference_mode():
        return embedding(network, pooled.to(lesson.device)).cpu()

# %%
def learn(loss):
    """MAP@R after each epoch, distances of the test, and the weights that the
    validation chose."""
    student, optimizer = fresh(loss)
    batches = BalancedBatches(fit_labels, 16, 4, torch.Generator())
    loader = DataLoader(TensorDataset(parts["training"][0], fit_labels),
                        batch_sampler=batches)
    curve, distance = {"validation": [], "test": []}, []
    for epoch in tqdm(range(epochs + 1), f"{loss}, epochs"):
        if epoch:                                    # the first look is before training
            plan = engine.Plan(1, seed=1000 * SEED + epoch, device=lesson.device.type)
            engine.train(student, lambda model, batch: model.step(*batch), loader,
                         optimizer, plan, progress=False)
        for name, values in curve.items():
            e = embedded(student.backbone, parts[name][0])
            values.append(100 * ranking.retrieval(e, parts[name][1]).map_at_r)
        distance.append(1 - e @ e.T)                           # of the test, the last
        if max(curve["validation"]) == curve["validation"][-1]:
            chosen = {name: value.clone()
                      for name, value in student.backbone.state_dict().items()}
    return {"curve": curve, "distance": torch.stack(distance), "weights": chosen}

def trained(loss):
    return cached(f"05 embedding trained with {loss}", lambda: learn(loss), data=data,
                  settings=[loss, side, epochs], seed=SEED, takes="under a minute")

# %% [markdown]
# *Prediction 05.d:* the pooled features of the backbone have the MAP@R of the table above. By how many points does the triplet
# loss raise it on the **test** species, of which the training saw none?

# %% tags=["prediction"]
lesson.predict("05.d", None)  # your guess, in points

# %%
runs = {"triplet": trained("triplet")}

# %%
runs["proxy"] = trained("proxy")

# %%
curves = {f"{loss}, {name}": values for loss, run in runs.items()
          for name, values in run["curve"].items()}
chosen = {loss: max(range(epochs + 1), key=run["curve"]["validation"].__getitem__)
          for loss, run in runs.items()}
title = "The validation chooses " + " and ".join(
    f"epoch {epoch} ({loss})" for loss, epoch in chosen.items())
plots.show(plots.curve(range(epochs + 1), curves, xlabel="epoch", ylabel="MAP@R, %",
                       title=title, best=True),
           alt="MAP@R over the epochs of training, on validation and test species. "
               f"{title}. " + "; ".join(
                   f"{name}: {values[0]:.0f} before, {max(values):.0f} at most"
                   for name, values in curves.items()))

# %% [markdown]
# (The validation has fewer images than the test, so a list has fewer wrong candidates. The levels of the two do not compare; the
# shapes do.)
#
# ## Who chooses the epochs chooses the winner
#
# Musgrave et al. describe three flaws: the **test chooses** the epoch; the old method is compared at a **worse setting** than the new
# one; and **Recall@1 alone** is reported. Here they are, made on purpose with our own two trainings:

# %%
test = {loss: run["curve"]["test"] for loss, run in runs.items()}

def recall_at_1(loss, epoch):
    first = runs[loss]["distance"][epoch].masked_fill(~others, torch.inf).argmin(1)
    return 100 * (labels[first] == labels).float().mean().item()

def at(choose, loss):
    """An epoch after the training began: the best or the worst one on the test."""
    return choose(range(1, epochs + 1), key=test[loss].__getitem__)

ways = {"the validation": (chosen["triplet"], chosen["proxy"]),
        "the test": (at(max, "triplet"), at(max, "proxy")),
        "nobody: the last epoch": (epochs, epochs),
        "a friend of triplet": (at(max, "triplet"), at(min, "proxy")),
        "a friend of proxy": (at(min, "triplet"), at(max, "proxy"))}
lines = ["| who chooses the epochs | triplet, MAP@R | proxy, MAP@R | difference | "
         "difference of Recall@1 |", "|---" * 5 + "|"]
gap = {}
for way, (one, two) in ways.items():
    gap[way] = test["triplet"][one] - test["proxy"][two]
    first = recall_at_1("triplet", one) - recall_at_1("proxy", two)
    lines.append(f"| {way} | {test['triplet'][one]:.1f} % | {test['proxy'][two]:.1f} % "
                 f"| {gap[way]:+.1f} | {first:+.1f} |")
display(Markdown("\n".join(lines)))

# %%
optimism = {loss: max(values) - values[chosen[loss]] for loss, values in test.items()}
low, high = gap["a friend of proxy"], gap["a friend of triplet"]
lesson.claim(f"Whoever chooses freely can report any difference from {low:+.1f} to "
             f"{high:+.1f} points; the validation says {gap['the validation']:+.1f}.",
             low < 0 < high)
print("The choice by the test adds " + " and ".join(
    f"{gain:.1f} points ({loss})" for loss, gain in optimism.items()) + " here.")

# %% [markdown]
# How sure is the gain over the backbone, which needed no training? The eight images of a species are no eight independent trials.
# So whole **species** are drawn anew, a thousand times, and the mean gain of each draw is kept:

# %%
tuned = fresh("triplet")[0].backbone
tuned.load_state_dict(runs["triplet"]["weights"])
A, a = (part.detach().cpu() for part in tuned.classifier.parameters())   # 512 1280, 512

def state_of(features):
    """What `tuned` makes of features of the trunk: maps, pooled features, embeddings,
    and what they compare."""
    found = look(tuned, features)
    pooled = found.mean((2, 3))
    e = F.normalize(F.linear(pooled, A, a), dim=1)
    return {"maps": found, "pooled": pooled, "e": e, "rows": e @ A,
            "distance": 1 - e @ e.T}

tuned_state = state_of(unseen_t)
results["trained: pooled, cosine"] = ranking.retrieval(
    F.normalize(tuned_state["pooled"], dim=1), labels, ranking.KS)
results["trained: embedding"] = ranking.retrieval(tuned_state["e"], labels, ranking.KS)
table()

# %%
generator = torch.Generator().manual_seed(SEED)
draws = torch.randint(len(species), (1000, len(species)), generator=generator)

def over_species(gained):
    """Mean of all species of a difference in points, and the ends of its 95 %
    interval."""
    sums = torch.zeros(len(species), dtype=torch.double).index_add(0, labels, gained)
    by_species = sums / labels.bincount()
    ends = torch.tensor([0.025, 0.975], dtype=torch.double)
    return by_species, *torch.quantile(by_species[draws].mean(1), ends).tolist()

gained = 100 * (results["trained: embedding"].average_precision
                - results["pooled, cosine"].average_precision)
of_species, low, high = over_species(gained)
lesson.outcome("05.d", of_species.mean(), "points")
lesson.claim(f"Training raises MAP@R on species of the test by {of_species.mean():.1f} "
             f"points, 95 % interval over species {low:.1f} to {high:.1f}; "
             f"{(of_species < 0).sum()} of {len(species)} species lose.", low > 5)

# %%
proxy_e = runs["proxy"]["distance"][chosen["proxy"]]
by_proxy = ranking.retrieval_by_distance(proxy_e, labels).average_precision
by_triplet = results["trained: embedding"].average_precision
between, least, largest = over_species(100 * (by_triplet - by_proxy))
lesson.claim(f"Triplet minus proxy, each at the epoch that the validation chose: "
             f"{between.mean():+.1f} points, {least:+.1f} to {largest:+.1f} over "
             "species. The interval holds 0: this test does not tell the losses apart.",
             least < -0.5 and largest > 0.5)

# %% [markdown]
# Two more things keep this from being a verdict on the losses. Each of them had **one** setting here, and the one that is tuned
# longer usually wins. And another random seed draws other species: the table at the end shows how much that moves.
#
# ### Is the layer A of any use?
#
# The table above compares the trained network in two ways: by its embedding, which the loss has seen, and by the pooled features
# in front of it, which the loss has not seen. Many papers compare pooled features, and lesson 03 did. Look at the three kinds of
# species apart:

# %%
by_kind = {}
for name, (features, y) in parts.items():
    state = tuned_state if name == "test" else state_of(features)
    by_kind[name] = [
        100 * ranking.retrieval(F.normalize(state[view], dim=1), y).map_at_r
        for view in ("pooled", "e")]
lines = ["| species of the | pooled features, MAP@R | embedding, MAP@R | difference |",
         "|---|---|---|---|"]
lines += [f"| {name} | {one:.1f} % | {two:.1f} % | {two - one:+.1f} |"
          for name, (one, two) in by_kind.items()]
display(Markdown("\n".join(lines)))
layer = {name: two - one for name, (one, two) in by_kind.items()}

# %%
lesson.claim(f"On species of the training the embedding is better by "
             f"{layer['training']:.1f} points; on those of the validation it is "
             f"{layer['validation']:+.1f}, on those of the test {layer['test']:+.1f}.",
             layer["training"] > 2 + max(layer["validation"], layer["test"]))

# %% [markdown]
# So a part of what $A$ has learnt is about the species of the training. It keeps 512 of 1280 directions, those that tell *them*
# apart. The same is known of other networks: features in front of the last layers often transfer better than the output (Chen et
# al., SimCLR, ICML 2020, measured it for their projection head). On the test species the sign depends on the random seed: the
# table at the end has both over random seeds.
#
# ### Hubs once more
#
# Does training change the hubs? We count as in exercise 05.3.

# %%
hubs["trained, pooled"] = trial_of(tuned_state["pooled"], places)[0]
hubs["embedding"] = trial_of(tuned_state["e"], places)[0]
lines = [f"| largest $N_k$, k = {places} | {' | '.join(hubs['backbone'])} |",
         "|---" * 4 + "|"]
lines += [f"| {name} | {' | '.join(str(value) for value in by.values())} |"
          for name, by in hubs.items()]
display(Markdown("\n".join(lines)))
after = hubs["embedding"]["cosine"]
lesson.claim(f"Hubs do not go away by training: the largest one of the embedding is in "
             f"{after} lists by the cosine ({hubs['backbone']['cosine']} before).",
             after > 2 * places)

# %% [markdown]
# Turn the pages of the training. The probe is one of those whose first answer was wrong before it and is right at the end, if there
# is one, and whose first right answer was farthest away. So it is not a typical one; the curves above are. The first page is a
# random projection of the backbone's features.

# %%
# epochs n
ranks = torch.stack([first_right(one) for one in runs["triplet"]["distance"]])
way = ranks[0].where(ranks[-1] == 1, 0)
moved = way.argmax().item()

def page_of(epoch):
    return answer(moved, {"distance": runs["triplet"]["distance"][epoch]}, k=6)

def turn(epoch):
    place = ranks[epoch, moved]
    return plots.rank_list(**page_of(epoch), title=f"After {epoch} epochs: the first "
                                                   f"right answer is at rank {place}")

widgets.flipbook(turn, list(range(epochs + 1)), label="epoch",
                 alt=lambda epoch: f"After {epoch} epochs. {describe(page_of(epoch))}")

# %% [markdown]
# ## The map of a similarity
#
# Which map explains such a pair exactly? Write the similarity of probe $i$ and its partner $j$ as in lesson 01, with the pooling
# last:
#
# $$|A q_i + a|\,\cos(e_i, e_j) = e_j \cdot (A\, q_i + a)
# = \frac1{hw} \sum_{x, y} \underbrace{\sum_k (A^\top e_j)_k\, F_k(x, y)}_{M_{ij}(x, y)} + e_j \cdot a$$
#
# The partner takes the place of the class. Its row of weights is $A^\top e_j$. The mean of the map *is* the similarity, up to the
# constant $e_j \cdot a$ and the length of the probe, which is the same for all partners. (Without an embedding, $A$ is the identity,
# and this is $W = P$.)
#
# As in lesson 02 the map has a free gauge: the same row can be subtracted from all partners, and no rank list changes. Centred, the
# weights are $A^\top (e_j - \bar e)$. They say what tells this partner from the average one.

# %%
RULES = {  # name -> rule of lesson 02, references
    "uniform": ("uniform", "pooled"), "random 1/U": ("random", "pooled"),
    "Dist-CAM, Eq. 4-6": ("dist-cam", "pooled"), "W = P": ("prototype", "pooled"),
    "similarity": ("prototype", "rows"),
    "similarity, centred": ("prototype-centred", "rows")}

def pairs(state, images, chosen, name):
    """Raw maps of images against r partners each: indices b and b r -> b r h w."""
    rule, rows = RULES[name]
    return rules.pair_maps(state["maps"][images], state[rows], chosen, generator,
                           [rule])[rule]

def by_rule(name):
    return lambda state, images, partners: pairs(state, images, partners[:, None],
                                                 name)[:, 0]

them, us = torch.arange(len(labels)).roll(1), torch.arange(len(labels))
inner = (by_rule("similarity")(tuned_state, us, them).mean((1, 2))
         + tuned_state["e"][them] @ a)
lengths = F.linear(tuned_state["pooled"], A, a).norm(dim=1)
assert torch.allclose(inner / lengths, 1 - tuned_state["distance"][us, them], atol=1e-4)

# %% [markdown]
# ## Failures
#
# *Before you run the cells:* what will the probes have in common whose first answer is wrong? Three guesses are tested: the
# background, grey images, and the size of the animal. (Not every failure is one: *Hen* and *Chicken profile* are two photographs,
# so they are two species here.)
#
# *Prediction 05.e:* take the probes of the backbone whose first answer is wrong. In how many percent of them is the wrong answer
# nearer in the colour of its background than a random wrong image? Chance is 50 %.

# %% tags=["prediction"]
lesson.predict("05.e", None)  # your guess, in %

# %% [markdown]
# The three guesses, for the network before and after training. Is the wrong answer **nearer in the colour of the background**
# than a random wrong image? Are **grey** images lost more often? Are lost animals **smaller**?

# %%
grid = 56                                 # boxes and heatmaps are compared on this grid
boxes = torch.zeros(len(labels), grid, grid, dtype=torch.bool)
colour, grey = torch.zeros(len(labels), 3), torch.zeros(len(labels), dtype=torch.bool)
for i, (x0, y0, x1, y1) in enumerate(unseen.boxes):
    image, _ = unseen[i]
    height, width = image.shape[1:]
    off = torch.ones(height, width, dtype=torch.bool)
    off[y0:y1, x0:x1] = False
    colour[i] = (image[:, off].float().mean(1) if off.any()
                 else image.float().mean((1, 2)))
    grey[i] = (image[0] == image[1]).all()
    boxes[i, y0 * grid // height:-(-y1 * grid // height),
          x0 * grid // width:-(-x1 * grid // width)] = True
area = boxes.float().mean((1, 2))

# %%
stranger = rules.random_wrong(labels, labels, others, generator)
lines = ["| | failures | background nearer | lost: grey | lost: others | area: lost | "
         "area: found |",
         "|---" * 7 + "|"]
excuse = {}
for name, state in {"before": raw, "trained": tuned_state}.items():
    lost, wrong = (first_right(state["distance"]) > 1,
                   rules.neighbours(state["distance"], labels, labels, others).wrong)
    nearer = ((colour - colour[wrong]).norm(dim=1)
              < (colour - colour[stranger]).norm(dim=1))
    excuse[name] = {"background": 100 * nearer[lost].float().mean().item(),
                    "grey": 100 * lost[grey].float().mean().item(),
                    "others": 100 * lost[~grey].float().mean().item(),
                    "area lost": area[lost].mean().item(),
                    "area found": area[~lost].mean().item(), "lost": int(lost.sum())}
    lines.append("| {} | {lost} of {} | {background:.0f} % | {grey:.0f} % | "
                 "{others:.0f} % | {area lost:.2f} | {area found:.2f} |".format(
                     name, len(lost), **excuse[name]))
display(Markdown("\n".join(lines)))

# %%
first, then = excuse["before"], excuse["trained"]
lesson.outcome("05.e", first["background"], "%")
lesson.claim(f"Before training the background is nearer in {first['background']:.0f} % "
             f"of the {first['lost']} failures, where chance is 50 %: the backbone "
             "compares backgrounds, too.", first["background"] > 65)
lesson.claim(f"Grey images are lost more often, {first['grey']:.0f} against "
             f"{first['others']:.0f} % before and {then['grey']:.0f} against "
             f"{then['others']:.0f} % after training.",
             first["grey"] > first["others"] + 20 and then["grey"] > then["others"] + 5)
lesson.claim("Lost animals are smaller: their boxes cover "
             f"{100 * then['area lost']:.0f} % of the image, those of the others "
             f"{100 * then['area found']:.0f} %.",
             then["area lost"] < then["area found"] - 0.03)

# %% [markdown]
# ## Is the map about the pair?
#
# The paper gives Dist-CAM a job here: take the weights from the distance between a probe and its **nearest gallery image**, and
# the map shows why they match. Its figure for CUB-200-2011 shows maps that lie on the bird. But the bird is the only object in
# these images. So we exchange the partner and see what changes:
#
# | partner | if the map is about the pair, it |
# |---|---|
# | nearest, right or wrong | is the explanation |
# | nearest **right** one | shows the animal, which both have in common |
# | nearest **wrong** one | shows something else: what the two have in common is not the animal |
# | a **random** wrong one | shows nothing in particular, as nothing matched |
#
# The measure is the **energy per area**: the share of the heat inside the box of the animal, over the box's share of the image. A
# map of no content has 1. The correlation of the maps of two partners stands beside it. Every rule is treated alike; two of them
# know no partner: uniform weights, and random ones.
#
# *Prediction 05.f:* by how much does the energy per area of Dist-CAM fall from the right to a random partner?

# %% tags=["prediction"]
lesson.predict("05.f", None)  # your guess, such as 0.5

# %%
def on_trial(state, names):
    """For each rule: energy per area with four partners, and how the map with the right
    one agrees with two others."""
    near = rules.neighbours(state["distance"], labels, labels, others)
    chosen = torch.stack([*near, stranger], 1)                            # n 4
    found = {}
    for name in names:
        raw_maps = pairs(state, us, chosen, name)
        heat = maps.heatmap(raw_maps, grid)
        empty[name] = empty.get(name, 0) + int((heat.amax((2, 3)) == 0).sum())
        energy = controls.energy_per_area(
            heat, boxes[:, None].expand_as(heat)).mean(0).tolist()
        found[name] = energy + [
            controls.map_correlation(raw_maps[:, 1], raw_maps[:, j]).mean().item()
            for j in (2, 3)]
    return found

# %%
empty = {}
trial = {"before": on_trial(raw, [name for name in RULES if name != "similarity"]),
         "trained": on_trial(tuned_state, RULES)}
columns = ("nearest", "right", "wrong", "random", "agree: right, wrong",
           "agree: right, random")
lines = [f"| network | weights | {' | '.join(columns)} |", "|---" * 8 + "|"]
for network, rows in trial.items():
    for name, values in rows.items():
        cells = [f"×{value:.2f}"
                 for value in values[:4]] + [f"{value:.2f}" for value in values[4:]]
        lines.append(f"| {network} | {name} | {' | '.join(cells)} |")
display(Markdown("\n".join(lines)))
print("empty maps:",
      ", ".join(f"{name} {count}" for name, count in empty.items() if count) or "none")

# %% [markdown]
# Read it row by row, for both networks:

# %%
lesson.outcome("05.f", trial["trained"]["Dist-CAM, Eq. 4-6"][1]
               - trial["trained"]["Dist-CAM, Eq. 4-6"][3])
for network, rows in trial.items():
    none, dist, match, ours = (rows[name] for name in (
        "uniform", "Dist-CAM, Eq. 4-6", "W = P", "similarity, centred"))
    most = max(values[0] for name, values in rows.items() if name != "uniform")
    lesson.claim(f"{network}: uniform weights, which know no partner, reach "
                 f"×{none[0]:.2f}; the best other rule ×{most:.2f}.",
                 none[0] > most - 0.1)
    lesson.claim(f"{network}: Dist-CAM has ×{dist[1]:.2f} with the right partner, "
                 f"×{dist[2]:.2f} with the wrong and ×{dist[3]:.2f} with a random one: "
                 "the partner hardly matters.", abs(dist[1] - dist[3]) < 0.25)
    lesson.claim(f"{network}: W = P agrees with itself between the right and a random "
                 f"partner by {match[5]:.2f}.", match[5] > 0.85)
    lesson.claim(f"{network}: the centred similarity falls from ×{ours[1]:.2f} (right) "
                 f"over ×{ours[2]:.2f} (wrong) to ×{ours[3]:.2f} (random), and its "
                 f"maps agree by {ours[5]:.2f} only.",
                 ours[1] > ours[2] > ours[3] + 0.2 and ours[5] < 0.3)

# %% [markdown]
# * **uniform** weights show what the *backbone* switches on. They explain no pair.
# * **Dist-CAM** changes from partner to partner, but so do random weights. (Some of its maps may be *empty*. The activations of this
#   network end at 6. A channel that is 6 in both images matches perfectly, takes all of the weight, and is flat.)
# * **W = P** and the **similarity**, which is exact, share most of their map among all partners.
# * **centred**, without what all partners share, the map is about the pair.

# %% [markdown]
# ## Cover it, and see
#
# The last control asks the network and not the picture. **Cover** the hottest fifth of the cells with the image's mean colour, and
# rank again. If a map shows what the match rests on, the match must go. Every rule is covered with the nearest partner **and** with
# a random one.
#
# *Prediction 05.g:* Recall@1 of these probes when cells are covered at random, in percent?

# %% tags=["prediction"]
lesson.predict("05.g", None)  # your guess, in %

# %%
near = rules.neighbours(tuned_state["distance"], labels, labels, others)
some = torch.arange(0, len(labels), lesson.choose(smoke=40, mini=5, paper=1))
cells = round(0.2 * tuned_state["maps"][0, 0].numel())
hot = {}
for name in ("uniform", "Dist-CAM, Eq. 4-6", "similarity", "similarity, centred"):
    hot[name] = by_rule(name)(tuned_state, some, near.nearest[some])
    if name != "uniform":
        other = by_rule(name)(tuned_state, some, stranger[some])
        hot[f"{name.removesuffix(', Eq. 4-6')}, random partner"] = other
hot["cells drawn by lot"] = torch.rand(hot["uniform"].shape, generator=generator)
seen = transforms.resize(photos[some], [side, side], antialias=True)

def recall_of(e):
    """Recall@1 of these probes with embeddings of their own, among the unchanged
    images."""
    distance = (1 - e @ tuned_state["e"].T).masked_fill(~others[some], torch.inf)
    return 100 * (labels[distance.argmin(1)] == labels[some]).float().mean().item()

# %%
covered = {"nothing": recall_of(tuned_state["e"][some])}
for name, raw_maps in tqdm(hot.items(), "covers"):
    top = raw_maps.flatten(1).topk(cells).indices
    mask = torch.zeros_like(raw_maps.flatten(1)).scatter(1, top, 1.0).view_as(
        raw_maps)[:, None]
    mask = F.interpolate(mask, (side, side)).bool()
    changed = torch.where(mask, seen.float().mean((2, 3), keepdim=True),
                          seen.float()).to(torch.uint8)
    with torch.inference_mode():
        blocks = torch.cat([trunk(before, part.to(lesson.device)).cpu()
                            for part in changed.split(8)])
    covered[name] = recall_of(state_of(blocks)["e"])
for name, value in covered.items():
    print(f"covered: {name:36} Recall@1 {value:5.1f} %")

# %%
by_map = {name: value for name, value in covered.items()
          if name not in ("nothing", "cells drawn by lot") and "random" not in name}
lesson.outcome("05.g", covered["cells drawn by lot"], "%")
lesson.claim("Covering what a map of the nearest partner points at leaves "
             f"{min(by_map.values()):.0f} to {max(by_map.values()):.0f} % Recall@1; "
             "covering as many cells at random leaves "
             f"{covered['cells drawn by lot']:.0f} %.",
             covered["cells drawn by lot"] > max(by_map.values()) + 20)
lesson.claim("The sum of all channels, which knows no partner, finds these cells, too: "
             f"{covered['uniform']:.0f} % are left.",
             covered["uniform"] < min(by_map.values()) + 15)
lesson.claim("Dist-CAM finds them with a random partner "
             f"({covered['Dist-CAM, random partner']:.0f} %) as with the "
             f"nearest ({covered['Dist-CAM, Eq. 4-6']:.0f} %).",
             abs(covered["Dist-CAM, random partner"]
                 - covered["Dist-CAM, Eq. 4-6"]) < 10)
centred = [covered[f"similarity, centred{who}"] for who in ("", ", random partner")]
lesson.claim("Only the centred similarity loses the cells with a random partner: "
             f"{centred[1]:.0f} % are left, against {centred[0]:.0f} %.",
             centred[1] > centred[0] + 20)

# %% [markdown]
# So what the maps point at does matter: the cover shows that the *animal* decides. It does not show that the map knows the *pair*,
# because the same cells are found with a partner that did not match.
#
# ## Interactive
#
# Probes in the order of their MAP@R, the worst first. Choose the network and the weights. Look at pairs that failed and at
# pairs that did not.

# %% tags=["widget"]
networks = {"trained": tuned_state, "before": raw}
worst_first = (
    results["trained: embedding"].average_precision.argsort(stable=True).tolist())

def steer(place, weights, network):
    page = answer(worst_first[place], networks[network], by_rule(weights))
    return plots.rank_list(**page, title=f"{network}, maps: {weights}")

def tell(place, weights, network):
    return f"Maps: {weights}. {describe(answer(worst_first[place], networks[network]))}"

picker = widgets.live(
    steer, alt=tell,
    place=ipywidgets.IntSlider(0, min=0, max=len(worst_first) - 1,
                               description="probe, worst first",
                               continuous_update=False),
    weights=ipywidgets.Dropdown(options=list(RULES), value="similarity, centred",
                                description="weights"),
    network=ipywidgets.Dropdown(options=list(networks), description="network"))
picker

# %% [markdown]
# ## What was measured
#
# The paper draws its retrieval maps for a ResNet-50 on CUB-200-2011. It does not describe the training, and it shows pictures and no
# figures. For this network and these data the claims above say:
#
# * **It holds** that metric training on some species raises the figures of others; that maps of a pair lie on the animal; and that
#   the rank list rests on what they point at.
# * **It does not hold** that Dist-CAM shows why *this pair* matched. Weights without any partner lie on the animal as well.
# * **What depends on the pair** is the part of the similarity that is left when the part of all partners is subtracted.
#
# The real CUB-200-2011 could give other results. Its species differ by a patch of colour on the wing, the photographs of a species
# show different birds, and birds come with their habitat.

# %%
lesson.record("probes", len(labels))
lesson.record("test species with the name of an ImageNet class", len(seen_before))
for name, found in results.items():
    lesson.record(f"Recall@1, {name}", 100 * found.recall[1], "%")
    lesson.record(f"MAP@R, {name}", 100 * found.map_at_r, "%")
lesson.record("gain of MAP@R by training, other species", of_species.mean(), "points",
              note=f"95 %: {low:.1f} to {high:.1f}")
for loss, epoch in chosen.items():
    lesson.record(f"MAP@R, {loss}, epoch chosen by the validation", test[loss][epoch],
                  "%", note=f"epoch {epoch} of {epochs}; the best on the test: "
                       f"{max(test[loss]):.1f}")
    lesson.record(f"MAP@R added if the test chooses, {loss}", optimism[loss], "points")
for name, value in layer.items():
    lesson.record(f"embedding minus pooled features, species of the {name}", value,
                  "points")
for name, by in hubs.items():
    for distance in ("Euclidean", "cosine"):
        lesson.record(f"largest hub, {name}, {distance}", by[distance], "lists")

# %%
lesson.record("failures with a background nearer than chance, before",
              excuse["before"]["background"], "%", note="chance: 50 %")
for network, rows in trial.items():
    for name, values in rows.items():
        lesson.record(f"energy per area, {network}, {name}", values[0],
                      note="right ×{1:.2f}, wrong ×{2:.2f}, random ×{3:.2f}; right and "
                           "random agree {5:.2f}".format(*values))
for name, value in covered.items():
    lesson.record(f"Recall@1, covered: {name}", value, "%")
lesson.finish(fingerprint=data)

# %% [markdown]
# ## You can now
# - measure a rank list by Recall@K, R-precision and MAP@R, and say what each of them does not see;
# - train an embedding, choose the epoch on species of its own, and measure it on others, with an interval over species;
# - find hubs, and say which distance makes them smaller;
# - take a failure apart: which wrong answer, at which rank, and what the two images share;
# - tell a map of the pair from a map of the backbone, by exchanging the partner.
#
# **To go deeper** · The nearest wrong image often shares the background with the probe. Which map would show *that*, and how
# would you measure it? · The difference of two similarity maps, with the right and with the wrong partner, is exact as well.
# What does its mean say, and where would you expect it to be hot?
#
# **Where things are** · `course_lib.evaluate.ranking` (all measures, hubs), `course_lib.metric_learning.rules` (maps of
# pairs and their controls), `course_lib.metric_learning.learner` (what was trained here). The real CUB-200-2011, with a
# ResNet-50: `python -m course_lib train retrieval --backbone resnet50 --data PATH --folder runs/birds`, then `evaluate
# retrieval --backbone resnet50 --data PATH --checkpoint runs/birds/model.safetensors`.
#
# {{next}}
