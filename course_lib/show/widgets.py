"""Interactive figures: `live` redraws with the kernel, `flipbook` needs none.

Both put the picture into HTML of their own, so that it has alternative text, never stacks up, and is the same in
JupyterLab, Colab and a test run.
"""

import json
from collections.abc import Callable, Sequence
from html import escape

import ipywidgets
from IPython.display import HTML, display
from matplotlib.figure import Figure

from course_lib.show.plots import image_tag


def live(
    draw: Callable[..., Figure], *, alt: str | Callable[..., str], **controls: ipywidgets.Widget
) -> ipywidgets.VBox:
    """Controls above a figure that is drawn again whenever one of them moves.

        live(draw, alt="...", label=ipywidgets.Dropdown(options=names), threshold=ipywidgets.FloatSlider(0.2, max=1))

    Args:
        draw: called with the value of every control by name; returns a figure.
        alt: the description of the figure, or a function of the same values.
        controls: anything with a value; one without a description is labelled with its name.
    """
    if not controls:
        raise ValueError(
            "live needs at least one control by name, as in threshold=ipywidgets.FloatSlider(0.2, max=1). "
            "A figure that does not move is shown by plots.show."
        )
    picture = ipywidgets.HTML()

    def redraw(*_: object) -> None:
        values = {name: control.value for name, control in controls.items()}
        try:
            picture.value = image_tag(draw(**values), alt if isinstance(alt, str) else alt(**values))
        except Exception as error:  # Jupyter hides what a moved control raises
            picture.value = f'<p role="alert"><b>{type(error).__name__}</b>: {escape(str(error))}</p>'
            raise

    redraw()
    for name, control in controls.items():
        control.description = control.description or name
        control.style.description_width = "initial"  # long labels are not cut off
        control.observe(redraw, names="value")
    return ipywidgets.VBox([*controls.values(), picture])


def flipbook(draw: Callable[..., Figure], values: Sequence, *, label: str, alt: Callable[..., str]) -> None:
    """Shows one frame for each value, and a slider that turns them without a kernel, on web pages too, and by keyboard.

    Args:
        draw: draw(value) returns the figure; all of one size.
        values: in the order of the slider; it starts at the first one.
        label: what the slider sets, with the unit.
        alt: alt(value) describes the frame.
    """
    if not len(values):
        raise ValueError("A flipbook needs at least one value, but values is empty.")
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    frames = [
        image_tag(draw(value), alt(value), attributes="hidden " if index else "") for index, value in enumerate(values)
    ]
    turn = (
        "const book = this.closest('figure'), at = Number(this.value);"
        "book.querySelectorAll('img').forEach((image, index) => { image.hidden = index !== at; });"
        f"const name = {json.dumps(names)}[at];"
        "book.querySelector('output').textContent = name; this.setAttribute('aria-valuetext', name);"
    )
    # JupyterLab would take the arrow keys for itself, unless the input itself says that they are its own.
    slider = (
        f'<input type="range" min="0" max="{len(names) - 1}" value="0" aria-valuetext="{escape(names[0])}" '
        f'data-lm-suppress-shortcuts="true" style="width:18em;vertical-align:middle" oninput="{escape(turn)}">'
    )
    display(
        HTML(
            f'<figure class="flipbook" style="margin:0"><label>{escape(label)} {slider}</label> '
            f"<output>{escape(names[0])}</output><div>{''.join(frames)}</div></figure>"
        )
    )
