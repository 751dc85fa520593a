"""JupyterLab with the lessons of a student: the working copies in work/, and nothing else of the course in sight.

Solutions lie outside of its root, and nbgrader's menus and servers for instructors are off. It leaves the user's own
Jupyter alone: settings, kernels and the state of the page are those of work/.jupyter.
"""

import json
import os
import sys
from pathlib import Path

from course_lib import paths
from course_lib.course.update import behind, copy_lessons, course_root, working_folder

# Server extensions that make a start slow and are of no use to a student; jupytext opens a .py file as a notebook.
OFF = [f"nbgrader.server_extensions.{name}" for name in ("formgrader", "validate_assignment", "assignment_list")]
OFF += ["nbgrader.server_extensions.course_list", "jupyterlab_jupytext"]
FILES = {
    "labconfig/page_config.json": {"disabledExtensions": {"@jupyter/nbgrader": True, "jupyterlab-jupytext": True}},
    "labconfig/default_setting_overrides.json": {
        "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}
    },
    "jupyter_server_config.d/course.json": {"ServerApp": {"jpserver_extensions": dict.fromkeys(OFF, False)}},
}
PLACES = {
    "JUPYTER_CONFIG_DIR": "",
    "JUPYTER_DATA_DIR": "data",
    "JUPYTER_RUNTIME_DIR": "runtime",
    "JUPYTERLAB_SETTINGS_DIR": "settings",
    "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    "IPYTHONDIR": "ipython",
}


def surroundings(folder: Path) -> dict[str, str]:
    """Variables of the environment for a JupyterLab of its own in `folder`, whose settings are written there."""
    own = folder / ".jupyter"
    for name, content in FILES.items():
        paths.write_text(own / name, json.dumps(content, indent=1) + "\n")
    first = [str(own), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]  # before what nbgrader installed
    return {
        **{name: str(own / place) for name, place in PLACES.items()},
        "JUPYTER_CONFIG_PATH": os.pathsep.join(first),
        "COURSE_WORK": str(folder),  # where a lesson puts its results, too
    }


def arguments(folder: Path, asked: list[str]) -> list[str]:
    """Options of JupyterLab: on loopback, with its token, and for root there only; then those that were asked for."""
    chosen = ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    elsewhere = any(option.partition("=")[0].endswith(("--ip", ".ip")) for option in asked)
    if hasattr(os, "geteuid") and os.geteuid() == 0 and not elsewhere:
        chosen.append("--allow-root")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        chosen.append("--no-browser")
    return chosen + asked


def main(argv: list[str]) -> int:
    """Open the working copies in JupyterLab; lessons that are new are copied. Options are those of JupyterLab."""
    root = course_root()
    folder = working_folder()
    if new := copy_lessons(root / "notebooks", folder):
        print(f"Copied to {folder}: {', '.join(new)}.")
    if old := behind(root / "notebooks", folder):
        print(f"There is a newer release of {', '.join(old)}: `make update` brings it, and keeps your answers.")
    os.environ.update(surroundings(folder))
    from jupyterlab.labapp import LabApp  # late: it looks at the environment

    LabApp.launch_instance(arguments(folder, argv))
    return 0
