import pytest
import torch
from sklearn.decomposition import PCA

from cae_mm.visualization.components import paint_patches, principal_components, to_colors


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(4, 6, 8) * torch.linspace(0.1, 2, 8) + 3


def test_scores_are_those_of_a_covariance_by_hand(tokens):
    """Eigenvectors of the covariance of all patches of all images, up to their sign."""
    scores, share = principal_components(tokens)
    centred = tokens.flatten(0, 1).double()
    centred = centred - centred.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    want = (centred @ vectors[:, [-1, -2, -3]]).float().view(4, 6, 3)
    torch.testing.assert_close(scores.abs(), want.abs(), rtol=1e-4, atol=1e-5)
    assert share == pytest.approx(float(values[-3:].sum() / values.sum()))


def test_scores_are_those_of_scikit_learn(tokens):
    scores, share = principal_components(tokens)
    pca = PCA(n_components=3)
    want = torch.from_numpy(pca.fit_transform(tokens.flatten(0, 1).numpy())).view(4, 6, 3)
    torch.testing.assert_close(scores, want.float(), rtol=1e-4, atol=1e-4)
    assert share == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-5)
    assert torch.equal(scores, principal_components(tokens)[0])


def test_one_basis_for_all_images(tokens):
    """The same patch has the same colour in each image."""
    tokens[3, 5] = tokens[0, 1]
    scores = principal_components(tokens)[0]
    torch.testing.assert_close(scores[3, 5], scores[0, 1])
    colors = to_colors(scores)
    torch.testing.assert_close(colors[3, 5], colors[0, 1])


def test_too_few_patches():
    with pytest.raises(ValueError, match='three components of 2 patches of width 8'):
        principal_components(torch.randn(1, 2, 8))


def test_colors_fill_the_range(tokens):
    scores = torch.linspace(-5, 5, 300).view(2, 50, 3)
    colors = to_colors(scores)
    assert colors.amin((0, 1)).tolist() == [0, 0, 0] and colors.amax((0, 1)).tolist() == [1, 1, 1]
    order = colors[..., 0].flatten()
    assert (order.diff() >= 0).all() and order.std() > 0.25


def test_patches_are_painted_in_their_places():
    colors = torch.rand(6, 3)
    picture = paint_patches(colors, (2, 3), (8, 12))
    for i, color in enumerate(colors):
        row, column = divmod(i, 3)
        square = picture[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert (square == color[:, None, None]).all()
