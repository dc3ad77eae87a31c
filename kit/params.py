"""Every parameter of every notebook: its name, unit, default and bounds; one pydantic model a notebook.

The defaults are the recommended values. A notebook's parameters cell repeats them. Only its paths differ: they name
the quick runs on the (small) sample cohort.
"""

from __future__ import annotations

from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from kit.machine import missing_of_slurm, slurm_nodes
from kit.preprocess.settings import (
    UNUSABLE,
    Allowed,
    BiasCorrection,
    Intensity,
    Mask,
    OrientationUnknown,
    Registration,
)
from kit.problems import (
    alias_problems,
    baseline_problems,
    encoder_at,
    encoder_problems,
    fold_total,
    label_problems,
    recipe_problems,
    split_problems,
    test_set_problems,
)
from kit.reading import Fraction, Parameters, Positive, ProjectPath, Seed, Shape
from kit.runs import resolve, shown

TaskType = Literal["auto", "classification", "regression"]
Code = int | float | str
Architecture = Literal["resnet18", "resnet18_narrow", "densenet121", "vit", "vit_narrow"]
Precision = Literal["fp32", "bf16"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
Baseline = Literal["guess", "demographics", "site", "volumes", "voxels", "random init"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
Method = Literal["gradient", "gradient_x_input", "smoothgrad", "integrated_gradients", "grad_cam", "grad_cam_pp",
                 "guided_backpropagation", "occlusion", "attention_rollout"]
METHODS: tuple[Method, ...] = get_args(Method)


def _unusable_flag(name: str) -> str:
    if name not in UNUSABLE:
        raise ValueError(f"the flags that make a scan unusable are {', '.join(UNUSABLE)}")
    return name


class Explore(Parameters):
    """0_explore_augmentations: look at views before a network does."""

    feeds_others: ClassVar[bool] = False
    # its results are prepared scans, which recipe and encoder do not change
    may_change: ClassVar[frozenset[str]] = frozenset({"workers", "recipe", "encoder"})

    cohort: str = "sample"  # `sample`, a table (CSV, TSV) or a BIDS folder
    prepared: ProjectPath | None = None  # prepared scans, instead of `cohort`
    sample_participants: Annotated[int, Field(ge=40)] = 160  # size of the sample cohort
    scans: Annotated[int, Field(ge=2)] = 6  # scans to look at; similarity compares them
    recipe: str = "weak"  # a recipe's name, or a YAML file
    encoder: str = "random:resnet18_narrow"  # shows the similarity of its features; as in 3_finetune
    seed: Seed = 0  # of all that is random
    spacing_mm: Annotated[float, Field(gt=0, le=16)] = 4.0  # of the grid that `cohort` is prepared on
    shape: Shape = (36, 48, 40)  # voxels (z, y, x)
    workers: Positive = 2  # processes

    def problems(self) -> list[str]:
        problems = encoder_problems("encoder", self.encoder, ARCHITECTURES) + recipe_problems("recipe", self.recipe)
        if self.prepared is not None:
            return problems + _prepared_problems("prepared", self.prepared)
        return problems + _cohort_problems(self.cohort)


class Preprocess(Parameters):
    """1_preprocess: from files to prepared scans."""

    # each scan stores the settings of its preparation: changing them prepares it again
    may_change: ClassVar[frozenset[str]] = frozenset({
        "workers", "max_failed_fraction", "bias_correction", "registration", "mask", "intensity",
        "orientation_unknown", "brain_ml", "spacing_mm", "shape"})

    cohort: str = "sample"  # `sample`, a table (CSV, TSV), a BIDS folder, FOMO60K, FOMO300K or OpenMind
    contrast: str = "T1w"  # scans to take from a folder: T1w, T2w, FLAIR, T1ce, ...; from a table all are taken
    sample_participants: Annotated[int, Field(ge=40)] = 160  # size of the sample cohort
    seed: Seed = 0  # of all that is random
    bias_correction: BiasCorrection = "none"  # none or n4 (SimpleITK)
    # to the ICBM152 template: rigid, affine, or none (only for scans already in its space)
    registration: Registration = "none"
    mask: Mask = "auto"  # brain mask: auto, given, nonzero, deepbet, hd-bet, mri_synthstrip
    intensity: Intensity = "zscore"  # normalisation inside the mask: zscore or whitematter
    # scans whose header gives no position: refuse, or assume_ras (stored in RAS order, centred on the origin)
    orientation_unknown: OrientationUnknown = "refuse"
    brain_ml: tuple[Positive, Positive] = (700, 2100)  # ml; brains smaller or larger are flagged; for adults
    spacing_mm: Annotated[float, Field(gt=0, le=16)] = 4.0  # mm, of the isotropic grid
    shape: Shape = (36, 48, 40)  # voxels (z, y, x); the paper: 150, 192, 192 at 1 mm
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1  # if more scans fail, the last cell raises
    workers: Positive = 2  # processes, one thread each
    shards: Positive = 1  # parts to prepare the cohort in, such as the tasks of a Slurm array
    shard: Annotated[int, Field(ge=0)] = 0  # this run's part, from 0

    @property
    def run_dir(self) -> Path:
        """A shard's own folder, in `shards/` of the folder that all shards are merged into."""
        return self.output_dir / "shards" / f"{self.shard}-of-{self.shards}" if self.shards > 1 else self.output_dir

    def problems(self) -> list[str]:
        problems = _cohort_problems(self.cohort, self.contrast)
        if self.brain_ml[0] >= self.brain_ml[1]:
            problems.append(f"brain_ml: got {list(self.brain_ml)}; give the smaller volume first")
        if self.shard >= self.shards:
            problems.append(f"shard: got {self.shard}; {self.shards} shards are numbered 0 to {self.shards - 1}")
        from kit.preprocess.skullstrip import missing_tool

        return problems + [missing for missing in [missing_tool(self.mask)] if missing]


LONGEST_RETRY = 100  # minutes; with the writing itself, less than `kit.train.distributed.PATIENCE`


class Training(Parameters):
    """Parameters of all training."""

    may_change: ClassVar[frozenset[str]] = frozenset({
        "workers", "nodes", "loader_workers", "checkpoint_minutes", "retry_minutes"})

    batch_size: Annotated[int, Field(ge=2)] = 16  # scans, over all workers
    chunk: Annotated[int, Field(ge=0)] = 0  # scans per worker that run at a time; 0: all; BatchNorm sees one chunk
    accumulate: Positive = 1  # batches averaged into one step
    clip: Annotated[float, Field(ge=0)] = 0.0  # largest norm of the gradient; 0: no clipping
    # decay of a moving average of the weights, which is validated and saved in their place; 0: none
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Precision = "fp32"  # of the network in training: fp32, bf16 (matrix products and convolutions only)
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10  # between checkpoints, besides one after each epoch
    retry_minutes: Annotated[float, Field(ge=0)] = 30  # how long to retry writing to a full disk
    workers: Positive = 1  # processes per node; 1 on one node trains in the kernel
    nodes: Annotated[int, Field(ge=0)] = 0  # 0: all nodes of the Slurm job that the notebook runs in, or one
    loader_workers: Annotated[int, Field(ge=0)] = 0  # loading processes per worker
    seed: Seed = 0  # of all that is random

    def processes(self) -> int:
        """Processes over all nodes."""
        return self.workers * self.all_nodes()

    def all_nodes(self) -> int:
        """Nodes to train on: `nodes`; if 0, those of the Slurm job, or 1 if they cannot be used (see `why_alone`)."""
        job, missing = slurm_nodes()
        return self.nodes or (1 if missing else job)

    def problems(self) -> list[str]:
        problems = []
        if self.nodes > 1 and (missing := missing_of_slurm()):
            problems.append(f"nodes: {self.nodes} are started by Slurm from inside its job, but "
                            f"{' and '.join(missing)}; set nodes: 1 to train on this machine")
        if self.batch_size % self.processes():
            problems.append(f"batch_size: {self.batch_size} cannot be split evenly over {self.workers} workers"
                            + (f" of {self.all_nodes()} nodes" if self.all_nodes() > 1 else ""))
        if self.processes() > 1 and self.retry_minutes > LONGEST_RETRY:
            problems.append(f"retry_minutes: got {self.retry_minutes:g}; set at most {LONGEST_RETRY}, because the "
                            "other processes give up when one waits for longer, or train in one process")
        return problems


class Pretrain(Training):
    """2_pretrain: train an encoder on unlabelled scans."""

    may_change: ClassVar[frozenset[str]] = Training.may_change | {"verify"}

    prepared: ProjectPath  # a run of 1_preprocess
    split: str = "pretrain"  # rows to learn from, if the index has a column `split`
    # leave the test participants out; if a column `split` names them, an overlap with those learned from is an error
    leave_out_test: bool = True
    folds: Annotated[int, Field(ge=0)] = 0  # of cross-validation, as in 3_finetune and 5_benchmark; 0: one split
    leave_one_site_out: bool = False  # folds are sites
    fold: Annotated[int, Field(ge=0)] = 0  # whose test participants are left out, from 0
    split_seed: Seed = 0  # decides who is tested
    stratify: list[str] | None = None  # columns to balance folds by; null: age, sex, site, diagnosis, group
    aliases: ProjectPath | None = None  # a table of people with several names: dataset, participant, person
    accept_flags: list[Annotated[str, AfterValidator(_unusable_flag)]] = []  # also use scans unusable for these
    objective: Literal["simclr", "mae"] = "simclr"  # contrastive views, or masked autoencoder
    architecture: Architecture = "resnet18_narrow"  # resnet18 is the paper's; an MAE takes vit or vit_narrow
    recipe: str = "weak"  # views of SimCLR: a recipe's name, or a YAML file
    mae_recipe: str = "none"  # the MAE's single view, likewise; He et al. found masking to be augmentation enough
    epochs: Annotated[int, Field(ge=0)] = 30  # 0: only estimate what a run needs
    sampling: Literal["all", "balanced"] = "all"  # per epoch: every scan once, or equally many of each dataset
    session_pairs: bool = False  # SimCLR: take the two views from two sessions, if a participant has them
    optimizer: Literal["adam", "adamw", "lars"] = "adamw"  # adam, adamw or lars
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-3  # its highest value, after warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rate after warm-up
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of all steps
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4  # of weights, not of biases and norms
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999  # of adam and adamw; 0.95 for an MAE (He et al. 2022)
    temperature: Annotated[float, Field(gt=0)] = 0.1  # NT-Xent
    projection: list[Positive] = [128, 128, 64]  # widths of the projection head; the paper: 512, 512, 64
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # share of brain patches that the MAE must fill in
    normalise_patches: bool = True  # MAE: targets are patches minus their mean, over their SD
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of the participants
    monitor_epochs: Annotated[int, Field(ge=0)] = 1  # epochs between measures of validation features; 0: none
    torch_compile: bool = False  # SimCLR: compile the encoder, a minute at the start, for shorter steps on a GPU
    verify: bool = False  # before training, check every scan's checksum, not only its header (minutes to hours)

    @property
    def run_dir(self) -> Path:
        """A plan (`epochs: 0`) goes to `plan/` in the real run's folder."""
        return self.output_dir if self.epochs else self.output_dir / "plan"

    def problems(self) -> list[str]:
        problems = _prepared_problems("prepared", self.prepared) or split_problems(self.prepared, self)
        problems = super().problems() + problems + alias_problems(self.aliases)
        problems += recipe_problems(*(("mae_recipe", self.mae_recipe) if self.objective == "mae"
                                      else ("recipe", self.recipe)))
        if self.objective == "mae" and not self.architecture.startswith("vit"):
            problems.append(f"architecture: {self.architecture} has no masked autoencoder; use vit or vit_narrow")
        if self.objective == "mae" and self.session_pairs:
            problems.append("session_pairs: true is for simclr; a masked autoencoder has one view")
        if self.objective == "mae" and self.torch_compile:
            problems.append("torch_compile: true is for simclr; a masked autoencoder's tokens differ in number")
        if self.session_pairs and self.sampling == "balanced":
            problems.append("session_pairs: true takes each participant once, which sampling: balanced would undo; "
                            "set sampling: all, or session_pairs: false")
        return problems


class TestSet(BaseModel):
    """A further set of prepared scans to test on, and its tasks."""

    __test__: ClassVar[bool] = False  # no test class for pytest
    model_config = ConfigDict(extra="forbid", frozen=True)

    prepared: ProjectPath  # a run of 1_preprocess
    tasks: list[str] = []  # label columns; empty: all tasks for which it has a column


def _of_path(value: object) -> object:
    return {"prepared": value} if isinstance(value, str | Path) else value


class Tuning(Training):
    """Parameters of fine-tuning, for one encoder or many."""

    prepared: ProjectPath  # a run of 1_preprocess
    # prepared scans of other sites, also tested; null: rows of `prepared` whose split says so, if there are any
    out_of_distribution: ProjectPath | None = None
    # more test sets, by name: prepared scans, or {prepared: ..., tasks: [...]} for only some tasks
    tests: dict[str, Annotated[TestSet, BeforeValidator(_of_path)]] = {}
    folds: Annotated[int, Field(ge=0)] = 0  # of cross-validation; 0: one split
    leave_one_site_out: bool = False  # cross-validation whose folds are sites
    split_seed: Seed = 0  # decides who is tested and who is for validation
    stratify: list[str] | None = None  # columns to balance folds by; null: age, sex, site, diagnosis, group
    # of the participants who are not tested; without folds, a column `split` takes precedence
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    accept_flags: list[Annotated[str, AfterValidator(_unusable_flag)]] = []  # also use scans unusable for these
    steps: Positive = 400  # at most; each step averages `accumulate` batches
    check_steps: Positive = 20  # steps between validations; log.csv calls this interval an epoch
    patience: Annotated[int, Field(ge=0)] = 5  # validations without a lower loss before it stops; 0: never
    # each is tried with each weight decay; validation chooses
    learning_rates: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = [1e-3]
    # of weights, not of biases and norms
    weight_decays: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [1e-2]
    optimizer: Literal["adam", "adamw"] = "adamw"  # adam or adamw
    schedule: Literal["constant", "cosine"] = "constant"  # constant: more steps continue the same trajectory
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # in which the learning rate rises
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # learning-rate factor from stage to stage below the head
    select_by: Literal["loss", "score"] = "loss"  # on validation; score: AUC (for numbers, still the loss)
    # train once more with three times the steps and patience: does the validation score get better?
    check_converged: bool = True
    flip: bool = True  # mirror left and right at random while fine-tuning
    standardise: bool = True  # z-score numeric labels for training; false: as they are
    allow_seen_participants: bool = False  # test on participants that the encoder was pretrained on
    rows_are_people: bool = False  # a cohort without a column `participant` has one scan per person
    aliases: ProjectPath | None = None  # a table of people with several names: dataset, participant, person
    allow_differences: list[Allowed] = []  # where preparations may differ: registration, mask, bias_correction

    def test_sets(self) -> dict[str, TestSet]:
        """All test sets by name, including `out_of_distribution`."""
        others = self.out_of_distribution
        return self.tests | ({} if others is None else {"out_of_distribution": TestSet(prepared=others)})

    def problems(self) -> list[str]:
        problems = _prepared_problems("prepared", self.prepared) or split_problems(self.prepared, self)
        problems = super().problems() + problems + alias_problems(self.aliases)
        if self.warmup_steps >= self.steps:
            problems.append(f"warmup_steps: got {self.warmup_steps}; set fewer than steps ({self.steps})")
        if self.out_of_distribution is not None and "out_of_distribution" in self.tests:
            problems.append("tests.out_of_distribution: the parameter out_of_distribution has this name; give another")
        sets = self.test_sets()
        missing = {name: _prepared_problems(name if name == "out_of_distribution" else f"tests.{name}", test.prepared)
                   for name, test in sets.items()}
        there = {name: test for name, test in sets.items() if not missing[name]}
        return problems + sum(missing.values(), []) + test_set_problems(there, self.task_names())

    def task_names(self) -> list[str]:
        """The label columns to predict."""
        return []


class Finetune(Tuning):
    """3_finetune: predict a label with an encoder."""

    # `random`, `random:ARCHITECTURE`, an encoder.safetensors, a run of 2_pretrain, or third-party weights as PATH or
    # FORMAT:PATH (docs/weights.md); `{fold}` and `{seed}` in it stand for this run's
    encoder: str
    fold: Annotated[int, Field(ge=0)] = 0  # the fold to test, from 0, if there are folds
    task: str = "stroke"  # a label column
    task_type: TaskType = "auto"  # auto, classification or regression
    missing_codes: list[Code] = []  # values of the label that mean missing, such as 9, 999 or NA
    mode: Literal["probe", "finetune"] = "finetune"  # a linear model on frozen features, or all weights
    label_fraction: Fraction = 1.0  # of the training and validation participants

    def problems(self) -> list[str]:
        problems = super().problems()
        spec = encoder_at(self.encoder, self.fold, self.seed)
        return problems + encoder_problems("encoder", spec, ARCHITECTURES) + (
            [] if problems else label_problems("task", self.prepared, self.task, self.task_type, self.missing_codes))

    def task_names(self) -> list[str]:
        return [self.task]


class Saliency(Parameters):
    """4_saliency: where a model looks, and whether its maps can be trusted."""

    prepared: ProjectPath  # a run of 1_preprocess
    model: ProjectPath  # a run of 3_finetune in mode finetune, or of 2_pretrain for an encoder
    # also: gradient_x_input, grad_cam_pp, guided_backpropagation, occlusion, attention_rollout (ViTs)
    methods: Annotated[list[Method], Field(min_length=1)] = ["gradient", "smoothgrad", "integrated_gradients",
                                                             "grad_cam"]
    target: str = "prediction"  # or a class; for an encoder: similarity, views, component
    like: str | None = None  # for target similarity: the scan to be similar to; null: the first shown
    # test participants to show: surest (the highest scores), worst errors, random ones, controls (the first class)
    whom: Annotated[list[Literal["surest", "worst", "random", "controls"]], Field(min_length=1)] = ["surest",
                                                                                                    "controls"]
    participants: Positive = 2  # test participants for each entry of `whom`
    steps: Positive = 32  # of integrated gradients
    samples: Positive = 8  # of SmoothGrad
    noise: Annotated[float, Field(gt=0, le=5)] = 0.5  # of SmoothGrad, in SD of the brain's voxels
    baseline: Literal["zero", "mean_brain", "blurred"] = "zero"  # of integrated gradients and occlusion
    layer: int | str | None = None  # of Grad-CAM: a stage, from 1, or a module's name; null: the last stage
    patch_mm: Annotated[float, Field(gt=0, le=100)] = 24.0  # side of occlusion's cubes
    check_scans: Positive = 1  # scans that the sanity checks use
    label_randomised: bool = False  # also check against a model fine-tuned on shuffled labels
    label_steps: Positive = 100  # most training steps of that model
    # test participants whose maps are compared with their effect's mask, which only the sample cohort has; 0: none
    truth_participants: Annotated[int, Field(ge=0)] = 6
    compare: dict[str, ProjectPath] = {}  # more runs of 3_finetune, by name, for the table of known places
    # regions: deepmriprep:NAME, harvard-oxford, tissues, a NIfTI, or column:NAME, if a column of the cohort names each
    # scan's own label map; null: deepmriprep's AAL3 if it is installed
    atlas: str | None = None
    atlas_names: ProjectPath | None = None  # a table of a label map's labels: index, label
    cohort: str | None = None  # the cohort that was prepared; if given, maps are also written in the scans' own space
    contrast: str = "T1w"  # the scans of that folder that were prepared; of a table all are taken
    allow_differences: list[Allowed] = []  # where preparations may differ: registration, mask, bias_correction
    seed: Seed = 0  # of all that is random

    def problems(self) -> list[str]:
        problems = _prepared_problems("prepared", self.prepared)
        problems += [line for name, folder in self.compare.items() for line in _model_problems(f"compare.{name}",
                                                                                             folder)]
        if (self.atlas or "").startswith("column:") and self.cohort is None:
            problems.append(f"atlas: {self.atlas} is a column of the cohort; set cohort to the table that "
                            "`prepared` was made from")
        if self.cohort == "sample":
            problems.append("cohort: name the sample's folder under outputs/sample; a sample of another size has other "
                            "scans")
        elif self.cohort is not None:
            problems += _cohort_problems(self.cohort, self.contrast)
        if "model" in self.compare:
            problems.append("compare.model: `model` itself has this name in the table; give another")
        if self.compare and (self.model / "encoder.safetensors").is_file() and not (self.model / "task.json").exists():
            problems.append("compare: an encoder without a head has no task to be compared on")
        if not (self.model / "task.json").exists() and (self.model / "encoder.safetensors").is_file():
            if self.target not in (of := ("similarity", "views", "component")):
                problems.append(f"target: got {self.target!r}; an encoder without a head has {', '.join(of)}")
            if self.whom != ["random"]:
                problems.append("whom: of an encoder without a head nobody can be surest, worst or a control; give "
                                "[random]")
            if self.label_randomised:
                problems.append("label_randomised: an encoder has no labels; set it to false")
            return problems
        return problems + _model_problems("model", self.model)


def _model_problems(name: str, folder: Path) -> list[str]:
    missing = [file for file in ("model.safetensors", "task.json", "predictions.csv") if not (folder / file).exists()]
    return [f"{name}: {shown(folder)} holds no {' and no '.join(missing)}; run 3_finetune (mode finetune) to its end "
            "first"] if missing else []


def _no_seed(seed: int) -> int:
    if seed:
        raise ValueError(f"the benchmark does not use it; set seeds: [{seed}]")
    return seed


class Benchmark(Tuning):
    """5_benchmark: compare encoders on several tasks, in and out of distribution."""

    may_change: ClassVar[frozenset[str]] = Tuning.may_change | {"shards", "shard", "seed"}

    # by a name for the table: as `encoder` of 3_finetune; `random:ARCHITECTURE`, fine-tuned, is a supervised baseline;
    # `{fold}` and `{seed}` in it give each fold and seed its own encoder
    encoders: dict[str, str]
    baselines: list[Baseline] = list(BASELINES)  # rows of the table that need no network training
    demographics: list[str] | None = None  # columns of that baseline; null: age, sex and gender, if present
    # a table, all of whose columns of numbers count; null: tissues of the prepared scans
    volumes: ProjectPath | None = None
    atlas: ProjectPath | None = None  # regions for these tissues, a NIfTI in MNI space; null: cubes of 30 mm
    tasks: list[str] = ["alzheimers", "age", "stroke", "sex"]  # label columns
    label_fractions: list[Fraction] = [0.2, 1.0]  # of the training and validation people, for probes and baselines
    finetune_tasks: list[str] = ["stroke"]  # tasks to also fine-tune on
    finetune_fractions: list[Fraction] = [0.2]  # of the training and validation people, for fine-tuning
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]  # each has its own label subset, head and `{seed}` encoder
    task_types: dict[str, TaskType] = {}  # of tasks that are not `auto`
    missing_codes: dict[str, list[Code]] = {}  # by task, as in 3_finetune
    age_bands: list[float] = [20, 40, 60, 90]  # edges in years; also score within each band; []: none
    match_age_sex: bool = True  # for two classes, also score pairs of the same sex and similar age
    correct_bias: bool = False  # undo the pull of predicted numbers towards the mean, as measured on validation
    shards: Positive = 1  # parts to fill the table in, such as the tasks of a Slurm array
    shard: Annotated[int, Field(ge=0)] = 0  # this run's part, from 0
    seed: Annotated[Seed, AfterValidator(_no_seed)] = 0  # not used here; see seeds

    @property
    def run_dir(self) -> Path:
        """A shard's own folder; all shards put their results into `cells/` of `output_dir`."""
        return self.output_dir / "shards" / f"{self.shard}-of-{self.shards}" if self.shards > 1 else self.output_dir

    def problems(self) -> list[str]:
        problems = super().problems()
        if not problems:
            for name in self.encoders:
                problems += self._encoder_problems(name)
            problems += [f"tests.{name}: {task} is not among tasks" for name, test in self.tests.items()
                         for task in test.tasks if task not in self.tasks]
        if self.shard >= self.shards:
            problems.append(f"shard: got {self.shard}; {self.shards} shards are numbered 0 to {self.shards - 1}")
        if self.age_bands and (len(self.age_bands) < 2 or sorted(set(self.age_bands)) != self.age_bands):
            problems.append(f"age_bands: got {self.age_bands}; give two edges or more, ascending, such as [20, 40, 60]")
        if not self.encoders:
            problems.append("encoders: got {}; name one at least, such as {'ResNet': 'random:resnet18'}")
        taken = [name for name in self.encoders if name in BASELINES]
        problems += [f"encoders.{name}: a baseline has this name; give another" for name in taken]
        problems += [f"{name}: {task} is not among tasks" for name in ("task_types", "missing_codes")
                     for task in getattr(self, name) if task not in self.tasks]
        problems += [f"finetune_tasks: {task} is not among tasks"
                     for task in self.finetune_tasks if task not in self.tasks]
        if not _prepared_problems("prepared", self.prepared):
            problems += baseline_problems(self.prepared, self.demographics, self.volumes, self.atlas)
            for task in self.tasks:
                problems += label_problems("tasks", self.prepared, task, self.task_types.get(task, "auto"),
                                            self.missing_codes.get(task, []))
        return problems

    def _encoder_problems(self, name: str) -> list[str]:
        """Problems with an encoder of the table, for each fold and seed that its `{fold}` and `{seed}` stand for."""
        spec = self.encoders[name]
        folds = range(fold_total(self.prepared, self)) if "{fold}" in spec else [0]
        every = dict.fromkeys(encoder_at(spec, fold, seed) for fold in folds for seed in self.seeds)
        return [line for each in every for line in encoder_problems(f"encoders.{name}", each, ARCHITECTURES)]

    def task_names(self) -> list[str]:
        return self.tasks


class Apply(Parameters):
    """6_apply: embeddings or predictions for any scans."""

    feeds_others: ClassVar[bool] = False

    # a scan, a folder of scans, the folder of a DICOM series, BIDS, a table, a prepared cohort; or `sample`: six scans
    # of the sample cohort that were not used for training
    input: Annotated[str, Field(min_length=1)] = "sample"
    encoder: str  # as in 3_finetune, but not random; or a run of 3_finetune, which also predicts
    contrast: str = "T1w"  # scans to take from a BIDS folder
    registration: Registration | None = None  # null: like the encoder's; if that is none, rigid
    mask: Mask | None = None  # null: like the encoder's; if that is given, auto
    orientation_unknown: OrientationUnknown = "refuse"  # as in 1_preprocess
    pool: Literal["default", "mean", "class"] = "default"  # for a ViT: mean of brain tokens, or class token
    stages: list[Positive] = []  # concatenate the features of these stages, from 1; empty: the encoder's output
    flips: bool = False  # average the features of a scan and of its mirror image
    allow_differences: list[Allowed] = []  # where a prepared cohort may differ from the encoder's preparation
    sample_participants: Annotated[int, Field(ge=40)] = 160  # size of the sample cohort
    seed: Seed = 0  # of all that is random
    workers: Positive = 2  # processes for preparation, one thread each

    def problems(self) -> list[str]:
        there = self.input == "sample" or is_there(resolve(self.input))
        problems = [] if there else [f"input: no such file or folder: {shown(resolve(self.input))}"]
        if self.encoder.partition(":")[0] == "random":
            return [*problems, f"encoder: got {self.encoder!r}; name one that has learned something, whose record says "
                               "how scans are prepared"]
        if not is_model(self.encoder):
            problems += encoder_problems("encoder", self.encoder, ARCHITECTURES, trained=True)
        from kit.preprocess.skullstrip import missing_tool

        return problems + [missing for missing in [self.mask and missing_tool(self.mask)] if missing]


def is_model(encoder: str) -> bool:
    """Whether a path is a run of 3_finetune."""
    return all((resolve(encoder) / name).is_file() for name in ("model.safetensors", "task.json"))


def is_there(path: Path) -> bool:
    """Whether a file or folder exists, or the folder of `folder#4`, which is one series of several."""
    if path.exists() or "#" not in path.name:
        return path.exists()
    from kit.preprocess.scan_file import scan_files

    return any(file.exists() for file in scan_files(path))


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared scans."""
    return not _prepared_problems("input", folder)


NOTEBOOKS: dict[str, type[Parameters]] = {
    "0_explore_augmentations": Explore,
    "1_preprocess": Preprocess,
    "2_pretrain": Pretrain,
    "3_finetune": Finetune,
    "4_saliency": Saliency,
    "5_benchmark": Benchmark,
    "6_apply": Apply,
}


def _cohort_problems(cohort: str, contrast: str = "T1w") -> list[str]:
    if cohort == "sample":
        return []
    from kit.cohort.tables import read_cohort
    from kit.cohort.tabular import CohortError

    try:
        with redirect_stdout(None):  # its counts are printed when the cohort is used
            read_cohort(cohort, contrast)
    except CohortError as error:
        return [f"cohort: {error}"]
    return []


def _prepared_problems(name: str, folder: Path) -> list[str]:
    missing = [file for file in ("index.csv", "preparation.json") if not (folder / file).is_file()]
    return [f"{name}: {shown(folder)} holds no {' and no '.join(missing)}; run 1_preprocess first"] if missing else []
