"""Download released weights on request, and check them.

    python -m kit.models.weights neuro_simclr weights/

Nothing else in the kit downloads weights. `kit.models.third_party_files` reads the files.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import urllib.request
from pathlib import Path
from typing import BinaryIO

from kit.models.third_party_files import EncoderError
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

    Args:
        name: one of `DOWNLOADS`.
        to: the folder.
        sha256: of the file, if the kit does not know it.

    Returns:
        the file's path.

    Raises:
        EncoderError: unknown name, no hash to check against, wrong hash, or no network (the message then says how to
            download it by hand).
    """
    if name not in DOWNLOADS:
        raise EncoderError(f"got {name!r}; only {', '.join(DOWNLOADS)} can be downloaded; for others see "
                           "docs/weights.md")
    url, known = DOWNLOADS[name]
    wanted, path = known or sha256, resolve(to) / url.rpartition("/")[2]
    if not wanted:
        raise EncoderError(f"{name}: the kit does not know the sha256 of {url}: give it as sha256=..., or download it "
                           "by hand and name the file")
    try:
        with urllib.request.urlopen(url, timeout=60) as source:
            return keep(source, path, wanted)
    except OSError as error:
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
        with open(aside, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256.lower():
            raise EncoderError(f"the download of {path.name} has the sha256 {digest}, not {sha256}: discarded")

    return write_whole(path, write)


if __name__ == "__main__":
    try:
        print(fetch(*sys.argv[1:]))
    except EncoderError as problem:
        sys.exit(str(problem))
