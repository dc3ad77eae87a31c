"""What is said of an encoder that saw whom it is tested on; `tests/evaluate/test_who_is_who.py` has the refusals."""

import pytest

from kit.cohort.identity import participant_ids
from kit.cohort.split import LeakageError
from kit.store.leakage import check_apart, check_encoder, seen_by, unnamed_scans
from kit.store.store import Store


@pytest.mark.parametrize(("dataset", "recorded", "ending"), [
    ("made", True, ""),
    ("?made", True, " (by name alone: without names of datasets these may be other people)"),
    ("made", False, " (by name alone: without names of datasets these may be other people)"),  # by an older kit
])
def test_only_people_of_an_unnamed_dataset_are_seen_by_name_alone(store, capsys, dataset, recorded, ending):
    """The encoder saw everybody's first session, the second of eight people is the test."""
    rows = store.index.assign(dataset=dataset)
    ids, again = participant_ids(rows), rows["participant"].duplicated()
    record = seen_by(store, rows[~again], ids[~again])
    if not recorded:
        del record["seen"]
    check_encoder(record, store, rows[again], ids[again], allow=True)
    assert capsys.readouterr().out == f"SEEN IN PRETRAINING: 8 of 8 participants, 0 of 8 scans{ending}\n"


def test_a_dataset_with_other_punctuation_has_the_same_people(store):
    again = store.index["participant"].duplicated()
    first, second = store.index[~again].assign(dataset="OASIS-3"), store.index[again]
    record = seen_by(store, first, participant_ids(first))
    aliases = {"oasis4/2": ("oasis-3/2", "oasis4/2")}
    for dataset, known, seen in (
            ("OASIS3", None, 8), ("oasis_3", None, 8), ("OASIS4", None, 0), ("OASIS4", aliases, 1)):
        rows = second.assign(dataset=dataset)
        ids = participant_ids(rows)
        parts = {"train": (store, first, participant_ids(first)), "test": (store, rows, ids)}
        if not seen:
            check_encoder(record, store, rows, ids, aliases=known)
            check_apart(parts, known)
            continue
        with pytest.raises(LeakageError, match=f"{seen} of 8 participants to be evaluated were seen in pretraining"):
            check_encoder(record, store, rows, ids, aliases=known)
        if known is None:
            with pytest.raises(LeakageError, match=f"8 participants are .*: OASIS-3/0.. and {dataset}/0.."):
                check_apart(parts)


def test_people_without_a_name_in_a_dataset_that_the_encoder_saw_may_have_been_seen(store):
    again = store.index["participant"].duplicated()
    record = seen_by(store, store.index[~again], participant_ids(store.index[~again]))
    nameless = store.index.assign(participant="?" + store.index["scan"])
    other = Store(store.folder, nameless, store.record)
    assert unnamed_scans(record, other, nameless[again]) == 8
    assert unnamed_scans(record, other, nameless[again].assign(dataset="elsewhere")) == 0
    same = seen_by(other, nameless[~again], participant_ids(nameless[~again]))  # each scan of this table is a person
    assert unnamed_scans(same, other, nameless[again]) == 0
