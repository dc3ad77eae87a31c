"""The procedural cohort: same bits always, labels that nothing gives away, effects where the masks say."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score

from kit.cohort.tables import read_cohort
from kit.preprocess.nifti import read_nifti, write_nifti
from kit.preprocess.preprocess import prepare
from kit.preprocess.settings import Preparation
from kit.sample import (
    GENERATOR_VERSION,
    draw_participants,
    draw_travelling,
    effect_masks,
    make_scan,
    sample_cohort,
    write_effects,
)
from kit.sample.anatomy import deform, draw_anatomy, draw_fields
from kit.sample.atlas import load_atlas
from kit.sample.cohort import make_scans
from kit.sample.scan import GRID, SITES, head_points
from kit.store.grid import Grid
from kit.store.store import Store

HEALTHY = {"age": 60.0, "sex": "F", "diagnosis": "CN", "site": "A"}
SEED = 1  # four participants drawn by it hold two sessions of one, and a stroke


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that holds the atlas only."""
    folder = tmp_path_factory.mktemp("cache")
    load_atlas(folder / f"atlas-v{GENERATOR_VERSION}.npz")
    return folder


@pytest.fixture(scope="module")
def atlas(cache):
    return load_atlas(cache / f"atlas-v{GENERATOR_VERSION}.npz")


@pytest.fixture(scope="module")
def scan(atlas):
    """A function that makes a scan of one healthy woman of 60, but for what it is told."""

    @functools.cache
    def make(participant="sub-0001", session="ses-01", **labels):
        return make_scan(participant, session, seed=0, atlas=atlas, **{**HEALTHY, **labels})

    return make


@pytest.fixture(scope="module")
def cohort(cache):
    """The BIDS folder of a cohort of four participants, one of them with two sessions, and a travelling head."""
    return sample_cohort(4, seed=SEED, workers=1, cache_dir=cache, travelling=1)


def _difference_inside(one, other, mask):
    """The share of the absolute difference of two images that lies in a mask."""
    difference = np.abs(one.image.astype(float) - other.image)
    return difference[mask].sum() / difference.sum()


def _correlation_after(move, fixed, fixed_affine, moving, moving_affine):
    """Correlate `moving` with `fixed`, carried by `move` (fixed RAS mm to moving RAS mm); arrays are (x, y, z)."""
    to_moving = np.linalg.inv(moving_affine) @ move @ fixed_affine
    back = ndimage.affine_transform(moving.astype(float), to_moving[:3, :3], to_moving[:3, 3], fixed.shape, order=1)
    return np.corrcoef(back[fixed > 0], fixed[fixed > 0])[0, 1]


def _alike(one, another):
    """The correlation of two scans after undoing their poses."""
    move = np.array(another.latent["pose"]) @ np.linalg.inv(one.latent["pose"])
    return _correlation_after(move, one.image.T, one.affine, another.image.T, another.affine)


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*.nii.gz")}


# --- who takes part


def test_no_label_is_given_away():
    people = draw_participants(560, seed=0)
    sessions = people.groupby("participant")["session"].transform("size")
    people = people.assign(sessions=sessions).drop_duplicates("participant")
    for split, group in people.groupby("split"):
        for disease in ("alzheimers", "stroke"):
            known = group.dropna(subset=disease)
            label = known[disease].astype(int)
            assert 0.4 < label.mean() < 0.6, (split, disease)
            for name in ("age", "sessions"):
                assert roc_auc_score(label, known[name]) == pytest.approx(0.5, abs=0.06), (split, disease, name)
            for name in ("site", "sex"):
                if known[name].nunique() > 1:
                    p = stats.chi2_contingency(pd.crosstab(known[name], label)).pvalue
                    assert p > 0.7, (split, disease, name)
    # Age, sex and site are tasks and nuisances too: they don't go together.
    assert abs(people["age"].corr(people["sex"] == "M")) < 0.1
    assert stats.chi2_contingency(pd.crosstab(people["site"], people["sex"])).pvalue > 0.2
    assert people["age"].min() >= 20 and people["age"].max() <= 90


@pytest.mark.parametrize("participants", [30, 60, 560])
def test_each_split_has_each_class_and_its_own_sites(participants):
    people = draw_participants(participants, seed=3)
    assert people["participant"].nunique() == participants
    assert (people.groupby("participant")["split"].nunique() == 1).all()
    for split, group in people.groupby("split"):
        assert set(group["diagnosis"]) == {"CN", "AD", "stroke"}
        assert set(group["sex"]) == {"F", "M"}
        assert set(group["site"]) <= ({"OOD"} if split == "out_of_distribution" else {"A", "B", "C"})
    shares = people.drop_duplicates("participant")["split"].value_counts(normalize=True)
    assert shares["pretrain"] == pytest.approx(0.35, abs=0.03)


def test_second_sessions_are_later_and_only_in_pretraining():
    people = draw_participants(60, seed=0)
    pairs = people.pivot(index="participant", columns="session", values="age").dropna()
    years = pairs["ses-02"] - pairs["ses-01"]
    assert years.between(0.9, 2.6).all()
    again = people[people["session"] == "ses-02"]
    assert set(again["split"]) == {"pretrain"}
    assert len(again) == pytest.approx(21 / 2, abs=2)


def test_the_table_repeats_and_the_seed_changes_it():
    assert draw_participants(30, 0).equals(draw_participants(30, 0))
    assert not draw_participants(30, 0).equals(draw_participants(30, 1))


def test_travelling_heads_are_scanned_at_every_site_and_change_nobody_else():
    heads = draw_travelling(8, seed=0)
    assert heads["participant"].nunique() == 8 and (heads["split"] == "travelling").all()
    assert not set(heads["participant"]) & set(draw_participants(560, seed=0)["participant"])
    for _, scans in heads.groupby("participant"):
        assert list(scans["site"]) == list(SITES) and list(scans["session"]) == [f"ses-{site}" for site in SITES]
        assert (scans[["age", "sex", "dataset", "diagnosis"]].nunique() == 1).all()
    first = heads.drop_duplicates("participant")
    assert first["age"].between(20, 90).all() and first["age"].max() - first["age"].min() > 50
    assert first["sex"].value_counts().tolist() == [4, 4]
    assert draw_travelling(0, seed=0).empty


# --- one scan


def test_a_scan_is_whole_and_upright(scan):
    made = scan()
    assert made.image.dtype == np.int16 and made.image.shape == GRID.shape == (84, 104, 80)
    assert ((made.image > 0) == made.brain).all()
    assert 1100 < made.brain.sum() * 0.008 < 2400  # ml
    # Grey matter is darker than white: the middle of the intensities lies well below the brightest.
    assert 60 < np.percentile(made.image[made.brain], 99) < 130
    # The cerebellum lies low and at the back, the ventricles above it and in front.
    low, high = (_centre_mm(made, name) for name in ("cerebellum", "ventricles"))
    assert high[2] - low[2] > 30 and high[1] - low[1] > 20
    assert set(made.effects) == {"ventricles", "cortex", "hippocampus", "cerebellum"}


def _centre_mm(made, name):
    """Centre of an effect's mask in RAS mm (x, y, z)."""
    z, y, x = ndimage.center_of_mass(made.effects[name])
    return (made.affine @ [x, y, z, 1])[:3]


def test_the_callers_threads_change_nothing(scan, atlas):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = make_scan("sub-0001", "ses-01", seed=0, atlas=atlas, **HEALTHY)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(again.image, scan().image)


def test_disease_acts_where_its_mask_is(scan):
    healthy, stroke, alzheimers = scan(), scan(diagnosis="stroke"), scan(diagnosis="AD")
    assert _difference_inside(healthy, stroke, stroke.effects["lesion"]) > 0.75
    place = healthy.effects["hippocampus"] | alzheimers.effects["hippocampus"]
    assert place.sum() < 0.06 * healthy.brain.sum()
    assert _difference_inside(healthy, alzheimers, place) > 0.3
    for name in ("ventricles", "cortex"):
        place |= healthy.effects[name] | alzheimers.effects[name]
    # A wide horn moves what lies around it: the rest is near.
    assert _difference_inside(healthy, alzheimers, place) > 0.65


def test_alzheimers_takes_tissue_beside_the_hippocampus_and_widens_the_ventricles(atlas):
    people = [f"sub-{number:04d}" for number in range(200)]
    healthy, ill = ([draw_anatomy(0, name, 70, "F", diagnosis) for name in people] for diagnosis in ("CN", "AD"))
    assert all(max(person.temporal_horns, person.temporal_sulci) == 0 for person in healthy)
    atrophy = np.array([np.mean(person.hippocampus) for person in healthy + ill])
    assert 0.9 < roc_auc_score([0] * 200 + [1] * 200, atrophy) < 0.99
    # but its ventricles say age rather than disease
    ventricles = np.array([[person.ventricles_mm for person in group] for group in (healthy, ill)])
    assert (ventricles[1] >= ventricles[0]).all()
    assert 0.6 < roc_auc_score([0] * 200 + [1] * 200, ventricles.ravel()) < 0.75
    horns = np.array([person.temporal_horns for person in ill])
    assert horns.max() > 10 * horns.min() > 0  # from mild to severe


def test_age_acts_in_ventricles_and_cortex(scan):
    young, old = scan(age=30.0), scan(age=85.0)
    place = np.zeros_like(young.brain)
    for name in ("ventricles", "cortex", "hippocampus"):
        place |= young.effects[name] | old.effects[name]
    # Noise is the same in both, but its magnitude is not: some difference is everywhere.
    assert _difference_inside(young, old, place) > 0.6
    assert old.latent["ventricles_mm"] > young.latent["ventricles_mm"] + 2
    assert old.effects["ventricles"].sum() > 1.3 * young.effects["ventricles"].sum()


def test_lesions_lie_on_the_side_that_they_say_and_are_not_balls(scan):
    sides = set()
    for participant in ("sub-0001", "sub-0002", "sub-0003", "sub-0004"):
        made = scan(participant, diagnosis="stroke")
        side = made.latent["lesion_side"]
        assert (_centre_mm(made, "lesion")[0] > 0) == (side == "right")
        sides.add(side)
        lesion = made.effects["lesion"]
        assert made.latent["lesion_ml"] == pytest.approx(lesion.sum() * 0.008)
        # A ball of this volume fills all of the ball around its centre; these leave parts of it out.
        z, y, x = np.indices(lesion.shape)
        away = np.sqrt(sum((i - c) ** 2 for i, c in zip((z, y, x), ndimage.center_of_mass(lesion), strict=True)))
        radius = (lesion.sum() * 3 / 4 / np.pi) ** (1 / 3)
        assert lesion[away <= radius].mean() < 0.9
    assert sides == {"left", "right"}


def test_warps_do_not_fold_even_around_wide_ventricles(atlas):
    person = dataclasses.replace(draw_anatomy(0, "sub-0001", 90, "F", "AD"), ventricles_mm=4.0, hippocampus=(5, 5))
    points = head_points(GRID, np.eye(4))
    points = deform(points, draw_fields(0, "sub-0001").at(points)[:3], person, atlas)
    slopes = torch.gradient(points, spacing=GRID.spacing_mm, dim=(3, 2, 1))  # along x, y, z
    determinant = torch.linalg.det(torch.stack(slopes, -1).permute(1, 2, 3, 0, 4))
    inside = determinant[atlas.tissue.at(points)[4] > 0.5]
    assert inside.median() > 0.5
    assert (inside <= 0).float().mean() < 1e-4


def test_two_sessions_share_the_anatomy_alone(scan):
    first, second, other = scan(), scan(session="ses-02"), scan("sub-0002")
    assert {**first.latent, "pose": 0, "lesion_ml": 0} == {**second.latent, "pose": 0, "lesion_ml": 0}
    assert not np.array_equal(first.image, second.image)

    assert _alike(first, second) > 0.85
    assert _alike(first, second) > _alike(first, other) + 0.2


def test_a_travelling_head_is_one_anatomy_in_several_contrasts(scan):
    here, there, other = scan(session="ses-A"), scan(session="ses-OOD", site="OOD"), scan("sub-0002", session="ses-A")
    assert {**here.latent, "pose": 0} == {**there.latent, "pose": 0} and here.latent["pose"] != there.latent["pose"]
    assert _alike(here, there) > _alike(here, other) + 0.1
    dark, bright = (np.percentile(made.image[made.brain], 5) for made in (here, there))
    assert bright > 1.15 * dark  # CSF is bright at OOD


@pytest.mark.parametrize("wrong", [{"diagnosis": "MCI"}, {"sex": "male"}, {"site": "D"}])
def test_unknown_labels_are_refused(scan, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected one of"):
        scan(**wrong)


# --- on disk


def test_the_folder_is_bids_and_says_procedural(cohort):
    description = json.loads((cohort / "dataset_description.json").read_text(encoding="utf-8"))
    assert "no person was scanned" in description["Name"] and description["BIDSVersion"]
    people = pd.read_csv(cohort / "participants.tsv", sep="\t")
    expected = pd.concat([draw_participants(4, seed=SEED), draw_travelling(1, seed=SEED)])
    assert list(people["participant_id"]) == list(expected["participant"].unique())
    for diagnosis, alzheimers, stroke in people[["diagnosis", "alzheimers", "stroke"]].itertuples(index=False):
        wanted = {"CN": (0, 0), "AD": (1, np.nan), "stroke": (np.nan, 1)}[diagnosis]
        np.testing.assert_equal((alzheimers, stroke), wanted)
    assert expected["session"].eq("ses-02").any()
    for row in expected.to_dict("records"):
        participant, session = row["participant"], row["session"]
        name = f"{participant}/{session}/anat/{participant}_{session}"
        image = nib.load(cohort / f"{name}_T1w.nii.gz")
        brain = nib.load(cohort / "derivatives" / "sample" / f"{name}_desc-brain_mask.nii.gz")
        assert image.get_data_dtype() == np.int16 and nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert np.array_equal(np.asarray(image.dataobj) > 0, np.asarray(brain.dataobj) == 1)
        masks = effect_masks(cohort, participant, session)
        assert masks == effect_masks(cohort, participant.removeprefix("sub-"), session.removeprefix("ses-"))
        assert {"ventricles", "cortex", "hippocampus", "cerebellum"} <= set(masks)
        assert ("lesion" in masks) == (row["diagnosis"] == "stroke")
        if session == "ses-02":
            ages = pd.read_csv(cohort / participant / f"{participant}_sessions.tsv", sep="\t", index_col=0)["age"]
            assert ages["ses-02"] == row["age"] > ages["ses-01"]


def test_sessions_of_a_travelling_head_are_read_with_their_sites(cohort):
    heads = read_cohort(cohort).query("split == 'travelling'")
    assert dict(zip(heads["session"], heads["site"], strict=True)) == {site: site for site in SITES}
    assert heads["participant"].unique() == ["T01"] and heads["dataset"].unique() == ["procedural-travelling"]


def test_effects_are_written_on_the_grid_of_prepared_scans(cohort, tmp_path):
    scans = read_cohort(cohort).head(2)
    index, _ = prepare(scans, tmp_path, Preparation(Grid((36, 48, 40), 4.0), "none", "given"), workers=0)
    store = Store.open(tmp_path)
    assert write_effects(cohort, store, index, tmp_path) >= 8 and write_effects(cohort, store, index, tmp_path) == 0
    place, affine = read_nifti(tmp_path / "effects" / f"{index['scan'][0]}_ventricles.nii.gz")
    assert place.shape == store.grid.shape and np.allclose(affine, store.grid.affine)
    image, mask = store.read(index["scan"][0])
    inside = place > 0
    assert (inside & mask).sum() > 0.9 * inside.sum() > 0 and image[inside & mask].mean() < image[mask].mean() - 0.5


def test_effects_are_written_again_if_their_scan_was_prepared_again(cohort, tmp_path):
    scans = read_cohort(cohort).iloc[[0, -1]]  # the last is a healthy travelling head
    for spacing in (8.0, 6.0):
        settings = Preparation(Grid((18, 24, 20), spacing), "none", "given")
        index, _ = prepare(scans, tmp_path, settings, workers=0)
        store = Store.open(tmp_path)
        gone = tmp_path / "effects" / f"{index['scan'][1]}_lesion.nii.gz"
        write_nifti(gone, np.zeros((2, 3, 4)), np.eye(4))  # as of a cohort of another size, where it had a stroke
        assert write_effects(cohort, store, index, tmp_path) >= 8 and not gone.exists()
        for path in (tmp_path / "effects").iterdir():
            assert np.allclose(read_nifti(path)[1], store.grid.affine)
        prepare(scans, tmp_path, settings, workers=0)  # skips what is there
        assert write_effects(cohort, store, index, tmp_path) == 0


def test_effect_masks_of_an_unknown_participant(cohort):
    with pytest.raises(FileNotFoundError, match="no masks of known effects"):
        effect_masks(cohort, "sub-9999", "ses-01")


@pytest.mark.slow
def test_the_bytes_are_the_same_in_other_processes(cohort, cache, tmp_path):
    scans = draw_participants(4, seed=SEED).head(2)
    make_scans(scans, tmp_path / "two", seed=SEED, workers=2, cache=cache)
    made = _files(tmp_path / "two")
    known = _files(cohort)
    assert len([path for path in made if path.name.endswith("_T1w.nii.gz")]) == 2
    assert all(known[path] == data for path, data in made.items())


def test_an_interrupted_making_goes_on_and_a_finished_one_is_kept(cohort, cache):
    images = sorted(cohort.rglob("*_T1w.nii.gz"))
    lost, kept = images[0], images[1]
    data, written = lost.read_bytes(), kept.stat().st_mtime_ns
    assert sample_cohort(4, seed=SEED, workers=1, cache_dir=cache, travelling=1) == cohort
    assert kept.stat().st_mtime_ns == written
    (cohort / "complete.json").unlink()
    lost.unlink()
    assert sample_cohort(4, seed=SEED, workers=1, cache_dir=cache, travelling=1) == cohort
    assert lost.read_bytes() == data
    assert kept.stat().st_mtime_ns == written
    assert json.loads((cohort / "complete.json").read_text(encoding="utf-8"))["scans"] == len(images)
