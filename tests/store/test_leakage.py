"""What is said of an encoder that saw whom it is tested on; `tests/evaluate/test_who_is_who.py` has the refusals."""

import pytest

from kit.cohort.identity import participant_ids
from kit.store.leakage import check_encoder, seen_by


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
