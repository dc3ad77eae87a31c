"""Check the files that parameters name, before any work; checks return a list of problems, empty if there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kit.reading import ParameterError, filled
from kit.runs import resolve, shown

RESERVED = ("prepared", "pretrain", "train", "validation", "test", "in_distribution", "kit", "encoder", "model",
            "models", "labels", "aliases", "allowed", "fingerprint", "settings", "from", "name", "versions",
            "mask_sources", "changed")  # not allowed for test sets: records use them
WEIGHTS = ("neuro_simclr", "brainiac", "brainiac_resnet50", "medicalnet")  # see `kit.models.third_party_formats`


def encoder_at(spec: str, fold: int, seed: int) -> str:
    """Name of the encoder for a fold and a seed, which replace `{fold}` and `{seed}` in `spec`."""
    return filled(spec, {"fold": fold, "seed": seed})


def encoder_parts(encoder: str | Path) -> tuple[str, str]:
    """Split an encoder's name into (`random`, architecture or nothing), (format, path), or (`auto`, path)."""
    kind, colon, rest = str(encoder).partition(":")
    if kind == "random" or (colon and len(kind) > 1 and not {"/", "\\"} & set(kind)  # C: is a drive
                            and not resolve(encoder).exists()):
        return kind, rest
    return "auto", str(encoder)


def encoder_problems(name: str, encoder: str, architectures: tuple[str, ...], trained: bool = False) -> list[str]:
    """Problems with an encoder's name, or that its file does not exist; `trained`: do not advise `random`."""
    kind, rest = encoder_parts(encoder)
    if kind == "random":
        known = not rest or rest in architectures
        return [] if known else [f"{name}: got {encoder!r}; the architectures are {', '.join(architectures)}"]
    if kind not in ("auto", *WEIGHTS, *architectures):
        return [f"{name}: got {encoder!r}; give FORMAT:PATH, where FORMAT is auto, "
                f"{', '.join((*WEIGHTS, *architectures))}, or random:ARCHITECTURE"]
    path = resolve(rest)
    if kind == "auto":
        path = path / "encoder.safetensors" if path.is_dir() else path
    first = "run 2_pretrain or 3_finetune first" if trained else "run 2_pretrain first, or say `random`"
    cure = first if kind == "auto" else "docs/weights.md says where to get it"
    return [] if path.is_file() else [f"{name}: no file {shown(path)}; {cure}"]


def recipe_problems(name: str, recipe: str) -> list[str]:
    """Problems with a recipe, or that there is none of that name."""
    from kit.augment.recipe import names, read_recipe

    if recipe not in names() and not resolve(recipe).is_file():
        return [f"{name}: no recipe or file {recipe!r}; the recipes are {', '.join(names())}"]
    try:
        read_recipe(recipe)
    except ParameterError as error:
        return [f"{name}: {recipe}: {error}"]
    return []


def split_problems(prepared: Path, params: Any) -> list[str]:
    """Problems with the folds that parameters ask for."""
    if params.folds == 1:
        return ["folds: 1; set 0 for a single split, 2 or more for cross-validation"]
    if params.folds and params.leave_one_site_out:
        return [f"folds: {params.folds} beside leave_one_site_out: true, which makes its own folds; set folds: 0"]
    from kit.cohort.split import SplitError, Splitting, left_out

    splitting, fold = Splitting.of(params), getattr(params, "fold", 0)
    if not splitting.cross_validated:
        return [f"fold: {fold}; there is one split, whose number is 0; see folds"] if fold else []
    try:
        count = fold_total(prepared, params)
        left_out(_index(prepared), splitting, fold)
    except SplitError as error:
        return [str(error)]
    return [f"fold: {fold}; {count} folds are numbered 0 to {count - 1}"] if fold >= count else []


def fold_total(prepared: Path, params: Any) -> int:
    """Number of folds that parameters ask for; 1 for a single split.

    Raises:
        SplitError: see `kit.cohort.split.site_folds`.
    """
    from kit.cohort.split import Splitting, fold_count

    return fold_count(_index(prepared), Splitting.of(params))


def test_set_problems(tests: dict[str, Any], tasks: list[str]) -> list[str]:
    """Problems with test sets whose folders exist, and with their tasks."""
    problems = []
    for name, test in tests.items():
        if name in RESERVED or not name.isprintable() or "/" in name:
            problems.append(f"tests.{name}: not a name for a test set; give a printable one without /, and none of "
                            f"{', '.join(RESERVED)}")
            continue
        columns = _index(test.prepared).columns
        where = name if name == "out_of_distribution" else f"tests.{name}"
        problems += [f"{where}: no label column {task} in its index" for task in test.tasks if task not in columns]
        if not test.tasks and not set(tasks) & set(columns):
            problems.append(f"{where}: its index has no label column {' or '.join(tasks)}")
    return problems


def _index(prepared: Path) -> Any:
    from kit.store.store import read_index

    return read_index(prepared / "index.csv")


def alias_problems(aliases: Path | None) -> list[str]:
    """Problems with the table of people with several names."""
    from kit.cohort.identity import IdentityError, read_aliases

    try:
        read_aliases(aliases)
    except IdentityError as error:
        return [f"aliases: {error}"]
    return []


def baseline_problems(prepared: Path, demographics: list[str] | None, volumes: Path | None,
                      atlas: Path | None) -> list[str]:
    """Problems with the columns, the table and the atlas that baselines without an encoder use."""
    from kit.cohort.identity import headings
    from kit.cohort.tabular import TableError, read_foreign
    from kit.preprocess.scan_file import ScanError, read_scan

    problems, columns = [], _index(prepared).columns
    if missing := [name for name in demographics or () if name not in columns]:
        problems.append(f"demographics: no column {', '.join(missing)} in the index of {shown(prepared)}; it has "
                        f"{', '.join(columns)}")
    if volumes is not None:
        try:
            read_foreign(volumes, headings)
        except TableError as error:
            problems.append(f"volumes: {error}")
    if atlas is not None:
        try:
            labels = read_scan(atlas)[0]
            if (odd := labels[labels != labels.round()]).size:
                problems.append(f"atlas: {shown(atlas)} holds {odd[0]:g}; give a map of whole-numbered regions")
        except ScanError as error:
            problems.append(f"atlas: {shown(atlas)}: {error}")
    return problems


def label_problems(name: str, prepared: Path, task: str, task_type: str, missing_codes: list[Any]) -> list[str]:
    """Problems with a label column of prepared scans."""
    from kit.cohort.labels import LabelError, read_labels
    from kit.cohort.tabular import read_table

    index = read_table(prepared / "index.csv")
    try:
        read_labels(index, task, task_type, missing_codes)
    except LabelError as error:
        # the message offers `task_type` where that is the cure; all else is corrected in the cohort's table
        in_cells = task in index and "task_type" not in str(error)
        cure = ". Correct cells in the cohort's table, then run 1_preprocess again (finished scans are kept)"
        return [f"{name}: {error}{cure if in_cells else ''}"]
    return []
