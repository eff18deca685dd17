"""Run the notebooks in JupyterLab and a browser, and photograph them, light and dark.

python tests/browser.py [part of a notebook's name ...]

It fails if a cell fails, a picture does not show or a table is cut off. Whether the
rest looks right, a person decides by looking at artifacts/browser/NAME-light-01.png and
so on. It needs the extra `browser`, and Chromium.
"""

import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from notebooks import NOTEBOOKS, ROOT

PICTURES = ROOT / "artifacts/browser"
# Seconds that a notebook may take.
LIMIT = 600
# Pixels that a page repeats of the one above, so that no line is lost between two.
OVERLAP = 60
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
SETTINGS = {
    # Every cell is in the page, not only those in view, and nothing below the last.
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip

READY = """() => {
    const context = window.jupyterapp?.shell.currentWidget?.sessionContext;
    return context?.session?.kernel?.status === 'idle';
}"""
RUN = """async () => {
    const {commands, shell} = jupyterapp;
    // Run-all ends at the first error, even at one that is expected. The kernel answers an
    // empty request when it has run all cells before.
    const kernel = shell.currentWidget.sessionContext.session.kernel;
    const through = () => kernel.requestExecute({code: ''}).done;
    await commands.execute('application:toggle-left-area');
    await commands.execute('notebook:clear-all-cell-outputs');
    window.ended = false;
    commands.execute('notebook:run-all-cells').finally(through).finally(() => window.ended = true);
}"""
CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.filter(
    cell => cell.model.type === 'code'
).map(cell => {
    const {source, execution_count, outputs, metadata} = cell.model.toJSON();
    const expected = metadata.tags?.includes('raises-exception');
    const errors = expected ? [] : outputs.filter(output => output.output_type === 'error');
    return {
        line: [source].flat().join('').trim().split('\\n')[0],
        run: execution_count !== null,
        errors: errors.map(error => `${error.ename}: ${error.evalue}`),
    };
}).filter(cell => cell.line)"""
PICTURES_LOADED = (
    "() => [...document.querySelectorAll('.jp-Notebook img')].every(image => image.complete)"
)
FLAWS = """() => jupyterapp.shell.currentWidget.content.widgets.flatMap(({model, node}) => {
    const cell = `cell \\`${model.sharedModel.getSource().trim().split('\\n')[0]}\\``;
    const own = image => !/^https?:/.test(image.src) || image.src.startsWith(location.origin);
    const empty = [...node.querySelectorAll('img')].filter(
        image => own(image) && !image.naturalWidth);
    const cut = [...node.querySelectorAll('.jp-OutputArea-output, .jp-MarkdownOutput')].filter(
        area => area.scrollWidth > area.clientWidth + 1);
    const sizes = area => `${area.scrollWidth} pixels wide where ${area.clientWidth} show`;
    return [
        ...empty.map(image => `${cell}: a picture does not show: ${image.src.slice(0, 80)}`),
        ...cut.map(area => `${cell}: cut off, ${sizes(area)}`),
    ];
})"""


@contextmanager
def jupyterlab(path: Path):
    """Serve a copy of a notebook's folder, and yield the address of the notebook.

    The server reads nobody's settings: it has empty folders of its own.
    """
    with tempfile.TemporaryDirectory(
        prefix="gemma_lora_browser_", ignore_cleanup_errors=True
    ) as folder:
        home = Path(folder)
        shutil.copytree(
            path.parent, home / "notebooks", ignore=shutil.ignore_patterns("artifacts", ".ipynb*")
        )
        for name, values in SETTINGS.items():
            file = home / f"settings/@jupyterlab/{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(values))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        token = secrets.token_hex()
        options = {
            "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
            "ServerApp.root_dir": home / "notebooks", "ServerApp.allow_root": True,
            "LabApp.expose_app_in_browser": True,
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            *(f"--{k}={v}" for k, v in options.items()),
        ]
        log = home / "log.txt"
        with log.open("w") as output:
            # A session of its own: Ctrl-C is for us, and we end the server, which then
            # ends its kernels.
            server = subprocess.Popen(
                command,
                env=environment_in(home, token),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for(port, server, log)
            yield f"http://127.0.0.1:{port}/lab/tree/{path.name}?token={token}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def environment_in(home: Path, token: str) -> dict[str, str]:
    """Return the server's environment: nobody's settings, and no parameters of ours."""
    folders = {
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython",
    }  # fmt: skip
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GEMMA_LORA_")
    }
    environment |= {name: str(home / folder) for name, folder in folders.items()}
    environment["JUPYTER_TOKEN"] = token
    return environment


def wait_for(port: int, server: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers; raise RuntimeError if it does not in a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(
        f"JupyterLab did not start. The end of what it said:\n{log.read_text()[-2000:]}"
    )


def run(page, name: str) -> tuple[int, list[str]]:
    """Run all cells of the open notebook; return their number, and the faults."""
    page.wait_for_function(READY, timeout=120_000)
    page.evaluate(RUN)
    start = time.monotonic()
    shown = None
    while True:
        ended = page.evaluate("window.ended")
        cells = page.evaluate(CELLS)
        seconds = time.monotonic() - start
        done = sum(cell["run"] for cell in cells)
        if done != shown:
            print(f"{name}: {done} of {len(cells)} cells, {seconds:.0f} s", flush=True)
        if ended or seconds > LIMIT:
            break
        shown = done
        page.wait_for_timeout(1000)
    faults = [
        f"code cell {n}, `{c['line']}`: {error}"
        for n, c in enumerate(cells, 1)
        for error in c["errors"]
    ]
    missing = [f"code cell {n}, `{c['line']}`" for n, c in enumerate(cells, 1) if not c["run"]]
    if missing and not faults:
        why = "the kernel stopped there" if ended else f"it was not done after {LIMIT} s"
        faults.append(f"{missing[0]} has no result: {why}")
    return len(cells), faults


def unfold(page) -> list[str]:
    """Unfold what is folded, such as solutions; return what then shows no text."""
    faults = []
    for block in page.locator(".jp-MarkdownOutput details").all():
        summary = block.locator("summary").first
        if block.get_attribute("open") is None:
            summary.click()
        label = summary.inner_text()
        if not block.inner_text().replace(label, "", 1).strip():
            faults.append(f"{label!r} unfolds to nothing")
    return faults


def photograph(page, name: str, theme: str) -> int:
    """Save the whole notebook as pages, and return how many."""
    page.evaluate(
        "theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", THEMES[theme]
    )
    page.wait_for_function(
        "theme => document.body.dataset.jpThemeName === theme", arg=THEMES[theme]
    )
    page.wait_for_function(PICTURES_LOADED)
    area = page.locator(".jp-NotebookPanel .jp-WindowedPanel-outer")
    height, seen = area.evaluate("area => [area.scrollHeight, area.clientHeight]")
    pages = max(1, math.ceil((height - OVERLAP) / (seen - OVERLAP)))
    for number in range(pages):
        area.evaluate(
            "(area, top) => area.scrollTo({top, behavior: 'instant'})", number * (seen - OVERLAP)
        )
        page.wait_for_timeout(300)
        area.screenshot(
            path=PICTURES / f"{name}-{theme}-{number + 1:02}.png", animations="disabled"
        )
    return pages


def visit(browser, path: Path) -> dict:
    """Run and photograph one notebook; return its line of the summary."""
    start = time.monotonic()
    name = path.stem
    result = {"notebook": name, "cells": 0, "pictures": 0, "faults": []}
    for old in PICTURES.glob(f"{name}-*.png"):
        old.unlink()
    context = browser.new_context(viewport={"width": 1280, "height": 1600})
    try:
        with jupyterlab(path) as address:
            page = context.new_page()
            # The badge of Colab is a remote picture: nobody should wait for it.
            page.route(re.compile(r"https?://(?!127\.0\.0\.1[:/])"), lambda route: route.abort())
            page.goto(address)
            result["cells"], result["faults"] = run(page, name)
            result["pictures"] += photograph(page, name, "light")
            result["faults"] += unfold(page)
            result["pictures"] += photograph(page, name, "dark")
            result["faults"] += page.evaluate(FLAWS)
    # Whatever went wrong, the other notebooks have their turn.
    except Exception as error:
        result["faults"].append(f"{type(error).__name__}: {error}")
    finally:
        # Ctrl-C may have ended the browser already.
        with suppress(Exception):
            context.close()
    return result | {"seconds": round(time.monotonic() - start)}


def main(parts: list[str]) -> int:
    """Visit the notebooks whose names hold a part; return 1 if one has a fault."""
    chosen = [path for path in NOTEBOOKS if not parts or any(part in path.stem for part in parts)]
    if not chosen:
        sys.exit(
            f"No notebook is named like {' or '.join(parts)}. "
            f"There are: {', '.join(path.stem for path in NOTEBOOKS)}"
        )
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        sys.exit(
            "No chromium, chromium-browser or google-chrome on the PATH. "
            "On Debian: apt-get install chromium; elsewhere install Chromium or Chrome."
        )
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sys.exit(
            "Playwright is missing. `make test-browser` installs it, and so does: "
            "pip install -e '.[dev,browser]'"
        )
    # An exit ends the server and the browser; the default would not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM)
        results = [visit(browser, path) for path in chosen]
        browser.close()
    print()
    for result in results:
        print(
            "{notebook}: {cells} cells, {seconds} s, {pictures} pictures".format_map(result),
            end=", ",
        )
        print("\n    ".join([f"{len(result['faults'])} errors", *result["faults"]]))
    print(f"Now look at the pictures: {PICTURES}")
    return int(any(result["faults"] for result in results))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
