"""Download released weights on request, and check them.

    python -m kit.models.weights neuro_simclr weights/
    python -m kit.models.weights medicalnet_resnet18 weights/ --sha256 HASH

Nothing else in the kit downloads weights. `kit.models.third_party_files` reads the files.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from kit.models.third_party_files import EncoderError, sha256_of
from kit.models.third_party_formats import FORMATS
from kit.runs import resolve, shown, write_whole

_MEDICALNET = "https://huggingface.co/TencentMedicalNet/MedicalNet-Resnet{0}/resolve/main/resnet_{0}{1}.pth"
# what `fetch` can download, by name: URL, and sha256 ("" if unknown)
DOWNLOADS = {
    "neuro_simclr": ("https://github.com/emilykaczmarek/3D-Neuro-SimCLR/releases/download/v1.0.0/"
                     "simclr_3d_brain_foundation.tar", FORMATS["neuro_simclr"].hashes[0]),
    **{f"medicalnet_resnet{depth}": (_MEDICALNET.format(depth, "_23dataset" if depth < 101 else ""), "")
       for depth in (10, 18, 34, 50, 101, 152, 200)},
}


def fetch(name: str, to: str | Path, sha256: str = "") -> Path:
    """Download a released file of weights into a folder; it appears there only if its hash is right.

    A file that is there already, with this hash, is not downloaded again.

    Args:
        name: one of `DOWNLOADS`.
        to: the folder; a relative path starts at the project's root. A file there with another hash is replaced.
        sha256: of the file, if the kit does not know it.

    Returns:
        the file's path.

    Raises:
        EncoderError: unknown name, no hash to check against, wrong hash, or a failed download (the message then says
            how to download it by hand).
    """
    if name not in DOWNLOADS:
        raise EncoderError(f"got {name!r}; only {', '.join(DOWNLOADS)} can be downloaded; for others see "
                           "docs/weights.md")
    url, known = DOWNLOADS[name]
    wanted, path = known or sha256, resolve(to) / url.rpartition("/")[2]
    if not wanted:
        raise EncoderError(f"{name}: the kit does not know the sha256 of {url}: give it with --sha256 (in Python, "
                           "sha256=...), or download the file by hand and name it")
    if known and sha256 and sha256.lower() != known:
        raise EncoderError(f"{name}: its sha256 is {known}, not {sha256}")
    if path.is_file() and sha256_of(path) == wanted.lower():
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as source:
            return keep(source, path, wanted)
    except (OSError, HTTPException) as error:
        raise EncoderError(f"{name} could not be downloaded ({error}). By hand: get {url} where there is a network, "
                           f"put it at {shown(path)}, and see that `sha256sum` says {wanted}") from None


def keep(source: BinaryIO, path: Path, sha256: str) -> Path:
    """Write a stream to a file, which appears only if it has this sha256 (hexadecimal).

    Raises:
        EncoderError: it has another hash.
    """
    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        if (digest := sha256_of(aside)) != sha256.lower():
            raise EncoderError(f"the download of {path.name} broke off or is another file (sha256 {digest}, not "
                               f"{sha256}): discarded; try again")

    return write_whole(path, write)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m kit.models.weights", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help=", ".join(DOWNLOADS))
    parser.add_argument("to", help="the folder; a relative path starts at the project's root")
    parser.add_argument("--sha256", default="", help="of the file, if the kit does not know it: 64 hexadecimal digits")
    given = parser.parse_args(arguments)
    if given.sha256 and not re.fullmatch("[0-9a-fA-F]{64}", given.sha256):
        parser.error(f"--sha256: got {given.sha256!r}; give 64 hexadecimal digits")
    try:
        print(fetch(given.name, given.to, given.sha256))
    except EncoderError as error:
        print(f"kit.models.weights: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
