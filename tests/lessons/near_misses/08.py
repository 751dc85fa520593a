"""Wrong answers that students give in lesson 08, and a fragment of the message that each of them must get."""

PROTOTYPES = """
def prototypes_of(confidence, embeddings, top_k):
    confidence = confidence.detach().transpose(0, 1).flatten(1)
    pixels = embeddings.detach().transpose(0, 1).flatten(1)
    weight, where = confidence.topk(top_k, 1)
    return {}
"""
CONTRAST = """
def pixel_contrast(pixels, labels, prototypes, temperature=0.1):
    cosine = F.normalize(pixels, dim=1) @ prototypes.T
    return {}
"""
CROSS = """
def cross_terms(v, y, P, loss):
    return {{"cross-prototype": torch.stack([{} for i in (0, 1)]),
            "cross-CAM": torch.stack([{} for i in (0, 1)])}}
"""
CP, CC = "loss(v[i], y[i], P[1 - i]).mean()", "loss(v[i], y[1 - i], P[i]).mean()"
MINE = """
def mine(cosine, labels, noise):
    n = cosine.shape[1] - 1
    stop = -(-6 * n // 10)
    start = stop - n // 2
    others = cosine.scatter(1, labels[:, None], -torch.inf)
    rank = lambda x: x.argsort(1, descending=True).argsort(1)
    alike = labels[:, None] == labels
    half = alike.sum(1) // 2
    own = cosine.gather(1, labels[:, None])[:, 0]
    place = lambda key: (alike & (key < key[:, None])).sum(1)
    negatives = (rank(others) >= start) & (rank(others) < stop)
    times = (place(noise) < half).int() + (place(own) < half).int()
    {}
    return negatives, times
"""

REACH = """
def reach(terms, parts):
    table = {{}}
    for term, loss in terms.items():
        for part, module in parts.items():
            weights = [*module.parameters()]
            slopes = torch.autograd.grad(loss, weights, retain_graph={keep}, allow_unused={unused})
            {store} = {length}
    return table
"""
REACHED = {
    "keep": "True",
    "unused": "True",
    "store": "table[term, part]",
    "length": "sum(s.square().sum().item() for s in slopes if s is not None) ** 0.5",
}
ENDS = """
def conclusion():
    return {{"trunk": {}, "classifier": {}, "PCM": {}, "projector": {}}}
"""

NEAR_MISSES = {
    "08.1": [
        (
            "not of length 1",
            PROTOTYPES.format("(weight * pixels[:, where]).sum(2).T / weight.sum(1, keepdim=True)"),
            "normalise after averaging",
        ),
        ("plain sums", PROTOTYPES.format("(weight * pixels[:, where]).sum(2).T"), "normalise the sums"),
        ("unweighted", PROTOTYPES.format("F.normalize(pixels[:, where].mean(2), dim=0).T"), "without weights"),
        (
            "K of every image",
            """
def prototypes_of(confidence, embeddings, top_k):
    weight, where = confidence.detach().flatten(2).topk(top_k, 2)
    pixels = embeddings.detach().flatten(2)
    chosen = torch.stack([v[:, w] for v, w in zip(pixels, where)])
    return F.normalize((weight[:, None] * chosen).sum((0, 3)), dim=0).T
""",
            "of every image",
        ),
        ("all pixels", PROTOTYPES.format("F.normalize(confidence @ pixels.T, dim=1)"), "All pixels count"),
        (
            "least confident",
            PROTOTYPES.replace("topk(top_k, 1)", "topk(top_k, 1, largest=False)").format(
                "F.normalize((weight * pixels[:, where]).sum(2), dim=0).T"
            ),
            "least confident",
        ),
        (
            "reshape",
            """
def prototypes_of(confidence, embeddings, top_k):
    c, d = confidence.shape[1], embeddings.shape[1]
    confidence, pixels = confidence.detach().reshape(c, -1), embeddings.detach().reshape(d, -1)
    rows = []
    for one in confidence:
        weight, where = one.topk(top_k)
        rows.append(F.normalize((weight * pixels[:, where]).sum(1), dim=0))
    return torch.stack(rows)
""",
            "reshape moves no axis",
        ),
        (
            "channels first",
            PROTOTYPES.format("F.normalize((weight * pixels[:, where]).sum(2), dim=0)"),
            "Classes belong along",
        ),
        (
            "with gradient",
            PROTOTYPES.replace("embeddings.detach()", "embeddings").format(
                "F.normalize((weight * pixels[:, where]).sum(2), dim=0).T"
            ),
            "A gradient passes",
        ),
        (
            "divided by nothing",
            PROTOTYPES.format("F.normalize((weight * pixels[:, where]).sum(2).T / weight.sum(1, keepdim=True), dim=1)"),
            "without candidates is NaN",
        ),
    ],
    "08.2": [
        ("mean", CONTRAST.format("F.cross_entropy(cosine / temperature, labels)"), "returned the mean"),
        ("no minus", CONTRAST.format("-F.cross_entropy(cosine / temperature, labels, reduction='none')"), "minus sign"),
        (
            "probability",
            CONTRAST.format("(cosine / temperature).softmax(1).gather(1, labels[:, None])[:, 0]"),
            "returned the probability",
        ),
        ("no temperature", CONTRAST.format("F.cross_entropy(cosine, labels, reduction='none')"), "not used"),
        (
            "one temperature for all",
            CONTRAST.format("F.cross_entropy(cosine / 0.1, labels, reduction='none')"),
            "always 0.1",
        ),
        (
            "times the temperature",
            CONTRAST.format("F.cross_entropy(cosine * temperature, labels, reduction='none')"),
            "You multiplied",
        ),
        (
            "any length",
            """
def pixel_contrast(pixels, labels, prototypes, temperature=0.1):
    return F.cross_entropy(pixels @ prototypes.T / temperature, labels, reduction="none")
""",
            "not scaled to length 1",
        ),
        (
            "negatives only below",
            """
def pixel_contrast(pixels, labels, prototypes, temperature=0.1):
    logits = F.normalize(pixels, dim=1) @ prototypes.T / temperature
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - own
""",
            "missing in the denominator",
        ),
        (
            "exp by hand",
            """
def pixel_contrast(pixels, labels, prototypes, temperature=0.1):
    power = (F.normalize(pixels, dim=1) @ prototypes.T / temperature).exp()
    return -(power.gather(1, labels[:, None])[:, 0] / power.sum(1)).log()
""",
            "exp overflows",
        ),
    ],
    "08.3": [
        ("exchanged", CROSS.format(CC, CP), "is the other cross term"),
        ("nothing borrowed", CROSS.format("loss(v[i], y[i], P[i]).mean()", CC), "borrows nothing"),
        ("both borrowed", CROSS.format(CP, "loss(v[i], y[1 - i], P[1 - i]).mean()"), "borrows both"),
        ("views exchanged", CROSS.format("loss(v[1 - i], y[1 - i], P[i]).mean()", CC), "belongs to the second view"),
        (
            "pixels of the other view",
            CROSS.format("loss(v[1 - i], y[i], P[1 - i]).mean()", CC),
            "takes pixels of the other view",
        ),
        ("pixels alone", CROSS.format("loss(v[1 - i], y[i], P[i]).mean()", CC), "borrows the pixels alone"),
        (
            "mean over views",
            """
def cross_terms(v, y, P, loss):
    return {"cross-prototype": (loss(v[0], y[0], P[1]).mean() + loss(v[1], y[1], P[0]).mean()) / 2,
            "cross-CAM": (loss(v[0], y[1], P[0]).mean() + loss(v[1], y[0], P[1]).mean()) / 2}
""",
            "averaged the views",
        ),
        ("sum over pixels", CROSS.format("loss(v[i], y[i], P[1 - i]).sum()", CC), "added the pixels up"),
        (
            "sum over views",
            CROSS.replace("for i in (0, 1)]),\n", "for i in (0, 1)]).sum(),\n").format(CP, CC),
            "added the views up",
        ),
        (
            "a tuple",
            """
def cross_terms(v, y, P, loss):
    return loss(v[0], y[0], P[1]).mean(), loss(v[0], y[1], P[0]).mean()
""",
            "Return a dict",
        ),
    ],
    "08.4": [
        (
            "positive among the candidates",
            MINE.format("negatives = (rank(cosine) >= start) & (rank(cosine) < stop)"),
            "own prototype is among",
        ),
        ("hardest half", MINE.format("negatives = rank(others) < n // 2"), "hardest negatives are in"),
        ("top 60 %", MINE.format("negatives = rank(others) < stop"), "all are kept"),
        (
            "least similar first",
            MINE.format(
                "order = rank((-cosine).scatter(1, labels[:, None], -torch.inf)); "
                "negatives = (order >= start) & (order < stop)"
            ),
            "least similar first",
        ),
        (
            "a tenth",
            MINE.format("negatives = (rank(others) >= int(0.1 * n)) & (rank(others) < stop)"),
            "Your first rank is 0.1 n",
        ),
        (
            "rounded down",
            MINE.replace("-(-6 * n // 10)", "int(0.6 * n)").format(""),
            "Your stop is rounded down",
        ),
        (
            "loud half",
            MINE.format("times = (place(-noise) < half).int() + (place(own) < half).int()"),
            "not the highest",
        ),
        (
            "halves rounded up",
            """
def mine(cosine, labels, noise):
    m, c = cosine.shape
    n = c - 1
    stop = math.ceil(0.6 * n)
    negatives, times = torch.zeros(m, c, dtype=torch.bool), torch.zeros(m)
    for i in range(m):
        order = [j for j in cosine[i].argsort(descending=True).tolist() if j != labels[i]]
        negatives[i, order[stop - n // 2 : stop]] = True
    own = cosine[torch.arange(m), labels]
    for label in labels.unique():
        pixels = (labels == label).nonzero()[:, 0]
        half = math.ceil(len(pixels) / 2)
        times[pixels[noise[pixels].argsort()[:half]]] += 1
        times[pixels[own[pixels].argsort()[:half]]] += 1
    return negatives, times
""".replace("def mine", "import math\n\ndef mine"),
            "Half of 13 is 6",
        ),
        (
            "easy pixels",
            MINE.format("times = (place(noise) < half).int() + (place(-own) < half).int()"),
            "most similar ones",
        ),
        (
            "halves of the batch",
            MINE.format(
                "every = lambda key: key.argsort().argsort() < len(key) // 2; "
                "times = every(noise).int() + every(own).int()"
            ),
            "of the whole batch",
        ),
        ("joined", MINE.format("times = ((place(noise) < half) | (place(own) < half)).int()"), "counts twice"),
        ("hard half only", MINE.format("times = (place(own) < half).int()"), "random half is missing"),
        ("random half only", MINE.format("times = (place(noise) < half).int()"), "hard half is missing"),
    ],
    "08.5": [
        (
            "squares",
            REACH.format(**REACHED | {"length": "sum(s.square().sum().item() for s in slopes if s is not None)"}),
            "take the root of their sum",
        ),
        (
            "nested",
            REACH.format(**REACHED | {"store": "table.setdefault(term, {})[part]"}),
            "a key (term, part) for each pair",
        ),
        (
            "zeros left out",
            REACH.format(
                **REACHED | {"store": "table[term, part] if any(s is not None for s in slopes) else {}"}
            ).replace(
                "table[term, part] if any(s is not None for s in slopes) else {} =",
                "(table if any(s is not None for s in slopes) else {})[term, part] =",
            ),
            "a key (term, part) for each pair",
        ),
        ("graph freed", REACH.format(**REACHED | {"keep": "False"}), "second time"),
        ("unused refused", REACH.format(**REACHED | {"unused": "False"}), "not have been used"),
        (
            "lengths added",
            REACH.format(**REACHED | {"length": "float(sum(s.norm() for s in slopes if s is not None))"}),
            "reach(...)",
        ),
        (
            "contrast moves all",
            ENDS.format(*['{"tags", "equivariance", "contrast"}'] * 2, "PCM_TERMS", '{"contrast"}').replace(
                "PCM_TERMS", '{"min-pool", "cross-equivariance"}'
            ),
            "classifier: the experiment",
        ),
        (
            "everything moves the trunk",
            ENDS.format(
                '{"tags", "min-pool", "equivariance", "cross-equivariance", "contrast"}',
                '{"tags", "equivariance"}',
                '{"min-pool", "cross-equivariance"}',
                '{"contrast"}',
            ),
            "trunk: the experiment",
        ),
        (
            "tags move PCM",
            ENDS.format(
                '{"tags", "equivariance", "contrast"}',
                '{"tags", "equivariance"}',
                '{"tags", "min-pool", "cross-equivariance"}',
                '{"contrast"}',
            ),
            "PCM: the experiment",
        ),
        (
            "ECR moves the projector",
            ENDS.format(
                '{"tags", "equivariance", "contrast"}',
                '{"tags", "equivariance"}',
                '{"min-pool", "cross-equivariance"}',
                '{"contrast", "cross-equivariance"}',
            ),
            "projector: the experiment",
        ),
    ],
}
