"""A small run of every kernel, for compute-sanitizer: ragged, with empty segments, prefix rows and dead rows."""

import torch

from hlip_kernels import Layout, attention, patchify, segment_mean, switch_level
from hlip_kernels.backends import BACKENDS, Query
from hlip_kernels.backends.triton import config
from hlip_kernels.pattern import Plan


def main() -> None:
    layout = Layout.from_grids([[(2, 5, 7), (3, 9, 9)], [], [(0, 2, 2), (1, 1, 1), (2, 8, 16)]], num_prefix=2, row_multiple=64)
    layout = layout.to("cuda")
    config.FUSED_FROM = 0  # the fast backward pass on segments as small as these
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 80):
            qkv = torch.randn(layout.num_rows, 3, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True)
            for level, options in (("slice", {}), ("study", {}), ("slice", {"neighbours": 1, "summary": "study"})):
                out, lse = attention(*qkv.unbind(1), layout, level, backend="triton", return_lse=True, **options)
                (out.float().sum() + lse.sum()).backward()
            if dtype == torch.bfloat16:  # whole slices in shared memory; 9 x 9 alone, the others in packs
                out, lse = attention(*qkv.unbind(1), layout, "slice", backend="cuda", return_lse=True)
                (out.float().sum() + lse.sum()).backward()
            attention(*qkv.unbind(1), layout, "study", backend="triton", deterministic=False).float().sum().backward()
            query = Query.of(qkv[:, 0], Plan.of(layout.pattern("study")))
            for backend in ("hopper", "hopper_ordered", "flash"):  # where they can
                if backend in BACKENDS and BACKENDS[backend].supports(query):
                    attention(*qkv.unbind(1), layout, "study", backend=backend).float().sum().backward()
        if dtype == torch.bfloat16:  # whole segments, several for each block that stays on a multiprocessor
            count = torch.cuda.get_device_properties("cuda").multi_processor_count + 8
            for lengths in ([66, 90] * count, [140, 66] * (count // 2 + 1)):
                many = Layout.from_lengths(lengths, num_prefix=1, levels=("slice",)).to("cuda")
                qkv = torch.randn(many.num_rows, 3, 2, 64, device="cuda", dtype=dtype, requires_grad=True)
                attention(*qkv.unbind(1), many, "slice", backend="cuda").float().sum().backward()
        x = torch.randn(layout.num_rows, 40, device="cuda", dtype=dtype, requires_grad=True)
        y = switch_level(switch_level(x * 1, layout, "slice", "scan"), layout, "scan", "slice")
        (segment_mean(y, layout, "scan").float().sum() + segment_mean(y, layout, "study").float().sum()).backward()
    volumes = [torch.rand(5, 17, 33, device="cuda", requires_grad=True), torch.rand(9, 8, 16, device="cuda")]
    patchify(volumes, (2, 8, 8), mean=0.449, std=0.226).sum().backward()
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
