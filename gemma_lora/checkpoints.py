"""Save a run while it goes on, and go on from there when a runtime has died."""

import errno
import hashlib
import json
import os
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np

from gemma_lora.batches import Batches

_KEPT = 2  # files: if the newest is damaged, there is the one before


class Checkpoints(keras.callbacks.Callback):
    """Writes adapters, optimizer, metrics, position and history to `folder`, every `every` steps and at the end.

    A file is complete or not there: it is written under another name, and then renamed. What cannot be saved while
    training goes on is a warning, not the end of the run.

    Args:
        run: What makes a run the same run, in JSON's types; a folder with another one is refused.
        curve: Points of the loss curve, saved with the rest.
    """

    def __init__(
        self, folder: str | Path, trainer, batches: Batches, *, run: dict, curve, every: int
    ):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"checkpoint_every counts steps, 1 or more. Received: {every!r}")
        self.folder, self._trainer, self._batches = Path(folder).expanduser(), trainer, batches
        self._run, self._curve, self._every = json.loads(json.dumps(run)), curve, every
        self.epoch = self.step = 0
        self.history: dict[str, list[float]] = {}
        self._metrics = self._arrays = None
        self._start = _digest(
            trainer.trainable_variables
        )  # of the adapters that the run began with

    def resume(self) -> None:
        """Go back to the newest checkpoint that can be read: sets `epoch`, `step` and `history`.

        Raises:
            ValueError: The checkpoint is of another run.
            OSError: Nothing can be written to the folder.
        """
        self._trainer.optimizer.build(self._trainer.trainable_variables)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.part"):  # of a process that was ended while it wrote
                left.unlink()
            found = self._newest()
            if found is None:
                self._write([variable.value for variable in self._variables()])
        except OSError as error:
            raise OSError(
                error.errno, f"Checkpoints cannot be written to {self.folder} ({error.strerror}). Nothing was trained. "
                "Choose another checkpoint_dir, or free the disk"
            ) from None  # fmt: skip
        if found is None:
            return
        state, arrays = found
        differs = [
            name
            for name in {**self._run, **state["run"]}
            if self._run.get(name) != state["run"].get(name)
        ]
        if differs:
            was = ", ".join(
                f"{name}={state['run'].get(name)!r:.60} (now {self._run.get(name)!r:.60})"
                for name in differs
            )
            raise ValueError(
                f"{self.folder} holds checkpoints of another run: {was}. Choose another checkpoint_dir, or delete it."
            )
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self._curve.restore(state["curve"])
        adapters = self._trainer.trainable_variables
        known = state["start"], _digest(arrays[: len(adapters)])
        if self._start not in known and all(
            np.any(weight) for weight in adapters
        ):  # new ones have no B but zero
            warnings.warn(
                f"The model's adapters are replaced by those of {self.folder}: they were neither what this run began "
                "with nor its newest. To train them, load them again and choose another checkpoint_dir.",
                stacklevel=3,
            )
        self._start = state["start"]
        own = len(arrays) - len(self._trainer.metrics_variables)
        for variable, value in zip(self._variables()[:own], arrays[:own], strict=True):
            variable.assign(value)
        self._metrics = arrays[own:] if self.step else None
        print(f"Going on from {self.folder}: epoch {self.epoch + 1}, step {self.step + 1}.")

    def on_epoch_begin(self, epoch, logs=None):
        if self._metrics is not None:  # Keras has set them to zero just now
            for variable, value in zip(self._trainer.metrics_variables, self._metrics, strict=True):
                variable.assign(value)
        self._metrics, self.epoch = None, epoch

    def after_step(self, arrays: list) -> None:
        """Take what a step left, in the order of adapters, optimizer and metrics, and save it where it is time."""
        self.step, self._arrays = self.step + 1, arrays
        if self.step % self._every == 0:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        if self.step == len(self._batches.tokens()):  # else: Ctrl-C
            self.epoch, self.step = epoch + 1, 0
            for name, value in (logs or {}).items():
                self.history.setdefault(name, []).append(float(value))
        self._save()

    def _variables(self) -> list:
        trainer = self._trainer
        return [
            *trainer.trainable_variables,
            *trainer.optimizer.variables,
            *trainer.metrics_variables,
        ]

    def _save(self) -> None:
        try:
            self._write(self._arrays)
        except OSError as error:
            what = (
                "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            )
            warnings.warn(
                f"No checkpoint of epoch {self.epoch + 1}, step {self.step}: {what} ({self.folder}). Training goes on.",
                stacklevel=2,
            )

    def _write(self, arrays: list) -> None:
        arrays = [np.asarray(a, "float32" if a.dtype == "bfloat16" else None) for a in arrays]
        if not all(np.isfinite(array).all() for array in arrays):
            return  # not over a checkpoint that can be used
        state = {"run": self._run, "start": self._start, "epoch": self.epoch, "step": self.step}
        state |= {"history": self.history, "curve": self._curve.state(self.epoch, self.step)}
        path = self.folder / f"{self.epoch:04}-{self.step:08}.npz"
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.savez(file, json.dumps(state), *arrays)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        for old in sorted(self.folder.glob("*.npz"))[:-_KEPT]:
            old.unlink()

    def _newest(self) -> tuple[dict, list] | None:
        for path in sorted(self.folder.glob("*.npz"), reverse=True):
            try:
                with np.load(path, allow_pickle=False) as file:
                    state, *arrays = (
                        file[name] for name in file.files
                    )  # reading checks the sums of the archive
                state = json.loads(str(state))
                if state["run"] == self._run and [a.shape for a in arrays] != [
                    tuple(v.shape) for v in self._variables()
                ]:
                    raise ValueError("other shapes")
                return state, arrays
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                print(f"The checkpoint {path.name} is damaged, and passed over: {error}")
        return None


def _digest(weights: list) -> str:
    return hashlib.sha256(
        b"".join(np.asarray(weight, "float32").tobytes() for weight in weights)
    ).hexdigest()[:16]
