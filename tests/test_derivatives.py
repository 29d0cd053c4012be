"""What can be differentiated how: forward mode says no instead of zero, linear ops have second derivatives, torch.func."""

import pytest
import torch
from attention_truth import RAGGED, make
from torch.autograd import forward_ad

from hlip_kernels import attention, patchify, segment_mean, switch_level

LAYOUT = make(RAGGED, 1)
X = torch.randn(LAYOUT.num_rows, 4, dtype=torch.float64)
VOLUME = torch.randn(3, 4, 5, dtype=torch.float64)
LINEAR = {
    "segment_mean": (lambda x: segment_mean(x, LAYOUT, "scan"), X),
    "switch_level": (lambda x: switch_level(x * 1, LAYOUT, "slice", "scan"), X),
    "switch_level on a copy": (lambda x: switch_level(x, LAYOUT, "study", "slice", inplace=False), X),
    "patchify": (lambda v: patchify([v], (2, 2, 2), mean=0.4, std=0.5, dtype=torch.float64), VOLUME),
    "patchify flat": (lambda v: patchify(v.flatten(), (2, 2, 2), shapes=[v.shape], dtype=torch.float64), VOLUME),
}


def heads(x):
    return x.unflatten(1, (2, 2))


@pytest.mark.parametrize("name", ["attention", *LINEAR])
def test_forward_mode_is_refused_not_zero(name):
    plain = lambda x: attention(*[heads(x)] * 3, LAYOUT, "scan")  # noqa: E731
    f, x = LINEAR.get(name, (plain, X))
    words = 'backend="reference"' if name == "attention" else "linear"
    for call in (
        lambda: torch.func.jvp(f, (x,), (x,)),
        lambda: torch.func.jacfwd(f)(x),
        lambda: torch.func.jvp(torch.func.vmap(f), (x[None],), (x[None],)),
    ):
        with pytest.raises(NotImplementedError, match=f"{name.split()[0]} has no forward-mode derivative.*{words}"):
            call()
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="forward-mode"):
            f(forward_ad.make_dual(x, x))
        f(x)  # a constant beside it is nobody's business


def test_forward_mode_on_the_reference_backend():
    f = lambda x: attention(heads(x), heads(x.sin()), heads(x * 2), LAYOUT, "scan", backend="reference").flatten(1)  # noqa: E731
    tangent = torch.randn_like(X)
    got = torch.func.jvp(f, (X,), (tangent,))[1]
    step = 1e-6
    torch.testing.assert_close(got, (f(X + step * tangent) - f(X - step * tangent)) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_ops_can_be_differentiated_again_and_again(name):
    f, x = LINEAR[name]
    x = (x[:, :1] if x is X else x).clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: f(x).sin(), x, fast_mode=True)
    # Three times: of a linear op, only what is around it counts.
    cubic = [f(x).pow(4).sum(), f(x).pow(4).sum()]
    for _ in range(3):
        cubic[0] = torch.autograd.grad(cubic[0], x, create_graph=True)[0].sum()
    step = f(torch.ones_like(x)) - f(torch.zeros_like(x))
    torch.testing.assert_close(cubic[0], (24 * f(x) * step**3).sum())


def test_a_gradient_penalty_through_the_ops():
    """The norm of a gradient, as in R1 regularisation, is minimised through the ops that are around attention."""
    x = X.clone().requires_grad_()
    y = switch_level(x.sin(), LAYOUT, "slice", "scan")
    y = segment_mean(y, LAYOUT, "study").square().sum() + y.square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("old, new", [("slice", "study"), ("study", "scan")])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_switch_level_under_vmap(old, new, dim):
    run = lambda x: switch_level(x, LAYOUT, old, new, inplace=False)  # noqa: E731
    separate = [torch.randn(LAYOUT.num_rows, 4, requires_grad=True) for _ in range(3)]
    expected = torch.stack([run(x) for x in separate], dim)
    batch = torch.stack(separate, dim).detach().requires_grad_()
    got = torch.func.vmap(run, in_dims=dim, out_dims=dim)(batch)
    assert torch.equal(got, expected)
    grads = torch.stack(torch.autograd.grad(expected.square().sum(), separate), dim)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), batch)[0], grads)


def test_switch_level_in_place_under_vmap():
    batch = torch.randn(3, LAYOUT.num_rows, 4)
    expected = torch.stack([switch_level(x, LAYOUT, "slice", "scan", inplace=False) for x in batch])
    torch.func.vmap(lambda x: switch_level(x, LAYOUT, "slice", "scan"))(batch)
    assert torch.equal(batch, expected)
