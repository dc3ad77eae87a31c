"""A JupyterLab for the tests, and how to wait for it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.runs import ROOT

SETTINGS = {  # every output on the page, and no questions to the network
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[Callable[[str], str]]:
    """Serve a folder's notebooks, whose runs go to its `outputs`; yields a function from a notebook to its address."""
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "KIT_OUTPUTS": str(folder / "outputs"), "KIT_PROGRESS": "off", "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "IPYTHONDIR": str(folder / "ipython")}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             "--IdentityProvider.token=browser-test", "--LabApp.expose_app_in_browser=True",
             f"--ServerApp.root_dir={folder}"], env=environment, stdout=log, stderr=log)
    try:
        until(lambda: _answers(f"http://127.0.0.1:{port}/api?token=browser-test"), 90, "JupyterLab did not start")
        yield lambda notebook: f"http://127.0.0.1:{port}/lab/tree/{notebook}?token=browser-test&reset"  # no other tabs
    finally:
        server.terminate()
        server.wait(20)


def open_notebook(browser: object, address: str) -> None:
    """Show a notebook, and wait until its kernel is ready."""
    browser.get(address)
    name = address.partition("?")[0].rpartition("/")[2]
    until(lambda: browser.execute_script("return window.jupyterapp?.shell.currentWidget?.context?.path") == name, 90,
          f"JupyterLab did not show {name}")
    until(lambda: kernel_status(browser) == "idle", 90, "no kernel")


def kernel_status(browser: object) -> str | None:
    """What JupyterLab says of the kernel of the notebook in front."""
    return browser.execute_script(
        "return window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status")


def until(condition: Callable[[], object], seconds: float, otherwise: str) -> None:
    """Wait until a condition holds; it fails with these words when the time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.3)


def _answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=2).status == 200
    except OSError:
        return False
