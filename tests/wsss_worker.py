"""What the test of training from tags shares among processes: torchrun ... tests/wsss_worker.py DATA FOLDER."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from course_lib.backbones.resnet38 import Unit
from course_lib.data.voc import Voc
from course_lib.wsss.cam_net import build, save
from course_lib.wsss.contrast import ContrastConfig
from course_lib.wsss.learner import TaggedImages, TagLearner, fit
from course_lib.wsss.recipes import recipe


def run(data: str, folder: Path) -> None:
    """Train a narrow ResNet38 for one epoch, without what each process draws for itself: dropout, halves of pixels."""
    config = recipe(
        "seam+p2p",
        "resnet38",
        data=data,
        weights="random",
        width=8,
        size=48,
        small=24,
        long_side=(40, 64),
        epochs=1,
        batch_size=2,
        dropout=0.0,
        contrast=ContrastConfig(mine_pixels=False, top_k=4),
    )
    images = Voc(data, "trainaug")
    torch.manual_seed(0)
    net = build(config.architecture(images.classes))
    for part in net.modules():
        if isinstance(part, Unit):
            part.dropout = 0.0
    history = fit(TagLearner(net, config), TaggedImages(images, config), folder, progress=False)
    save(net, folder / "model.safetensors")
    (folder / "history.json").write_text(json.dumps(history))


if __name__ == "__main__":
    with torch.backends.mkldnn.flags(enabled=False):  # see test_wsss_train.py
        run(sys.argv[1], Path(sys.argv[2]))
