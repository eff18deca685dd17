"""Make models and tokenizers from presets where KerasHub's own call does not do.

Two kinds of presets: a Gemma 3 with a part for pictures, of which only the text part is
wanted; and a folder that Transformers 5 has saved, whose vocabulary is in
`tokenizer.json` alone. Everything else goes to KerasHub as it is. Downloads are in
`access.fetch`, GGUF files in `access.gguf`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import keras_hub

# Control tokens that no text turns into, in Gemma's own SentencePiece models.
_NEVER_IN_TEXT = ("<pad>", "<eos>", "<bos>", "<unk>")

# What Transformers calls the families whose tokenizers can be made here.
_MODEL_TYPES = ("gemma", "gemma2", "gemma3", "gemma3_text")
# Kinds that KerasHub itself reads.
_OTHER_GEMMAS = ("gemma4", "gemma4_text", "gemma3n")


def load_preset(kind: type, source: str, **options):
    """Make a KerasHub object from a preset, as `kind.from_preset` does.

    Args:
        kind: `keras_hub.models.CausalLM` or `keras_hub.tokenizers.Tokenizer`.
        source: A folder, a preset's name or a handle.
        options: For `from_preset`.

    Raises:
        ValueError: `tokenizer.json` holds another kind of tokenizer.
    """
    from keras_hub.src.utils.preset_utils import get_preset_loader

    models = keras_hub.models
    if not issubclass(kind, models.CausalLM | keras_hub.tokenizers.Tokenizer):
        return kind.from_preset(source, **options)
    # private: KerasHub's loader of a preset, and its attribute `config`
    config = get_preset_loader(source).config
    if config.get("model_type", "gemma") not in (*_MODEL_TYPES, *_OTHER_GEMMAS):
        raise ValueError(
            f"{source} is of the kind {config['model_type']!r}, and not a Gemma 1, 2 or 3."
        )
    tokenizer = _tokenizer_from_json(source, config)
    if not issubclass(kind, models.CausalLM):
        return kind.from_preset(source, **options) if tokenizer is None else tokenizer
    with_pictures = has_vision(config)
    if tokenizer is None and not with_pictures:
        return kind.from_preset(source, **options)
    if with_pictures:
        # The weights of the text part are the same bit by bit.
        options |= {"vision_encoder": None, "image_size": None}
    backbone = models.Backbone.from_preset(source, **options)
    family = "Gemma3" if isinstance(backbone, models.Gemma3Backbone) else "Gemma"
    make_preprocessor = getattr(models, f"{family}CausalLMPreprocessor")
    no_pictures = {"image_converter": None} if family == "Gemma3" else {}
    if tokenizer is None:
        preprocessor = make_preprocessor.from_preset(source, **no_pictures)
    else:
        preprocessor = make_preprocessor(tokenizer=tokenizer, **no_pictures)
    return getattr(models, f"{family}CausalLM")(backbone=backbone, preprocessor=preprocessor)


def read_config(folder: Path) -> dict:
    """Read a preset's config.json. Raises ValueError if it is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json is of no model: it is a {type(config).__name__}.")
    return config


def has_vision(config: dict) -> bool:
    """Return whether a preset's config.json is of a Gemma 3 with a part for pictures.

    Args:
        config: In the format of KerasHub, or that of Transformers.
    """
    if config.get("class_name") == "Gemma3Backbone":
        return config["config"].get("vision_encoder") is not None
    return config.get("model_type") == "gemma3" and "vision_config" in config


def backbone_config(folder: Path) -> tuple[str, dict, bool]:
    """Return a preset's class of backbone, its text part's arguments, and `has_vision`.

    Args:
        folder: A preset in the format of KerasHub, or that of Transformers.

    Raises:
        ValueError: It is in neither format, or of no Gemma that is known here.
    """
    from keras_hub.src.utils.preset_utils import get_preset_loader

    config = read_config(folder)
    with_pictures = has_vision(config)
    if "class_name" in config:
        return config["class_name"], config["config"], with_pictures
    if config.get("model_type") not in _MODEL_TYPES:
        kind = config.get("model_type", "another format")
        raise ValueError(f"{folder} is of {kind}, and not a Gemma 1, 2 or 3.")
    # private: the converter of KerasHub's loader for Transformers' format
    loader = get_preset_loader(str(folder))
    if with_pictures:
        # Its converter would draw the weights of the part for pictures.
        config = config["text_config"] | {"model_type": "gemma3_text"}
    arguments = loader.converter.convert_backbone_config(config)
    return loader.check_backbone_class().__name__, arguments, with_pictures


def _tokenizer_from_json(source: str, config: dict):
    """Return a tokenizer made from `tokenizer.json`; None if it need not be made."""
    from keras_hub.src.utils.preset_utils import check_file_exists, get_file

    # private: KerasHub's way to look for a preset's files, wherever it is
    if config.get("model_type") not in _MODEL_TYPES or check_file_exists(source, "tokenizer.model"):
        return None
    if not check_file_exists(source, "tokenizer.json"):
        raise ValueError(
            f"{source} has neither tokenizer.model nor tokenizer.json. Copy tokenizer.model there "
            "from the folder of its base model."
        )
    proto = proto_from_json(json.loads(Path(get_file(source, "tokenizer.json")).read_text("utf-8")))
    if config["model_type"].startswith("gemma3"):
        return keras_hub.models.Gemma3Tokenizer(proto=proto, has_vision_tokens=False)
    return keras_hub.models.GemmaTokenizer(proto=proto)


def proto_from_json(content: dict) -> bytes:
    """Turn the contents of a `tokenizer.json` into a SentencePiece model.

    Such a file lists which two pieces join into one, the first pair first.
    SentencePiece joins the pair whose result has the highest score. So the score of a
    piece is minus the place of the first pair that makes it.

    Raises:
        ValueError: The file is not of a tokenizer like Gemma's.
    """
    model = content.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            "tokenizer.json holds no tokenizer like Gemma's (BPE with bytes for what it lacks), "
            f"but one of the type {model.get('type')!r}."
        )
    from sentencepiece import sentencepiece_model_pb2

    kinds = sentencepiece_model_pb2.ModelProto().SentencePiece
    ids = dict(model["vocab"])
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    ids |= added
    scores: dict[str, float] = {}
    for pair in model["merges"]:
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        scores.setdefault(left + right, -float(len(scores)))
    texts = sorted(ids, key=ids.__getitem__)
    types = []
    for text in texts:
        if text in _NEVER_IN_TEXT:
            types.append(kinds.CONTROL)
        elif text.startswith("<0x") and len(text) == 6:
            types.append(kinds.BYTE)
        else:
            types.append(kinds.USER_DEFINED if text in added else kinds.NORMAL)
    # A piece that no pair makes is a single character, which is there from the start.
    lowest = -float(len(scores))
    return sentencepiece_proto(texts, [scores.get(text, lowest) for text in texts], types)


def sentencepiece_proto(
    texts: Sequence[str], scores: Sequence[float], types: Sequence[int], *, dummy_prefix=False
) -> bytes:
    """Return a vocabulary as the bytes of a SentencePiece model like Gemma's.

    Args:
        texts: The pieces. Plain spaces in them become SentencePiece's "▁".
        scores: Of two pairs, that with the higher score is joined first.
        types: SentencePiece's numbers for kinds of pieces, one for each.
        dummy_prefix: Whether a text begins with a space that it does not have.

    Raises:
        ValueError: A control token of Gemma is missing.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(texts, scores, types, strict=True):
        if kind == model.SentencePiece.CONTROL and text not in _NEVER_IN_TEXT:
            # Such as `<start_of_turn>`. To SentencePiece it is a piece that a text may
            # hold, or it would cut it, and with it every template of turns.
            kind = model.SentencePiece.USER_DEFINED
        model.pieces.add(piece=text.replace(" ", "▁"), score=score, type=int(kind))
    trainer = model.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(texts)
    trainer.byte_fallback = True
    trainer.split_digits = True
    trainer.allow_whitespace_only_pieces = True
    places = {text: place for place, text in enumerate(texts)}
    for name in ("pad", "eos", "bos", "unk"):
        if f"<{name}>" not in places:
            raise ValueError(f"The vocabulary has no <{name}>, which every Gemma's has.")
        setattr(trainer, f"{name}_id", places[f"<{name}>"])
        setattr(trainer, f"{name}_piece", f"<{name}>")
    # SentencePiece wants one piece of this kind. Some files call it a control token.
    model.pieces[trainer.unk_id].type = model.SentencePiece.UNKNOWN
    rule = model.normalizer_spec
    rule.name = "identity"
    rule.add_dummy_prefix = dummy_prefix
    rule.remove_extra_whitespaces = False
    rule.escape_whitespaces = True
    return model.SerializeToString()
