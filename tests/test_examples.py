"""The examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


def test_video_vit_on_single_frames_is_the_vit():
    from video_vit import VideoViT

    model = VideoViT().eval()
    frames = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        import timm

        plain = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
        plain.load_state_dict(model.vit.state_dict())
        expected = plain.forward_features(frames)[:, 0]
        torch.testing.assert_close(model([frames[:1], frames[1:]]), expected, rtol=1e-4, atol=1e-4)
        together = model([torch.randn(3, 3, 224, 224), frames[:1]])
        torch.testing.assert_close(together[1:], expected[:1], rtol=1e-4, atol=1e-4)


def test_video_vit_takes_fewer_than_forty_lines():
    source = (EXAMPLES / "video_vit.py").read_text()
    body = [line for line in source.split("class VideoViT")[1].split("if __name__")[0].splitlines() if line.strip()]
    assert len(body) < 40
    done = subprocess.run([sys.executable, EXAMPLES / "video_vit.py"], capture_output=True, text=True)
    assert done.returncode == 0 and "torch.Size([3, 192])" in done.stdout, done.stderr


def test_the_training_config_reads():
    pytest.importorskip("yaml")
    from hlip.evaluate import benchmark
    from hlip.train import load_config

    assert load_config(EXAMPLES / "train.yaml").data.train != "simulated"
    assert benchmark(EXAMPLES / "prompts.yaml").classes
