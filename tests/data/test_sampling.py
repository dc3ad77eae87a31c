"""Who comes into an epoch: balanced over datasets, two sessions together, the same for (seed, epoch)."""

from collections import Counter

from kit.data.sampling import balanced, batches_of, session_batches

DATASETS = ["large"] * 30 + ["small"] * 6
PEOPLE = [f"{dataset}/{number // 2}" for number, dataset in enumerate(DATASETS)]  # two sessions each


def test_each_dataset_comes_as_often():
    chosen = balanced(DATASETS, seed=0, epoch=1)
    assert Counter(DATASETS[number] for number in chosen) == {"large": 18, "small": 18}
    counts = Counter(chosen)
    assert {counts[number] for number in range(30, 36)} == {3} and max(counts[number] for number in range(30)) == 1
    assert chosen == balanced(DATASETS, 0, 1) != balanced(DATASETS, 0, 2)


def test_a_participant_comes_once_in_a_batch():
    for sampling in ("all", "balanced"):
        batches = batches_of(PEOPLE, DATASETS, 4, seed=0, epoch=3, sampling=sampling)
        assert batches and all(len({PEOPLE[number] for number in batch}) == len(batch) == 4 for batch in batches)
        assert batches == batches_of(PEOPLE, DATASETS, 4, 0, 3, sampling)


def test_two_sessions_stand_together():
    batches = session_batches([*PEOPLE, "large/single"], 4, seed=0, epoch=0)
    seen = Counter()
    for batch in batches:
        firsts, seconds = batch[::2], batch[1::2]
        people = [[*PEOPLE, "large/single"][number] for number in firsts]
        assert len(set(people)) == 4 and [[*PEOPLE, "large/single"][number] for number in seconds] == people
        assert all((first == second) == (first == 36) for first, second in zip(firsts, seconds, strict=True))
        seen.update(people)
    assert max(seen.values()) == 1 and len(batches) == 4
