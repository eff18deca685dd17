import matplotlib.colors
import numpy as np
import pytest
from matplotlib.text import Text

import gemma_lora as gl
from gemma_lora.evaluation import Evaluation

LIGHT_PAGE = "#ffffff"
DARK_PAGE = "#111111"  # JupyterLab's


def luminance(color) -> float:
    """The relative luminance of a colour, as WCAG 2 defines it."""
    channels = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(color, page) -> float:
    """How well a colour stands out from a page: from 1, not at all, to 21."""
    dark, light = sorted([luminance(color), luminance(page)])
    return (light + 0.05) / (dark + 0.05)


def test_figures_show_what_they_are_given():
    figure = gl.plot_lengths([10, 20, 300], sequence_length=256)
    assert "33.3% longer than 256" in figure.axes[0].get_title(loc="left")
    before = Evaluation(1.0, 0.5, right={"open_qa": 0}, asked={"open_qa": 10})
    after = Evaluation(0.5, 0.9, right={"open_qa": 9}, asked={"open_qa": 10})
    axes = gl.plot_before_after(before, after).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.0, 0.9]
    assert [text.get_text() for text in axes.texts] == ["0.0%", "90.0%"]


def test_the_history_shows_the_way_through_each_epoch_and_the_held_out_loss_after_it():
    class History:
        history = {"loss": [2.0, 1.0], "val_loss": [2.5, 1.5]}  # noqa: RUF012
        curve = [(0.5, 3.0), (1, 1.0), (1.5, 1.0), (2, 1.0)]  # noqa: RUF012

    lines = gl.plot_history(History).axes[0].lines
    assert [list(np.asarray(line.get_ydata())) for line in lines] == [
        [3.0, 1.0, 1.0, 1.0],
        [2.5, 1.5],
    ]
    History.curve = [(0.5, 3.0), (1, 1.0), (1.5, 1.0)]  # stopped within the second epoch
    assert list(gl.plot_history(History).axes[0].lines[1].get_xdata()) == [1, 1.5]
    del History.curve  # as in a history of Keras's own
    assert list(gl.plot_history(History).axes[0].lines[0].get_xdata()) == [1, 2]


def test_an_adapter_is_shown_to_scale(tiny_lora):
    figure = gl.plot_lora(tiny_lora, "decoder_block_1/attention/query")
    sizes = {
        axes.get_title().splitlines()[0]: axes.images[0].get_array().shape for axes in figure.axes
    }
    assert sizes == {
        "W: 192 × 48": (192, 48),
        "A: 192 × 4": (192, 4),
        "B: 4 × 48": (4, 48),
        "A B: 192 × 48": (192, 48),
    }
    assert "all zero" in figure.axes[2].get_title()
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}) == 1


def test_figures_can_be_read_on_light_and_dark_pages(tiny_lora):
    before = Evaluation(1.0, 0.5, right={"open_qa": 0}, asked={"open_qa": 10})
    after = Evaluation(0.5, 0.9, right={"open_qa": 9}, asked={"open_qa": 10})

    class History:
        history = {"loss": [2.0], "val_loss": [1.5]}  # noqa: RUF012

    for figure in (
        gl.plot_lengths([10, 20, 300], sequence_length=256),
        gl.plot_history(History),
        gl.plot_lora(tiny_lora),
        gl.plot_before_after(before, after),
        gl.plot_bars({"greedy": 0.06}),
        gl.plot_memory(gl.memory_budget("gemma_2b_en", compile=False)),
    ):
        figure.draw_without_rendering()
        assert figure.get_facecolor()[3] == 0
        assert all(axes.get_facecolor()[3] == 0 for axes in figure.axes)
        for text in figure.findobj(Text):
            if text.get_text():
                # 3 is what WCAG 2 asks of graphics and of large text.
                assert contrast(text.get_color(), LIGHT_PAGE) >= 3, text
                assert contrast(text.get_color(), DARK_PAGE) >= 3, text


def test_the_memory_of_each_use_is_drawn_beside_the_devices():
    budget = gl.memory_budget("gemma_2b_en", compile=False)
    axes = gl.plot_memory(budget).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == [
        f"{budget.training / 2**30:.3g} GiB",
        f"{budget.generation / 2**30:.3g} GiB",
    ]
    assert texts[2:] == ["T4", "L4"]


@pytest.mark.parametrize(
    "family",
    [
        "gemma_many_kv",
        pytest.param("gemma2", marks=pytest.mark.full),
        pytest.param("gemma3", marks=pytest.mark.full),
    ],
)
def test_adapters_of_all_layers_of_each_family_can_be_shown(random_model, family):
    model = random_model(family)
    gl.enable_lora(model, targets="all_linear")
    from gemma_lora.lora import lora_layers

    for path in [*lora_layers(model)][:7]:
        assert path in gl.plot_lora(model, path).get_suptitle()


def test_bars_are_labelled_from_top_to_bottom():
    axes = gl.plot_bars({"greedy": 0.06, "top-k": 0.33}, form="{:.0%}").axes[0]
    assert [text.get_text() for text in axes.texts] == ["6%", "33%"]
    assert axes.yaxis_inverted()


def test_figures_refuse_what_they_cannot_show(tiny):
    asked = [Evaluation(1.0, 0.5, right={name: 0}, asked={name: 1}) for name in "ab"]
    with pytest.raises(ValueError, match="no lengths"):
        gl.plot_lengths([])
    with pytest.raises(ValueError, match="no values"):
        gl.plot_bars({})
    with pytest.raises(ValueError, match="asked the same"):
        gl.plot_before_after(*asked)
    with pytest.raises(ValueError, match="The model has no adapters to draw"):
        gl.plot_lora(tiny)
