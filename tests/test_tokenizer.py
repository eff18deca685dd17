import pytest
from test_batches import RECORDS

from gemma_lora.tokens import encode, load_tokenizer


def test_a_model_without_tokenizer_is_refused(random_model):
    model = random_model("gemma")
    model.preprocessor = None
    with pytest.raises(ValueError, match="no SentencePiece tokenizer"):
        encode(model, RECORDS)


def test_a_tokenizer_loads_without_weights_and_encodes_like_the_model(tiny):
    tokenizer = load_tokenizer("tiny_gemma_en")
    assert len(tokenizer) == tiny.backbone.vocabulary_size
    assert encode(tokenizer, RECORDS).examples == encode(tiny, RECORDS).examples
    ids = tokenizer.encode(["a\n\nb ü"])
    assert "".join(tokenizer.tokens(ids)) == "a⏎⏎b▁<0xC3><0xBC>"
    with pytest.raises(ValueError, match="No preset or folder"):
        load_tokenizer("tiny_gema_en")
