"""Where credentials for Kaggle are; what they are is never shown."""

import os
from pathlib import Path

from gemma_lora.tables import Table

NAMES = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY")


def find_credentials() -> Table:
    """Look where Kaggle's client looks, and say where something was found, never what: a row a place.

    In Colab, secrets that this notebook may read are put into the environment first: the client itself finds a user
    name and key there only if there is a token, too.
    """
    refused = _share_colab_secrets()
    home = Path.home() / ".kaggle"
    found = {
        "environment: KAGGLE_API_TOKEN": bool(os.environ.get("KAGGLE_API_TOKEN")),
        "file: ~/.kaggle/access_token": any((home / f"access_token{end}").is_file() for end in ("", ".txt")),
        "environment: KAGGLE_USERNAME and KAGGLE_KEY": all(os.environ.get(name) for name in NAMES[1:]),
        "file: kaggle.json": (Path(os.environ.get("KAGGLE_CONFIG_DIR") or home) / "kaggle.json").is_file(),
    }
    rows = [{"place": place, "found": "yes" if here else "no"} for place, here in found.items()]
    return Table(rows + [{"place": f"Colab secret: {name}", "found": reason} for name, reason in refused.items()])


def _share_colab_secrets() -> dict[str, str]:
    """Put Colab's secrets into the environment; for each that could not be read, why."""
    if "COLAB_RELEASE_TAG" not in os.environ:
        return {}
    from google.colab import userdata

    reasons = {
        userdata.SecretNotFoundError: "no",
        userdata.NotebookAccessError: "yes, but notebook access is off: switch it on beside the secret",
        userdata.TimeoutException: "Colab did not answer: run this cell again",
    }
    refused = {}
    for name in NAMES:
        if not os.environ.get(name):
            try:
                os.environ[name] = userdata.get(name).strip()
            except Exception as error:  # Colab's own three, or a process that has no page to ask
                refused[name] = reasons.get(type(error), "could not be asked for: that takes a notebook's page")
    return refused
