"""What a user writes: `make lint` checks that mypy knows the types of what is returned.

It is not run. The lines with an ignored error hold a mistake, which mypy must find.
"""

from typing import assert_type

import datasets

import gemma_lora as gl

gl.setup(seed=0)
model = gl.load("tiny_gemma_en", dtype="bfloat16")
train, held_out = gl.load_records("mine.jsonl", held_out=0.1, seed=0)
assert_type(train, datasets.Dataset)
assert_type(gl.load_records([{"question": "Why?", "answer": "So."}]), datasets.Dataset)
print(gl.enable_lora(model, rank=4, targets="all_linear").trainable)
history = gl.fit(model, train, validation=held_out, epochs=1, loss_on="response")
print(history.curve[-1], gl.recommended(model).learning_rate)
assert_type(gl.evaluate(model, held_out, judge="contains").share(), float)
print(gl.compare(model, ["Why?"], temperature=0.7)["tuned"])
for piece in gl.stream(model, "Why?", sampler="top_p"):
    assert_type(piece, str)
gl.save_adapter(model, "my-adapter")

gl.fit(model, train, loss_on="answer")  # type: ignore[arg-type]
gl.fit(model, train, lr=1e-4)  # type: ignore[call-arg]
gl.evaluate(model, held_out, judge="close")  # type: ignore[arg-type]
