# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Few-shot learning: a class from one photograph
#
# {{badge}}
#
# **You will**
# 1. write nearest prototypes for thousands of episodes at once, and an accuracy with its 95 % interval;
# 2. write prototype rectification (BD-CSPN), and find out by an experiment when it gains and when it loses;
# 3. hold it against a baseline that anybody can fit, logistic regression;
# 4. measure maps of a query against its support, with the controls of lesson 02.
#
# **Time** about 75 minutes, 42 of them for the exercises; about two minutes on a CPU, less on a GPU.
# **Before** [03 Learning the metric](03_learning_the_metric.ipynb).
#
# **Sources** Shen et al.: *Distance-Based Class Activation Map for Metric Learning*, section 4.1 · Liu, Song, Qin:
# *Prototype Rectification for Few-Shot Learning*, ECCV 2020 (BD-CSPN) · Snell, Swersky, Zemel: *Prototypical Networks for
# Few-shot Learning*, NeurIPS 2017 · Tian et al.: *Rethinking Few-Shot Image Classification*,
# ECCV 2020 · Veilleux et al.: *Realistic Evaluation of Transductive Few-Shot Learning*, NeurIPS 2021.

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": a minute on a CPU · "paper": "mini" with more
# episodes
PROFILE = "mini"
# "" finds the data folder; training and evaluation on the real miniImageNet are
# commands, see the end
DATA_ROOT = ""
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
from functools import partial
from itertools import islice
from statistics import stdev

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from matplotlib.figure import Figure
from torch import Generator
from torch.utils.data import Subset
from tqdm import tqdm

from course_lib import backbones, evidence, maps, prototypes, published
from course_lib.cache import cached
from course_lib.worlds import minis
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.miniature import fingerprint
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.evaluate import controls, episodes
from course_lib.metric_learning import rules
from course_lib.metric_learning.features import extract
from course_lib.show import plots
from course_lib.checks import check, same, yours
from course_lib.lesson import start

lesson = start("04", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## Words
#
# {{words}}

# %% [markdown]
# ## The task
#
# You see one photograph of each of five things. Then you are asked which of the five is in another photograph. That is one
# **episode**: *N* **ways** (classes, here 5), *K* **shots** (support images of each class, 1 or 5) and some **queries** (15 of
# each class). The classes are **novel**: the network was not trained on them, so no classifier has an output for them. A
# network that compares needs none. The mean feature of the support images is a prototype, and a prototype is enough.
#
# The paper uses this task to show what Dist-CAM is good for (section 4.1, 5-way 1-shot on miniImageNet): without a
# classifier there is no CAM, but there are prototypes.
#
# The data are a miniature in the layout of miniImageNet, scenes of 84 pixels. The network is the frozen one of lesson 02.
# Every image goes through it **once**. After that an episode is a choice of rows.

# %%
side = lesson.choose(smoke=96, mini=160, paper=160)                # 84 pixels, enlarged
network = backbones.create("tf_efficientnet_lite0").to(
    lesson.device, memory_format=torch.channels_last)
root = minis.mini_imagenet(lesson.data, SEED)
novel, validation = MiniImageNet(root, "test"), MiniImageNet(root, "val")

def look(data):
    """Last feature maps of all images of a data set."""
    return extract(lambda images: network.features(network.normalise(images)), data,
                   (side, side), device=lesson.device)

kept = cached("04 features of the miniature", lambda: {
    data.split: look(data).mean((2, 3)) for data in (novel, validation)},
    data=fingerprint(root), settings=[side], takes="some seconds")
novel_q, validation_q = kept["test"], kept["val"]                         # n 1280
print(novel, ", ".join(novel.classes), tuple(novel_q.shape), "", validation, sep="\n")
print("", published.IMAGENET_CAVEAT, sep="\n")

# %% [markdown]
# (The last sentence matters. Here the pretrained network stands in for one that a GPU trains on base classes in some hours.
# The commands at the end train such a network.)
#
# `episodes.sample` draws episodes as index tensors: `support` is `e n k`, `query` is `e q`, and `labels` (`q`) is the
# class of each query, numbered 0 to 4 in its episode.

# %%
episode_count = lesson.choose(smoke=60, mini=2000, paper=10_000)
drawn = {shots: episodes.sample(novel.labels, ways=5, shots=shots, queries=15,
                                episodes=episode_count,
                                generator=Generator().manual_seed(SEED))
         for shots in (1, 5)}
first = drawn[1].query[0].view(5, 15)                   # queries come class after class
shown = torch.cat((drawn[1].support[0], first[:, :5]), 1).flatten().tolist()
kinds = [novel.classes[novel.labels[i]] for i in drawn[1].support[0, :, 0].tolist()]
names = [kinds[place // 6] if place % 6 == 0 else "" for place in range(30)]
plots.show(plots.grid([novel[i][0] for i in shown], names, columns=6, side=1.2,
                      title="One 5-way 1-shot episode: support images (left), 25 of "
                            "its 75 queries"),
           alt="Five rows of scenes, one class each: a support image and five queries. "
               "Classes: " + ", ".join(kinds) + ".")

# %% [markdown]
# *Prediction 04.a:* guessing gives 20 %. How many queries of such episodes does the frozen network classify correctly, in %?

# %% tags=["prediction"]
lesson.predict("04.a", None)  # your guess, in %

# %% [markdown]
# ## Nearest prototype
#
# The prototype of class $n$ is the mean of its support features. The score of a class is large where the query is near:
#
# $$P_n = \frac{1}{K} \sum_{i=1}^{K} s_{ni} \qquad\qquad
# \text{L1: } -\sum_d |q_d - P_{nd}| \qquad \text{L2: } -\sum_d (q_d - P_{nd})^2 \qquad
# \text{cosine: } \frac{q \cdot P_n}{|q|\,|P_n|}$$
#
# For the cosine, features are **directions**: each is scaled to length 1 *before* the mean is taken. Otherwise a support image
# with long features would count more. (The mean of directions is shorter than 1; the cosine divides by its length.)
#
# ### Exercise 04.1 · Scores of episodes (3 points, 10 minutes)
#
# Write `episode_scores(support, query, metric)` for **all episodes at once**: `support` is `e n k d`, `query` is `e q d`,
# the result is `e n q`; `metric` is `"l1"`, `"l2"` or `"cosine"`. No loop over episodes.
#
# <details><summary>Hint 1</summary>Which axis of <code>support</code> do the prototypes lose? And which axes do prototypes and queries
# each need, so that all pairs of an episode meet?</details>
# <details><summary>Hint 2</summary><code>x[:, :, None]</code> puts an axis behind the second one, <code>y[:, None]</code> one before it: their
# difference has all pairs, episode by episode. For the cosine, <code>F.normalize(..., dim=-1)</code> makes directions, and <code>@</code> with
# <code>.mT</code> is a product of matrices for each episode.</details>
# <details><summary>Hint 3</summary>Another table of all pairs, for each of two days: how far is each guest from each of two
# taxis on the same street?
#
# ```python
# taxi = torch.tensor([[[0.0], [5.0]], [[1.0], [2.0]]])                       # day, taxi, 1
# guest = torch.tensor([[[1.0]], [[4.0]]])                                    # day, guest, 1
# (taxi[:, :, None] - guest[:, None]).abs()[:, :, 0, 0]                       # tensor([[1., 4.], [3., 2.]])
# ```
# </details>

# %% exercise="04.1"
def episode_scores(support, query, metric="cosine"):
    """Scores, the largest wins: support e n k d, query e q d -> e n q."""
    ### BEGIN SOLUTION
    if metric == "cosine":
        prototype = F.normalize(support, dim=-1).mean(2)
        return F.normalize(prototype, dim=-1) @ F.normalize(query, dim=-1).mT
    difference = support.mean(2)[:, :, None] - query[:, None]             # e n q d
    return -(difference.abs() if metric == "l1" else difference.square()).sum(-1)
    ### END SOLUTION

# %% check="04.1" points=3
with check("04.1", hint="mean over the shots, then minus the distance or the cosine to "
                        "every query") as ask:
    g = Generator().manual_seed(0)
    s, q = torch.rand(2, 3, 4, 6,
                      generator=g) + 0.1, torch.rand(2, 5, 6, generator=g) + 0.1
    bearing, (mean, tip) = F.normalize(q, dim=-1), (
        x.mean(2) for x in (s, F.normalize(s, dim=-1)))
    for metric, norm, power in ("l1", 1, 1), ("l2", 2, 2), ("cosine", 2, 2):
        score = lambda prototype: -torch.cdist(prototype, q, norm) ** power
        cosine = lambda prototype: 1 - torch.cdist(F.normalize(prototype, dim=-1),
                                                   bearing) ** 2 / 2
        # the cosine, by the law of cosines
        truth = cosine(tip) if metric == "cosine" else score(mean)
        same(ask(episode_scores, s, q, metric), truth,
             f'episode_scores(..., "{metric}")',
             axes="e n q", suspects={
                 "A sign is missing: a small distance is a large score.": -truth,
                 "L2 is squared here: leave the root out.": -torch.cdist(mean, q),
                 "You summed the support features: a prototype is their mean.":
                     score(4 * mean),
                 "Only the first support image of each class counted: take the mean of "
                 "all.": score(s[:, :, 0]),
                 "You averaged features of different lengths: for the cosine, scale "
                 "each to length 1 before the mean.": cosine(mean),
                 "The mean of directions is shorter than 1: scale the prototype to "
                 "length 1, too.": cosine(tip) * tip.norm(dim=-1, keepdim=True),
                 "The axes are in the order e q n: classes come before queries.":
                     truth.mT})
### BEGIN HIDDEN TESTS
assert (episode_scores(torch.rand(7, 5, 1, 3), torch.rand(7, 75, 3), "l1").shape
        == (7, 5, 75))
assert torch.allclose(episode_scores(torch.eye(3)[None, :, None],
                                     2 * torch.eye(3)[None], "cosine"),
                      torch.eye(3)[None])
### END HIDDEN TESTS

# %%
def library_scores(support, query, metric):
    if metric == "cosine":
        support, query = F.normalize(support, dim=-1), F.normalize(query, dim=-1)
    return episodes.CLASSIFIERS[metric](support, query)

scores = yours("04.1", episode_scores, library_scores)
table = scores(novel_q[drawn[1].support[:1]], novel_q[drawn[1].query[:1]], "cosine")[0]
decided = table.argmax(0).view(5, 15)
names = [f"{'✓' if a == row else '✗'} {kinds[a]}" for row in range(5)
         for a in decided[row, :5].tolist()]
correct = sum(name.startswith("✓") for name in names)
plots.show(plots.grid([novel[i][0] for i in first[:, :5].flatten().tolist()], names,
                      columns=5, side=1.4, title=f"The answers to these queries: "
                                                 f"{correct} of 25 are correct"),
           alt="The 25 queries with their answers, row by row: "
               + ", ".join(names) + ".")

# %% [markdown]
# ## How sure is an accuracy?
#
# Another draw of five photographs gives another accuracy. So it is averaged over many episodes, and reported as mean ± half
# of a 95 % interval, with $a_e$ the accuracy of episode $e$:
#
# $$\bar a \pm 1.96\, \frac{\text{std}_e(a_e)}{\sqrt{E}}$$
#
# ### Exercise 04.2 · The interval (2 points, 8 minutes)
#
# Write `accuracy_interval(correct)`: `correct` (`e q`, booleans) says which queries of which episodes were classified
# correctly. The result is a pair, mean and half of the interval, both in **percent**.
#
# *Before you write:* the 75 queries of an episode share five support images. Are they 75 independent trials?
#
# <details><summary>Hint 1</summary>What was drawn anew each time: an answer, or an episode? The spread of which numbers says how
# sure the mean is?</details>
# <details><summary>Hint 2</summary>First one accuracy for each episode, in percent; then the mean and <code>std</code> over the episodes.
# The error of a mean falls with the root of how many there are.</details>
# <details><summary>Hint 3</summary>Another mean with a spread: three sacks, each weighed twice.
#
# ```python
# weighings = torch.tensor([[98., 102.], [95., 97.], [101., 107.]])           # sack, weighing
# sacks = weighings.mean(1)                                                   # 100, 96, 104
# (sacks.mean().item(), sacks.std().item())                                   # (100.0, 4.0)
# ```
# </details>

# %% exercise="04.2"
def accuracy_interval(correct):
    """Mean accuracy and half of its 95 % interval over episodes, in percent: correct e
    q -> two numbers."""
    ### BEGIN SOLUTION
    each = 100 * correct.float().mean(1)
    return each.mean(), 1.96 * each.std() / len(each) ** 0.5
    ### END SOLUTION

# %% check="04.2" points=2
with check("04.2", hint="one accuracy per episode; 1.96 standard deviations over the "
                        "root of their number") as ask:
    g = Generator().manual_seed(0)
    # easy and hard episodes
    hit = torch.rand(40, 30, generator=g) < torch.rand(40, 1, generator=g)
    percent = torch.tensor([100 * sum(row) / 30 for row in hit.tolist()])
    mean, half = episodes.interval(percent)                       # the library's answer
    came = ask(accuracy_interval, hit)
    several = isinstance(came, tuple | list) or getattr(came, "ndim", 0)
    assert several and len(came) == 2, "Two numbers are expected: return mean, half."
    same(came[0], mean, "the mean", {
        "This is a share: multiply by 100 for percent.": mean / 100})
    textbook = lambda n: 1.96 * (mean * (100 - mean) / n) ** 0.5
    same(came[1], half, "half of the interval", {
        "This is the standard error: 95 % take 1.96 of it to either side.": half / 1.96,
        "This is the whole width: half of it stands behind the ±.": 2 * half,
        "This is the spread of single answers, as if all were independent. Those of an "
        "episode share their support images: the spread of the episodes counts.":
            episodes.interval(100 * hit.flatten().float())[1],
        "The textbook's sqrt(p(1 - p)/N) is for independent answers. Those of an "
        "episode share their support images: use `std`.": textbook(hit.numel()),
        "sqrt(p(1 - p)/E) is for answers that are right or wrong. The accuracy of an "
        "episode lies in between: use `std`.": textbook(40),
        "You averaged over the episodes first, for each query: one accuracy for each "
        "episode is needed.": episodes.interval(100 * hit.sum(0) / 40)[1],
        "You divided by E: the error of a mean falls with its root.": half / 40**0.5,
        "This is the spread of single episodes: divide by root E.": half * 40**0.5,
        "You divided by the root of the number of queries, not of that of episodes.":
            half * (40 / 30) ** 0.5,
        "The spread of a sample divides by E - 1 (`torch.std` does).":
            half * (39 / 40) ** 0.5})
### BEGIN HIDDEN TESTS
certain = accuracy_interval(torch.tensor([[True, False]] * 9))
assert float(certain[0]) == 50 and float(certain[1]) == 0
### END HIDDEN TESTS

# %% [markdown]
# What does "95 %" promise? We take 100 small evaluations of 100 episodes each. About 95 of their intervals should hold the mean
# of all. And we look at two things that the interval does not know: other classes for the same network, and other random
# seeds, each with other photographs, scenes and classes (from the committed table of this lesson).
#
# *Prediction 04.b:* the interval of 2000 episodes is about ±0.4 points. What is the standard deviation over random seeds?

# %% tags=["prediction"]
lesson.predict("04.b", None)  # your guess, in points

# %%
unit = F.normalize(novel_q, dim=1)

def answers(table, chosen, method="cosine"):
    """Which queries of which episodes are classified correctly: e q."""
    return torch.cat([
        episodes.CLASSIFIERS[method](table[s], table[q]).argmax(1) == chosen.labels
        for s, q in zip(chosen.support.split(20), chosen.query.split(20))])

def library_interval(correct):
    return episodes.interval(100 * correct.float().mean(1))

interval = yours("04.2", accuracy_interval, library_interval)
many = answers(unit, episodes.sample(
    novel.labels, 5, 1, 15, lesson.choose(smoke=400, mini=10_000, paper=10_000),
    Generator().manual_seed(SEED + 1)))
centre = 100 * many.float().mean().item()
pairs = torch.tensor([[float(x) for x in interval(part)] for part in many.split(100)])
covered = 100 * ((pairs[:, 0] - centre).abs() <= pairs[:, 1]).float().mean().item()
lesson.outcome("04.a", centre, "%")
lesson.claim(f"{covered:.0f} % of {len(pairs)} intervals hold the mean of all "
             f"episodes, "
             f"{centre:.1f} %.", 88 <= covered <= 100);

# %%
over_seeds = stdev(evidence.table("04")["figures"]["1-shot, cosine"]["values"])
counts = [n for n in (100, 200, 500, 1000, 2000, 5000, 10_000) if n <= len(many)]
halves = [float(interval(many[:n])[1]) for n in counts]
plots.show(plots.curve(
    counts, {"half of the interval": halves}, xlabel="episodes", ylabel="points",
    baselines={"standard deviation over random seeds": over_seeds},
    title=f"±{halves[-1]:.2f} after {counts[-1]:,} episodes, ±{over_seeds:.1f} over "
          "random seeds"),
           alt=f"Half of the interval falls from {halves[0]:.1f} points with 100 "
               f"episodes "
               f"to {halves[-1]:.2f} with {counts[-1]}; the standard deviation over "
               f"random seeds is {over_seeds:.1f}.")
other = answers(F.normalize(validation_q, dim=1), episodes.sample(
    validation.labels, 5, 1, 15, episode_count, Generator().manual_seed(SEED)))
mean_other, half_other = map(float, interval(other))
lesson.outcome("04.b", over_seeds, "points")
lesson.claim(f"The validation classes give {mean_other:.1f} ± {half_other:.1f} % with "
             f"the "
             "same network: many intervals away.",
             abs(mean_other - centre) > 3 * half_other)
lesson.claim(f"The standard deviation over random seeds, {over_seeds:.1f} points, is "
             f"more "
             f"than five times the interval of {counts[-1]:,} episodes.",
             over_seeds > 5 * halves[-1]);

# %% [markdown]
# So the interval keeps its promise, and the promise is small: **other episodes of the same images, by the same network**. It
# covers neither another training run nor other classes. A narrow interval is cheap: one draws more episodes.
#
# ## Which distance?
#
# The paper and lesson 02 compare by L1 (Eq. 4). We take the same features and the same episodes, and three distances. Beside
# them stands a baseline: **logistic regression** on the support features, scaled to length 1. Its penalty is chosen on
# validation classes. It answers each query for itself and knows nothing of few-shot learning.
#
# *Prediction 04.c:* by how many points is the cosine ahead of L1 with one shot?

# %% tags=["prediction"]
lesson.predict("04.c", None)  # your guess, in points

# %%
WORDS = {"l1": "L1", "l2": "L2", "cosine": "cosine", "logistic": "logistic regression",
         "shift": "cosine, shifted", "rectified": "BD-CSPN (Z = 8, ε = 10)"}

def accuracy(features, chosen, method, **options):
    """Accuracy of each episode in percent, the mean over its classes."""
    features = features.to(lesson.device)
    if method == "logistic":
        features = F.normalize(features, dim=1)
        method = partial(episodes.logistic, penalty=penalty)
    share = episodes.recalls(features, chosen, method, **options)
    return 100 * share.nanmean(1).cpu()

def pair(values):
    return "{:.1f} ± {:.1f}".format(*episodes.interval(values))

def gain(values, base):
    """Mean difference on the same episodes, and half of its interval."""
    return "{:+.1f} ± {:.1f}".format(*episodes.interval(values - base))

# %%
penalty, trial = 1.0, {}
chosen = episodes.sample(validation.labels, 5, 5, 15, episode_count // 10,
                         Generator().manual_seed(SEED))
for penalty in (1.0, 0.3, 0.1):
    trial[penalty] = accuracy(validation_q, chosen, "logistic").mean().item()
penalty = max(trial, key=trial.get)
print(f"penalty of the logistic regression: {penalty:g}")
found = {shots: {} for shots in (1, 5)}
for shots, method in tqdm([(s, m) for s in (1, 5) for m in WORDS], "methods"):
    found[shots][method] = accuracy(novel_q, drawn[shots], method)
gained = {(shots, method): (values - by["cosine"]).mean().item()
          for shots, by in found.items() for method, values in by.items()}

# %%
def compared(methods):
    lines = ["| accuracy, % | | 1-shot | over cosine | 5-shot | over cosine |",
             "|---|---|---|---|---|---|"]
    for method in methods:
        kind = "transductive" if method in episodes.TRANSDUCTIVE else "inductive"
        cells = [WORDS[method], kind]
        for by in found.values():
            cells += [pair(by[method]), gain(by[method], by["cosine"])
                      if method != "cosine" else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines

display(Markdown("\n".join(compared(("l1", "l2", "cosine", "logistic")))))
lesson.outcome("04.c", -gained[1, "l1"], "points")
lesson.claim(f"With one shot the cosine is {-gained[1, 'l1']:.1f} points ahead of L1 "
             f"and "
             f"{-gained[1, 'l2']:.1f} ahead of L2.",
             gained[1, "l1"] < gained[1, "l2"] - 1 < -3)
apart = sum(episodes.interval(found[1][m])[1] ** 2 for m in ("l2", "cosine")) ** 0.5
paired = episodes.interval(found[1]["l2"] - found[1]["cosine"])[1]
lesson.claim(f"The interval of the difference L2 - cosine is ±{paired:.2f} on the same "
             f"episodes; on different ones it would be ±{apart:.2f}.", paired < apart);

# %% [markdown]
# Compare methods **on the same episodes**: a hard episode is hard for both, and this drops out of their difference. Two
# intervals that overlap do not mean "no difference".
#
# Why do distances differ so much? Lesson 02 has a hint: $-|q - P|^2$ is linear in $q$ with the **bias** $-|P|^2$. A short
# prototype gets a bonus for all queries.
#
# *Prediction 04.d:* one of five prototypes is the shortest. With L2 and one shot, what share of all queries does it get?
# 20 % would be fair.

# %% tags=["prediction"]
lesson.predict("04.d", None)  # your guess, in %

# %%
shortest = {}
for shots, chosen in drawn.items():
    length = novel_q[chosen.support].mean(2).norm(dim=-1).argmin(1)[:, None]     # e 1
    for method in ("l1", "l2", "cosine"):
        table = unit if method == "cosine" else novel_q
        given = torch.cat(
            [episodes.CLASSIFIERS[method](table[s], table[q]).argmax(1)
             for s, q in zip(chosen.support.split(50), chosen.query.split(50))])
        shortest[shots, method] = 100 * (given == length).float().mean().item()
        print(f"{shots}-shot, {method:6} {shortest[shots, method]:.0f} % of the "
              f"queries "
              "go to the shortest prototype")
scaled = answers(unit, drawn[1], "l2") == answers(unit, drawn[1], "cosine")
lesson.outcome("04.d", shortest[1, "l2"], "%")
lesson.claim(f"With one shot the shortest prototype gets {shortest[1, 'l1']:.0f} % by "
             f"L1, "
             f"{shortest[1, 'l2']:.0f} % by L2 and {shortest[1, 'cosine']:.0f} % by "
             f"the "
             "cosine.", min(shortest[1, "l1"], shortest[1, "l2"]) > 33
             and shortest[1, "cosine"] < 25)
lesson.claim("After scaling to length 1, L2 agrees with the cosine in "
             f"{100 * scaled.float().mean():.1f} % of the answers.",
             scaled.float().mean() > 0.999);

# %% [markdown]
# With one shot nothing averages the length out. Once all features have length 1, $|q - P|^2 = 2 - 2\cos$: L2 *is* the cosine.
#
# ## Rectification
#
# Liu et al. see two flaws of few samples, and repair both with the **queries**:
#
# * **across classes**: the support set as a whole lies elsewhere than the query set. So they move all queries,
#   $q \leftarrow q + \xi$ with $\xi = \text{mean}\,S - \text{mean}\,Q$ (`prototypes.shift`);
# * **within a class**: one photograph is not the class. So the $Z$ queries that are surest to belong to a class join its
#   support samples. All of them weigh by their cosine to the first prototype:
#
# $$P'_n = \sum_i w_{ni}\, x_i, \qquad w_{ni} = \frac{\exp(\epsilon \cos(x_i, P_n))}{\sum_j \exp(\epsilon \cos(x_j, P_n))}$$
#
# over the $K$ support samples and the joined queries of class $n$. They use $Z = 8$ and $\epsilon = 10$. Each query has the
# pseudo label of its nearest prototype, and can join this class only: `prototypes.surest_queries`.
#
# The method looks at all queries of an episode before it answers one: it is **transductive**. A method that answers each
# query for itself is **inductive**. The two do not compare, because the queries tell a transductive method how the classes
# are spread.
#
# ### Exercise 04.3 · The rectified prototypes (3 points, 12 minutes)
#
# Write `rectified(support, query, joins, epsilon)`: $P'_n$ as above, `e n d`. `support` is `e n k d` (length 1), `query`
# is `e q d` (moved, so **not** of length 1), `joins` says which query joins which class, boolean, `e n q`. $P_n$ is the mean
# of the support samples. A class that no query joins keeps its $P_n$.
#
# <details><summary>Hint 1</summary>Which samples share one softmax? Which number must a query that does not join have before it, so
# that its weight is 0?</details>
# <details><summary>Hint 2</summary><code>F.cosine_similarity(prototype[:, :, None], support, dim=-1)</code> is <code>e n k</code>; with <code>query[:, None]</code>
# in place of <code>support</code> it is <code>e n q</code>. <code>torch.cat</code> puts both side by side. Cut the weights at K again to sum support samples
# and queries, and choose $P_n$ where <code>joins.any(-1)</code> is false.</details>
# <details><summary>Hint 3</summary>Another weighted mean: two prices that somebody saw, and one that nobody did.
#
# ```python
# price = torch.tensor([[4.0, 8.0, 100.0]])
# trust, seen = torch.tensor([[1.0, 1.0, 5.0]]), torch.tensor([[True, True, False]])
# share = trust.masked_fill(~seen, -torch.inf).softmax(-1)                    # 0.5 0.5 0
# share @ price.T                                                             # tensor([[6.]])
# ```
# </details>

# %% exercise="04.3"
def rectified(support, query, joins, epsilon):
    """Prototypes that queries joined: support e n k d, query e q d, joins e n q -> e n
    d."""
    ### BEGIN SOLUTION
    prototype = support.mean(2)
    near = F.cosine_similarity(prototype[:, :, None], support, dim=-1)    # e n k
    like = F.cosine_similarity(prototype[:, :, None], query[:, None], dim=-1)    # e n q
    weights = torch.cat((epsilon * near,
                         torch.where(joins, epsilon * like, -torch.inf)),
                        -1).softmax(-1)
    shots = support.shape[2]
    sums = torch.einsum("enk,enkd->end", weights[..., :shots],
                        support) + weights[..., shots:] @ query
    return torch.where(joins.any(-1, keepdim=True), sums, prototype)
    ### END SOLUTION

# %% check="04.3" points=3
with check("04.3", hint="one softmax over the support samples and joined queries of a "
                        "class, then the weighted sum") as ask:
    g = Generator().manual_seed(0)
    s = F.normalize(torch.rand(2, 3, 3, 4, generator=g) ** 2, dim=-1)
    q, joins = (1.5 * torch.rand(2, 6, 4, generator=g),
                torch.rand(2, 3, 6, generator=g) < 0.5)
    joins[0, 1] = False                                        # nobody joins this class
    def answer(scale=5.0, joins=joins, lonely=True, cosines=9, start=0):
        found = torch.zeros(2, 3, 4)
        # class after class
        for e, n in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
            p, x = s[e, n].sum(0) / 3, torch.cat((s[e, n], q[e, joins[e, n]]))[start:]
            power = scale * x @ p
            power[:cosines] /= x[:cosines].norm(dim=1) * p.norm()
            found[e, n] = (p if lonely and not joins[e, n].any()
                           else power.exp() @ x / power.exp().sum())
        return found
    same(ask(rectified, s, q, joins, 5.0), answer(), "rectified(...)", axes="e n d",
         suspects={"epsilon is missing: it multiplies the cosine.": answer(1.0),
                   "All samples weigh the same: weigh them by softmax(epsilon cos).":
                       answer(0.0),
                   "Queries that did not join count, too: give them -inf before the "
                   "softmax.": answer(joins=joins | True),
                   "The support samples are missing: they stay in.": answer(start=3),
                   "Moved queries are not of length 1: divide by their length, it is a "
                   "cosine.": answer(cosines=3),
                   "A class that no query joins keeps its prototype, without weights.":
                       answer(lonely=False),
                   "You scaled the result to length 1: leave that to the cosine.":
                       F.normalize(answer(), dim=-1)})
### BEGIN HIDDEN TESTS
for n in (3, 2):                         # of three shots each
    s = s[:, :n]
    moved = prototypes.shift(s.flatten(1, 2), q)
    sure = prototypes.surest_queries(episode_scores(s, moved, "cosine"), 2)
    chain = rectified(s, moved, sure, 10.0)
    owner = torch.arange(n).repeat_interleave(3)
    library = prototypes.rectify(s.flatten(1, 2), owner, moved, n, 2)
    assert torch.allclose(chain, library, atol=1e-5)
### END HIDDEN TESTS

# %% [markdown]
# Now watch your function at work. Three classes, one support image each; once with 15 queries of each class, once with 15, 2
# and 2. The plane of each picture goes through its three prototypes. So the nearest prototype in the picture is the nearest
# one in all 1280 dimensions. It is the first episode drawn, not the prettiest.

# %%
def library_rectified(support, query, joins, epsilon):
    ways, shots = support.shape[1:3]
    owner = torch.arange(ways).repeat_interleave(shots)
    surest = int(joins.sum(-1).max())                  # of a class with fewer all join
    support = support.flatten(1, 2)
    return prototypes.rectify(support, owner, query, ways, surest, epsilon)

# %%
rectify = yours("04.3", rectified, library_rectified)
three = episodes.sample(novel.labels, 3, 1, 15, 1, Generator().manual_seed(SEED))
left = {"15, 15, 15": list(range(45)), "15, 2, 2": [*range(15), 15, 16, 30, 31]}
steps = ("as they are", "shifted", "up to 8 join")

def after(rows, step):
    """Queries q 2 and prototypes 3 2 in the plane of the prototypes; answers q."""
    support, query = unit[three.support], unit[three.query[:, rows]]
    P = support[:, :, 0]
    if step != steps[0]:
        query = prototypes.shift(P, query)
    if step == steps[2]:
        sure = prototypes.surest_queries(P @ F.normalize(query, dim=-1).mT, 8)
        P = F.normalize(rectify(support, query, sure, 0.0), dim=-1)
    query, P = query[0], P[0]
    x = F.normalize(P[1] - P[0], dim=0)
    y = F.normalize(P[2] - P[0] - (P[2] - P[0]) @ x * x, dim=0)
    plane = torch.stack((x, y), 1)
    return (query - P[0]) @ plane, (P - P[0]) @ plane, (P @ query.mT).argmax(0)

# %%
figure, words, agrees = Figure((9.6, 7.4), layout="constrained"), [], []
panels = figure.subplots(2, 3)
for row, (name, rows) in zip(panels, left.items()):
    for axes, step in zip(row, steps):
        (spots, marks, decided), labels = after(rows, step), three.labels[rows]
        agrees.append((torch.cdist(marks, spots).argmin(0) == decided).all().item())
        hits = [(decided == c)[labels == c].float().mean().item() for c in range(3)]
        for c, marker in enumerate("os^"):
            style = {"marker": marker, "color": plots.PALETTE[c]}
            of = novel.classes[novel.labels[three.support[0, c, 0]]]
            axes.scatter(*spots[labels == c].T, s=28, alpha=0.75, label=of, **style)
            axes.scatter(*marks[c], s=200, edgecolor="black", linewidth=2, **style)
        axes.scatter(*spots[decided != labels].T, marker="x", s=45, color="black",
                     linewidth=1, label="classified wrongly")
        words.append(f"{name} queries,\n{step}: {100 * sum(hits) / 3:.0f} %")
        axes.set_title(words[-1], fontsize="medium")
        axes.set(aspect="equal", xticks=[], yticks=[])
figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center",
              ncols=4, fontsize="small", frameon=False, title="large: prototype")
plots.show(figure, alt="Queries and prototypes of three classes in the plane of the "
                       "prototypes; classified correctly, mean of classes: "
                       + "; ".join(words).replace("\n", " ") + ".")
lesson.claim("In all six pictures the nearest prototype is the answer.", all(agrees));

# %% [markdown]
# ### What it gains
#
# Liu et al. report a gain of 8.5 points with one shot and 3.3 with five, for other features.
#
# *Prediction 04.e:* what does BD-CSPN gain here with five shots?

# %% tags=["prediction"]
lesson.predict("04.e", None)  # your guess, in points

# %%
lines = compared(("cosine", "logistic", "shift", "rectified"))
for name, transductive, figures in published.FEW_SHOT:
    kind = {"yes": "transductive", "no": "inductive"}.get(transductive, transductive)
    lines.append(f"| *{name}* | {kind} | {figures.get(1, '')} | | {figures.get(5, '')} "
                 "| |")
display(Markdown("\n".join([*lines, "", published.FEW_SHOT_CAVEAT])))
lesson.outcome("04.e", gained[5, "rectified"], "points")
lesson.claim(f"With one shot BD-CSPN gains {gained[1, 'rectified']:.1f} points.",
             gained[1, "rectified"] > 0.7)
lesson.claim(f"With five shots it changes the accuracy by "
             f"{gained[5, 'rectified']:+.1f} "
             f"points, while the shift alone gains {gained[5, 'shift']:.1f}.",
             gained[5, "shift"] > 0.3
             and gained[5, "rectified"] < gained[5, "shift"] - 1)
lesson.claim("Logistic regression gains "
             f"{gained[5, 'logistic']:.1f} points with five shots, the shift "
             f"{gained[5, 'shift']:.1f}; only the shift has to see all queries.",
             gained[5, "logistic"] > gained[5, "shift"] - 0.5);

# %% [markdown]
# With five shots something in BD-CSPN costs more than the shift brings. Two suspects: queries join with a wrong pseudo
# label, or the weights are bad. The weights also act on the **support samples**, whose labels are right. So we take the
# weights alone, and let no query join.
#
# *Prediction 04.f:* $\epsilon = 0$ weighs all samples equally, with $\epsilon = 30$ one sample takes most of the weight. At
# which ε, from 0 to 30, does BD-CSPN gain most with five shots?

# %% tags=["prediction"]
lesson.predict("04.f", None)  # your guess, from 0 to 30

# %%
def weighted_support(support, query, epsilon):
    """Scores by support samples that weigh as in BD-CSPN; no query joins."""
    near = (F.normalize(support.mean(2), dim=-1)[:, :, None] * support).sum(-1)
    prototype = torch.einsum("enk,enkd->end", (epsilon * near).softmax(-1), support)
    return F.normalize(prototype, dim=-1) @ query.mT

epsilons = lesson.choose(smoke=[0.0, 10.0], mini=[0.0, 2.0, 5.0, 10.0, 20.0, 30.0],
                         paper=[0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0])
directions = F.normalize(validation_q, dim=1)          # chosen on validation classes
curves = {"1-shot, BD-CSPN": (1, "rectified"), "5-shot, BD-CSPN": (5, "rectified"),
          "5-shot, weighted support, no queries": (5, weighted_support)}
rise = {name: [] for name in curves}
for name, (shots, method) in tqdm(curves.items(), "ε"):
    chosen = episodes.sample(validation.labels, 5, shots, 15, episode_count // 4,
                             Generator().manual_seed(SEED))
    base = accuracy(validation_q, chosen, "cosine")
    for epsilon in epsilons:
        values = accuracy(directions, chosen, method, epsilon=epsilon)
        rise[name].append((values - base).mean().item())

# %%
at_ten, weighted = epsilons.index(10.0), rise["5-shot, weighted support, no queries"]
best = {shots: epsilons[torch.tensor(rise[f"{shots}-shot, BD-CSPN"]).argmax()]
        for shots in (1, 5)}
plots.show(plots.curve(
    epsilons, rise, xlabel="ε, scale of the weights", ylabel="gain over cosine, points",
    baselines={"cosine": 0.0},
    title=f"Largest gain at ε = {best[1]:g} with one shot, at {best[5]:g} with five"),
           alt="Gain over the cosine as a function of epsilon on validation classes: "
           + "; ".join(f"{name} from {v[0]:+.1f} at 0 to {v[-1]:+.1f} at "
                       f"{epsilons[-1]:g}" for name, v in rise.items()) + ".")
tuned = {shots: accuracy(novel_q, drawn[shots], "rectified", epsilon=best[shots])
         for shots in (1, 5)}
better = {shots: (values - found[shots]["cosine"]).mean().item()
          for shots, values in tuned.items()}
lesson.outcome("04.f", best[5])
lesson.claim("At ε = 10 the weights alone, without any query, change the accuracy by "
             f"{weighted[at_ten]:+.1f} points on validation "
             f"classes.", weighted[at_ten] < -1)
lesson.claim(f"With the ε of the validation classes BD-CSPN gains {better[1]:.1f} "
             f"points "
             f"on novel classes with one shot and {better[5]:.1f} with five.",
             min(better.values()) > 1);

# %% [markdown]
# So the weights are to blame: they silence support samples whose labels are right. The constant belongs to other features than
# these. Constants do not travel, and validation classes are there to choose them. (One thing flatters rectification here: the
# scenes of a class show few photographs, so some queries are near twins.)
#
# ## Uneven queries
#
# Both steps assume what every benchmark grants and few applications do: **as many queries of each class**. If fifteen
# queries are of the first class and two of each other, mean $Q$ lies near the first class. The shift then moves the queries to
# a mean that is not theirs. Veilleux et al. draw the shares of the classes from a Dirichlet distribution instead.
#
# ### Exercise 04.4 · An experiment: where does rectification turn? (3 points, 12 minutes)
#
# Write `turning_point(features, labels, others)`. For each number in the list `others`, draw 200 episodes (5 ways, 1 shot) with
# 15 queries of the first class and this number of each other class, each time with `Generator().manual_seed(0)`. Measure the
# gain of `"rectified"` over `"cosine"` in points, as the mean over episodes and classes of `episodes.recalls`. Return a pair:
# the list of gains, and your conclusion: the smallest number in `others` at which rectification gains (`None` if there is
# none).
#
# <details><summary>Hint 1</summary><code>episodes.sample</code> takes the number of queries of each class as a tuple. Which methods must see the
# same episodes?</details>
# <details><summary>Hint 2</summary><code>recalls</code> gives shares, <code>e n</code>: their mean weighs all classes equally. <code>zip(others,
# gains)</code> puts numbers and gains side by side; <code>min(..., default=None)</code> is ready for an empty list.</details>
# <details><summary>Hint 3</summary>Another search: the lowest price at which a shop sold anything.
#
# ```python
# sold = {9: 4, 2: 0, 5: 1}                                          # price: pieces
# min(price for price, pieces in sold.items() if pieces > 0)         # 5
# ```
# </details>

# %% exercise="04.4"
def turning_point(features, labels, others):
    """Gains in points, one for each of `others`; and the smallest that gains."""
    ### BEGIN SOLUTION
    gains = []
    for count in others:
        queries = (15, count, count, count, count)
        chosen = episodes.sample(labels, 5, 1, queries, 200, Generator().manual_seed(0))
        after, before = (episodes.recalls(features, chosen, method)
                         for method in ("rectified", "cosine"))
        gains.append(100 * (after - before).mean().item())
    turning = min((n for n, v in zip(others, gains) if v > 0), default=None)
    return gains, turning
    ### END SOLUTION

# %% check="04.4" points=3
with check("04.4", hint="the same episodes for both methods; then the smallest number "
                        "with a gain above 0") as ask:
    g, owners = Generator().manual_seed(1), torch.arange(120) // 20
    blobs = (torch.rand(6, 12, generator=g)[owners]
             + 1.1 * torch.rand(120, 12, generator=g))
    for asked_for in ([1, 15, 3], [15, 8, 2], [1, 2]):
        gained_here, truth = episodes.uneven_gains(blobs, owners, asked_for)
        def variant(method="rectified", base="cosine", first=15, shots=1, plain=False):
            for n in asked_for:
                tasks = episodes.sample(owners, 5, shots, (first or n, *[n] * 4), 200,
                                        Generator().manual_seed(0))
                a, b = (episodes.recalls(blobs, tasks, m) for m in (method, base))
                yield 100 * (episodes.accuracies(a - b, tasks.labels) if plain
                             else a - b).mean().item()
        came = ask(turning_point, blobs, owners, asked_for)
        assert isinstance(came, tuple) and len(came) == 2, (
            "Two things are expected: return gains, turning.")
        same(came[0], gained_here, f"gains for {asked_for}", {
            "These are shares: multiply by 100 for points.":
                [x / 100 for x in gained_here],
            "The sign is wrong: a gain is rectified minus cosine.":
                [-x for x in gained_here],
            "This is the mean of all queries: weigh all classes equally.":
                lambda: [*variant(plain=True)],
            "This is the shift alone: the method is \"rectified\".":
                lambda: [*variant("shift")],
            "The first class has as many queries as the others: it has 15.":
                lambda: [*variant(first=None)],
            "You compare with L2, not with the cosine.": lambda: [*variant(base="l2")],
            "This is 5-shot: one image of each class.": lambda: [*variant(shots=5)]})
        assert came[1] == truth, (f"By the gains for {asked_for} the smallest that "
                                  f"gains is {truth}, but you say {came[1]}.")
### BEGIN HIDDEN TESTS
two = turning_point(blobs, owners, [8, 15])[0]
assert turning_point(blobs, owners, [15])[0] == two[1:]
g = Generator().manual_seed(3)
wild = torch.rand(6, 12, generator=g)[owners] + 1.2 * torch.rand(120, 12, generator=g)
assert turning_point(wild, owners, [2, 3])[1] == 3
### END HIDDEN TESTS

# %% [markdown]
# *Prediction 04.g:* on the miniature the first class has 15 queries. How many of each other class does BD-CSPN need to gain?

# %% tags=["prediction"]
lesson.predict("04.g", None)  # your guess, a number from 1 to 15

# %%
experiment = yours("04.4", turning_point, episodes.uneven_gains)
others = [15, 8, 4, 2, 1]
turn, turning = experiment(novel_q, novel.labels, others)
plots.show(plots.curve(
    others, {"BD-CSPN, 1-shot": turn}, baselines={"cosine": 0.0},
    xlabel="queries of each other class (the first has 15)",
    ylabel="gain over cosine, points",
    title=f"It gains {turn[0]:+.1f} points with 15 queries of every class, "
          f"{turn[3]:+.1f} with 2 of the others"),
           alt="Gain of BD-CSPN over the cosine, mean of classes: "
           + ", ".join(f"{v:+.1f} points with {n}" for n, v in zip(others, turn)) + ".")
lesson.outcome("04.g", turning)

# %%
uneven = {"15 of each": drawn, "15, 2, 2, 2, 2": {
    shots: episodes.sample(novel.labels, 5, shots, (15, 2, 2, 2, 2), episode_count,
                           Generator().manual_seed(SEED)) for shots in (1, 5)}}
generator = Generator().manual_seed(SEED)
draws = episodes.dirichlet_counts(5, 40, lesson.choose(smoke=5, mini=100, paper=500),
                                  generator, most=15)
uneven["Dirichlet"] = {shots: [episodes.sample(novel.labels, 5, shots, each, 10,
                                               generator) for each in draws]
                       for shots in (1, 5)}
losses = {}                                            # gains, of every kind of queries
todo = [(s, k, m) for s in (1, 5) for k in uneven for m in ("shift", "rectified", "ε")]
for shots, kind, method in tqdm(todo, "queries"):
    options = {"epsilon": best[shots]} if method == "ε" else {}
    chosen = uneven[kind][shots]
    losses[shots, kind, method] = torch.cat([
        accuracy(novel_q, part, method.replace("ε", "rectified"), **options)
        - accuracy(novel_q, part, "cosine")
        for part in (chosen if isinstance(chosen, list) else [chosen])])

# %%
order = ("15 of each", "Dirichlet", "15, 2, 2, 2, 2")
lines = [f"| over cosine, points | shots | {' | '.join(order)} |", "|---" * 5 + "|"]
for shots in (1, 5):
    for method, word in (("shift", WORDS["shift"]), ("rectified", WORDS["rectified"]),
                         ("ε", f"BD-CSPN, ε = {best[shots]:g}")):
        cells = ["{:+.1f} ± {:.1f}".format(*episodes.interval(losses[shots, k, method]))
                 for k in order]
        lines.append(f"| {word} | {shots} | {' | '.join(cells)} |")
display(Markdown("\n".join([*lines, "", "Means of the classes that have queries."])))
at = {key: values.mean().item() for key, values in losses.items()}
for shots in (1, 5):
    even, real, worst = (at[shots, kind, "rectified"] for kind in order)
    lesson.claim(f"{shots}-shot, BD-CSPN: {even:+.1f} points with even queries, "
                 f"{real:+.1f} with Dirichlet ones, {worst:+.1f} with 15, 2, 2, 2, 2.",
                 even > real > worst and worst < 0)
recall = {(shots, method): 100 * episodes.recalls(
    novel_q.to(lesson.device), uneven[order[2]][shots], method)[:, 0].mean().item()
          for shots in (1, 5) for method in ("cosine", "rectified")}
lesson.claim("With 15, 2, 2, 2, 2 the recall of the large class falls from "
             f"{recall[1, 'cosine']:.1f} to {recall[1, 'rectified']:.1f} % with one "
             f"shot.",
             recall[1, "rectified"] < recall[1, "cosine"] - 5);

# %% [markdown]
# A gain of a transductive method on even queries says little about an application. An inductive method answers each query for
# itself, so uneven queries cannot harm it.
#
# ## Maps: what do query and prototype share?
#
# Section 4.1 of the paper shows **where** a query resembles the support images, in pairs. We measure. The files of
# miniImageNet have no masks, but those of lesson 02 do: an episode with as many ways as that data has kinds. The support
# photographs are from training scenes, the queries are validation scenes of unseen photographs. Each query gets two maps by
# every rule of lesson 02: against the prototype of its own class, and against that of a wrong one.
#
# *Prediction 04.h:* the sum of all channels, without any support, has an energy per area of about 1.8 on the object. What does
# Dist-CAM have, with one shot?

# %% tags=["prediction"]
lesson.predict("04.h", None)  # your guess; 1 is chance

# %%
scenes_root = minis.mini_ilsvrc(lesson.data, labels="kind", seed=SEED)
known, unseen = Ilsvrc(scenes_root, "train"), Ilsvrc(scenes_root, "val")
seen = list(islice(unseen.batches(side, 16),
                   lesson.choose(smoke=3, mini=None, paper=None)))
photos, query_y, masks = (torch.cat([getattr(batch, part) for batch in seen])
                          for part in ("images", "labels", "masks"))
known_y = torch.tensor([photo.label for photo in known.photos])
ways = len(known.classes)                                  # 40 with all photographs
forty = episodes.sample(known_y, ways, 5, 1, 1,
                        Generator().manual_seed(SEED)).support[0]             # ways 5
forty = forty[known_y[forty[:, 0]].argsort()]              # in the order of the classes

def scenes():
    with torch.inference_mode():
        parts = [network.features(network.normalise(part.to(lesson.device))).cpu()
                 for part in tqdm(photos.split(16), "queries")]
    return torch.cat(parts), look(Subset(known, forty.flatten().tolist())).mean((2, 3))

query_maps, support_q = cached(
    "04 features of the scenes", scenes, data=fingerprint(scenes_root),
    settings=[side, len(photos), forty], takes="some seconds")
support_q = F.normalize(support_q, dim=1).view(ways, 5, -1)
query_maps = (query_maps                                    # pooled, of length 1
              / query_maps.mean((2, 3), keepdim=True).norm(dim=1, keepdim=True))

# %%
generator = Generator().manual_seed(SEED)
wrong = controls.wrong_classes(query_y, ways, generator)
both = torch.stack((query_y, wrong), 1)
RULES = {"uniform": "uniform (no support at all)", "random": "random weights, 1/U",
         "dist-cam": "Dist-CAM (Eq. 4–6)", "match-activity": "match × activity",
         "prototype": "W = P", "prototype-centred": "W = P − mean P"}
energy, alike = {}, {}
for shots in (1, 5):
    raw_of = rules.pair_maps(query_maps, support_q[:, :shots].mean(1), both, generator,
                             tuple(RULES))
    for rule, raw in tqdm(raw_of.items(), f"{shots}-shot"):
        heat = maps.heatmap(raw, side)                 # n 2 H W: own class, wrong class
        energy[shots, rule] = controls.energy_per_area(
            heat, masks.bool()[:, None].expand(-1, 2, -1, -1))
        alike[shots, rule] = (
            controls.map_correlation(raw[:, 0], raw[:, 1]).mean().item())

# %%
lines = ["| energy per area of the object | own class, 1-shot | wrong class | "
         "correlation | own class, 5-shot | wrong class | correlation |",
         "|---|---|---|---|---|---|---|"]
for rule, word in RULES.items():
    cells = [word]
    for shots in (1, 5):
        own, false = energy[shots, rule].mean(0).tolist()
        cells += [f"{own:.2f}", f"{false:.2f}", f"{alike[shots, rule]:.2f}"]
    lines.append(f"| {' | '.join(cells)} |")
says = "1 is chance. Correlation: of the maps of own and wrong class."
display(Markdown("\n".join([*lines, "", says])))

# %%
on = {key: values.mean(0).tolist() for key, values in energy.items()}    # own, wrong
lesson.outcome("04.h", on[1, "dist-cam"][0])
lesson.claim(f"Dist-CAM has less energy on the object, {on[1, 'dist-cam'][0]:.2f}, "
             f"than the "
             f"map without any support, {on[1, 'uniform'][0]:.2f}.",
             on[1, "dist-cam"][0] < on[1, "uniform"][0] - 0.05)
lesson.claim(f"A wrong class leaves Dist-CAM at {on[1, 'dist-cam'][1]:.2f}, and W = P "
             f"at "
             f"{on[1, 'prototype'][1]:.2f} of {on[1, 'prototype'][0]:.2f}.",
             abs(on[1, "dist-cam"][0] - on[1, "dist-cam"][1]) < 0.15)
lesson.claim("Only W = P − mean P depends on the class: "
             f"{on[1, 'prototype-centred'][0]:.2f} with the own class and "
             f"{on[1, 'prototype-centred'][1]:.2f} with a wrong one, near chance.",
             on[1, "prototype-centred"][0] > on[1, "prototype-centred"][1] + 0.3
             and 0.75 < on[1, "prototype-centred"][1] < 1.25)
lesson.claim("Five shots raise this rule from "
             f"{on[1, 'prototype-centred'][0]:.2f} to "
             f"{on[5, 'prototype-centred'][0]:.2f}.",
             on[5, "prototype-centred"][0] > on[1, "prototype-centred"][0]);

# %% [markdown]
# So a map "of what query and support share" may show the same without the support. Only a wrong support image beside it can
# tell. Here is the query with the median energy by the centred rule:

# %%
centred = energy[1, "prototype-centred"][:, 0]
i = centred.argsort()[len(centred) // 2].item()
names_of = list(unseen.classes.values())
raw_of = rules.pair_maps(query_maps[[i]], support_q[:, :1].mean(1), both[[i]],
                         generator, ("dist-cam", "prototype-centred"))
support_of = [known[forty[c, 0].item()][0] for c in (query_y[i], wrong[i])]
panels = [support_of[0], photos[i], *[photos[i]] * 4]
names, heats = [f"support: {names_of[query_y[i]]}", "query"], [None, None]
for rule, raw in raw_of.items():
    heats += list(maps.heatmap(raw, side)[0])
    names += [f"{RULES[rule].split(' (')[0]}\n{word}: {energy[1, rule][i, j]:.2f}"
              for j, word in enumerate(("own", f"as {names_of[wrong[i]]}"))]
plots.show(plots.grid(panels, names, heatmaps=heats, columns=6, side=1.6,
                      title="Mean correlation of own and wrong: "
                            f"{alike[1, 'dist-cam']:.2f} for Dist-CAM, "
                            f"{alike[1, 'prototype-centred']:.2f} for W = P − mean P"),
           alt=f"A query of {names_of[query_y[i]]} with its support image and four "
               f"maps: "
               "Dist-CAM and centred prototype, each for the own class and for "
               f"{names_of[wrong[i]]}; " + ", ".join(n.replace("\n", ", ")
                                                     for n in names[2:]) + ".")

# %% [markdown]
# ## What foundation models have changed
#
# Papers of 2017 to 2020 compare ways to learn from few images, with networks trained on 64 base classes. Today the features
# come from a **foundation model**, pretrained on very much data, and the method on top is often as simple as here: nearest
# prototypes, or logistic regression. Hu et al. (*Pushing the Limits of Simple Pipelines for Few-Shot Learning*, CVPR 2022)
# report 95.3 % for 5-way 1-shot on miniImageNet, with features that DINO learnt without labels, and prototypes. Two things to
# remember when you read such figures. The pretraining may have seen the test images or their classes, as in this lesson, so
# the classes are no longer novel. And where simple methods come close to the top of a benchmark, it cannot tell methods
# apart: take harder ones, with classes that differ in few details, or from another domain.
#
# ## What was measured
#
# - **Reproduced:** prototypes of a frozen network tell classes apart from a single image. The cosine is the distance to take.
#   Rectification gains with one shot and even queries.
# - **Not reproduced with the constants of the paper:** the gain of its weights with five shots. The cause is the scale of the
#   weights, which belongs to other features.
# - **Uneven queries** make a loss of the gain. A logistic regression has no such condition.
# - **Maps:** Dist-CAM as printed depends little on the support; centred prototypes do depend on it.
# - **Not comparable:** any figure here with one of the papers. Theirs are of the real miniImageNet. Here the network has seen
#   a thousand classes, and the scenes are a miniature.

# %%
papers = {"cosine": published.FEW_SHOT[0][2], "rectified": published.FEW_SHOT[1][2]}
for shots, by in found.items():
    for method, values in by.items():
        m, h = episodes.interval(values)
        kind = "transductive" if method in episodes.TRANSDUCTIVE else "inductive"
        paper = float(papers[method][shots]) if method in papers else None
        lesson.record(f"{shots}-shot, {WORDS[method]}", m, "%", paper=paper,
                      note=f"± {h:.1f}, {kind}" + ("; paper: Liu et al., other network "
                                                   "and data" if paper else ""))
    lesson.record(f"{shots}-shot, gain of "
                  f"BD-CSPN", gained[shots, "rectified"], "points")
    lesson.record(f"{shots}-shot, gain of BD-CSPN, ε of the validation classes",
                  better[shots], "points", note=f"ε = {best[shots]:g}")
    lesson.record(f"{shots}-shot, gain of BD-CSPN, queries 15/2/2/2/2",
                  at[shots, order[2], "rectified"], "points", note="mean of classes")
    lesson.record(f"{shots}-shot, gain of BD-CSPN, Dirichlet queries",
                  at[shots, "Dirichlet", "rectified"], "points", note="mean of classes")
    lesson.record(f"{shots}-shot, recall of the large class, cosine",
                  recall[shots, "cosine"], "%",
                  note=f"BD-CSPN: {recall[shots, 'rectified']:.1f} %")
    lesson.record(f"{shots}-shot, queries to the shortest prototype, L2",
                  shortest[shots, "l2"], "%",
                  note=f"cosine: {shortest[shots, 'cosine']:.0f} %; 20 % would be fair")

# %%
lesson.record("intervals of 100 episodes that hold the mean", covered, "%")
for (shots, rule), (own, false) in on.items():
    lesson.record(f"energy per area, {RULES[rule]}, {shots}-shot", own,
                  note=f"wrong class: {false:.2f}; correlation "
                       f"{alike[shots, rule]:.2f}")
lesson.finish(fingerprint=fingerprint(root))

# %% [markdown]
# ## You can now
# - score thousands of episodes with one tensor operation, and say what a 95 % interval covers and what it does not;
# - explain why short prototypes attract queries, and why directions do not;
# - write BD-CSPN, mark it as transductive, and find the point where it turns;
# - ask of every map "of query and support" what it shows with a wrong support.
#
# **To go deeper** · The shift needs mean $Q$ of even classes. Which other estimate of it could the pseudo labels give,
# and when would that be worse? · Choose the penalty of the logistic regression on the validation classes. Is one value
# good for one shot and for five?
#
# **Where things are** · `course_lib.evaluate.episodes` (sampling, scores, intervals, Dirichlet queries, logistic
# regression); `course_lib.prototypes.shift` and `rectify`; `course_lib.metric_learning.rules.pair_maps`. ResNet-12 trained
# on base classes, then on episodes, on the real miniImageNet: `python -m course_lib train fewshot --data PATH --backbone
# resnet12 --folder runs/fewshot`, then `python -m course_lib evaluate fewshot --data PATH --backbone resnet12 --checkpoint
# runs/fewshot/model.safetensors`; with `--queries 15 2 2 2 2` the counter-example.
#
# {{next}}
