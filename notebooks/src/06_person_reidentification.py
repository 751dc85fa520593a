# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Person re-identification: is it the clothes?
#
# {{badge}}
#
# **You will**
# 1. write the measure of Market-1501, with junk and same-camera images where they belong: nowhere;
# 2. find out what a map of two pedestrians shows: why *this pair* matched, or what the network looks at in everybody;
# 3. write the two ideas of k-reciprocal re-ranking, and see when they help.
#
# **Time** 70 minutes to work through; about two minutes on a CPU, less on a GPU.
# **Before** [02 Dist-CAM](02_dist_cam.ipynb).
#
# **Source** Shen et al.: *Distance-Based Class Activation Map for Metric Learning*, section 4.3; Luo et al., *Bag of Tricks*
# (CVPR Workshops 2019); Zhong et al., *k-reciprocal encoding* (CVPR 2017).

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": minutes on a CPU · "paper": "mini", trained
# for longer
PROFILE = "mini"
# "" finds the data folder; Market-1501 itself is for the command, see the end
DATA_ROOT = ""
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
import ipywidgets
import torch
from IPython.display import Markdown, display
from torch.utils.data import TensorDataset

from course_lib import backbones, engine, maps
from course_lib.worlds import minis
from course_lib.data.images import load
from course_lib.data.market1501 import PARTS, Market1501
from course_lib.data.miniature import fingerprint
from course_lib.data.wrappers import Changed
from course_lib.evaluate import controls, ranking
from course_lib.metric_learning import (features as embed, learner, losses,
                                        rules as context)
from course_lib.metric_learning.pedestrians import Occluded, market_scores
from course_lib.published import REID_TRICKS
from course_lib.show import plots, widgets
from course_lib.checks import check, same
from course_lib.lesson import start

lesson = start("06", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## The task
#
# A person was seen by one camera. Was she seen by the others? A **probe** (query) is compared with a **gallery** of
# pedestrians, and the gallery is ranked by distance. Networks are trained on other people than those of the test.
#
# Market-1501 has six cameras, and two rules that are easily forgotten. **Junk** (identity −1: bad detections) counts neither as
# right nor as wrong. Images of the probe's own person **from the probe's own camera** are too easy: they are taken out, too.
# **Distractors** (identity 0) stay: they are wrong answers.
#
# Our pedestrians are drawn, and that is the point: in the one world a person *is* her **clothes**, while hair, hat and bag
# change from image to image; in the other she *is* her **head and bag**, and changes clothes. So the question of this lesson
# has a known answer.

# %%
worlds = {}
for identity in ("clothes", "head"):
    root = minis.mini_market(lesson.data, identity, SEED)
    worlds[identity] = {split: Market1501(root, split)
                        for split in ("train", "query", "gallery")}
print(worlds["clothes"]["train"], worlds["clothes"]["gallery"], sep="\n")

# %%
panels, names = [], []
for identity, splits in worlds.items():
    gallery = splits["gallery"]
    person = gallery.identities[gallery.identities > 0][0]
    for i in (gallery.identities == person).nonzero().flatten()[:6].tolist():
        panels.append(load(gallery.images[i]))
        names.append(f"camera {gallery.cameras[i]}")
plots.show(plots.grid(panels, names, columns=6, side=1.5,
                      title="One person of each world: above the clothes stay, below "
                            "head and bag do"),
           alt="Two rows of drawn pedestrians on the streets of several cameras. In "
               "the first row clothes are the same and heads differ, in the second "
               "head and bag are the same and clothes differ.")

# %% [markdown]
# ### Exercise 06.1 · CMC and average precision, without the junk (3 points, 15 minutes)
#
# Write `judge(distances, query_id, query_camera, gallery_ids, gallery_cameras)` for **one** probe. Take out what does not
# count, rank the rest by distance, and return two numbers: the rank $r_1$ of the first match (from 1), and the average precision
# over all $R$ matches,
#
# $$\text{AP} = \frac1R \sum_{i=1}^{R} \frac{i}{r_i} .$$
#
# Rank-$k$ (CMC) is the share of probes with $r_1 \le k$; mAP is the mean of AP.
#
# <details><summary>Hint 1</summary>Which images of the gallery count neither as right nor as wrong? Which rank has an image with
# three of these before it, and nothing else?</details>
# <details><summary>Hint 2</summary>Make a mask of what is kept: no junk, and not *both* the probe's identity and the probe's
# camera. Index distances and identities with it, then sort with <code>argsort</code>. The places of the right answers in this list
# (<code>nonzero</code>), from 1, are the $r_i$; the precision at the $i$-th of them is $i / r_i$.</details>
# <details><summary>Hint 3</summary>Buses: <code>late = torch.tensor([False, True, False, True, True])</code>. The late ones are the
# <code>places = torch.arange(1, 6)[late]</code>, which is <code>[2, 4, 5]</code>. How many of the first 2, 4 and 5 buses were late, as shares:
# <code>torch.arange(1, 4) / places</code> is <code>[0.5, 0.5, 0.6]</code>, and the mean of the three is 0.53.</details>

# %% exercise="06.1"
def judge(distances, query_id, query_camera, gallery_ids, gallery_cameras):
    """Rank of the first match (from 1) and average precision of one probe; all
    arguments but two are of length g."""
    ### BEGIN SOLUTION
    kept = (gallery_ids != -1) & ~((gallery_ids == query_id)
                                   & (gallery_cameras == query_camera))
    order = distances[kept].argsort()
    hit = gallery_ids[kept][order] == query_id
    ranks = hit.nonzero().flatten() + 1
    precision = torch.arange(1, len(ranks) + 1) / ranks
    return ranks[0].item(), precision.mean().item()
    ### END SOLUTION

# %% check="06.1" points=3
with check("06.1", hint="Mask, sort, ranks of the matches, mean of i / r_i.") as ask:
    gaps = torch.tensor([0.8, 0.62, 0.1, 0.7, 0.6, 0.05, 0.3, 0.65, 0.35, 0.45])
    who, seen_by = (torch.tensor([5, -1, 5, 3, 5, 0, 9, 5, 0, -1]),
                    torch.tensor([2, 3, 1, 1, 4, 2, 3, 6, 1, 1]))
    two = ask(judge, gaps, 5, 1, who, seen_by)
    assert isinstance(two, tuple | list) and len(two) == 2, \
        "Return two numbers: the rank of the first match, and the average precision."
    same([float(one) for one in two], [4, (1/4 + 2/5 + 3/7) / 3],
         "judge(...): first rank, average precision", {
        "The image of the same person from the same camera was still there: take it "
        "out first.": [2, (1/2 + 2/5 + 3/6 + 4/8) / 4],
        "Junk (identity -1) was still there. It is neither right nor wrong: take it "
        "out.": [5, (1/5 + 2/7 + 3/9) / 3],
        "Nothing was taken out: neither junk nor the same person from the same camera.":
            [2, (1/2 + 2/6 + 3/8 + 4/10) / 4],
        "You took out everything from the probe's camera: only the *same person* from "
        "it goes.": [3, (1/3 + 2/4 + 3/5) / 3],
        "You took out the distractors (identity 0), too. They are wrong answers and "
        "stay.": [2, (1/2 + 2/3 + 3/5) / 3],
        "You kept the same-camera image as a wrong answer: it leaves the ranking.":
            [5, (1/5 + 2/6 + 3/8) / 3],
        "You sorted from far to near: a small distance is a good answer.":
            [1, (1/1 + 2/3 + 3/4) / 3],
        "The sum of the precisions is divided by the number of matches R, not by that "
        "of the gallery.": [4, (1/4 + 2/5 + 3/7) / 7],
        "R counts only the matches that are left: yours counts the one from the own "
        "camera, too.": [4, (1/4 + 2/5 + 3/7) / 4],
        "Ranks start from 1, yours from 0.": [3, (1/3 + 2/4 + 3/6) / 3],
        "The first rank is counted from 1, yours from 0.": [3, (1/4 + 2/5 + 3/7) / 3],
        "The rank comes first, then the average precision.": [(1/4 + 2/5 + 3/7) / 3, 4],
        "Average precision is over all matches, not the first one alone.": [4, 1/4]})
### BEGIN HIDDEN TESTS
first, ap = judge(torch.tensor([0.1, 0.2]), 1, 1, torch.tensor([2, 1]),
                  torch.tensor([2, 2]))
assert first == 2 and abs(ap - 0.5) < 1e-6
### END HIDDEN TESTS

# %% [markdown]
# From here on the lesson uses `ranking.cmc_map`, which judges all probes at once.
#
# ## A network for each world
#
# The **strong baseline** of Luo et al. is one global feature and six tricks. Here is what each of them brought on Market-1501,
# one trick a row. It takes a GPU (the command stands at the end of the lesson):

# %%
rows = "\n".join(f"| {'' if name == 'none' else '+ '}{name} | {rank} | {mean} |"
                 for name, (rank, mean) in REID_TRICKS.items())
display(Markdown("| Luo et al., ResNet-50, Market-1501 | rank-1, % | mAP, % |\n"
                 "|---|---|---|\n" + rows))

# %% [markdown]
# Shen et al. report 94.5 and 85.9 "with center loss and reranking"; in the table these are the figures **without** re-ranking.
#
# Here a small network has to do: the last block of an EfficientNet, trained on features of the blocks before it. Its loss is
# lesson 03's prototype softmax on cosines; batch-hard triplets can collapse where persons differ in little.

# %%
size = lesson.choose(smoke=(64, 32), mini=(256, 128), paper=(256, 128))
epochs = lesson.choose(smoke=1, mini=20, paper=120)

def first_blocks(model, data, views=lambda images: [images]):
    """Features in front of the block that is trained, of views of all images: n views j
    h w."""
    return embed.extract(lambda images: torch.stack(
        [embed.trunk(model, view).contiguous() for view in views(images)], 1),
                         data, size, device=lesson.device, progress=False)

@torch.inference_mode()
def look(model, features):
    """Feature maps n k h w, scaled so that pooling them gives what is compared: a
    vector of length 1."""
    model.eval()
    raw = torch.cat([embed.tail(model, part[:, 0].to(lesson.device)).float().cpu()
                     for part in features.split(32)])
    # an image may leave all channels dead
    return raw / raw.mean((2, 3)).norm(dim=1).clamp_min(1e-6)[:, None, None, None]

# %%
def prototype_terms(student, pooled, labels):
    return {"prototype":
                losses.batch_prototype_softmax(pooled, labels, "cosine", scale=16.0)}

def either(pair, label):
    """Features of the image or of its mirror image, by chance."""
    return pair[int(torch.randint(2, ()))], label

def fit(model, data):
    """Mean losses of the epochs; Adam's rate falls to a tenth after 1/3 of them, and
    once more after 7/12."""
    student = learner.Learner(model, prototype_terms, len(data.classes),
                              last_block=True)
    pairs = first_blocks(model.eval(), data, lambda images: [images, images.flip(-1)])
    batches = learner.BalancedBatches(data.labels, 8, 4, torch.Generator())
    loader = torch.utils.data.DataLoader(
        Changed(TensorDataset(pairs, data.labels), either), batch_sampler=batches)
    adam = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-3,
                            weight_decay=5e-4)
    falls = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.1 ** sum(
        step // len(batches) + 1 >= epochs * part for part in (1 / 3, 7 / 12)))
    return engine.train(student, lambda student, batch: student.step(*batch), loader,
                        adam, engine.Plan(epochs, seed=SEED, device=lesson.device.type),
                        scheduler=falls, progress=False)

# %%
models, blocks, before = {}, {}, {}
for identity, splits in worlds.items():
    model = models[identity] = (
        backbones.create("tf_efficientnet_lite0").to(lesson.device))
    blocks[identity] = {split: first_blocks(model, splits[split])
                        for split in ("query", "gallery")}
    before[identity] = {split: look(model, found).mean((2, 3))
                        for split, found in blocks[identity].items()}
    history = fit(model.to(memory_format=torch.channels_last), splits["train"])
    print(f"{identity:8} loss of the first epoch {history[0]['loss']:.2f}, of the last "
          f"{history[-1]['loss']:.2f}")

# %%
def protocol(identity, distances):
    """Rank-1, -5, -10 and mAP, %."""
    return market_scores(distances, worlds[identity]["query"],
                         worlds[identity]["gallery"])

features, scores = {}, {}
lines = ["| identity is | network | rank-1 | rank-5 | rank-10 | mAP |",
         "|---|---|---|---|---|---|"]
for identity in worlds:
    features[identity] = {split: look(models[identity], found)
                          for split, found in blocks[identity].items()}
    after = {split: found.mean((2, 3)) for split, found in features[identity].items()}
    for name, vectors in {"never saw a pedestrian": before[identity],
                          "trained": after}.items():
        score = scores[identity, name] = protocol(
            identity, ranking.cosine_distances(vectors["query"], vectors["gallery"]))
        lines.append(f"| {identity} | {name} | "
                     + " | ".join(f"{value:.1f}" for value in score.values()) + " |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## What a pair looks at
#
# Dist-CAM takes its weights from the distance between the probe and its **nearest gallery image**. The paper shows such maps
# and says that clothes matter. In which world will the map lie on the clothes, and in which on head and bag? And one more
# question, which the paper does not ask: **what if the probe is compared with a random other person?**
#
# *Write down both expectations before you run the next cells.*

# %%
gallery_of = {}
for identity, splits in worlds.items():
    query, gallery = splits["query"], splits["gallery"]
    distances = ranking.cosine_distances(*(features[identity][split].mean((2, 3))
                                           for split in ("query", "gallery")))
    keep = ~((query.identities[:, None] == gallery.identities)
             & (query.cameras[:, None] == gallery.cameras))
    ids = query.identities, gallery.identities
    found = context.neighbours(distances, *ids, keep)
    generator = torch.Generator().manual_seed(SEED)
    stranger = context.random_wrong(*ids, keep, generator)
    chosen = torch.stack([found.nearest, found.correct, found.wrong, stranger],
                         1)  # q 4
    gallery_of[identity] = {"distances": distances, "keep": keep, "chosen": chosen}

# %%
rules = ("uniform", "dist-cam", "prototype", "intersection")
heat = {}                                                       # (world, rule): q 4 H W
for identity in worlds:
    own, theirs = (features[identity]["query"],
                   features[identity]["gallery"].mean((2, 3)))
    raw = context.pair_maps(own, theirs, gallery_of[identity]["chosen"], generator,
                            rules)
    heat |= {(identity, rule): maps.heatmap(raw[rule], (128, 64)) for rule in rules}

# %% [markdown]
# Successes and failures first. Choose a probe, and look at its rank list: ✓ is the same person, and the maps lie underneath. On
# the probe, the map against the nearest gallery image; on each gallery image, the map against the probe.

# %%
def show_ranks(identity, probe, rule, k=6):
    """The rank list of one probe, with a map under each image, and its description."""
    query, gallery = worlds[identity]["query"], worlds[identity]["gallery"]
    case = gallery_of[identity]
    order = context.ranked(case["distances"][[probe]], case["keep"][[probe]], k)[0]
    right = gallery.identities[order] == query.identities[probe]
    theirs, own = (features[identity]["gallery"][order],
                   features[identity]["query"][[probe]])
    back = context.pair_maps(theirs, own.mean((2, 3)),
                             torch.zeros(k, 1, dtype=torch.long), generator,
                             (rule,))[rule]
    figure = plots.rank_list(
        load(query.images[probe]), [load(gallery.images[i]) for i in order], right,
        case["distances"][probe, order], probe_heatmap=heat[identity, rule][probe, 0],
        heatmaps=maps.heatmap(back, (128, 64))[:, 0],
        names=[f"camera {gallery.cameras[i]}" for i in order],
        probe_name=f"camera {query.cameras[probe]}",
        title=f"Identity is {identity}: {int(right.sum())} of {k} right")
    return figure, plots.rank_list_alt(f"probe {probe} where identity is {identity}",
                                       right, case["distances"][probe, order])

# %%
for identity in worlds:
    case, truth = gallery_of[identity], worlds[identity]
    hit = truth["gallery"].identities[case["chosen"][:, 0]] == truth["query"].identities
    for wanted in (hit, ~hit):                    # the first success, the first failure
        if wanted.any():
            plots.show(*show_ranks(identity, int(wanted.nonzero()[0]), "dist-cam"))

# %% [markdown]
# One rank list proves nothing. So: over all probes, how much heat lies on each part, for the area it covers? 1.0 is what a
# map that is the same everywhere has.

# %%
names = [part for part in PARTS if part != "background"] + ["background"]
parts = {identity: torch.stack([                                              # q 128 64
    splits["query"].parts(i) for i in range(len(splits["query"]))])
    for identity, splits in worlds.items()}
partners = {"nearest": 0, "random other person": 3}
energy = {}
lines = ["| identity is | map | " + " | ".join(names) + " |",
         "|---" * (len(names) + 2) + "|"]
for identity in worlds:
    for rule in rules:
        for partner, column in partners.items():
            if rule == "uniform" and column:
                continue                                  # it does not know its partner
            found = controls.energy_by_part(heat[identity, rule][:, column],
                                            parts[identity], len(PARTS)).per_area
            energy[identity, rule, partner] = {name: float(found[PARTS.index(name)])
                                               for name in names}
            label = rule if rule == "uniform" else f"{rule}, {partner}"
            lines.append(f"| {identity} | {label} | "
                         + " | ".join(f"{energy[identity, rule, partner][name]:.2f}"
                                      for name in names) + " |")
display(Markdown("\n".join(lines)))

# %%
likeness = {}
for identity in worlds:
    pair = heat[identity, "dist-cam"]
    for name, (a, b) in {"nearest correct and nearest wrong": (1, 2),
                         "nearest and random": (0, 3)}.items():
        exists = (gallery_of[identity]["chosen"][:, [a, b]] != context.NONE).all(1)
        likeness[identity, name] = (
            controls.map_correlation(pair[exists, a], pair[exists, b]).mean().item())
        print(f"identity is {identity:8} Dist-CAM of the {name}: correlation "
              f"{likeness[identity, name]:.2f}")

# %% [markdown]
# Read the table twice. **Across the worlds** the maps move: to the legs where clothes make the person, to the head where it
# does. (The torso says less. A cell of the map is a quarter of the image's width: arms, torso and bag share one.) In that
# sense the paper's reading can be tested, and the network passes. **Across the partners** the maps hardly move, and uniform
# weights, which know no partner at all, tell nearly the same story. The map shows what this network has learnt to switch on,
# not why *this pair* matched.
#
# ## Asking the network instead of the map
#
# A map is a claim about the network; the claim can be tested. Paint over the clothes of the **probes** (with the mean colour of
# the rest) and rank again; then head and bag.
#
# *Before you run the cell:* which of the four changes should hurt?

# %%
hidden = {"clothes": ("torso", "legs"), "head and bag": ("head", "bag")}
occluded = {}
lines = ["| identity is | nothing hidden | "
         + " | ".join(f"{name} hidden" for name in hidden) + " |",
         "|---|---|---|---|"]
for identity, splits in worlds.items():
    theirs = features[identity]["gallery"].mean((2, 3))
    row = [scores[identity, "trained"]]
    for name, which in hidden.items():
        covered = look(models[identity],
                       first_blocks(models[identity],
                                    Occluded(splits["query"], which))).mean((2, 3))
        row.append(protocol(identity, ranking.cosine_distances(covered, theirs)))
        occluded[identity, name] = row[-1]["mAP"]
    lines.append(f"| {identity} | "
                 + " | ".join(f"mAP {score['mAP']:.1f}, rank-1 {score['rank-1']:.1f}"
                              for score in row) + " |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Re-ranking: ask the neighbours
#
# A gallery image that is near to the probe **and has the probe among its own nearest** is more trustworthy than one that is
# merely near. Zhong et al. build on this twice: who are the reciprocal neighbours of an image, and how much do the
# neighbourhoods of two images have in common?
#
# ### Exercise 06.2 · Reciprocal neighbours (2 points, 10 minutes)
#
# Write `reciprocal(distances, k)` for a square matrix of distances between all images. $N(i, k)$ are the image $i$ itself and
# its $k$ nearest others; return the mask (`n n`, bool) of $R(i, k) = \{ j \in N(i, k) : i \in N(j, k) \}$.
#
# <details><summary>Hint 1</summary>Each image is at distance 0 from itself. How many images are in $N(i, k)$, then? And if $j$
# is in $N(i, k)$, must $i$ be in $N(j, k)$?</details>
# <details><summary>Hint 2</summary>Sort each row with <code>argsort(1)</code>: the image itself comes first, then its neighbours. Make a
# mask of N: a matrix of False, in which <code>.scatter(1, index, True)</code> sets the places that <code>index</code> names in each row. The
# transpose of this mask says who has whom as a neighbour.</details>
# <details><summary>Hint 3</summary>Letters: <code>wrote = torch.zeros(3, 3, dtype=torch.bool)</code>, and
# <code>wrote = wrote.scatter(1, torch.tensor([[1, 2], [0, 1], [2, 1]]), True)</code>. Row by row: 0 wrote to 1 and 2, and so on. Did 0
# and 1 write to each other? <code>wrote[0, 1] &amp; wrote[1, 0]</code> is True; <code>wrote[0, 2] &amp; wrote[2, 0]</code> is False.</details>

# %% exercise="06.2"
def reciprocal(distances, k):
    """R(i, k) as a mask: distances n n -> n n, bool."""
    ### BEGIN SOLUTION
    order = distances.argsort(1)[:, : k + 1]
    near = torch.zeros_like(distances, dtype=torch.bool).scatter(1, order, True)
    return near & near.T
    ### END SOLUTION

# %% check="06.2" points=2
with check("06.2", hint="The k + 1 smallest of a row, and the transpose.") as ask:
    spots = torch.tensor([0.0, 1.0, 2.5, 2.6, 7.0, 9.5])
    # one digit for each pair
    table = lambda text: torch.tensor([[float(x) for x in row] for row in text.split()])
    mutual = table("110000 111000 011100 001100 000011 000011")
    same(ask(reciprocal, (spots[:, None] - spots).abs(), 2), mutual,
         "reciprocal(distances, 2), as 0 and 1", axes="n n", suspects={
        "These are the neighbours N(i, k). Reciprocal ones have i among theirs, too.":
            table("111000 111000 011100 011100 000111 000111"),
        "These are the images that have i among their neighbours. Reciprocal ones are "
        "among those of i, too.":
            table("110000 111100 111100 001111 000011 000011"),
        "One direction was enough for you: both must hold, so `&` and not `|`.":
            table("111000 111100 111100 011111 000111 000111"),
        "These pairs have a neighbour in common: each must be one of the other.":
            table("111100 111100 111111 111111 001111 001111"),
        "One neighbour is missing: the image itself comes on top of the k others.":
            table("110000 110000 001100 001100 000011 000011"),
        "The image itself is missing: it belongs to N(i, k).": mutual - torch.eye(6),
        "You took the farthest ones: sort from near to far.":
            table("000111 000011 000011 100000 111000 111000")})
### BEGIN HIDDEN TESTS
line = (torch.arange(5.0)[:, None] - torch.arange(5.0)).abs()
assert reciprocal(line, 4).all() and reciprocal(line, 1).diagonal().all()
### END HIDDEN TESTS

# %% [markdown]
# ### Exercise 06.3 · Jaccard distance (2 points, 10 minutes)
#
# Each image is described by a row of $V$: how much each other image belongs to its neighbourhood (0 for strangers). Write
# `jaccard(V)`, the distance between all pairs of rows:
#
# $$d_J(i, l) = 1 - \frac{\sum_j \min(V_{ij}, V_{lj})}{\sum_j \max(V_{ij}, V_{lj})} .$$
#
# <details><summary>Hint 1</summary>Of two sets, the Jaccard distance is 1 − |intersection| / |union|. To which degree is
# something in both, if it belongs to one by 0.6 and to the other by 0.2? To which degree is it in one of them?</details>
# <details><summary>Hint 2</summary><code>V[:, None]</code> is <code>n 1 m</code> and <code>V[None]</code> is <code>1 n m</code>: together they meet as all pairs of rows,
# <code>n n m</code>. Take minima and maxima of the pairs, sum each over the last axis, and divide only then.</details>
# <details><summary>Hint 3</summary>All pairs of rows, for another distance: with <code>W = torch.tensor([[1.0, 2.0], [4.0, 6.0]])</code>
# the largest difference between two rows is <code>(W[:, None] - W[None]).abs().amax(-1)</code>, which is <code>[[0, 4], [4, 0]]</code>. And of two
# numbers, <code>torch.minimum(torch.tensor(0.6), torch.tensor(0.2))</code> is 0.2.</details>

# %% exercise="06.3"
def jaccard(V):
    """Distance of the neighbourhoods of all pairs: V n m -> n n, in 0..1."""
    ### BEGIN SOLUTION
    both = torch.minimum(V[:, None], V[None]).sum(-1)
    either = torch.maximum(V[:, None], V[None]).sum(-1)
    return 1 - both / either
    ### END SOLUTION

# %% check="06.3" points=2
with check("06.3", hint="1 - sum of minima / sum of maxima.") as ask:
    degrees = torch.tensor([[0.6, 0.4, 0.0], [0.5, 0.3, 0.2], [0.0, 0.0, 1.0],
                            [0.3, 0.2, 0.1]])
    total = degrees.sum(1, keepdim=True)
    total, apart = total + total.T, torch.cdist(degrees, degrees, 1)
    low, high = (total - apart) / 2, (total + apart) / 2            # of minima, maxima
    same(ask(jaccard, degrees), 1 - low / high, "jaccard(V)", axes="n n", suspects={
        "This is the likeness: the distance is 1 minus it.": low / high,
        "The quotient is upside down: minima over maxima.": 1 - high / low,
        "You did not divide by the sum of the maxima.": 1 - low,
        "You multiplied where the smaller of the two was asked for.":
            1 - degrees @ degrees.T / high,
        "You divided by the sum of both rows: what is common counts twice there. "
        "Divide by the maxima.": 1 - low / total,
        "You divided by the sum of one row: the union belongs to both.":
            1 - low / degrees.sum(1, keepdim=True),
        "You counted who belongs at all: here each belongs to some degree.":
            torch.tensor([[0, 1/3, 1, 1/3], [1/3, 0, 2/3, 0],
                          [1, 2/3, 0, 2/3], [1/3, 0, 2/3, 0]]),
        "You divided element by element and averaged: sum first, then divide once.":
            torch.tensor([[1/3, 17/36, 1, 2/3], [17/36, 0, 14/15, 37/90],
                          [1, 14/15, 2/3, 29/30], [2/3, 37/90, 29/30, 0]])})
### BEGIN HIDDEN TESTS
assert torch.allclose(jaccard(torch.eye(3)), 1 - torch.eye(3))
### END HIDDEN TESTS

# %% [markdown]
# `ranking.rerank` puts the two together: neighbourhoods of size $k_1$, widened by neighbours that agree, weighted by $e^{-d}$,
# averaged over $k_2$ images, and the old distance mixed in with the share $\lambda$. It looks at **all queries at once**, so
# its figures stand apart.
#
# The default $k_1 = 20$ was chosen on Market-1501. Neighbourhoods are looked for among queries and gallery **together**, own
# camera included. *Before you run the cell:* how many other images of its person does a probe find there, and what happens to
# a neighbourhood that is larger than that?

# %%
ks = lesson.choose(smoke=(2, 6, 12), mini=(1, 2, 4, 6, 8, 12, 16, 20, 30, 45),
                   paper=(1, 2, 4, 6, 8, 12, 16, 20, 30, 45, 60))
reranked, matches = {}, {}
for identity, splits in worlds.items():
    pooled = [features[identity][split].mean((2, 3)) for split in ("query", "gallery")]
    reranked[identity] = [
        protocol(identity, ranking.rerank(*pooled, k1=k, k2=min(6, k), lam=0.3))["mAP"]
        for k in ks]
    everyone = torch.cat([splits[split].identities for split in ("query", "gallery")])
    # but not the probe itself
    same_person = (splits["query"].identities[:, None] == everyone).sum(1) - 1
    matches[identity] = same_person.float().mean().item()
    print(f"identity is {identity:8} {matches[identity]:.1f} other images of a probe's "
          f"person; mAP before {scores[identity, 'trained']['mAP']:.1f}, re-ranked at "
          f"best {max(reranked[identity]):.1f}")
plots.show(plots.curve(
    torch.tensor(ks),
    {f"identity is {name}": torch.tensor(values) for name, values in reranked.items()},
    best=True, xlabel="k1, size of a neighbourhood", ylabel="mAP after re-ranking, %",
    title=f"There are about {matches['clothes']:.0f} other images of a probe's person",
    baselines={f"{name}, before": scores[name, "trained"]["mAP"] for name in worlds}),
           alt="mAP over k1 in both worlds: "
           + "; ".join(f"{name}: "
                       + ", ".join(f"{k}: {value:.0f}" for k, value in zip(ks, values))
                       for name, values in reranked.items()))

# %% [markdown]
# Too small a $k_1$ has nobody to ask; too large a one asks strangers. Take it from the number of images that a person has,
# not from this curve: it was measured on the test probes, so read its shape and do not quote its best point. The flipbook shows
# the first answers of one probe while $k_1$ grows; it needs no kernel.

# %%
pooled = [features["clothes"][split].mean((2, 3)) for split in ("query", "gallery")]
again = {k: ranking.rerank(*pooled, k1=k, k2=min(6, k), lam=0.3) for k in ks}
precision = ranking.cmc_map(gallery_of["clothes"]["distances"],
                            *(getattr(worlds["clothes"][split], name)
                              for name in ("identities", "cameras")
                              for split in ("query", "gallery"))).average_precision
middling = int((precision.nan_to_num(2) - precision.nanmedian()).abs().argmin())

def answers(k, count=8):
    """The first answers for one probe after re-ranking, whether they are right, and
    their distances."""
    query, gallery = worlds["clothes"]["query"], worlds["clothes"]["gallery"]
    order = context.ranked(again[k][[middling]],
                           gallery_of["clothes"]["keep"][[middling]], count)[0]
    return (order, gallery.identities[order] == query.identities[middling],
            again[k][middling, order])

# %%
def frame(k):
    order, right, distance = answers(k)
    return plots.rank_list(
        load(worlds["clothes"]["query"].images[middling]),
        [load(worlds["clothes"]["gallery"].images[i]) for i in order], right, distance,
        title=f"k1 = {k}: {int(right.sum())} of {len(right)} right")

widgets.flipbook(frame, ks, label="k1, size of a neighbourhood",
                 alt=lambda k: plots.rank_list_alt(
                     f"a probe after re-ranking with k1 = {k}", *answers(k)[1:]))

# %% [markdown]
# ## With your hands
#
# Any probe, both worlds, every rule. Look for a failure: is the map different from that of a success?

# %% tags=["widget"]
picker = widgets.live(
    lambda probe, identity, rule: show_ranks(identity, probe, rule)[0],
    alt=lambda probe, identity, rule: show_ranks(identity, probe, rule)[1]
    + f" Maps by {rule}.",
    probe=ipywidgets.IntSlider(3, min=0, max=min(len(splits["query"])
                                                 for splits in worlds.values()) - 1,
                               continuous_update=False),
    identity=ipywidgets.Dropdown(options=list(worlds), description="identity is"),
    rule=ipywidgets.Dropdown(options=rules, value="dist-cam"))
picker

# %% [markdown]
# ## What was measured

# %%
for (identity, name), score in scores.items():
    paper = {"rank-1": 94.5,
             "mAP": 85.9} if name == "trained" and identity == "clothes" else {}
    for measure in ("rank-1", "mAP"):
        lesson.record(f"{measure}, identity is {identity}, {name}", score[measure], "%",
                      paper=paper.get(measure),
                      note="paper: ResNet-50 on Market-1501, real pedestrians" if paper
                      else "")

# %%
for identity in worlds:
    for name, key in {
        "uniform": ("uniform", "nearest"), "Dist-CAM": ("dist-cam", "nearest"),
        "Dist-CAM, random person": ("dist-cam", "random other person")}.items():
        found = energy[identity, *key]
        lesson.record(f"energy per area on legs, identity is {identity}, {name}",
                      found["legs"])
        lesson.record(f"energy per area on head, identity is {identity}, {name}",
                      found["head"])
    for name in hidden:
        lesson.record(f"mAP with {name} hidden, identity is {identity}",
                      occluded[identity, name], "%")
    lesson.record("Dist-CAM of nearest and of random person, correlation, identity is "
                  f"{identity}",
                  likeness[identity, "nearest and random"])
    lesson.record(f"mAP re-ranked with k1 = 12, identity is {identity}",
                  reranked[identity][ks.index(12)], "%")
lesson.record("other images of a probe's person, identity is clothes",
              matches["clothes"])

# %%
if lesson.profile != "smoke":
    legs, head = ({identity: energy[identity, "dist-cam", "nearest"][part]
                   for identity in worlds} for part in ("legs", "head"))
    # it follows the cause of identity
    assert legs["clothes"] > 1 > legs["head"] and head["head"] > 1 > head["clothes"]
    for identity, cause, rest in (("clothes", "clothes", "head and bag"),
                                  ("head", "head and bag", "clothes")):
        assert (scores[identity, "trained"]["mAP"]
                > scores[identity, "never saw a pedestrian"]["mAP"] + 10)
        assert occluded[identity, cause] < occluded[identity, rest]
        assert likeness[identity, "nearest and random"] > 0.5   # and hardly the partner
lesson.finish(fingerprint=fingerprint(worlds["clothes"]["train"].root))

# %% [markdown]
# ## You can now
# - measure re-identification so that others' figures are comparable: junk, own camera, distractors;
# - tell a map of a network from a map of a pair, with a partner who should not matter;
# - back a map up with the counterfactual it claims;
# - choose $k_1$ from the number of images of a person, and say why re-ranked figures stand apart.
#
# **To go deeper** · The random partner gave nearly the same map. Which weighting *could* depend on the pair, and what would it need
# to forget? · Our cameras differ in light and background. How would you find out whether the network uses the street?
#
# **Where things are** · `course_lib.evaluate.ranking` (CMC, mAP, re-ranking, exact and in chunks),
# `course_lib.metric_learning.learner` (training), `course_lib.metric_learning.rules` (maps of pairs). The strong baseline
# with its tricks, on the real
# benchmark: `python -m course_lib train reid --backbone resnet50 --data PATH --folder RUN`, then
# `python -m course_lib evaluate reid --checkpoint RUN/model.safetensors --data PATH`; the table of tricks is
# `python -m course_lib train reid --ablation ...`.
#
# {{next}}
