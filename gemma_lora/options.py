"""Check options, and say in one sentence what is wrong with a call.

Every public function with options wears `with_options`. Whole numbers go through
`whole_number`, so that NumPy's count too. What an option means is decided elsewhere.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import ParamSpec, TypeVar

# No option counts beyond the largest number of 32 bits.
_MOST = 2**31 - 1

P = ParamSpec("P")
R = TypeVar("R")

# What Transformers, PEFT, TRL and Keras call options that are here too. A function is
# only told of names that it has: the first of them.
_CALLED_HERE = {
    "base_model": ("model",),
    "checkpoint": ("checkpoint_dir",),
    "data": ("train",),
    "dataset": ("train",),
    "eval_dataset": ("validation",),
    "learning_rate_schedule": ("learning_rate",),
    "lora_alpha": ("alpha",),
    "lr": ("learning_rate",),
    "max_len": ("max_new_tokens",),
    "max_length": ("max_new_tokens", "sequence_length"),
    "max_seq_len": ("sequence_length",),
    "max_seq_length": ("sequence_length",),
    "max_tokens": ("max_new_tokens",),
    "num_epochs": ("epochs",),
    "num_train_epochs": ("epochs",),
    "output_dir": ("checkpoint_dir",),
    "per_device_train_batch_size": ("batch_size",),
    "prompt": ("prompts",),
    "prompts": ("prompt",),
    "r": ("rank",),
    "random_state": ("seed",),
    "target_modules": ("targets",),
    "test_size": ("held_out",),
    "torch_dtype": ("dtype",),
    "train_dataset": ("train",),
    "val_data": ("validation",),
    "validation_data": ("validation",),
    "validation_split": ("held_out", "validation"),
    "column_mapping": ("columns",),
    "split_ratio": ("held_out",),
}


def with_options(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function say which of its options an unknown one may have meant.

    >>> @with_options
    ... def answer(prompts, *, max_new_tokens=8):
    ...     return prompts
    >>> answer("Why?", max_length=4)
    Traceback (most recent call last):
    ...
    TypeError: answer has no option 'max_length'. Here it is called max_new_tokens.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        try:
            signature.bind(*args, **options)
        except TypeError as error:
            said = _what_is_wrong(function.__name__, signature, args, options, error)
            raise TypeError(said) from None
        return function(*args, **options)

    return checked


def _what_is_wrong(name: str, signature, args: tuple, options: dict, error: TypeError) -> str:
    """Say in a sentence why a call does not fit a signature."""
    known = [*signature.parameters]
    unknown = [option for option in options if option not in known]
    if unknown:
        elsewhere = [ours for ours in _CALLED_HERE.get(unknown[0], ()) if ours in known]
        similar = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.7)
        hint = f"It has: {', '.join(known)}."
        if elsewhere:
            hint = f"Here it is called {elsewhere[0]}."
        elif similar:
            hint = f"Did you mean {similar[0]!r}?"
        return f"{name} has no option {unknown[0]!r}. {hint}"
    kinds = inspect.Parameter
    in_order = [p.name for p in signature.parameters.values() if p.kind != kinds.KEYWORD_ONLY]
    if len(args) > len(in_order):
        named = [option for option in known if option not in in_order]
        return (
            f"{name} takes {' and '.join(in_order) or 'nothing'} without a name. Name the others: "
            f"{named[0]}=..., for example. Received: {len(args)} arguments without a name"
        )
    # Something is missing, or given twice: Python says which.
    return f"{name}: {error}."


def whole_number(name: str, value, *, least: int = 1) -> int:
    """Return an option as Python's integer, NumPy's too.

    >>> whole_number("epochs", 1.5)
    Traceback (most recent call last):
    ...
    ValueError: epochs is a whole number, 1 or more. Received: epochs=1.5

    Raises:
        ValueError: It is no whole number, or less than `least`, or more than any use.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(
            f"{name} is a whole number, {least} or more. Received: {name}={value!r:.80}"
        )
    if value > _MOST:
        raise ValueError(f"{name} is at most {_MOST:,}. Received: {name}={value!r:.80}")
    return int(value)


def is_number(value) -> bool:
    """Return whether a value is a real number, NumPy's too; True and False are not.

    >>> is_number(0.5), is_number("5e-5"), is_number(True)
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def a_path(name: str, value) -> Path:
    """Return an option that is a file or folder, with ~ for the user's own.

    >>> a_path("folder", 5)
    Traceback (most recent call last):
    ...
    TypeError: folder is a path, as text or a pathlib.Path. Received: int, 5

    Raises:
        TypeError: It is no path.
    """
    if not isinstance(value, str | Path):
        raise TypeError(
            f"{name} is a path, as text or a pathlib.Path. "
            f"Received: {type(value).__name__}, {value!r:.60}"
        )
    return Path(value).expanduser()


def some_texts(name: str, value) -> list[str]:
    """Return one text or many as a list.

    >>> some_texts("texts", [{"instruction": "Why?"}])
    Traceback (most recent call last):
    ...
    TypeError: texts is a text, or a list of texts. Received: {'instruction': 'Why?'}

    Raises:
        TypeError: It is something else, or holds it.
    """
    if isinstance(value, str):
        return [value]
    # To go through a dict or a frame would give names of columns.
    has_texts = isinstance(value, Iterable) and not isinstance(value, bytes | Mapping)
    texts = [*value] if has_texts and not hasattr(value, "columns") else [value]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} is a text, or a list of texts. Received: {text!r:.80}")
    return texts


def one_of(name: str, value, choices: tuple[str, ...]) -> str:
    """Return an option that is one of a few names.

    >>> one_of("loss_on", "answer", ("response", "all"))
    Traceback (most recent call last):
    ...
    ValueError: loss_on is "response" or "all". Received: loss_on='answer'

    Raises:
        ValueError: It is another name, or no text.
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        said = f"{', '.join(others)} or {last}"
        raise ValueError(f"{name} is {said}. Received: {name}={value!r:.80}")
    return value
