"""The 38 questions that a learner arrives with: the cells that answer each."""

import nbformat
import pytest

from notebooks import NOTEBOOKS

# Question: the cells that answer it, by running something or, where nothing can be run,
# in a paragraph.
ANSWERED = {
    "1 which Gemma, and why": "03 presets, 03 presets-choice",
    "3 how it was trained": "03 presets-choice",
    "4 why Keras, and what JAX changes": "10 why-keras, 10 same-logits, 10 same-answers",
    "5 what pretraining leaves, and what room": "03 room",
    "6 which steps open the weights": "01 check-goal, 01 consent, 01 load",
    "7 how credentials stay secret": "01 find, 01 login, 01 secret",
    "8 memory for each variant, and a free tier": (
        "01 budget, 01 budget-compiled, 01 budget-picture, 01 variants"
    ),
    "9 memory fragmentation": "01 fragmentation, 01 fragmentation-picture, 01 fraction",
    "10 why Dolly, and what is in it": "02 records, 02 categories, 02 categories-picture",
    "11 why JSON Lines": "02 json-lines, 02 bad-line",
    "12 what 10, 100, 1,000 rows buy": "04 rows, 04 rows-picture",
    "13 what the template is worth": "05 template, 05 template-picture",
    "14 when to keep context": "02 context, 05 context, 05 context-answers",
    "16 text, tokens, ids, padding and mask": "02 tokens, 02 mask, 02 shift, 02 padding",
    "17 how a name becomes a model": "03 folder",
    "18 what the tokenizer does": "03 tokenizer",
    "19 what generic answers reveal": "03 asks, 03 knows",
    "20 how samplers change answers": "03 samplers, 03 samplers-picture, 03 samplers-texts",
    "21 a low-rank update in one picture": "04 picture, 04 update",
    "22 from how many parameters to how many": "04 predict, 04 enable, 04 share",
    "23 what freezing keeps": "04 frozen, 05 off, 05 worse",
    "24 why norms and biases are not decayed": "04 decay",
    "28 what sequence length and batch size cost": "02 lengths, 04 cost",
    "29 what loss and accuracy mean": "04 curve, 04 measured, 04 curve-text",
    "30 why one epoch, and what more do": "04 second",
    "31 is it just memorising": "05 memory",
    "32 if the runtime dies": "04 dies, 04 dies-note",
    "33 how the answers changed": "05 same, 05 after, 05 measure-picture",
    "34 what got worse": "05 worse, 05 failures",
    "35 why answers are cut off": "03 stop, 05 cut",
    "36 keep, share, merge, deploy": "04 keep, 05 switch, 10 merge, 10 upload, 10 export, 10 serve",
}
# Question: what it waits for.
OPEN = {
    "2 the model's parts": "a notebook on the architecture",
    "15 my own domain's data": "a notebook on a domain of one's own",
    "25 which learning rate": "a notebook that sweeps",
    "26 rank and targets": "a notebook that sweeps",
    "27 QLoRA and PEFT": "a notebook on quantized bases; PEFT runs in 10, peft-read",
    "37 scaling up": "a notebook on scaling",
    "38 before letting others use it": "a notebook on evaluation and safety",
}


def number(question: str) -> int:
    return int(question.split()[0])


def test_no_question_is_lost():
    assert sorted(map(number, [*ANSWERED, *OPEN])) == list(range(1, 39))


@pytest.mark.parametrize("question", ANSWERED)
def test_the_cells_that_answer_are_there_and_most_were_run(question):
    cells = {
        f"{p.stem[:2]} {cell.id}": cell
        for p in NOTEBOOKS
        for cell in nbformat.read(p, as_version=4).cells
    }
    answers = [cells[name] for name in ANSWERED[question].split(", ")]
    assert all(
        cell.outputs for cell in answers if cell.cell_type == "code" and "assert" not in cell.source
    )
    assert number(question) == 3 or any(
        cell.cell_type == "code" and cell.outputs for cell in answers
    )
