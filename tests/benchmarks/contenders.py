"""What `training.py` measures, each function in a process of its own: `python contenders.py NAME OPTIONS`.

Ours, the published recipe on stock KerasHub, Transformers + PEFT. Options and results
are JSON; the function that measures a library imports it.
"""

import json
import os
import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

TEMPLATE = "Instruction:\n{instruction}\n\nResponse:\n{response}"
BATCHES = (256, 512, 1024, 2048)  # tokens a batch: PEFT is measured with its best, ours with 1,024


def prepare(folder, rows, repeats, geometry, dtype):
    """One set of weights in the formats of both libraries, and the rows as text and as token ids."""
    import gemma_lora as gl

    gl.setup(seed=0)
    import keras
    import keras_hub
    import numpy as np
    import sentencepiece

    texts = (folder / "texts.jsonl").read_text().splitlines()
    texts = [TEMPLATE.format(**json.loads(line)) for line in texts]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_prefix=str(folder / "vocabulary"), vocab_size=8000, model_type="bpe", byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n", "\n\n"], add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    tokenizer = keras_hub.models.GemmaTokenizer(str(folder / "vocabulary.model"))
    keras.config.set_dtype_policy(dtype)
    backbone = keras_hub.models.GemmaBackbone(**geometry)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer)
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    model.save_to_preset(str(folder / "keras"))
    model.export_to_transformers(str(folder / "transformers"))
    ids = [[2, *map(int, np.asarray(tokenizer(text))), 1] for text in texts]
    (folder / "ids.json").write_text(json.dumps(ids))
    return {
        "parameters": backbone.count_params(),
        "median tokens": statistics.median(map(len, ids)),
    }


def prepare_real(folder, rows, repeats, model):
    """A trained Gemma in the formats of both libraries, and the rows of texts.jsonl as token ids."""
    import gemma_lora as gl
    from gemma_lora.tokens import tokenizer_of

    gl.setup(seed=0)
    model = gl.load(model)
    model.save_to_preset(str(folder / "keras"))
    gl.export_transformers(model, folder / "transformers", verify=False)
    records = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    tokenizer = tokenizer_of(model)
    ids = []
    for record in records:
        text = TEMPLATE.format(**record)
        ids.append([tokenizer.bos_id, *tokenizer.encode([text]), tokenizer.id_of("<eos>")])
    (folder / "ids.json").write_text(json.dumps(ids))
    return {"parameters": model.count_params(), "median tokens": statistics.median(map(len, ids))}


def real_tokens(folder, length, part):
    """Tokens of these rows without padding: inputs, cut at the sequence length."""
    return sum(
        min(len(ids) - 1, length) for ids in json.loads((folder / "ids.json").read_text())[part]
    )


def stock_model(preset, length, dtype="float32"):
    """A model as the published recipe has it, compiled. No `gl.setup`: it would speed up what is to be stock."""
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "1.00"
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    model = keras_hub.models.CausalLM.from_preset(str(preset), dtype=dtype)
    model.preprocessor.sequence_length = length
    compile_as_recipe(model)
    return model


def compile_as_recipe(model):
    """Put the published recipe's adapters, loss and optimizer on a stock model."""
    import keras

    model.backbone.enable_lora(rank=4)
    optimizer = keras.optimizers.AdamW(learning_rate=5e-5, weight_decay=0.01)
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale"])
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=optimizer,
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )


def recipe(folder, rows, repeats, length, dtype):
    """The published recipe, on stock KerasHub."""
    model = stock_model(folder / "keras", length, dtype)
    texts = (folder / "texts.jsonl").read_text().splitlines()[:rows]
    texts = [TEMPLATE.format(**json.loads(line)) for line in texts]
    gemma3 = type(model).__name__ == "Gemma3CausalLM"

    def fit(texts):
        # Gemma 3's preprocessor wants prompts apart from responses.
        data = {"prompts": [""] * len(texts), "responses": texts} if gemma3 else texts
        model.fit(data, batch_size=1, verbose=0)

    start = time.monotonic()
    fit(texts[:4])
    compiling = {"compiling": time.monotonic() - start}
    found = {"tokens": [], "seconds": []}
    for turn in range(repeats):  # each step is like the other, so a part of the rows in each turn
        part = slice(turn * rows // repeats, (turn + 1) * rows // repeats)
        start = time.monotonic()
        fit(texts[part])
        found["seconds"].append(time.monotonic() - start)
        found["tokens"].append(real_tokens(folder, length, part))
    return found | compiling | peak()


def rates(folder, length, rows, repeats, epoch):
    """Seconds of epochs, after a first call that compiled."""
    seconds = []
    for _ in range(repeats):
        begin = time.monotonic()
        epoch()
        seconds.append(time.monotonic() - begin)
    return {
        "tokens": [real_tokens(folder, length, slice(rows))] * repeats,
        "seconds": seconds,
    } | peak()


def peak():
    """Peak memory of this process in MiB: of the accelerator where there is one, else resident."""
    found = {"peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if "jax" in sys.modules and sys.modules["jax"].default_backend() != "cpu":
        found["peak MiB"] = (
            sys.modules["jax"].local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**20
        )
    elif "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        found["peak MiB"] = sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return found


def ours(folder, rows, repeats, length, loss_on, dtype, batch_tokens=1024):
    """`gl.fit`: an epoch that compiles, then those that count."""
    import gemma_lora as gl

    gl.setup(seed=0)
    import keras

    from gemma_lora.tokens import encode

    model = gl.load(folder / "keras", dtype=dtype)
    gl.enable_lora(model, rank=4)
    data = gl.load_records(folder / "texts.jsonl").select(range(rows))
    options = {"template": "recipe", "sequence_length": length, "loss_on": loss_on}
    tokens, ends = int(encode(model, data, **options).lengths.sum()), [time.monotonic()]
    clock = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.monotonic())
    )
    gl.fit(
        model,
        data,
        epochs=1 + repeats,
        batch_tokens=batch_tokens,
        callbacks=[clock],
        verbose=0,
        **options,
    )
    first, *seconds = (later - earlier for earlier, later in pairwise(ends))
    return {
        "tokens": [tokens] * repeats,
        "seconds": seconds,
        "compiling": first - statistics.median(seconds),
    } | peak()


def peft(folder, rows, repeats, length, dtype, tried_rows=300):
    """Transformers + PEFT in a bare loop: unpadded but for the longest of a batch, grouped by length."""
    import random

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder / "transformers", dtype=getattr(torch, dtype)
    ).to(device)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    )
    model.train()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=5e-5, weight_decay=0.01)
    ids = [row[: length + 1] for row in json.loads((folder / "ids.json").read_text())[:rows]]

    def epoch(ids, batch_tokens):
        batches, size = [], 0
        for row in sorted(ids, key=len):
            if not batches or (size + 1) * len(row) > batch_tokens:
                batches, size = [*batches, []], 0
            batches[-1].append(row)
            size += 1
        random.Random(0).shuffle(batches)
        for batch in batches:
            longest = max(map(len, batch))
            tokens = torch.tensor(
                [row + [0] * (longest - len(row)) for row in batch], device=device
            )
            mask = torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=device
            )
            loss = model(
                input_ids=tokens, attention_mask=mask, labels=tokens.where(mask == 1, -100)
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    tried = {}
    for batch_tokens in BATCHES:
        begin = time.monotonic()
        epoch(ids[:tried_rows], batch_tokens)
        tried[batch_tokens] = time.monotonic() - begin
    best = min(tried, key=tried.get)
    return rates(folder, length, rows, repeats, lambda: epoch(ids, best)) | {"batch_tokens": best}


def steps(folder, rows, repeats, shape):
    """Seconds of a bare `jax.value_and_grad` step and of `gl.fit`'s, in turns, on the same full batch."""
    import gemma_lora as gl

    gl.setup(seed=0)
    import jax
    import jax.numpy as jnp
    import numpy as np

    ids = np.random.default_rng(0).integers(4, 8000, shape).astype("int32")
    batch = (
        {"token_ids": ids, "padding_mask": np.ones_like(ids)},
        ids,
        np.ones(ids.shape, "float32"),
    )

    # Each is cut to the whole length, so that every token of every batch is a real one.
    record = {"instruction": "Name rivers.", "context": "", "response": "river " * shape[1]}
    records = [record] * (10 * shape[0])
    size = {"batch_size": shape[0], "sequence_length": shape[1]}

    def fit_of(targets):
        model = gl.load(folder / "keras")
        gl.enable_lora(model, rank=4, targets=targets)

        def forty_steps():
            # Four epochs of ten steps, so that encoding the records hardly counts.
            start = time.monotonic()
            gl.fit(model, records, **size, epochs=4, loss_on="all", verbose=0)
            return (time.monotonic() - start) / 40

        return forty_steps

    query_value = fit_of("query_value")
    all_linear = fit_of("all_linear")
    model = gl.load(folder / "keras")
    gl.enable_lora(model, rank=4)
    own, frozen = (
        [v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables)
    )

    def loss_of(own, frozen):
        logits, _ = model.stateless_call(own, frozen, batch[0])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][..., None], axis=-1)
        return -jnp.sum(picked[..., 0] * batch[2]) / jnp.sum(batch[2])

    @jax.jit
    def step(own, first, second, frozen):
        slopes = jax.grad(loss_of)(own, frozen)
        first = [0.9 * m + 0.1 * g for m, g in zip(first, slopes, strict=True)]
        second = [0.999 * v + 0.001 * g * g for v, g in zip(second, slopes, strict=True)]
        own = [
            w - 5e-5 * m / (jnp.sqrt(v) + 1e-7) for w, m, v in zip(own, first, second, strict=True)
        ]
        return own, first, second

    state = own, [jnp.zeros_like(v) for v in own], [jnp.zeros_like(v) for v in own]

    def bare():
        nonlocal state
        start = time.monotonic()
        for _ in range(10):
            state = step(*state, frozen)
        jax.block_until_ready(state)
        return (time.monotonic() - start) / 10

    ways = {"bare": bare, "query_value": query_value, "all_linear": all_linear}
    seconds = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, way in ways.items():
            seconds[name].append(way())
    return {name: values[1:] for name, values in seconds.items()}


def first_step(folder, rows, repeats):
    """Seconds from the start of a process, and from the call of `fit`, to the end of the first step."""
    start = time.monotonic()
    import gemma_lora as gl

    gl.setup(seed=0)
    import keras

    model = gl.load("tiny_gemma_en")
    gl.enable_lora(model, rank=4)
    train, _ = gl.load_tiny_world()
    begin, ends = time.monotonic(), []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: ends.append(time.monotonic())
    )
    gl.fit(model, train.select(range(8)), callbacks=[clock], verbose=0)
    return {"from fit": ends[0] - begin, "from the start": ends[0] - start}


def scale(folder, rows, repeats):
    """Cost and memory of `gl.fit` on `tiny_gemma_en`, by the number of Dolly rows."""
    import gemma_lora as gl

    gl.setup(seed=0)
    import keras

    model = gl.load("tiny_gemma_en")
    gl.enable_lora(model, rank=4)
    data, ends = gl.load_records(folder / "texts.jsonl").select(range(rows)), [time.monotonic()]
    clock = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.monotonic())
    )
    from gemma_lora.tokens import encode

    tokens = int(encode(model, data).lengths.sum())
    gl.fit(model, data, epochs=1 + repeats, callbacks=[clock], verbose=0)
    seconds = [later - earlier for earlier, later in pairwise(ends[1:])]
    return {"rows": rows, "tokens": tokens, "seconds": seconds} | peak()


def tiny_recipe(folder, rows, repeats):
    """The published recipe on `tiny_gemma_en`: seconds of its epoch, and the held-out loss it ends with."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    import gemma_lora as gl
    from gemma_lora.models import TINY_FOLDER

    train, held_out = gl.load_tiny_world()
    model = stock_model(TINY_FOLDER, 256)
    ends = [time.monotonic()]
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: ends.append(time.monotonic())
    )
    texts = [gl.TEMPLATES["recipe"].prompt(row) + row["response"] for row in train]
    model.fit(texts, batch_size=1, callbacks=[clock], verbose=0)
    step = statistics.median(later - earlier for earlier, later in pairwise(ends))
    whole = ends[-1] - ends[0]
    loss = gl.evaluate(model, held_out, template="recipe", answers=False).loss
    return {
        "loss": loss,
        "with compiling": whole,
        "seconds": whole - (ends[1] - ends[0]) + step,
        "steps": len(train),
    }


def tiny_ours(folder, rows, repeats, target):
    """`gl.fit` as recommended on `tiny_gemma_en`: seconds until the held-out loss is the recipe's, or lower."""
    import gemma_lora as gl

    gl.setup(seed=0)
    import keras
    import numpy as np

    from gemma_lora.lora import adapter_weights

    train, held_out = gl.load_tiny_world()
    model = gl.load("tiny_gemma_en")
    gl.enable_lora(model, rank=4)
    start = [np.array(keras.ops.copy(weight.value)) for weight in adapter_weights(model)]
    losses = {}
    for most in (*range(2, 20, 2), *range(20, 285, 5)):
        for weight, value in zip(adapter_weights(model), start, strict=True):
            weight.assign(value)
        ends = [time.monotonic()]

        def clock(step, logs, ends=ends, most=most):
            ends.append(time.monotonic())
            model.stop_training = step + 1 >= most

        stop = keras.callbacks.LambdaCallback(on_train_batch_end=clock)
        gl.fit(model, train, callbacks=[stop], verbose=0)
        between = sorted(later - earlier for earlier, later in pairwise(ends))
        losses[most] = gl.evaluate(model, held_out, answers=False).loss
        if losses[most] <= target:
            break
    whole, few = ends[-1] - ends[0], between[: -2 or None]
    warm = statistics.mean(few) * len(between) if few else whole
    return {"losses": losses, "steps": most, "seconds": warm, "with compiling": whole}


def real_answers(folder, rows, repeats, library):
    """48 greedy tokens for 1, 8 and 32 prompts: the first call, which compiles, and one after it."""
    records = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    prompts = [TEMPLATE.format(**record | {"response": ""}) for record in records]
    new, found = 48, {}
    if library == "ours":
        import gemma_lora as gl

        gl.setup(seed=0)
        from gemma_lora import sampling

        model = gl.load(folder / "keras")
        # private: no answer ends early (at <unk>, if at all), so that both libraries
        # compute as many tokens.
        task = sampling._task
        sampling._task = lambda *arguments: task(*arguments)._replace(ends=(3,))

        def answer(few):
            gl.generate(model, few, template=None, max_new_tokens=new)
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder / "transformers", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder / "transformers", padding_side="left")

        def answer(few):
            inputs = tokenizer(few, return_tensors="pt", padding=True)
            with torch.no_grad():
                model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    for count in (1, 8, 32):
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            answer(prompts[:count])
            seconds.append(round(time.monotonic() - start, 2))
        found[str(count)] = {"first": seconds[0], "then": seconds[1]}
    return found | peak()


def answers(folder, rows, repeats, how):
    """64 prompts of mixed lengths, 64 new tokens each (none ends early): `gl.generate`, or stock `generate` in a loop.

    The loop gives all prompts one length, and so compiles once, but its short prompts
    get longer answers ("stock"); or each its own, and compiles for each length ("stock,
    own lengths").
    """
    import gemma_lora as gl

    if how == "ours":
        gl.setup(seed=0)
    model = gl.load(folder / "keras")
    texts = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    prompts = [row["instruction"] for row in texts[:48]]
    prompts += [row["instruction"] + " " + row["response"][:200] for row in texts[48:64]]
    sizes, new = [len(model.preprocessor.tokenizer(prompt)) + 1 for prompt in prompts], 64
    found = {"seconds": [], "tokens": len(prompts) * new}
    model.compile(sampler="greedy")
    for _ in range(2):  # compiling, compiled
        start = time.monotonic()
        if how == "ours":
            gl.generate(model, prompts, template=None, max_new_tokens=new)
        else:
            lengths = [(size if "own" in how else max(sizes)) + new for size in sizes]
            for prompt, length in zip(prompts, lengths, strict=True):
                model.generate(prompt, max_length=length)
            found["tokens"] = sum(lengths) - sum(sizes)
        found["seconds"].append(time.monotonic() - start)
    return found


if __name__ == "__main__":
    options = {"rows": 0, "repeats": 1} | json.loads(sys.argv[2])
    options["folder"] = Path(options["folder"])
    print("\n" + json.dumps(globals()[sys.argv[1]](**options)))
