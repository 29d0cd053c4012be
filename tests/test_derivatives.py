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
