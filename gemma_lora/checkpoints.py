"""Save a run while it goes on, and resume it after a runtime has died.

A checkpoint is one `.npz` file: everything that a step changes (`loss.TrainState`), and
as JSON where the run stands and which run it is. This module reads and writes such
files; when to do so is decided in `training`.
"""

import errno
import hashlib
import json
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from gemma_lora.loss import TrainState
from gemma_lora.options import a_path, whole_number

# If the newest file is damaged, there is the one before.
_FILES_KEPT = 2
_FORMAT = 2


@dataclass
class Checkpoint:
    """Where a run stands.

    Attributes:
        epoch: Epochs that are complete.
        step: Steps of the next epoch that are done.
        history: Values by name for each complete epoch, as in a Keras `History`.
        curve: The loss curve so far, from `LossCurve.saved`; None at the start.
        state: Everything that a step changes.
    """

    epoch: int
    step: int
    history: dict[str, list[float]]
    curve: list | None
    state: TrainState


class Checkpoints:
    """The checkpoints of one run, in a folder.

    A file is complete or it does not exist: we write under another name, then rename.
    If a checkpoint cannot be saved while training goes on, that is a warning, not the
    end.

    Args:
        folder: Made if it does not exist.
        run: What makes a run the same run, in JSON's types. Checkpoints of another run
            are refused.
        start: The state that the run begins with.
        every: Steps from one checkpoint to the next.
        earlier: Epochs that the adapters were trained for before this run began. After
            `newest`, the attribute says what the run's first process said.

    Raises:
        ValueError: `every` is not a positive whole number.
    """

    def __init__(
        self, folder: str | Path, run: dict, start: TrainState, *, every: int, earlier: float = 0
    ):
        every = whole_number("checkpoint_every", every)
        self.folder = a_path("checkpoint_dir", folder)
        self.every = every
        # Through JSON and back, so that it compares equal with what a file holds.
        self._run = json.loads(json.dumps({"format": _FORMAT, **run}))
        self._start = start
        self.earlier = earlier
        self._first_adapters = _digest(start.adapters)

    def newest(self) -> Checkpoint | None:
        """Return the newest readable checkpoint; else write a first one.

        Returns:
            The checkpoint, or None for a run that has just begun.

        Raises:
            ValueError: The newest checkpoint belongs to another run.
            OSError: Nothing can be written to the folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob("*.part"):
                unfinished.unlink()
            saved = self._newest_readable()
            if saved is None:
                self._write(Checkpoint(0, 0, {}, None, self._start))
                return None
        except OSError as error:
            raise OSError(
                error.errno,
                f"Checkpoints cannot be written to {self.folder} ({error.strerror}). Nothing was "
                "trained. Choose another checkpoint_dir, or free the disk",
            ) from None
        about, arrays = saved
        self._check_same_run(about["run"])
        state = self._as_state(arrays)
        self._warn_if_adapters_are_replaced(about["first adapters"], state.adapters)
        self._first_adapters = about["first adapters"]
        self.earlier = about.get("earlier epochs", 0)
        print(f"Going on from {self.folder}: epoch {about['epoch'] + 1}, step {about['step'] + 1}.")
        return Checkpoint(about["epoch"], about["step"], about["history"], about["curve"], state)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; if that fails, warn and let training go on."""
        try:
            self._write(checkpoint)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            reason = "the disk is full" if full else error.strerror or str(error)
            warnings.warn(
                f"No checkpoint of epoch {checkpoint.epoch + 1}, step {checkpoint.step}: {reason} "
                f"({self.folder}). Training goes on.",
                stacklevel=2,
            )

    def _write(self, checkpoint: Checkpoint) -> None:
        arrays = [_as_saved(array) for array in jax.tree.leaves(checkpoint.state)]
        if not all(np.isfinite(array).all() for array in arrays):
            # Do not replace a checkpoint that works by one that does not.
            return
        about = {
            "run": self._run,
            "first adapters": self._first_adapters,
            "earlier epochs": self.earlier,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "history": checkpoint.history,
            "curve": checkpoint.curve,
        }
        path = self.folder / f"{checkpoint.epoch:04}-{checkpoint.step:08}.npz"
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.savez(file, json.dumps(about), *arrays)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(self.folder.glob("*.npz"))[:-_FILES_KEPT]:
            old.unlink()

    def _newest_readable(self) -> tuple[dict, list[np.ndarray]] | None:
        shapes = [array.shape for array in jax.tree.leaves(self._start)]
        for path in sorted(self.folder.glob("*.npz"), reverse=True):
            try:
                with np.load(path, allow_pickle=False) as file:
                    # Reading checks the archive's own checksums.
                    about, *arrays = (file[name] for name in file.files)
                about = json.loads(str(about))
                same_run = about["run"] == self._run
                if same_run and [array.shape for array in arrays] != shapes:
                    raise ValueError("it holds arrays of other shapes")
                return about, arrays
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                print(f"The checkpoint {path.name} is damaged, so it is skipped: {error}")
        return None

    def _check_same_run(self, saved: dict) -> None:
        names = {**self._run, **saved}
        differs = [name for name in names if self._run.get(name) != saved.get(name)]
        if differs:
            shown = ", ".join(
                f"{name}={saved.get(name)!r:.60} (now {self._run.get(name)!r:.60})"
                for name in differs
            )
            raise ValueError(
                f"{self.folder} holds checkpoints of another run: {shown}. Choose another "
                "checkpoint_dir, or delete that folder."
            )

    def _as_state(self, arrays: list[np.ndarray]) -> TrainState:
        """Give saved arrays the dtypes and order of the state at the start."""
        leaves, structure = jax.tree.flatten(self._start)
        values = [jax.numpy.asarray(a, b.dtype) for a, b in zip(arrays, leaves, strict=True)]
        return jax.tree.unflatten(structure, values)

    def _warn_if_adapters_are_replaced(self, first: str, newest: list) -> None:
        expected = self._first_adapters in (first, _digest(newest))
        # Adapters that are new have nothing to lose: their B is zero.
        trained_before = all(np.any(array) for array in self._start.adapters)
        if trained_before and not expected:
            warnings.warn(
                f"The model's adapters are replaced by those of {self.folder}: they were neither "
                "what this run began with nor its newest. To train them, load them again and "
                "choose another checkpoint_dir.",
                stacklevel=4,
            )


def _as_saved(array) -> np.ndarray:
    """NumPy's files have no bfloat16, so it is widened."""
    return np.asarray(array, "float32" if array.dtype == "bfloat16" else None)


def _digest(arrays: list) -> str:
    contents = b"".join(np.asarray(array, "float32").tobytes() for array in arrays)
    return hashlib.sha256(contents).hexdigest()[:16]
