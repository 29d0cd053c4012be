"""A varlen flash attention written naively in torch, to stand in for the real ones on a CPU, and the backend around it."""

import torch

from hlip_kernels.backends.flash import FlashBackend
from hlip_kernels.backends.flash_implementations import Implementation


class StandIn(Implementation):
    """Like kernels that copy whole tiles of ``tile`` rows: what lies beyond the end of a segment is read, and weighed by 0.

    Holds callers to the contract: segments follow one another from the first row to the last, none empty.
    """

    name = "stand-in"

    def __init__(self, tile=1, apart=None):
        self.tile = tile
        self.reads_beyond = tile - 1 if apart is None else apart
        self.calls = []
        self.inputs = []

    def version(self):
        return "1"

    def why_not(self, capability, head_dim, deterministic):
        return ""

    def _segments(self, q, k, v, cu_seqlens, max_seqlen):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
        lengths = cu_seqlens.diff()
        assert cu_seqlens[0] == 0 and (lengths > 0).all() and max_seqlen == lengths.max()
        assert q.shape == k.shape == v.shape and cu_seqlens[-1] == len(q)
        self.inputs.append((q, k, v))
        bounds = cu_seqlens.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            read = slice(start, min(len(q), start + -(-(stop - start) // self.tile) * self.tile))
            own = torch.arange(read.stop - read.start) < stop - start
            yield slice(start, stop), read, own[:, None] & own

    def forward(self, q, k, v, cu_seqlens, max_seqlen, scale):
        self.calls.append("forward")
        out = torch.full_like(q, float("nan"))  # in the strides of q, as the real ones do
        lse = torch.full((q.shape[1], len(q)), float("nan"))
        for own, read, mask in self._segments(q, k, v, cu_seqlens, max_seqlen):
            n = own.stop - own.start
            a, b, c = (t[read].float().transpose(0, 1) for t in (q, k, v))
            logits = (a @ b.transpose(1, 2) * scale)[:, :n].masked_fill(~mask[:n], float("-inf"))
            lse[:, own] = torch.logsumexp(logits, -1)
            p = (logits - lse[:, own, None]).exp()
            out[own] = (p @ c).transpose(0, 1).to(out.dtype)
        return out, lse

    def backward(self, grad_out, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, deterministic):
        self.calls.append("backward" if deterministic else "backward in any order")
        assert out.shape == grad_out.shape == q.shape and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
        grads = [torch.full_like(t, float("nan")) for t in (q, k, v)]
        for own, read, mask in self._segments(q, k, v, cu_seqlens, max_seqlen):
            n = own.stop - own.start
            a, b, c, g, o = (t[read].float().transpose(0, 1) for t in (q, k, v, grad_out, out))
            logits = a @ b.transpose(1, 2) * scale - lse[:, read, None]
            p = logits.masked_fill(~mask, float("-inf")).exp()
            ds = p * (g @ c.transpose(1, 2) - (g * o).sum(-1, keepdim=True)) * scale
            for grad, value in zip(grads, (ds @ b, ds.transpose(1, 2) @ a, p.transpose(1, 2) @ g), strict=True):
                grad[own] = value[:, :n].transpose(0, 1).to(grad.dtype)
        return tuple(grads)


class StandInBackend(FlashBackend):
    """The flash backend as it is, but on CPU tensors; triton's interpreter runs the kernels that move rows."""

    dtypes = (torch.float16, torch.float32)

    def _why_not_here(self, query):
        return "" if query.device_type == "cpu" else "stand-in: on the CPU only"
