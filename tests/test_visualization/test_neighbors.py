import pytest
import torch

from cae_mm.visualization.neighbors import mark_patch, nearest_images, nearest_patches


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_nearest_patches_are_those_of_brute_force():
    torch.manual_seed(0)
    tokens, query = torch.randn(7, 5, 4), torch.randn(4)
    best = []  # similarity, image, patch: of each image its best patch
    for i, image in enumerate(tokens):
        best.append(max((cosine(token, query), i, j) for j, token in enumerate(image)))
    want = sorted(best, reverse=True)[:3]
    similarities, images, patches = nearest_patches(query, tokens.split(2), 3)
    assert [*zip(images.tolist(), patches.tolist(), strict=True)] == [each[1:] for each in want]
    assert similarities.tolist() == pytest.approx([each[0] for each in want])
    scaled = nearest_patches(query * 9, tokens.split(3), 3)  # neither length nor batch counts
    torch.testing.assert_close(scaled, (similarities, images, patches))


def test_more_neighbors_than_images():
    with pytest.raises(ValueError, match='8 neighbours were asked for, but there are 7 images'):
        nearest_patches(torch.randn(4), [torch.randn(7, 5, 4)], 8)


def test_nearest_images_are_those_of_brute_force():
    torch.manual_seed(0)
    queries, gallery = torch.randn(3, 6), torch.randn(9, 6) * torch.arange(1, 10)[:, None]
    similarities, ids = nearest_images(queries, gallery, 4)
    for query, values, rows in zip(queries, similarities, ids, strict=True):
        want = sorted(((cosine(query, other), i) for i, other in enumerate(gallery)), reverse=True)
        assert rows.tolist() == [i for _, i in want[:4]]
        assert values.tolist() == pytest.approx([value for value, _ in want[:4]], rel=1e-5)


def test_a_patch_is_marked_in_its_place():
    picture = torch.zeros(3, 32, 48)
    marked = mark_patch(picture, 4, (2, 3))  # second row, second column
    changed = marked.ne(0).any(0)
    assert changed[16:32, 16:32].any() and changed[16, 16] and changed[31, 31]
    assert not changed[:16].any() and not changed[:, :16].any() and not changed[:, 32:].any()
