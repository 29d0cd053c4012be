"""A plain timm ViT becomes hierarchical over the frames of videos of any length: attend inside a frame, then over a clip."""

import timm
import torch

from hlip_kernels import HierarchicalAttention, Layout, switch_level


class VideoViT(torch.nn.Module):
    def __init__(self, name="vit_tiny_patch16_224", pretrained=False):
        super().__init__()
        self.vit = timm.create_model(name, pretrained=pretrained, num_classes=0)
        for block in self.vit.blocks:  # the same weights, under the same names
            attn = HierarchicalAttention(self.vit.embed_dim, block.attn.num_heads, qkv_bias=True)
            attn.load_state_dict(block.attn.state_dict())
            block.attn = attn

    def forward(self, videos):
        """videos: a list of (frames, 3, 224, 224), each with its own number of frames -> (len(videos), C)."""
        vit, frames = self.vit, torch.cat(videos)
        patches = vit.patch_embed(frames) + vit.pos_embed[:, 1:]  # (all frames, 196, C)
        lengths = [[patches.shape[1]] * len(video) for video in videos]
        layout = Layout.from_lengths(lengths, num_prefix=1, levels=("frame", "clip")).to(frames.device)
        cls = (vit.cls_token + vit.pos_embed[:, :1])[0].expand(len(frames), -1)  # one per frame
        x, level = torch.cat([patches.flatten(0, 1), cls]), "frame"
        for i, block in enumerate(vit.blocks):
            following = "clip" if i % 3 == 2 else "frame"
            x, level = switch_level(x.contiguous(), layout, level, following), following
            x = x + block.attn(block.norm1(x), layout, level)
            x = x + block.mlp(block.norm2(x))
        x = switch_level(x, layout, level, "clip")
        return vit.norm(x)[layout.prefix_rows("clip")]


if __name__ == "__main__":
    with torch.no_grad():
        print(VideoViT().eval()([torch.randn(n, 3, 224, 224) for n in (4, 7, 1)]).shape)
