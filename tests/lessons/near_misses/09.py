"""Wrong answers that students give in lesson 09, and a fragment of the message that each of them must get."""

STEP = """
def mean_field_step(belief, unary, kernels, weights):
    sums = kernels.sum(2)
    total = 0
    for weight, kernel, row in zip({weights}, kernels, sums):
        total = total + {sign} weight * ({last} * (({said} * {first}) @ {kernel}))
    return ({unary} total){end}
"""
STEPPED = {
    "weights": "weights",
    "sign": "+",
    "last": "row.rsqrt()",
    "first": "row.rsqrt()",
    "said": "belief",
    "kernel": "kernel.T",
    "unary": "-unary +",
    "end": ".softmax(0)",
}

MATRIX = """
def transition(features, radius, beta):
    k, h, w = features.shape
    places = [(y, x) for y in range(h) for x in range(w)]
    W = torch.zeros(h * w, h * w)
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            if {near}:
                gap = features[:, y, x] - features[:, v, u]
                W[i, j] = torch.exp(-{gap}){power}
    {then}
    return {result}
"""
MADE = {
    "near": "(y - v) ** 2 + (x - u) ** 2 < radius ** 2",
    "gap": "gap.abs().mean()",
    "power": " ** beta",
    "then": "",
    "result": "W / W.sum(1)[:, None]",
}

WALK = """
def walk_pages(maps, P, powers):
    x, pages, done = maps.flatten(1), [], 0
    for steps in {powers}:
        {page}
        done = {done}
    return {result}
"""
WALKED = {
    "powers": "powers",
    "page": "pages += [(x @ torch.linalg.matrix_power(P, steps).T).view(maps.shape)]",
    "done": "steps",
    "result": "torch.stack(pages)",
}

POINTS = """
def turning_points(walk, seed, truth, background, powers):
    found = walk(seed[None], powers)[:, 0] {above} background
    iou = [float((f & truth).sum() / (f | truth).sum()) for f in found]
    best = {best}
    better = [place for place, value in enumerate(iou) if value {over} iou[0]]
    last = {last}
    return {result}
"""
POINTED = {
    "above": ">",
    "best": "iou.index(max(iou))",
    "over": ">",
    "last": "better[-1] if better else 0",
    "result": "powers[best], powers[last]",
}
CONCLUSION = """
def conclusion():
    return {{"edge 2": {}, "edge 4": {}, "edge 6": {},
            "a million steps, background 0.25": "{}", "a million steps, background 0.1": "{}"}}
"""
SAID = [(128, 128), (128, 512), (128, 4096), "nothing", "everything"]


def concluded(place, answer):
    return CONCLUSION.format(*SAID[:place], answer, *SAID[place + 1 :])


NEAR_MISSES = {
    "09.1": [
        ("not normalised", STEP.format(**STEPPED | {"last": "1", "first": "1"}), "no n is there"),
        ("the speaker's factor is missing", STEP.format(**STEPPED | {"first": "1"}), "n_j is missing"),
        ("the listener's factor is missing", STEP.format(**STEPPED | {"last": "1"}), "n_i is missing"),
        ("rows", STEP.format(**STEPPED | {"last": "1 / row", "first": "1"}), "You divided by a row's sum"),
        ("sums twice", STEP.format(**STEPPED | {"last": "1 / row", "first": "1 / row"}), "divided by the sum twice"),
        ("from the start", STEP.format(**STEPPED | {"said": "(-unary).softmax(0)"}), "Messages carry the belief"),
        ("no unary", STEP.format(**STEPPED | {"unary": ""}), "The unary is missing"),
        ("sign of the unary", STEP.format(**STEPPED | {"unary": "unary +"}), "The unary has the wrong sign"),
        ("sign of the messages", STEP.format(**STEPPED | {"sign": "-"}), "The messages have the wrong sign"),
        ("no weights", STEP.format(**STEPPED | {"weights": "(1, 1)"}), "weights of the kernels are not used"),
        (
            "mean over the kernels",
            STEP.format(**STEPPED | {"unary": "-unary + 0.5 *"}),
            "You averaged over the kernels",
        ),
        (
            "no message to itself",
            STEP.format(**STEPPED | {"kernel": "(kernel - kernel.diagonal().diag()).T"}),
            "message to itself stays in",
        ),
        ("softmax over the pixels", STEP.format(**STEPPED | {"end": ".softmax(1)"}), "not the pixels"),
        ("no softmax", STEP.format(**STEPPED | {"end": ""}), "This is the energy"),
    ],
    "09.2": [
        ("columns", MATRIX.format(**MADE | {"result": "W / W.sum(0)"}), "Your columns sum to 1"),
        ("not divided", MATRIX.format(**MADE | {"result": "W"}), "The rows do not sum to 1"),
        ("no power", MATRIX.format(**MADE | {"power": ""}), "The power is missing"),
        (
            "power of the rows",
            MATRIX.format(**MADE | {"power": "", "result": "(W / W.sum(1)[:, None]) ** beta"}),
            "The power came after",
        ),
        ("all pixels", MATRIX.format(**MADE | {"near": "True"}), "All pixels are near"),
        (
            "radius included",
            MATRIX.format(**MADE | {"near": "(y - v) ** 2 + (x - u) ** 2 <= radius ** 2"}),
            "exactly the radius",
        ),
        ("square", MATRIX.format(**MADE | {"near": "max(abs(y - v), abs(x - u)) < radius"}), "is a square"),
        ("not itself", MATRIX.format(**MADE | {"then": "W = W - torch.eye(h * w)"}), "yours has 0"),
        ("sum over the channels", MATRIX.format(**MADE | {"gap": "gap.abs().sum()"}), "summed over the channels"),
        ("squares", MATRIX.format(**MADE | {"gap": "gap.square().mean()"}), "You squared the differences"),
        ("mean first", MATRIX.format(**MADE | {"gap": "gap.mean().abs()"}), "before the mean over the channels"),
        (
            "both sides",
            MATRIX.format(**MADE | {"then": "n = W.sum(1).rsqrt()", "result": "n[:, None] * W * n"}),
            "symmetric normalisation of a CRF",
        ),
        (
            "column by column",
            MATRIX.format(**MADE | {"then": "features = features"}).replace(
                "    W = torch.zeros", "    features = features.mT.reshape(k, h, w)\n    W = torch.zeros"
            ),
            "pixels go row by row",
        ),
    ],
    "09.3": [
        (
            "the other side",
            WALK.format(**WALKED | {"page": "pages += [(x @ torch.linalg.matrix_power(P, steps)).view(maps.shape)]"}),
            "from the other side",
        ),
        (
            "power of the entries",
            WALK.format(**WALKED | {"page": "pages += [(x @ (P ** steps).T).view(maps.shape)]"}),
            "the power of each entry",
        ),
        (
            "all steps from the page before",
            WALK.format(
                **WALKED
                | {
                    "page": "x = x @ torch.linalg.matrix_power(P, steps).T\n        pages += [x.view(maps.shape)]",
                }
            ),
            "go the difference",
        ),
        (
            "one step a page",
            WALK.format(
                **WALKED | {"page": "pages += [x.view(maps.shape)]\n        x = x @ P.T", "done": "done + 1"}
            ).replace("    return", "    pages = pages[:1] + pages[1:]\n    return"),
            "Each page is one step after",
        ),
        (
            "one step too far",
            WALK.format(
                **WALKED | {"page": "pages += [(x @ torch.linalg.matrix_power(P, steps + 1).T).view(maps.shape)]"}
            ),
            "one step too far",
        ),
        (
            "squared t times",
            WALK.format(
                **WALKED | {"page": "pages += [(x @ torch.linalg.matrix_power(P, 2**steps).T).view(maps.shape)]"}
            ),
            "which is 2^t steps",
        ),
        (
            "the last page everywhere",
            WALK.format(**WALKED | {"result": "torch.stack([pages[-1] for _ in powers])"}),
            "Every page shows the last one",
        ),
        ("reversed", WALK.format(**WALKED | {"powers": "powers[::-1]"}), "in the wrong order"),
        (
            "pixels mixed",
            WALK.format(
                **WALKED | {"page": "pages += [(torch.linalg.matrix_power(P, steps) @ x.T).reshape(maps.shape)]"}
            ),
            "Pixels and classes were mixed",
        ),
        ("flat", WALK.format(**WALKED | {"result": "torch.stack(pages).flatten(2)"}), "walk_pages(...) has the shape"),
    ],
    "09.4": [
        (
            "last of the highest",
            POINTS.format(**POINTED | {"best": "max(range(len(iou)), key=lambda i: (iou[i], i))"}),
            "the last of the highest",
        ),
        (
            "last highest",
            POINTS.format(**POINTED | {"last": "max(range(len(iou)), key=lambda i: (iou[i], i))"}),
            "the last highest",
        ),
        ("places", POINTS.format(**POINTED | {"result": "best, last"}), "These are places in the list"),
        ("first help", POINTS.format(**POINTED | {"last": "better[0] if better else 0"}), "the first step that helps"),
        ("equal to it", POINTS.format(**POINTED | {"over": ">="}), "not equal to it"),
        (
            "exchanged",
            POINTS.format(**POINTED | {"result": "powers[last], powers[best]"}),
            "The two numbers are exchanged",
        ),
        (
            "no step helps",
            POINTS.format(**POINTED | {"last": "better[-1] if better else -1"}),
            "A walk that changes nothing",
        ),
        ("the edge of 2", concluded(0, (128, 512)), "edge 2: the experiment"),
        ("the edge of 4", concluded(1, (64, 512)), "edge 4: the experiment"),
        ("the edge of 6", concluded(2, (128, 8192)), "edge 6: the experiment"),
        ("the object stays", concluded(3, "the object"), "Background 0.25: in the end"),
        ("nothing stays", concluded(4, "nothing"), "Background 0.1: in the end"),
    ],
}
