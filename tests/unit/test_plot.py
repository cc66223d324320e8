from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgrpo.commands.curves import panels_of, read_metrics
from pgrpo.commands.plot import draw, plot, smooth
from pgrpo.config import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step_row(step: int) -> dict:
    return {
        "step": step,
        "reward": step / 10,
        "rewards/exact_match/mean": step / 20,
        "completions/mean_length": 30.0,
        "entropy": None if step == 2 else 1.0,
        "time/rollout": 2.0,
        "time/update": 1.0,
        "time/step": 3.5,
        "kl": None,
    }


def axes_of(figure) -> list[Any]:
    return figure.axes


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_panels_are_those_with_data(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 0, "eval/reward": 0.1}, *map(step_row, range(1, 6))])
    figure = draw({"run": read_metrics(run)})
    assert titles(figure) == ["Reward", "Held-out rewards", "Completion length", "Entropy", "Time of a step"]
    reward, held_out, _, entropy, time = axes_of(figure)
    assert [line.get_label() for line in reward.lines] == ["reward", "rewards/exact_match/mean"]
    np.testing.assert_allclose(reward.lines[0].get_xydata(), [[s, s / 10] for s in range(1, 6)])
    np.testing.assert_allclose(held_out.lines[0].get_xydata(), [[0, 0.1]])
    assert list(entropy.lines[0].get_xdata()) == [1, 3, 4, 5]
    assert [text.get_text() for text in time.get_legend().get_texts()] == ["rollout", "update", "step"]
    stacked_top = max(path.vertices[:, 1].max() for path in time.collections[-1].get_paths())
    assert stacked_top == pytest.approx(3.0)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_equal_series_are_one_line_under_all_names(tmp_path):
    rows = [{"step": s, "reward": s / 3, "rewards/a/mean": s / 3, "rewards/b/mean": 1.0} for s in range(5)]
    (reward,) = axes_of(draw({"run": rows}))
    assert [line.get_label() for line in reward.lines] == ["reward,\nrewards/a/mean", "rewards/b/mean"]


def test_smooth_against_a_plain_loop():
    values = np.random.default_rng(0).normal(size=200)
    values[[0, 17, 199]] = np.nan
    expected = [np.nanmean(values[max(0, i - 5) : i + 6]) for i in range(200)]
    np.testing.assert_allclose(smooth(values), expected, rtol=1e-12)
    np.testing.assert_array_equal(smooth(np.array([1.0, np.nan, 3.0])), [1.0, np.nan, 3.0])


def test_long_runs_have_a_light_raw_line_and_a_smooth_one(tmp_path):
    run = write_run(tmp_path / "run", [{"step": s, "entropy": float(s % 2)} for s in range(400)])
    raw, smoothed = axes_of(draw({"run": read_metrics(run)}))[0].lines
    assert raw.get_alpha() == 0.25 and list(raw.get_ydata()[:3]) == [0, 1, 0]
    assert np.ptp(np.asarray(smoothed.get_ydata(), dtype=float)[20:-20]) < 0.06


def test_several_runs_in_one_png(tmp_path):
    runs = [write_run(tmp_path / name, [step_row(s) for s in range(1, 4)]) for name in ("a", "b", "x/a")]
    assert plot(runs, out=tmp_path / "out") == [tmp_path / "out" / "plot.png"]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(PNG)
    figure = draw({"a": read_metrics(runs[0]), "b": read_metrics(runs[1])})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [len(axes.lines) for axes in figure.axes[1:]] == [2] * 3


def test_more_runs_than_colors_are_told_apart_by_name_and_not_by_seed(tmp_path):
    rows = read_metrics(write_run(tmp_path / "run", [step_row(s) for s in range(1, 4)]))
    figure = draw({f"{name}_{seed}": rows for seed in range(3) for name in ("a", "b_2", "c")})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a_*", "b_2_*", "c_*"]
    colors = [line.get_color() for line in figure.axes[1].lines]
    assert colors == colors[:3] * 3
    assert len(set(colors)) == 3


def test_held_out_metrics_have_a_band_of_their_confidence_interval():
    ends = {"eval/ci95_low/greedy/pass@1": 0.4, "eval/ci95_high/greedy/pass@1": 0.75}
    rows = [{"step": s, "eval/greedy/pass@1": 0.5 + s / 10, **ends} for s in (0, 2)]
    (axes,) = axes_of(draw({"run": rows}))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0.5, 0.7])
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} == {(0, 0.4), (2, 0.4), (0, 0.75), (2, 0.75)}


def test_a_row_that_is_still_being_written_is_left_out_and_steps_are_merged(tmp_path):
    run = write_run(
        tmp_path / "run", [{"step": 2, "reward": 1.0}, {"step": 1, "reward": 0.5}, {"step": 2, "eval/reward": 2.0}]
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "re')
    assert read_metrics(run) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0, "eval/reward": 2.0}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a run folder, it has no metrics.jsonl"),
        ("", "no step has been logged yet"),
        ('{"step": 1}\n', "no step has been logged yet"),
        ('{"step": 1, "x": 2}\nnoise\n', r"metrics\.jsonl, line 2: not a row of a run"),
        ('{"step": 1, "x": 2}\n', "none of the metrics that plot draws"),
    ],
)
def test_clear_errors(tmp_path, content, message):
    with pytest.raises(ConfigError, match="nowhere: no such run folder"):
        plot(tmp_path / "nowhere")
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=message):
        plot(tmp_path)
    assert not (tmp_path / "plot.png").exists()


def test_legends_hide_no_data_axes_do_not_go_below_zero_and_ticks_are_whole_numbers():
    rows = [
        {"step": s, "reward": -0.5 + s, "rewards/a/mean": s, "entropy": 1e-7 * (s - 1), "kl": 12345.0 + s}
        for s in range(1, 9)
    ]
    figure = draw({"run": rows})
    figure.canvas.draw()
    axes = {one.get_title(loc="left"): one for one in figure.axes}
    legend = axes["Reward"].get_legend()
    assert legend is not None and legend.get_window_extent().y1 < axes["Reward"].get_window_extent().y0
    assert axes["Entropy"].get_ylim()[0] == 0.0
    low = [{"step": s, "reward": s - 0.5 if s else -0.5} for s in range(3)]
    assert draw({"run": low}).axes[0].get_ylim()[0] < -0.5  # where values are negative, so is the axis
    for name, ticks in (("Entropy", "e-07"), ("KL to the reference model", "1234")):
        assert axes[name].yaxis.get_offset_text().get_text() == ""
        assert ticks in "".join(label.get_text() for label in axes[name].get_yticklabels())


def test_a_held_out_reward_that_is_pass_at_1_is_no_second_curve():
    rows = [{"step": s, "eval/pass@1": s / 9, "eval/reward": s / 9, "eval/rewards/format/mean": 1.0} for s in range(3)]
    found = {panel.title: names for panel, names in panels_of(rows)}
    assert found == {"Held-out split": ["eval/pass@1", "eval/reward"], "Held-out rewards": ["eval/rewards/format/mean"]}
