"""A model's vocabulary: text to token ids and back."""

from collections.abc import Mapping
from pathlib import Path

import keras_hub
import sentencepiece

from gemma_lora.models import TINY, from_preset, state_of
from gemma_lora.runtime import quiet
from gemma_lora.templates import Template, get_template, text_pieces


class Tokenizer:
    """A model's SentencePiece vocabulary, used directly: the same on every version of KerasHub, and quick."""

    def __init__(self, keras_tokenizer):
        if keras_tokenizer is None or not getattr(keras_tokenizer, "proto", None):
            raise ValueError("The model has no SentencePiece tokenizer: load it with gl.load(), preprocessor included.")
        with quiet():
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=keras_tokenizer.proto)
        self.bos_id, self.pad_id = keras_tokenizer.start_token_id, keras_tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self._pieces)

    def encode(self, pieces: list[str]) -> list[int]:
        """Encode each piece by itself and join the ids."""
        return [token for ids in self._pieces.encode(pieces) for token in ids]

    def decode(self, ids: list[int]) -> str:
        """Turn ids into text; control tokens vanish."""
        return self._pieces.decode([int(token) for token in ids])

    def tokens(self, ids: list[int]) -> list[str]:
        """The token of each id, made visible: ▁ is a space, ⏎ a line break, `<0x..>` a byte without a token."""
        return [token.replace("\n", "⏎") for token in self._pieces.id_to_piece([int(token) for token in ids])]

    def id_of(self, token: str) -> int:
        """The id of a control token such as `<eos>`."""
        token_id = self._pieces.piece_to_id(token)
        if token_id == self._pieces.unk_id() and token != "<unk>":
            raise ValueError(f"The model's vocabulary has no token {token!r}; choose another template.")
        return token_id

    def prompt(self, template: str | Template | None, record: str | Mapping[str, str]) -> list[int]:
        """Encode `<bos>` and the rendered prompt; with `template=None`, the text as it stands."""
        pieces = text_pieces(record) if template is None else get_template(template).pieces(record)
        return [self.bos_id, *self.encode(pieces)]


def load_tokenizer(preset: str | Path = TINY) -> Tokenizer:
    """Load a model's tokenizer without its weights: enough to prepare data, and a download of a few megabytes.

    >>> tokenizer = load_tokenizer("tiny_gemma_en")
    >>> tokenizer.tokens(tokenizer.encode(["Name a river."]))
    ['N', 'ame', '▁a', '▁river', '.']
    """
    return Tokenizer(from_preset(keras_hub.tokenizers.Tokenizer, preset))


def tokenizer_of(model) -> Tokenizer:
    """The model's `Tokenizer`, made once; a `Tokenizer` is its own."""
    if isinstance(model, Tokenizer):
        return model
    state = state_of(model)
    state.tokenizer = state.tokenizer or Tokenizer(getattr(model.preprocessor, "tokenizer", None))
    return state.tokenizer
