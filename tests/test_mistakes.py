"""Mistakes that people make: each is refused before work starts, by a message that says where, what and what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from kit.cohort.tables import read_cohort
from kit.errors import KitError
from kit.execute import notebook_of, parameters
from kit.models.encoder_file import load_encoder
from kit.preprocess.scan_file import read_scan
from kit.reading import read_yaml
from kit.runs import ROOT, Run
from kit.store.store import Store
from tests.conftest import make_store


class Place:
    """A folder with a prepared cohort, two scans and whatever a mistake needs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, make_store(folder / "store")
        for name in ("a.nii.gz", "b.nii.gz"):
            nib.save(nib.Nifti1Image(np.random.default_rng(0).random((9, 8, 7)).astype("float32"), np.eye(4)),
                     folder / name)

    def check(self, notebook: str, **values: Any) -> object:
        """Check a notebook's parameters, right but for these values."""
        right = {"output_dir": str(self.folder / "out")}
        if notebook != "1_preprocess" and notebook != "6_apply":
            right["prepared"] = str(self.store.folder)
        if notebook == "3_finetune":
            right |= {"encoder": "random:resnet18_narrow", "task": "lesion", "out_of_distribution": None}
        return parameters(notebook, right | values)

    def file(self, name: str, content: str | bytes) -> Path:
        """Write a file."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def cohort(self, text: str, name: str = "cohort.csv") -> object:
        """Read a cohort's table."""
        return read_cohort(self.file(name, text))

    def labelled(self, **columns: list[Any]) -> str:
        """A copy of the prepared cohort's folder with other labels in its index."""
        folder = self.folder / f"labelled {'-'.join(columns)}"
        folder.mkdir(exist_ok=True)
        self.store.index.assign(**columns).to_csv(folder / "index.csv", index=False)
        (folder / "preparation.json").write_bytes((self.store.folder / "preparation.json").read_bytes())
        return str(folder)

    def again_with(self, **values: Any) -> None:
        """Use a run's folder for other parameters."""
        run = Run.of(self.check("2_pretrain"))
        (self.folder / "out/log.csv").write_text("loss\n1\n")
        run.close()
        Run.of(self.check("2_pretrain", **values))


ROWS = 32  # of the prepared cohort
HEAD = "participant,session,dataset,image_path\n"
MISTAKES: dict[str, tuple[Callable[[Place], object], str]] = {
    "a misspelt parameter": (lambda at: at.check("2_pretrain", epoch=3),
                             r"epoch: unknown parameter; did you mean epochs"),
    "text for a number": (lambda at: at.check("2_pretrain", epochs="ten"), r"epochs: got 'ten'.*valid integer"),
    "a number out of range": (lambda at: at.check("2_pretrain", mask_ratio=1.5), r"mask_ratio: got 1.5.*less than 1"),
    "a file that is not there": (lambda at: read_yaml(at.folder / "nothing.yaml"), r"nothing.yaml: no such file"),
    "broken YAML": (lambda at: read_yaml(at.file("bad.yaml", "epochs: [1,")), r"bad.yaml is not YAML"),
    "a list for parameters": (lambda at: read_yaml(at.file("l.yaml", "- 1")), r"l.yaml: expected `name: value` lines"),
    "a parameter file without a notebook's name": (lambda at: notebook_of(Path("pretrain.yaml")),
                                                   r"must start with a notebook's: 0_explore.*6_apply"),
    "nothing prepared": (lambda at: at.check("2_pretrain", prepared=str(at.folder)),
                         r"prepared: .* holds no index.csv and no preparation.json; run 1_preprocess first"),
    "no encoder": (lambda at: at.check("3_finetune", encoder=str(at.folder / "2")),
                   r"encoder: no file .*2; run 2_pretrain first"),
    "an unknown architecture": (lambda at: at.check("3_finetune", encoder="random:resnet19"),
                                r"encoder: got 'random:resnet19'; the architectures are resnet18, "),
    "an MAE of a CNN": (lambda at: at.check("2_pretrain", objective="mae", architecture="resnet18"),
                        r"architecture: resnet18 has no masked autoencoder; use vit"),
    "a batch that cannot be shared": (lambda at: at.check("2_pretrain", batch_size=10, workers=3),
                                      r"batch_size: 10 cannot be split evenly over 3 workers"),
    "an unknown recipe": (lambda at: at.check("2_pretrain", recipe="papers"),
                          r"recipe: no recipe or file 'papers'; the recipes are brainiac, none, paper"),
    "a fault in a recipe": (lambda at: at.check("2_pretrain", recipe=str(at.file("mine.yaml", "rotat: {}"))),
                            r"recipe: .*mine.yaml.*rotat: unknown parameter; did you mean rotate"),
    "a misspelt label": (lambda at: at.check("3_finetune", task="lesions"),
                         r"task: lesions: no such label column; the index has .*lesion"),
    "codes that could be numbers": (
        lambda at: at.check("3_finetune", task="dx", prepared=at.labelled(dx=[1 + n % 3 for n in range(ROWS)])),
        r"dx: are these class codes or numbers\? Found 1 \(11\).*Set task_type.*missing_codes"),
    "a label of one class": (lambda at: at.check("3_finetune", task="dx", prepared=at.labelled(dx=["CN"] * ROWS)),
                             r"dx: classification needs two classes.*found 1: CN \(32\)"),
    "a fold too many": (lambda at: at.check("3_finetune", folds=5, fold=5), r"fold: 5; 5 folds are numbered 0 to 4"),
    "one fold": (lambda at: at.check("3_finetune", folds=1), r"folds: 1; set 0 for a single split, 2 or more"),
    "an unknown column to stratify by": (lambda at: at.check("3_finetune", folds=5, stratify=["sexe"]),
                                         r"stratify: the index has no column sexe; it has"),
    "a test set that is not there": (lambda at: at.check("3_finetune", tests={"AIBL": str(at.folder)}),
                                     r"tests.AIBL: .*holds no index.csv.*run 1_preprocess first"),
    "no table of aliases": (lambda at: at.check("3_finetune", aliases=str(at.folder / "who.csv")),
                            r"aliases: .*who.csv cannot be read: No such file"),
    "several nodes without Slurm": (lambda at: at.check("2_pretrain", nodes=2), r"nodes: 2 .*set nodes: 1"),
    "saliency before fine-tuning": (lambda at: at.check("4_saliency", model=str(at.folder)),
                                    r"model: .*holds no model.safetensors.*run 3_finetune \(mode finetune\)"),
    "an atlas column without a cohort": (lambda at: at.check("4_saliency", atlas="column:aseg",
                                                                             model=str(at.folder)),
                                         r"atlas: column:aseg is a column of the cohort; set cohort"),
    "an input that is not there": (lambda at: at.check("6_apply", input=str(at.folder / "no.nii"), encoder="random"),
                                   r"input: no such file or folder: .*no.nii"),
    "a used folder": (lambda at: at.again_with(epochs=99), r"epochs.*99"),
    "a table that is not there": (lambda at: read_cohort(at.folder / "nothing.csv"), r"nothing.csv: no such file"),
    "a table without paths": (lambda at: at.cohort("participant,path\n1,a.nii.gz\n"),
                              r"cohort.csv: needs a column image_path; found participant, path"),
    "a table without scans": (lambda at: at.cohort(HEAD), r"cohort.csv: no scans in it"),
    "a scan listed twice": (lambda at: at.cohort(f"{HEAD}1,1,d,a.nii.gz\n1,1,d,b.nii.gz\n"),
                            r"1 scans have the dataset, participant and session of another, the first: participant 1, "
                            r"session 1; give each its own"),
    "a row without a participant": (lambda at: at.cohort(f"{HEAD},1,d,a.nii.gz\n"), r"participant is empty in 1 rows"),
    "a table in another encoding": (lambda at: read_cohort(at.file("l.csv", "image_path\nMü.nii".encode("cp1252"))),
                                    r"l.csv is not a UTF-8 table.*save it as `CSV UTF-8`"),
    "a spreadsheet": (lambda at: read_cohort(at.file("c.xlsx", "PK")), r"c.xlsx: expected .csv, .tsv, a BIDS folder"),
    "a folder that is not BIDS": (lambda at: read_cohort(at.folder), r"a BIDS folder needs dataset_description.json"),
    "a damaged scan": (lambda at: read_scan(at.file("x.nii.gz", (at.folder / "a.nii.gz").read_bytes()[:900])),
                       r"truncated gzip: the file ends too early; copy it again"),
    "a web page in place of weights": (
        lambda at: load_encoder(str(at.file("w.pt", "<!DOCTYPE html>")), at.store.record, 0, []),
        r"w.pt is not an encoder of this kit.*begins with b'<!DOCTYPE.*not a web page that was saved"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(place: Place, mistake: str) -> None:
    make, message = MISTAKES[mistake]
    with pytest.raises(KitError, match=f"(?s){message}"):
        make(place)


def test_there_are_thirty_and_stores_stay_readable(place: Place) -> None:
    assert len(MISTAKES) >= 30 and len(Store.open(place.store.folder).index) == ROWS


def test_the_command_says_it_in_a_line_and_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-m", "kit.execute", "2_pretrain", "-p", "epoch", "3"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "epoch: unknown parameter; did you mean epochs?" in done.stderr
