"""The text tower (open_clip's Hugging Face encoder) and its tokenizer, from the hub, a local folder, or nothing at all."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..storage import reason
from .text_files import load_tokenizer, load_weights, read_config
from .variants import Variant

# A BERT that learns in minutes on a CPU: for demos and tests.
TINY_BERT = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "vocab_size": 1024,
}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def text_tower(config: Variant, text: str | Path | Mapping, *, pretrained: bool = False) -> nn.Module:
    """open_clip's ``HFTextEncoder``: a BERT, the last hidden state of ``[CLS]``, and a linear projection without bias.

    Args:
        config: gives the output dimension and the published text model.
        text: ``"published"``, a folder, a Hugging Face id, or a mapping of ``BertConfig`` fields; see ``create_model``.
        pretrained: also load the weights of that model.
    """
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    if isinstance(text, Mapping) and pretrained:
        raise ValueError("text_pretrained needs a text model with weights: a folder or a Hugging Face id")
    source = config.text_model if text == "published" else text
    if isinstance(text, Mapping):
        described = BertConfig(**text)
    elif text == "published" and not pretrained:
        described = BertConfig()  # both published text models have the shape of BERT base: nothing is downloaded
    else:
        described = read_config(source)
    # Written out, because open_clip reads configs from folders only; what it would load itself might ask to run code.
    with tempfile.TemporaryDirectory() as folder:
        described.save_pretrained(folder)
        tower = HFTextEncoder(
            folder, config.embed_dim, pooler_type="cls_last_hidden_state_pooler", proj_type="linear", pretrained=False
        )
    if pretrained:
        tower.transformer = load_weights(source, tower.config)
    return tower


class Tokenizer:
    """Text to token ids ``(N, L)`` int64, padded to the longest text of the call and cut at ``context_length``.

    Args:
        source: a folder with a tokenizer, or a Hugging Face id.
        context_length: the most tokens of one text, special ones included.

    Raises:
        OSError: there is none. ValueError: it cannot be used; two texts are tried.
    """

    def __init__(self, source: str | Path, context_length: int = 256):
        self.source, self.context_length = str(source), context_length
        self.tokenizer = load_tokenizer(self.source)
        try:
            self(["one", "one and two"])
        except Exception as error:  # tokenizers raises plain ones
            raise ValueError(f"{source}: the tokenizer cannot be used ({reason(error)})") from error

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty((0, 1), dtype=torch.int64)
        return self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        ).input_ids

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files into a folder, from where it loads again."""
        self.tokenizer.save_pretrained(str(folder))


def train_tokenizer(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int = 1024, context_length: int = 256
) -> Tokenizer:
    """A lower-case WordPiece tokenizer with the words of one's own reports, saved into ``folder``. Needs no network.

    The vocabulary is every character, alone and as a continuation, and then the most frequent words; the same texts always
    give the same one (the trainer of ``tokenizers`` breaks ties by hash order, so that runs would not repeat).

    Raises:
        ValueError: there is no text to learn from.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    plain = BertWordPieceTokenizer(lowercase=True)._tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in plain.pre_tokenizer.pre_tokenize_str(plain.normalizer.normalize_str(text)))
    if not words:
        raise ValueError("no text to learn a tokenizer from: all reports are empty")
    characters = sorted({character for word in words for character in word})
    pieces = [*_SPECIAL, *characters, *(f"##{character}" for character in characters)]
    pieces += [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0])) if len(word) > 1]
    vocabulary = {piece: i for i, piece in enumerate(pieces[: max(vocab_size, len(_SPECIAL) + 2 * len(characters))])}
    learnt = BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fast = BertTokenizerFast(tokenizer_object=learnt._tokenizer, do_lower_case=True)
    fast.save_pretrained(str(folder))
    return Tokenizer(folder, context_length)
