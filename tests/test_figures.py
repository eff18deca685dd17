import numpy as np
import pytest

import gemma_lora as gl


def test_figures_show_what_they_are_given():
    figure = gl.plot_lengths([10, 20, 300], sequence_length=256)
    assert "33.3% cut" in figure.axes[0].get_title(loc="left")
    bars = gl.plot_before_after({"open_qa": 0.0}, {"open_qa": 0.9}).axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.0, 0.9]

    class History:
        history = {"loss": [2.0, 1.0], "val_loss": [2.5, 1.5]}  # noqa: RUF012

    lines = gl.plot_history(History).axes[0].lines
    assert [list(np.asarray(line.get_ydata())) for line in lines] == [[2.0, 1.0], [2.5, 1.5]]


@pytest.mark.parametrize("call", [lambda: gl.plot_lengths([]), lambda: gl.plot_before_after({"a": 1}, {"b": 1})])
def test_figures_refuse_what_they_cannot_show(call):
    with pytest.raises(ValueError, match=r"no lengths|same labels"):
        call()
