"""Maps of photographs of your own by a network of your own: of classes, or of what they resemble."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import tyro
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from course_lib import backbones, checkpoints, maps, paths
from course_lib.backbones.weights import LITE0
from course_lib.data.images import load
from course_lib.engine import this_process
from course_lib.metric_learning.explain import SHORT_NAMES, resemblance
from course_lib.metric_learning.rules import NAMES, RULES
from course_lib.settings import Count, Side, check_settings
from course_lib.show import plots

CLASSIFIER_RULES = tuple(name for name, (source, _) in RULES.items() if source == "classifier")
DRAWN_SIDE = 640  # pixels of the longer side in the picture


@dataclass(frozen=True)
class Explanation:
    """What is asked of which network."""

    photos: tyro.conf.Positional[tuple[Path, ...]]  # whose maps are drawn
    reference: tuple[Path, ...] = ()  # photographs that they are compared with; none: maps of classes
    model: str = LITE0  # of timm, with weights of ImageNet
    checkpoint: str = ""  # weights of your own, for the network that --architecture names
    architecture: str = ""  # of timm, for --checkpoint
    rule: Annotated[str, (*CLASSIFIER_RULES, *NAMES, *SHORT_NAMES, "")] = ""  # "": cam, or with references dist-cam
    name: Annotated[str, tyro.conf.arg(name="class")] = ""  # of a class; "": the likeliest ones
    top: Count = 3  # how many of these
    size: Side = 224  # shorter side of a photograph, as the network sees it
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("explained.png")  # the picture
    raw: bool = False  # write the maps as .npy beside it, too
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        check_settings(self)
        if bool(self.checkpoint) != bool(self.architecture):
            raise ValueError("Expected --checkpoint and --architecture together, got one of them; give both.")
        for name in (self.model, self.architecture or self.model):
            if not timm.is_model(name):
                raise ValueError(f"Expected one of timm's networks, got {name!r}; see timm.list_models().")
        if self.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg"):
            raise ValueError(f"Expected a picture as --output, such as out.png, got {str(self.output)!r}.")
        if not self.photos:
            raise ValueError("Expected a photograph, got none; name one or more.")
        if self.reference and (self.name or self.rule in CLASSIFIER_RULES):
            raise ValueError("Expected classes or references, got both; leave out one of them.")
        if self.rule and not self.reference and self.rule not in CLASSIFIER_RULES:
            raise ValueError(f"The rule {self.rule} compares photographs, got no reference; name one with --reference.")
        for path in (*self.photos, *self.reference):
            if not path.is_file():
                raise FileNotFoundError(f"A photograph was expected at {path}, got nothing; name one that is there.")


def explain_command(config: Explanation) -> None:
    """Draw maps of photographs: of their likeliest classes, or of how they resemble others, with controls.

    A map of a resemblance stands beside that with shuffled channels of the reference, that of another reference, and
    the sum of all channels. `depends` says how much of the map the reference makes: 0 none, 1 all.
    """
    device = this_process(config.device).device
    net, classes = explained_network(config)
    net = net.to(device)
    rows = [explained(config, net, classes, path) for path in config.photos]
    panels, titles = ([entry for row in rows for entry in row[part]] for part in ("panels", "titles"))
    columns = len(rows[0]["panels"]) // max(1, len(config.reference))
    names = ", ".join(path.name for path in config.photos)
    title = (f"{rows[0]['rule']}: what {names} resembles" if config.reference else f"{rows[0]['rule']}: {names}")[:90]
    figure = plots.grid(panels, titles, columns=columns, title=title)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=120)
    words = "; ".join(f"{path.name}: {', '.join(row['said'])}" for path, row in zip(config.photos, rows))
    paths.write_text(config.output.with_suffix(".txt"), f"Heatmaps over photographs, by {rows[0]['rule']}. {words}.\n")
    if config.raw:
        for path, row in zip(config.photos, rows):
            np.save(config.output.with_name(f"{config.output.stem}-{path.stem}.npy"), row["raw"].cpu().numpy())
    for path, row in zip(config.photos, rows):
        print(f"{path}: {', '.join(row['said'])}")
    print(f"Picture: {config.output}; its description: {config.output.with_suffix('.txt')}")


def explained_network(config: Explanation) -> tuple[backbones.Backbone, list[str]]:
    """The network, and the names of its classes: those of ImageNet, or numbers."""
    if not config.checkpoint:
        net = backbones.create(config.model)
    else:
        state, _ = checkpoints.read(config.checkpoint)
        rows = [len(tensor) for name, tensor in state.items() if name.endswith("classifier.weight")]
        net = backbones.create(config.architecture, config.checkpoint, rows[0] if rows else None)
    known = [name for _, name in backbones.imagenet_classes()]
    count = net.classifier.out_features
    return net, known if count == len(known) and not config.checkpoint else [
        f"class {number}" for number in range(count)
    ]


@torch.inference_mode()
def explained(config: Explanation, net: backbones.Backbone, classes: list[str], path: Path) -> dict:
    """Panels, titles and words of one photograph, and its raw maps."""
    photo, seen = drawn_and_seen(path, config, net)
    size = tuple(photo.shape[1:])
    if config.reference:
        rule = config.rule or "dist-cam"
        references = [drawn_and_seen(other, config, net)[1] for other in config.reference]
        found = resemblance(net, seen, references, rule)
        drawn = lambda raw: plots.overlay(photo, maps.heatmap(raw[None], size)[0].cpu())
        panels, titles, said = [], [], []
        for number, other in enumerate(config.reference):
            depends = f"{found.dependence[number]:.2f}"
            panels += [photo, drawn_and_seen(other, config, net)[0], drawn(found.raw[number]), drawn(found.uniform)]
            panels += [drawn(each[number]) for each in (found.shuffled, found.other) if each is not None]
            titles += [path.name, other.name, f"where it resembles\n{other.name}, depends {depends}"]
            titles += ["all channels\n(control)", "reference shuffled\n(control)"]
            titles += ["another reference\n(control)"] * (found.other is not None)
            said.append(f"{depends} of the map depends on {other.name}")
        return {"panels": panels, "titles": titles, "said": said, "raw": found.raw, "rule": SHORT_NAMES.get(rule, rule)}
    rule, features = config.rule or "cam", net.features(seen)
    logits = net.classifier(features.mean((2, 3)))[0]
    if config.name:
        chosen = [i for i, name in enumerate(classes) if config.name.lower() == name.lower()]
        if not chosen:
            near = [name for name in classes if config.name.lower() in name.lower()][:5]
            raise ValueError(
                f"The network knows no class {config.name!r}{'; near are: ' + ', '.join(near) if near else ''}; name "
                "one of its classes."
            )
    else:
        chosen = logits.topk(min(config.top, len(classes))).indices.tolist()
    weight = {"cam": lambda w: w, "cam-positive": maps.positive_weights, "cam-centred": maps.centred_weights}[rule](
        net.classifier.weight
    )
    raw = maps.cam(features, weight[chosen])[0]
    heat, shares = maps.heatmap(raw, size).cpu(), logits.softmax(0)
    names = [f"{classes[c]}, {shares[c]:.0%}" for c in chosen]
    panels = [photo, *(plots.overlay(photo, each) for each in heat)]
    return {"panels": panels, "titles": [path.name, *names], "said": names, "raw": raw, "rule": rule}


def drawn_and_seen(
    path: Path, config: Explanation, net: backbones.Backbone
) -> tuple[UInt8[Tensor, "3 h w"], Float[Tensor, "1 3 H W"]]:
    """A photograph, upright, as it is drawn, and as the network sees it: its proportions are kept."""
    image = load(path, upright=True)
    scaled = lambda factor: [max(1, round(side * factor)) for side in image.shape[1:]]
    drawn = transforms.resize(image, scaled(min(1.0, DRAWN_SIDE / max(image.shape[1:]))), InterpolationMode.BICUBIC)
    seen = transforms.resize(image, scaled(config.size / min(image.shape[1:])), InterpolationMode.BICUBIC)
    return drawn, net.normalise(seen.to(net.mean.device))[None]
