"""Networks of CAM, SEAM, EPS and of pixel-to-prototype contrast (P2P) on both: a trunk and a few 1 x 1 convolutions.

    net = build(Architecture("seam+p2p", classes), "ilsvrc-cls_rna-a1_cls1000_ep-0001.params")    # as published
    view = net(net.prepare(photographs))                            # a `View`: maps, refined maps, embeddings

    head         from        to        published name
    classifier   conv6       C + 1     fc8        maps; in "cam" C, without a background
    similar4     conv4       64        f8_3       what pixel correlation (PCM) compares: shallow, detached, ReLU,
    similar5     conv5       128       f8_4       ... deeper, detached, ReLU,
    similar      3+64+128    192       f9         ... and projected, with the colours of the image on the same grid
    projector    conv6       128       fc_proj    embeddings of P2P, ReLU
                        Wang et al., CVPR 2020 (SEAM); Lee et al., CVPR 2021 (EPS); Du et al., CVPR 2022 (P2P)

Classifier and projector see the same deep features, with the same channels dropped. PCM sends no gradient into the
trunk: its taps are detached, and so are the maps that it spreads. (The copy of SEAM's network that is released with
P2P's code, and not used there, has maps without gradient too; the wiring here is that of SEAM.) Heads have no bias.
Background is channel 0; where a released network has it last, it is moved on loading.

Any trunk of `backbones.dense` fits. Two small settings are for a CPU: tf_efficientnet_lite0 with everything frozen in
front of its last block, where `prepare` is done once for a whole data set; and `Small`, trained from random weights.
"""

from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from course_lib import checkpoints
from course_lib.backbones import released, resnet38
from course_lib.backbones.dense import TAPS, Dense, Maps, Timm
from course_lib.cache import cached
from course_lib.data.voc import CLASSES
from course_lib.settings import check_settings
from course_lib.wsss import View
from course_lib.wsss.methods import TAG_METHODS
from course_lib.wsss.seam import pixel_correlation, winning_maps
from course_lib.wsss.views import Warp, resize

# Our names of the heads by the published ones.
HEAD_NAMES = {"fc8": "classifier", "f8_3": "similar4", "f8_4": "similar5", "f9": "similar", "fc_proj": "projector"}


@dataclass(frozen=True)
class Architecture:
    """What a network is built from; it is kept in checkpoints."""

    method: Annotated[str, tuple(TAG_METHODS)]  # one of TAG_METHODS
    classes: tuple[str, ...] = CLASSES  # names, background first
    backbone: str = "resnet38"  # "resnet38", "small", or any of timm's that `dense.Timm` can take apart
    neck: int = 0  # channels of a new 1 x 1 convolution with ReLU between trunk and heads; 0: none
    dropout: float = 0.5  # of channels in front of classifier and projector; EPS has none
    projector: int = 128  # channels of embeddings
    width: int = 64  # of a ResNet38's first convolution; less makes a network for trials
    taps: tuple[str, str, str] | None = None  # of timm's; None: chosen there
    frozen: str = ""  # of timm's, the last part that is not trained
    output_stride: int = 16  # of timm's
    scored_at: int | None = None  # longer side that images are brought to when seeds are made; None: as they are

    def __post_init__(self) -> None:
        check_settings(self)


class Small(Dense):
    """Five convolutions from random weights, stride 8, for creatures.

    They are normalised by the statistics of their own batches. The last three lie on one grid and are the taps. Nothing
    is frozen.
    """

    channels, stride, still = dict.fromkeys(TAPS, 128), 8, ()

    def __init__(self) -> None:
        super().__init__({"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)})
        shapes = (3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 128, 1)  # channels before, after, stride
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
            )
            for before, after, stride in shapes
        )

    def frozen(self, images: Float[Tensor, "b 3 H W"]) -> Maps:
        """The images."""
        return {"trunk": images}

    def trained(self, features: Maps) -> Maps:
        """See Dense."""
        x, outputs = features["trunk"], []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return dict(zip(TAPS, outputs[-3:]))


class CamNet(nn.Module):
    """A trunk with the heads of a method; see `build`."""

    def __init__(self, trunk: Dense, architecture: Architecture) -> None:
        super().__init__()
        self.trunk, self.architecture, self.method = trunk, architecture, TAG_METHODS[architecture.method]
        deep = architecture.neck or trunk.channels["conv6"]
        self.neck = _head(trunk.channels["conv6"], deep) if architecture.neck else None
        self.classifier = _head(deep, len(architecture.classes) - (not self.method.background))
        if self.method.correlated:
            self.similar4, self.similar5 = _head(trunk.channels["conv4"], 64), _head(trunk.channels["conv5"], 128)
            self.similar = _head(3 + 64 + 128, 192)
            nn.init.kaiming_normal_(self.similar4.weight)
            nn.init.kaiming_normal_(self.similar5.weight)
            nn.init.xavier_uniform_(self.similar.weight, gain=4)
        if self.method.contrast:
            self.projector = _head(deep, architecture.projector)

    def prepare(
        self,
        images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"],
        inside: Bool[Tensor, "b H W"] | None = None,
        size: int | None = None,
        warp: Warp | None = None,
    ) -> Maps:
        """What depends on the image alone: maps that the frozen parts return, and colours on the final grid.

        Args:
            images: RGB, uint8 in 0..255 or float in 0..1.
            inside: False where an image was padded: there it becomes the mean colour.
            size: side to which images are brought after normalisation, bilinear, corner on corner: of a smaller view.
            warp: what else is done to a smaller view; what it brings in from outside gets the mean colour.
        """
        return prepared_maps(self.trunk, images, inside, size, warp)

    def forward(self, prepared: Maps) -> View:
        """Maps and embeddings on the grid of the features, from what `prepare` returned."""
        taps = self.trunk.trained(prepared)
        deep = taps["conv6"] if self.neck is None else self.neck(taps["conv6"]).relu()
        deep = F.dropout2d(deep, self.architecture.dropout, self.training)
        cam = refined = self.classifier(deep)
        if not self.method.background:  # nothing speaks for it
            cam = refined = F.pad(cam, (0, 0, 0, 0, 1, 0))
        if self.method.correlated:
            shallow, deeper = self.similar4(taps["conv4"].detach()).relu(), self.similar5(taps["conv5"].detach()).relu()
            features = self.similar(torch.cat((prepared["colours"], shallow, deeper), 1))
            refined = pixel_correlation(winning_maps(cam), features)
        return View(cam, refined, self.projector(deep).relu() if self.method.contrast else None)

    def heads(self) -> dict[str, nn.Conv2d]:
        """The heads by published name, without the neck."""
        return {name: getattr(self, ours) for name, ours in HEAD_NAMES.items() if hasattr(self, ours)}

    def new_layers(self) -> list[nn.Module]:
        """What starts from random weights beside a trained trunk: heads and neck."""
        return [layer for layer in self.children() if layer is not self.trunk]


def prepared_maps(
    trunk: Dense,
    images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"],
    inside: Bool[Tensor, "b H W"] | None = None,
    size: int | None = None,
    warp: Warp | None = None,
) -> Maps:
    """See `CamNet.prepare`, which asks for no more of a network than its trunk."""
    images = trunk.normalise(images)
    if inside is not None:
        images = images * inside[:, None]
    if size is not None:
        images = (warp or resize)(images, size)
    grid = tuple(ceil(side / trunk.stride) for side in images.shape[2:])
    return {**trunk.frozen(images), "colours": resize(images, grid)}


def kept_maps(
    trunk: Dense, images: UInt8[Tensor, "n 3 H W"], size: int | None = None, progress: bool = True
) -> dict[str, Float[Tensor, "n _ _ _"]]:
    """What `prepared_maps` makes of many images, on the CPU; the same for every training that starts from this trunk.

    Where a part of the trunk is frozen, it is kept for the next time (see `cached`): it costs as much as an epoch.

    Args:
        size: of the smaller view; None: the images as they are.
    """

    def make():
        parts = tqdm(images.split(8), "features", disable=not progress)
        maps = [prepared_maps(trunk, part.to(trunk.mean.device), size=size) for part in parts]
        return {name: torch.cat([each[name].cpu() for each in maps]) for name in maps[0]}

    return cached("frozen features", make, data="", settings=[trunk, images, size]) if trunk.still else make()


def build(architecture: Architecture, weights: str | Path = "random") -> CamNet:
    """A network in evaluation mode; heads start from torch's generator. `weights` and errors are those of its trunk."""
    return CamNet(trunk_of(architecture, weights), architecture).eval()


def trunk_of(architecture: Architecture, weights: str | Path = "random") -> Dense:
    """The trunk of a network.

    Args:
        weights: "random"; "pretrained" (ImageNet, of timm's networks); or for ResNet38 the path of the released
            ImageNet weights (.params) or of a released checkpoint, of which the trunk is taken.
    Raises:
        ValueError: weights that this trunk cannot start from, or as `dense.Timm`.
    """
    name, weights = architecture.backbone, str(weights)
    if name == "resnet38" and weights != "pretrained":
        return resnet38.create(weights, architecture.width)
    if name == "small" and weights == "random":
        return Small()
    if name not in ("resnet38", "small") and weights in ("random", "pretrained"):
        return Timm(name, weights == "pretrained", architecture.taps, architecture.frozen, architecture.output_stride)
    wanted = {
        "small": '"random" weights',
        "resnet38": '"random" weights or the path of ilsvrc-cls_rna-a1_cls1000_ep-0001.params (of ImageNet)',
    }.get(name, '"pretrained" or "random" weights')
    raise ValueError(f"Expected {wanted} for the trunk {name}, got {weights!r}; give such.")


def save(net: CamNet, path: Path) -> None:
    """Write tensors and architecture as one safetensors file, for `load`."""
    checkpoints.write(path, net, {"architecture": asdict(net.architecture)})


def load(path: str | Path) -> CamNet:
    """A trained network in evaluation mode: a file of `save`, or a released checkpoint of CAM, SEAM, EPS or P2P on VOC.

    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or it is neither.
    """
    state, about = checkpoints.read(path)
    if "architecture" in about:
        known = about["architecture"].items()
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known}
        net = build(Architecture(**known))
        checkpoints.fill(net, state, str(path))
        return net
    layout, _, _ = released.read(path)
    methods = {method.released: name for name, method in TAG_METHODS.items()}
    if layout not in methods:
        raise RuntimeError(
            f"Expected a checkpoint of {', '.join(methods)} at {path}, got one of {layout}, which makes no maps; "
            "name another."
        )
    name = methods[layout]
    net = build(Architecture(name, dropout=0.0 if TAG_METHODS[name].saliency else 0.5))
    released.load(path, net.trunk, net.heads())
    return net


def _head(before, after):
    head = nn.Conv2d(before, after, 1, bias=False)
    nn.init.xavier_uniform_(head.weight)
    return head
