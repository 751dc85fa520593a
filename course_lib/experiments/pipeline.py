"""The whole pipeline as one command, on VOC, on a miniature or on a folder of your own photographs, and its archive."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro

from course_lib import paths
from course_lib.data.images import load, load_grey
from course_lib.data.own import TAG_FILE, as_voc, own_photographs
from course_lib.data.voc import Voc
from course_lib.experiments import shared
from course_lib.published import PSEUDO_MASKS, SEGMENTATION_MIOU
from course_lib.show import plots
from course_lib.worlds import minis
from course_lib.wsss.pipeline import PipelineConfig, run_pipeline
from course_lib.wsss.submission import check_submission, write_submission

STAGE_ROWS = {
    "seeds": "seeds, at the threshold of the method",
    "seeds, oracle threshold": "seeds, at the best threshold of these masks",
    "masks": "pseudo masks",
    "predict": "segmentation network",
}
GALLERY = 12  # photographs in the picture of masks


def pipeline_command(config: PipelineConfig, folder: Path | None = None) -> None:
    """From photographs with tags to seeds, pseudo masks and a segmentation network, each stage once.

    A second run does what changed. The data are VOC, a miniature, or a folder of photographs with a file tags.csv of
    lines such as beach/IMG_0012.jpg,dog;ball.

    Args:
        folder: of the stages and of the results; None: one in build/wsss
    """
    folder = folder or paths.results().parent / "wsss"
    own = bool(config.data) and (Path(config.data) / TAG_FILE).is_file()
    config = shared.prepared(config, folder, lambda: minis.mini_voc(source=_source(config)))
    if own:
        found = own_photographs(config.data)
        shared.say(str(found), "")
        config = replace(config, data=str(as_voc(found, folder)), predict_tags=True)
    result = run_pipeline(config, folder)
    shared.write(result, as_table(result), folder / f"{result['stages']['score']}")
    masks = folder / result["stages"].get("masks", result["stages"].get("predict", ""))
    if shared.first_process():
        print(as_table(result), gallery(Path(config.data), masks, folder), sep="\n")


def submission_command(
    predictions: tyro.conf.Positional[Path],
    data: Path,
    archive: Path = Path("results.tgz"),
    competition: Literal["comp5", "comp6"] = "comp6",
    check: bool = False,
) -> None:
    """Write the archive that VOC's test server takes, and look at it as the server would.

    Args:
        predictions: folder of label images ID.png, such as that of the stage predict
        data: folder in VOC's layout with the list test
        archive: the file to write, or to look at
        competition: comp6 where data from elsewhere were used too, such as the weights of ImageNet
        check: write nothing, look at an archive that is there
    """
    for what, place in {"predictions": predictions, "--data": data}.items():
        if not place.is_dir():
            raise FileNotFoundError(f"A folder was expected as {what}, got {place}, where there is none.")
    if "".join(archive.suffixes[-2:]) not in (".tgz", ".tar.gz") and archive.suffix != ".tgz":
        raise ValueError(f"Expected an archive .tgz as --archive, got {str(archive)!r}; the server takes no other.")
    if check:
        count = check_submission(archive, data)
    else:
        count = write_submission(predictions, data, archive, competition)
    print(f"{archive} holds {count} label images as the server takes them.")


def as_table(result: dict[str, Any]) -> str:
    """The scores as Markdown, in percent, the papers' figures on VOC beside them."""
    settings, scores = result["settings"], result["scores"]
    lines = []
    for split, rows in scores.items():
        for name, row in rows.items():
            at = f"{row['threshold']:.2f}" if "threshold" in row else ""
            lines.append([split, STAGE_ROWS[name], f"{row['miou']:.1f}", at, _paper(settings, split, name)])
    title = f"# {settings['method']}, {settings['refine']}, {settings['backbone']}"
    if not lines:
        return f"{title}\n\nThere are no masks, so nothing can be scored.\n"
    header = ["split", "what", "mIoU", "threshold", "paper, VOC: mIoU"]
    return "\n".join([title, "", *shared.markdown(header, lines), ""])


def gallery(data: Path, masks: Path, folder: Path) -> str:
    """Write a picture of some photographs under their masks, and its description; returns a sentence that says where.

    Args:
        data: in VOC's layout.
        masks: folder of label images.
    """
    voc = Voc(data, "train")
    chosen = [i for i, name in enumerate(voc.ids) if (masks / f"{name}.png").is_file()][:GALLERY]
    labels = [load_grey(masks / f"{voc.ids[i]}.png", "P").numpy() for i in chosen]
    titles = [", ".join(voc.classes[1 + c] for c in voc.tags[i].nonzero()[:, 0].tolist()) for i in chosen]
    figure = plots.grid(
        [load(voc.images[i]) for i in chosen], titles, masks=labels, classes=voc.classes, title="Masks from tags alone"
    )
    path = folder / f"{masks.name}.png"
    figure.savefig(path, dpi=110)
    words = "; ".join(f"{voc.ids[i]}: {title}" for i, title in zip(chosen, titles))
    paths.write_text(
        path.with_suffix(".txt"), f"Photographs under the masks that were made from their tags. {words}.\n"
    )
    return f"Masks: {masks}\nPicture of {len(chosen)} of them: {path}"


def _source(config):
    return "creatures" if config.backbone == "small" else "photographs"


def _paper(settings, split, name):
    """The paper's figure for a row, where there is one."""
    method, refine = settings["method"], settings["refine"]
    if name == "seeds, oracle threshold" and split == "train":
        return str(PSEUDO_MASKS.get(method, {}).get("none", ""))
    if name == "masks" and split == "train":
        return str(PSEUDO_MASKS.get(method, {}).get(refine, ""))
    if name == "predict" and split == "val":
        return str(SEGMENTATION_MIOU.get((method, settings["head"]), {}).get(split, ""))
    return ""
