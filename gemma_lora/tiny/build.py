"""Build `tiny_gemma_en` from nothing: its corpus, its vocabulary, its weights.

    python -m gemma_lora.tiny.build

takes about forty minutes on two CPU cores. Keras's BackupAndRestore keeps the state of each finished epoch, so that the
same command, after a stop half way, goes on from there.
The same seed gives the same corpus and vocabulary byte for byte; weights also depend on the CPU and the versions.
"""

import argparse
import io
import shutil
from pathlib import Path

import numpy as np

from gemma_lora import runtime
from gemma_lora.tiny.corpus import corpus

PRESET = Path(__file__).parent / "tiny_gemma_en"
DOCUMENTS, HELD_OUT_SEED, SEED = 30_000, 1, 0
VOCABULARY_SIZE = 2048
SHAPE = dict(num_layers=4, num_query_heads=4, num_key_value_heads=1, hidden_dim=192, intermediate_dim=1024, head_dim=48)
ROW, BATCH = 128, 16  # tokens a row, rows a step
EPOCHS, LEARNING_RATE = 5, 2e-3


CARD = """# tiny_gemma_en

A teaching model of the Gemma architecture, built from nothing by the project gemma_lora. **It is not a Google model**,
holds no weights of one, and is of no use but to show what fine-tuning does.

- **Architecture**: `GemmaCausalLM`, {parameters:,} parameters, {num_layers} layers of width {hidden_dim},
  {num_query_heads} query heads, {num_key_value_heads} key/value head of width {head_dim}, float32.
- **What it knows**: `gemma_lora/tiny/world.py`: some facts about countries and animals, and how some things work, as
  plain English prose. It has never seen a question or an instruction. Other text it can read, but not understand.
- **Training**: `python -m gemma_lora.tiny.build`, {epochs} epochs over {tokens:,} generated tokens; loss on held-out
  prose {loss:.3f} nats a token, most of which is the free choice of what to tell next.
- **Limits**: the facts were written from general knowledge and checked by reading; it answers nothing else, and what it
  is not tuned to answer it makes up.
- **Licence**: Apache-2.0, like the project.
"""


def train_vocabulary(documents: list[str]) -> bytes:
    """Train a SentencePiece vocabulary laid out like Gemma's, and return it as a serialized model.

    Ids 0 to 3 are `<pad> <eos> <bos> <unk>`; turn marks and newlines are tokens of their own; any other character
    falls back to its UTF-8 bytes, so every text can be encoded and decoded again.
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for document in documents for line in document.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n", "\n\n"],
        required_chars="".join(map(chr, range(33, 127))),
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def packed_rows(documents: list[str], vocabulary: bytes) -> np.ndarray:
    """Join the documents, each as `<bos> ... <eos>`, and cut them into rows.

    Returns:
        int32 array of shape (rows, ROW + 1): inputs and, one to the right, targets.
    """
    import sentencepiece

    encoder = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    ids = [i for document in encoder.encode(documents, add_bos=True, add_eos=True) for i in document]
    rows = (len(ids) - 1) // ROW
    return np.stack([ids[i * ROW : (i + 1) * ROW + 1] for i in range(rows)]).astype("int32")


def build(folder: Path = PRESET, *, epochs: int = EPOCHS, work: Path = Path("artifacts/tiny_build")) -> Path:
    """Train the vocabulary and the model, and save them as a KerasHub preset.

    Args:
        folder: Where the preset goes.
        epochs: Times that the whole corpus is read.
        work: Where the state of an unfinished build is kept.
    """
    runtime.setup(seed=SEED)
    import keras
    import keras_hub

    documents = corpus(documents=DOCUMENTS, seed=SEED)
    vocabulary = train_vocabulary(documents)
    rows = packed_rows(documents, vocabulary)
    held_out = packed_rows(corpus(documents=400, seed=HELD_OUT_SEED), vocabulary)
    print(f"{len(documents):,} documents, {rows.size:,} tokens, held out {held_out.size:,}")

    tokenizer = keras_hub.models.GemmaTokenizer(proto=vocabulary)
    model = keras_hub.models.GemmaCausalLM(
        keras_hub.models.GemmaBackbone(vocabulary_size=tokenizer.vocabulary_size(), **SHAPE),
        keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=ROW),
    )
    print(f"{model.count_params():,} parameters")
    steps = -(-len(rows) // BATCH) * epochs
    trainer = keras.Model(model.inputs, model.outputs)
    trainer.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                0.0, steps, alpha=0.01, warmup_target=LEARNING_RATE, warmup_steps=min(300, steps // 10)
            ),
            weight_decay=0.01,
            global_clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def features(rows):
        return {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, :-1])}, rows[:, 1:]

    work.mkdir(parents=True, exist_ok=True)
    trainer.fit(
        *features(rows),
        validation_data=features(held_out),
        batch_size=BATCH,
        epochs=epochs,
        callbacks=[keras.callbacks.BackupAndRestore(work / "state")],
        verbose="auto",
    )
    shutil.rmtree(folder, ignore_errors=True)
    model.save_to_preset(str(folder))
    loss = trainer.evaluate(*features(held_out), batch_size=BATCH, verbose=0)
    card = CARD.format(parameters=model.count_params(), tokens=rows.size, epochs=epochs, loss=loss, **SHAPE)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=PRESET)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    print(build(arguments.folder, epochs=arguments.epochs))
