"""What becomes of the parts of chimeras: figures of heads and bodies, of seeds and of pseudo labels.

part_figures(net, Voc(folder, "val"), config, threshold)["body"]      pixels of bodies with the right seed, in percent
"""

from collections import Counter

import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader

from course_lib.data.voc import IGNORE, Voc
from course_lib.worlds import chimeras
from course_lib.wsss import seeds
from course_lib.wsss.cam_net import CamNet
from course_lib.wsss.contrast import pseudo_labels, true_labels
from course_lib.wsss.recipes import TagTraining
from course_lib.wsss.views import resize


@torch.inference_mode()
def part_figures(net: CamNet, data: Voc, config: TagTraining, threshold: float) -> dict[str, float]:
    """What becomes of the parts of chimeras, of whole batches of a split, in percent to three digits.

        head, body                      pixels of a part that the seeds give to its class
        mixed head, body, neither       pixels of objects beside a class with the same head, the same body, or neither,
                                        that the seeds give to that class
        label head, label body          cells of the small grid, mostly of a part, whose pseudo label is right
        prototypes                      of the cells that prototypes of classes are made of, those of the class
        tags                            average precision of the tags, mean over classes

    Args:
        threshold: of the seeds.
    """
    right, counted = Counter(), Counter()
    device = next((weight.device for weight in net.parameters()), torch.device("cpu"))

    def count(name: str, of: torch.Tensor, hit: torch.Tensor) -> None:
        counted[name] += int(of.sum())
        right[name] += int((of & hit).sum())

    logits, each = [], config.batch_size
    loader = DataLoader(seeds.Scored(data), each, drop_last=True)
    for indices, images, tags, masks, _ in loader:
        parts = torch.stack([chimeras.part_mask(data, int(i)) for i in indices])
        images, wanted = images.to(device), tags.to(device)
        found = seeds.hard_seeds(next(iter(seeds.score_maps(net, images, wanted).values())), threshold).cpu()
        labels, there = masks.long() - 1, (masks > 0) & (masks != IGNORE)
        several = there & (tags.sum(1) == 2)[:, None, None]
        sums = (tags * torch.arange(tags.shape[1])).sum(1).long()  # of two tags
        others = sums[:, None, None] - labels  # the other class of the image, where it has two
        for kind, same in chimeras.shared_part(labels, others).items():
            count(f"mixed {kind}", several & same, found == others + 1)
        for part, number in chimeras.CHIMERA_PARTS.items():
            count(part, there & (parts == number), found == labels + 1)

        view = net(net.prepare(images))
        logits.append(view.cam.mean((2, 3))[:, 1:].cpu())
        size = (-(-config.small // net.trunk.stride),) * 2
        cells, confidence = pseudo_labels(resize(view.refined, size).cpu(), tags, config.contrast)
        truth, known = true_labels(masks, len(data.classes), size)
        mostly, _ = true_labels(parts, 1 + len(chimeras.CHIMERA_PARTS), size)
        for part, number in chimeras.CHIMERA_PARTS.items():
            count(f"label {part}", known & (truth > 0) & (mostly == number), cells == truth)
        confidence = confidence.movedim(1, 0)[1:].flatten(1)  # c m
        best = confidence.topk(config.contrast.top_k, 1)
        classes = torch.arange(1, len(data.classes))[:, None]
        taken = (best.values > -torch.inf) & known.flatten()[best.indices]
        count("prototypes", taken, truth.flatten()[best.indices] == classes)
    tagged = data.tags[: each * len(loader)]
    share = {name: right[name] / of for name, of in counted.items() if of}
    share["tags"] = float(average_precision_score(tagged[:, tagged.any(0)], torch.cat(logits)[:, tagged.any(0)]))
    return {name: round(100 * value, 3) for name, value in share.items()}
