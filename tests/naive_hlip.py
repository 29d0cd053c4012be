"""The published data path, transcribed naively from its description: partition, concatenate, attend, take means.

One dense batch ``(B, N, 1, D, H, W)`` in which every scan has the same shape. Units of a level are rows of a batch dimension:
``(B * N * d, 1, ...)`` for slices, ``(B * N, ...)`` for scans, ``(B, ...)`` for studies; a change of level regroups the patch
tokens, and copies prefix tokens to all children or averages them over all children. Only weights come from the model.
"""

import torch
import torch.nn.functional as F


def forward(state, config, x, scan_order=None):
    """Pooled features ``(B, P, features)`` from the encoder's state dict and config, in the dtype of ``state``."""
    B, N = x.shape[:2]
    C, H = config.width, config.heads
    x = F.conv3d(x.flatten(0, 1), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=config.patch_size)
    d, h, w = x.shape[2:]
    table = state["spatial_posemb"]
    if table.shape[1:4] != (d, h, w):
        table = F.interpolate(table.permute(0, 4, 1, 2, 3), size=(d, h, w), mode="trilinear").permute(0, 2, 3, 4, 1)
    x = x.permute(0, 2, 3, 4, 1) + table  # (B*N, d, h, w, C)
    x = x.view(B, N, d, h * w, C)
    if config.max_scans:
        order = torch.arange(N) if scan_order is None else scan_order
        x = x + state["sequential_posemb"][0, order].view(1, N, 1, 1, C)

    prefix = torch.cat([state[f"{name}_token"] for name in config.prefix], dim=1)  # (1, P, C)
    P = prefix.shape[1]
    units = {"slice": B * N * d, "scan": B * N, "study": B}
    level = config.levels[0]
    patches = x.reshape(units[level], -1, C)
    prefix = prefix.expand(units[level], -1, -1)

    def regroup(patches, prefix, old, new):
        if old == new:
            return patches, prefix
        patches = patches.reshape(units[new], -1, C)
        if units[new] <= units[old] and ["slice", "scan", "study"].index(new) > ["slice", "scan", "study"].index(old):
            prefix = prefix.reshape(units[new], -1, P, C).mean(1)
        else:
            prefix = prefix[:, None].expand(-1, units[new] // units[old], -1, -1).reshape(units[new], P, C)
        return patches, prefix

    def turned(t):
        """Queries or keys ``(units, H, P + patches, D)``: a third of a head's channels by each coordinate in the scan."""
        place = torch.arange(d * h * w).repeat(B * N).view(t.shape[0], 1, -1)
        channels = C // H // 3 // 2 * 2
        parts = [t[:, :, P:, 3 * channels :]]
        for coordinate in (place % w, place // w % h, place // (h * w)):  # from the last to the first
            s = (3 - len(parts)) * channels
            x = t[:, :, P:, s : s + channels]
            angle = coordinate[..., None] * 10000.0 ** -(torch.arange(0, channels, 2, dtype=t.dtype) / channels)
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angle), angle)
            parts.insert(0, torch.view_as_real(z).flatten(-2))
        return torch.cat([t[:, :, :P], torch.cat(parts, -1)], 2)

    for i, new in enumerate(config.levels):
        patches, prefix = regroup(patches, prefix, level, new)
        level = new
        rows = torch.cat([prefix, patches], dim=1)  # prefix first, as published
        w_ = lambda name, i=i: state[f"blocks.{i}.{name}"]  # noqa: E731
        y = F.layer_norm(rows, (C,), w_("norm1.weight"), w_("norm1.bias"), 1e-6)
        q, k, v = (
            F.linear(y, w_("attn.qkv.weight"), w_("attn.qkv.bias")).view(*y.shape[:2], 3, H, C // H).permute(2, 0, 3, 1, 4)
        )
        if config.rotary:
            q, k = turned(q), turned(k)
        attention = torch.softmax(q @ k.transpose(-1, -2) * (C // H) ** -0.5, dim=-1) @ v
        rows = rows + F.linear(attention.transpose(1, 2).flatten(2), w_("attn.proj.weight"), w_("attn.proj.bias"))
        y = F.layer_norm(rows, (C,), w_("norm2.weight"), w_("norm2.bias"), 1e-6)
        y = F.gelu(F.linear(y, w_("mlp.fc1.weight"), w_("mlp.fc1.bias")))
        rows = rows + F.linear(y, w_("mlp.fc2.weight"), w_("mlp.fc2.bias"))
        prefix, patches = rows[:, :P], rows[:, P:]
    patches, prefix = regroup(patches, prefix, level, "study")
    rows = F.layer_norm(torch.cat([prefix, patches], 1), (C,), state["norm.weight"], state["norm.bias"], 1e-6)
    prefix, patches = rows[:, :P], rows[:, P:]
    if config.pool == "cls":
        return prefix
    return torch.cat([prefix, patches.mean(1, keepdim=True).expand(-1, P, -1)], dim=-1)
