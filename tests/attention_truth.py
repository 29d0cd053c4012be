"""What hierarchical attention means, written down naively, and the layouts it is tried on.

Nothing here looks at patterns, plans or backends: masks come from the nested lengths alone. tools/stress.py uses it too, on any
device and without hypothesis.
"""

import torch
import torch.nn.functional as F

from hlip_kernels import Layout

# Around every tile edge (16, 32, 64, 128), empty, single, and many tiles.
LENGTHS = (0, 0, 1, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)
PREFIXES = (0, 1, 2, 5)
LEVELS = ("slice", "scan", "study")
HEAD_DIMS = (16, 24, 32, 64, 72, 80, 96, 128, 192, 256)

RAGGED = [[[5, 0, 17], [64, 1]], [], [[130], [], [33, 63, 65]], [[0]]]  # studies of scans of slices


def ragged_lengths(max_rows=450):
    """Nested lengths, some of everything empty, at most ``max_rows`` tokens."""
    from hypothesis import strategies as st  # here, since the Python of the GPU gate may lack it

    scans = st.lists(st.sampled_from(LENGTHS), max_size=4)
    studies = st.lists(st.lists(scans, max_size=3), max_size=3)
    return studies.filter(lambda s: sum(n for study in s for scan in study for n in scan) <= max_rows)


def make(lengths, num_prefix, row_multiple=1):
    return Layout.from_lengths(lengths, num_prefix=num_prefix, row_multiple=row_multiple, levels=LEVELS)


def segments(lengths, level):
    """Row ranges of the patches of every segment of a level, and the (scan, study) each lies in."""
    out, row = [], 0
    scan_number = 0
    for i, study in enumerate(lengths):
        study_start = row
        for scan in study:
            scan_start = row
            for n in scan:
                if level == "slice":
                    out.append(((row, row + n), {"scan": scan_number, "study": i}))
                row += n
            if level == "scan":
                out.append(((scan_start, row), {"study": i}))
            scan_number += 1
        if level == "study":
            out.append(((study_start, row), {}))
    return out


def naive_mask(lengths, num_prefix, num_rows, level, neighbours=0, summary=None):
    """bool ``(R, R)`` from the words of the documentation."""
    found = segments(lengths, level)
    tokens = sum(n for study in lengths for scan in study for n in scan)
    parent = {"slice": "scan", "scan": "study", "study": None}[level]
    mask = torch.zeros(num_rows, num_rows, dtype=torch.bool)

    def patches(s):
        return list(range(*found[s][0]))

    def prefixes(s):
        return list(range(tokens + s * num_prefix, tokens + (s + 1) * num_prefix))

    for s in range(len(found)):
        seen = patches(s) + prefixes(s)
        for other in range(len(found)):
            near = parent is not None and found[other][1][parent] == found[s][1][parent] and abs(other - s) <= neighbours
            if near:
                seen += patches(other) + prefixes(other)
            if summary is not None and found[other][1][summary] == found[s][1][summary]:
                seen += prefixes(other)
        rows = patches(s) + prefixes(s)
        if rows:
            mask[torch.tensor(rows)[:, None], torch.tensor(seen)[None]] = True
    return mask


def naive_attention(q, k, v, mask, scale=None, dtype=torch.float64):
    """Dense masked attention in ``dtype``: out ``(R, H, D)``, lse ``(H, R)``; 0 for rows that see nothing."""
    mask = mask.to(q.device)
    q, k, v = (t.to(dtype).transpose(0, 1) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, float("-inf"))
    alive = mask.any(1)
    logits = torch.where(alive[:, None], logits, torch.zeros_like(logits))
    out = torch.softmax(logits, -1) @ v * alive[:, None]
    lse = torch.logsumexp(logits, -1) * alive
    return out.transpose(0, 1), lse


def sdpa_by_segment(q, k, v, mask, scale=None):
    """torch's own attention in the dtype of the input, one call for each set of rows with the same view: the yardstick."""
    out = (q + k + v) * 0  # keeps every input in the graph
    groups = {}
    for row, seen in enumerate(mask.cpu().numpy()):
        if seen.any():
            groups.setdefault(seen.tobytes(), (seen, []))[1].append(row)
    for seen, rows in groups.values():
        seen, rows = torch.from_numpy(seen).nonzero()[:, 0].to(q.device), torch.tensor(rows, device=q.device)
        part = F.scaled_dot_product_attention(*(t[i].transpose(0, 1)[None] for t, i in ((q, rows), (k, seen), (v, seen))),
                                              scale=scale)  # fmt: skip
        out = out.index_copy(0, rows, part[0].transpose(0, 1))
    return out


def relative(got, truth):
    """Relative error in the Euclidean norm; 0 where both are 0."""
    size = float(truth.detach().double().norm())
    error = float((got.detach().double() - truth.detach().double()).norm())
    return error / size if size else error
