import itertools

import torch

from fit3d_ns.analysis import match_clusters


def test_match_clusters__undoes_a_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 5, (6, 7), generator=generator)
    permutation = torch.tensor([3, 0, 4, 1, 2])
    labels = permutation[reference]
    assert torch.equal(match_clusters(labels, reference, 5)[labels], reference)


def test_match_clusters__finds_the_largest_overlap_of_all_renamings() -> None:
    generator = torch.Generator().manual_seed(1)
    labels, reference = torch.randint(0, 4, (2, 60), generator=generator)
    best = max(int((torch.tensor(renamed)[labels] == reference).sum()) for renamed in itertools.permutations(range(4)))
    renamed = match_clusters(labels, reference, 4)
    assert sorted(renamed.tolist()) == [0, 1, 2, 3]
    assert int((renamed[labels] == reference).sum()) == best
