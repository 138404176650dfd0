import pytest
import torch

from diffusers_terdit.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)], ids=str)
def test_the_step_has_the_singular_vectors_of_the_matrix_and_nearly_equal_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonalize(matrices) @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert 0.5 < values.min() < values.max() < 1.3
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_a_matrix_does_not_depend_on_those_it_is_stacked_with():
    torch.manual_seed(0)
    matrices = torch.stack([torch.randn(8, 12), 1e4 * torch.randn(8, 12), torch.zeros(8, 12)])
    together = orthogonalize(matrices)
    for matrix, step in zip(matrices, together, strict=True):
        torch.testing.assert_close(orthogonalize(matrix[None])[0], step)
    assert not together[2].any()


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizers, weights, steps=3):
    for step in range(steps):
        for weight, gradient in zip(weights, parameters(*(w.shape for w in weights), seed=step + 1), strict=True):
            weight.grad = gradient.detach()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_it_takes_the_steps_of_torch_up_to_its_bfloat16():
    shapes = [(16, 16), (16, 48), (48, 16), (16, 16)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    start = [weight.detach().clone() for weight in ours]
    take_steps([Muon([{"params": ours, "muon": True}], lr=1e-2, weight_decay=0.1)], ours)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    take_steps([reference], theirs)
    for before, our, their in zip(start, ours, theirs, strict=True):
        assert (our - their).norm() < 0.02 * (their - before).norm()


def test_the_other_groups_take_the_steps_of_adamw():
    ours, theirs = parameters((16, 16), (8, 4), (5,)), parameters((16, 16), (8, 4), (5,))
    groups = [{"params": ours[:1], "muon": True}, {"params": ours[1:2], "weight_decay": 0.2}, {"params": ours[2:]}]
    take_steps([Muon(groups, lr=1e-2, betas=(0.8, 0.9))], ours)
    adamw = torch.optim.AdamW([{"params": theirs[1:2], "weight_decay": 0.2}, {"params": theirs[2:]}], lr=1e-2)
    for group in adamw.param_groups:
        group["betas"] = (0.8, 0.9)
    take_steps([adamw], theirs)
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(our, their)


def test_weights_without_a_gradient_stay():
    (weight,) = parameters((8, 8))
    before = weight.detach().clone()
    optimizer = Muon([{"params": [weight], "muon": True}], lr=1e-2)
    optimizer.step()
    assert torch.equal(weight, before)
    assert not optimizer.state
