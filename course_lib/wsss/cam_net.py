"""Networks of CAM, SEAM, EPS and of pixel-to-prototype contrast (P2P) on both: a trunk and a few 1 x 1 convolutions.

    net = build(Architecture("seam+p2p", classes), "ilsvrc-cls_rna-a1_cls1000_ep-0001.params")    # ResNet38, as published
    view = net(net.prepare(photographs))                        # a `View`: maps, refined maps, embeddings

    head         from        to        published name
    classifier   conv6       C + 1     fc8        maps; in "cam" C, without a background
    similar4     conv4       64        f8_3       what pixel correlation (PCM) compares: shallow, detached, ReLU,
    similar5     conv5       128       f8_4       ... deeper, detached, ReLU,
    similar      3+64+128    192       f9         ... and projected, together with the colours of the image on the same grid
    projector    conv6       128       fc_proj    embeddings of P2P, ReLU
                        Wang et al., CVPR 2020 (SEAM); Lee et al., CVPR 2021 (EPS); Du et al., CVPR 2022 (P2P)

Classifier and projector see the same deep features, with the same channels dropped. PCM sends no gradient into the trunk: its
taps are detached, and so are the maps that it spreads. (The copy of SEAM's network that is released with P2P's code, and not
used there, has maps without gradient too; the wiring here is that of SEAM.) Heads have no bias. Background is channel 0;
where a released network has it last, it is moved on loading.

Any trunk of `backbones.dense` fits. Two small settings are for a CPU: tf_efficientnet_lite0 with everything frozen in
front of its last block, where `prepare` is done once for a whole data set; and `Small`, trained from random weights.
"""

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from course_lib.backbones import released, resnet38
from course_lib.backbones.dense import TAPS, Dense, Maps, Timm
from course_lib.data.voc import CLASSES
from course_lib.wsss import View
from course_lib.wsss.seam import pixel_correlation, winning_maps
from course_lib.wsss.views import Warp, resize

METHODS = ("cam", "seam", "eps", "seam+p2p", "eps+p2p")
PUBLISHED = {"fc8": "classifier", "f8_3": "similar4", "f8_4": "similar5", "f9": "similar", "fc_proj": "projector"}
RELEASED = {"cam": "cam", "seam": "seam", "eps": "eps", "p2p-seam": "seam+p2p", "p2p-eps": "eps+p2p"}
LITE0 = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Architecture:
    """What a network is built from; it is kept in checkpoints."""

    method: str  # one of METHODS
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
        if self.method not in METHODS:
            raise ValueError(f"There is no method {self.method!r}; there are: {', '.join(METHODS)}.")

    @property
    def correlated(self) -> bool:
        """Whether the method has a PCM, which all have that compare two views of an image."""
        return self.method not in ("cam", "eps")

    @property
    def contrasted(self) -> bool:
        """Whether the method has a projector."""
        return self.method.endswith("+p2p")


class Small(Dense):
    """Five convolutions from random weights, stride 8, normalised by the statistics of their own batches: for creatures.

    The last three lie on one grid and are the taps. Nothing is frozen.
    """

    channels = dict.fromkeys(TAPS, 128)
    stride = 8

    def __init__(self) -> None:
        super().__init__((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
            )
            for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 128, 1))
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
        self.trunk, self.architecture = trunk, architecture
        deep, count = architecture.neck or trunk.channels["conv6"], len(architecture.classes)
        self.neck = _head(trunk.channels["conv6"], deep) if architecture.neck else None
        self.classifier = _head(deep, count - (architecture.method == "cam"))
        if architecture.correlated:
            self.similar4, self.similar5 = (
                _head(trunk.channels[tap], width) for tap, width in (("conv4", 64), ("conv5", 128))
            )
            self.similar = _head(3 + 64 + 128, 192)
            nn.init.kaiming_normal_(self.similar4.weight)
            nn.init.kaiming_normal_(self.similar5.weight)
            nn.init.xavier_uniform_(self.similar.weight, gain=4)
        if architecture.contrasted:
            self.projector = _head(deep, architecture.projector)

    def prepare(
        self,
        images: UInt8[Tensor, "b 3 H W"] | Float[Tensor, "b 3 H W"],
        inside: Bool[Tensor, "b H W"] | None = None,
        size: int | None = None,
        warp: Warp | None = None,
    ) -> Maps:
        """All of the network that depends on the image alone: what the frozen parts return, and colours on the final grid.

        Args:
            images: RGB, uint8 in 0..255 or float in 0..1.
            inside: False where an image was padded: there it becomes the mean colour.
            size: side to which images are brought after normalisation, bilinear, corner on corner: of a smaller view.
            warp: what else is done to a smaller view; what it brings in from outside gets the mean colour.
        """
        images = self.trunk.normalise(images)
        if inside is not None:
            images = images * inside[:, None]
        if size is not None:
            images = resize(images, size) if warp is None else warp(images, size)
        grid = tuple(ceil(side / self.trunk.stride) for side in images.shape[2:])
        return {**self.trunk.frozen(images), "colours": resize(images, grid)}

    def forward(self, prepared: Maps) -> View:
        """Maps and embeddings on the grid of the features, from what `prepare` returned."""
        taps = self.trunk.trained({name: maps for name, maps in prepared.items() if name != "colours"})
        deep = taps["conv6"] if self.neck is None else self.neck(taps["conv6"]).relu()
        deep = F.dropout2d(deep, self.architecture.dropout, self.training)
        cam = refined = self.classifier(deep)
        if self.architecture.method == "cam":  # without a background: nothing speaks for it
            cam = refined = F.pad(cam, (0, 0, 0, 0, 1, 0))
        if self.architecture.correlated:
            shallow, deeper = self.similar4(taps["conv4"].detach()).relu(), self.similar5(taps["conv5"].detach()).relu()
            refined = pixel_correlation(
                winning_maps(cam), self.similar(torch.cat((prepared["colours"], shallow, deeper), 1))
            )
        return View(cam, refined, self.projector(deep).relu() if self.architecture.contrasted else None)

    def heads(self) -> dict[str, nn.Conv2d]:
        """The heads by published name; all are new layers, which learn faster than the trunk. The neck is not among them."""
        return {name: getattr(self, ours) for name, ours in PUBLISHED.items() if hasattr(self, ours)}

    def new_layers(self) -> list[nn.Module]:
        """What starts from random weights beside a trained trunk."""
        return [*self.heads().values(), *([] if self.neck is None else [self.neck])]


def build(architecture: Architecture, weights: str | Path = "random") -> CamNet:
    """A network in evaluation mode; heads start from torch's generator.

    Args:
        weights: of the trunk. "random"; "pretrained" (ImageNet, of timm's networks); or for ResNet38 the path of the released
            ImageNet weights (.params) or of a released checkpoint, of which the trunk is taken.
    Raises:
        ValueError: weights that this trunk cannot start from, or as `dense.Timm`.
    """
    name = architecture.backbone
    if name == "small":
        if weights != "random":
            raise ValueError(f'The small trunk starts from random weights, but {str(weights)!r} came. Take "random".')
        trunk = Small()
    elif name == "resnet38":
        if weights == "pretrained":
            raise ValueError(
                "ResNet38 has ImageNet weights in a file only: give the path of "
                'ilsvrc-cls_rna-a1_cls1000_ep-0001.params, or "random".'
            )
        trunk = resnet38.create(weights, architecture.width)
    elif weights in ("random", "pretrained"):
        trunk = Timm(name, weights == "pretrained", architecture.taps, architecture.frozen, architecture.output_stride)
    else:
        raise ValueError(f'Trunks of timm start from "pretrained" or "random" weights, but {str(weights)!r} came.')
    return CamNet(trunk, architecture).eval()


def save(net: CamNet, path: Path) -> None:
    """Write tensors and architecture as one safetensors file, for `load`."""
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in net.state_dict().items()}
    save_file(state, path, {"architecture": json.dumps(asdict(net.architecture))})


def load(path: str | Path) -> CamNet:
    """A trained network in evaluation mode: a file of `save`, or a released checkpoint of CAM, SEAM, EPS or P2P on VOC.

    Raises:
        FileNotFoundError, RuntimeError: nothing is there, or it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"A checkpoint was expected at {path}, but there is no such file.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                about = (file.metadata() or {}).get("architecture")
        except SafetensorError as error:
            raise RuntimeError(f"{path} is not a whole safetensors file: {error}") from error
        if about:
            about = {
                name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(about).items()
            }
            net = build(Architecture(**about))
            net.load_state_dict(load_file(path))
            return net
    method = released.read(path).method
    if method not in RELEASED:
        raise RuntimeError(
            f"{path} is a checkpoint of {method}, which makes no maps. Those of {', '.join(RELEASED)} do."
        )
    net = build(Architecture(RELEASED[method], dropout=0.0 if "eps" in method else 0.5))
    released.load(path, net.trunk, net.heads())
    return net


def _head(before: int, after: int) -> nn.Conv2d:
    head = nn.Conv2d(before, after, 1, bias=False)
    nn.init.xavier_uniform_(head.weight)
    return head
