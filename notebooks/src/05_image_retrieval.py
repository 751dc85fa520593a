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
# 1. write the two measures of a rank list, Recall@K and MAP@R, and see what each of them cannot see;
# 2. train an embedding on some species, and measure it on species that it has never seen;
# 3. take the worst rank lists apart, and find out whether the map of a pair is about the pair.
#
# **Time** 75 minutes to work through; about a minute and a half on a CPU, less on a GPU.
# **Before** [02 Dist-CAM](02_dist_cam.ipynb) and [03 Learning the metric](03_learning_the_metric.ipynb).
#
# **Sources** Shen et al.: *Distance-Based Class Activation Map for Metric Learning* · Oh Song et al.: *Deep Metric Learning via
# Lifted Structured Feature Embedding*, CVPR 2016 (the protocol) · Musgrave et al.: *A Metric Learning Reality Check*, ECCV 2020
# (the measures).

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
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2 import functional as transforms

from course_lib import backbones, engine, maps
from course_lib.worlds import minis
from course_lib.data.cub import Cub
from course_lib.data.miniature import fingerprint
from course_lib.evaluate import controls, ranking
from course_lib.metric_learning import rules
from course_lib.metric_learning.features import extract, tail, trunk
from course_lib.metric_learning.learner import (EMBEDDING_LOSSES, BalancedBatches,
                                                Learner, embedding)
from course_lib.show import plots, widgets
from course_lib.checks import check, same
from course_lib.lesson import start

lesson = start("05", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## No list of classes
#
# A classifier knows the names it was given. Whoever photographs a bird that is not on the list is told the name of another.
# **Retrieval** asks for less, and gets further: *show me images of the same thing*. There are no classes, only distances, and
# the answer is a **rank list**: all other images, nearest first.
#
# The protocol of CUB-200-2011 takes this seriously. Training sees the first half of the species. Of the second half every
# image is a **probe** once, and all the others are its **gallery**. No species of the test has ever been trained on.
#
# Our miniature has the same layout. It is kinder in one respect: a species is, as a rule, **one** photograph in eight scenes.
# To find "the same species" is to find the same animal before another background, larger, mirrored, turned. A few images are
# grey, as in the benchmark.

# %%
side = lesson.choose(smoke=96, mini=224, paper=224)
root = minis.mini_cub(lesson.data, seed=SEED)
known, unseen = Cub(root, "train"), Cub(root, "test")
labels, species = unseen.labels, unseen.classes
before = backbones.create("tf_efficientnet_lite0").to(lesson.device,
                                                      memory_format=torch.channels_last)

def trunk_of(data):
    """Features in front of the last block: made once, they serve every network of this
    lesson."""
    return extract(lambda images: trunk(before, images), data, (side, side),
                   device=lesson.device, progress=False)

known_t, unseen_t = trunk_of(known), trunk_of(unseen)
print(known, unseen, tuple(unseen_t.shape), sep="\n")

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
# The network was trained to name the 1000 classes of ImageNet. Nobody has taught it to compare. *Before you run the cell:* this
# probe is the one in the **middle**, half of all probes do better. How many of its first six answers will be right?

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
# the worst first
by_precision = ranking.retrieval(raw["rows"], labels).average_precision.argsort()
page = answer(by_precision[len(labels) // 2].item(), raw)
plots.show(plots.rank_list(**page, title=f"{int(page['correct'].sum())} of the first 6 "
                                         "are right"),
           alt=describe(page))

# %% [markdown]
# One probe is an anecdote. We need numbers for whole rank lists.
#
# ### Exercise 05.1 · Recall@K (2 points, 10 minutes)
#
# The measure of the retrieval literature is modest: **is there at least one right answer among the first K?**
#
# $$\text{Recall@}K = \frac{1}{|Q|} \sum_{i \in Q} \Big[\, \exists\, j \in N_K(i):\; y_j = y_i \Big]$$
#
# $N_K(i)$ are the $K$ nearest **others** of image $i$, never $i$ itself. $Q$ are the images that have another one of their
# class: who has no match cannot find it, and does not count. (The recall of the rest of the world is something else: the
# share of all matches that was found.)
#
# Write `recall_at_k(distance, labels, k)` with `distance` `n n`; the result is a share in 0..1.
#
# <details><summary>Hint 1</summary>No image may find itself. A copy of an image is at distance 0, too: is the first of a sorted
# list always the image itself? How else do you know its place in a row of <code>distance</code>?</details>
# <details><summary>Hint 2</summary>In a copy of <code>distance</code>, put infinity on the diagonal. <code>.topk(k, largest=False).indices</code> are
# then the nearest others, <code>n k</code>, and <code>labels[...]</code> of these indices are their classes. Which images have another one of their
# class? Average over these.</details>
# <details><summary>Hint 3</summary>One row by hand, for image 1 of four: <code>row = torch.tensor([3.0, torch.inf, 1.0, 2.0])</code>, and
# its two nearest are <code>near = row.topk(2, largest=False).indices</code>, which is <code>[2, 3]</code>. Were these of the classes
# <code>found = torch.tensor([7, 4])</code>, and image 1 of class 4, then <code>(found == 4).any()</code> is True: a hit.</details>

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

# %%
# what you have just written
for k, share in ranking.retrieval(raw["rows"], labels, ranking.KS).recall.items():
    print(f"Recall@{k}  {share:.1%}")

# %% [markdown]
# ### Exercise 05.2 · MAP@R (3 points, 15 minutes)
#
# Recall@K stops at the first right answer. A probe whose seven matches stand at ranks 1 to 7 and one whose second match stands
# at rank 300 are the same to it. Let $R$ be the number of a probe's matches, and look at the first $R$ spots: a perfect list
# has nothing but right answers there. **R-precision** is the share of right ones among them. **MAP@R** also asks where they
# stand:
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
# <details><summary>Hint 3</summary>A ball game: <code>won = torch.tensor([1, 0, 1, 1])</code>. The share of games won so far, after each
# game, is <code>won.cumsum(0) / torch.arange(1, 5)</code>: 1, 0.5, 0.67, 0.75. Averaged over the games that were won, it is
# <code>(won * won.cumsum(0) / torch.arange(1, 5)).sum() / won.sum()</code>: 0.81. (By which number is MAP@R divided?)</details>

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
# Four lists for a probe with $R = 4$ matches; 1 is right. *Before you run the cell:* order them by MAP@R.

# %%
lines = ["| first four places | Recall@1 | Recall@4 | R-precision | MAP@R |",
         "|---|---|---|---|---|"]
for places in ("1000", "0001", "1100", "0011"):
    hit = torch.tensor([float(place) for place in places])
    at_r = (hit * hit.cumsum(0) / torch.arange(1, 5)).sum() / 4
    lines.append(f"| {places} | {hit[0]:.0f} | {hit.amax():.0f} | {hit.mean():.2f} | "
                 f"{at_r:.2f} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Length or direction?
#
# The paper compares pooled features by their $L_1$ distance; most of retrieval compares **directions**, by the cosine. What
# is in the length of a feature? How much is to be seen, how large, how bright: everything that has little to do with *what* it
# is. For features of length 1 the two are one and the same:
#
# $$|\hat a - \hat b|^2 = |\hat a|^2 + |\hat b|^2 - 2\, \hat a \cdot \hat b = 2 - 2 \cos(a, b) .$$
#
# *Before you run the cell:* which of the columns will gain by leaving the length away, and which will not?

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
length = pooled.norm(dim=1)
print(f"lengths of the pooled features: {length.min():.1f} to {length.max():.1f}")

# %% [markdown]
# ## An embedding, trained on other species
#
# Now teach it. A linear layer takes the place of the classifier and makes an **embedding** of length 1,
#
# $$e = \frac{A\,q + a}{|A\,q + a|} ,$$
#
# and the batch-hard triplets of lesson 03 pull the images of a species together and others apart (margin 0.1, which is much on
# a sphere). Trained are the last block and $A, a$, on the first half of the species.
#
# *Before you run the cell:* nothing in the loss speaks of the species that will be tested. How much of the gain on the trained
# species will arrive at the others: all, half, nothing?

# %%
torch.manual_seed(SEED)
# its linear layer is A, a
tuned = backbones.create("tf_efficientnet_lite0", num_classes=512)
terms = lambda learner, q, y: {"triplet":
                                   EMBEDDING_LOSSES["triplet"](embedding(tuned, q), y)}
learner = Learner(tuned, terms, len(known.classes), last_block=True).to(lesson.device)
A, a = tuned.classifier.requires_grad_(True).parameters()                # 512 1280, 512
batches = BalancedBatches(known.labels, 16, 4, torch.Generator())
loader = DataLoader(TensorDataset(known_t, known.labels), batch_sampler=batches)
optimizer = torch.optim.AdamW([w for w in learner.parameters() if w.requires_grad],
                              1e-3, weight_decay=1e-4)

def state_of(features):
    """What `tuned` makes of features of the trunk: maps, pooled features, embeddings,
    and what they compare."""
    found = look(tuned, features)
    with torch.inference_mode():
        e = embedding(tuned, found.mean((2, 3)).to(lesson.device)).cpu()
    return {"maps": found, "pooled": found.mean((2, 3)), "e": e,
            "rows": e @ A.detach().cpu(), "distance": 1 - e @ e.T}

# %% [markdown]
# ### The map of a similarity
#
# What would be the *right* map of such a pair? Write the similarity of probe $i$ and its partner $j$ as in lesson 01, with the
# pooling last:
#
# $$|A q_i + a|\,\cos(e_i, e_j) = e_j \cdot (A\, q_i + a)
# = \frac1{hw} \sum_{x, y} \underbrace{\sum_k (A^\top e_j)_k\, F_k(x, y)}_{M_{ij}(x, y)} + e_j \cdot a$$
#
# The partner takes the place of the class: its row of weights is $A^\top e_j$, and the mean of the map *is* the similarity, up
# to the length of the probe, which is the same for all partners. (Without an embedding, $A$ is the identity, and this is
# $W = P$.) As in lesson 02 the map has a free **gauge**: a row taken from all partners alike changes no rank list. Centred, the
# weights are $A^\top (e_j - \bar e)$: what tells this partner from the average one.

# %%
generator = torch.Generator().manual_seed(SEED)
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

now = state_of(unseen_t)                                             # A is still random
them, us = torch.arange(len(labels)).roll(1), torch.arange(len(labels))
inner = (by_rule("similarity")(now, us, them).mean((1, 2))
         + now["e"][them] @ a.detach().cpu())
embedded = F.linear(now["pooled"], A.detach().cpu(), a.detach().cpu())
assert torch.allclose(inner / embedded.norm(dim=1), 1 - now["distance"][us, them],
                      atol=1e-4)

# %% [markdown]
# ### Training
#
# Before training and after every epoch, MAP@R is measured on both halves of the species, and eight probes whose nearest image
# was wrong are watched.

# %%
epochs = lesson.choose(smoke=2, mini=10, paper=30)
rank = first_right(raw["distance"])
missed = (rank > 1).nonzero().flatten()
missed = missed[rank[missed].argsort(stable=True)]
watched = missed[torch.linspace(0, len(missed) - 1, 8).long()].tolist()
pages, curve = [], {"species of the training": [], "other species": []}

def watch():
    """Measures both halves and keeps the rank lists of the watched probes; returns the
    state of the other half."""
    for name, features, y in zip(curve, (known_t, unseen_t), (known.labels, labels)):
        state = state_of(features)                                # the last one is kept
        curve[name].append(100 * ranking.retrieval(state["e"], y).map_at_r)
    rank = first_right(state["distance"])
    pages.append(
        {i: (rank[i].item(), answer(i, state, by_rule("similarity, centred"), 5))
         for i in watched})
    return state

tuned_state = watch()
for epoch in range(epochs):                          # one at a time, to look in between
    plan = engine.Plan(1, seed=1000 * SEED + epoch)
    engine.train(learner, lambda model, batch: model.step(*batch), loader, optimizer,
                 plan, progress=False)
    tuned_state = watch()

# %%
gain = {name: values[-1] - values[0] for name, values in curve.items()}
title = (f"MAP@R rises by {gain['species of the training']:.0f} points on species that "
         f"were trained on, by {gain['other species']:.0f} on others")
plots.show(plots.curve(range(epochs + 1), curve, xlabel="epoch", ylabel="MAP@R, %",
                       title=title),
           alt="MAP@R over the epochs of training for both halves of the species. "
               f"{title}.")
results["trained: pooled, cosine"] = ranking.retrieval(
    F.normalize(tuned_state["pooled"], dim=1), labels, ranking.KS)
results["trained: embedding"] = ranking.retrieval(tuned_state["e"], labels, ranking.KS)
table()

# %% [markdown]
# What is learnt by heart does not travel; part of it does. How sure is that part, against the pooled features, which needed no
# training? The eight images of a species are no eight independent trials, so draw whole **species** anew, a thousand
# times, and look at the mean gain:

# %%
gained = 100 * (results["trained: embedding"].average_precision
                - results["pooled, cosine"].average_precision)
of_species = (torch.zeros(len(species), dtype=torch.double).index_add(0, labels, gained)
              / labels.bincount())
draws = of_species[torch.randint(len(species), (1000, len(species)),
                                 generator=generator)].mean(1)
low, high = torch.quantile(draws,
                           torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
print(f"MAP@R on species never trained on: {of_species.mean():+.1f} points, 95 % "
      f"interval {low:+.1f} to {high:+.1f}; {(of_species < 0).sum()} of {len(species)} "
      "species lose")

# %% [markdown]
# Turn the pages of the training: of the eight watched probes one that comes out right, if any does, from as far away as
# possible. (So it is no typical one; the curves above are.) In the lower row are maps of the similarity, centred: on the probe
# against its first answer, on each answer against the probe. The first page is a random projection of the pretrained features.

# %%
moved = max(watched, key=lambda i: (pages[-1][i][0] == 1, pages[0][i][0]))

def turn(epoch):
    place, page = pages[epoch][moved]
    return plots.rank_list(**page, title=f"After {epoch} epochs: the first right "
                                         f"answer is at rank {place}")

widgets.flipbook(turn, list(range(epochs + 1)), label="epoch",
                 alt=lambda epoch: f"After {epoch} epochs. "
                                   f"{describe(pages[epoch][moved][1])}")

# %% [markdown]
# ## Failures
#
# A mean hides what it is a mean of. Sort the probes by the rank of their first right answer. *Before you run the cell:* what
# will the worst ones have in common? Write down two guesses; they are put to the test below.

# %%
rank = first_right(tuned_state["distance"])
near = rules.neighbours(tuned_state["distance"], labels, labels, others)
worst = rank.argsort(descending=True, stable=True)[:6].tolist()
lines = ["| probe | first right answer | nearest image | times nearer than the right "
         "one |",
         "|---" * 4 + "|"]
for i in worst:
    ratio = (tuned_state["distance"][i, near.correct[i]]
             / tuned_state["distance"][i, near.wrong[i]])
    lines.append(f"| {species[labels[i]]}, image {i} | rank {rank[i]} | "
                 f"{species[labels[near.nearest[i]]]} | {ratio:.2f} |")
display(Markdown("\n".join(lines)))

# %%
def dissect(probes, name):
    """Each probe with its map against the wrong and the right partner; these partners
    with their maps against it."""
    panels, titles = [], []
    for i in probes:
        two = torch.stack((near.wrong[i], near.correct[i]))
        there = by_rule(name)(tuned_state, two, torch.tensor([i, i]))
        here = pairs(tuned_state, torch.tensor([i]), two[None], name)[0]
        agree = controls.map_correlation(here[0], here[1]).item()
        heat = maps.heatmap(torch.cat((here, there)), 224)
        shots = photos[[i, i, *two.tolist()]]
        panels += [photos[i], *(plots.overlay(shot, h) for shot, h in zip(shots, heat))]
        titles += [f"{species[labels[i]][:15]}\nright at rank {rank[i]}",
                   "map: the wrong one\nas partner",
                   f"the right one\ncorrelation {agree:.2f}",
                   f"✗ nearest wrong\n{species[labels[two[0]]][:15]}",
                   f"✓ nearest right\n{species[labels[two[1]]][:15]}"]
    return plots.grid(panels, titles, columns=5, side=1.8,
                      title=f"The three worst probes; maps: {name}")

plots.show(dissect(worst[:3], "similarity, centred"),
           alt="; ".join(f"{species[labels[i]]} is taken for "
                         f"{species[labels[near.wrong[i]]]}" for i in worst[:3])
           + ". Each probe under its maps against the wrong and the right partner, and "
             "both partners under theirs.")

# %% [markdown]
# (Not every failure is one: a *Hen* and a *Chicken profile* are two species here, as they are two photographs.)
#
# Now to three guesses, for the network before and after training. Is the wrong answer **nearer in colour of the background**
# than a random wrong image would be (chance: 50 %)? Are **grey** images lost more often than others (they are few)? Are lost
# animals **smaller**?

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
    excuse[name] = 100 * nearer[lost].float().mean().item()
    lines.append(f"| {name} | {lost.sum()} of {len(lost)} | {excuse[name]:.0f} % | "
                 f"{100 * lost[grey].float().mean():.0f} % | "
                 f"{100 * lost[~grey].float().mean():.0f} % | {area[lost].mean():.2f} "
                 f"| {area[~lost].mean():.2f} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Is the map about the pair?
#
# The paper gives Dist-CAM a job here: take the weights from the distance between a probe and its **nearest gallery image**, and
# the map shows why they match. Its figure for CUB-200-2011 shows maps that lie on the bird. But a bird is what there is to be
# seen. So exchange the partner and see what changes:
#
# | partner | if the map is about the pair, it |
# |---|---|
# | nearest, right or wrong | is the explanation |
# | nearest **right** one | shows the animal, which both have in common |
# | nearest **wrong** one | shows something else: what the two have in common is not the animal |
# | a **random** wrong one | shows nothing in particular, as nothing matched |
#
# The measure is the **energy per area**: the share of the heat inside the box of the animal over the box's share of the image;
# 1 is what a map of no content has. Beside it stands the correlation of the maps of two partners. Controls without any
# partner: uniform weights, and random ones.
#
# *Before you run the cell:* write down a row for Dist-CAM. By how much will the energy fall from the right to a random partner?

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
# Read it row by row:
#
# * **uniform** weights know no partner, and their map lies on the animal as well as that of any rule with the nearest partner.
#   It shows what the *backbone* has learnt to switch on. It is not an explanation of anything.
# * **Dist-CAM** is hardly on the animal more with the right partner than with a random one. Its maps do change from partner to
#   partner, but so do those of dice. (Some may be *empty*: a channel at its ceiling in both images, this network's activations
#   end at 6, matches perfectly, takes all of the weight, and is flat.)
# * **W = P** moves by little, and so does the **similarity**, which is exact, from the right to the nearest wrong partner: most of
#   their map is shared by many partners. The network says "an animal, there" to everybody who looks at all alike.
# * Take away what all partners share (**centred**), and the map is about the pair: on the animal with the right partner, less
#   so with the nearest wrong one, and nowhere in particular with a random one.
#
# One probe and three partners, so that you see it:

# %%
example = worst[0]
three = torch.stack([near.correct, near.wrong, stranger], 1)[example]
rows = ("Dist-CAM, Eq. 4-6", "similarity", "similarity, centred")
heat = torch.cat(
    [maps.heatmap(pairs(tuned_state, torch.tensor([example]), three[None], name)[0],
                  224) for name in rows])
who = [f"{kind}: {species[labels[i]]}"
       for kind, i in zip(("right", "wrong", "random"), three.tolist())]
shots = [photos[example], *photos[three], *(shot for j in range(3) for shot in (
    photos[example],
    *(plots.overlay(photos[example], h) for h in heat[3 * j : 3 * j + 3])))]
titles = [f"the worst probe:\n{species[labels[example]]}",
          *(f"partner, {name.replace(': ', ':' + chr(10))}" for name in who)]
titles += [title for name in rows
           for title in (f"{name}:", "with the right one", "with the wrong one",
                         "with a random one")]
plots.show(plots.grid(shots, titles, columns=4, side=1.9,
                      title="One probe, three partners, and its maps with each of "
                            "them"),
           alt=f"The worst probe, {species[labels[example]]}, three partners "
               f"({'; '.join(who)}), and the probe's maps with each of them by "
               f"{', '.join(rows)}.")

# %% [markdown]
# ## Cover it, and see
#
# The last control asks the network, not the picture. **Cover** the hottest fifth of the cells with the image's mean colour and
# rank again. If a map shows what the match rests on, the match must go. *Before you run the cell:* order the covers by
# the Recall@1 that they leave.

# %%
some = torch.arange(0, len(labels), lesson.choose(smoke=40, mini=5, paper=1))
cells = round(0.2 * tuned_state["maps"][0, 0].numel())
hot = {name: by_rule(name)(tuned_state, some, near.nearest[some])
       for name in RULES if name not in ("W = P", "random 1/U")}
hot["Dist-CAM, random partner"] = by_rule("Dist-CAM, Eq. 4-6")(tuned_state, some,
                                                               stranger[some])
hot["cells drawn by lot"] = torch.rand(hot["uniform"].shape, generator=generator)
seen = transforms.resize(photos[some], [side, side], antialias=True)

def recall_of(e):
    """Recall@1 of these probes with embeddings of their own, among the unchanged
    images."""
    distance = (1 - e @ tuned_state["e"].T).masked_fill(~others[some], torch.inf)
    return 100 * (labels[distance.argmin(1)] == labels[some]).float().mean().item()

# %%
covered = {"nothing": recall_of(tuned_state["e"][some])}
for name, raw_maps in hot.items():
    top = raw_maps.flatten(1).topk(cells).indices
    mask = torch.zeros_like(raw_maps.flatten(1)).scatter(1, top, 1.0).view_as(
        raw_maps)[:, None]
    mask = F.interpolate(mask, (side, side)).bool()
    changed = torch.where(mask, seen.float().mean((2, 3), keepdim=True),
                          seen.float()).to(torch.uint8)
    with torch.inference_mode():
        parts = torch.cat([trunk(before, part.to(lesson.device)).cpu()
                           for part in changed.split(8)])
    covered[name] = recall_of(state_of(parts)["e"])
for name, value in covered.items():
    print(f"covered: {name:26} Recall@1 {value:5.1f} %")

# %% [markdown]
# What the maps point at does matter: covering it costs far more than covering as many cells at random. But the sum of all
# channels, which knows no partner, finds the cells as well as any map, and Dist-CAM finds them with a **random** partner as
# well. The cover shows that the *animal* decides. It does not show that the map knows the *pair*.
#
# ## Now with your hands
#
# Probes in the order of their MAP@R, the worst first. Choose the network, the weights, and look at pairs that failed and at
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
# The paper draws its retrieval maps for a ResNet-50 on CUB-200-2011 whose training is not described, and shows pictures, no
# figures. Here is what holds for this network and these data. **Holds:** metric training on some species helps to find others;
# maps of a pair lie on the animal; what they point at is what the rank list rests on. **Does not:** that Dist-CAM shows
# why *this pair* matched. The same is shown by a map without any partner, and nearly the same with a wrong one. What does
# depend on the pair is what is left of the similarity when the part that all partners share is taken away.
#
# What could differ on the real CUB: its species differ by a patch of colour on the wing, its photographs of a species are of
# different birds, and birds come with their habitat.

# %%
lesson.record("probes", len(labels))
for name, found in results.items():
    lesson.record(f"Recall@1, {name}", 100 * found.recall[1], "%")
    lesson.record(f"MAP@R, {name}", 100 * found.map_at_r, "%")
lesson.record("gain of MAP@R by training, other species", of_species.mean(), "points",
              note=f"95 %: {low:.1f} to {high:.1f}")
lesson.record("failures with a background nearer than chance, before", excuse["before"],
              "%", note="chance: 50 %")
for network, rows in trial.items():
    for name, values in rows.items():
        lesson.record(f"energy per area, {network}, {name}", values[0],
                      note="right ×{1:.2f}, wrong ×{2:.2f}, random ×{3:.2f}; right and "
                           "random agree {5:.2f}".format(*values))
for name, value in covered.items():
    lesson.record(f"Recall@1, covered: {name}", value, "%")

# %%
if lesson.profile != "smoke":
    assert results["pooled, cosine"].map_at_r > results["pooled, Euclidean"].map_at_r
    assert low > 0
    assert excuse["before"] > 65
    for rows in trial.values():
        uniform, dist, centred = (rows[name]
                                  for name in ("uniform", "Dist-CAM, Eq. 4-6",
                                               "similarity, centred"))
        nearest = [values[0] for values in rows.values()]
        assert min(nearest) > 1.3 and uniform[0] > max(nearest) - 0.1
        assert dist[0] < uniform[0] and abs(dist[1] - dist[3]) < 0.25
        assert centred[1] > centred[2] > centred[3] + 0.2 and centred[5] < 0.3
        assert rows["W = P"][4] > 0.85 < rows["W = P"][5]
    assert trial["trained"]["similarity"][4] > 0.85
    by_map = [value for name, value in covered.items()
                    if name not in ("nothing", "cells drawn by lot")]
    assert (covered["cells drawn by lot"] > max(by_map) + 20
            and covered["uniform"] < min(by_map) + 15)
lesson.finish(fingerprint=fingerprint(root))

# %% [markdown]
# ## You can now
# - measure a rank list by Recall@K, R-precision and MAP@R, and say what each of them does not see;
# - train an embedding, and measure it on classes that it has not seen, with an interval over classes;
# - take a failure apart: which wrong answer, at which rank, and what the two images share;
# - tell a map of the pair from a map of the backbone, by exchanging the partner.
#
# **To go deeper** · The nearest wrong image often shares the background with the probe. Which map would show *that*, and how
# would you measure it? · The difference of two similarity maps, with the right and with the wrong partner, is exact as well:
# what does its mean say, and where would you expect it to be hot?
#
# **Where things are** · `course_lib.evaluate.ranking.retrieval` (all measures), `course_lib.metric_learning.rules` (maps of
# pairs and their controls), `course_lib.metric_learning.learner` (what was trained here). The real CUB-200-2011, with a
# ResNet-50: `python -m course_lib train retrieval --backbone resnet50 --data PATH --folder runs/birds`, then `evaluate
# retrieval --backbone resnet50 --data PATH --checkpoint runs/birds/model.safetensors`.
#
# {{next}}
